"""Checks of a configuration that a schema cannot express: names that refer to others, keys that belong together.

    check_names(config)          # EesdError for the first mistake, naming the entry and what to do

`eesd.settings.complete` calls it once the schema holds and defaults are filled in. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from eesd.control import CONTROLLERS, make_controller
from eesd.control.grid import all_settings, expand
from eesd.errors import EesdError, unknown
from eesd.files import read_json
from eesd.registry import registered_in
from eesd.words import BASELINE, HF_BASELINE, INITS, VOCABULARY_OF_PROMPTS, kept, origin_of

Config = dict[str, Any]

MEASURED = "measured"  # as a cost table: the one that the workflow measures for the model
DRAFTING = Path(__file__).parent / "drafting"
PUBLISHED = Path(__file__).parents[1] / "published"
PUBLISHED_HARDWARE = PUBLISHED / "hardware"
# The key of a method that each drafter needs, and that no drafter without it takes.
DRAFTER_KEYS = {
    "exit_head": "head",
    "medusa": "head",
    "lookup": "max_ngram",
    "early_exit": "exit_layer",
    "assistant": "assistant",
    "self_sd": "skips",
}
# The kind of head that each of these drafters reads. They are the ones that draft trees, too.
DRAFTER_KINDS = {"exit_head": "exit_layer", "medusa": "medusa"}


def check_names(config: Config) -> None:
    """EesdError for the first entry that names something unknown, or whose keys do not fit each other."""
    for name in config["models"]:
        _check_model(config, name)
    for name, corpus in config["corpora"].items():
        _check_tasks(corpus["tasks"], f"corpora.{name}.tasks")
        _check_tasks(corpus["train_answers_by_task"], f"corpora.{name}.train_answers_by_task")
    for name in config["heads"]:
        _check_head(config, name)
    for name, search in config["skips"].items():
        _check_tasks(search["tasks"], f"skips.{name}.tasks")
    for name in config["methods"]:
        _check_method(config, name)
    for name in config["groups"]:
        _check_group(config, name)
    check_known("model", config["run"]["models"], config["models"], "run.models")
    check_known("group", config["run"]["groups"], config["groups"], "run.groups")
    check_known("group", config["run"]["views"], config["groups"], "run.views")
    for name in config["run"]["views"]:
        if config["groups"][name]["temperature"]:
            raise _mistake("run.views", f"group '{name}' samples, but views follow greedy decodes. Remove it.")
    for name in config["run"]["rules"]:
        if not Path(name).is_file():
            raise _mistake("run.rules", f"no file '{name}' seen from {Path.cwd()}. Correct it, or remove it.")
    for name in config["replays"]:
        _check_replay(config, name)
    check_known("replay", config["run"]["replays"], config["replays"], "run.replays")
    _check_priced(config)
    # Published figures are drawn without data.
    data_dir = config["data_dir"] if config["source"] == "run" else None
    if data_dir is not None and not Path(data_dir).is_dir():
        raise _mistake("data_dir", f"no folder '{data_dir}' seen from {Path.cwd()}. Correct it, or set null.")


def _mistake(where: str, message: object) -> EesdError:
    return EesdError(f"Configuration, {where}: {message}")


def check_known(kind: str, names: Iterable[str], known: Iterable[str], where: str) -> None:
    """EesdError naming the place `where` for the first of `names` that is not known."""
    for name in names:
        if name not in known:
            raise _mistake(where, unknown(kind, name, known))


def _check_tasks(names: Iterable[str], where: str) -> None:
    from eesd.tasks import TASKS

    check_known("task", names, TASKS.names(), where)


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


def _check_head(config: Config, name: str) -> None:
    head, where = config["heads"][name], f"heads.{name}"
    check_known("corpus", [head["corpus"]], config["corpora"], f"{where}.corpus")
    if name in INITS:
        raise _mistake(where, f"{', '.join(INITS)} are values of `init`. Give this head another name.")
    if head["vocabulary"] == "prompt" and head["kind"] == "exit_layer" and head["output_head"] == "free":
        raise _mistake(f"{where}.vocabulary", VOCABULARY_OF_PROMPTS)
    chain = [name]
    while True:
        where, head = f"heads.{chain[-1]}", config["heads"][chain[-1]]
        check_known("init", [head["init"]], [*INITS, *config["heads"]], f"{where}.init")
        if not (origin := origin_of(head)):
            return
        if origin in chain:
            raise _mistake(f"{where}.init", f"{' from '.join([*chain, origin])}: one of these has to start anew.")
        for key in ("kind", *kept(head)):
            if (found := config["heads"][origin][key]) != head[key]:
                raise _mistake(f"{where}.{key}", f"is {head[key]}, but '{origin}', which it goes on from, has {found}.")
        chain.append(origin)


def _check_method(config: Config, name: str) -> None:
    method, where = config["methods"][name], f"methods.{name}"
    drafts = method["drafter"] is not None
    if name == BASELINE and any(value is not None for value in method.values()):
        raise _mistake(where, f"'{BASELINE}' is the baseline and takes no keys. Give this method another name.")
    if name == HF_BASELINE and (method["peer"] != HF_BASELINE or method["generation"] is not None):
        raise _mistake(
            where, f"'{name}' is the other baseline: `peer: {HF_BASELINE}` alone. Give this method another name."
        )
    own = [
        key for key in ("drafter", "tree", "lookup", "controller", *DRAFTER_KEYS.values()) if method[key] is not None
    ]
    if method["peer"] is not None and own:
        raise _mistake(where, f"a peer brings its own loop: remove {', '.join(own)}, or the peer.")
    if method["peer"] is None and method["generation"] is not None:
        raise _mistake(where, "generation holds options of a peer: add `peer: hf_generate`, or remove it.")
    if drafts != (method["controller"] is not None):
        raise _mistake(where, "drafter and controller belong together: give both, or neither for vanilla decoding.")
    if method["drafter"] not in (None, *DRAFTER_KEYS):
        check_known("drafter", [method["drafter"]], registered_in(DRAFTING, "DRAFTERS"), f"{where}.drafter")
    elif method["options"] is not None:
        raise _mistake(where, f"options are of drafters other than {', '.join(DRAFTER_KEYS)}: remove them.")
    for key in DRAFTER_KEYS.values():
        takers = [drafter for drafter, needed in DRAFTER_KEYS.items() if needed == key]
        if (method["drafter"] in takers) != (method[key] is not None):
            raise _mistake(where, f"drafter {' or '.join(takers)} needs the key {key}, and nothing else takes it.")
    if method["head"] is not None:
        check_known("head", [method["head"]], config["heads"], f"{where}.head")
        found, read = config["heads"][method["head"]]["kind"], DRAFTER_KINDS[method["drafter"]]
        if found != read:
            raise _mistake(
                f"{where}.head",
                f"'{method['head']}' is of kind {found}, but drafter {method['drafter']} reads heads of kind {read}. "
                "Name another head, or another drafter.",
            )
    if method["skips"] is not None:
        check_known("skips", [method["skips"]], config["skips"], f"{where}.skips")
    if method["assistant"] is not None:
        check_known("model", [method["assistant"]], config["models"], f"{where}.assistant")
    if drafts:
        controller_settings(method["controller"], f"{where}.controller")
        kind = CONTROLLERS[method["controller"]["name"]]
        if kind.uses_calibration and method["head"] is None:
            raise _mistake(where, f"controller {method['controller']['name']} needs a calibrated head: name one.")
        if kind.uses_costs and DRAFTER_KINDS.get(method["drafter"]) != "exit_layer":
            raise _mistake(
                where, f"controller {method['controller']['name']} knows what exit heads cost: use drafter exit_head."
            )
    if method["tree"] is not None:
        _check_tree(method, f"{where}.tree")
    _check_copies(method, where)
    if method["costs"] is not None and not (drafts and (kind.uses_costs or tree_uses_costs(method))):
        raise _mistake(
            where,
            "costs are read by cost-aware controllers only, such as cost_ts, and by Medusa trees without nodes: "
            "remove them.",
        )


def _check_tree(method: Mapping[str, Any], where: str) -> None:
    tree, drafter = method["tree"], method["drafter"]
    if drafter in DRAFTER_KEYS and drafter not in DRAFTER_KINDS:
        raise _mistake(
            where, f"drafters {' and '.join(DRAFTER_KINDS)} draft trees, {drafter} drafts chains: remove it."
        )
    if drafter != "medusa" and None in (tree["nodes"], tree["width"]):
        raise _mistake(where, f"trees of drafter {drafter} need nodes and width.")
    if drafter == "medusa" and tree["width"] is not None:
        raise _mistake(where, "the tree of drafter medusa follows from measured accuracies: remove width.")
    if CONTROLLERS[method["controller"]["name"]].uses_costs:
        raise _mistake(
            where,
            f"controller {method['controller']['name']} knows what chains cost: remove the tree, or take another one.",
        )


def _check_copies(method: Mapping[str, Any], where: str) -> None:
    if method["min_ngram"] is not None:
        if method["drafter"] != "lookup":
            raise _mistake(
                where, "min_ngram is a key of drafter lookup; beside another drafter it belongs under lookup."
            )
        _check_ngrams(method, where)
    if method["lookup"] is not None:
        if method["drafter"] in (None, "lookup"):
            raise _mistake(
                f"{where}.lookup", "lookup goes before another drafter: add one, or take `drafter: lookup` alone."
            )
        _check_lookup(method["lookup"], f"{where}.lookup")


def _check_ngrams(settings: Mapping[str, Any], where: str) -> None:
    low, high = settings["min_ngram"], settings["max_ngram"]
    if low > high:
        raise _mistake(where, f"min_ngram {low} is above max_ngram {high}: swap them.")


def _check_lookup(lookup: Mapping[str, Any], where: str) -> None:
    _check_ngrams(lookup, where)
    controller = lookup["controller"]
    controller_settings(controller, f"{where}.controller")
    kind = CONTROLLERS[controller["name"]]
    if kind.uses_calibration or kind.uses_costs:
        raise _mistake(
            f"{where}.controller",
            f"{controller['name']} decides by what is known of a head; copied tokens have none. Take another one, such "
            "as hf_heuristic, static or beta_ts.",
        )


def tree_uses_costs(method: Mapping[str, Any]) -> bool:
    """Whether the size of a method's tree is chosen by the cost table."""
    return method.get("tree") is not None and method["tree"]["nodes"] is None


