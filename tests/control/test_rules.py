"""Every rule on updates computed by hand, and what all controllers promise."""

from __future__ import annotations

import copy
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eesd.control import CONTROLLERS, Calibration, Controller, Signal, make_controller
from eesd.control.costs import Costs, CostTable
from eesd.errors import EesdError

CALIBRATION = Calibration([0.0, 1.0], [0.0, 1.0])
COSTS = CostTable("toy", (100,), (Costs.of_pieces(2.0, [9.0 + 0.5 * n for n in range(21)], 10.0, 1.0),))


def made(name: str, **settings) -> Controller:
    controller = make_controller({"name": name, **settings})
    controller.equip(CALIBRATION, COSTS)
    controller.reset(0)
    return controller


def sure(q: float, position: int = 1, entropy: float = 1.0) -> Signal:
    return Signal(position, q, q, entropy)


def test_hf_heuristic_grows_by_two_and_shrinks_by_one():
    controller, lengths = made("hf_heuristic", k=2, k_max=5), []
    for drafted, accepted in ((2, 2), (4, 4), (5, 5), (5, 4), (4, 0), (0, 0), (3, 0), (2, 0), (1, 0)):
        controller.update(drafted, accepted)
        lengths.append(controller.length)
    assert lengths == [4, 5, 5, 4, 3, 3, 2, 1, 1]
    assert [made("hf_heuristic", k=3).keep_drafting(sure(0.1, n)) for n in (1, 2, 3)] == [True, True, False]


@pytest.mark.parametrize(("reset_on", "length"), [("prompt", 5), ("never", 7)])
def test_hf_heuristic_carries_its_length_over_prompts_or_not(reset_on, length):
    controller = made("hf_heuristic", reset_on=reset_on)
    controller.update(5, 5)
    controller.reset(1)
    assert controller.length == length


def test_fixed_thresholds():
    assert [made("confidence", tau=0.4).keep_drafting(sure(q)) for q in (0.39, 0.4)] == [False, True]
    # 1 - sqrt(0.15 H) = 0.7 at H = 0.6.
    assert [made("svip").keep_drafting(sure(0.5, entropy=h)) for h in (0.59, 0.61)] == [True, False]
    product = made("acceptance_product", h=0.3)
    # 0.9, 0.9 * 0.8 = 0.72, 0.72 * 0.9 = 0.648; a new draft starts at 1 again.
    assert [product.keep_drafting(sure(q, n)) for n, q in ((1, 0.9), (2, 0.8), (3, 0.9))] == [True, True, False]
    assert product.keep_drafting(sure(0.75, 1))


def test_adaptive_threshold_by_hand():
    controller = made("draft_verify", k_max=4)
    controller.update(4, 2)  # rate 0.25 < 0.9: up by 0.1 * 0.01
    assert (controller.rate, controller.now) == pytest.approx((0.25, 0.601))
    for _ in range(4):
        controller.update(2, 2)  # rate 0.625, 0.8125 (up), 0.90625, 0.953125 (down)
    assert (controller.rate, controller.now) == pytest.approx((0.953125, 0.601))
    controller.update(4, 4)  # as long as can be: held
    assert controller.now == pytest.approx(0.601)
    controller.update(0, 0)
    assert controller.rate == pytest.approx(0.9765625)
    assert [controller.keep_drafting(sure(q)) for q in (0.6, 0.602)] == [False, True]


def test_adaedl_is_held_by_full_acceptance_only():
    controller = made("adaedl", k_max=4, b1=0.0, target=0.5)
    controller.update(4, 4)
    assert controller.now == pytest.approx(0.7)
    controller.update(4, 3)
    assert controller.now == pytest.approx(0.699)
    # 1 - sqrt(0.2 H) = 0.699 at H = 0.453.
    assert [controller.keep_drafting(sure(0.5, entropy=h)) for h in (0.45, 0.46)] == [True, False]


def test_ucb_plays_every_length_once_then_the_highest_bound():
    controller, played = made("ucb", k_max=3), []
    for tokens in (2, 1, 1):
        played.append(controller.length)
        controller.update(controller.length, tokens - 1)
    assert played == [1, 2, 3]
    bonus = 1.5 * math.sqrt(2 * (1 + 2 * math.log(3 * 4**2 * math.sqrt(2) / 0.05)))
    assert [controller.bound(1, total) for total in (2, 1)] == pytest.approx([2 + bonus, 1 + bonus])
    assert controller.length == 1
    controller.update(0, 0)  # the end of the output cut the draft: nothing learnt
    assert controller.played == [1, 1, 1]


