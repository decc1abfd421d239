# SPDX-License-Identifier: Apache-2.0
"""A process ends with its own status while gloo's threads still hold tensors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("gloo_exit_script.py")


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")
def test_an_exit_waits_for_threads_that_hold_tensors():
    finished = subprocess.run([sys.executable, SCRIPT, "--settle"], capture_output=True, text=True, timeout=120)
    assert (finished.returncode, finished.stderr) == (0, "")
