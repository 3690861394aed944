"""heads.csv of one study: every head that it trained, with the settings that were varied.

    python -m eesd study --out results/studies/smollm2-135m/init/heads.csv results/heads/smollm2-135m/init.*/card.json \
        --settings '{"study": "init", "varied": [["init.init-last.s0", {"init": "last"}], ...]}'

The columns are those of heads.csv among the tables; rows stay in the order of the study.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from eesd.analysis.cards import head_records
from eesd.analysis.columns import COLUMNS, write_csv
from eesd.errors import EesdError


def write_study_table(card_paths: Iterable[Path], settings: Mapping[str, Any], out: Path) -> pd.DataFrame:
    """Tabulate the cards of a study, all of them and no others; writes `out` and returns the table."""
    records, varied = head_records(card_paths), dict(settings["varied"])
    heads = {record["head"] for record in records}
    if heads != varied.keys():
        wrong = ", ".join(sorted(heads ^ varied.keys()))
        raise EesdError(
            f"{out}: study {settings['study']} needs one card of each of its heads; missing or foreign: {wrong}."
        )
    place = {head: index for index, head in enumerate(varied)}
    records.sort(key=lambda record: (place[record["head"]], record["task"], record["position"]))
    for record in records:
        record |= {"study": settings["study"], "varied": json.dumps(varied[record["head"]])}
    table = pd.DataFrame(records, columns=list(COLUMNS["heads"]))
    write_csv(table, out)
    return table
