# SPDX-License-Identifier: Apache-2.0
"""When a job is lost, and who is to blame: the judge among the guards, without any process."""

import pytest

from merit_ds.training.guard.judge import LEAVE_SECONDS, SETTLE_SECONDS, SLOW, Judge

TIMEOUT = 20.0


def judge(world=3):
    """All have arrived, and have begun the same three things."""
    made = Judge(world=world, timeout=TIMEOUT, beat=1.0, now=0.0)
    for rank in range(world):
        made.arrived(rank, f"h{rank}", 1.0)
        beat(made, rank, 2.0, marks=3)
    return made


def beat(made, rank, now, *, marks, doing="in the forward pass of step 7", event="beat", state="S", **more):
    message = {
        "event": event,
        "marks": marks,
        "pulse": 0,
        "doing": doing,
        "slow": False,
        "state": state,
        "reason": None,
    }
    made.heard(rank, message | more, now)


def later(made, now, *, marks, **messages):
    """Everybody beats every second until `now`; `messages` are rank0=..., by rank."""
    for second in range(3, int(now) + 1):
        for rank in made.ranks:
            beat(made, rank, float(second), marks=marks, **messages.get(f"rank{rank}", {}))


def test_a_job_that_comes_further_is_not_lost():
    made = judge()
    for second in range(3, 100):
        for rank in range(3):
            beat(made, rank, float(second), marks=second)
        assert made.verdict(float(second)) is None
    assert not made.all_left()
    for rank in range(3):
        beat(made, rank, 100.0, marks=100, event="left")
    assert made.verdict(1000.0) is None and made.all_left()


def test_a_killed_rank_is_the_cause_of_the_errors_around_it():
    made = judge()
    beat(made, 0, 3.0, marks=3, event="left", reason="RuntimeError: Connection reset by peer")
    beat(made, 1, 3.5, marks=3, event="died")
    made.disconnected(2, 3.6)
    assert made.verdict(3.5 + SETTLE_SECONDS / 2) is None
    line = made.verdict(3.5 + SETTLE_SECONDS)
    assert line == "rank 1 on h1 was killed or crashed while in the forward pass of step 7"
    assert not made.all_left()


def test_a_host_that_goes_down_comes_before_the_errors_around_it():
    made = judge()
    beat(made, 0, 3.0, marks=3, event="left", reason="RuntimeError: Connection reset by peer")
    made.disconnected(2, 3.6)
    assert made.verdict(3.6 + SETTLE_SECONDS).startswith("rank 2 on h2 is gone, last seen in the forward pass")


def test_an_error_is_everybodys_end_only_where_others_do_not_end():
    made = judge()
    beat(made, 1, 3.0, marks=3, event="left", reason="InputError: no room")
    for second in range(3, 14):
        for rank in (0, 2):
            beat(made, rank, float(second), marks=3)
    assert made.verdict(3.0 + LEAVE_SECONDS - 1) is None
    assert (
        made.verdict(3.0 + LEAVE_SECONDS)
        == "rank 1 on h1 stopped while in the forward pass of step 7: InputError: no room"
    )
    for rank in (0, 2):
        beat(made, rank, 14.0, marks=3, event="left", reason="InputError: no room")
    assert made.all_left()


def test_a_rank_that_does_not_come_is_named():
    made = Judge(world=4, timeout=TIMEOUT, beat=1.0, now=0.0)
    for rank in (0, 2):
        made.arrived(rank, "h0", 1.0)
    assert made.verdict(TIMEOUT) is None
    assert made.verdict(TIMEOUT + 1) == "ranks 1, 3 (2) of 4 did not start within 20 s"


def test_silence_is_noticed_after_the_timeout():
    made = judge()
    for second in range(3, 30):
        for rank in (0, 1):
            beat(made, rank, float(second), marks=second)
    assert made.verdict(2.0 + TIMEOUT) is None
    assert made.verdict(2.5 + TIMEOUT).startswith("rank 2 on h2 has not been heard of for 20 s")


@pytest.mark.parametrize(
    ("messages", "line"),
    [
        (
            {"rank1": {"state": "T"}},
            "rank 1 on h1 has been in the forward pass of step 7 for 28 s (its process is st",
        ),
        ({"rank2": {"doing": "reading step 7"}}, "no rank has come further for 28 s"),
    ],
)
def test_a_job_that_stands_still_is_lost(messages, line):
    made = judge()
    later(made, 30, marks=3, **messages)
    assert made.verdict(30.0).startswith(line)


def test_the_rank_that_is_behind_is_named():
    made = judge()
    for rank in (0, 1):
        beat(made, rank, 4.0, marks=4, doing="in the backward pass of step 7")
    for second in range(5, 31):
        for rank in range(3):
            beat(made, rank, float(second), marks=4 if rank < 2 else 3)
    assert made.verdict(30.0) == "rank 2 on h2 has been in the forward pass of step 7 for 28 s: the others wait"


def test_an_error_in_the_start_is_told_to_ranks_that_come_later():
    made = Judge(world=3, timeout=TIMEOUT, beat=1.0, now=0.0)
    made.arrived(0, "h0", 1.0)
    beat(made, 0, 2.0, marks=1, event="left", reason="InputError: a lock", doing="starting")
    assert not made.all_left()
    assert made.verdict(2.0 + LEAVE_SECONDS) == "rank 0 on h0 stopped while starting: InputError: a lock"


def test_a_host_without_power_is_named_before_the_neighbours_that_fail():
    made = judge()
    for second in range(3, 12):
        for rank in (0, 1):
            beat(made, rank, float(second), marks=3)
    beat(made, 1, 12.0, marks=3, event="died")
    assert made.verdict(12.0 + SETTLE_SECONDS).startswith("rank 2 on h2 has not been heard of for 11 s")


def test_a_rank_that_comes_twice_is_named():
    made = judge()
    made.arrived(1, "h7", 3.0)
    assert made.verdict(3.0) == "rank 1 came from h1 and again from h7: two nodes have the same number"


def test_a_pulse_is_progress():
    made = judge()
    for second in range(3, 100):
        for rank in range(3):
            beat(made, rank, float(second), marks=4, pulse=second if rank == 2 else 0)
        assert made.verdict(float(second)) is None


def test_a_stopped_rank_is_not_slow_work():
    made = judge()
    for second in range(3, 31):
        for rank in range(3):
            beat(made, rank, float(second), marks=3, slow=True, state="T" if rank == 1 else "S")
    assert made.verdict(30.0).startswith("rank 1 on h1 has been ")


def test_slow_work_may_take_longer():
    made = judge()
    for second in range(3, 200):
        for rank in range(3):
            beat(made, rank, float(second), marks=4, slow=rank == 0)
    assert made.verdict(3 + SLOW * TIMEOUT) is None
    assert made.verdict(4 + SLOW * TIMEOUT).startswith("no rank has come further")
