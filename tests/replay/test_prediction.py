"""Predictions against rows: seconds by hand, equal rounds, and what is refused."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pandas as pd
import pytest

from eesd.control import make_controller, read_costs
from eesd.errors import EesdError
from eesd.files import sha256_file
from eesd.replay.loop import equip_for, replay
from eesd.replay.oracle import Clock
from eesd.replay.prediction import describe, paired_errors, write_prediction_table
from eesd.replay.strips import median_item, write_strips_table
from eesd.replay.trace import Trace, write_trace
from tests.analysis.factory import write_costs, write_rows
from tests.replay.factory import live_rows, make_item, make_trace, random_trace

SIGNAL, ROW, DECISION = 0.0002, 0.00005, 0.00001


def priced(folder: Path) -> Path:
    """A cost table with rounds of 9 + 3 k ms, signals, decisions and rows of the exit layer."""
    pieces = []
    for context in (128, 1024):
        found = [("round", k, 0.009 + 0.003 * k) for k in range(16)]
        found += [("exit_layer", rows, 0.0005 + ROW * rows) for rows in range(1, 17)]
        found += [("signal", 1, SIGNAL)]
        keys = ("path", "query_tokens", "seconds")
        pieces += [{**dict(zip(keys, one, strict=True)), "context_tokens": context, "bytes": 1} for one in found]
    return write_costs(folder / "costs.json", costs=pieces, decisions_s={"confidence": DECISION, "static": 0.0})


def predict(folder: Path, trace: Trace, rows: list[dict], costs: Path | None = None):
    write_trace(trace, folder / "trace.safetensors")
    files = [write_rows(folder / "rows.jsonl", rows)]
    return write_prediction_table(
        [folder / "trace.safetensors"], files, costs or priced(folder), folder / "prediction.csv"
    )


def test_a_round_pays_for_signals_decisions_and_accepted_rows(tmp_path: Path):
    trace = make_trace(make_item([2, 0, 0, 1, 0], room=0), context="verified")
    clock = Clock(trace, read_costs(priced(tmp_path), 4, trace.facts.context), 5)
    static, confidence = (
        make_controller({"name": "static", "k": 2}),
        make_controller({"name": "confidence", "k_max": 3}),
    )
    rounds = [[(2, 2, "k_max"), (1, 1, "length")]]
    plain = (0.009 + 0.006) + (0.009 + 0.003)
    assert sum(clock.items(rounds, static)) == pytest.approx(plain + 3 * ROW)
    # The controller is asked after every token but one at the limit of the draft.
    assert sum(clock.items(rounds, confidence)) == pytest.approx(plain + 3 * ROW + SIGNAL + DECISION)
    stopped = [[(2, 2, "controller"), (1, 1, "length")]]
    assert sum(clock.items(stopped, confidence)) == pytest.approx(plain + 3 * ROW + 2 * (SIGNAL + DECISION))
    # What a round without a draft leaves is processed with the next draft, whose step is paid anyway.
    assert (
        sum(clock.items([[(0, 0, "controller")] * 5], static))
        == pytest.approx(sum(clock.vanilla_items()))
        == pytest.approx(5 * 0.009)
    )
    unread = make_trace(*trace.items, context="none")
    clock = Clock(unread, read_costs(priced(tmp_path), 4, unread.facts.context), 5)
    assert sum(clock.items(rounds, static)) == pytest.approx(plain)


def test_errors_by_hand(tmp_path: Path):
    trace = make_trace(make_item([2, 0, 0, 1, 0], room=0))
    table = predict(tmp_path, trace, live_rows(trace)).set_index("method")
    measured = 0.875 * 2 * 0.01  # an eighth is prefill
    found = table.loc["static_k2"]
    assert found["predicted_s"] == pytest.approx(0.015 + 0.012)
    assert found["measured_s"] == pytest.approx(measured)
    assert found["error"] == pytest.approx(0.027 / measured - 1)
    assert found["predicted_speedup"] == pytest.approx(5 * 0.009 / 0.027)
    assert found["measured_speedup"] == pytest.approx(5 / 2)
    # With one other row in the unit, the scale is vanilla's: what is left is the error of the speedup over it.
    assert found["paired_error"] == pytest.approx(2.5 / (0.045 / 0.027) - 1)
    assert (found["rounds"], found["tokens"], found["drafter"]) == (2, 5, "exit4")
    assert table.loc["vanilla", "paired_error"] == pytest.approx((0.045 / 0.027) / 2.5 - 1)
    assert "the same live and in replay" in describe(table.reset_index())


def test_a_drift_of_the_machine_leaves_the_paired_error_alone(tmp_path: Path):
    trace = random_trace()
    one, two = (predict(tmp_path, trace, live_rows(trace, seconds)) for seconds in (0.01, 0.02))
    assert (one["error"] > two["error"]).all()
    assert one["paired_error"].tolist() == pytest.approx(two["paired_error"].tolist())


def test_trees_are_not_predicted(tmp_path: Path):
    trace = random_trace()
    rows = live_rows(trace)
    settings = {**rows[1]["settings"], "tree": {"nodes": 9}}
    made = {"method": "tree", "rounds": [[9, 0, "controller"]] * 40, "settings": settings}
    trees = [{**row, **made} for row in rows if row["method"] == "static_k2"]
    assert set(predict(tmp_path, trace, [*rows, *trees])["method"]) == {"vanilla", "static_k2"}


def test_no_row_explains_itself():
    unit = {"model": "m", "task": "t", "group": "g", "item": "i", "repeat": 0}
    rows = [{**unit, "predicted_s": 1.0, "measured_s": seconds} for seconds in (2.0, 2.0, 2.5)]
    alone = {**unit, "item": "j", "predicted_s": 1.0, "measured_s": 2.0}
    errors = paired_errors(pd.DataFrame([*rows, alone])).tolist()
    assert errors[:3] == pytest.approx([2.25 / 2 - 1, 2.25 / 2 - 1, 2 / 2.5 - 1])
    assert math.isnan(errors[3])


def test_cost_ts_is_replayed_with_the_table_that_it_decided_by(tmp_path: Path, capsys):
    trace = random_trace()
    costs = priced(tmp_path)
    settings = {"name": "cost_ts", "k_max": 6}
    controller = make_controller(settings)
    equip_for(controller, trace, read_costs(costs, 4, trace.facts.context))
    rows = live_rows(trace)
    for row, made in zip(rows[1::2], replay(controller, trace), strict=True):
        row["rounds"] = [list(one) for one in made]
        row["settings"] = {**row["settings"], "controller": settings, "costs_sha256": sha256_file(costs)}
    assert len(predict(tmp_path, trace, rows, costs)) == len(rows)
    rows[1]["settings"]["costs_sha256"] = "other"
    capsys.readouterr()
    assert len(predict(tmp_path, trace, rows, costs)) == len(rows) - 1
    assert "left out: 1 rows, decided by another cost table" in capsys.readouterr().out


def test_other_rounds_heads_and_outputs(tmp_path: Path, capsys):
    trace = random_trace()
    rows = live_rows(trace)

    def changed(**changes) -> list[dict]:
        spoiled = copy.deepcopy(rows)
        spoiled[1].update(changes)
        return spoiled

    other = [*rows[1]["rounds"]]
    other[3] = [3, other[3][1], "k_max"]
    exact = [{**row, "engine": "cpp-avx2"} for row in changed(rounds=other)]
    with pytest.raises(EesdError, match=r"static_k2 on i0: round 3 \(drafted, accepted\) is .* live and .* in replay"):
        predict(tmp_path, trace, exact)
    # Only that engine computes the same whatever lies beside a position.
    assert len(predict(tmp_path, trace, changed(rounds=other))) == len(rows) - 1
    assert "left out: 1 rows, drafted otherwise than the trace" in capsys.readouterr().out
    settings = rows[1]["settings"]
    with pytest.raises(EesdError, match="another head or dtype than static_k2"):
        predict(tmp_path, trace, changed(settings={**settings, "head_sha256": "x"}))
    with pytest.raises(EesdError, match="i1 is not in the trace of asdiv"):
        predict(tmp_path, make_trace(trace.items[0], k_max=12), rows)
    with pytest.raises(EesdError, match=r"No row can be replayed \(all are vanilla\)"):
        predict(tmp_path, trace, [row for row in rows if row["method"] == "vanilla"])
    # Rounds that rest on earlier prompts cannot be told from this one.
    carried = {**settings, "controller": {"name": "hf_heuristic", "reset_on": "never"}}
    assert len(predict(tmp_path, trace, changed(settings=carried))) == len(rows) - 1


def test_costs_of_another_model_predict_nothing(tmp_path: Path):
    trace = make_trace(make_item([2, 0, 0, 1, 0], room=0))
    other = write_costs(tmp_path / "other.json", model="other")
    with pytest.raises(EesdError, match="costs of other, but toy decoded"):
        predict(tmp_path, trace, live_rows(trace), other)


def test_strips_show_the_median_answer(tmp_path: Path):
    items = [make_item(match, seed=seed) for seed, match in enumerate(([0, 0, 1, 0], [3, 2, 1, 0], [1, 1, 1, 0]))]
    trace = make_trace(*items)
    assert median_item(trace).id == "i2"
    write_trace(trace, tmp_path / "trace.safetensors")
    settings = {"controllers": [{"name": "static", "grid": {"k": [1, 3]}}], "seeds": 1}
    table = write_strips_table([tmp_path / "trace.safetensors"], priced(tmp_path), settings, tmp_path / "strips.csv")
    assert list(table["label"].unique()) == ["match", "oracle", "static, k = 1", "static, k = 3"]
    assert table.loc[table["label"] == "match", "accepted"].tolist() == [1, 1, 1, 0]
    static = table[table["label"] == "static, k = 1"]
    assert static[["position", "drafted", "accepted"]].to_numpy().tolist() == [[0, 1, 1], [2, 1, 1]]
    first = {"min_ngram": 2, "max_ngram": 4, "controller": {"name": "static", "k": 3}}
    whole = write_costs(tmp_path / "whole.json")  # with what copies need
    after = write_strips_table(
        [tmp_path / "trace.safetensors"], whole, {**settings, "lookup": first}, tmp_path / "after.csv"
    )
    assert set(table["drafter"]) == {"exit4"}
    assert set(after["drafter"]) == {"exit4 + lookup"}
    settings["controllers"][0]["grid"]["k"] = [6]
    with pytest.raises(EesdError, match="static may draft 6 tokens"):
        write_strips_table([tmp_path / "trace.safetensors"], priced(tmp_path), settings, tmp_path / "strips.csv")
