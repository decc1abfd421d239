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
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import DistError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from merit_ds.errors import InputError, TransientError
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
        InputError: a launcher's variable is missing; rank 0 cannot listen there.
        TransientError: rank 0 does not listen within `run.timeout`, or the name is not known yet.
    """
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise InputError(f"WORLD_SIZE is {plan.world}, but {name} is not set, as launchers do")
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = plan.config.run.timeout
    serves = plan.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    descriptor = None
    try:
        if serves:
            _persist(lambda: socket.getaddrinfo(address, port), timeout=timeout)  # a pod's name may come after the pod
            descriptor = _listen_once(own_address(address, several_hosts=plan.world > local_ranks()), port)
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
        what += f": {str(error).splitlines()[0]}"
        late = not serves or isinstance(error, socket.gaierror)
        raise (TransientError if late else InputError)(
            f"MASTER_ADDR:MASTER_PORT {address}:{port}: {what}; if the port is in use, choose another (--master-port); "
            "if hosts take the name for different addresses, give a number (--master-addr)"
        ) from None
    return PrefixStore("merit_ds", store)


def _listen_once(own: str | None, port: int) -> int | None:
    """The descriptor; None where the port is taken: torch finds this process's own server, or says EADDRINUSE."""
    try:
        return listen(own, port).detach()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return None


def listen(own: str | None, port: int) -> socket.socket:
    """Listen on one of this host's addresses; on all of them where that is none, as a Kubernetes service's is.

    Args:
        own: of `own_address`; None for all.
        port: 0 for one of the system's choice.

    Raises:
        OSError: something listens there already, for instance.
    """
    if own is not None:
        try:
            family = socket.AF_INET6 if ":" in own else socket.AF_INET
            return socket.create_server((own, port), family=family, backlog=BACKLOG)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True)
    return socket.create_server(("", port), backlog=BACKLOG)


def own_address(address: str, *, several_hosts: bool) -> str | None:
    """The master's address as a number, the IPv4 one where it has several; None where others could not reach it there.

    Debian writes a host's own name as 127.0.1.1 into /etc/hosts; the other hosts know it by another address. A
    link-local address is one only together with an interface.

    Args:
        address: MASTER_ADDR, a name or a number.
        several_hosts: whether a name of this host alone is not enough.

    Raises:
        socket.gaierror: there is no such name.
    """
    found = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
    number = ipaddress.ip_address(min(found, key=lambda one: one[0] != socket.AF_INET)[4][0])
    too_near = several_hosts and number.is_loopback and str(number) != address
    return None if too_near or number.is_link_local else str(number)


def wait_for(address: str, port: int, *, timeout: float) -> None:
    """Until something listens there.

    Raises:
        OSError: nothing does, after `timeout` seconds.
    """
    _persist(lambda: socket.create_connection((address, port), timeout=CONNECT_SECONDS).close(), timeout=timeout)


def _persist(action: Callable[[], object], *, timeout: float) -> None:
    """Try until there is no OSError; after `timeout` seconds it passes."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            action()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.1)
