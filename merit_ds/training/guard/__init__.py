# SPDX-License-Identifier: Apache-2.0
"""The process beside each rank: `__main__.py`; and what it decides by: `judge.py`."""
