# SPDX-License-Identifier: Apache-2.0
"""Where rank 0 listens: as narrowly as the others can reach it."""

import errno
import socket
from types import SimpleNamespace

import psutil
import pytest
from ranks import free_port

from merit_ds.errors import InputError, TransientError
from merit_ds.training import watch
from merit_ds.training.rendezvous import listen, open_store, own_address

ELSEWHERE = "198.51.100.1"  # kept for documentation (RFC 5737): no host has it
EVERYWHERE = ("::", "0.0.0.0")


@pytest.fixture
def rank_zero(monkeypatch):
    """Of two ranks, on a free port; what `open_store` asks of a plan."""
    values = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    return SimpleNamespace(rank=0, local_rank=0, world=2, config=SimpleNamespace(run=SimpleNamespace(timeout=5.0)))


def listeners(port):
    sockets = psutil.Process().net_connections("tcp")
    return [one.laddr.ip for one in sockets if one.status == psutil.CONN_LISTEN and one.laddr.port == port]


@pytest.mark.parametrize(("ranks_here", "where"), [("2", ["127.0.0.1"]), ("1", EVERYWHERE)])
def test_a_store_listens_on_loopback_only_where_all_ranks_are_here(rank_zero, monkeypatch, ranks_here, where):
    """Another host would wait for a server that its own name has put on loopback."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks_here)
    store = open_store(rank_zero)
    store.set("key", "value")
    found = listeners(store.underlying_store.port)
    assert len(found) == 1 and found[0] in where


def test_the_server_that_the_process_has_is_shared(rank_zero):
    """The trainer's watch opens one, then the trainer, then torch."""
    first, second = open_store(rank_zero), open_store(rank_zero)
    first.set("key", "value")
    assert second.get("key") == b"value"
    assert len(listeners(first.underlying_store.port)) == 1


def test_a_port_that_another_has_is_refused_in_a_line(rank_zero, monkeypatch):
    """The laboratory starts a run again whose log says EADDRINUSE."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        with pytest.raises(InputError, match=r"cannot listen there: .*EADDRINUSE.*--master-port") as failure:
            open_store(rank_zero)
    assert not isinstance(failure.value, TransientError)
    assert "\n" not in str(failure.value)


def test_a_name_that_nobody_knows_is_refused_in_a_line(rank_zero, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    rank_zero.config.run.timeout = 0.5
    with pytest.raises(TransientError, match=r"no-such-host.invalid:\d+: rank 0 cannot listen there: .*--master-addr"):
        open_store(rank_zero)


def test_a_rank_zero_that_does_not_come_may_come_another_time(rank_zero):
    rank_zero.rank, rank_zero.config.run.timeout = 1, 0.5
    with pytest.raises(TransientError, match=r"localhost:\d+: rank 1 cannot reach rank 0 there: "):
        open_store(rank_zero)


def test_a_guard_that_does_not_start_is_not_waited_for(rank_zero, monkeypatch, tmp_path):
    """The others would look for it until the time-out."""
    monkeypatch.setattr(watch, "GUARD", tmp_path)
    with pytest.raises(InputError, match="rank 0's guard did not start"), watch.Watch(rank_zero):
        pass


def test_several_hosts_meet_at_the_masters_address():
    """An address of this host's that is not loopback; Linux takes all of 127/8 for its own, which are."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((ELSEWHERE, 9))  # sends nothing: it only asks for the route
        except OSError:
            pytest.skip("this machine has no address but loopback's")
        own = probe.getsockname()[0]
    assert own_address(own, several_hosts=True) == own
    with listen(own, 0) as listener:
        assert listener.getsockname()[0] == own


@pytest.mark.parametrize(
    ("address", "several_hosts", "number"),
    [
        ("localhost", False, "127.0.0.1"),
        ("localhost", True, None),
        ("127.0.0.1", True, "127.0.0.1"),  # a number that is given is meant
        (ELSEWHERE, True, ELSEWHERE),
        ("fe80::1", True, None),
        ("::1", False, "::1"),
    ],
)
def test_what_the_master_is_called_becomes_a_number(address, several_hosts, number):
    assert own_address(address, several_hosts=several_hosts) == number


@pytest.mark.parametrize("address", [None, ELSEWHERE])
def test_where_the_master_has_no_such_address_it_is_every_one(address):
    """As a Kubernetes service's."""
    with listen(address, 0) as listener:
        assert listener.getsockname()[0] in EVERYWHERE


def test_a_port_that_is_taken_is_not_gone_around():
    with listen("127.0.0.1", 0) as first, pytest.raises(OSError) as failure:
        listen("127.0.0.1", first.getsockname()[1])
    assert failure.value.errno == errno.EADDRINUSE