def controller_settings(controller: Mapping[str, Any], where: str) -> dict[str, Any]:
    """All settings of a controller, its defaults included, so that rows and reruns see a change of a default."""
    try:
        made = make_controller(controller)
    except EesdError as error:
        raise _mistake(where, error) from error
    except TypeError as error:
        raise _mistake(where, f"a value has the wrong type ({error}).") from error
    return {"name": controller["name"], **plain(all_settings(made))}


def plain(value: Any) -> Any:
    """`value` as JSON would give it back: dictionaries, lists and scalars only."""
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def _check_group(config: Config, name: str) -> None:
    group, where = config["groups"][name], f"groups.{name}"
    _check_tasks(group["tasks"], f"{where}.tasks")
    check_known("method", group["methods"], config["methods"], f"{where}.methods")
    if BASELINE not in group["methods"]:
        raise _mistake(f"{where}.methods", f"'{BASELINE}' is missing. It is the baseline of every group: add it.")


def _check_priced(config: Config) -> None:
    """The cost table that the workflow measures knows one exit layer and size of draft vocabulary: what runs and reads
    it must be of these."""
    readers = [(f"methods.{name}", [config["methods"][name]["head"]]) for name in _priced_methods(config)]
    for name in config["run"]["replays"]:
        if MEASURED in (config["replays"][name]["costs"] or [MEASURED]):
            readers.append((f"replays.{name}", config["replays"][name]["heads"]))
        readers.append((f"replays.{name}, predicted", predicted_heads(config, name)))
        for table in config["replays"][name]["costs"] or []:
            _check_costs(config, table, f"replays.{name}", config["replays"][name]["heads"])
    measured = config["hardware"]
    for where, heads in readers:
        for head in heads:
            layer, rows = (config["heads"][head][key] for key in ("exit_layer", "vocab_rows"))
            if layer != measured["exit_layer"]:
                raise _mistake(
                    where,
                    f"head '{head}' exits at layer {layer}, but the cost table is measured for "
                    f"{measured['exit_layer']} (hardware.exit_layer). Set that, or name `costs` of this layer.",
                )
            if rows != measured["draft_rows"]:
                raise _mistake(
                    where,
                    f"head '{head}' has vocab_rows {rows}, but the cost table is measured for "
                    f"{measured['draft_rows']} (hardware.draft_rows). Set that, or name `costs` of such a head.",
                )


