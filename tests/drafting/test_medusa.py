"""Medusa heads: where they read, where they end, that nothing is lost, and which stored heads they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eesd.bench.trace import record_chains
from eesd.control import make_controller
from eesd.decoding.generate import generate
from eesd.decoding.sampling import Sampling
from eesd.decoding.tree import Branching
from eesd.drafting import DRAFTERS, Drafter
from eesd.drafting.medusa import MedusaDrafter, load_medusa_heads
from eesd.errors import EesdError
from eesd.models.engine import attach_engine
from eesd.models.loading import load_target
from eesd.models.special import fingerprint
from tests.toys import medusa_drafter, tiny_head, tiny_target, write_tiny_model

PROMPT = [3, 1, 4, 1, 5]


def static(k: int):
    return make_controller({"name": "static", "k": k})


@pytest.mark.parametrize("controller", [{"name": "static", "k": 2}, {"name": "static", "k": 6}, {"name": "beta_ts"}])
@pytest.mark.parametrize("rows", [None, 30])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_greedy_output_is_the_targets(controller, rows, tied, dtype):
    target = tiny_target(dtype=dtype)
    drafter = medusa_drafter(target, rows, tied=tied)
    for seed in range(4):
        prompt = [seed, 7, 2 * seed, 11][: seed + 1]
        vanilla = generate(target, prompt, max_new_tokens=40)
        found = generate(
            target, prompt, drafter=drafter, controller=make_controller(controller), max_new_tokens=40, seed=seed
        )
        assert found.tokens == vanilla.tokens
        assert max(r.drafted for r in found.rounds) <= 3


def test_a_draft_ends_after_the_last_head():
    target = tiny_target()
    found = generate(target, PROMPT, drafter=medusa_drafter(target, heads=2), controller=static(5), max_new_tokens=12)
    assert {(r.drafted, r.stop) for r in found.rounds[:-3]} == {(2, "drafter")}


@pytest.mark.parametrize("branching", [None, Branching(3, 2)])
def test_a_bandit_plays_lengths_beyond_the_heads_and_goes_on(branching):
    target, controller = tiny_target(), make_controller({"name": "ucb", "k_max": 6})
    drafter = medusa_drafter(target, heads=2)
    made = generate(target, PROMPT, drafter=drafter, controller=controller, branching=branching, max_new_tokens=60)
    assert {"drafter", "nodes"} & {one.stop for one in made.rounds}
    assert min(controller.played) >= 1


def test_every_round_reads_the_state_that_predicted_its_pending_token():
    """Also after rounds of which something was accepted: compared with one pass over the whole text."""
    target = tiny_target(dtype=torch.float64)
    drafter, seen = medusa_drafter(target), []
    draft = drafter.draft

    def watched(chain, pending, slot):
        seen.append((slot, drafter.state))
        draft(chain, pending, slot)

    drafter.draft = watched
    found = generate(target, PROMPT, drafter=drafter, controller=static(3), max_new_tokens=60)
    final = target.norm(target.run(target.embed(torch.tensor([[*PROMPT, *found.tokens]])), slice(None)))
    for slot, state in seen:
        torch.testing.assert_close(state, final[:, slot - 1])
    assert [slot for slot, _ in seen] == [
        len(PROMPT) + i + sum(r.accepted for r in found.rounds[:i]) for i in range(len(found.rounds))
    ]


@pytest.mark.parametrize("engine", ["torch", None])
@pytest.mark.parametrize("tied", [False, True])
def test_a_text_is_drafted_from_as_one_at_a_time(engine, tied):
    target = tiny_target()
    attach_engine(target, engine)
    drafter = medusa_drafter(target, rows=40, heads=4, tied=tied)
    drafter = MedusaDrafter(drafter.heads, engine=target.engine)
    output = generate(target, PROMPT, max_new_tokens=90).tokens

    class OneByOne(MedusaDrafter):
        draft_text = Drafter.draft_text

    batched, single = (
        record_chains(target, each, PROMPT, output, (), 6)
        for each in (drafter, OneByOne(drafter.heads, engine=target.engine))
    )
    assert (batched.drafted == single.drafted).all()
    assert (batched.length == 4).all()
    for name in ("confidence", "probability", "entropy"):
        assert getattr(batched, name) == pytest.approx(getattr(single, name), abs=1e-5, nan_ok=True)


def test_sampled_output_follows_the_targets_law():
    target = tiny_target(vocab_size=6, num_layers=1)
    drafter, controller = medusa_drafter(target, rows=4, heads=2), static(2)
    counts, draws, accepted = torch.zeros(6, 6), 1000, 0
    for seed in range(draws):
        found = generate(
            target, [1, 2], drafter=drafter, controller=controller, sampling=Sampling(1.0), max_new_tokens=3, seed=seed
        )
        counts[found.tokens[0], found.tokens[1]] += 1
        accepted += found.rounds[0].accepted
    assert 0 < accepted < draws
    first = int(counts.sum(1).argmax())
    hidden = target.run(target.embed(torch.tensor([[1, 2, first]])), slice(None))
    expected = target.logits(hidden)[0, -1].softmax(-1) * counts[first].sum()
    chi_square = float(((counts[first] - expected) ** 2 / expected).sum())
    assert chi_square < 20.5  # 99.9 % quantile with 5 degrees of freedom


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    """A tiny model with two folders of untrained heads, one of each kind."""
    folder = tmp_path_factory.mktemp("stored")
    model = write_tiny_model(folder / "tiny")
    target = load_target(model, "float32")
    drafter = medusa_drafter(target)
    for name, kind, module in (("medusa", "medusa", drafter.heads), ("exit", "exit_layer", tiny_head(target))):
        (folder / name).mkdir()
        tensors = {key: tensor.contiguous() for key, tensor in module.state_dict().items()}
        save_file(tensors, folder / name / "head.safetensors")
        card = {"kind": kind, "fingerprint": fingerprint(model), "exit_layer": 2 * (kind == "exit_layer"), "model": "x"}
        (folder / name / "card.json").write_text(json.dumps(card))
    return folder


def test_stored_heads_draft_what_they_did(stored: Path):
    target = load_target(stored / "tiny", "float32")
    heads, card = load_medusa_heads(stored / "medusa", target, fingerprint(stored / "tiny"))
    assert (len(heads), card["kind"]) == (3, "medusa")
    states = torch.randn(5, target.config.hidden_size)
    for head in range(3):
        torch.testing.assert_close(heads.logits(states, head), medusa_drafter(target).heads.logits(states, head))


def test_a_tied_output_head_is_read_from_the_target(stored: Path, tmp_path: Path):
    target = load_target(stored / "tiny", "float32")
    tensors = {key: t for key, t in load_file(stored / "medusa/head.safetensors").items() if "outputs" not in key}
    save_file({**tensors, "token_ids": torch.tensor([3, 7, 9])}, tmp_path / "head.safetensors")
    (tmp_path / "card.json").write_text((stored / "medusa/card.json").read_text())
    heads, _ = load_medusa_heads(tmp_path, target, fingerprint(stored / "tiny"))
    assert len(heads.outputs) == 1
    torch.testing.assert_close(heads.outputs[0].weight, target.head_weight[[3, 7, 9]])


@pytest.mark.parametrize(
    ("drafter", "head", "message"),
    [
        ("medusa", "exit", "kind exit_layer, but the drafter reads heads of kind medusa"),
        ("exit_head", "medusa", "kind medusa, but the drafter reads heads of kind exit_layer"),
        ("medusa", "none", "no trained head here"),
        ("medusa", None, "Drafter medusa needs trained heads"),
    ],
)
def test_other_heads_are_refused(stored: Path, drafter, head, message):
    target = load_target(stored / "tiny", "float32")
    settings = {"head_path": str(stored / head)} if head else {}
    with pytest.raises(EesdError, match=message):
        DRAFTERS[drafter].build(settings, target, stored / "tiny")


def test_heads_of_another_size_are_refused(stored: Path, tmp_path: Path):
    (tmp_path / "card.json").write_text((stored / "medusa/card.json").read_text())
    save_file({"blocks.0.weight": torch.zeros(8, 8), "blocks.0.bias": torch.zeros(8)}, tmp_path / "head.safetensors")
    with pytest.raises(EesdError, match="do not fit a head of this model"):
        load_medusa_heads(tmp_path, load_target(stored / "tiny", "float32"), fingerprint(stored / "tiny"))
