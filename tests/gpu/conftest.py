# SPDX-License-Identifier: Apache-2.0
"""Tests that need a GPU: `make test-gpu`. docs/gpu.md says what they have run on."""

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items):
    """pytest hands over the items of all folders."""
    if not torch.cuda.is_available():
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="no GPU here: run make test-gpu where there is one"))
