"""The search of sublayers: a replayed trial is what live decoding does, and an interrupted search goes on."""

from __future__ import annotations

import json

import pytest
import torch

from eesd.bench.skip_search import Answer, Prices, Search, read_prices, replay, search_skips
from eesd.control import make_controller
from eesd.decoding.generate import generate
from eesd.drafting.self_sd import SelfSDDrafter, Skips
from eesd.errors import EesdError
from tests.analysis.factory import write_costs
from tests.toys import tiny_target, write_tiny_data, write_tiny_model

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
PRICES = Prices(0.009, 0.002, tuple(0.008 + 0.001 * n for n in range(1, 9)))
SETS = [Skips(), Skips({1}, ()), Skips((), {2}), Skips({0, 3}, {1}), Skips({0, 1, 2, 3}, {0, 1, 2, 3})]


@pytest.fixture(scope="module")
def target():
    # Later layers that change little, so that leaving them out is right now and then.
    target = tiny_target(dtype=torch.float64)
    for layer in target.layers[1:]:
        layer.o.weight.data.mul_(0.3)
        layer.down.weight.data.mul_(0.3)
    return target


@pytest.mark.parametrize("skips", SETS, ids=str)
def test_replayed_rounds_are_those_of_live_decoding(skips, target, monkeypatch):
    monkeypatch.setattr("eesd.bench.skip_search.BLOCK_ROWS", 16)  # 39 drafts, in blocks of which the last is shorter
    new, k_max = 40, 5
    answer = generate(target, PROMPT, max_new_tokens=new).tokens
    with torch.inference_mode():
        lengths = Answer(target, PROMPT, answer, k_max).matches(skips.layers(target))
    assert len(lengths) == new - 1
    for k in (1, 3, k_max):
        drafter = SelfSDDrafter(target, skips)
        controller = make_controller({"name": "static", "k": k})
        live = generate(target, PROMPT, drafter=drafter, controller=controller, max_new_tokens=new)
        assert live.tokens == answer
        kept = 0.5
        found = replay([lengths], k, kept, PRICES)
        drafted, accepted = sum(r.drafted for r in live.rounds), sum(r.accepted for r in live.rounds)
        assert found.acceptance_rate == pytest.approx(accepted / drafted)
        assert found.tokens_per_round == pytest.approx((new - 1) / len(live.rounds))
        seconds = drafted * (0.002 + kept * 0.007) + sum(PRICES.verify[r.drafted] for r in live.rounds)
        assert found.speedup == pytest.approx((new - 1) * 0.009 / seconds)


def test_the_sets_tried_here_are_neither_all_right_nor_all_wrong(target):
    answer = generate(target, PROMPT, max_new_tokens=40).tokens
    with torch.inference_mode():
        search = Search(target, [Answer(target, PROMPT, answer, 5)], PRICES, 5)
    rates = [search.score(skips, 3).acceptance_rate for skips in SETS]
    assert rates[0] == 1
    assert any(0.05 < rate < 0.95 for rate in rates)


def test_shares_of_bytes(target):
    search = Search(target, [], PRICES, 5)
    assert search.kept(Skips()) == 1
    assert search.kept(Skips(range(4), range(4))) == pytest.approx(0)
    # Attention: 32 x 64 in and 32 x 32 out; MLP: 3 x 32 x 48.
    assert search.kept(Skips({1}, ())) == pytest.approx(1 - 3072 / (3072 + 4608) / 4)


def settings(folder, **changes):
    return {
        "tasks": ["asdiv"],
        "prompts_per_task": 1,
        "max_new_tokens": 12,
        "max_prompt_tokens": 400,
        "max_kept": 0.9,
        "trials": 6,
        "k_max": 4,
        "dtype": "float32",
        "seed": 0,
        "data_dir": str(write_tiny_data(folder / "data")),
        "resources": None,
        **changes,
    }


def costs(folder):
    path = write_costs(folder / "costs.json")
    table = json.loads(path.read_text())
    table["costs"] += [{**table["costs"][0], "path": "full_head", "seconds": 0.002}]
    path.write_text(json.dumps(table))
    return path


def test_an_interrupted_search_goes_on_and_reports_held_out_answers(tmp_path, monkeypatch):
    model, out = write_tiny_model(tmp_path / "model"), tmp_path / "skips" / "default.json"
    tried, score = [], Search.score

    def counted(self, skips, k=None):
        if k is None:  # a trial, or the best set at the end
            tried.append(skips)
            if len(tried) == 5:
                raise KeyboardInterrupt
        return score(self, skips, k)

    table = costs(tmp_path)
    monkeypatch.setattr(Search, "score", counted)
    with pytest.raises(KeyboardInterrupt):
        search_skips(model, table, settings(tmp_path, trials=12), out)
    assert len(list(out.parent.glob("*.journal"))) == 1
    search_skips(model, table, settings(tmp_path, trials=12), out)
    resumed = len(tried) - 5
    search_skips(model, table, settings(tmp_path, trials=12), tmp_path / "fresh" / "default.json")
    assert 0 < resumed < len(tried) - 5 - resumed
    found = json.loads(out.read_text())
    assert set(found) == {"fingerprint", "attention", "mlp", "kept_share", "outcome", "held_out", "settings"}
    assert found["kept_share"] <= 0.9
    assert found["outcome"]["k"] == found["held_out"]["k"]
    assert list(out.parent.iterdir()) == [out]


def test_bad_inputs_say_what_to_do(tmp_path):
    with pytest.raises(EesdError, match="no cost of"):
        read_prices(write_costs(tmp_path / "costs.json"), 4)
    model = write_tiny_model(tmp_path / "model")
    with pytest.raises(EesdError, match="Raise max_prompt_tokens"):
        search_skips(model, costs(tmp_path), settings(tmp_path, max_prompt_tokens=3), tmp_path / "x.json")
    with pytest.raises(EesdError, match=r"No set of 3 keeps at most 0\.01"):
        search_skips(model, costs(tmp_path), settings(tmp_path, trials=3, max_kept=0.01), tmp_path / "x.json")


def test_the_first_sets_leave_out_what_is_missed_least(target):
    answer = generate(target, PROMPT, max_new_tokens=40).tokens
    with torch.inference_mode():
        search = Search(target, [Answer(target, PROMPT, answer, 5)], PRICES, 5)
    order = search.least_missed()
    assert sorted(order) == sorted(f"{part}.{i}" for part in ("attention", "mlp") for i in range(4))
    # The first layer alone changes the states much.
    assert set(order[-2:]) == {"attention.0", "mlp.0"}
