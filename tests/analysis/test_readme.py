"""The README's results come from tables, between two marks."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from eesd.analysis.provenance import write_provenance
from eesd.analysis.readme import BEGIN, END, results_block, update_readme
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


def test_what_stands_around_the_marks_stays(published: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}old\n{END}\nafter\n")
    update_readme(published, readme)
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    update_readme(published, readme)
    assert readme.read_text() == text


def test_the_block_has_machine_speedup_acceptance_heads_and_verdict(published: Path) -> None:
    block = results_block(published)
    for words in (
        "Toy CPU",
        "against vanilla",
        "against hf_generate",
        "Group main: tokens per round",
        "top-1",
        "7 identical",
    ):
        assert words in block
    assert re.search(r"Prompts: .*toy", block)
    assert re.search(r"\| EESD, Beta-TS \| \d\.\d\d \(0\.\d\d\), \d\.\d\d \|", block)


def test_what_heads_learnt_from_is_told_apart(published: Path) -> None:
    assert "(layer 4, drafts 8,192 tokens, 60,000 training tokens) with" in results_block(published)
    table = published / "default" / "tables" / "heads.csv"
    heads = pd.read_csv(table)
    heads.assign(train_labels=heads["train_tokens"] + 1234).to_csv(table, index=False)
    assert "(layer 4, drafts 8,192 tokens, 60,000 training tokens and 1,234 of prompts) with" in results_block(
        published
    )
    heads.assign(vocabulary="prompt").to_csv(table, index=False)
    assert "(layer 4, drafts 8,192 tokens, the prompt's among them, 60,000" in results_block(published)
    heads.assign(init="deep4").to_csv(table, index=False)
    assert "(layer 4, drafts 8,192 tokens, 60,000 training tokens after those of `deep4`) with" in results_block(
        published
    )


def test_every_published_run_is_shown(published: Path) -> None:
    best = shutil.copytree(published / "default", published / "best")
    for table in ("speedup", "acceptance"):
        text = (best / "tables" / f"{table}.csv").read_text()
        (best / "tables" / f"{table}.csv").write_text(text.replace(",main,", ",best,"))
    block = results_block(published)
    assert [line for line in block.splitlines() if line.startswith("## ")] == [
        "## Results of `make reproduce`",
        "## Results of `config/best.yaml config/gsm8k.yaml`",
    ]
    assert "### toy, best: against vanilla" in block


def test_studies_are_shown_a_line_for_each_variation(published: Path) -> None:
    here = published / "studies" / "studies" / "toy"
    write_study(here / "init", "init", ["last", "same"], seeds=2)
    write_study(here / "learning_curve", "train_tokens", [500, 5000])
    curve = published / "studies" / "figures" / "toy" / "studies" / "learning_curve.svg"
    curve.parent.mkdir(parents=True)
    curve.touch()
    lines = results_block(published).splitlines()
    assert f"![Agreement against training tokens]({curve.as_posix()})" in lines
    shown = [line.split(" | ")[1] for line in lines if line.startswith("| toy | ")]
    assert shown == ["init last", "init same", "train_tokens 500", "train_tokens 5000"]
    assert [" ± " in line for line in lines if line.startswith("| toy | ")] == [True, True, False, False]


def test_no_published_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EesdError, match="no published results"):
        results_block(tmp_path)


def test_a_readme_without_marks_is_refused(published: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("nothing")
    with pytest.raises(EesdError, match="marks"):
        update_readme(published, tmp_path / "README.md")
