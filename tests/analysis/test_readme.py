"""Results of README.md and docs/results.md come from tables, between two marks."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from eesd.analysis.provenance import write_provenance
from eesd.analysis.readme import BEGIN, END, readme_block, results_block, update_pages
from eesd.errors import EesdError
from tests.analysis.factory import realistic_rows, write_rows, write_study


@pytest.fixture
def published(tables_dir: Path, tmp_path: Path) -> Path:
    """A folder as `published` is, with one run."""
    run = tmp_path / "published" / "default"
    shutil.copytree(tables_dir, run / "tables")
    rows = write_rows(tmp_path / "rows.jsonl", realistic_rows(n_items=3))
    write_provenance([rows], run / "tables" / "provenance.csv")
    (run / "lossless.txt").write_text("7 identical.\n")
    return tmp_path / "published"


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """Where docs/results.md is."""
    return tmp_path / "docs" / "results.md"


def write_pages(tmp_path: Path, page: Path, text: str) -> None:
    page.parent.mkdir()
    for file in (tmp_path / "README.md", page):
        file.write_text(text)


def test_what_stands_around_the_marks_stays(published: Path, tmp_path: Path, page: Path) -> None:
    write_pages(tmp_path, page, f"before\n{BEGIN}old\n{END}\nafter\n")
    update_pages(published, tmp_path)
    texts = [file.read_text() for file in (tmp_path / "README.md", page)]
    for text in texts:
        assert text.startswith("before\n")
        assert text.endswith("after\n")
        assert "old" not in text
    update_pages(published, tmp_path)
    assert [file.read_text() for file in (tmp_path / "README.md", page)] == texts


def test_the_readme_has_the_first_run_in_brief(published: Path, tmp_path: Path) -> None:
    block = readme_block(published, tmp_path / "README.md")
    for words in ("Toy CPU", "(published/default/figures/speedup.svg)", "against vanilla", "7 identical"):
        assert words in block
    for words in ("against hf_generate", "Group main", "top-1"):
        assert words not in block


def test_the_block_has_machine_speedup_acceptance_heads_and_verdict(published: Path, page: Path) -> None:
    block = results_block(published, page)
    for words in (
        "Toy CPU",
        "(../published/default/figures/speedup.svg)",
        "against vanilla",
        "against hf_generate",
        "toy, group main: tokens per round",
        "top-1",
        "7 identical",
    ):
        assert words in block
    assert re.search(r"Prompts: .*toy", block)
    assert re.search(r"\| eesd \| \d\.\d\d \(0\.\d\d\), \d\.\d\d \|", block)


def test_what_heads_learnt_from_is_told_apart(published: Path, page: Path) -> None:
    assert "(layer 4, a draft vocabulary of 8,192 tokens, 60,000 training tokens) with" in results_block(
        published, page
    )
    table = published / "default" / "tables" / "heads.csv"
    heads = pd.read_csv(table)
    heads.assign(train_labels=heads["train_tokens"] + 1234).to_csv(table, index=False)
    assert (
        "(layer 4, a draft vocabulary of 8,192 tokens, 60,000 training tokens and 1,234 of prompts) with"
        in results_block(published, page)
    )
    heads.assign(vocabulary="prompt").to_csv(table, index=False)
    assert "(layer 4, a draft vocabulary of 8,192 tokens, the prompt's among them, 60,000" in results_block(
        published, page
    )
    heads.assign(init="deep4").to_csv(table, index=False)
    assert (
        "(layer 4, a draft vocabulary of 8,192 tokens, 60,000 training tokens after those of `deep4`) with"
        in results_block(published, page)
    )


def test_every_published_run_is_shown(published: Path, page: Path) -> None:
    best = shutil.copytree(published / "default", published / "best")
    for table in ("speedup", "acceptance"):
        text = (best / "tables" / f"{table}.csv").read_text()
        (best / "tables" / f"{table}.csv").write_text(text.replace(",main,", ",best,"))
    block = results_block(published, page)
    assert [line for line in block.splitlines() if line.startswith("## ")] == [
        "## Results of `make reproduce`",
        "## Results of `config/best.yaml config/gsm8k.yaml`",
    ]
    assert "### toy, best: against vanilla" in block


def test_models_of_a_run_are_told_apart(published: Path, page: Path) -> None:
    for table in ("speedup", "acceptance", "heads"):
        path = published / "default" / "tables" / f"{table}.csv"
        one = pd.read_csv(path)
        pd.concat([one, one.assign(model="other")]).to_csv(path, index=False)
    block = results_block(published, page)
    for words in (
        "toy, group main: tokens per round",
        "other, group main: tokens per round",
        "with toy:",
        "with other:",
    ):
        assert words in block


def test_studies_are_shown_a_line_for_each_variation(published: Path, page: Path) -> None:
    here = published / "studies" / "studies" / "toy"
    write_study(here / "init", "init", ["last", "same"], seeds=2)
    write_study(here / "learning_curve", "train_tokens", [500, 5000])
    curve = published / "studies" / "figures" / "toy" / "studies" / "learning_curve.svg"
    curve.parent.mkdir(parents=True)
    curve.touch()
    lines = results_block(published, page).splitlines()
    link = "../published/studies/figures/toy/studies/learning_curve.svg"
    assert f"![Agreement against training tokens]({link})" in lines
    shown = [line.split(" | ")[1] for line in lines if line.startswith("| toy | ")]
    assert shown == ["init last", "init same", "train_tokens 500", "train_tokens 5000"]
    assert [" ± " in line for line in lines if line.startswith("| toy | ")] == [True, True, False, False]


def test_no_published_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EesdError, match="no published results"):
        results_block(tmp_path, tmp_path / "README.md")


def test_pages_are_written_together_or_not_at_all(published: Path, tmp_path: Path, page: Path) -> None:
    write_pages(tmp_path, page, f"{BEGIN}old\n{END}")
    page.write_text("nothing")
    with pytest.raises(EesdError, match=r"docs/results\.md: the marks .* are missing"):
        update_pages(published, tmp_path)
    assert (tmp_path / "README.md").read_text() == f"{BEGIN}old\n{END}"
    page.unlink()
    with pytest.raises(EesdError, match="missing"):
        update_pages(published, tmp_path)
