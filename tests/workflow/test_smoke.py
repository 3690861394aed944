"""The whole workflow on the real model with few prompts: `config/smoke.yaml`, minutes on two cores."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest

pytestmark = [pytest.mark.smoke, pytest.mark.slow]


@pytest.fixture
def folder(root: Path, tmp_path: Path) -> Path:
    """An empty working folder, with the downloads of this checkout if it has any."""
    wheels = root / "resources" / "wheels"
    if wheels.is_dir():
        shutil.copytree(wheels, tmp_path / "resources" / "wheels")
    return tmp_path


def test_smoke_run(snakemake, root: Path, folder: Path):
    overlay = ["--configfile", str(root / "config/smoke.yaml")]
    result = snakemake(*overlay)
    assert result.returncode == 0, result.stdout[-4000:]

    tables = {path.stem: pd.read_csv(path) for path in (folder / "results/tables").glob("*.csv")}
    expected = {
        "speedup",
        "acceptance",
        "lossless",
        "divergences",
        "time_split",
        "quality",
        "rounds",
        "heads",
        "calibration",
        "engine",
        "provenance",
        "sampling",
    }
    assert expected <= tables.keys()
    assert [name for name in expected - {"divergences"} if tables[name].empty] == []
    assert set(tables["speedup"]["baseline"]) == {"vanilla", "hf_generate"}
    assert (tables["lossless"]["different"] == 0).all()
    greedy = tables["lossless"][tables["lossless"]["decoding"] == "greedy"]
    assert (greedy["identical"] + greedy["tie"] == greedy["n_items"]).all()
    assert (folder / "results/lossless.txt").stat().st_size > 0
    own = ["smollm2-135m/smoke", "smollm2-135m/studies/smoke"]
    for figure in (
        "speedup",
        "acceptance",
        "time_split",
        "heads",
        "heads_by_position",
        "reliability",
        "divergence_gaps",
        "engine",
        *own,
    ):
        for suffix in ("pdf", "png", "svg"):
            assert (folder / "figures" / f"{figure}.{suffix}").stat().st_size > 1000

    again = snakemake(*overlay, "--dry-run")
    assert "Nothing to be done" in again.stdout, again.stdout[-2000:]
    report = snakemake(*overlay, "--report", str(folder / "report.html"))
    assert report.returncode == 0, report.stdout[-4000:]
    assert (folder / "report.html").stat().st_size > 100_000
