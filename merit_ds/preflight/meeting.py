# SPDX-License-Identifier: Apache-2.0
"""The hosts meet at the master's port, as the ranks will: is it free and reachable, is `run.save` one folder for all?

The first host listens, where the rendezvous itself will, until every other host has come or the time is
up. A host that does not know the meeting's number is sent away. Nothing but numbers and the time goes over the line.
"""

import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from merit_ds.training.config import Section
from merit_ds.training.rendezvous import listen, own_address
from merit_ds.training.shared_folder import VISIBLE_SECONDS, appears

STRANGER_SECONDS = 30.0
"""How long a host tries where something else answers, or nothing is said: the first host cannot listen there then."""


class _StrangerError(OSError):
    """What listens there is not the first host's meeting."""


@dataclass(frozen=True)
class Meeting:
    """Where and when.

    Attributes:
        address: the master's, as the ranks will be given it.
        port: the master's.
        number: that all hosts were told.
        rank: of this host; 0 is the master.
        hosts: how many come, the master included.
        seconds: how long each waits for the others.
    """

    address: str
    port: int
    number: str
    rank: int
    hosts: int
    seconds: float


class Met(Section):
    """What came of it. A problem is None where there is none."""

    problem: str | None = None
    folder_problem: str | None = None
    clock_seconds: float | None = None
    """How far this host's clock is ahead of the master's, less than half the way there and back off."""


def new_number() -> str:
    """A number for `Meeting.number` that nobody can guess."""
    return secrets.token_hex(8)


def meet(meeting: Meeting, folder: Path | None) -> Met:
    """Listen, or come. Blocks for `meeting.seconds` at most, and some for the folder.

    Args:
        folder: `run.save`, which exists on the first host; None: it is not looked at.
    """
    if meeting.rank == 0:
        return _listen(meeting, folder)
    return _come(meeting, folder)


def _token(meeting: Meeting, folder: Path) -> Path:
    return folder / f".preflight-{meeting.number}"


def _listen(meeting: Meeting, folder: Path | None) -> Met:
    token = None if folder is None else _token(meeting, folder)
    try:
        # A host alone may not have been told the address: then it is localhost, and the port must be free on all.
        own = own_address(meeting.address, several_hosts=True)
        listener = listen(own, meeting.port)
    except socket.gaierror as error:
        return Met(
            problem=f"cannot find {meeting.address}: {error.strerror}; "
            "give a --master-addr that the first host knows as well"
        )
    except OSError as error:
        return Met(
            problem=f"cannot listen on port {meeting.port}: {error.strerror}; "
            "end what listens there, or choose another --master-port"
        )
    with listener:
        if meeting.hosts == 1:
            return Met()
        if token is not None:
            try:
                token.touch()
            except OSError as error:
                return Met(folder_problem=f"cannot write into {folder}: {error.strerror}")
        try:
            _receive(listener, meeting)
        finally:
            if token is not None:
                token.unlink(missing_ok=True)
    return Met()  # a host that did not come says so itself


def _receive(listener: socket.socket, meeting: Meeting) -> None:
    """Answer the hosts that come, until all have come and gone, or the time is up."""
    deadline = time.monotonic() + meeting.seconds
    served: list[bool] = []

    def serve(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.settimeout(meeting.seconds)
            stream = connection.makefile("rw", encoding="ascii", newline="\n")
            if stream.readline().strip() == meeting.number:
                print(repr(time.time()), file=stream, flush=True)
                if stream.readline():
                    served.append(True)

    while len(served) < meeting.hosts - 1 and time.monotonic() < deadline:
        listener.settimeout(0.1)
        with suppress(TimeoutError):
            threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()


def _come(meeting: Meeting, folder: Path | None) -> Met:
    begun = time.monotonic()
    place = (meeting.address, meeting.port)
    while True:
        try:
            with socket.create_connection(place, timeout=5) as connection:
                connection.settimeout(min(meeting.seconds, STRANGER_SECONDS))
                return _talk(connection, meeting, folder)
        except OSError as error:
            reason = error.strerror or str(error)
            patience = STRANGER_SECONDS if isinstance(error, _StrangerError) else meeting.seconds
        if time.monotonic() > begun + min(patience, meeting.seconds):
            return Met(
                problem=f"cannot reach {meeting.address}:{meeting.port}, where the ranks will meet: {reason}; "
                "a firewall, or --master-addr is not an address by which this host knows the first"
            )
        time.sleep(0.2)


def _talk(connection: socket.socket, meeting: Meeting, folder: Path | None) -> Met:
    stream = connection.makefile("rw", encoding="ascii", newline="\n")
    sent = time.time()
    print(meeting.number, file=stream, flush=True)
    try:
        answer = stream.readline()
        received = time.time()
        clock = (sent + received) / 2 - float(answer)
    except (TimeoutError, ValueError):
        raise _StrangerError("something else listens there") from None
    seen = folder is None or appears(_token(meeting, folder).exists, folder, seconds=VISIBLE_SECONDS)
    print("done", file=stream, flush=True)
    problem = None if seen else f"{folder} is not the first host's: what it writes there does not appear here"
    return Met(folder_problem=problem, clock_seconds=clock)
