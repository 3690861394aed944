"""Combinations that cannot work end before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from eesd.errors import EesdError
from eesd.settings import load_config, predicted_groups, prediction_traces
from tests.test_settings import mistake, overlay


def test_the_cost_table_is_of_the_layer_that_heads_exit_at(tmp_path: Path):
    heads = "heads: {deep1: {exit_layer: 6}}\nrun: {groups: [main], replays: [%s]}"
    with pytest.raises(EesdError, match=r"methods.eesd_cost: head 'deep1' exits at layer 6, but .* measured for 1"):
        load_config([overlay(tmp_path, heads % "")])
    with pytest.raises(EesdError, match=r"replays.steps: head 'deep1' exits at layer 6"):
        load_config([overlay(tmp_path, heads % "steps" + "\nmethods: {eesd_cost: {costs: mine.json}}")])
    assert load_config([overlay(tmp_path, heads % "steps" + "\nhardware: {exit_layer: 6}")])


def test_the_cost_table_is_of_a_head_of_that_vocabulary(tmp_path: Path):
    text = "heads: {deep1: {vocab_rows: %s}}\nrun: {groups: [main], replays: []}"
    with pytest.raises(EesdError, match=r"methods.eesd_cost: head 'deep1' has vocab_rows 64, .* for 1024"):
        load_config([overlay(tmp_path, text % 64)])
    with pytest.raises(EesdError, match="head 'deep1' has vocab_rows full"):
        load_config([overlay(tmp_path, text % "full")])
    assert load_config([overlay(tmp_path, text % "full" + "\nhardware: {draft_rows: full}")])


def test_a_predicted_head_exits_where_costs_are_measured(tmp_path: Path):
    """Its replay is priced by another model's table alone, but its group is decoded, so its speed is predicted."""
    text = """
heads: {deep1: {exit_layer: 6}}
run: {groups: [%s], replays: [steps], views: []}
groups: {one: {methods: [vanilla, eesd]}, two: {methods: [vanilla, lookup]}}
replays: {steps: {group: one, costs: [nvidia-h200/llama-2-70b]}}"""
    with pytest.raises(EesdError, match=r"replays.steps, predicted: head 'deep1' exits at layer 6"):
        load_config([overlay(tmp_path, text % "one")])
    assert load_config([overlay(tmp_path, text % "two")])


def test_views_follow_greedy_decodes(tmp_path: Path):
    with pytest.raises(EesdError, match=r"run.views: group 'sampled' samples"):
        load_config([overlay(tmp_path, "run: {views: [sampled]}")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("heads: {deep4: {init: dep1}}", "heads.deep4.init: Unknown init 'dep1'. Did you mean 'deep1'?"),
        ("heads: {deep4: {init: deep4}}", "heads.deep4.init: deep4 from deep4: one of these has to start anew"),
        (
            "heads: {deep4: {init: deep1}, deep1: {init: deep4}}",
            "deep1 from deep4 from deep1: one of these has to start",
        ),
        (
            "heads: {deep1: {output_head: free, vocabulary: frequent}, deep4: {init: deep1, output_head: free}}",
            "deep4.vocab_rows: is 8192, but 'deep1', which it goes on from, has 1024",
        ),
        ("heads: {paper4: {vocabulary: prompt}}", "heads.paper4.vocabulary: `prompt` exchanges rows of the target's"),
        ("heads: {deep4: {init: medusa4}}", "heads.deep4.kind: is exit_layer, but 'medusa4', which it goes on from"),
        ("heads: {medusa4: {init: lnes}}", "heads.medusa4.init: Unknown init 'lnes'. Did you mean 'lens'?"),
        ("heads: {lens: {}}", "heads.lens: last, same, lens are values of `init`. Give this head another name"),
    ],
)
def test_heads_go_on_from_heads_of_their_shape(tmp_path: Path, text: str, message: str):
    assert message in mistake(tmp_path, text)


def test_only_chains_that_a_trace_can_follow_and_the_table_can_price_are_predicted(tmp_path: Path):
    text = """
methods: {long: {drafter: exit_head, head: deep1, controller: {name: confidence}}}
groups: {one: {methods: [vanilla, long]}}
run: {groups: [one], replays: [regret], views: []}
replays: {regret: {group: one}}"""
    assert predicted_groups(load_config([overlay(tmp_path, text)])) == []
    assert predicted_groups(load_config([overlay(tmp_path, text.replace("confidence}", "confidence, k_max: 9}"))])) == [
        "one"
    ]
    # A replay of another head, priced by another model's table, says nothing of what this machine will take.
    text = "replays: {regret: {heads: [deep4, deep1], costs: [nvidia-h200/llama-2-70b]}}"
    config = load_config([overlay(tmp_path, text)])
    assert {Path(path).stem for path in prediction_traces(config, "smollm2-135m", "main")} == {"deep1"}
    config["run"]["replays"] = []
    assert {Path(path).stem for path in prediction_traces(config, "smollm2-135m", "main")} == {"deep1"}
