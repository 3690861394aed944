"""Published results: what is needed to redraw every figure and to check every number, copied from a finished run.

    python -m eesd archive --out published/default        # what `snakemake publish` calls

The folder mirrors `results/`: tables, replays, predictions, studies, recorded decodes. Beside them lie the verdict,
cost tables and figures (SVG).
"""

from __future__ import annotations

import shutil
from pathlib import Path

from eesd.errors import EesdError

# (where from, which files, where to)
PARTS = (
    ("results", "tables/*.csv", ""),
    ("results", "lossless.txt", ""),
    ("results", "replay/**/*.csv", ""),
    ("results", "prediction/**/*.csv", ""),
    ("results", "studies/**/*.csv", ""),
    ("results", "views/**/*.jsonl", ""),
    ("resources", "hardware/*.json", ""),
    ("figures", "**/*.svg", "figures"),
)


def archive(out: Path | str, here: Path | str = ".") -> list[Path]:
    """Replace the folder `out` by the results of the run in `here`; EesdError where there are none."""
    out, here = Path(out), Path(here)
    copies = [
        (path, out / below / path.relative_to(here / part))
        for part, pattern, below in PARTS
        for path in sorted((here / part).glob(pattern))
    ]
    if not any(path.name == "speedup.csv" for path, _ in copies):
        raise EesdError(f"{here}: no results here (results/tables/speedup.csv). Run `snakemake --cores all` first.")
    shutil.rmtree(out, ignore_errors=True)
    for path, copy in copies:
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    return [copy for _, copy in copies]
