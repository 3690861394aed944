"""Tables: everything that is reported, computed from rows and head cards, as tidy CSV.

    tables = write_tables(["results/bench/m/asdiv/main.jsonl"], ["results/heads/m/deep4/card.json"], "results/tables")

| file              | one row for each                                    |
|-------------------|-----------------------------------------------------|
| `speedup.csv`     | method and baseline: tokens/s, ratio, 95 % interval |
| `exit_layers.csv` | method whose like has another exit layer: speedup   |
| `comparisons.csv` | pair of methods: paired test, corrected             |
| `ranking.csv`     | method: rank, with ties where nothing separates     |
| `acceptance.csv`  | method: acceptance rate, tokens and drafts a round  |
| `lossless.csv`    | method: outputs equal to vanilla, ties, others      |
| `divergences.csv` | output that is not identical to vanilla's           |
| `time_split.csv`  | method: seconds per token by part                   |
| `quality.csv`     | method and metric: mean score                       |
| `rounds.csv`      | method and number of accepted tokens: rounds        |
| `heads.csv`       | head and task: held-out agreement with the target   |
| `calibration.csv` | head and bin of confidence: share of agreement      |

`exit_layers.csv` is written only where methods differ in nothing but the exit layer of their heads. `columns.py` says
what each column means; `speedup.md` and `speedup.tex` are `speedup.csv` to read and to paste. Equal
rows give identical bytes: rows are sorted by name (`order.py`), numbers have 6 significant digits, the bootstrap has a
fixed seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from eesd.analysis import rows as row_files
from eesd.analysis.cards import calibration_records, head_records, read_cards
from eesd.analysis.columns import COLUMNS, write_csv
from eesd.analysis.comparisons import comparison_records, ranking_records
from eesd.analysis.disturbed import is_disturbed
from eesd.analysis.exits import exit_records
from eesd.analysis.latex import speedup_latex
from eesd.analysis.markdown import speedup_markdown
from eesd.analysis.order import BASELINES, sort_frame
from eesd.analysis.rows import Row
from eesd.analysis.stats import paired_speedup
from eesd.files import write_atomic
from eesd.words import BASELINE, PARTS

Records = list[dict[str, Any]]
CELL = ["model", "task", "group"]
# Whole numbers that may be missing; pandas would turn them into floats.
NULLABLE = {"position": "Int64", "vanilla_token": "Int64", "token": "Int64"}
EVIDENCE = ("class", "gap", "bound", "vanilla_logit", "logit", "length_rule", *NULLABLE)  # of a comparison


def write_tables(
    row_paths: Iterable[Path | str], card_paths: Iterable[Path | str], out_dir: Path | str
) -> dict[str, pd.DataFrame]:
    """Read, check and tabulate; writes `out_dir`/*.csv and speedup.md and .tex, and returns the tables by name."""
    tables = build_tables(row_files.read_rows(row_paths), card_paths)
    for name, table in tables.items():
        write_csv(table, Path(out_dir) / f"{name}.csv")
    write_atomic(Path(out_dir) / "speedup.md", speedup_markdown(tables["speedup"]))
    write_atomic(Path(out_dir) / "speedup.tex", speedup_latex(tables["speedup"]))
    _warn_of_crowding(tables["speedup"])
    return tables


def _warn_of_crowding(table: pd.DataFrame) -> None:
    """Name the measurements that other processes disturbed, which tables and figures mark too."""
    for (model, group, task), part in table[is_disturbed(table)].groupby(["model", "group", "task"]):
        print(
            f"{model}, {group}, {task}: other processes took up to {part['crowding'].max():.0%} of the processors. "
            "These speedups say little: stop them, delete the rows and measure again."
        )


def build_tables(rows: list[Row], card_paths: Iterable[Path | str] = ()) -> dict[str, pd.DataFrame]:
    """All tables of checked rows and head cards, by name."""
    frame, card_paths = row_frame(rows), list(card_paths)
    compared = _comparisons(frame)
    speedups = _speedup(frame, compared["ranking"])
    methods = {(row["model"], row["method"]): row["settings"] for row in rows}
    cards = {(card["model"], card["head"]): card for _, card in read_cards(card_paths)}
    exits = exit_records(speedups, methods, cards)
    records = {
        "speedup": speedups,
        **({"exit_layers": exits} if exits else {}),
        **compared,
        "acceptance": _acceptance(frame),
        "lossless": _lossless(frame),
        "divergences": _divergences(frame),
        "time_split": _time_split(frame),
        "quality": _quality(frame),
        "rounds": _rounds(frame),
        "heads": head_records(card_paths),
        "calibration": calibration_records(card_paths),
    }
    return {name: _table(name, found) for name, found in records.items()}


def row_frame(rows: list[Row]) -> pd.DataFrame:
    """One line a row with the sums that tables need, in canonical order."""
    records = [
        {
            **{
                field: row[field]
                for field in (*CELL, "dataset", "method", "item", "repeat", "dtype", "decoding", "lossy")
            },
            "tokens": len(row["output_tokens"]),
            "rounds": row["rounds"],
            "drafted": row_files.drafted(row),
            "accepted": row_files.accepted(row),
            "settled": row_files.settled(row),
            "looked_up": row_files.looked_up(row) if row["settings"].get("lookup") else None,
            "peer": row_files.is_peer(row),
            "exact": row.get("exact", False),
            "crowding": row.get("crowding"),
            "scores": row["scores"],
            **{part: row["seconds"][part] for part in (*PARTS, "total")},
            **{field: row["comparison"].get(field) for field in EVIDENCE},
        }
        for row in rows
    ]
    return sort_frame(_evened(pd.DataFrame(records)), [*CELL, "method", "item", "repeat"])


def _evened(frame: pd.DataFrame) -> pd.DataFrame:
    """Add `even_tokens` and `even_s`: what the mean output of a prompt would have taken at the speed of each row.

    Drawn tokens end where chance has it, and the seconds of the prompt would be spread over more of them for whichever
    method happened to write more, 6 % of a speedup in a group of a dozen prompts. So all outputs of a prompt are
    brought to their mean length, prefill + decode (mean - 1) / (tokens - 1). Equal outputs stay as they are; so do
    those without a second token, and peers', whose seconds are not split.
    """
    split = ~frame["peer"] & (frame["tokens"] > 1)
    mean = frame[split].groupby([*CELL, "item"])["tokens"].mean().rename("even_tokens")
    frame = frame.join(mean, on=[*CELL, "item"])
    frame["even_tokens"] = frame["even_tokens"].where(split, frame["tokens"])
    more = (frame["even_tokens"] - frame["tokens"]) / (frame["tokens"] - 1).where(split, 1)
    frame["even_s"] = frame["total"] + (frame["total"] - frame["prefill"].fillna(0)) * more
    return frame


def _table(name: str, records: Records) -> pd.DataFrame:
    columns = list(COLUMNS[name])
    table = pd.DataFrame(records, columns=columns)
    if name == "divergences":
        table = table.astype(NULLABLE)
    keys = [column for column in ("model", "task", "group", "baseline", "method", "head", "item") if column in columns]
    return sort_frame(table, keys)


def _cells(
    frame: pd.DataFrame, by: tuple[str, ...] = (*CELL, "method")
) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """(identifying columns, rows) of every method of every cell."""
    for key, cell in frame.groupby(list(by), sort=False):
        yield {**dict(zip(by, key, strict=True)), **{name: cell[name].iloc[0] for name in ("dataset", "lossy")}}, cell


def _how(cell: pd.DataFrame) -> dict[str, Any]:
    return {field: cell[field].iloc[0] for field in ("dtype", "decoding", "lossy")} | {"peer": bool(cell["peer"].any())}


def _speedup(frame: pd.DataFrame, ranking: Records) -> Records:
    ranks = {tuple(one[field] for field in (*CELL, "method")): one["rank"] for one in ranking}
    records = []
    for who, cell in _cells(frame, tuple(CELL)):
        by_method = dict(iter(cell.groupby("method", sort=False)))
        for baseline in [name for name in BASELINES if name in by_method]:
            base = by_method[baseline]
            for method in [name for name in by_method if name != baseline]:
                own = by_method[method]
                names = {"method": method, "baseline": baseline, "rank": ranks[*(who[field] for field in CELL), method]}
                records.append({**who, **names, **_how(own), **_compare(own, base)})
    return records


def _compare(own: pd.DataFrame, base: pd.DataFrame) -> dict[str, Any]:
    # Both frames are sorted by item and repeat and checks.py made sure that both have every unit.
    result = paired_speedup(own["item"], own["even_tokens"], own["even_s"], base["even_tokens"], base["even_s"])
    split = not own["peer"].any() and not base["peer"].any()
    return {
        **(_compare_decoding(own, base) if split else {}),
        "n_items": result.n_items,
        "n_units": result.n_units,
        "tokens_per_s": own["even_tokens"].sum() / own["even_s"].sum(),
        "baseline_tokens_per_s": base["even_tokens"].sum() / base["even_s"].sum(),
        "speedup": result.ratio,
        "ci_low": result.low,
        "ci_high": result.high,
        "speedup_mean_of_ratios": result.mean_of_ratios,
        "crowding": _crowding(own, base),
    }


def _compare_decoding(own: pd.DataFrame, base: pd.DataFrame) -> dict[str, float]:
    if not own["settled"].sum() or not base["settled"].sum():
        return {}
    sides = [(one["settled"], one["total"] - one["prefill"]) for one in (own, base)]
    result = paired_speedup(own["item"], *sides[0], *sides[1])
    return {"decode_speedup": result.ratio, "decode_ci_low": result.low, "decode_ci_high": result.high}


def _crowding(*methods: pd.DataFrame) -> float | None:
    """Mean over the time of rows, of the method that has more: it bends the ratio. None if some rows do not have it."""
    shares = [one["crowding"].astype(float) for one in methods]
    if any(share.isna().any() for share in shares):
        return None
    return max(
        float((share * one["total"]).sum() / one["total"].sum()) for share, one in zip(shares, methods, strict=True)
    )


def _comparisons(frame: pd.DataFrame) -> dict[str, Records]:
    """Methods of every (model, task, group) against each other, and their ranks."""
    tables: dict[str, Records] = {"comparisons": [], "ranking": []}
    for key, cell in frame.groupby(CELL, sort=False):
        where = {**dict(zip(CELL, key, strict=True)), "dataset": cell["dataset"].iloc[0]}
        lossy = set(cell.loc[cell["lossy"].astype(bool), "method"])
        compared = comparison_records(cell)
        for table, records in (("comparisons", compared), ("ranking", ranking_records(cell, compared))):
            for record in records:
                changes = not lossy.isdisjoint((record["method"], record.get("other")))
                tables[table].append({**where, **record, "lossy": changes})
    return tables


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None


def _with_rounds(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows whose rounds are known: all but those of peers that do not draft."""
    return frame[~frame["peer"] | frame["rounds"].map(bool)]


def _acceptance(frame: pd.DataFrame) -> Records:
    records = []
    for who, own in _cells(_with_rounds(frame)):
        rounds = int(own["rounds"].map(len).sum())
        drafted = int(own["drafted"].sum())
        records.append(
            {
                **who,
                "acceptance_rate": _ratio(int(own["accepted"].sum()), drafted),
                "tokens_per_round": _ratio(int(own["settled"].sum()), rounds),
                "drafted_per_round": _ratio(drafted, rounds),
                "looked_up": None if own["looked_up"].isna().any() else _ratio(int(own["looked_up"].sum()), rounds),
                "rounds": rounds,
                "n_items": own["item"].nunique(),
            }
        )
    return records


def _lossless(frame: pd.DataFrame) -> Records:
    records = []
    for who, own in _cells(frame[frame["method"] != BASELINE]):
        counts = own["class"].value_counts()
        found = {name: int(counts.get(name, 0)) for name in ("identical", "tie", "different", "not_compared")}
        records.append(
            {
                **who,
                **_how(own),
                "n_items": own["item"].nunique(),
                "n_units": len(own),
                **found,
                "exact": bool(own["exact"].all()),
            }
        )
    return records


def _divergences(frame: pd.DataFrame) -> Records:
    return frame[frame["class"].isin(["tie", "different"])].to_dict("records")


def _time_split(frame: pd.DataFrame) -> Records:
    records = []
    for who, own in _cells(frame):
        tokens = int(own["tokens"].sum())
        parts = {f"{part}_s": None if own["peer"].any() else own[part].sum() / tokens for part in PARTS}
        total = own["total"].sum() / tokens
        records.append({**who, **parts, "total_s": total, "output_tokens": tokens, "n_items": own["item"].nunique()})
    return records


def _quality(frame: pd.DataFrame) -> Records:
    records = []
    for who, own in _cells(frame):
        scores = pd.DataFrame(own["scores"].tolist(), index=own["item"])
        for metric in sorted(scores.columns):
            per_item = scores[metric].groupby(level=0).mean()
            records.append({**who, "metric": metric, "value": per_item.mean(), "n_items": len(per_item)})
    return records


def _rounds(frame: pd.DataFrame) -> Records:
    records = []
    for who, own in _cells(_with_rounds(frame)):
        counts = own["rounds"].explode().dropna().map(lambda one: one[1]).value_counts()
        # Numbers of accepted tokens that never came up are rows too, so that a distribution has no holes.
        for accepted in range(int(counts.index.max()) + 1 if len(counts) else 0):
            records.append({**who, "accepted": accepted, "count": int(counts.get(accepted, 0))})
    return records
