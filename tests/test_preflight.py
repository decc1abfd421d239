# SPDX-License-Identifier: Apache-2.0
"""The preflight's judgement of real facts of this machine, altered one at a time."""

import json
import random
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from launch import environment
from preflight_case import DEEPSPEED, run, write_case

from merit_ds.preflight import facts as host_facts
from merit_ds.preflight.facts import Facts
from merit_ds.preflight.hosts import read_facts
from merit_ds.preflight.judge import CHECKS, Job, judge
from merit_ds.preflight.meeting import Met
from merit_ds.training.config import Config, load_config
from merit_ds.training.manifest import Manifest, write_manifest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_case(tmp_path_factory.mktemp("preflight"))


@pytest.fixture(scope="module")
def config(folder: Path) -> Config:
    return load_config(folder / "recipe.yaml")


@pytest.fixture(scope="module")
def here(folder: Path) -> Facts:
    """What this machine is, as one of two hosts would print it."""
    finished = run(folder, "merit_ds.preflight.facts", "--host", "h0", "--config", "recipe.yaml")
    (facts,) = read_facts(finished.stdout)
    assert facts.data and facts.data.problem is None and facts.recipe.problem is None
    assert not (folder / "runs").exists()  # looked at, and gone again
    fit = {
        "comm_op": "ready",
        "own_address": "10.0.0.1",
        "chosen": {},
        "shm_free": 10**11,
        "open_files": 10**5,
        "open_files_hard": 10**5,
        "devices": 2,
    }
    return altered(facts, met=Met(), machine=facts.machine.model_copy(update=fit))


def altered(facts: Facts, **changes: Any) -> Facts:
    """With other values, `section__field` for one of a section's."""
    for name, value in changes.items():
        section, _, field = name.partition("__")
        new = getattr(facts, section).model_copy(update={field: value}) if field else value
        facts = facts.model_copy(update={section: new})
    return facts


def findings(config: Config, first: Facts, second: Facts, *, slots: int = 1) -> list[tuple[str, str, str, bool]]:
    hosts = {"h0": first, "h1": altered(second, host="h1")}
    found = judge(Job(dict.fromkeys(hosts, slots), config), hosts, {})
    return [(one.host, one.check, one.text, one.fatal) for one in found]


def test_two_hosts_like_this_one_are_well(config: Config, here: Facts) -> None:
    assert findings(config, here, here) == []


@pytest.mark.parametrize(
    ("changes", "check", "says"),
    [
        ({"software__versions": {"torch": "1.0"}}, "versions", "torch 1.0, deepspeed missing"),
        ({"software__python": "3.9.0"}, "versions", "python 3.9.0; h0 has 3."),
        ({"software__sha256": "0", "software__revision": None}, "source", "(no checkout) than on h0"),
        ({"recipe__sha256": {"recipe.yaml": "0"}}, "recipe", "recipe.yaml: not the file that h0 has"),
        ({"recipe__problem": "recipe.yaml: gone"}, "recipe", "recipe.yaml: gone"),
        ({"data__problem": "data.json: gone"}, "data", "data.json: gone"),
        ({"data__sha256": "0"}, "data", "other data than on h0"),
        ({"machine__device": "cuda"}, "devices", "DeepSpeed finds cuda here and cpu on h0"),
        ({"machine__device": "cuda", "machine__devices": 0}, "devices", "slots=1, but 0 cuda devices"),
        ({"met": Met(problem="cannot reach")}, "port", "cannot reach"),
        ({"met": Met(folder_problem="not the first host's")}, "run.save", "not the first host's"),
        ({"save__problem": "cannot be written"}, "run.save", "cannot be written"),
        ({"save__free_bytes": 10**6}, "disk", "1.0 MB free, but 3 more checkpoints of about 0.7 MB"),
        ({"save__free_bytes": 10**6, "save__checkpoints": 2, "save__ranks": 1}, "disk", "1 ranks, converted for 2"),
        ({"met": Met(clock_seconds=-60.0)}, "clock", "60 s behind"),
        ({"machine__open_files": 1024}, "limits", "1024 open files"),
        ({"machine__device": "cuda", "machine__locked_memory": 65536}, "limits", "InfiniBand"),
        ({"machine__own_address": "127.0.1.1"}, "network", "its own name is 127.0.1.1 to it"),
        ({"machine__own_address": None}, "network", "its own name has no address"),
        ({"machine__chosen": {"GLOO_SOCKET_IFNAME": "eth"}, "machine__interfaces": ["lo", "eth0"]}, "network", "eth0"),
        ({"machine__chosen": {"NCCL_SOCKET_IFNAME": "=ib"}, "machine__interfaces": ["lo", "ib0"]}, "network", "ib0"),
        ({"machine__chosen": {"NCCL_SOCKET_IFNAME": "^eth"}, "machine__interfaces": ["eth0"]}, "network", "eth0"),
        ({"machine__comm_op": "locked /x/lock"}, "build", "rm /x/lock"),
        ({"machine__comm_op": "busy /x/lock"}, "build", "another host is building"),
        ({"machine__comm_op": "not built"}, "build", "python -m merit_ds.training.cpu_comm"),
    ],
)
def test_what_is_wrong_is_said_of_the_host(
    config: Config, here: Facts, changes: dict[str, Any], check: str, says: str
) -> None:
    found = findings(config, here, altered(here, **changes))
    assert any(host == "h1" and name == check and says in text for host, name, text, _ in found), found
    assert {host for host, *_ in found} == {"h1"}


