"""Realistic faults put into the decoding code: each must fail a check of the suite that passes without it.

A check is an ordinary test of the suite, or an exact law; `docs/planted_bugs.md` lists which fault falls to which.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from eesd.certify import toy
from eesd.decoding import chain, generate, sampling, tree
from eesd.decoding.sampling import Sampling
from eesd.drafting.exit_head import ExitHeadDrafter
from eesd.models import transformer
from eesd.models.cache import KVCache
from eesd.models.passes import Passes
from tests.certify import laws
from tests.certify import test_sampling as certificate
from tests.decoding import test_generate as decoding
from tests.decoding import test_lookup_first, test_tree

Patch = Callable[[pytest.MonkeyPatch], None]


class Fault(NamedTuple):
    """What is wrong, how it is put in, and the check that has to fail, with its name in the documentation."""

    name: str
    plant: Patch
    check: Callable[[], None]
    caught_by: str


FAULTS: list[Fault] = []


def fault(name: str, check: Callable[[], None], caught_by: str) -> Callable[[Patch], Patch]:
    def register(plant: Patch) -> Patch:
        FAULTS.append(Fault(name, plant, check, caught_by))
        return plant

    return register


# ---- checks -----------------------------------------------------------------------------------------------------


def sequences(how: Sampling | None = None, length: int = 3, drafter: str = "early_exit") -> None:
    laws.assert_law(*laws.sequence_law(drafter, "static", length, how, seeds=(0,)))


def without_states() -> None:
    sequences(drafter="self_sd")


def two_drafts() -> None:
    sequences(length=4)


def tempered() -> None:
    sequences(Sampling(0.7))


def nucleus() -> None:
    sequences(Sampling(1.3, top_p=0.8))


def trimmed() -> None:
    target, draft = [[0.0, 1.0, 2.0], [2.0, 0.0, 1.0], [0.0, 0.0, 1.0]], [[1.0, 0.0, 2.0], [0.0, 1.0, 2.0]]
    laws.assert_law(*laws.chain_law(target, draft, Sampling(1.0), trimmed=True))


def greedy() -> None:
    decoding.test_greedy_exit_head_is_lossless({"name": "static", "k": 5}, 1, None, torch.float64, False)


def prefix_alone() -> None:
    decoding.test_what_is_drafted_depends_on_the_accepted_prefix_alone(False, False)


def ends() -> None:
    for position in (1, 2, 3, 7):
        decoding.test_stops_after_the_first_eos_even_inside_an_accepted_draft(position)


def lengths() -> None:
    decoding.test_gives_exactly_max_new_tokens_otherwise(4)


def own_numbers() -> None:
    law = toy.exact_law(toy.toy_target(), toy.PROMPT, certificate.LENGTH, certificate.SAMPLING)
    certificate.test_generation_with_torchs_own_random_numbers_follows_the_law(law)


def trees() -> None:
    test_tree.test_greedy_output_is_the_targets(test_tree.TREES[1], "exit", {})


def copies_first() -> None:
    test_lookup_first.test_what_is_drafted_depends_on_the_text_alone("deep")


LAW = "exact law of whole outputs (`test_whole_generations_have_the_targets_law`)"
LAW_OPTIONS = "exact law with temperature, top-k and top-p (`test_generations_with_temperature_top_k_and_top_p`)"
CHAIN = "exact law of a chain (`test_a_chain_keeps_the_targets_law`)"
GREEDY = "greedy outputs against vanilla (`test_greedy_exit_head_is_lossless`)"

ENDS = "ends (`test_stops_after_the_first_eos_even_inside_an_accepted_draft`)"
TREES = "greedy outputs of trees against vanilla (`test_greedy_output_is_the_targets`)"
COPIES = "drafts after copied rounds (`test_what_is_drafted_depends_on_the_text_alone`)"
PREFIX = "drafts follow the accepted prefix alone (`test_what_is_drafted_depends_on_the_accepted_prefix_alone`)"
OWN_NUMBERS = "G-test, nothing replaced (`test_generation_with_torchs_own_random_numbers_follows_the_law`)"


# ---- faults of sampling -----------------------------------------------------------------------------------------


@fault("the token that ends a draft is dropped when it is improbable", without_states, LAW)
def drop_trigger(patch):
    def extend(self, logits, vocabulary=None, original=chain.Chain.extend):
        token = original(self, logits, vocabulary)
        if self.laws[-1][int(self.ids[-1])] < self.laws[-1].max():
            self.ids.pop()
            self.laws.pop()
            self.stop = "controller"
        return token

    patch.setattr(chain.Chain, "extend", extend)


@fault("a controller peeks at the verified law and withdraws what would be rejected", sequences, LAW)
def peek(patch):
    def accept(drafted, draft_laws, vocabulary, target_laws, generator, original=sampling.accept_sampled):
        kept = 0
        while kept < len(drafted) and target_laws[kept, drafted[kept]] >= draft_laws[kept][drafted[kept]]:
            kept += 1
        return original(drafted[:kept], draft_laws[:kept], vocabulary, target_laws, generator)

    patch.setattr(generate, "accept_sampled", accept)


@fault("the bonus token is drawn from the draft's law", sequences, LAW)
def bonus_from_q(patch):
    def accept(drafted, draft_laws, vocabulary, target_laws, generator, original=sampling.accept_sampled):
        if drafted:
            target_laws = torch.cat((target_laws[:-1], draft_laws[-1][None]))
        return original(drafted, draft_laws, vocabulary, target_laws, generator)

    patch.setattr(generate, "accept_sampled", accept)


@fault("the residual is not normalised: missing mass falls to the last token", sequences, LAW)
def unnormalised(patch):
    def draw(law, generator, original=sampling.draw):
        law = law.clone()
        law[-1] += 1 - law.sum()
        return original(law.clamp(min=0), generator)

    patch.setattr(sampling, "draw", draw)


@fault("a rejected token is replaced by a draw from p instead of the residual", sequences, LAW)
def no_residual(patch):
    def accept(drafted, draft_laws, vocabulary, target_laws, generator, original=sampling.accept_sampled):
        accepted, token = original(drafted, draft_laws, vocabulary, target_laws, generator)
        if accepted < len(drafted):
            token = int(sampling.draw(target_laws[accepted], generator))
        return accepted, token

    patch.setattr(generate, "accept_sampled", accept)


@fault("drafted tokens are verified against the law of the position before", sequences, LAW)
def shifted_laws(patch):
    def accept(drafted, draft_laws, vocabulary, target_laws, generator, original=sampling.accept_sampled):
        laws_before = torch.cat((target_laws[:1], target_laws[:-1]))
        return original(drafted, draft_laws, vocabulary, laws_before, generator)

    patch.setattr(generate, "accept_sampled", accept)


@fault("one random number decides all tokens of a round", two_drafts, LAW)
def shared_uniform(patch):
    def accept(drafted, draft_laws, vocabulary, target_laws, generator, original=sampling.accept_sampled):
        with pytest.MonkeyPatch.context() as inner:
            number = torch.rand(())
            inner.setattr(torch, "rand", lambda *_, **__: number)
            return original(drafted, draft_laws, vocabulary, target_laws, generator)

    patch.setattr(generate, "accept_sampled", accept)


@fault("every draw begins its stream of random numbers anew", own_numbers, OWN_NUMBERS)
def reseeded(patch):
    def draw_rows(law, generator, original=sampling.draw_rows):
        return original(law, generator.manual_seed(generator.initial_seed()))

    patch.setattr(sampling, "draw_rows", draw_rows)


@fault("temperature is applied to the draft only", tempered, LAW_OPTIONS)
def one_temperature(patch):
    def probabilities(self, logits, original=Sampling.probabilities):
        return original(replace(self, temperature=1.0) if logits.dim() == 2 else self, logits)

    patch.setattr(Sampling, "probabilities", probabilities)


@fault("top-p is applied to the draft only", nucleus, LAW_OPTIONS)
def one_nucleus(patch):
    def probabilities(self, logits, original=Sampling.probabilities):
        return original(replace(self, top_p=1.0) if logits.dim() == 2 else self, logits)

    patch.setattr(Sampling, "probabilities", probabilities)


@fault("rows of a trimmed draft vocabulary are taken for token ids", trimmed, CHAIN)
def rows_as_ids(patch):
    def padded(law, vocabulary, size):
        return torch.nn.functional.pad(law, (0, size - len(law)))

    patch.setattr(sampling, "_on_vocabulary", padded)


# ---- faults of greedy decoding ----------------------------------------------------------------------------------


@fault("verification is off by one in its positions", greedy, GREEDY)
def shifted_positions(patch):
    def run(self, tokens, states, slot, *rest, original=Passes.run):
        return original(self, tokens, states, slot + (len(tokens) > 1), *rest)

    patch.setattr(Passes, "run", run)


@fault("keys and values of rejected tokens stay in the cache", greedy, GREEDY)
def stale_cache(patch):
    def write(cache, keys, values, slots, original=transformer.write):
        old = [store[:, :, slots : slots + keys.shape[2]].clone() for store in cache]
        new = [torch.where(o != 0, o, n) for o, n in zip(old, (keys, values), strict=True)]
        original(cache, *new, slots)

    patch.setattr(transformer, "write", write)


@fault("the exit layer's cache is not rolled back", prefix_alone, PREFIX)
def stale_exit_cache(patch):
    def accept(self, verified, original=ExitHeadDrafter.accept):
        original(self, replace(verified, accepted=len(verified.drafted)))

    patch.setattr(ExitHeadDrafter, "accept", accept)


@fault("the mask lets a token see its successor", greedy, GREEDY)
def leaking_mask(patch):
    def causal_mask(slots, seq, *rest, original=transformer.causal_mask):
        mask = original(slots, seq, *rest)
        return mask if mask is None else mask | mask.roll(1, -1)

    patch.setattr(transformer, "causal_mask", causal_mask)


@fault("the correction is the target's token one position late", greedy, GREEDY)
def late_correction(patch):
    def accept(drafted, best, original=sampling.accept_greedy):
        accepted, _ = original(drafted, best)
        return accepted, best[min(accepted + 1, len(best) - 1)]

    patch.setattr(generate, "accept_greedy", accept)


@fault("the drafting method cuts its prompt, vanilla does not", greedy, GREEDY)
def truncated_prompt(patch):
    def prefill(target, prompt, cache, sources, cut, original=generate._prefill):
        shorter = [prompt[1], *prompt[1:]] if sources else prompt
        return original(target, shorter, cache, sources, cut)

    patch.setattr(generate, "_prefill", prefill)


@fault("a head takes another drafter's round for its own", copies_first, COPIES)
def foreign_round(patch):
    patch.setattr(generate, "replace", lambda verified, own: verified)


@fault("an end of sequence inside a draft is not seen", ends, ENDS)
def unseen_eos(patch):
    def add(self, tokens, accepted, original=generate.Output.add):
        eos, self.eos = self.eos, self.eos if tokens[-1] in self.eos else frozenset()
        original(self, tokens, accepted)
        self.eos = eos

    patch.setattr(generate.Output, "add", add)


@fault("the last draft overruns the length", lengths, "lengths (`test_gives_exactly_max_new_tokens_otherwise`)")
def overrun(patch):
    def init(self, controller, budget, *rest, original=chain.Chain.__init__):
        original(self, controller, budget + 1, *rest)

    patch.setattr(chain.Chain, "__init__", init)


# ---- faults of trees ------------------------------------------------------------------------------------------------


@fault("the mask of a tree lets a node see its siblings", trees, TREES)
def leaking_siblings(patch):
    def place(self, nodes, slot, target, original=tree.Tree.place):
        slots, positions, seen = original(self, nodes, slot, target)
        return slots, positions, None if seen is None else torch.ones_like(seen)

    patch.setattr(tree.Tree, "place", place)


@fault("after a rejected sibling its neighbour's child is followed", trees, TREES)
def wrong_child(patch):
    def follow(grown, choose):
        path, node = [], 0
        while True:
            token = choose(node)
            children = [child for child in grown.kept if grown.parents[child] == node]
            if token not in [grown.tokens[child] for child in children]:
                return path, token
            node = children[0]
            path.append(node)

    patch.setattr(tree, "follow", follow)


@fault("entries of the accepted path stay at the slots of the tree", trees, TREES)
def unmoved(patch):
    patch.setattr(KVCache, "move", lambda *_: None)


# ---- the tests --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", sorted({one.check for one in FAULTS}, key=lambda f: f.__name__))
def test_the_check_passes_without_a_fault(check):
    check()


@pytest.mark.parametrize("planted", FAULTS, ids=lambda one: one.plant.__name__)
def test_the_fault_is_caught(planted: Fault, monkeypatch: pytest.MonkeyPatch):
    planted.plant(monkeypatch)
    with pytest.raises(AssertionError):
        planted.check()


def test_the_documentation_lists_them_all(root):
    assert len(FAULTS) >= 14
    text = (root / "docs/planted_bugs.md").read_text()
    found = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert found == [f"| {one.name} | {one.caught_by} |" for one in FAULTS]
