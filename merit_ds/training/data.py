# SPDX-License-Identifier: Apache-2.0
"""Prepare text for training: `python -m merit_ds.training.data SOURCE ... --output PREFIX --tokenizer NAME`.

Writes PREFIX_train.bin/.idx and PREFIX_valid.bin/.idx, which Megatron-core reads, and PREFIX.json, which says what
they hold. Nothing appears under these names until all of it is complete.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from merit_ds.errors import InputError
from merit_ds.training.data_manifest import SPLITS, read_manifest, verify_files
from merit_ds.training.documents import Source, json_lines, nanogpt, openwebtext, text_files, wikipedia
from merit_ds.training.encode import Encoder
from merit_ds.training.prepare import prepare
from merit_ds.training.tokenizer import build_tokenizer

EXAMPLES = """examples:
  %(prog)s wiki --output data/wiki --tokenizer gpt2
  %(prog)s text books/*.txt --output data/books --tokenizer gpt2 --valid-fraction 0.02
  %(prog)s jsonl dump.jsonl --field body --output data/dump --tokenizer gpt2 --workers 16
  %(prog)s openwebtext --output data/owt --tokenizer gpt2 --workers 32
  %(prog)s nanogpt nanoGPT/data/openwebtext --output data/owt
  %(prog)s verify data/owt
"""

SOURCES: dict[str, Callable[[argparse.Namespace], Source]] = {
    "wiki": lambda args: wikipedia(),
    "text": lambda args: text_files(args.files, blank_lines=args.blank_lines),
    "jsonl": lambda args: json_lines(args.files, field=args.field),
    "openwebtext": lambda args: openwebtext(dataset=args.dataset),
    "nanogpt": lambda args: nanogpt(args.folder),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = _parser().parse_args(arguments)
    try:
        if args.source == "verify":
            _verify(args.prefix)
        else:
            _prepare(args)
    except InputError as error:
        return _fail(str(error))
    except BrokenProcessPool:
        return _fail("a worker process was killed, perhaps for lack of memory; try fewer --workers")
    except OSError as error:
        return _fail(f"{error.filename or args.source}: {error.strerror}")
    except KeyboardInterrupt:
        _fail("interrupted; nothing was written")
        return 130
    return 0


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


def _prepare(args: argparse.Namespace) -> None:
    if not Path(args.output).name or args.output.endswith("/"):
        raise InputError(f"--output {args.output}: name a prefix, for instance {args.output.rstrip('/')}/text")
    source = SOURCES[args.source](args)
    if source.notice:
        print(source.notice)
    tokenizer = build_tokenizer(args.tokenizer, vocab=args.vocab)
    tokenizer.encode("")  # a vocabulary that is nowhere to be had ends it here, and each worker finds it in the cache
    encoder = Encoder(tokenizer, args.seed, args.valid_fraction)
    start = time.monotonic()
    manifest = prepare(source, encoder, prefix=args.output, workers=args.workers, overwrite=args.overwrite)
    seconds = time.monotonic() - start
    for split in SPLITS:
        side = manifest.split(split)
        print(f"{args.output}_{split}.bin: {side.documents:,} documents, {side.tokens:,} {args.tokenizer} tokens")
    print(f"{args.output}.json: complete, in {seconds:.1f} s")


def _verify(prefix: str) -> None:
    verify_files(prefix, read_manifest(prefix))
    print(f"{prefix}.json: all files are as they were written")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m merit_ds.training.data",
        description="Turn text into the token files that training reads.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    output, text, split = _output_options(), _text_options(), _split_options()

    commands.add_parser("wiki", parents=[output, text, split], help="10,033 Wikipedia introductions, by pip (4.9 MB)")

    command = commands.add_parser("text", parents=[output, text, split], help="UTF-8 text files")
    command.add_argument("files", nargs="+", type=Path, metavar="FILE")
    command.add_argument("--blank-lines", action="store_true", help="a document is a block between blank lines")

    command = commands.add_parser("jsonl", parents=[output, text, split], help="files with a JSON object on each line")
    command.add_argument("files", nargs="+", type=Path, metavar="FILE")
    command.add_argument("--field", default="text", help="the key of the text (default: %(default)s)")

    command = commands.add_parser(
        "openwebtext", parents=[output, text], help="OpenWebText by Hugging Face datasets, with nanoGPT's split"
    )
    command.add_argument(
        "--dataset", default="Skylion007/openwebtext", help="hub name or local copy (default: %(default)s)"
    )
    command.set_defaults(seed=0, valid_fraction=0.0)

    command = commands.add_parser("nanogpt", parents=[output], help="nanoGPT's train.bin and val.bin of GPT-2 tokens")
    command.add_argument("folder", type=Path, metavar="FOLDER")
    command.set_defaults(tokenizer="gpt2", workers=1, seed=0, valid_fraction=0.0)

    command = commands.add_parser("verify", help="check prepared files against the hashes in PREFIX.json")
    command.add_argument("prefix", metavar="PREFIX")
    return parser


def _output_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--output", required=True, metavar="PREFIX", help="writes PREFIX_train.bin and so on")
    options.add_argument("--overwrite", action="store_true", help="replace existing output")
    options.add_argument("--vocab", type=Path, metavar="FILE", help="r50k_base.tiktoken, where there is no network")
    return options


def _text_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--tokenizer", choices=("gpt2", "byte"), required=True, help="as in the recipe")
    options.add_argument("--workers", type=_positive, default=1, metavar="N", help="processes (default: %(default)s)")
    return options


def _split_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--valid-fraction",
        type=_fraction,
        default=0.01,
        metavar="F",
        help="documents kept for validation (default: %(default)s)",
    )
    options.add_argument("--seed", type=_seed, default=0, metavar="S", help="which ones (default: %(default)s)")
    return options


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdigit() or int(text) >= 2**64:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to 2**64 - 1")
    return int(text)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
