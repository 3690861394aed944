"""The recipes of the README, followed."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from eesd.control import CONTROLLERS, Signal, make_controller
from eesd.replay.loop import replay
from tests.replay.factory import random_trace


def recipe(root: Path, title: str, language: str) -> str:
    """The first block of code after a bold title of the README."""
    text = (root / "README.md").read_text().split(f"**{title}**")[1]
    return re.search(rf"```{language}\n(.*?)```", text, re.DOTALL).group(1)


def test_add_a_controller(root: Path, monkeypatch):
    monkeypatch.setattr(CONTROLLERS, "_parts", dict(CONTROLLERS._parts))  # for this test alone
    scope = {"__name__": "recipe"}
    exec(compile(recipe(root, "A controller", "python"), "README.md", "exec", dont_inherit=True), scope)
    controller = make_controller({"name": "likelihood", "least": 0.2})
    drafted = [controller.keep_drafting(Signal(i, 0.5, 0.5, 1.0)) for i in (1, 2, 3, 1)]
    assert drafted == [True, True, False, True]
    assert all(replay(controller, random_trace()))


def test_add_an_ablation(snakemake, root: Path, tmp_path: Path):
    overlay = tmp_path / "mine.yaml"
    overlay.write_text(recipe(root, "An ablation", "yaml"))
    assert list(yaml.safe_load(overlay.read_text())["replays"]) == ["my_priors"]
    result = snakemake("--dry-run", "--configfile", str(overlay))
    assert result.returncode == 0, result.stdout
    assert "figures/smollm2-135m/my_priors.svg" in result.stdout
    assert "results/replay/smollm2-135m/my_priors/replay.csv" in result.stdout
    jobs = dict(re.findall(r"^(\w+) +(\d+)$", result.stdout, re.MULTILINE))
    assert (jobs["record_trace"], jobs["replay_controllers"], jobs["draw_replay_my_priors"]) == ("3", "1", "1")


def test_add_a_study(snakemake, root: Path, tmp_path: Path):
    overlay = tmp_path / "mine.yaml"
    overlay.write_text(recipe(root, "A study of heads", "yaml"))
    result = snakemake("--dry-run", "--configfile", str(overlay))
    assert result.returncode == 0, result.stdout
    assert "results/heads/smollm2-135m/my_training.learning_rate-0.0003.epochs-2.s2/card.json" in result.stdout
    assert "figures/smollm2-135m/studies/my_training.svg" in result.stdout
    jobs = dict(re.findall(r"^(\w+) +(\d+)$", result.stdout, re.MULTILINE))
    assert (jobs["train_head"], jobs["tabulate_study"], jobs["draw_study"]) == (str(2 + 3 * 2 * 3), "1", "1")


def test_go_on_from_a_published_head(snakemake, root: Path, tmp_path: Path):
    overlay = tmp_path / "mine.yaml"
    overlay.write_text(recipe(root, "A head that goes on from another", "yaml"))
    result = snakemake("--dry-run", "--configfile", str(overlay))
    assert result.returncode == 0, result.stdout
    jobs = dict(re.findall(r"^(\w+) +(\d+)$", result.stdout, re.MULTILINE))
    assert (jobs["take_head"], jobs["generate_corpus"], jobs["train_head"], jobs["bench_group"]) == ("1", "1", "1", "3")
    training = result.stdout.split("rule train_head:")[1].split("\n\n")[0]
    assert "results/heads/smollm2-135m/deep4/head.safetensors" in re.search("input: (.*)", training)[1]
