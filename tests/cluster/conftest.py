# SPDX-License-Identifier: Apache-2.0
"""The hosts that the tests share, and the recipe's text."""

from pathlib import Path

import hosts as test_bed
import job
import launch
import pytest


def pytest_collection_modifyitems(items):
    """Every test here needs hosts; pytest hands over those of other folders as well."""
    reason = test_bed.missing()
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        item.add_marker(pytest.mark.cluster)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with test_bed.Hosts(tmp_path_factory.mktemp("hosts"), 3) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory on the shared disk, with text and what the ranks need."""
    path = tmp_path_factory.mktemp("job")
    launch.prepare_text(path)
    job.write_environment(path)
    return path
