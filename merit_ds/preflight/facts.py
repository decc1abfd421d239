# SPDX-License-Identifier: Apache-2.0
"""What one host has, as JSON on stdout: `python -m merit_ds.preflight.facts --config RECIPE`.

It judges nothing. The preflight runs it over ssh; under Slurm `srun` does, and whatever else can run a command on a
host will do. Run it as the ranks will be run: by the same Python, in the same folder, with the same environment.
"""

import argparse
import hashlib
import os
import resource
import shutil
import socket
from contextlib import suppress
from pathlib import Path

from deepspeed.accelerator import get_accelerator

import merit_ds
from merit_ds.errors import InputError
from merit_ds.preflight.meeting import Meeting, Met, meet
from merit_ds.training import cpu_comm
from merit_ds.training.checkpoint_folder import read_checkpoints
from merit_ds.training.cli import add_arguments, report_errors, resolve_config
from merit_ds.training.config import Config, DataConfig, Section
from merit_ds.training.data_manifest import HASH_AT_START_BYTES, SPLITS, read_manifest, verify_files
from merit_ds.training.report import provenance

SOURCES = (".py", ".cpp", ".cu", ".h")
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


class Software(Section):
    """What runs there."""

    python: str
    versions: dict[str, str | None]
    """By package; None where it is not installed."""
    revision: str | None
    sha256: str
    """Of the files of merit_ds, and of pretrain_gpt.py where it lies beside them."""


class Recipe(Section):
    """The files that decide the run."""

    sha256: dict[str, str]
    """By path; empty where there is a problem."""
    problem: str | None


class Data(Section):
    """The prepared data."""

    sha256: str | None
    """Of its manifest, which has its files' hashes."""
    vocab_size: int | None
    problem: str | None
    unread: list[str]
    """Files of which the size alone was compared."""


class Save(Section):
    """`run.save`."""

    path: str | None
    problem: str | None
    free_bytes: int
    checkpoints: int
    """That lie there already."""
    ranks: int | None
    """That the newest of them fits; None where there is none, or it fits any number."""


class Machine(Section):
    """What the ranks will run on. Sizes in bytes."""

    device: str
    devices: int
    """Accelerators; where there are none, CPU cores that this process may use."""
    comm_op: str
    """As `cpu_comm.state` says."""
    shm_free: int
    open_files: int
    open_files_hard: int
    """The soft limit, and the one up to which a process may raise it; -1 is unlimited, also below."""
    locked_memory: int
    own_address: str | None
    """What the host's own name means to it; gloo listens there unless it is given an interface."""
    interfaces: list[str]
    chosen: dict[str, str]
    """The variables that choose an interface, where they are set."""


class Facts(Section):
    """One host."""

    host: str
    """As the hostfile calls it."""
    software: Software
    recipe: Recipe
    data: Data | None
    """None where the recipe cannot be read; so is `save`."""
    save: Save | None
    machine: Machine
    met: Met | None
    """None where no meeting was held."""


def collect(host: str, options: argparse.Namespace, meeting: Meeting | None) -> Facts:
    """Look at this host, and meet the others.

    Args:
        host: its name in the hostfile.
        options: the trainer's, and `hash_data`.
        meeting: None: without.
    """
    config, recipe = _recipe(options)
    # The meeting comes first: reading the data may take one host minutes longer than another.
    # The first host makes the folder, as the trainer's first rank will; on the others it has to appear.
    first = meeting is None or meeting.rank == 0
    made, save = ([], None) if config is None else _save(config.run.save, make=first)
    folder = Path(save.path) if save and save.path and not save.problem else None
    try:
        met = None if meeting is None else meet(meeting, folder)
    finally:
        _remove_empty(made)
    data = None if config is None else _data(config.data, read_all=options.hash_data)
    return Facts(host=host, software=_software(), recipe=recipe, data=data, save=save, machine=_machine(), met=met)


def _software() -> Software:
    package = Path(merit_ds.__file__).parent
    digest = hashlib.sha256()
    files = [path for path in package.rglob("*") if path.suffix in SOURCES]
    for path in sorted([*files, *package.parent.glob("pretrain_gpt.py")]):
        digest.update(f"{path.relative_to(package.parent)}\0".encode() + path.read_bytes())
    made = provenance()
    return Software(python=made["python"], versions=made["versions"], revision=made["git"], sha256=digest.hexdigest())


