"""Synthetic rows and head cards for the tests of eesd.analysis: valid by construction, spoiled by keyword."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

METHODS = ("vanilla", "hf_generate", "static_k2", "static_k4", "eesd")
TASKS = ("asdiv", "xsum", "humaneval")
# Longest draft, acceptance probability and seconds per drafted token of each toy method.
TOYS = {"vanilla": (0, 0.0), "static_k2": (2, 0.7), "static_k4": (4, 0.6), "eesd": (8, 0.7)}


def make_row(method: str = "vanilla", item: str = "asdiv-1", **changes: Any) -> dict[str, Any]:
    """One valid row of 5 output tokens; keywords replace fields."""
    peer = method == "hf_generate"
    rounds = [] if peer else [[0, 0, "none"]] * 4 if method == "vanilla" else [[2, 1, "controller"], [2, 1, "length"]]
    row = {
        "schema": 1,
        "model": "toy",
        "task": "asdiv",
        "dataset": "ASDiv (toy)",
        "group": "main",
        "method": method,
        "item": item,
        "repeat": 0,
        "order": 0,
        "seed": 0,
        "decoding": "greedy",
        "temperature": 0.0,
        "dtype": "float32",
        "device": "cpu",
        "device_name": "Toy CPU",
        "engine": "torch",
        "threads": 2,
        "crowding": 0.0,
        "settings": {},
        "settings_hash": f"hash-{method}",
        "prompt_tokens": [1, 2, 3],
        "output_tokens": [5, 6, 7, 8, 9],
        "text": "five tokens of text",
        "finish": "length",
        "rounds": rounds,
        "seconds": split_seconds(1.0, peer),
        "lossy": False,
        "scores": {"exact_match": 1.0},
        "comparison": comparison("baseline" if method == "vanilla" else "identical"),
        "versions": {"python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0", "eesd": "0.1.0"},
        "commit": "abc1234",
        "time": "2026-01-31T12:00:00Z",
    }
    return copy.deepcopy({**row, **changes})


def comparison(name: str, position: int | None = None, **evidence: Any) -> dict[str, Any]:
    """The `comparison` field of a row."""
    empty = {"vanilla_token": None, "token": None, "gap": None, "bound": None}
    return {"class": name, "position": position, **empty, **evidence}


def split_seconds(total: float, peer: bool = False, drafting: float = 0.0) -> dict[str, float | None]:
    """The `seconds` field of a row: an eighth for the prefill, the rest for the rounds."""
    if peer:
        return {"prefill": None, "draft": None, "verify": None, "control": None, "other": None, "total": total}
    prefill, draft = total * 0.125, total * drafting
    parts = {"prefill": prefill, "draft": draft, "control": draft * 0.05, "other": total * 0.02}
    return {**parts, "verify": total - sum(parts.values()), "total": total}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def unit(item: str = "asdiv-1", methods: tuple[str, ...] = ("vanilla", "eesd"), **changes: Any) -> list[dict[str, Any]]:
    """One row of each method for one item."""
    return [make_row(method, item, **changes) for method in methods]


def realistic_rows(
    tasks: tuple[str, ...] = TASKS,
    methods: tuple[str, ...] = METHODS,
    n_items: int = 20,
    group: str = "main",
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Rows that look like a run: random acceptance, lengths and times, units in shuffled order."""
    rng = random.Random(f"{seed}-{group}")
    rows = []
    for task in tasks:
        for index in range(n_items):
            output = [rng.randrange(49152) for _ in range(rng.randrange(30, 129))]
            ease = rng.gauss(0, 0.08) + 0.1 * tasks.index(task)
            made = [_toy_row(rng, method, f"{task}-{index}", task, group, output, ease) for method in methods]
            rows += rng.sample(made, len(made))
    return rows


def _toy_row(
    rng: random.Random, method: str, item: str, task: str, group: str, output: list[int], ease: float
) -> dict[str, Any]:
    noise = rng.uniform(0.97, 1.05)
    scores = {"exact_match": float(rng.random() < 0.4)} if task != "xsum" else {"rouge1": 0.2, "rougeL": 0.15}
    changes = {"task": task, "dataset": f"{task} (toy)", "group": group, "output_tokens": output, "scores": scores}
    if method == "hf_generate":
        return make_row(method, item, seconds=split_seconds(len(output) * 0.058 * noise, peer=True), **changes)
    longest, acceptance = TOYS.get(method, (3, 0.5))
    rounds, tokens = [], 1
    while tokens < len(output):
        drafted = min(rng.randint(1, longest) if method == "eesd" else longest, len(output) - tokens - 1)
        hits = 0
        while hits < drafted and rng.random() < acceptance + ease:
            hits += 1
        rounds.append([drafted, hits, "none" if not longest else "controller"])
        tokens += hits + 1
    drafting = 0.006 * sum(one[0] for one in rounds)
    total = (0.2 + drafting + len(rounds) * (0.04 + 0.002 * longest)) * noise
    return make_row(method, item, rounds=rounds, seconds=split_seconds(total, drafting=drafting / total), **changes)


