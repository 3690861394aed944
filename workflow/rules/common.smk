"""Shared by every stage: the checked configuration, wildcards, and where modules and settings come from.

Everything that can be wrong in a configuration is found here, before the first job; the checks live in eesd/settings.py.
"""

import json
import sys
from pathlib import Path
from shlex import quote

from snakemake.exceptions import WorkflowError

# The package beside the Snakefile is the one that plans and runs, installed or not.
sys.path.insert(0, workflow.basedir)

from eesd import code_files, settings
from eesd.errors import EesdError

try:
    settings.complete(config)
except EesdError as error:
    raise WorkflowError(str(error)) from None


# `python` in a rule is the interpreter that runs Snakemake, activated or not. A prefix is no part of the command, so
# neither another environment nor another checkout reruns anything. It replaces Snakemake's strict mode, hence `set`.
bin_folder, package_folder = quote(str(Path(sys.executable).parent)), quote(workflow.basedir)
shell.prefix(f'set -euo pipefail; export PATH={bin_folder}:"$PATH" PYTHONPATH={package_folder}; ')

TABLES = [
    "speedup",
    "comparisons",
    "ranking",
    "acceptance",
    "lossless",
    "divergences",
    "time_split",
    "quality",
    "rounds",
    "heads",
    "calibration",
]
FIGURES = ["speedup", "time_split", "engine", *settings.drawable_figures(config)]
if "exit_layers" in FIGURES:
    TABLES.append("exit_layers")
FORMATS = ["pdf", "png", "svg"]
# The report answers questions; figures and tables stand under the one that they speak to.
QUESTIONS = {
    "1 Is it faster?": ["speedup", "comparisons", "ranking", "viewer"],
    "2 Why?": ["acceptance", "rounds", "round_cost", "discards", "time_split", "engine", "prediction"],
    "3 Is it lossless?": ["lossless", "divergences", "divergence_gaps", "sampling", "quality"],
    "4 What do heads learn?": ["heads", "heads_by_position", "calibration", "reliability", "study", "exit_layers"],
    "5 When to stop drafting?": ["replay"],
    "6 Where do the numbers come from?": ["provenance"],
}
# Where figures find their tables: what this run measures, or what the repository has published.
PUBLISHED = f"{workflow.basedir}/published/{config['published']}"
RESULTS = "results" if config["source"] == "run" else PUBLISHED
SOURCES = [".py", ".cpp", ".h"]


def modules(*paths):
    """Files, or all Python and C++ files of folders, as input of the rules that execute them."""
    found = []
    for path in map(Path(workflow.basedir).joinpath, paths):
        files = [path] if path.is_file() else sorted(file for end in SOURCES for file in path.glob(f"**/*{end}"))
        if not files:
            raise WorkflowError(f"No module {path}: correct modules(...) in workflow/rules.")
        found += files
    # Relative where possible: the same command in another checkout has the same inputs.
    here = Path.cwd()
    return [str(file.relative_to(here) if file.is_relative_to(here) else file) for file in found]


TASK_MODULES = ["eesd/tasks/base.py", "eesd/tasks/numbers.py", "eesd/tasks/sources.py"]


def task_modules(tasks):
    """Modules behind the prompts of these tasks."""
    return modules(*TASK_MODULES, *code_files.task_files(tasks))


def method_modules(group):
    """Modules behind the drafters and controllers of a group's methods."""
    methods = code_files.methods_of(config, group)
    return modules(*code_files.drafter_files(methods), *code_files.controller_files(methods))


def to_json(resolve):
    """A params function: what `resolve(config, wildcards)` returns, as JSON in one spelling."""
    return lambda wildcards: json.dumps(resolve(config, wildcards), sort_keys=True)


def each(option, values):
    """`option` before each of the values, as the command line takes lists."""
    return [word for value in values for word in (option, value)]


def bench_files():
    """Row files of everything that runs."""
    return [f"results/bench/{model}/{task}/{group}.jsonl" for model, task, group in settings.bench_cells(config)]


def head_files(model, groups, name):
    """Files `name` (`head.safetensors`, `card.json`) of the heads that these groups use."""
    return [f"{settings.head_path(model, head)}/{name}" for head in settings.used_heads(config, groups)]


def card_files():
    """Cards of all heads of everything that runs."""
    run = config["run"]
    return [card for model in run["models"] for card in head_files(model, run["groups"], "card.json")]


def figure_tables():
    """The table below results/ that every figure of what runs is drawn from, or one of them."""
    run = config["run"]
    tables = {figure: f"tables/{'engine' if figure == 'engine' else 'speedup'}.csv" for figure in FIGURES}
    for model in run["models"]:
        for replay in run["replays"]:
            kind = settings.replay_table(config["replays"][replay])
            tables[f"{model}/{replay}"] = f"replay/{model}/{replay}/{kind}.csv"
        for group in settings.predicted_groups(config):
            tables[f"{model}/prediction/{group}"] = f"prediction/{model}/{group}/prediction.csv"
        for study in run["studies"]:
            tables[f"{model}/studies/{study}"] = f"studies/{model}/{study}/heads.csv"
    return tables


def figure_files():
    """Every figure of what runs, in all formats, and the page of decodes; of published tables those that are there."""

    def there(*places):
        return config["source"] == "run" or all(Path(RESULTS, place).exists() for place in places)

    views = [file.removeprefix("results/") for file in settings.view_files(config)]
    page = ["figures/viewer.html"] if views and there(*views) else []
    drawn = [figure for figure, table in figure_tables().items() if there(table)]
    return expand("figures/{figure}.{format}", figure=drawn, format=FORMATS) + page


def study_files():
    """Tables and figures of all studies that run; WorkflowError without any, when a plan for them is made."""
    run = config["run"]
    if not run["studies"]:
        raise WorkflowError("No study runs: list some under run.studies, or take --configfile config/studies.yaml.")
    tables = expand("results/studies/{model}/{study}/heads.csv", model=run["models"], study=run["studies"])
    return tables + expand(
        "figures/{model}/studies/{study}.{format}", model=run["models"], study=run["studies"], format=FORMATS
    )


def published_files():
    """What `publish` copies beside tables and figures: what they were made from."""
    models = config["run"]["models"]
    tables = [f"results/{table}" for table in figure_tables().values() if not table.startswith("tables/")]
    return [*tables, *settings.view_files(config), *(settings.cost_path(model) for model in models)]


def question(name):
    """The question of the report that a figure or table speaks to."""
    return next(question for question, names in QUESTIONS.items() if name in names)
