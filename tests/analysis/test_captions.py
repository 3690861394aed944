"""Captions of the report: every table and figure has one, and all render without a warning."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from docutils.core import publish_parts
from jinja2 import Environment, StrictUndefined

from eesd.analysis.columns import COLUMNS
from eesd.analysis.figures import FIGURES

FOLDER = Path(__file__).parents[2] / "workflow" / "report"


@pytest.mark.parametrize("name", sorted({*COLUMNS, *FIGURES.names()}))
@pytest.mark.parametrize("rule", ["make_tables", "draw_speedup"])
def test_caption_renders(name: str, rule: str) -> None:
    snakemake = SimpleNamespace(rule=rule, config={"run": {"models": ["smollm2-135m"]}})
    template = Environment(undefined=StrictUndefined).from_string((FOLDER / f"{name}.rst").read_text())
    text = template.render(snakemake=snakemake)
    # halt_level 2: a warning of docutils is a failure.
    body = publish_parts(text, writer="html", settings_overrides={"halt_level": 2})["body"]
    assert len(body) > 100
    if name in FIGURES.names() and name in COLUMNS:  # a caption for both
        assert ("panel" in body or "histogram" in body or "bar" in body) == (rule == "draw_speedup")
