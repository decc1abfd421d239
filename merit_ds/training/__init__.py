# SPDX-License-Identifier: Apache-2.0
"""The trainer: config, data, model, loop, checkpoints. It imports the optimizer's side, never the reverse."""
