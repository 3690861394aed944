"""Hugging Face doing what our rivals do, on the same tiny model: the same rounds."""

from __future__ import annotations

import pytest
import torch

from eesd.bench.methods import build_method
from eesd.decoding.sampling import Sampling
from eesd.models.loading import load_target
from tests.toys import write_tiny_model

# The end repeats the beginning, so there is something to copy.
PROMPTS = [[40, 41, 42, 43, 44, 40, 41], [9, 8, 7, 6, 9, 8], [100 + i % 5 for i in range(17)]]
NEW = 40
RIVALS = {
    "lookup": (
        {"drafter": "lookup", "max_ngram": 2, "controller": {"name": "static", "k": 4}},
        {"peer": "hf_generate", "generation": {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 2}},
    ),
    "early_exit": (
        {"drafter": "early_exit", "exit_layer": 3, "controller": {"name": "static", "k": 4}},
        {
            "peer": "hf_generate",
            "generation": {
                "assistant_early_exit": 3,
                "num_assistant_tokens": 4,
                "assistant_confidence_threshold": 0.0,
            },
        },
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def target(folder):
    return load_target(folder, "float64", "cpu")


def both(name, target, folder, prompt, eos=()):
    return [
        build_method(name, settings, target, folder, Sampling(), eos)(prompt, seed=0, max_new_tokens=NEW)
        for settings in RIVALS[name]
    ]


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_a_peer_has_our_output_and_our_rounds(name, prompt, target, folder):
    ours, theirs = both(name, target, folder, prompt)
    vanilla = build_method("vanilla", {}, target, folder, Sampling(), ())(prompt, seed=0, max_new_tokens=NEW)
    assert ours.tokens == theirs.tokens == vanilla.tokens
    assert len(theirs.rounds) > 1
    # What the peer verifies together with the prompt is no round, and shifts those that follow.
    ahead = len(theirs.tokens) - 1 - sum(r.accepted + 1 for r in theirs.rounds)
    assert ahead >= 0
    if ahead == 0:
        assert [(r.accepted) for r in ours.rounds[:-1]] == [r.accepted for r in theirs.rounds[:-1]]
        assert [(r.drafted) for r in ours.rounds[:-4]] == [r.drafted for r in theirs.rounds[:-4]]


@pytest.mark.parametrize("name", RIVALS)
def test_sampling_peers_run(name, target, folder):
    method = build_method(name, RIVALS[name][1], target, folder, Sampling(1.0), ())
    first, again = (method(PROMPTS[0], seed=1, max_new_tokens=NEW) for _ in range(2))
    assert first.tokens == again.tokens


def test_a_plain_peer_has_no_rounds_and_leaves_no_hook(target, folder):
    build = [
        build_method("x", s, target, folder, Sampling(), ()) for s in (RIVALS["lookup"][1], {"peer": "hf_generate"})
    ]
    drafting, plain = (method(PROMPTS[0], seed=0, max_new_tokens=8) for method in build)
    assert drafting.rounds and plain.rounds == []
    assert drafting.tokens == plain.tokens
    assert target.dtype == torch.float64
