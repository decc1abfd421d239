# SPDX-License-Identifier: Apache-2.0
"""Five resumes of the fifty of `make soak`."""

from soak import soak


def test_a_job_that_is_killed_at_random_ends_as_the_undisturbed_one(hosts, folder):
    assert soak(hosts, folder, kills=5, seed=2, say=print) == 5