@pytest.mark.parametrize(
    "changes",
    [
        {"save__free_bytes": 10**6, "save__checkpoints": 2, "save__ranks": 2},  # room for the one being written
        {"machine__open_files_hard": 64},  # not where rank 0 is
        {"met": Met(clock_seconds=4.0)},
        {"machine__own_address": "127.0.1.1", "machine__chosen": {"GLOO_SOCKET_IFNAME": "lo"}},
        {"machine__chosen": {"NCCL_SOCKET_IFNAME": "^docker,lo"}, "machine__interfaces": ["eth0"]},
        {"machine__chosen": {"NCCL_SOCKET_IFNAME": "eth"}, "machine__interfaces": ["lo", "eth0"]},
        {"machine__comm_op": "not used"},
    ],
)
def test_what_is_well_is_not_complained_of(config: Config, here: Facts, changes: dict[str, Any]) -> None:
    assert findings(config, here, altered(here, **changes)) == []


def test_several_ranks_of_a_host_need_shared_memory_and_a_batch_that_fits(config: Config, here: Facts) -> None:
    found = findings(config, here, altered(here, machine__shm_free=64 * 2**20), slots=3)
    assert [(host, check) for host, check, *_ in found] == [
        *(("all", "batch"), ("h0", "devices"), ("h1", "shm"), ("h1", "devices"))
    ]
    assert "6 data-parallel ranks = 12; the nearest that fit: train_batch_size 12" in found[0][2]
    assert [fatal for *_, fatal in found] == [True, False, True, False]


def test_the_first_host_s_guard_needs_a_file_for_each_rank(config: Config, here: Facts) -> None:
    for limit, says in ((101, ["101 open files at most (ulimit -Hn)"]), (102, []), (-1, [])):
        found = findings(config, altered(here, machine__open_files_hard=limit), here)
        assert [(host, check, text[:35], fatal) for host, check, text, fatal in found] == [
            ("h0", "limits", text, True) for text in says
        ]


def test_fewer_hosts_have_to_fit_as_well(config: Config, here: Facts) -> None:
    """Batches of 8 in micro-batches of 2: 4 and 2 and 1 ranks fit, 3 do not."""
    hosts = dict.fromkeys(("h0", "h1", "h2", "h3"), 1)
    facts = {host: altered(here, host=host) for host in hosts}
    for fewest, fatal in ((None, []), (4, []), (3, [True]), (2, [False]), (1, [False])):
        found = judge(Job(hosts, config, fewest), facts, {})
        assert [one.fatal for one in found] == fatal
        assert all(one.text.startswith("with 3 hosts: ") and "3 data-parallel ranks" in one.text for one in found)