def write_card(path: Path, head: str = "exit4", **changes: Any) -> Path:
    """A head card as the trainer writes it."""
    card = {
        "head": head,
        "kind": "exit_layer",
        "exit_layer": 4,
        "vocab_rows": 8192,
        "init": "last",
        "loss": "soft",
        "context": "none",
        "train_tokens": 60000,
        "model": "toy",
        "settings": {"seed": 0},
        "train_seconds": 100.0,
        "trained": {
            "device_name": "Toy CPU",
            "versions": {"torch": "2.13.0"},
            "commit": "abc1234",
            "time": "2026-01-31T12:00:00Z",
        },
        "calibration": {
            "x": [0.0, 1.0],
            "y": [0.1, 0.9],
            "ece": 0.0125,
            "ece_raw": 0.125,
            "bins": [
                {"predicted": 0.15, "observed": 0.16, "tokens": 300},
                {"predicted": 0.82, "observed": 0.8, "tokens": 100},
            ],
            "bins_raw": [
                {"predicted": 0.25, "observed": 0.16, "tokens": 300},
                {"predicted": 1.0, "observed": 0.8, "tokens": 100},
            ],
        },
        "agreement": {
            "asdiv": {
                "top1": [0.45, 0.41],
                "expected_acceptance": [0.40, 0.36],
                "chain_length": 0.7,
                "positions": 1234,
            },
            "xsum": {"top1": [0.38, 0.34], "expected_acceptance": [0.36, 0.33], "chain_length": 0.5, "positions": 2345},
            "humaneval": {
                "top1": [0.56, 0.51],
                "expected_acceptance": [0.51, 0.46],
                "chain_length": 1.0,
                "positions": 3456,
            },
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**card, **changes}))
    return path


def write_exits(folder: Path) -> Path:
    """exit_layers.csv of two rules on heads of three depths."""
    from eesd.analysis.tables import write_tables

    rows, cards = [], []
    for index in range(4):
        rows.append(make_row("vanilla", f"asdiv-{index}"))
        for layer in (2, 4, 8):
            for rule in ({"name": "static", "k": 2}, {"name": "draft_verify"}):
                settings = {"drafter": "exit_head", "head": f"exit{layer}", "controller": rule}
                seconds = split_seconds(0.6 + 0.02 * layer + 0.01 * index)
                name = f"exit{layer}_{rule['name']}"
                rows.append(make_row(name, f"asdiv-{index}", settings=settings, seconds=seconds))
    for layer in (2, 4, 8):
        cards.append(write_card(folder / f"exit{layer}" / "card.json", f"exit{layer}", exit_layer=layer))
    write_tables([write_rows(folder / "rows.jsonl", rows)], cards, folder)
    return folder / "exit_layers.csv"


def write_study(
    folder: Path, key: str, values: list[Any], seeds: int = 1, others: dict[str, Any] | None = None
) -> Path:
    """heads.csv of a study of one setting that cards tell; later values and seeds agree more often."""
    from eesd.analysis.study import write_study_table

    cards, varied = [], {}
    for place, value in enumerate(values):
        for seed in range(seeds):
            head = f"toy.{key}-{value}.s{seed}".lower()
            top1 = 0.4 + 0.1 * place + 0.01 * seed
            found = {"top1": [top1, top1 / 2], "expected_acceptance": [0.3, 0.2], "chain_length": 1.0 + place}
            agreement = {task: {**found, "positions": 1234} for task in ("xsum", "asdiv")}
            changes = {key: value, "settings": {"seed": seed}, "agreement": agreement}
            cards.append(write_card(folder / head / "card.json", head, **changes))
            varied[head] = {key: value, **(others or {})}
    write_study_table(cards, {"study": "toy", "varied": list(varied.items())}, folder / "heads.csv")
    return folder


def write_costs(path: Path, model: str = "toy", **changes: Any) -> Path:
    """A cost table as `eesd hardware` writes it, two contexts, with round numbers."""
    pieces = []
    for context in (128, 1024):
        singles = {"vanilla": 0.009, "first_layers": 0.001, "exit_layer": 0.0005, "draft_head": 0.0005, "draft": 0.002}
        found = [(name, 1, seconds) for name, seconds in singles.items()]
        found += [(name, k, 0.008 + 0.001 * k) for k in range(1, 17) for name in ("verify", "verify_from_exit")]
        pieces += [
            {"path": name, "query_tokens": k, "context_tokens": context, "seconds": seconds, "bytes": 270_000_000}
            for name, k, seconds in found
        ]
    table = {
        "model": model,
        "device": "Toy CPU",
        "dtype": "float32",
        "engine": "torch",
        "threads": 2,
        "exit_layer": 4,
        "read_bandwidth_bytes_per_s": 45e9,
        "controller_step_s": 1e-6,
        "costs": pieces,
    }
    path.write_text(json.dumps({**table, **changes}))
    return path
