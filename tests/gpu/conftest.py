# SPDX-License-Identifier: Apache-2.0
"""Tests that need a GPU: `make test-gpu`. They have not run on one yet."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "/gpu/" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason="no GPU here: run make test-gpu where there is one"))
