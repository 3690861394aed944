"""What is published is whole, and its figures are those that its tables give, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eesd import settings
from eesd.analysis.archive import EXCERPT, archive
from eesd.analysis.figures import figure
from eesd.errors import EesdError
from eesd.files import read_jsonl

PUBLISHED = Path(__file__).parents[2] / "published"
FIGURES = sorted(PUBLISHED.glob("*/figures/**/*.svg"))


def test_the_files_of_a_run_are_copied_and_an_older_one_replaced(tmp_path: Path, monkeypatch):
    here, out = tmp_path / "run", tmp_path / "published"
    files = [
        "results/tables/speedup.csv",
        "results/replay/m/regret/replay.csv",
        "resources/hardware/m.json",
        "figures/m/regret.svg",
        "figures/m/regret.png",
    ]
    for name in (*files, "results/replay/m/other/replay.csv"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(name)
    (out / "tables").mkdir(parents=True)
    (out / "tables/speedup.csv").write_text("from a run before")
    (out / "stale.csv").write_text("from a run before")
    monkeypatch.chdir(here)
    copied = {path.relative_to(out).as_posix() for path in archive(out, files)}
    assert copied == {"tables/speedup.csv", "replay/m/regret/replay.csv", "hardware/m.json", "figures/m/regret.svg"}
    assert copied == {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert (out / "tables/speedup.csv").read_text() == "results/tables/speedup.csv"


def test_of_prompts_only_the_beginning_is_published(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table, view = Path("results/tables/speedup.csv"), Path("results/views/m/xsum/main.jsonl")
    for path, text in ((table, "once"), (view, json.dumps({"prompt": "é" * 300, "item": "x"}) + "\n")):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    archive("published/mine", [table, view])
    assert read_jsonl("published/mine/views/m/xsum/main.jsonl") == [{"prompt": "é" * EXCERPT + " …", "item": "x"}]
    views = list(PUBLISHED.glob("*/views/**/*.jsonl"))
    assert views and all(len(row["prompt"]) <= EXCERPT + 2 for view in views for row in read_jsonl(view))


def test_nothing_is_published_of_nothing(tmp_path: Path):
    with pytest.raises(EesdError, match=r"Neither results/tables/speedup\.csv nor .* among the files"):
        archive(tmp_path / "published", ["results/lossless.txt"])


def test_a_file_that_is_not_there_leaves_what_was_published(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table, out = Path("results/tables/speedup.csv"), Path("published/default")
    table.parent.mkdir(parents=True)
    table.write_text("once")
    archive(out, [table])
    with pytest.raises(EesdError, match=r"No such file: results/lossless\.txt"):
        archive(out, [table, "results/lossless.txt"])
    assert (out / "tables/speedup.csv").read_text() == "once"


def test_studies_alone_can_be_published(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = Path("results/studies/m/init/heads.csv")
    table.parent.mkdir(parents=True)
    for text in ("once", "again"):
        table.write_text(text)
        assert archive("published", [table]) == [Path("published/studies/m/init/heads.csv")]
        assert Path("published/studies/m/init/heads.csv").read_text() == text


def test_what_is_no_published_run_is_not_replaced(tmp_path: Path):
    (tmp_path / "heads/m/deep4").mkdir(parents=True)
    with pytest.raises(EesdError, match="holds something else"):
        archive(tmp_path / "heads", ["results/tables/speedup.csv"])
    assert (tmp_path / "heads/m/deep4").is_dir()
    archived = tmp_path / "default/tables/speedup.csv"
    archived.parent.mkdir(parents=True)
    archived.touch()
    with pytest.raises(EesdError, match="holds something else"):
        archive(tmp_path / "default", ["results/studies/m/init/heads.csv"])
    assert archived.is_file()


def drawn_from(svg: Path) -> tuple[str, Path]:
    """Name of a published figure and the folder of its tables."""
    run, _, *name = svg.relative_to(PUBLISHED).with_suffix("").parts
    if len(name) == 1:
        return name[0], PUBLISHED / run / "tables"
    if "prediction" in name:
        return "prediction", PUBLISHED / run / "prediction" / name[0] / name[-1]
    if "studies" in name:
        return "study", PUBLISHED / run / "studies" / name[0] / name[-1]
    return settings.load_config()["replays"][name[-1]]["figure"], PUBLISHED.joinpath(run, "replay", *name)


@pytest.mark.parametrize("svg", FIGURES, ids=lambda path: path.relative_to(PUBLISHED).with_suffix("").as_posix())
def test_published_figures_redraw_byte_for_byte(svg: Path, tmp_path: Path):
    name, tables = drawn_from(svg)
    figure(name, tables, tmp_path / "again")
    assert (tmp_path / "again.svg").read_bytes() == svg.read_bytes()
