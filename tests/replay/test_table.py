"""The oracle against all choices, time by hand, the table, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from eesd.control import CONTROLLERS, make_controller, read_costs
from eesd.control.grid import expand
from eesd.errors import EesdError
from eesd.replay.loop import replay
from eesd.replay.oracle import Clock, oracle
from eesd.replay.table import write_replay_table
from eesd.replay.trace import Trace, TracedItem, read_trace, write_trace
from tests.analysis.factory import write_costs
from tests.replay.factory import make_item, make_trace

K = 5


@pytest.fixture(scope="module")
def costs_file(tmp_path_factory) -> Path:
    return write_costs(tmp_path_factory.mktemp("costs") / "toy.json")


def test_rounds_and_time_by_hand(costs_file: Path):
    trace = make_trace(make_item([2, 0, 0, 1, 0], room=0), make_item([]))
    rounds = replay(make_controller({"name": "static", "k": 2}), trace)
    # From token 0 both match; from token 3 one of the one that the budget leaves does.
    assert rounds == [[(2, 2, "k_max"), (1, 1, "length")], []]
    clock = Clock(trace, read_costs(costs_file), K)
    # Rounds of two and of one token: draft steps, first layers, verification of three and of two.
    assert sum(clock.items(rounds)) == pytest.approx((2 * 0.002 + 0.001 + 0.011) + (0.002 + 0.001 + 0.010))
    assert sum(clock.vanilla_items()) == pytest.approx(5 * 0.009)


def test_the_cost_of_a_round_grows_with_the_context(tmp_path: Path):
    pieces = json.loads(write_costs(tmp_path / "toy.json").read_text())["costs"]
    for piece in pieces:
        piece["seconds"] *= piece["context_tokens"]
    table = read_costs(write_costs(tmp_path / "toy.json", costs=pieces))
    trace = make_trace(make_item([0] * 3, prompt_tokens=200))
    assert sum(Clock(trace, table, K).vanilla_items()) == pytest.approx(0.009 * (200 + 201 + 202))


def test_vanilla_decoding_has_a_price_of_its_own(tmp_path: Path):
    path = write_costs(tmp_path / "toy.json")
    pieces = json.loads(path.read_text())["costs"]
    pieces += [{**pieces[0], "path": "vanilla_round", "context_tokens": at, "seconds": 0.008} for at in (128, 1024)]
    trace = make_trace(make_item([2, 0, 0], room=0))
    clock = Clock(trace, read_costs(write_costs(path, costs=pieces)), K)
    assert sum(clock.vanilla_items()) == pytest.approx(3 * 0.008)
    assert sum(clock.items([[(0, 0, "controller")] * 3])) == pytest.approx(3 * 0.009)


def best_time(clock: Clock, one: TracedItem, t: int) -> float:
    """Least time from t on, by trying everything."""
    last = len(one.output) - 1
    if t >= last:
        return 0.0
    room = min(K, one.max_new_tokens - t - 2)
    return min(
        clock.seconds[one.prompt_tokens + t, k] + best_time(clock, one, t + min(k, int(one.chains.match[t])) + 1)
        for k in range(room + 1)
    )


@given(match=st.lists(st.integers(0, K), min_size=1, max_size=7), room=st.integers(0, 3))
def test_nothing_beats_the_oracle(costs_file: Path, match: list[int], room: int):
    one = make_item(match, room=room)
    trace = make_trace(one)
    clock = Clock(trace, read_costs(costs_file), K)
    least = sum(clock.items(oracle(clock, K)))
    assert least == pytest.approx(best_time(clock, one, 0))
    for k in range(1, K + 1):
        assert sum(clock.items(replay(make_controller({"name": "static", "k": k}), trace))) >= least - 1e-12


def test_the_table_has_every_setting_and_regrets_nothing_of_the_oracle(tmp_path: Path, costs_file: Path):
    rng = np.random.default_rng(0)
    paths = []
    for task in ("asdiv", "xsum"):
        items = [make_item(rng.integers(0, 4, 40).tolist(), seed=seed) for seed in range(3)]
        paths.append(tmp_path / f"{task}.safetensors")
        write_trace(make_trace(*items, task=task), paths[-1])
    controllers = [{"name": name, **({} if name == "static" else {"k_max": K})} for name in CONTROLLERS.names()]
    controllers.append({"name": "beta_ts", "k_max": K, "grid": {"prior": [[1, 1], [4, 1]], "forget": [1.0, 0.9]}})
    settings = {"controllers": controllers, "seeds": 2}
    table = write_replay_table(paths, [costs_file], settings, tmp_path / "replay.csv", workers=1)
    assert len(table) == 2 * (1 + len(CONTROLLERS.names()) + 4)
    assert (table["regret"] >= -1e-12).all()
    assert (table.loc[table["controller"] == "oracle", "regret"] == 0).all()
    assert set(table.loc[table["controller"] == "beta_ts", "seeds"]) == {2}
    assert json.loads(table.loc[table["controller"] == "beta_ts", "settings"].iloc[-1])["forget"] == 0.9
    again = write_replay_table(paths, [costs_file], settings, tmp_path / "again.csv", workers=2)
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "replay.csv").read_bytes()
    assert again.equals(table)


def test_bad_input_is_one_message(tmp_path: Path, costs_file: Path):
    def table(*traces: Trace, costs: Path = costs_file, **entry) -> None:
        paths = []
        for number, trace in enumerate(traces):
            paths.append(tmp_path / f"{number}.safetensors")
            write_trace(trace, paths[-1])
        settings = {"controllers": [{"name": "static", "k": 1, **entry}], "seeds": 1}
        write_replay_table(paths, [costs], settings, tmp_path / "replay.csv", workers=1)

    one = make_item([1, 0, 2])
    with pytest.raises(EesdError, match=r"may draft 6 tokens, but the trace of asdiv holds 5"):
        table(make_trace(one), k=6)
    with pytest.raises(EesdError, match=r"xsum was recorded with another head than asdiv"):
        table(make_trace(one), make_trace(one, task="xsum", head_sha256="other"))
    with pytest.raises(EesdError, match=r"xsum was recorded with other weights than asdiv"):
        table(make_trace(one), make_trace(one, task="xsum", fingerprint="other"))
    with pytest.raises(EesdError, match="give each once"):
        table(make_trace(one), make_trace(one))
    with pytest.raises(EesdError, match="exit after layer 4, but the head exits after layer 9"):
        table(make_trace(one, exit_layer=9))
    rows = write_costs(tmp_path / "rows.json", draft_rows=500)
    with pytest.raises(EesdError, match="a head that drafts 500 different tokens, but this one drafts 40"):
        table(make_trace(one, vocab_rows=40), costs=rows)
    table(make_trace(one, vocab_rows=500), costs=rows)
    write_trace(make_trace(one, calibration=None), tmp_path / "bare.safetensors")
    settings = {"controllers": [{"name": "cali_ts", "k_max": 4}], "seeds": 1}
    with pytest.raises(EesdError, match=r"Trace of toy, asdiv, exit4: no calibration"):
        write_replay_table([tmp_path / "bare.safetensors"], [costs_file], settings, tmp_path / "x.csv", workers=1)
    few = [p for p in json.loads(costs_file.read_text())["costs"] if p["query_tokens"] < 4]
    with pytest.raises(EesdError, match="no cost of verifying 6 tokens, which drafts of k = 5 need"):
        table(make_trace(one), costs=write_costs(tmp_path / "few.json", costs=few))
    with pytest.raises(EesdError, match=r"grid\.k of a replayed controller must be a list"):
        expand([{"name": "static", "grid": {"k": 3}}])
    with pytest.raises(EesdError, match=r"\{'name': 'static'\} twice"):
        expand([{"name": "static", "grid": {"k": [1, 4]}}, {"name": "static"}])
    save_file({"match": np.zeros(1)}, tmp_path / "part.safetensors")
    with pytest.raises(EesdError, match=r"not a trace \(no beyond, confidence"):
        read_trace(tmp_path / "part.safetensors")
    (tmp_path / "no.safetensors").write_text("nothing")
    with pytest.raises(EesdError, match="not a readable trace"):
        read_trace(tmp_path / "no.safetensors")


def test_a_table_of_the_same_model_and_machine_counts_once(tmp_path: Path, costs_file: Path):
    """One measured here beside a published one, of which the first is taken."""
    write_trace(make_trace(make_item([1, 0, 2])), tmp_path / "asdiv.safetensors")
    again, other = write_costs(tmp_path / "again.json"), write_costs(tmp_path / "other.json", device="GPU")
    settings = {"controllers": [{"name": "static", "k": 1}], "seeds": 1}
    tables = [costs_file, again, other]
    found = write_replay_table([tmp_path / "asdiv.safetensors"], tables, settings, tmp_path / "replay.csv", workers=1)
    assert list(dict.fromkeys(found["hardware"])) == ["toy, float32, Toy CPU", "toy, float32, GPU"]


def test_replay_needs_no_torch():
    code = "import sys, eesd.replay.table; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
