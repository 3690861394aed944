"""Exact laws of chains and generations beside those of the target; what tests of losslessness compare.

A tree's test is `assert_law(spread(run, 1.0, exactly), expected)` with a `run` that drafts and verifies one.
"""

from __future__ import annotations

from collections import defaultdict

import torch

from eesd.certify.chance import exactly, spread
from eesd.certify.toy import TOY_DRAFTERS, exact_law, toy_controller, toy_target
from eesd.control import make_controller
from eesd.decoding import generate as generating
from eesd.decoding.chain import Chain
from eesd.decoding.sampling import Sampling, accept_sampled
from tests.toys import ScriptedDrafter

EXACT = 1e-12
PROMPT = (2, 0, 1, 2, 0)


def assert_law(found, expected, tolerance=EXACT):
    """Both laws give every outcome the same probability."""
    for outcome in {*found, *expected}:
        assert abs(found.get(outcome, 0.0) - expected.get(outcome, 0.0)) <= tolerance, outcome


def chain_law(target, draft, sampling, trimmed=False):
    """(found, expected) law of the first two tokens of a round of two drafts.

    target [3][3]: logits of p after 0, 1 and 2 tokens. draft [2][3]: of q. trimmed: token 1 cannot be drafted.
    """
    vocabulary = torch.tensor([0, 2]) if trimmed else None
    p = sampling.probabilities(torch.tensor(target, dtype=torch.float64))
    q = torch.tensor(draft, dtype=torch.float64)[:, vocabulary if trimmed else slice(None)]

    def run():
        chain = Chain(make_controller({"name": "static", "k": 2}), 9, sampling, None)
        for row in q:
            chain.extend(row, vocabulary)
        accepted, token = accept_sampled(chain.tokens, chain.laws, vocabulary, p, None)
        return (*chain.tokens[:accepted], token)

    # A round may end after one token: the law of a second is that of the position.
    found = defaultdict(float)
    for tokens, weight in spread(run, 1.0, exactly).items():
        rest = p[1].tolist() if len(tokens) == 1 else None
        for token, share in enumerate(rest) if rest else [(tokens[1], 1.0)]:
            found[tokens[0], token] += weight * share
    expected = {(a, b): float(p[0, a] * p[1, b]) for a in range(3) for b in range(3)}
    return found, expected


def sequence_law(drafter, controller, length, sampling=None, seeds=(0, 1), lookup=None):
    """(found, expected) law of whole outputs of `generate` with vocabulary 3, mean over seeds of the controller.

    lookup: the source that goes before the drafter.
    """
    sampling = sampling or Sampling(1.0)
    target = toy_target(3, torch.float64, "none")
    built = ScriptedDrafter(PROMPT, [0, 1, 2, 0, 1]) if drafter == "scripted" else TOY_DRAFTERS[drafter](target)
    found = defaultdict(float)
    for seed in seeds:

        def run(seed=seed):
            output = generating.generate(
                target,
                PROMPT,
                drafter=built,
                controller=toy_controller(controller),
                lookup=lookup,
                sampling=sampling,
                max_new_tokens=length,
                seed=seed,
            )
            return tuple(output.tokens)

        for tokens, weight in spread(run, 1.0 / len(seeds), exactly).items():
            found[tokens] += weight
    return found, exact_law(target, PROMPT, length, sampling)
