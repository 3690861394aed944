"""Prompt lookup before a traced drafter: rounds of live decoding, prices by hand, and an oracle that nothing beats."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from eesd.control import make_controller, read_costs
from eesd.decoding.generate import Source, generate
from eesd.drafting.lookup import LookupDrafter
from eesd.errors import EesdError
from eesd.replay.lookup import Lookup
from eesd.replay.loop import equip_for, replay
from eesd.replay.oracle import Clock, oracle
from eesd.replay.prediction import write_prediction_table
from eesd.replay.strips import write_strips_table
from eesd.replay.table import write_replay_table
from eesd.replay.trace import Trace, TracedItem, write_trace
from eesd.settings import load_config, resolve_method, resolve_replay
from tests.analysis.factory import write_costs, write_rows
from tests.control.test_rules import COSTS
from tests.replay.factory import FACTS, live_rows, make_item, make_trace
from tests.replay.test_live import LIMIT, K, recorded_items
from tests.toys import exit_drafter, tiny_target

LOOKUP = {"min_ngram": 1, "max_ngram": 3, "controller": {"name": "hf_heuristic", "k": 3, "k_max": K}}
# Of few tokens, so that the text repeats itself.
PROMPTS = [[3, 1, 4, 1, 5, 3, 1], [2, 7, 1, 2], [6, 6, 5, 7]]
VERIFY, ROW = 0.001, 0.0001


@pytest.fixture(scope="module", params=["plain", "deep"])
def live(request):
    """A target of eight tokens, one of which ends a text, a head, and the head's trace."""
    target = tiny_target(seed=3, vocab_size=8)
    deep = request.param == "deep"
    drafter = exit_drafter(target, exit_layer=2, lens=deep, deep=deep)
    eos = {generate(target, PROMPTS[1], max_new_tokens=LIMIT).tokens[17]}
    items = recorded_items(target, [drafter] * len(PROMPTS), eos, PROMPTS)
    return target, drafter, eos, Trace(replace(FACTS, k_max=K), tuple(items))


@pytest.mark.parametrize("rule", ["hf_heuristic", "static", "beta_ts", "confidence"])
@pytest.mark.parametrize("name", ["draft_verify", "cost_ts", "cali_ts", "static"])
def test_rounds_are_those_of_live_decoding(live, name, rule):
    target, drafter, eos, trace = live
    longest = {"k": 4} if name == "static" else {"k_max": K}
    settings = {**LOOKUP, "controller": {"name": rule, **({"k": 3} if rule == "static" else {"k_max": K})}}
    controllers = [make_controller({"name": name, **longest}) for _ in range(2)]
    for controller in controllers:
        equip_for(controller, trace, COSTS)
    found = replay(controllers[0], trace, 0, Lookup.of(settings))
    first = Source(LookupDrafter(3, 1), make_controller(settings["controller"]))
    shared = {"drafter": drafter, "controller": controllers[1], "lookup": first, "max_new_tokens": LIMIT, "eos": eos}
    for item, rounds in zip(trace.items, found, strict=True):
        made = generate(target, item.prompt, seed=item.seed, **shared)
        assert tuple(made.tokens) == item.output
        assert [(r.drafted, r.accepted, r.stop, *["lookup"] * r.looked_up) for r in made.rounds] == rounds
    assert {len(one) for rounds in found for one in rounds} == {3, 4}


def text_item(prompt: list[int], output: list[int], match: list[int], beyond: tuple[int, ...] = ()) -> TracedItem:
    made = make_item(match, room=9)
    return replace(made, prompt=tuple(prompt), output=tuple(output), beyond=beyond)


def test_copies_by_hand():
    item = text_item([1, 2, 3, 4], [1, 2, 3, 9, 2, 3], [0] * 5, (4, 7))
    copies = Lookup.of({**LOOKUP, "min_ngram": 2}).copies(item)
    # "1 2" was followed by 3, 4, 1, 2; "2 3" by 4; 9 is new; at the end of text nothing is looked up.
    assert copies.lengths == [0, 4, 4, 0, 0]
    assert copies.matches == [0, 1, 0, 0, 0]
    # Behind the end of text it is matched with what the target goes on with.
    assert Lookup.of(LOOKUP).copies(text_item([4, 5, 6, 7], [5, 6], [0], (7, 5))).matches == [3]


