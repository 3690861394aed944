"""Trees through graphs: the tokens and rounds of plain torch."""

from __future__ import annotations

import pytest
import torch

from eesd.control import make_controller
from eesd.decoding.generate import generate
from eesd.decoding.tree import Branching
from tests.models.test_engine import SHAPES
from tests.models.test_graphs import PROMPT, small_live, with_graphs  # noqa: F401  (a fixture)
from tests.toys import exit_drafter, tiny_target


@pytest.mark.parametrize("shape", ["grouped", "window"])
def test_trees_give_the_same_tokens_and_rounds(shape: str) -> None:
    target = tiny_target(dtype=torch.float64, **SHAPES[shape])
    plain, drafter = exit_drafter(target, 2, 30), exit_drafter(target, 2, 30)
    fast, found = with_graphs(target, drafter), []
    for model, drafts in ((target, plain), (fast, drafter)):
        controller = make_controller({"name": "beta_ts", "k_max": 5})
        made = generate(
            model, PROMPT, max_new_tokens=30, drafter=drafts, controller=controller, branching=Branching(5, 3)
        )
        found.append(made)
    assert found[0].tokens == found[1].tokens
    assert found[0].rounds == found[1].rounds
    assert any(not key[-1] for key in fast.engine._graphs), "a tree went through a graph"
