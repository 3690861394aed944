"""Tables against numbers worked out by hand, and their order, format and refusals."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from eesd.analysis.checks import check_rows
from eesd.analysis.columns import COLUMNS
from eesd.analysis.order import method_key
from eesd.analysis.rows import check_row
from eesd.analysis.tables import build_tables, write_tables
from eesd.analysis.verdict import check_lossless, write_verdict
from eesd.errors import EesdError
from tests.analysis.factory import comparison, make_row, realistic_rows, split_seconds, unit, write_card, write_rows


def tables_of(rows: list[dict[str, Any]]) -> dict[str, pd.DataFrame]:
    """Tables of rows that were checked against each other."""
    for number, row in enumerate(rows, 1):
        row["where"] = f"rows.jsonl:{number}"
    check_rows(rows)
    return build_tables(rows)


def two_items() -> list[dict[str, Any]]:
    """Two prompts, three methods; every number below follows from these."""
    rows = []
    for item, vanilla_s, eesd_s, hf_s in (("asdiv-1", 1.0, 0.5, 2.0), ("asdiv-2", 2.0, 1.5, 2.0)):
        rows += [
            make_row("eesd", item, seconds=split_seconds(eesd_s, drafting=0.25), scores={"exact_match": 0.0}),
            make_row("hf_generate", item, seconds=split_seconds(hf_s, peer=True)),
            make_row("vanilla", item, seconds=split_seconds(vanilla_s)),
        ]
    return rows


def test_speedup_by_hand() -> None:
    table = tables_of(two_items())["speedup"].set_index(["baseline", "method"])
    assert list(table.index) == [
        ("vanilla", "hf_generate"),
        ("vanilla", "eesd"),
        ("hf_generate", "vanilla"),
        ("hf_generate", "eesd"),
    ]
    eesd = table.loc["vanilla", "eesd"]
    assert eesd["tokens_per_s"] == pytest.approx(10 / 2.0)
    assert eesd["baseline_tokens_per_s"] == pytest.approx(10 / 3.0)
    assert eesd["speedup"] == pytest.approx(1.5)
    assert eesd["speedup_mean_of_ratios"] == pytest.approx((2 + 4 / 3) / 2)
    assert (eesd["n_items"], eesd["n_units"]) == (2, 2)
    assert eesd["ci_low"] < 4 / 3 < 2.0 < eesd["ci_high"]
    assert table.loc[("hf_generate", "vanilla"), "speedup"] == pytest.approx(4 / 3)
    assert table.loc[("hf_generate", "eesd"), "speedup"] == pytest.approx(2.0)


def test_outputs_of_one_prompt_are_compared_at_their_mean_length() -> None:
    rounds = {"vanilla": [[0, 0, "none"]] * 4, "eesd": [[3, 3, "k_max"]] * 2}
    rows = [
        make_row(method, rounds=rounds[method], output_tokens=list(range(tokens)), decoding="sampled", temperature=1.0)
        | {"seconds": split_seconds(1.0), "comparison": comparison("not_compared")}
        for method, tokens in (("vanilla", 5), ("eesd", 9))
    ]
    tables = tables_of(rows)
    # 7 tokens each: an eighth of a second for the prompt, the rest by the seconds of their own 4 and 8 others.
    vanilla, eesd = 0.125 + 0.875 * 6 / 4, 0.125 + 0.875 * 6 / 8
    found = tables["speedup"].iloc[0]
    assert found["tokens_per_s"] == pytest.approx(7 / eesd)
    assert found["baseline_tokens_per_s"] == pytest.approx(7 / vanilla)
    assert found["speedup"] == pytest.approx(vanilla / eesd)
    assert found["decode_speedup"] == pytest.approx(2.0)
    assert tables["comparisons"]["speedup"].iloc[0] == pytest.approx(vanilla / eesd)


def test_rounds_that_lookup_drafted_are_counted() -> None:
    rows = two_items()
    for row in rows:
        if row["method"] == "eesd":
            row["settings"] = {"lookup": {"min_ngram": 2}}
            row["rounds"][0].append("lookup")
    table = tables_of(rows)["acceptance"].set_index("method")
    assert table.loc["eesd", "looked_up"] == pytest.approx(0.5)
    assert math.isnan(table.loc["vanilla", "looked_up"])


def test_decoding_alone_leaves_the_prefill_out() -> None:
    rows = two_items()
    for row in rows:
        if row["method"] == "vanilla":
            row["seconds"]["prefill"] += 0.25
            row["seconds"]["verify"] -= 0.25
    table = tables_of(rows)["speedup"].set_index(["baseline", "method"])
    eesd = table.loc["vanilla", "eesd"]
    assert eesd["speedup"] == pytest.approx(1.5)
    assert eesd["decode_speedup"] == pytest.approx((3 * 7 / 8 - 0.5) / (2 * 7 / 8))
    for row in rows:
        if row["method"] == "vanilla":  # five tokens, of which the prefill gives one
            row["output_tokens"] = [5, 6, 7]
    other = build_tables(rows)["speedup"].set_index(["baseline", "method"]).loc["vanilla", "eesd"]
    assert other["decode_speedup"] == pytest.approx(2 * eesd["decode_speedup"])
    assert eesd["decode_ci_low"] < eesd["decode_speedup"] < eesd["decode_ci_high"]
    assert table.loc[("vanilla", "hf_generate"), "decode_speedup":"decode_ci_high"].isna().all()


def test_acceptance_and_rounds_by_hand() -> None:
    found = tables_of(two_items())
    table = found["acceptance"].set_index("method")
    assert list(table.index) == ["vanilla", "eesd"]  # a peer that does not draft has no rounds
    assert table.loc["eesd", "acceptance_rate"] == pytest.approx(0.5)
    assert table.loc["eesd", "tokens_per_round"] == pytest.approx(2.0)
    assert table.loc["eesd", "drafted_per_round"] == pytest.approx(2.0)
    assert table.loc["eesd", "rounds"] == 4
    assert table.loc["vanilla", "tokens_per_round"] == 1.0
    assert math.isnan(table.loc["vanilla", "acceptance_rate"])
    assert table["looked_up"].isna().all()
    counts = found["rounds"][["method", "accepted", "count"]].values.tolist()
    assert counts == [["vanilla", 0, 8], ["eesd", 0, 0], ["eesd", 1, 4]]


def test_a_drafting_peer_has_rounds_without_what_its_prefill_drafted() -> None:
    lookup = make_row("hf_lookup", rounds=[[2, 1, "peer"], [2, 0, "peer"]], seconds=split_seconds(1.0, peer=True))
    rows = [make_row("vanilla"), lookup]
    table = tables_of(rows)["acceptance"].set_index("method")
    # Five tokens: two of them from the pass over the prompt, three from two rounds.
    assert table.loc["hf_lookup", "tokens_per_round"] == 1.5
    assert table.loc["hf_lookup", "acceptance_rate"] == 0.25
    lookup["rounds"].append([3, 1, "peer"])
    with pytest.raises(EesdError, match="5 output tokens, but its rounds alone account for 5"):
        check_row(lookup)


def test_one_token_output_has_no_rounds() -> None:
    table = tables_of(unit(output_tokens=[5], rounds=[]))["acceptance"]
    assert table["rounds"].tolist() == [0, 0]
    assert table["tokens_per_round"].isna().all()


def test_time_split_by_hand() -> None:
    table = tables_of(two_items())["time_split"].set_index("method")
    assert table.loc["eesd", "draft_s"] == pytest.approx(0.25 * 2.0 / 10)
    assert table.loc["eesd", "prefill_s"] == pytest.approx(0.125 * 2.0 / 10)
    parts = [f"{part}_s" for part in ("prefill", "draft", "verify", "control", "other")]
    assert table.loc["eesd", parts].sum() == pytest.approx(table.loc["eesd", "total_s"])
    assert table.loc["hf_generate", parts].isna().all()
    assert table.loc["hf_generate", "total_s"] == pytest.approx(0.4)


def test_quality_weighs_items_not_repeats() -> None:
    rows = [
        *unit("asdiv-1", scores={"exact_match": 1.0}),
        *unit("asdiv-1", scores={"exact_match": 1.0}, repeat=1),
        *unit("asdiv-2", scores={"exact_match": 0.0}),
    ]
    table = tables_of(rows)["quality"]
    assert table["value"].tolist() == [0.5, 0.5]
    assert table["n_items"].tolist() == [2, 2]


def divergent(name: str, **changes: Any) -> list[dict[str, Any]]:
    """One identical unit and one whose second token departs."""
    found = comparison(name, 1, vanilla_token=6, token=0, gap=0.01 if name == "tie" else 2.5, bound=0.02)
    departing = make_row("eesd", "asdiv-2", output_tokens=[5, 0, 7, 8, 9], comparison=found, **changes)
    return [*unit("asdiv-1", lossy=False), make_row("vanilla", "asdiv-2"), departing]


def test_lossless_counts_and_lists() -> None:
    found = tables_of(divergent("tie"))
    row = found["lossless"].iloc[0]
    assert row[["method", "identical", "tie", "different", "not_compared"]].tolist() == ["eesd", 1, 1, 0, 0]
    listed = found["divergences"].iloc[0]
    assert listed[["item", "method", "class", "position", "vanilla_token", "token", "gap", "bound"]].tolist() == [
        "asdiv-2", "eesd", "tie", 1, 6, 0, 0.01, 0.02,
    ]  # fmt: skip
    check_lossless(found)


def test_different_fails_by_name() -> None:
    with pytest.raises(
        EesdError, match=r"1 outputs differ[^$]*eesd, item asdiv-2, repeat 0, token 1: 0 where vanilla has 6"
    ):
        check_lossless(tables_of(divergent("different")))


def test_ended_output_fails_by_name() -> None:
    short = comparison("different", 3, vanilla_token=8)
    rows = [make_row(), make_row("eesd", output_tokens=[5, 6, 7], rounds=[[2, 1, "k_max"]], comparison=short)]
    with pytest.raises(EesdError, match=r"nothing where vanilla has 8 .logit gap nothing"):
        check_lossless(tables_of(rows))


def test_lossy_methods_may_differ() -> None:
    rows = divergent("different")
    for row in rows:
        row["lossy"] = row["method"] == "eesd"
    found = tables_of(rows)
    assert found["lossless"]["different"].tolist() == [1]
    check_lossless(found)
    for name in ("speedup", "acceptance", "lossless", "divergences", "time_split", "quality", "rounds"):
        marked = found[name][found[name]["lossy"]]["method"]
        assert set(marked) == {"eesd"}, name


def test_long_failures_are_cut() -> None:
    rows = []
    for index in range(25):
        rows += [row for row in divergent("different") if row["item"] == "asdiv-2"]
        rows[-1]["item"] = rows[-2]["item"] = f"asdiv-{index}"
    with pytest.raises(EesdError, match="and 5 more"):
        check_lossless(tables_of(rows))


def test_verdict_is_a_sentence_or_a_failure(tmp_path: Path) -> None:
    write_tables([write_rows(tmp_path / "rows.jsonl", divergent("tie"))], [], tmp_path)
    write_verdict(tmp_path, tmp_path / "lossless.txt")
    assert (
        "1 ties within the rounding of their dtype, 0 different (divergences.csv)."
        " The widest tie is 0.01 logits apart (bound 0.02); ties are of eesd."
        in (tmp_path / "lossless.txt").read_text()
    )
    write_tables([write_rows(tmp_path / "rows.jsonl", divergent("different"))], [], tmp_path)
    with pytest.raises(EesdError, match="1 outputs differ"):
        write_verdict(tmp_path, tmp_path / "lossless.txt")


def test_a_verdict_without_tables_says_what_writes_them(tmp_path: Path) -> None:
    with pytest.raises(EesdError, match=r"lossless\.csv: no such file\. `eesd tables"):
        write_verdict(tmp_path, tmp_path / "lossless.txt")


def test_columns_are_the_documented_ones(tables_dir: Path) -> None:
    for name in set(COLUMNS) - {"provenance", "sampling"}:
        header = (tables_dir / f"{name}.csv").read_text().splitlines()[0]
        assert header == ",".join(COLUMNS[name])


def test_equal_rows_give_identical_bytes(tmp_path: Path) -> None:
    rows = realistic_rows(n_items=3)
    card = write_card(tmp_path / "card.json")
    write_tables([write_rows(tmp_path / "a.jsonl", rows)], [card], tmp_path / "one")
    random.Random(0).shuffle(rows)
    halves = [write_rows(tmp_path / f"{half}.jsonl", rows[half::2]) for half in (0, 1)]
    write_tables(halves, [card], tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_six_significant_digits_and_empty_cells(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", unit(seconds=split_seconds(1 / 3)))
    write_tables([path], [], tmp_path / "tables")
    line = (tmp_path / "tables" / "speedup.csv").read_text().splitlines()[1]
    assert line == "toy,asdiv,main,eesd,vanilla,1,15,1,,,1,1,,,1,1,15,0,float32,greedy,False,ASDiv (toy)"
    assert (tmp_path / "tables" / "heads.csv").read_text() == ",".join(COLUMNS["heads"]) + "\n"


def test_method_order() -> None:
    names = ["static_k10", "eesd", "hf_generate", "static_k2", "vanilla"]
    assert sorted(names, key=method_key) == ["vanilla", "hf_generate", "eesd", "static_k2", "static_k10"]


def test_markdown(tmp_path: Path) -> None:
    write_tables([write_rows(tmp_path / "rows.jsonl", two_items())], [], tmp_path)
    lines = (tmp_path / "speedup.md").read_text().splitlines()
    assert "## toy, main: against vanilla (greedy, float32)" in lines
    assert "| method | asdiv (n = 2) |" in lines
    assert "| vanilla | **1.00** (3.3 tokens/s) |" in lines
    assert any(line.startswith("| eesd | **1.50** [") for line in lines), "two prompts tell nobody apart"
    alike = [{**row, "item": f"asdiv-{number}"} for number in range(8) for row in two_items()[:3]]
    write_tables([write_rows(tmp_path / "rows.jsonl", alike)], [], tmp_path)
    lines = (tmp_path / "speedup.md").read_text().splitlines()
    assert "| vanilla | 1.00 (5.0 tokens/s) |" in lines
    assert any(line.startswith("| hf_generate | 0.50 [") for line in lines)
    assert any(line.startswith("| eesd | **2.00** [") for line in lines)


def test_what_other_processes_disturbed_is_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = two_items()
    for row in rows:
        row["crowding"] = {"eesd": 0.2, "vanilla": 0.0, "hf_generate": 0.01}[row["method"]]
    table = write_tables([write_rows(tmp_path / "rows.jsonl", rows)], [], tmp_path)["speedup"]
    found = table.set_index(["baseline", "method"])["crowding"]
    assert found["vanilla", "eesd"] == pytest.approx(0.2)  # of the method that has more: it bends the ratio
    assert found["vanilla", "hf_generate"] == pytest.approx(0.01)
    assert "toy, main, asdiv: other processes took up to 20% of the processors" in capsys.readouterr().out
    assert "| method | asdiv (n = 2, machine busy) |" in (tmp_path / "speedup.md").read_text()
    assert "($n = 2$, machine busy)" in (tmp_path / "speedup.tex").read_text()
    # Alone nothing is marked; rows that do not say are no quiet ones.
    for row in rows:
        row["crowding"] = 0.01
    del rows[0]["crowding"]
    table = write_tables([write_rows(tmp_path / "rows.jsonl", rows)], [], tmp_path)["speedup"]
    text = (tmp_path / "speedup.md").read_text()
    assert "busy" not in text and "| method | asdiv (n = 2, load not recorded) |" in text
    assert table["crowding"].isna().sum() == 2
    assert not capsys.readouterr().out


def test_markdown_admits_that_nothing_won(tmp_path: Path) -> None:
    one = [make_row(), make_row("eesd", seconds=split_seconds(2.0), lossy=True)]
    slow = [{**row, "item": item} for item in ("asdiv-1", "asdiv-2") for row in one]
    write_tables([write_rows(tmp_path / "rows.jsonl", slow)], [], tmp_path)
    text = (tmp_path / "speedup.md").read_text()
    assert "| vanilla | **1.00** (5.0 tokens/s) |" in text
    assert "| eesd † | 0.50 [" in text
    write_tables([write_rows(tmp_path / "rows.jsonl", one)], [], tmp_path)
    text = (tmp_path / "speedup.md").read_text()
    assert "| vanilla | 1.00 (5.0 tokens/s) |" in text, "one prompt tells nothing"
    assert "| eesd † | 0.50 (one prompt, no interval) |" in text


def test_heads(tables_dir: Path) -> None:
    table = pd.read_csv(tables_dir / "heads.csv").set_index(["task", "position"])
    columns = ["head", "vocab_rows", "top1_agreement", "chain_length"]
    assert table.loc[("asdiv", 1), columns].tolist() == ["exit4", 8192, 0.45, 0.7]
    assert table.loc[("asdiv", 2), columns].tolist() == ["exit4", 8192, 0.41, 0.7]
    assert list(table.index.get_level_values(0).unique()) == ["asdiv", "humaneval", "xsum"]
    where = ["train_seconds", "device_name", "torch", "commit", "time"]
    assert table.loc[("asdiv", 1), where].tolist() == [100.0, "Toy CPU", "2.13.0", "abc1234", "2026-01-31T12:00:00Z"]


def test_a_chain_length_that_was_not_measured_is_an_empty_cell(tmp_path: Path) -> None:
    agreement = {task: {**AGREEMENT, "chain_length": length} for task, length in (("asdiv", None), ("xsum", 0.0))}
    build_tables_of_card(tmp_path, write_card(tmp_path / "card.json", agreement=agreement))
    table = pd.read_csv(tmp_path / "tables" / "heads.csv", dtype=str, keep_default_na=False)
    assert table["chain_length"].tolist() == ["", "0"]


AGREEMENT = {"top1": [0.5], "expected_acceptance": [0.4], "chain_length": 0.5, "positions": 9}


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "damaged"),
        ("[]", "no field head"),
        ("{}", "no field head"),
        ({"agreement": {}}, "'agreement' is empty"),
        ({"agreement": {"asdiv": {**AGREEMENT, "top1": [1.5]}}}, "agreement.asdiv: 1.5 is not a share"),
        ({"agreement": {"asdiv": {**AGREEMENT, "top1": [0.5, 0.4]}}}, "one number for each draft position"),
        ({"agreement": {"asdiv": {**AGREEMENT, "expected_acceptance": None}}}, "one number for each draft position"),
        ({"agreement": {"asdiv": {**AGREEMENT, "chain_length": -1}}}, "asdiv.chain_length is -1"),
        ({"agreement": {"asdiv": {**AGREEMENT, "positions": None}}}, "asdiv.positions is None"),
        ({"agreement": {"asdiv": 0.5}}, "agreement.asdiv has no top1"),
    ],
)
def test_bad_cards(tmp_path: Path, text: str | dict[str, Any], word: str) -> None:
    path = write_card(tmp_path / "card.json", **(text if isinstance(text, dict) else {}))
    if isinstance(text, str):
        path.write_text(text)
    with pytest.raises(EesdError, match=word) as caught:
        build_tables_of_card(tmp_path, path)
    assert str(path) in str(caught.value)


def test_missing_and_repeated_cards(tmp_path: Path) -> None:
    with pytest.raises(EesdError, match="no such file"):
        build_tables_of_card(tmp_path, tmp_path / "none.json")
    card = write_card(tmp_path / "card.json")
    with pytest.raises(EesdError, match="second card"):
        build_tables_of_card(tmp_path, card, card)


def build_tables_of_card(tmp_path: Path, *cards: Path) -> dict[str, pd.DataFrame]:
    """Tables of one unit and these cards."""
    return write_tables([write_rows(tmp_path / "rows.jsonl", unit())], cards, tmp_path / "tables")
