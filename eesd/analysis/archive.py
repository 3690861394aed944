"""Published results: tables, and what is needed to redraw every figure from them, copied from a finished run.

    python -m eesd archive --out published/default FILES...        # what `snakemake publish` calls, with what it made

The folder mirrors `results/`: tables, replays, predictions, studies, recorded decodes. Beside them lie the verdict,
cost tables and figures (SVG). Only the files that are named are copied: others in the same place are of other runs.
Of the prompts of recorded decodes their beginning is kept: not all texts may be passed on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from eesd.errors import EesdError
from eesd.files import read_jsonl, write_atomic

# (where from, where to, which kinds of files); others, such as PDF, are made again from these
PLACES = (
    ("results", "", (".csv", ".txt", ".jsonl")),
    ("resources", "", (".json",)),
    ("figures", "figures", (".svg",)),
)
VIEWS = Path("results/views")
EXCERPT = 200  # characters of a prompt
SIGNS = ("tables/speedup.csv", "studies/*/*/heads.csv")  # a folder of published results has one of them


def archive(out: Path | str, files: Iterable[Path | str]) -> list[Path]:
    """Replace the folder `out` by these files of a run; EesdError without results, or with other ones in `out`."""
    out = Path(out)
    copies = {}
    for file in map(Path, files):
        for place, below, kinds in PLACES:
            if file.parts[0] == place and file.suffix in kinds:
                copies[file] = out / below / file.relative_to(place)
    signs = [sign for sign in SIGNS if any(copy.relative_to(out).match(sign) for copy in copies.values())]
    if not signs:
        raise EesdError(
            f"Neither {' nor '.join(f'results/{sign}' for sign in SIGNS)} among the files. Run `snakemake --cores all` "
            "first, then `snakemake publish`, or `snakemake studies`, then `snakemake publish_studies`."
        )
    there = [sign for sign in SIGNS if any(out.glob(sign))]
    if out.is_dir() and any(out.iterdir()) and (not there or set(there) - set(signs)):
        raise EesdError(f"{out}: holds something else than what is published now. Choose another name (`published`).")
    missing = [str(file) for file in copies if not file.is_file()]
    if missing:
        raise EesdError(f"No such file: {', '.join(missing)}. What {out} holds stays as it is.")
    # Beside it first: what was published before stays until all of the new is there.
    new = out.with_name(f"{out.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    for file, copy in copies.items():
        to = new / copy.relative_to(out)
        to.parent.mkdir(parents=True, exist_ok=True)
        if file.is_relative_to(VIEWS):
            write_atomic(to, "".join(json.dumps(_excerpt(row), ensure_ascii=False) + "\n" for row in read_jsonl(file)))
        else:
            shutil.copyfile(file, to)
    shutil.rmtree(out, ignore_errors=True)
    new.rename(out)
    return list(copies.values())


def _excerpt(view: dict[str, Any]) -> dict[str, Any]:
    prompt = view["prompt"]
    return {**view, "prompt": prompt if len(prompt) <= EXCERPT else prompt[:EXCERPT] + " \u2026"}
