# SPDX-License-Identifier: Apache-2.0
"""Who decides what becomes of the lines: the program, where it sets up logging, before Merit speaks or later."""

import subprocess
import sys

import pytest

SPEAK = "import logging, sys; from merit_ds.log import user_logger; "


def lines(program):
    return subprocess.run(
        [sys.executable, "-c", SPEAK + program], check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ).stdout.split("\n")[:-1]


@pytest.mark.parametrize(
    ("program", "shown"),
    [
        ("user_logger().info('found')", ["found"]),
        ("logging.basicConfig(level='WARNING'); user_logger().info('found'); user_logger().warning('slow')", ["slow"]),
        ("logging.basicConfig(level='INFO'); user_logger().info('found')", ["found"]),
        ("user_logger().info('found'); logging.basicConfig(level='INFO'); user_logger().info('again')", None),
    ],
)
def test_a_line_is_shown_once_and_as_the_program_says(program, shown):
    spoken = lines(program.replace("basicConfig(", "basicConfig(format='%(message)s', "))
    assert spoken == (shown or ["found", "again"])


def test_a_level_that_the_program_has_set_stays():
    assert lines("logging.getLogger('merit_ds').setLevel('ERROR'); user_logger().warning('slow')") == []
