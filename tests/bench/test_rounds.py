"""Whole rounds timed in the decode loop, and decisions of controllers."""

from __future__ import annotations

import random

import torch

from eesd.bench.hardware import Pieces
from eesd.bench.rounds import Shuffled, _around, decision_times, time_rounds
from eesd.control import CONTROLLERS
from eesd.models.shapes import random_target
from tests.toys import tiny_config


def test_every_length_is_drafted_equally_often():
    controller, lengths = Shuffled(k_max=5), []
    for _ in range(3 * 6):
        controller.start_drafting()
        lengths.append(controller.length)
    assert sorted(lengths) == sorted(3 * list(range(6)))
    assert lengths[:6] != lengths[6:12]


def test_rounds_of_every_length_are_timed():
    target = random_target(tiny_config(), torch.float32, "cpu")
    head, rng = Pieces(target, 2).head, random.Random(0)
    rounds, vanilla = time_rounds(target, head, 2, context=30, count=3, longest=5, rng=rng)
    assert len(rounds) == 6
    assert all(len(seconds) >= 3 and min(seconds) > 0 for seconds in rounds)
    assert min(rounds[5]) > min(rounds[0])
    assert len(vanilla) >= 3
    assert 0 < min(vanilla) < min(rounds[5])


def test_every_controller_has_a_price():
    found = decision_times(rounds=20)
    assert set(found) == set(CONTROLLERS.names())
    assert all(0 < seconds < 1e-2 for seconds in found.values())


def test_what_is_decoded_fits_the_model():
    target = random_target(tiny_config(), torch.float32, "cpu")
    limit = target.config.max_positions
    assert _around(100, 20, target) == (20, [1] * 90)
    for context, new in ((limit - 16, 60), (5, 60), (limit, 2 * limit)):
        written, prompt = _around(context, new, target)
        assert 1 <= len(prompt) <= limit - written