def _recipe(options: argparse.Namespace) -> tuple[Config | None, Recipe]:
    try:
        config = resolve_config(options)
        paths = (options.config, Path(config.run.deepspeed))
        return config, Recipe(sha256={str(path): _sha256(path) for path in paths}, problem=None)
    except (InputError, OSError) as error:
        return None, Recipe(sha256={}, problem=str(error))


def _data(data: DataConfig, *, read_all: bool) -> Data:
    limit = None if read_all else HASH_AT_START_BYTES
    sha256 = vocab_size = problem = None
    unread: list[str] = []
    try:
        manifest = read_manifest(data.prefix, tokenizer=data.tokenizer)
        sha256, vocab_size = _sha256(Path(f"{data.prefix}.json")), manifest.vocab_size
        verify_files(data.prefix, manifest, hash_up_to=limit)
        sizes = {f"{data.prefix}_{split}.bin": manifest.split(split).bin.bytes for split in SPLITS}
        unread = [path for path, size in sizes.items() if limit is not None and size > limit]
    except (InputError, OSError) as error:
        problem = str(error)
    return Data(sha256=sha256, vocab_size=vocab_size, problem=problem, unread=unread)


def _save(name: str | None, *, make: bool) -> tuple[list[Path], Save]:
    """Look at `run.save`; which folders were made for that, the innermost first."""
    if name is None:
        return [], Save(path=None, problem=None, free_bytes=0, checkpoints=0, ranks=None)
    folder = Path(name)
    made = [path for path in (folder, *folder.parents) if make and not path.exists()]
    problem = None
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
            problem = f"{folder} cannot be written"
    except OSError as error:
        problem = f"cannot make {folder}: {error.strerror}"
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    checkpoints = [] if problem else [one.manifest for one in read_checkpoints(folder)[0]]
    newest = checkpoints[0] if checkpoints else None
    sharded = newest is not None and not newest.universal and newest.zero_stage > 0
    ranks = newest.setup.get("ranks") if newest and sharded else None
    return made, Save(path=name, problem=problem, free_bytes=free, checkpoints=len(checkpoints), ranks=ranks)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # something has come into it meanwhile
            folder.rmdir()


def _machine() -> Machine:
    accelerator = get_accelerator()
    device = accelerator.device_name()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        own_address = socket.gethostbyname(socket.gethostname())
    except OSError:
        own_address = None
    return Machine(
        device=device,
        devices=len(os.sched_getaffinity(0)) if device == "cpu" else accelerator.device_count(),
        comm_op=cpu_comm.state(),
        shm_free=shutil.disk_usage("/dev/shm").free,
        open_files=soft,
        open_files_hard=hard,
        locked_memory=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        own_address=own_address,
        interfaces=[name for _, name in socket.if_nameindex()],
        chosen={name: os.environ[name] for name in INTERFACES if name in os.environ},
    )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def add_meeting_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the hosts meet, for `meeting_of`."""
    parser.add_argument("--master-addr", metavar="ADDRESS", help="the first host's, as the ranks will be given it")
    parser.add_argument("--master-port", type=int, default=29500, help="where the ranks will meet (%(default)s)")
    parser.add_argument("--meeting", metavar="NUMBER", help="any number, the same on all hosts; without, none is held")
    parser.add_argument("--node-rank", type=int, help="of this host; 0 is the master")
    parser.add_argument("--nodes", type=int, default=1, help="hosts that come to the meeting (%(default)s)")
    parser.add_argument("--wait", type=float, default=300, metavar="SECONDS", help="for the others (%(default)s)")


def meeting_of(options: argparse.Namespace) -> Meeting | None:
    """As the command line has it."""
    if options.meeting is None:
        return None
    return Meeting(
        address=options.master_addr or "localhost",
        port=options.master_port,
        number=options.meeting,
        rank=options.node_rank or 0,
        hosts=options.nodes,
        seconds=options.wait,
    )


def main(arguments: list[str] | None = None) -> None:
    """Print this host's facts as the last line of stdout: DeepSpeed logs there too."""
    parser = argparse.ArgumentParser(
        "python -m merit_ds.preflight.facts",
        description="What this host has, as JSON, for python -m merit_ds.preflight.",
    )
    parser.add_argument("--host", default=socket.gethostname(), help="as the hostfile calls it (%(default)s)")
    parser.add_argument("--hash-data", action="store_true", help="read all of the data, however large")
    add_meeting_arguments(parser)
    add_arguments(parser)
    options = parser.parse_args(arguments)
    with report_errors():
        print(collect(options.host, options, meeting_of(options)).model_dump_json(), flush=True)


if __name__ == "__main__":
    main()