def priced(folder: Path, longest: int = 7) -> Path:
    pieces = []
    for context in (8, 1024):
        found = [("round", k, 0.009 + 0.003 * k) for k in range(K + 1)]
        found += [("verify", n, 0.008 + VERIFY * n) for n in range(1, longest + 1)]
        found += [("exit_layer", rows, ROW * rows) for rows in range(1, 17)]
        keys = ("path", "query_tokens", "seconds")
        pieces += [{**dict(zip(keys, one, strict=True)), "context_tokens": context, "bytes": 1} for one in found]
    return write_costs(folder / "costs.json", costs=pieces)


def trace_of(*items: TracedItem, **facts) -> Trace:
    return make_trace(*items, k_max=K, **facts)


def test_a_copied_round_costs_its_verification_and_the_rows_that_the_exit_layer_missed(tmp_path: Path):
    trace = trace_of(make_item([0] * 6, k_max=K))
    rounds = [[(3, 2, "k_max", "lookup"), (0, 0, "controller", "lookup"), (1, 0, "k_max"), (0, 0, "none")]]
    price = 0.009 + 3 * VERIFY + 3 * ROW + 0.009 + 0.012 + 0.009
    for context in ("verified", "none"):  # a head that processes nothing again has missed them too
        clock = Clock(trace, read_costs(priced(tmp_path), 4, context), K)
        assert sum(clock.items(rounds)) == pytest.approx(price)
    short = Clock(trace, read_costs(priced(tmp_path, longest=3), 4), K)
    with pytest.raises(EesdError, match="no verification of so many tokens"):
        sum(short.items(rounds))


def test_nothing_beats_an_oracle_that_may_copy(live, tmp_path: Path):
    trace = live[-1]
    clock = Clock(trace, read_costs(priced(tmp_path)), K)
    least = sum(clock.items(oracle(clock, K, Lookup.of(LOOKUP))))
    assert least < sum(clock.items(oracle(clock, K))) - 1e-9
    for k in range(1, K + 1):
        for rule in ({"name": "static", "k": 2}, {"name": "hf_heuristic", "k_max": K}):
            lookup = Lookup.of({**LOOKUP, "controller": rule})
            assert (
                sum(clock.items(replay(make_controller({"name": "static", "k": k}), trace, 0, lookup))) >= least - 1e-12
            )


def test_rows_with_lookup_are_predicted(tmp_path: Path):
    item = text_item([7, 8, 9, 4], [7, 8, 9, 5, 7, 8, 9], [0, 1, 0, 0, 2, 0])
    trace = trace_of(replace(item, max_new_tokens=12))
    rows = live_rows(trace)
    lookup = {**LOOKUP, "min_ngram": 2}
    made = replay(make_controller({"name": "static", "k": 2}), trace, 0, Lookup.of(lookup))[0]
    assert any(len(one) > 3 for one in made)
    rows[1] |= {"rounds": [list(one) for one in made], "settings": {**rows[1]["settings"], "lookup": lookup}}
    write_trace(trace, tmp_path / "trace.safetensors")

    def predict(rows=rows):
        files = [write_rows(tmp_path / "rows.jsonl", rows)]
        return write_prediction_table(
            [tmp_path / "trace.safetensors"], files, priced(tmp_path), tmp_path / "prediction.csv"
        )

    clock = Clock(trace, read_costs(priced(tmp_path), 4, trace.facts.context), K)
    static = make_controller({"name": "static", "k": 2})
    assert predict().set_index("method").loc["static_k2", "predicted_s"] == pytest.approx(
        sum(clock.items([made], static))
    )
    for change in ({"reset_on": "never"}, {"k_max": K + 1}):  # nothing to follow them by
        settings = {**rows[1]["settings"], "lookup": {**lookup, "controller": {**lookup["controller"], **change}}}
        with pytest.raises(EesdError, match="No row can be replayed"):
            predict([rows[0], {**rows[1], "settings": settings}])
    copied = next(one for one in rows[1]["rounds"] if len(one) > 3)
    copied.pop()  # the same numbers, but by the head
    rows[1]["engine"] = "cpp-avx2"
    with pytest.raises(EesdError, match=r"live and .* in replay"):
        predict()


