"""A target that drafts for itself without some sublayers: lossless, and exactly those sublayers are left out."""

from __future__ import annotations

import json
import random

import pytest
import torch
import torch.nn.functional as F

from eesd.bench.methods import build_method
from eesd.control import make_controller
from eesd.decoding.generate import generate
from eesd.decoding.sampling import Sampling
from eesd.drafting.self_sd import SelfSDDrafter, Skips, load_skips
from eesd.errors import EesdError
from eesd.models.engine import attach_engine
from eesd.models.loading import load_target
from eesd.models.special import fingerprint
from eesd.models.transformer import LayerCaches, run_layers
from tests.toys import needs_compiler, tiny_target, write_tiny_model

PROMPT = [3, 1, 4, 1, 5]
SETS = [Skips(), Skips({1}, {2}), Skips({0, 1, 2}, ()), Skips((), {0, 3}), Skips({1, 2}, {1, 2}), Skips({0}, {3})]


def run(target, skips, temperature=0.0, k=3, new=41):
    controller = make_controller({"name": "static", "k": k})
    sampling = Sampling(temperature)
    drafter = SelfSDDrafter(target, skips)
    return generate(target, PROMPT, drafter=drafter, controller=controller, sampling=sampling, max_new_tokens=new)


@pytest.mark.parametrize("skips", SETS, ids=str)
def test_any_set_is_lossless(skips):
    target = tiny_target()
    assert run(target, skips).tokens == generate(target, PROMPT, max_new_tokens=41).tokens
    assert len(run(target, skips, temperature=1.0).tokens) == 41


def test_with_nothing_left_out_every_draft_is_accepted():
    assert [(r.drafted, r.accepted) for r in run(tiny_target(), Skips()).rounds] == [(3, 3)] * 10


def test_sublayers_are_left_out_one_by_one():
    """Against the layer's formula, written out."""
    target = tiny_target(dtype=torch.float64)
    layer, hidden = target.layers[0], torch.randn(1, 3, 32, dtype=torch.float64)

    def whole(x, attention, mlp):
        if attention:
            x = layer.keeping(True, False)(x, angles, mask, None, 0)
        if mlp:
            gate, up = layer.gate_up(layer.mlp_norm(x)).chunk(2, -1)
            x = x + layer.down(F.silu(gate) * up)
        return x

    angles = tuple(part[:, None] for part in target.rotary(torch.arange(3)[None], torch.float64))
    mask = torch.ones(3, 3, dtype=torch.bool).tril()[None, None]
    for attention in (False, True):
        for mlp in (False, True):
            found = layer.keeping(attention, mlp)(hidden, angles, mask, None, 0)
            torch.testing.assert_close(found, whole(hidden, attention, mlp))
    torch.testing.assert_close(layer(hidden, angles, mask, None, 0), whole(hidden, True, True))
    assert layer.runs_attention and layer.runs_mlp


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("skips", SETS, ids=str)
def test_the_engine_leaves_out_the_same_and_stays_independent_of_rows(skips, dtype):
    plain, fast = tiny_target(), tiny_target()
    for target in (plain, fast):
        for weight in target.parameters():
            weight.data = weight.data.bfloat16().to(dtype)
    attach_engine(fast, "cpp")
    hidden = torch.randn(1, 7, 32).to(dtype)
    results = []
    with torch.inference_mode():
        for target, pieces in ((plain, [7]), (fast, [7]), (fast, [1, 2, 4])):
            cache, slot, parts = target.new_cache(16), 0, []
            for piece in hidden.split(pieces, 1):
                caches = LayerCaches(cache.keys, cache.values)
                parts.append(run_layers(skips.layers(target), target.rotary, piece, caches, slot))
                slot += piece.shape[1]
            results.append(torch.cat(parts, 1))
    # The two round bfloat16 at different places.
    error = (results[1].double() - results[0].double()).norm() / results[0].double().norm()
    assert error < (1e-5 if dtype == torch.float32 else 0.1)
    assert torch.equal(results[1], results[2])


def test_the_target_itself_keeps_all_of_its_sublayers():
    target = tiny_target()
    attach_engine(target)
    with torch.inference_mode():
        before = generate(target, PROMPT, max_new_tokens=12).tokens
        Skips({0, 1, 2, 3}, {0, 1, 2, 3}).layers(target)
        assert generate(target, PROMPT, max_new_tokens=12).tokens == before


def test_a_found_set_is_read_for_its_model_only(tmp_path):
    model = write_tiny_model(tmp_path / "model")
    target = load_target(model, "float32", "cpu")
    path = tmp_path / "default.json"
    with pytest.raises(EesdError, match="Search it with"):
        load_skips(path, "x")
    path.write_text('{"fingerp')
    with pytest.raises(EesdError, match=r"damaged .* search again"):
        load_skips(path, "x")
    path.write_text(json.dumps({"fingerprint": fingerprint(model), "attention": [1], "mlp": [0, 2]}))
    with pytest.raises(EesdError, match="Search again for this model"):
        load_skips(path, "x")
    assert load_skips(path, fingerprint(model)).as_json() == {"attention": [1], "mlp": [0, 2]}
    settings = {"drafter": "self_sd", "skips_path": str(path), "controller": {"name": "static", "k": 2}}
    prompt = random.Random(0).choices(range(1, 200), k=9)
    outputs = [
        build_method("x", s, target, model, Sampling(), ())(prompt, seed=0, max_new_tokens=20) for s in ({}, settings)
    ]
    assert outputs[0].tokens == outputs[1].tokens
