# SPDX-License-Identifier: Apache-2.0
"""The laboratory's command line.

python -m merit_ds.lab run STUDY.yaml --data PREFIX --output DIR --jobs 2
python -m merit_ds.lab status DIR
python -m merit_ds.lab report DIR
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from merit_ds.errors import InputError
from merit_ds.lab import slurm
from merit_ds.lab.laboratory import Laboratory
from merit_ds.lab.progress import Display, summary
from merit_ds.lab.status import describe
from merit_ds.lab.study import load_study
from merit_ds.lab.trainer_process import cpu_is_asked_for, share_machine
from merit_ds.training.cli import report_errors
from merit_ds.training.data_manifest import output_paths, read_manifest
from merit_ds.training.manifest import write_text

IGNORED = """# Written by merit_ds.lab: what need not be kept with the results.
corpus_*
corpus.json
*.lock
lock
log.txt
attempts.jsonl
slurm/
global_step*/
unfinished_checkpoint*/
latest
zero_to_*.py
"""
DATA = "data.json"
"""What identifies the corpus of a study's folder."""
COPIED = "# A copy by merit_ds.lab: `base` is relative to the folder of the study itself, not to this one.\n"


def main() -> None:
    parser = _parser()
    if sys.argv[1:2] == ["report"]:
        from merit_ds.lab import report

        report.main(sys.argv[2:])
        return
    arguments = parser.parse_args()
    with report_errors():
        sys.exit(arguments.act(arguments))


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m merit_ds.lab", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="do a study's runs; again: go on where it stopped", formatter_class=raw)
    run.description = (
        "Do every run of a study that is not finished. It may be stopped or killed at any moment: the same command\n"
        "goes on, and repeats no finished run. Several processes on one output folder share the work."
    )
    run.add_argument("study", type=Path, help="the study; see configs/studies/")
    run.add_argument("--data", required=True, metavar="PREFIX", help="as merit_ds.training.data wrote it")
    run.add_argument("--output", type=Path, required=True, metavar="DIR", help="the study's folder, made where missing")
    run.add_argument("--jobs", type=int, metavar="N", help="runs at the same time (default: as GPUs allow, or 1)")
    run.add_argument("--ranks", type=int, metavar="N", help="ranks of a run (default: the study's)")
    run.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="a grid, or a pattern of run ids; may be repeated"
    )
    run.add_argument("--dry-run", action="store_true", help="list the runs and what they cost, and do nothing")
    run.add_argument("--retry-failed", action="store_true", help="do failed runs again; diverged ones are results")
    run.add_argument("--script", type=Path, default=Path("pretrain_gpt.py"), metavar="FILE", help="the trainer")
    run.add_argument("--vocab", type=Path, metavar="FILE", help="GPT-2 BPE ranks, for machines without a network")
    run.add_argument("--slurm", action="store_true", help="write and submit an array with a task for each run")
    run.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="for the array, such as --sbatch=--time=8:00:00"
    )
    run.add_argument("--need-gpus", action="store_true", help="refuse to run on the CPU, as the tasks of --slurm do")
    run.set_defaults(act=_run)
    status = commands.add_parser("status", help="what is done, goes on and is left in a study's folder")
    status.add_argument("output", type=Path, metavar="DIR", help="the study's folder")
    status.set_defaults(act=_status)
    commands.add_parser("report", help="plots and tables of studies' folders", add_help=False)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    study, output = load_study(arguments.study), arguments.output
    if arguments.jobs is not None and arguments.jobs < 1:
        raise InputError(f"--jobs {arguments.jobs}: must be at least 1")
    starts = not (arguments.dry_run or arguments.slurm)
    ranks, need_gpus = arguments.ranks or study.ranks, arguments.need_gpus
    machine = share_machine(arguments.script, jobs=arguments.jobs, ranks=ranks, starts=starts, need_gpus=need_gpus)
    display = Display(machine)
    data = _describe_data(arguments.data)
    _check_same_data(output, arguments.data, data)
    laboratory = Laboratory(
        study,
        source=arguments.study.parent,
        output=output,
        machine=machine,
        data=data,
        vocab=arguments.vocab is not None,
        only=arguments.only,
        retry_failed=arguments.retry_failed,
        tell=display.tell,
        show=display.show,
    )
    state = laboratory.state
    if arguments.dry_run:
        for plan in state.todo:
            print(f"{plan.point.id:40} {plan.steps:7} steps  grid {plan.point.grid}")
        for cell, count in state.expansion.waiting.items():
            print(f"{count} runs of {cell} wait for its best learning rate")
        print(summary(state, machine))
        return 0
    _prepare(output, arguments.study, arguments.data, data, arguments.vocab)
    display.tell(
        f"{machine.jobs} at a time, {machine.ranks} ranks, {machine.threads} threads: {summary(state, machine)}"
    )
    if arguments.slurm:
        return _submit(arguments, laboratory.free(), ranks=machine.ranks)
    state = laboratory.run()
    display.clear()
    for id_ in laboratory.left_to_others():
        display.tell(f"elsewhere {id_}: another process has it")
    for cell, count in state.expansion.hopeless.items():
        display.tell(f"WARNING   {cell}: every learning rate diverged or failed, so {count} runs have none to take")
    display.tell(summary(state, machine))
    display.tell(f"results   {output / 'results.jsonl'}")
    return int(laboratory.unfinished())


