"""Which figures a run has: only those that its groups have something for."""

from __future__ import annotations

from pathlib import Path

import pytest

from eesd.settings import drawable_figures, load_config

HEADS = ["heads", "heads_by_position", "reliability"]
ROUNDS = ["acceptance", "round_cost", "discards"]


def of_group(tmp_path: Path, group: str) -> list[str]:
    path = tmp_path / "overlay.yaml"
    path.write_text(f"groups: {{mine: {{tasks: [asdiv], {group}}}}}\nrun: {{groups: [mine], replays: [], views: []}}")
    return drawable_figures(load_config([path]))


def test_the_default_has_all_but_a_comparison_of_exits(root: Path):
    assert drawable_figures(load_config()) == [*ROUNDS, *HEADS, "divergence_gaps"]
    assert "exit_layers" not in drawable_figures(load_config([root / "config" / "best.yaml"]))
    assert "exit_layers" in drawable_figures(load_config([root / "config" / "exit_layers.yaml"]))


@pytest.mark.parametrize(
    ("group", "figures"),
    [
        ("methods: [vanilla, hf_generate]", ["divergence_gaps"]),
        ("methods: [vanilla, hf_lookup]", ["acceptance", "discards", "divergence_gaps"]),
        ("methods: [vanilla, lookup], temperature: 1.0", ROUNDS),
        ("methods: [vanilla, eesd], temperature: 1.0", [*ROUNDS, *HEADS]),
    ],
)
def test_groups_without_heads_drafts_or_greedy_outputs_lack_their_figures(tmp_path: Path, group: str, figures):
    assert of_group(tmp_path, group) == figures