def predicted_heads(config: Config, replay: str) -> list[str]:
    """Heads whose chains a group that runs decodes and this replay follows: their speed is predicted."""
    followed = config["replays"][replay]
    if followed["group"] not in config["run"]["groups"]:
        return []
    return [head for head in chained_heads(config, followed["group"]) if head in followed["heads"]]


def chained_heads(config: Config, group: str) -> list[str]:
    """Heads that methods of a group draft chains with, of a length that a trace holds, by rules that forget."""
    methods = [config["methods"][method] for method in config["groups"][group]["methods"]]
    chains = [m for m in methods if m["drafter"] == "exit_head" and not m["tree"]]
    return list(dict.fromkeys(m["head"] for m in chains if all(_retraceable(config, rule) for rule in method_rules(m))))


def method_rules(method: Config) -> list[Config]:
    """Controllers of a method's drafts, and of its copies."""
    return [part["controller"] for part in (method, method["lookup"]) if part and part["controller"]]


def _retraceable(config: Config, rule: Config) -> bool:
    return rule.get("reset_on") != "never" and make_controller(rule).k_max <= config["trace"]["k_max"]


def published_costs(name: str) -> Path | None:
    """The published cost table of this name; None if it is a file of the user's. Relative to here where possible."""
    path = PUBLISHED_HARDWARE / f"{name}.json"
    if not path.is_file():
        return None
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _check_costs(config: Config, name: str, where: str, heads: Iterable[str]) -> None:
    """A cost table goes by the name of a published one, or is a file; one of a model that runs knows its exit layer."""
    path = published_costs(name)
    if path is None:
        if name != MEASURED and not Path(name).exists() and not name.endswith(".json"):
            files = sorted(PUBLISHED_HARDWARE.glob("*/*.json"))
            known = [str(file.relative_to(PUBLISHED_HARDWARE).with_suffix("")) for file in files]
            raise _mistake(f"{where}.costs", unknown("cost table", name, [MEASURED, *known]))
        return
    table = read_json(path, "Fetch the file again.")
    for head in heads if table["model"] in config["run"]["models"] else []:
        found = config["heads"][head]
        for key, measured in (("exit_layer", table["exit_layer"]), ("vocab_rows", table["draft_rows"])):
            if found[key] not in (measured, "full"):
                raise _mistake(
                    f"{where}.costs",
                    f"head '{head}' has {key} {found[key]}, but table '{name}' of the same model is measured for "
                    f"{measured}. Leave it out, or measure one for this head and name its file.",
                )


