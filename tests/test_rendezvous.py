# SPDX-License-Identifier: Apache-2.0
"""Where rank 0 listens: as narrowly as the others can reach it."""

import errno
import socket

import pytest

from merit_ds.training.rendezvous import listen

ELSEWHERE = "192.0.2.1"  # kept for documentation (RFC 5737): no host has it


def bound(address, *, several_hosts):
    with listen(address, 0, several_hosts=several_hosts) as listener:
        assert listener.getsockname()[1] > 0
        return listener.getsockname()[0]


def test_the_ranks_of_one_host_meet_on_its_loopback():
    assert bound("localhost", several_hosts=False) in ("127.0.0.1", "::1")
    assert bound("127.0.0.1", several_hosts=False) == "127.0.0.1"


def test_several_hosts_meet_at_the_masters_address():
    """An address of this host's that is not loopback; Linux takes all of 127/8 for its own, which are."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((ELSEWHERE, 9))  # sends nothing: it only asks for the route
        except OSError:
            pytest.skip("this machine has no address but loopback's")
        own = probe.getsockname()[0]
    assert bound(own, several_hosts=True) == own


@pytest.mark.parametrize("address", ["127.0.1.1", ELSEWHERE, "no-such-host.invalid"])
def test_where_that_would_reach_nobody_it_is_every_address(address):
    """Debian's name for the host itself, a Kubernetes service's address, a name that only others can resolve."""
    assert bound(address, several_hosts=True) in ("::", "0.0.0.0")


def test_a_port_that_is_taken_is_not_gone_around():
    with listen("127.0.0.1", 0, several_hosts=False) as first, pytest.raises(OSError) as failure:
        listen("127.0.0.1", first.getsockname()[1], several_hosts=False)
    assert failure.value.errno == errno.EADDRINUSE
