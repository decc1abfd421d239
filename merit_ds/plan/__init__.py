# SPDX-License-Identifier: Apache-2.0
"""Plan before you pay: `python -m merit_ds.plan --help`."""
