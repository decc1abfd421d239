# SPDX-License-Identifier: Apache-2.0
"""What to look at in a run: values sampled while it trains, and the Hessian of a checkpoint."""