def _priced_methods(config: Config) -> list[str]:
    """Methods that run and decide by the cost table which the workflow measures."""
    run = config["run"]
    used = dict.fromkeys(
        name for group in (*run["groups"], *run["views"]) for name in config["groups"][group]["methods"]
    )
    methods = {name: config["methods"][name] for name in used}
    return [
        name
        for name, method in methods.items()
        if method["controller"] and method["costs"] is None and CONTROLLERS[method["controller"]["name"]].uses_costs
    ]


def _check_replay(config: Config, name: str) -> None:
    replay, where = config["replays"][name], f"replays.{name}"
    check_known("group", [replay["group"]], config["groups"], f"{where}.group")
    group = config["groups"][replay["group"]]
    check_known(f"task of group {replay['group']}", replay["tasks"] or [], group["tasks"], f"{where}.tasks")
    check_known("head", replay["heads"], config["heads"], f"{where}.heads")
    for head in replay["heads"]:
        kind = config["heads"][head]["kind"]
        if kind != "exit_layer":
            raise _mistake(
                f"{where}.heads", f"'{head}' is of kind {kind}, but cost tables know what exit heads cost. Remove it."
            )
    if group["temperature"] > 0:
        raise _mistake(f"{where}.group", f"'{replay['group']}' samples, and only greedy outputs can be replayed.")
    if any("tree" in controller for controller in replay["controllers"]):
        raise _mistake(f"{where}.controllers", "replay follows recorded chains and knows no trees: remove tree.")
    most = config["trace"]["k_max"]
    if replay["lookup"] is not None:
        _check_lookup(replay["lookup"], f"{where}.lookup")
        longest = make_controller(replay["lookup"]["controller"]).k_max
        if longest > most:
            raise _mistake(f"{where}.lookup", f"it may copy {longest} tokens, but trace.k_max is {most}: lower k_max.")
    try:
        longest = max(make_controller(settings).k_max for settings in expand(replay["controllers"]))
    except (EesdError, TypeError) as error:
        raise _mistake(f"{where}.controllers", error) from error
    if longest > most:
        raise _mistake(
            where, f"a controller drafts up to {longest} tokens, but trace.k_max is {most}: lower its k_max."
        )
