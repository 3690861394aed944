"""Controllers get what they need of head and machine, or say what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from eesd.bench.methods import equip, method_identity
from eesd.control import make_controller
from eesd.errors import EesdError
from tests.analysis.factory import write_costs
from tests.toys import exit_drafter, tiny_target


def test_controllers_get_calibration_and_costs_or_say_what_is_missing(tmp_path: Path):
    settings = {"controller": {"name": "cost_ts"}, "head_path": str(tmp_path), "costs": str(tmp_path / "costs.json")}
    controller, drafter = make_controller(settings["controller"]), exit_drafter(tiny_target(num_layers=5), exit_layer=4)
    with pytest.raises(EesdError, match="'x': controller cost_ts needs the calibration of a trained head"):
        equip("x", controller, settings, drafter)
    drafter.card = {"calibration": {"x": [0.0, 1.0], "y": [0.1, 0.9]}}
    with pytest.raises(EesdError, match="not a cost table"):
        equip("x", controller, settings, drafter)
    assert method_identity(settings)["costs_sha256"] is None
    write_costs(tmp_path / "costs.json")
    equip("x", controller, settings, drafter)
    assert controller.calibration(1.0) == pytest.approx(0.9)
    assert controller.seconds[1] == pytest.approx(0.002 + 0.001 + 0.010)
    assert len(method_identity(settings)["costs_sha256"]) == 64
