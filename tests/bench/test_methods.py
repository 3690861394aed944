"""Controllers get what they need of head and machine, or say what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eesd.bench.methods import equip, is_lossy, make_branching, method_identity, tree_room
from eesd.control import make_controller
from eesd.decoding.tree import Branching, Typical
from eesd.errors import EesdError
from tests.analysis.factory import write_costs
from tests.toys import exit_drafter, medusa_drafter, tiny_target

HOW = "float32 with 2 threads"
TREE = {"nodes": 6, "width": 2, "acceptance": "exact", "epsilon": 0.09, "delta": 0.3}


def test_controllers_get_calibration_and_costs_or_say_what_is_missing(tmp_path: Path, capsys):
    settings = {"controller": {"name": "cost_ts"}, "head_path": str(tmp_path), "costs": str(tmp_path / "costs.json")}
    controller, drafter = make_controller(settings["controller"]), exit_drafter(tiny_target(num_layers=5), exit_layer=4)
    with pytest.raises(EesdError, match="'x': controller cost_ts needs the calibration of a trained head"):
        equip("x", controller, settings, drafter, HOW)
    drafter.card = {"calibration": {"x": [0.0, 1.0], "y": [0.1, 0.9]}}
    with pytest.raises(EesdError, match="not a cost table"):
        equip("x", controller, settings, drafter, HOW)
    assert method_identity(settings)["costs_sha256"] is None
    write_costs(tmp_path / "costs.json")
    equip("x", controller, settings, drafter, HOW)
    assert controller.calibration(1.0) == pytest.approx(0.9)
    assert controller.seconds[1] == pytest.approx(0.002 + 0.001 + 0.010)
    assert len(method_identity(settings)["costs_sha256"]) == 64
    assert not capsys.readouterr().err
    equip("x", controller, settings, drafter, "float32 with 4 threads")
    assert "x: costs of float32 with 2 threads" in capsys.readouterr().err


def test_rows_depend_on_what_controllers_read_of_a_card(tmp_path: Path):
    settings, found = {"head_path": str(tmp_path)}, []
    first = {"calibration": {"x": [0.0], "y": [0.1], "ece": 0.01}, "accuracies": [[0.5]]}
    for change in ({}, {"calibration": {"x": [0.0], "y": [0.2]}}, {"accuracies": [[0.6]]}, {"calibration": None}):
        (tmp_path / "card.json").write_text(json.dumps({**first, **change}))
        found.append(method_identity(settings)["head_decides"])
    assert len(set(found)) == 4
    told = {**first["calibration"], "ece": 0.02}
    (tmp_path / "card.json").write_text(json.dumps({**first, "calibration": told, "train_seconds": 9}))
    assert method_identity(settings)["head_decides"] == found[0], "what nobody decides by changes nothing"
    (tmp_path / "card.json").write_text('{"calib')
    with pytest.raises(EesdError, match=r"card\.json: damaged"):
        method_identity(settings)


def test_trees_of_an_exit_head_are_as_configured():
    settings = {"controller": {"name": "static", "k": 4}, "tree": TREE}
    controller, drafter = make_controller(settings["controller"]), exit_drafter(tiny_target())
    assert make_branching(settings, controller, drafter) == Branching(6, 2)
    assert make_branching({**settings, "tree": None}, controller, drafter) is None
    typical = {**settings, "tree": {**TREE, "acceptance": "typical"}}
    assert make_branching(typical, controller, drafter).typical == Typical(0.09, 0.3)
    assert [is_lossy(found) for found in (settings, typical, {})] == [False, True, False]
    assert [tree_room(found) for found in (settings, {})] == [8, 0]


def test_the_tree_of_medusa_heads_follows_from_their_card_and_the_machine(tmp_path: Path):
    settings = {
        "controller": {"name": "static", "k": 2},
        "head_path": str(tmp_path),
        "costs": str(write_costs(tmp_path / "costs.json")),
        "tree": {**TREE, "nodes": 3, "width": None},
    }
    controller, drafter = make_controller(settings["controller"]), medusa_drafter(tiny_target())
    with pytest.raises(EesdError, match=r"card\.json: no accuracies of the candidates of these heads"):
        make_branching(settings, controller, drafter)
    drafter.card = {"accuracies": [[0.6, 0.2], [0.5, 0.1], [0.9, 0.0]], "vocab_rows": 2000}
    # Two levels are asked for, so the third head drafts nothing: 0.6, then 0.6 * 0.5, then 0.2.
    assert make_branching(settings, controller, drafter) == Branching(3, paths=((0,), (0, 0), (1,)))
    chosen = make_branching({**settings, "tree": {**settings["tree"], "nodes": None}}, controller, drafter)
    # A node more costs 1 ms of about 10: worth it for 0.2 tokens, not for the next path's 0.1.
    assert chosen.paths == ((0,), (0, 0), (1,))
    assert tree_room(settings) == 3
    assert tree_room({**settings, "tree": {**TREE, "nodes": None, "width": None}}) >= 15
