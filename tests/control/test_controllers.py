"""Controllers on hand-made signals."""

from __future__ import annotations

import subprocess
import sys

import pytest

from eesd.control import Signal, make_controller
from eesd.errors import EesdError

SIGNAL = Signal(1, 0.9, 0.9, 0.3)


def at(position: int) -> Signal:
    return Signal(position, 0.5, 0.5, 1.0)


def test_static_drafts_k():
    controller = make_controller({"name": "static", "k": 3})
    assert controller.k_max == 3
    assert [controller.keep_drafting(at(n)) for n in (1, 2, 3)] == [True, True, False]


def test_beta_ts_goes_on_more_often_after_acceptances():
    def rate(accepted: int, drafted: int) -> float:
        controller = make_controller({"name": "beta_ts"})
        controller.reset(0)
        for _ in range(20):
            controller.update(drafted, accepted)
        return sum(controller.keep_drafting(SIGNAL) for _ in range(500)) / 500

    # Posterior means 101/102 and 1/22.
    assert rate(5, 5) > 0.95
    assert rate(0, 5) < 0.12


def test_beta_ts_posterior_by_hand():
    controller = make_controller({"name": "beta_ts", "forget": 0.5})
    controller.update(4, 2)
    controller.update(3, 3)
    assert (controller.successes_seen, controller.failures_seen) == (0.5 * 2 + 3, 0.5 * 1)
    every = make_controller({"name": "beta_ts", "failures": "all"})
    every.update(4, 1)
    assert (every.successes_seen, every.failures_seen) == (1, 3)


def test_beta_ts_resets_on_a_prompt_unless_told_otherwise():
    for reset_on, left in (("prompt", 0), ("never", 3)):
        controller = make_controller({"name": "beta_ts", "reset_on": reset_on})
        controller.update(3, 3)
        controller.reset(1)
        assert controller.successes_seen == left


def test_the_same_seed_gives_the_same_decisions():
    def decisions(seed: int) -> list[bool]:
        controller = make_controller({"name": "beta_ts"})
        controller.reset(seed)
        return [controller.keep_drafting(SIGNAL) for _ in range(50)]

    assert decisions(1) == decisions(1)
    assert decisions(1) != decisions(2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "beta"}, "Did you mean 'beta_ts'"),
        ({"k": 3}, "needs a name"),
        ({"name": "static", "k": 0}, "at least 1"),
        ({"name": "static", "k": 2.5}, "whole number"),
        ({"name": "beta_ts", "k_max": 3.5}, "whole number"),
        ({"name": "beta_ts", "k_max": True}, "whole number"),
        ({"name": "static", "kk": 2}, "Did you mean 'k'"),
        ({"name": "beta_ts", "prior": [0, 1]}, "prior of two numbers > 0"),
        ({"name": "beta_ts", "prior": [1, -2]}, "prior of two numbers > 0"),
        ({"name": "beta_ts", "prior": [1]}, "prior of two numbers > 0"),
        ({"name": "beta_ts", "forget": 0}, r"forget of controller beta_ts must be a number in \(0, 1\]"),
        ({"name": "beta_ts", "forget": 1.5}, r"forget of controller beta_ts must be a number in \(0, 1\]"),
        ({"name": "cali_ts", "kappa": 0}, r"kappa of a controller must be a number in \(0, inf\), not 0"),
        ({"name": "beta_ts", "reset_on": "day"}, "'prompt' or 'never'"),
        ({"name": "beta_ts", "failures": "some"}, "'first' or 'all'"),
        ({"name": "beta_ts", "k_max": 0}, "k_max must be a whole number"),
    ],
)
def test_bad_settings_say_what_to_do(settings, message):
    with pytest.raises(EesdError, match=message):
        make_controller(settings)


def test_controllers_need_no_torch():
    code = "import sys, eesd.control; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
