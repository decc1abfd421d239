# SPDX-License-Identifier: Apache-2.0
"""MERIT (arXiv 2508.20577), exact under DeepSpeed ZeRO."""

__version__ = "0.1.0"
