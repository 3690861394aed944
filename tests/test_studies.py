"""Studies: every variation is a head like any other, under a name that says what it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from eesd.errors import EesdError
from eesd.settings import complete, load_config, resolve_corpus, resolve_head, resolve_study, study_cards
from eesd.studies import variations

MODEL = "smollm2-135m"


def configured(tmp_path: Path, overlay: dict) -> dict:
    path = tmp_path / "overlay.yaml"
    path.write_text(yaml.safe_dump(overlay))
    return load_config([path])


def test_all_combinations_of_values_and_seeds_change_the_base_alone(tmp_path: Path):
    entry = {"base": "deep4", "vary": {"depth": [1, 2], "loss": [{"soft": 1, "tv": 0.5}, {"hard": 1}]}, "seeds": [7, 8]}
    config = configured(tmp_path, {"studies": {"mine": entry}, "run": {"studies": ["mine"]}})
    made = variations(config, "mine")
    assert [one.head for one in made][:3] == [
        "mine.depth-1.loss-soft1-tv0.5.s7",
        "mine.depth-1.loss-soft1-tv0.5.s8",
        "mine.depth-1.loss-hard1.s7",
    ]
    assert len(made) == 2 * 2 * 2
    assert made[0].varied == {"depth": 1, "loss": {"soft": 1, "tv": 0.5}}
    settings = resolve_head(config, made[0].head)
    assert settings["loss"] == {"soft": 1, "hard": 0, "tv": 0.5, "text": 0}
    changed = {key for key, value in settings.items() if config["heads"]["deep4"][key] != value}
    assert changed == {"depth", "loss", "seed"}
    # As rules pass it on, with sorted keys, the order of the study stays.
    passed = json.loads(json.dumps(resolve_study(config, "mine"), sort_keys=True))["varied"]
    assert passed == [[one.head, one.varied] for one in made]
    assert study_cards(config, MODEL, "mine")[0] == f"results/heads/{MODEL}/{made[0].head}/card.json"


def test_variants_have_names(tmp_path: Path):
    variants = {"soft": {}, "hard_shallow": {"loss": {"hard": 1}, "exit_layer": 2}}
    config = configured(tmp_path, {"studies": {"mine": {"variants": variants, "seeds": [0]}}})
    made = {one.head: one for one in variations(config, "mine")}
    assert set(made) == {"mine.soft.s0", "mine.hard_shallow.s0"}
    assert made["mine.hard_shallow.s0"].varied == {"variant": "hard_shallow"}
    assert made["mine.soft.s0"].settings == config["heads"]["deep4"]


def test_a_head_of_an_earlier_study_is_not_trained_again(tmp_path: Path):
    studies = {"depth": {"vary": {"exit_layer": [2, 4]}}, "rows": {"vary": {"vocab_rows": [1024, 8192]}}}
    config = configured(tmp_path, {"studies": studies, "run": {"studies": ["depth", "rows"]}})
    shared = [f"depth.exit_layer-4.s{seed}" for seed in range(3)]
    assert [one.head for one in variations(config, "depth")][3:] == shared
    assert resolve_study(config, "rows")["varied"][3:] == [[head, {"vocab_rows": 8192}] for head in shared]
    assert not any("8192" in head for head in config["heads"])
    assert complete({**config}) == config


def test_only_studies_that_run_define_heads_and_record_layers(tmp_path: Path):
    config = load_config()
    assert {"exit_layer", "init", "loss", "vocab_rows", "learning_curve", "context"} <= set(config["studies"])
    assert all("." not in head for head in config["heads"])
    assert resolve_corpus(config, "default")["exit_layers"] == [1, 4]
    with pytest.raises(EesdError, match=r"Unknown study among run\.studies 'init'"):
        study_cards(config, MODEL, "init")
    config = configured(tmp_path, {"run": {"studies": ["exit_layer"]}})
    assert resolve_corpus(config, "default")["exit_layers"] == [1, 2, 4, 6, 8, 12]
    assert len(config["heads"]) == len(load_config()["heads"]) + 6 * 3
    assert resolve_corpus(config, "default")["labels"] == "answers"
    changed = {"heads": {"deep4": {"learn": "texts"}}}
    assert resolve_corpus(configured(tmp_path, changed), "default")["labels"] == "texts"
    assert complete({**config}) == config


def test_the_default_learning_curve_has_five_points():
    assert len(load_config()["studies"]["learning_curve"]["vary"]["train_tokens"]) >= 5