def ended_by_the_drafter(name: str, longest: int, rounds: int) -> tuple[Controller, list[int]]:
    """A bandit with a drafter that never drafts more than `longest` tokens, all right; and the lengths it played."""
    controller, played = made(name, k_max=8), []
    for _ in range(rounds):
        played.append(controller.length)
        drafted = min(controller.length, longest)
        controller.update(drafted, drafted, "drafter" if drafted < controller.length else "controller")
    return controller, played


def test_bandits_learn_what_a_length_is_worth_where_the_drafter_ends_sooner():
    controller, played = ended_by_the_drafter("ucb", longest=4, rounds=8)
    assert played == [1, 2, 3, 4, 5, 6, 7, 8]
    assert controller.total == [2, 3, 4, 5, 5, 5, 5, 5]
    controller, played = ended_by_the_drafter("exp3", longest=4, rounds=60)
    assert len(set(played)) == 8
    # The loss belongs to the length that was drawn, which it is weighted by the probability of.
    assert {length for length, loss in enumerate(controller.losses, 1) if loss} == set(played)


@pytest.mark.parametrize("name", ["ucb", "exp3"])
def test_bandits_learn_nothing_of_lengths_from_the_end_of_the_output_or_an_empty_draft(name):
    controller = made(name)
    controller.length = 5
    before = {key: copy.copy(value) for key, value in vars(controller).items() if key != "random"}
    for drafted, stop in ((3, "length"), (0, "none"), (0, "drafter")):
        controller.update(drafted, drafted, stop)
        assert {key: value for key, value in vars(controller).items() if key != "random"} == before
    controller.update(5, 1, "length")  # room for just what was played
    assert vars(controller) != before


def test_exp3_by_hand():
    controller = made("exp3", k_max=2)
    controller.length = 2
    controller.update(2, 0)
    # Loss (2 + 1 - 1) / (2 * 1/2) = 2 for length 2; then eta = sqrt(ln 2 / (2 * 2)).
    assert controller.losses == [0.0, 2.0]
    weight = math.exp(-2 * math.sqrt(math.log(2) / 4))
    assert controller.law == pytest.approx([1 / (1 + weight), weight / (1 + weight)])


def test_cali_ts_counts_what_was_seen_by_bin():
    controller = made("cali_ts", bins=2)
    for position, q in enumerate((0.9, 0.8, 0.2, 0.7), 1):
        controller.keep_drafting(sure(q, position))
    controller.update(5, 2)
    assert (controller.accepted_seen, controller.rejected_seen) == ([0, 2], [1, 0])
    controller.keep_drafting(sure(0.1))
    controller.update(2, 2)  # the second token was at the cap, and is not known
    assert (controller.accepted_seen, controller.rejected_seen) == ([1, 2], [1, 0])


def test_an_interrupted_round_teaches_the_next_prompt_nothing():
    controller = made("cali_ts", bins=2, reset_on="never")
    controller.keep_drafting(sure(0.9))
    controller.reset(1)
    controller.keep_drafting(sure(0.1))
    controller.update(1, 1)
    assert (controller.accepted_seen, controller.rejected_seen) == ([1, 0], [0, 0])


def test_cali_ts_starts_from_the_calibration():
    controller = made("cali_ts", kappa=1000.0)
    for q in (0.2, 0.9):
        share = sum(controller.keep_drafting(sure(q)) for _ in range(2000)) / 2000
        assert share == pytest.approx(q, abs=0.04)


def test_cost_ts_weighs_tokens_against_modelled_seconds():
    controller = made("cost_ts", memory=0.5, bins=2)
    assert (controller.tokens, controller.time) == (1.0, 10.0)
    controller.keep_drafting(sure(0.9))
    controller.update(2, 1)  # two tokens in 2 * 2 + 1 + 10 seconds
    assert (controller.tokens, controller.time) == (1.5, 12.5)
    assert (controller.hits, controller.misses) == (1, 1)
    # The first token of a draft was right, the one after a token of the upper bin wrong.
    assert (controller.next_hits, controller.next_misses) == ([0, 0, 1], [0, 1, 0])
    controller.next_hits = controller.next_misses = [10**9] * 3  # theta = 1/2
    controller.round_bins = [1]
    # A token more costs 2.5 s, worth 0.3 tokens at 0.12 tokens a second: it needs S > 0.6.
    assert [controller.worth(1, s) for s in (0.59, 0.61)] == [False, True]
    # The first one costs 2 + 1 + 9.5 - 10 s.
    assert controller.start_drafting()
    controller.next_hits = [0] * 3
    assert not controller.start_drafting()


