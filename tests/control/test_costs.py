"""Cost tables: seconds by hand, interpolation, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from eesd.control import read_costs, read_verification
from eesd.errors import EesdError
from tests.analysis.factory import write_costs


def piece(path: str, query: int, context: int, seconds: float) -> dict:
    return {"path": path, "query_tokens": query, "context_tokens": context, "seconds": seconds, "bytes": 1}


def pieces(context: int, factor: float = 1.0) -> list[dict]:
    singles = {"draft": 2.0, "vanilla": 10.0, "first_layers": 1.0}
    found = [piece(name, 1, context, factor * seconds) for name, seconds in singles.items()]
    return found + [piece("verify_from_exit", n, context, factor * (8.0 + n)) for n in range(1, 6)]


def test_seconds_of_a_round_by_hand(tmp_path: Path):
    table = read_costs(write_costs(tmp_path / "toy.json", costs=pieces(100)))
    costs = table.at(5000)
    # Three draft steps, the first layers of the third token, the rest of the layers for four.
    assert costs.round_s(3) == 3 * 2.0 + 1.0 + 12.0
    assert costs.round_s(0) == costs.vanilla_s == 10.0
    assert costs.k_max == 4
    assert table.hardware == "toy, float32, Toy CPU"


def whole(context: int, factor: float = 1.0) -> list[dict]:
    """Rounds as a whole, the exit layer on more rows, and signals."""
    found = [piece("round", k, context, factor * (10.0 + 3.0 * k)) for k in range(6)]
    found += [piece("exit_layer", rows, context, factor * (1.0 + 0.25 * rows)) for rows in (1, 2, 3)]
    return [*found, piece("signal", 1, context, factor * 0.5)]


def test_whole_rounds_signals_and_accepted_rows_have_prices(tmp_path: Path):
    path = write_costs(tmp_path / "toy.json", costs=pieces(100) + whole(100), decisions_s={"cost_ts": 0.1})
    table = read_costs(path, 4, "verified")
    costs = table.at(100)
    assert costs.k_max == 5
    assert costs.round_s(0) == costs.vanilla_s == 10.0
    assert costs.round_s(4, accepted=2, signals=3) == 22.0 + 2 * 0.25 + 3 * 0.5
    assert costs.accepted_s(5) == costs.accepted_s(2)  # constant beyond what was measured
    assert (table.decision_s("cost_ts"), table.decision_s("added_since")) == (0.1, 0.1), "nothing decides for free"
    plain = read_costs(path, 4, "none").at(100)  # a head that reads the exit alone processes nothing again
    assert plain.round_s(4, accepted=2) == 22.0
    plainly = [*whole(100), piece("vanilla_round", 1, 100, 9.0)]  # a round without a draft costs its drafter's upkeep
    costs = read_costs(write_costs(tmp_path / "vanilla.json", costs=plainly)).at(100)
    assert (costs.vanilla_s, costs.round_s(0)) == (9.0, 10.0)
    both = read_costs(write_costs(tmp_path / "two.json", costs=whole(100) + whole(300, 3.0))).at(200)
    assert both.round_s(4, accepted=2, signals=3) == pytest.approx(2 * costs.round_s(4, accepted=2, signals=3))


def test_linear_in_the_context_and_constant_beyond(tmp_path: Path):
    table = read_costs(write_costs(tmp_path / "toy.json", costs=pieces(200, 3.0) + pieces(100)))
    found = [table.at(context).round_s(2) for context in (1, 100, 150, 175, 200, 999)]
    one = 2 * 2.0 + 1.0 + 11.0
    assert found == pytest.approx([one, one, 2 * one, 2.5 * one, 3 * one, 3 * one])


def test_verification_through_all_layers_at_the_nearest_context(tmp_path: Path):
    whole = [piece("verify", n, 200, 20.0 + n) for n in range(1, 4)] + [piece("draft_head", 1, 200, 0.5)]
    path = write_costs(tmp_path / "toy.json", costs=pieces(100) + whole, draft_rows=2000)
    assert read_verification(path, 900, 2000) == (0.5, (21.0, 22.0, 23.0))
    with pytest.raises(EesdError, match="no cost of full_head for 1 tokens at context 200"):
        read_verification(path, 900, 500)
    with pytest.raises(EesdError, match="no cost of verify for 1 tokens at context 100"):
        read_verification(path, 90, 2000)


@pytest.mark.parametrize(
    ("measured", "rows", "seconds"),
    [
        (2000, 10000, 2.1),  # the whole head
        (2000, 6000, 1.3),  # halfway to it
        (2000, 1000, 0.3),
        (10000, 500, 0.025),  # measured with the whole head, of which it has a twentieth
    ],
)
def test_draft_heads_of_other_sizes_lie_on_a_line(tmp_path: Path, measured: int, rows: int, seconds: float):
    heads = (
        {"draft_head": (0.5, 1), "full_head": (2.1, 5)}
        if measured < 10000
        else dict.fromkeys(("draft_head", "full_head"), (0.5, 5))
    )
    costs = [{**piece(name, 1, 100, cost), "bytes": size} for name, (cost, size) in heads.items()]
    path = write_costs(tmp_path / "toy.json", costs=[*costs, piece("verify", 1, 100, 9.0)], draft_rows=measured)
    assert read_verification(path, 100, rows) == (pytest.approx(seconds), (9.0,))


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        ([], "an empty cost table"),
        ([p for p in pieces(100) if p["path"] != "draft"], "no cost of draft for 1 tokens at context 100"),
        ([p for p in pieces(100) if p["query_tokens"] != 3], "no cost of verify_from_exit for 3 tokens"),
        ([p for p in whole(100) if (p["path"], p["query_tokens"]) != ("round", 2)], "no cost of round for 2 tokens"),
        ([piece("draft", 1, 100, -1.0)], "draft of 1 tokens at context 100 has no time above zero"),
    ],
)
def test_incomplete_tables_are_refused(tmp_path: Path, costs, message):
    with pytest.raises(EesdError, match=message):
        read_costs(write_costs(tmp_path / "toy.json", costs=costs))


def test_other_files_and_heads_are_refused(tmp_path: Path):
    with pytest.raises(EesdError, match="not a cost table"):
        read_costs(tmp_path / "none.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(EesdError, match="not a cost table"):
        read_costs(tmp_path / "list.json")
    path = write_costs(tmp_path / "toy.json")
    with pytest.raises(EesdError, match="measured with an exit after layer 4, but the head exits after layer 8"):
        read_costs(path, exit_layer=8)
    with pytest.raises(EesdError, match="exit after layer 4"):
        read_costs(path, exit_layer=8, model="toy")
    assert read_costs(path, exit_layer=8, model="another").costs == read_costs(path).costs
    path = write_costs(tmp_path / "rows.json", draft_rows=2000)
    with pytest.raises(EesdError, match="a head that drafts 2000 different tokens, but this one drafts 500"):
        read_costs(path, rows=500)
    assert read_costs(path, rows=2000).costs == read_costs(path, model="another", rows=500).costs
    with pytest.raises(
        EesdError, match=r"no cost of verifying 17 tokens, which drafts of k = 16 need.*largest k is 15"
    ):
        read_costs(path, 4).at(100).check_k(16)
