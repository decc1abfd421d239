# SPDX-License-Identifier: Apache-2.0
"""`python -m merit_ds.preflight RECIPE`: what would stop a run on these hosts, as a table, before it starts."""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from merit_ds.errors import InputError
from merit_ds.preflight.facts import Facts, add_meeting_arguments, collect, meeting_of
from merit_ds.preflight.hosts import Ssh, python_command, read_facts, read_hostfile
from merit_ds.preflight.judge import CHECKS, Finding, Job, judge
from merit_ds.preflight.meeting import new_number
from merit_ds.training.cli import add_arguments, report_errors, resolve_config
from merit_ds.training.deepspeed_config import read_deepspeed_json
from merit_ds.training.deepspeed_keys import check_keys

DESCRIPTION = """What would stop a run on these hosts, before it starts: a table, and exit status 1.

    python -m merit_ds.preflight configs/gpt2_small_1k.yaml --hostfile hosts        every host, over ssh
    python -m merit_ds.preflight configs/gpt2_small_1k.yaml --nodes 2 --slots 8 --node-rank 0      this host alone
    srun ... python -m merit_ds.preflight.facts ... | python -m merit_ds.preflight ... --hostfile hosts --facts -

The last judges what that command printed on each host, however it was started there; launch/slurm.sbatch uses it. The
trainer's own options (--set, --save, --load, ...) are understood as pretrain_gpt.py understands them."""


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, argparse.Namespace, list[str]]:
    """The preflight's options, the trainer's, and the latter as they were given."""
    parser = argparse.ArgumentParser(
        "python -m merit_ds.preflight",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", help="the YAML that pretrain_gpt.py --config takes")
    parser.add_argument("--hostfile", type=Path, help="DeepSpeed's: a line NAME slots=N for each host")
    parser.add_argument("--slots", type=int, default=1, help="ranks of each host, without a hostfile (%(default)s)")
    parser.add_argument(
        "--fewest-nodes", type=int, metavar="N", help="torchrun's MIN: does the recipe fit that many hosts as well?"
    )
    parser.add_argument("--ssh-port", type=int, metavar="PORT", help="of the hosts' ssh servers")
    parser.add_argument(
        "--facts", type=Path, nargs="+", metavar="FILE", help="judge these, and ask no host; - is stdin"
    )
    parser.add_argument(
        "--hash-data", action="store_true", help="read all of the data; without, files above 1 GiB by size"
    )
    add_meeting_arguments(parser)
    options, rest = parser.parse_known_args(arguments)
    trainer = argparse.ArgumentParser("python -m merit_ds.preflight", allow_abbrev=False)
    add_arguments(trainer)
    given = ["--config", options.recipe, *rest]
    return options, trainer.parse_args(given), given


def main(arguments: list[str] | None = None) -> int:
    """Look, judge, print; 1 where something is wrong, else 0."""
    options, trainer, given = parse(arguments)
    slots = read_hostfile(options.hostfile) if options.hostfile else _numbered(options)
    if options.fewest_nodes is not None and not 1 <= options.fewest_nodes <= len(slots):
        raise InputError(f"--fewest-nodes {options.fewest_nodes}: there are {len(slots)}; it is 1 to that")
    job = Job(slots=slots, config=resolve_config(trainer), fewest=options.fewest_nodes)
    check_keys(read_deepspeed_json(Path(job.config.run.deepspeed)), path=job.config.run.deepspeed)
    facts, silent = gather(options, trainer, given, slots)
    findings = judge(job, facts, silent)
    for line in table(findings):
        print(line)
    fatal = sum(finding.fatal for finding in findings)
    if fatal:
        print(f"preflight: {fatal} of these would stop the run")
    else:
        but = f", but for {len(findings)} to know" if findings else ""
        print(f"preflight: {len(facts)} host{'s'[: len(facts) != 1]}, {len(CHECKS) + 1} checks: all well{but}")
    unread = sorted({path for one in facts.values() if one.data for path in one.data.unread})
    if unread:
        print(f"preflight: only the size was compared of {', '.join(unread)}; --hash-data reads them")
    return int(fatal > 0)


def gather(
    options: argparse.Namespace, trainer: argparse.Namespace, given: list[str], slots: dict[str, int]
) -> tuple[dict[str, Facts], dict[str, str]]:
    """Facts by host, and why there are none of the others."""
    if options.facts:
        found = [one for path in options.facts for one in read_facts(_text(path))]
        unknown = [one.host for one in found if one.host not in slots]
        if unknown:
            raise InputError(f"--facts: {unknown[0]} is not in the hostfile")
        facts = {one.host: one for one in found}
        return {host: facts[host] for host in slots if host in facts}, {
            host: "no facts of it among those given" for host in slots if host not in facts
        }
    if options.hostfile is None:
        rank = 0 if options.nodes == 1 else options.node_rank
        host = list(slots)[rank or 0]
        trainer.hash_data = options.hash_data
        # Alone at the meeting, the master finds out whether its port is free.
        options.meeting, options.nodes = (new_number(), 1) if rank == 0 else (None, 1)
        return {host: collect(host, trainer, meeting_of(options))}, {}
    return over_ssh(options, given, list(slots))


def over_ssh(
    options: argparse.Namespace, given: list[str], hosts: list[str]
) -> tuple[dict[str, Facts], dict[str, str]]:
    """Ask every host that answers."""
    # Importing comes first, and alone: a host that cannot do it would keep the others waiting at the meeting, and one
    # that reads its Python from a cold disk would come late.
    imported = dict.fromkeys(hosts, python_command("-c", "import merit_ds.preflight.facts"))
    answers = Ssh(port=options.ssh_port, seconds=options.wait).run(imported)
    silent = {host: str(answer) for host, answer in answers if isinstance(answer, InputError)}
    there = [host for host in hosts if host not in silent]
    ssh = Ssh(port=options.ssh_port, seconds=None if options.hash_data else options.wait + 300)
    common = ["--master-addr", options.master_addr or hosts[0], "--master-port", str(options.master_port)]
    common += ["--wait", str(options.wait), "--nodes", str(len(there)), *["--hash-data"] * options.hash_data, *given]
    if there[:1] == hosts[:1]:
        common += ["--meeting", new_number()]
    module = ["-m", "merit_ds.preflight.facts"]
    commands = {
        host: python_command(*module, "--host", host, "--node-rank", str(rank), *common)
        for rank, host in enumerate(there)
    }
    facts: dict[str, Facts] = {}
    for host, answer in tqdm(ssh.run(commands), total=len(commands), desc="preflight", unit="host", disable=None):
        try:
            if isinstance(answer, InputError):
                raise answer
            (facts[host],) = read_facts(answer)
        except InputError as error:
            silent[host] = str(error)
    return facts, silent


def table(findings: list[Finding]) -> list[str]:
    """A line for each finding, in columns."""
    if not findings:
        return []
    rows = [("host", "check", "what is wrong")]
    rows += [(one.host, one.check, ("" if one.fatal else "(to know) ") + one.text) for one in findings]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return [f"{host:<{widths[0]}}  {check:<{widths[1]}}  {text}" for host, check, text in rows]


def _numbered(options: argparse.Namespace) -> dict[str, int]:
    if not 0 <= (options.node_rank or 0) < options.nodes:
        raise InputError(
            f"--node-rank {options.node_rank}: with --nodes {options.nodes} it is 0 to {options.nodes - 1}"
        )
    return {f"node{rank}" if options.nodes > 1 else "localhost": options.slots for rank in range(options.nodes)}


def _text(path: Path) -> str:
    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot read it: {error}") from None


if __name__ == "__main__":
    with report_errors():
        sys.exit(main())