def test_cost_ts_corrects_the_calibration_by_one_factor_a_prompt():
    controller = made("cost_ts")
    assert controller.prior(0.6) == 0.6
    for position, q in enumerate((0.5, 0.9, 0.8), 1):
        controller.keep_drafting(sure(q, position))
    controller.update(4, 1)  # 1.4 promised and one kept: nothing is known of the token after the rejected one
    assert (controller.promised, controller.kept) == pytest.approx((1.4, 1))
    assert controller.prior(0.6) == pytest.approx(0.6 * 9 / 9.4)
    controller.keep_drafting(sure(0.5))
    controller.update(2, 2)  # of the token at the cap no confidence was shown
    assert (controller.promised, controller.kept) == pytest.approx((1.9, 2))
    assert controller.prior(0.999) < 1
    controller.reset(0)
    assert controller.prior(0.6) == 0.6


def test_cost_ts_needs_costs_up_to_its_cap():
    with pytest.raises(EesdError, match="no cost of verifying 31 tokens"):
        make_controller({"name": "cost_ts", "k_max": 30}).equip(CALIBRATION, COSTS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "confidence", "tau": 1.5}, r"tau of controller confidence must be a number in \[0, 1\], not 1.5"),
        ({"name": "svip", "c": -1}, "c of controller svip"),
        ({"name": "draft_verify", "b1": "x"}, "b1 of a controller with an adaptive threshold"),
        ({"name": "ucb", "delta": 0}, r"delta of controller ucb must be a number in \(0, 1\]"),
        ({"name": "exp3", "k_max": 1}, "at least 2"),
        ({"name": "cali_ts", "kappa": 0}, r"kappa of a controller must be a number in \(0, inf\), not 0"),
        ({"name": "cali_ts", "kappa": math.inf}, "kappa of a controller must be a number"),
        ({"name": "beta_ts", "prior": [1.0, math.nan]}, "a prior of two numbers > 0"),
        ({"name": "cali_ts", "bins": 0}, "bins of a controller must be a whole number"),
        ({"name": "cost_ts", "memory": 1.5}, "memory of controller cost_ts"),
        ({"name": "hf_heuristic", "k": 0}, "k of controller hf_heuristic"),
        ({"name": "hf_heuristic", "reset_on": "day"}, "'prompt' or 'never'"),
        ({"name": "cali_st"}, "Did you mean 'cali_ts'"),
    ],
)
def test_bad_settings_say_what_to_do(settings, message):
    with pytest.raises(EesdError, match=message):
        make_controller(settings)


def play(controller: Controller, seed: int, confidences: list[float], accept: list[int]) -> list[int]:
    """Draft lengths of one prompt, a round for every entry of `accept`."""
    controller.reset(seed)
    drafts, stream = [], iter(confidences * 100)
    for hits in accept:
        drafted = 0
        if controller.start_drafting():
            drafted = 1
            while drafted < controller.k_max:
                q = next(stream)
                if not controller.keep_drafting(Signal(drafted, q, q, -math.log(q))):
                    break
                drafted += 1
        controller.update(drafted, min(hits, drafted))
        drafts.append(drafted)
    return drafts


@pytest.mark.parametrize("name", CONTROLLERS.names())
@given(
    seed=st.integers(0, 2**32 - 1),
    confidences=st.lists(st.floats(0.01, 1.0), min_size=3, max_size=30),
    accept=st.lists(st.integers(0, 8), min_size=1, max_size=12),
)
def test_what_all_controllers_promise(name, seed, confidences, accept):
    def fresh() -> Controller:
        controller = made(name, **({} if name == "static" else {"k_max": 6}))
        if hasattr(controller, "reset_on"):
            controller.reset_on = "prompt"
        return controller

    controller = fresh()
    once = play(controller, seed, confidences, accept)
    assert max(once) <= controller.k_max
    # The same seed gives the same rounds, whatever the controller has been through before.
    play(controller, seed + 1, confidences[::-1], accept[::-1])
    assert play(controller, seed, confidences, accept) == once == play(fresh(), seed, confidences, accept)
