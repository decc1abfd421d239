# SPDX-License-Identifier: Apache-2.0
"""Where the ranks meet: MASTER_ADDR and MASTER_PORT, listened on no wider than the other hosts need.

torch's own rendezvous listens on all addresses of rank 0's host. Here the listening socket is made beforehand; torch's
store finds its server in the process, and opens no other.
"""

import errno
import ipaddress
import os
import socket
import time
from datetime import timedelta

from torch.distributed import DistError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from merit_ds.errors import InputError
from merit_ds.training.plan import Plan, local_ranks

CONNECT_SECONDS = 5.0
"""For one attempt to connect."""
BACKLOG = 4096
"""Connections that wait to be accepted: all ranks come at once."""


def stand_alone() -> None:
    """Set what a launcher would have set, where there was none: a run of one rank, started by plain python."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)


def open_store(plan: Plan) -> Store:
    """The rendezvous' own store: its server is rank 0, or torchrun's agent. On rank 0 keep it until the end.

    Raises:
        InputError: a launcher's variable is missing; rank 0 cannot listen there, or does not within `run.timeout`.
    """
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise InputError(f"WORLD_SIZE is {plan.world}, but {name} is not set, as launchers do")
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = plan.config.run.timeout
    serves = plan.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        descriptor = None
        if serves:
            descriptor = listen(address, port, several_hosts=plan.world > local_ranks()).detach()
        else:
            wait_for(address, port, timeout=timeout)  # TCPStore itself would print the stack of each attempt
        store = TCPStore(
            address,
            port,
            plan.world,
            serves,
            timedelta(seconds=timeout),
            wait_for_workers=False,
            multi_tenant=True,
            master_listen_fd=descriptor,
        )
    except (OSError, DistError, RuntimeError) as error:
        what = "rank 0 cannot listen there" if serves else f"rank {plan.rank} cannot reach rank 0 there"
        raise InputError(f"MASTER_ADDR:MASTER_PORT {address}:{port}: {what}: {str(error).splitlines()[0]}") from None
    return PrefixStore("merit_ds", store)


def listen(address: str, port: int, *, several_hosts: bool, backlog: int = BACKLOG) -> socket.socket:
    """Listen on the master's address; on all of this host's where that is none of them, as a Kubernetes service's.

    Args:
        address: the master's, a name or a number.
        port: 0 for one of the system's choice.
        several_hosts: whether others must reach it: then a loopback address is not enough.

    Raises:
        OSError: something listens there already, for instance.
    """
    own = own_address(address, several_hosts=several_hosts)
    if own is not None:
        try:
            family = socket.AF_INET6 if ":" in own else socket.AF_INET
            return socket.create_server((own, port), family=family, backlog=backlog)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)
    return socket.create_server(("", port), backlog=backlog)


def own_address(address: str, *, several_hosts: bool) -> str | None:
    """The master's address as a number; None where it cannot tell, or where the other hosts could not reach it there.

    Debian writes a host's own name as 127.0.1.1 into /etc/hosts; the other hosts know it by another address.
    """
    try:
        number = str(socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][4][0])
    except socket.gaierror:
        return None
    return None if several_hosts and ipaddress.ip_address(number.partition("%")[0]).is_loopback else number


def wait_for(address: str, port: int, *, timeout: float) -> None:
    """Until something listens there.

    Raises:
        OSError: nothing does, after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((address, port), timeout=CONNECT_SECONDS).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.1)
