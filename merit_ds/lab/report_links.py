# SPDX-License-Identifier: Apache-2.0
"""Where a number's run is found: its folder, by a path relative to the report's."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from merit_ds.lab.report_runs import Run


@dataclass(frozen=True)
class Links:
    """Links of a report that is written into the folder `output`."""

    output: Path

    def run(self, run: Run) -> str:
        """The run's folder, or its entry on the page if the folder is not there (any more)."""
        if run.folder is None:
            return f"#{anchor(run)}"
        return self.file(run.folder) + "/"

    def file(self, path: Path) -> str:
        """A file or folder on this machine."""
        return Path(os.path.relpath(path.resolve(), self.output.resolve())).as_posix()


def anchor(run: Run) -> str:
    """The run's entry on the page."""
    return "run-" + re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{run.study}-{run.id}")