def test_the_ranks_of_the_newest_checkpoint_are_read(tmp_path: Path) -> None:
    """Where they bind: neither in a universal one nor without ZeRO."""
    _, none = host_facts._save(str(tmp_path), make=False)
    assert (none.checkpoints, none.ranks) == (0, None)
    kinds: list[tuple[dict[str, Any], int | None]] = [({}, 4), ({"universal": True}, None), ({"zero_stage": 0}, None)]
    for number, (changes, ranks) in enumerate(kinds, start=1):
        (tmp_path / f"global_step{number}").mkdir()
        fields = {"sequence": number, "step": number, "zero_stage": 2, "setup": {"ranks": 4}, "model": {}, "files": {}}
        write_manifest(tmp_path / f"global_step{number}", Manifest(**fields | changes))
        _, save = host_facts._save(str(tmp_path), make=False)
        assert (save.checkpoints, save.ranks, save.problem) == (number, ranks, None)


def test_a_silent_host_comes_with_its_reason(config: Config, here: Facts) -> None:
    job = Job({"h0": 1, "h1": 1}, config)
    (found,) = judge(job, {"h0": here}, {"h1": "ssh: no route"})
    assert (found.host, found.check, found.text, found.fatal) == ("h1", "reachable", "ssh: no route", True)
    assert judge(job, {}, {"h0": "x", "h1": "x"})[0].host == "h0"


def quiet_port() -> int:
    """A free port outside of the range from which the kernel gives ports to other programs meanwhile."""
    while True:
        port = random.randrange(10_000, 30_000)
        with suppress(OSError), socket.create_server(("", port)):
            return port


def test_this_host_alone(folder: Path) -> None:
    """The command, as launch/nossh.sh calls it: well, a taken port, and a recipe that does not fit."""
    port = quiet_port()
    options = ["recipe.yaml", "--nodes", "2", "--node-rank", "0", "--master-port", str(port)]
    well = run(folder, "merit_ds.preflight", *options)
    assert well.returncode == 0, well.stdout
    assert well.stdout.splitlines()[-1].startswith(f"preflight: 1 host, {len(CHECKS) + 1} checks: all well")
    with socket.create_server(("127.0.0.2", port)):  # nothing was said of the address that the ranks will meet at
        taken = run(folder, "merit_ds.preflight", *options, "--set", "data.prefix=none")
    assert taken.returncode == 1 and taken.stdout.endswith("preflight: 2 of these would stop the run\n")
    assert f"node0  port   cannot listen on port {port}: Address already in use" in taken.stdout
    assert "node0  data   none.json: no prepared data" in taken.stdout
    assert not (folder / "runs").exists()
    wrong = run(folder, "merit_ds.preflight", "recipe.yaml", "--set", "run.nope=1")
    assert wrong.returncode == 1 and wrong.stderr.startswith("error: recipe.yaml: unknown key 'run.nope'")
    (folder / "misspelt.json").write_text(json.dumps(DEEPSPEED | {"gradient_cliping": 1.0}))
    misspelt = run(folder, "merit_ds.preflight", "recipe.yaml", "--set", "run.deepspeed=misspelt.json")
    assert misspelt.returncode == 1
    assert misspelt.stderr.splitlines()[-1].endswith(
        "'gradient_cliping' and would ignore it; did you mean 'gradient_clipping'?"
    )


def test_large_data_is_read_on_demand(folder: Path) -> None:
    """A changed byte in a file too large to be hashed at the start: --hash-data sees it, else it counts as unread."""
    (folder / "large").mkdir()
    for path in folder.glob("data*"):
        (folder / "large" / path.name).write_bytes(path.read_bytes())
    damaged = folder / "large" / "data_train.bin"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\1")
    small = "import sys, merit_ds.preflight.facts as f; f.HASH_AT_START_BYTES = 100; f.main(sys.argv[1:])"
    for options, problem in (([], None), (["--hash-data"], "corrupt, its sha256")):
        command = [sys.executable, "-c", small, "--config", "recipe.yaml", "--set", "data.prefix=large/data", *options]
        finished = subprocess.run(command, cwd=folder, env=environment(), text=True, capture_output=True, check=True)
        data = read_facts(finished.stdout)[0].data
        assert data is not None and (problem in (data.problem or "") if problem else data.problem is None)
        assert data.unread == ([] if options else ["large/data_train.bin", "large/data_valid.bin"])
