# SPDX-License-Identifier: Apache-2.0
"""A process ends with its own status while gloo's threads still hold tensors."""

import atexit
import os
import subprocess
import sys
from pathlib import Path

import pytest

from merit_ds import run
from merit_ds.gloo_threads import settle

SCRIPT = Path(__file__).with_name("gloo_exit_script.py")


def status(*options):
    return subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, timeout=120).returncode


def test_an_exit_waits_for_threads_that_hold_tensors():
    assert status("--settle") == 0


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")
def test_without_the_wait_the_same_exit_aborts():
    """Else the test above could not fail."""
    found = status()
    if found == 0:
        pytest.skip("nothing aborts: the machine is too busy for the trick, or torch has been mended")
    assert found == -6


def test_a_script_that_nobody_may_edit_waits(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text("")
    registered = []
    monkeypatch.setattr(atexit, "register", registered.append)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    run.main([str(tmp_path / "train.py")])
    assert registered == [settle]