def test_a_table_with_lookup(live, tmp_path: Path):
    write_trace(live[-1], tmp_path / "trace.safetensors")
    settings = {"controllers": [{"name": "static", "k": 2}], "seeds": 1}
    speedups = []
    for own in (settings, {**settings, "lookup": LOOKUP}):
        table = write_replay_table([tmp_path / "trace.safetensors"], [priced(tmp_path)], own, tmp_path / "a.csv", 1)
        assert (table["regret"] >= -1e-12).all()
        speedups.append(table.set_index("controller")["predicted_speedup"])
        assert set(table["drafter"]) == {"exit4 + lookup" if "lookup" in own else "exit4"}
    assert (speedups[1] > speedups[0]).all()
    random = {**settings, "seeds": 3, "lookup": {**LOOKUP, "controller": {"name": "beta_ts", "k_max": K}}}
    table = write_replay_table([tmp_path / "trace.safetensors"], [priced(tmp_path)], random, tmp_path / "a.csv", 1)
    assert table.set_index("controller").loc["static", "seeds"] == 3  # copies are ended by chance


def test_strips_with_lookup(live, tmp_path: Path):
    write_trace(live[-1], tmp_path / "trace.safetensors")
    settings = {"controllers": [{"name": "static", "k": 2}], "seeds": 1, "lookup": LOOKUP}
    table = write_strips_table([tmp_path / "trace.safetensors"], priced(tmp_path), settings, tmp_path / "strips.csv")
    assert (table.loc[table["label"] == "static, k = 2", "drafted"] > 2).any()


def test_no_strip_depends_on_the_strip_above(live, tmp_path: Path):
    """Although the lookup's controller never forgets: two rules that draft alike make the same rounds."""
    write_trace(live[-1], tmp_path / "trace.safetensors")
    rule = {"name": "hf_heuristic", "k": 1, "k_max": K, "reset_on": "never"}
    settings = {
        "controllers": [
            {"name": "static", "k": 2},
            {"name": "ucb", "k_max": K},
            {"name": "confidence", "tau": 0.0, "k_max": 2},
        ],
        "seeds": 1,
        "lookup": {**LOOKUP, "controller": rule},
    }
    table = write_strips_table([tmp_path / "trace.safetensors"], priced(tmp_path), settings, tmp_path / "strips.csv")
    found = {
        label.split(",")[0]: own[["position", "drafted", "accepted"]].to_numpy().tolist()
        for label, own in table.groupby("label")
    }
    assert found["static"] == found["confidence"] != found["ucb"]


def test_a_copy_that_may_be_longer_than_the_trace_is_refused(live):
    lookup = Lookup.of({**LOOKUP, "controller": {"name": "static", "k": K + 1}})
    with pytest.raises(EesdError, match=f"may draft {K + 1} tokens"):
        replay(make_controller({"name": "static", "k": 2}), live[-1], 0, lookup)


def test_lookup_has_its_defaults_wherever_it_stands():
    config = load_config()
    lookup = resolve_method(config, "smollm2-135m", "eesd_lookup")["lookup"]
    assert (lookup["min_ngram"], lookup["max_ngram"]) == (2, 4)
    assert lookup["controller"] == {"name": "hf_heuristic", "k": 5, "k_max": 12, "reset_on": "prompt"}
    assert resolve_replay(config, "hardware_lookup")["lookup"]["controller"]["name"] == "hf_heuristic"
    assert "lookup" not in resolve_replay(config, "hardware")