def _submit(arguments: argparse.Namespace, ids: list[str], *, ranks: int) -> int:
    if not ids:
        print("nothing to submit: no run is left that can be started now")
        return 0
    values = {"--data": arguments.data, "--output": arguments.output, "--script": arguments.script}
    values |= {"--ranks": arguments.ranks, "--vocab": arguments.vocab}
    options = [text for name, value in values.items() if value is not None for text in (name, str(value))]
    gpus = not cpu_is_asked_for()
    flags = [flag for flag, given in (("--need-gpus", gpus), ("--retry-failed", arguments.retry_failed)) if given]
    command = ["run", str(arguments.study), "--jobs", "1", *options, *flags]
    wanted = slurm.resources(ranks, gpus=gpus, options=arguments.sbatch) + arguments.sbatch
    script = slurm.write_array(arguments.output, ids, command=command, options=wanted)
    job = slurm.submit(script)
    if job is None:
        print(f"{script} holds {len(ids)} runs; there is no sbatch here: submit it from this folder on the cluster")
    else:
        print(f"job {job}: {len(ids)} runs, by {script}")
    print("once they are done, the same command submits the runs that they make known, and those that were cut short")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    print("\n".join(describe(arguments.output)))
    return 0


def _describe_data(prefix: str) -> dict[str, Any]:
    """What identifies the corpus: its hashes, not its path."""
    manifest = read_manifest(prefix)
    return {
        "tokenizer": manifest.tokenizer,
        "train_tokens": manifest.train.tokens,
        "valid_tokens": manifest.valid.tokens,
        "train_sha256": manifest.train.bin.sha256,
        "valid_sha256": manifest.valid.bin.sha256,
    }


def _check_same_data(output: Path, prefix: str, data: dict[str, Any]) -> None:
    known = output / DATA
    if known.exists() and json.loads(known.read_text(encoding="utf-8")) != data:
        raise InputError(f"{output} holds results on other data than {prefix}: give another --output")


def _prepare(output: Path, study: Path, prefix: str, data: dict[str, Any], vocab: Path | None) -> None:
    """Make the study's folder, with links to the corpus so that no run's files name its path."""
    output.mkdir(parents=True, exist_ok=True)
    known, text = output / DATA, json.dumps(data, indent=1) + "\n"
    copy = COPIED + study.read_text(encoding="utf-8").removeprefix(COPIED)
    for path, content in ((known, text), (output / ".gitignore", IGNORED), (output / "study.yaml", copy)):
        if not path.exists() or path.read_text(encoding="utf-8") != content:
            write_text(path, content)
    links = {f"corpus{str(path)[len(prefix) :]}": path for path in output_paths(prefix)}
    if vocab is not None:
        links["corpus_vocab"] = vocab
    for name, path in links.items():
        link = output / name
        if not (link.exists() and link.samefile(path)):
            link.unlink(missing_ok=True)
            link.symlink_to(path.resolve())


if __name__ == "__main__":
    main()
