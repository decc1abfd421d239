# SPDX-License-Identifier: Apache-2.0
"""`python -m merit_ds.ops.builder`: compiles the kernels now, for this machine."""

import argparse
import sys
from pathlib import Path

from merit_ds.ops.builder import BuildError, CPUMeritBuilder, CUDAMeritBuilder, MeritBuilder, wanted_builders

_EPILOG = """\
A kernel that lies in the package is used as it is: no compiler is needed where it runs, and nothing is compiled there.
It is for as long as the package's sources do not change, and for every version of PyTorch.

  MERIT_BUILD_CPU=0, MERIT_BUILD_CUDA=0   leave a kernel out, where neither --cpu nor --cuda is given
  CXX                                     the C++ compiler
  CUDA_HOME                               the CUDA toolkit
  TORCH_CUDA_ARCH_LIST                    GPUs to compile for, such as "8.0;9.0+PTX"; else the visible ones, or, where
                                          there are none, 8.0, 9.0, 10.0 and later

In a Docker file:  RUN pip install . && TORCH_CUDA_ARCH_LIST="9.0+PTX" python -m merit_ds.ops.builder
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m merit_ds.ops.builder",
        description="Compile Merit's kernels ahead of time: the CPU's, and CUDA's if there is an nvcc.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cpu", action="store_true", help="the CPU's alone, or with --cuda")
    parser.add_argument("--cuda", action="store_true", help="CUDA's alone, or with --cpu")
    parser.add_argument(
        "--output",
        type=Path,
        default=MeritBuilder.PREBUILT,
        metavar="FOLDER",
        help="where to write them; the package looks in its own folder alone: %(default)s (the default)",
    )
    parser.add_argument("--verbose", action="store_true", help="show the compiler's commands and all its output")
    options = parser.parse_args(arguments)
    named: list[MeritBuilder] = []
    if options.cpu:
        named.append(CPUMeritBuilder())
    if options.cuda:
        named.append(CUDAMeritBuilder())
    try:
        for builder in named or wanted_builders(by_default=True):
            print(builder.build(options.output, portable=False, verbose=options.verbose))
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
