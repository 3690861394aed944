"""The recipes of README.md and docs/extending.md, followed."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from eesd.control import CONTROLLERS, Signal, make_controller
from eesd.decoding.generate import generate
from eesd.drafting import DRAFTERS
from eesd.replay.loop import replay
from eesd.settings import load_config
from tests.replay.factory import random_trace
from tests.toys import tiny_target


def recipe(root: Path, title: str, language: str, page: str = "docs/extending.md") -> str:
    """The first block of code after a title of a page."""
    text = (root / page).read_text().split(title, 1)[1]
    return re.search(rf"```{language}\n(.*?)```", text, re.DOTALL).group(1)


def follow(code: str) -> dict:
    """The names that a block of Python defines."""
    scope = {"__name__": "recipe"}
    exec(compile(code, "recipe", "exec", dont_inherit=True), scope)
    return scope


def test_add_a_controller(root: Path, monkeypatch):
    monkeypatch.setattr(CONTROLLERS, "_parts", dict(CONTROLLERS._parts))  # for this test alone
    follow(recipe(root, "**A controller**", "python", "README.md"))
    controller = make_controller({"name": "likelihood", "least": 0.2})
    drafted = [controller.keep_drafting(Signal(i, 0.5, 0.5, 1.0)) for i in (1, 2, 3, 1)]
    assert drafted == [True, True, False, True]
    assert all(replay(controller, random_trace()))


def test_add_a_drafter(root: Path, monkeypatch):
    monkeypatch.setattr(DRAFTERS, "_parts", dict(DRAFTERS._parts))
    bigram = follow(recipe(root, "## Drafters", "python"))["Bigram"]()
    target, prompt = tiny_target(), [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    controller = make_controller({"name": "static", "k": 4})
    found = generate(target, prompt, drafter=bigram, controller=controller, max_new_tokens=60)
    assert any(one.accepted for one in found.rounds)
    assert found.tokens == generate(target, prompt, max_new_tokens=60).tokens


def test_files_are_all_that_new_parts_need(snakemake, root: Path, tmp_path: Path):
    home = tmp_path / "home"
    for part in ("eesd", "workflow", "config"):
        shutil.copytree(root / part, home / part)
    shutil.copyfile(root / "Snakefile", home / "Snakefile")
    (home / "eesd/control/likelihood.py").write_text(recipe(root, "**A controller**", "python", "README.md"))
    (home / "eesd/drafting/bigram.py").write_text(recipe(root, "## Drafters", "python"))
    overlay = yaml.safe_load(recipe(root, "## Drafters", "yaml"))
    overlay["methods"]["bigram"]["controller"] = {"name": "likelihood", "least": 0.2}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(overlay))
    result = snakemake("--dry-run", "--configfile", str(tmp_path / "mine.yaml"), home=home)
    assert result.returncode == 0, result.stdout

    def code_of(group: str) -> set[str]:
        job = next(part for part in result.stdout.split("rule bench_group:") if f"asdiv/{group}.jsonl" in part)
        return set(re.findall(r"\w+\.py", re.search("input: (.*)", job)[1]))

    new = {"bigram.py", "likelihood.py"}
    assert new <= code_of("mine") and not new & code_of("main"), "what is there is not measured again"


def test_add_rules(snakemake, root: Path, tmp_path: Path):
    (tmp_path / "mine.smk").write_text(recipe(root, "## Rules of your own", "python"))
    (tmp_path / "mine.yaml").write_text("run: {rules: [mine.smk]}\n")
    given = ("--configfile", str(tmp_path / "mine.yaml"))
    assert re.search(r"^tabulate_drafting +1$", snakemake("--dry-run", *given).stdout, re.MULTILINE)
    table = tmp_path / "results/tables/time_split.csv"
    table.parent.mkdir(parents=True)
    table.write_text("group,method,task,draft_s\nmain,eesd,asdiv,0.002\nother,eesd,asdiv,9\nmain,vanilla,asdiv,0\n")
    result = snakemake("results/tables/drafting.csv", "--allowed-rules", "tabulate_drafting", *given)
    assert result.returncode == 0, result.stdout
    made = (tmp_path / "results/tables/drafting.csv").read_text()
    assert made.splitlines() == ["method,asdiv", "eesd,0.002", "vanilla,0.0"]


def test_from_python(root: Path, embedded_model: Path, monkeypatch, capsys):
    monkeypatch.setattr(DRAFTERS, "_parts", dict(DRAFTERS._parts))
    bigram = ModuleType("eesd.drafting.bigram")
    bigram.Bigram = follow(recipe(root, "## Drafters", "python"))["Bigram"]
    monkeypatch.setitem(sys.modules, "eesd.drafting.bigram", bigram)
    monkeypatch.chdir(embedded_model.parents[2])
    made = follow(recipe(root, "## From Python", "python"))
    vanilla = generate(
        made["target"], made["prompt"], max_new_tokens=64, eos=made["eos_ids"](made["folder"], made["tokenizer"])
    )
    assert made["found"].tokens == vanilla.tokens and any(one.drafted for one in made["found"].rounds)
    assert capsys.readouterr().out


@pytest.mark.parametrize("title", ["## Models", "## Heads", "### Heads that go on"])
def test_configurations_hold(root: Path, tmp_path: Path, title: str):
    (tmp_path / "mine.yaml").write_text(recipe(root, title, "yaml").replace("/models/mine", str(tmp_path)))
    assert load_config([tmp_path / "mine.yaml"])


def test_add_a_method(snakemake, root: Path, tmp_path: Path):
    (tmp_path / "mine.yaml").write_text(recipe(root, "**A method**", "yaml", "README.md"))
    result = snakemake("--dry-run", "--configfile", str(tmp_path / "mine.yaml"))
    assert "results/bench/smollm2-135m/asdiv/mine.jsonl" in result.stdout, result.stdout


def test_add_an_ablation(snakemake, root: Path, tmp_path: Path):
    overlay = tmp_path / "mine.yaml"
    overlay.write_text(recipe(root, "## Ablations of stopping rules", "yaml"))
    assert list(yaml.safe_load(overlay.read_text())["replays"]) == ["my_priors"]
    result = snakemake("--dry-run", "--configfile", str(overlay))
    assert result.returncode == 0, result.stdout
    assert "figures/smollm2-135m/my_priors.svg" in result.stdout
    assert "results/replay/smollm2-135m/my_priors/replay.csv" in result.stdout
    jobs = dict(re.findall(r"^(\w+) +(\d+)$", result.stdout, re.MULTILINE))
    assert (jobs["record_trace"], jobs["replay_controllers"], jobs["draw_replay_my_priors"]) == ("3", "1", "1")


def test_add_a_study(snakemake, root: Path, tmp_path: Path):
    overlay = tmp_path / "mine.yaml"
    overlay.write_text(recipe(root, "## Ablations of heads", "yaml"))
    result = snakemake("--dry-run", "--configfile", str(overlay))
    assert result.returncode == 0, result.stdout
    assert "results/heads/smollm2-135m/my_training.learning_rate-0.0003.epochs-2.s2/card.json" in result.stdout
    assert "figures/smollm2-135m/studies/my_training.svg" in result.stdout
    jobs = dict(re.findall(r"^(\w+) +(\d+)$", result.stdout, re.MULTILINE))
    assert (jobs["train_head"], jobs["tabulate_study"], jobs["draw_study"]) == (str(2 + 3 * 2 * 3), "1", "1")


def test_go_on_from_a_published_head(snakemake, root: Path, tmp_path: Path):
    overlay = tmp_path / "mine.yaml"
    overlay.write_text(recipe(root, "### Heads that go on", "yaml"))
    result = snakemake("--dry-run", "--configfile", str(overlay))
    assert result.returncode == 0, result.stdout
    jobs = dict(re.findall(r"^(\w+) +(\d+)$", result.stdout, re.MULTILINE))
    assert (jobs["take_head"], jobs["generate_corpus"], jobs["train_head"], jobs["bench_group"]) == ("1", "1", "1", "3")
    training = result.stdout.split("rule train_head:")[1].split("\n\n")[0]
    assert "results/heads/smollm2-135m/deep4/head.safetensors" in re.search("input: (.*)", training)[1]
