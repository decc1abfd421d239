# SPDX-License-Identifier: Apache-2.0
"""Megatron-core in the test's process alone."""

from merit_ds.training.alone import megatron_alone

__all__ = ["megatron_alone"]
