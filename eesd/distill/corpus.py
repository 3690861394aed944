"""The corpus: prompts of the training splits, continued by the target, with states and teacher probabilities.

    python -m eesd corpus --model resources/models/smollm2-135m --settings '{...}' --out results/corpus/m/default

Work is cut into shards of one batch. They lie in `<out>.work/` until all are there, or the training shards hold as
many tokens as asked for, so an interrupted run goes on where it stopped; then the folder is renamed. Prompts of the
calibration split are what a head is calibrated on, those of the evaluation split what it is judged by.

With `text: reference` the training part holds the tasks' own answers, read by the target and not written by it; that is
training without self-distillation. Heads are still calibrated and judged on what the target writes.

With `labels: texts` the training part has the target's probabilities within prompts too: news to learn from that no
decoding has to write.

With `states: recomputed` it holds the texts alone, a thousandth of the space, for heads of any exit layer: training
runs the whole target on every batch.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from eesd.distill.record import Trace, record_batch, record_given
from eesd.errors import EesdError
from eesd.facts import provenance
from eesd.files import atomic_path, settings_hash, source_hash, write_atomic
from eesd.models.engine import attach_engine
from eesd.models.loading import load_target, load_tokenizer
from eesd.models.special import eos_ids, fingerprint, revision
from eesd.models.transformer import Transformer
from eesd.progress import progress
from eesd.tasks import TASKS, DataSource, encode_prompt
from eesd.tasks.base import Item

TEACHER = ("teacher_ids", "teacher_probs")


@dataclass(frozen=True)
class Shard:
    """One batch of the plan: prompts of one task and split, as token ids."""

    name: str
    task: str
    split: str
    prompts: list[list[int]]
    temperatures: list[float]  # of the answers to each prompt
    answers: list[list[int]] | None = None  # given ones, one a prompt; None where the target writes them
    learnt_from: list[int] | None = None  # the first token of each prompt that has labels; None: of its answer


def generate_corpus(model_dir: Path, settings: Mapping[str, Any], out: Path) -> None:
    """Generate every shard that is missing, write `corpus.json`, and move the finished folder to `out`."""
    target = load_target(model_dir, settings["dtype"])
    # As this machine decides: states that another one computes again are to be of the same type.
    settings = {**settings, "dtype": str(target.dtype).removeprefix("torch.")}
    attach_engine(target)
    tokenizer = load_tokenizer(model_dir)
    for layer in settings["exit_layers"]:
        target.config.check_exit_layer(layer)
    shards = plan_shards(settings, tokenizer)
    _check_lengths(shards, settings, target)
    work = _work_folder(out, model_dir, settings, shards)
    stop = eos_ids(model_dir, tokenizer)
    budget = settings["tokens"]
    made, present = 0, []
    with progress(f"corpus {out.name}", budget or len(shards), "token" if budget else "batch") as bar:
        for index, shard in enumerate(shards):
            path, train = work / f"{shard.name}.safetensors", shard.split == "train"
            if budget and train and made >= budget:
                break
            if not path.exists():
                _generate_shard(path, shard, target, settings, stop, settings["seed"] + index)
            present.append(shard)
            tokens, seconds = _shard_facts(path)
            made += tokens * train
            bar.set_postfix_str(f"{shard.task} {tokens / max(seconds, 0.001):.0f} tokens/s", refresh=False)
            bar.update(tokens * train if budget else 1)
    # Shards beyond the budget are left over from a run with a larger one.
    names = {shard.name for shard in present}
    for file in work.glob("*.safetensors"):
        if file.stem not in names:
            file.unlink()
    index = _summary(work, present, settings, fingerprint(model_dir))
    # Engines round differently, and labels with them.
    index["written"] = {**provenance(target.device), "engine": target.engine.name}
    write_atomic(work / "corpus.json", json.dumps(index, indent=2))
    shutil.rmtree(out, ignore_errors=True)
    os.replace(work, out)


def _generate_shard(
    path: Path, shard: Shard, target: Transformer, settings: Mapping[str, Any], stop: Collection[int], seed: int
) -> None:
    began = perf_counter()
    layers = [*settings["exit_layers"], target.config.num_layers] if settings["states"] == "stored" else []
    if shard.answers is not None:
        traces = record_given(target, shard.prompts, shard.answers, layers, shard.learnt_from)
    else:
        length = settings["max_new_tokens"]
        prompts, heat, first = shard.prompts, shard.temperatures, shard.learnt_from
        traces = record_batch(target, prompts, layers, length, heat, stop, seed, first)
    _save_shard(path, shard, traces, perf_counter() - began)


def plan_shards(settings: Mapping[str, Any], tokenizer: Any) -> list[Shard]:
    """The batches to generate: the first prompts of each task's split that fit, sorted by length within a task.

    A task with fewer prompts than answers wanted answers each several times, at the next of the `temperatures`; these
    answers share a batch, and the prompt is run once; a given answer comes once. Shards of calibration and evaluation
    come first. Training shards are mixed, so that a budget of tokens takes the same share of every task.
    """
    shards, order = [], random.Random(settings["seed"])
    for split in ("calibration", "evaluation", "train"):
        of_split = []
        for task in settings["tasks"]:
            wanted = settings[f"{split}_answers"]
            if split == "train":
                wanted = settings["train_answers_by_task"].get(task, wanted)
            given = split == "train" and settings["text"] == "reference"
            chosen = _prompts(task, split, wanted, settings, tokenizer)
            again = split == "train" and not given
            times = min(-(-wanted // len(chosen)), len(settings["temperatures"])) if again else 1
            temperatures = settings["temperatures"][:times] if again else [0.0]
            size = max(1, settings["batch"] // times)
            learns = split == "train" and settings["labels"] == "texts"
            # What all prompts of a task begin with teaches nothing new.
            common = max(1, _common([ids for _, ids in chosen])) if learns else 0
            for i in range(0, len(chosen), size):
                items, prompts = zip(*chosen[i : i + size], strict=True)
                answers = [_given_answer(item, task, settings, tokenizer) for item in items] if given else None
                name = f"{split}-{task}-{i // size:04d}"
                first = [min(common, len(prompt)) for prompt in prompts] if learns else None
                of_split.append(Shard(name, task, split, list(prompts), temperatures, answers, first))
        order.shuffle(of_split)
        shards += of_split
    return shards


def _prompts(
    task: str, split: str, wanted: int, settings: Mapping[str, Any], tokenizer: Any
) -> list[tuple[Item, list[int]]]:
    """At most `wanted` items with their prompts as token ids, sorted by length; EesdError where none fits."""
    prompts: list[tuple[Item, list[int]]] = []
    for item in TASKS[task].items(split, DataSource.of(settings)):
        ids = encode_prompt(tokenizer, item.prompt)
        if len(ids) <= settings["max_prompt_tokens"]:
            prompts.append((item, ids))
        if len(prompts) == wanted:
            break
    if not prompts:
        raise EesdError(
            f"Task {task} has no {split} prompt of at most {settings['max_prompt_tokens']} tokens. "
            "Raise max_prompt_tokens."
        )
    return sorted(prompts, key=lambda pair: len(pair[1]))


def _common(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with."""
    same = (len(set(tokens)) == 1 for tokens in zip(*prompts, strict=False))
    return sum(takewhile(bool, same))


def _given_answer(item: Item, task: str, settings: Mapping[str, Any], tokenizer: Any) -> list[int]:
    """The task's own answer as token ids, with the end of text, cut at `max_new_tokens`."""
    text = TASKS[task].written_answer(item)
    if not text.strip():
        raise EesdError(f"Task {task}, {item.id}: no written answer, which a corpus with `text: reference` reads.")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], *end]
    return ids[: settings["max_new_tokens"]]


def _check_lengths(shards: Sequence[Shard], settings: Mapping[str, Any], target: Transformer) -> None:
    limit, new = target.config.max_positions, settings["max_new_tokens"]
    longest = max(len(prompt) for shard in shards for prompt in shard.prompts)
    if longest + new > limit:
        raise EesdError(
            f"A training prompt has {longest} tokens; with max_new_tokens {new} that exceeds the model's context of "
            f"{limit}. Set max_prompt_tokens of the corpus to at most {limit - new}."
        )


def _work_folder(out: Path, model_dir: Path, settings: Mapping[str, Any], shards: Sequence[Shard]) -> Path:
    """`<out>.work`, emptied when it was begun with another model, other settings, prompts or code."""
    work = out.with_name(out.name + ".work")
    plan = [[shard.name, shard.prompts, shard.answers] for shard in shards]
    unbounded = {**settings, "tokens": None}  # another budget takes up the same work
    stamp = settings_hash([revision(model_dir), unbounded, plan, source_hash()])
    stamp_file = work / "settings_hash"
    if work.exists() and (not stamp_file.exists() or stamp_file.read_text() != stamp):
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    write_atomic(stamp_file, stamp)
    return work


def _save_shard(path: Path, shard: Shard, traces: list[Trace], seconds: float) -> None:
    """Traces end to end in one file; `lengths` [rows, 3]: prompt and all tokens of each, and `learnt_from`."""
    lengths = [[t.prompt_tokens, len(t.tokens), t.learnt_from] for t in traces]
    tensors = {
        "lengths": torch.tensor(lengths, dtype=torch.int32),
        "tokens": torch.cat([t.tokens for t in traces]),
    }
    if traces[0].teacher_ids is not None:
        for name in TEACHER:
            tensors[name] = torch.cat([getattr(t, name) for t in traces])
    for layer in traces[0].states:
        tensors[f"states.{layer}"] = torch.cat([t.states[layer] for t in traces])
    with atomic_path(path) as temporary:
        save_file(
            {name: t.cpu() for name, t in tensors.items()},
            temporary,
            {"task": shard.task, "split": shard.split, "seconds": f"{seconds:.3f}"},
        )


def _shard_facts(path: Path) -> tuple[int, float]:
    """Generated tokens of a shard and the seconds they took."""
    with safe_open(path, framework="pt") as file:
        lengths = file.get_tensor("lengths")
        return int((lengths[:, 1] - lengths[:, 0]).sum()), float(file.metadata()["seconds"])


def _summary(work: Path, shards: list[Shard], settings: Mapping[str, Any], model: str) -> dict[str, Any]:
    """What the corpus holds: the model's fingerprint, settings, and generated tokens by split and task."""
    tokens: dict[str, dict[str, int]] = {"train": {}, "calibration": {}, "evaluation": {}}
    for shard in shards:
        made, _ = _shard_facts(work / f"{shard.name}.safetensors")
        tokens[shard.split][shard.task] = tokens[shard.split].get(shard.task, 0) + made
    files = {
        shard.name: {"task": shard.task, "split": shard.split, "rows": len(shard.prompts) * len(shard.temperatures)}
        for shard in shards
    }
    return {
        "model": model,
        "settings": dict(settings),
        "generated_tokens": tokens,
        "shards": dict(sorted(files.items())),
    }


def read_index(folder: Path) -> dict[str, Any]:
    """What `corpus.json` says; EesdError when the corpus is incomplete."""
    index_file = folder / "corpus.json"
    if not index_file.exists():
        raise EesdError(
            f"{folder}: no complete corpus here (no corpus.json). Generate it: `snakemake --cores all {folder}`."
        )
    return json.loads(index_file.read_text())


def read_corpus(folder: Path, layers: Sequence[int], split: str) -> dict[str, list[Trace]]:
    """Traces of one split by task, with the states of these layers only; they stay on disk until they are used.

    Traces are texts alone where the corpus holds no states. Raises EesdError when the corpus is incomplete or holds
    states, but not those of a layer.
    """
    traces: dict[str, list[Trace]] = {}
    for name, entry in read_index(folder)["shards"].items():
        if entry["split"] == split:
            with safe_open(folder / f"{name}.safetensors", framework="pt") as file:
                stored = sorted(int(key[7:]) for key in file.keys() if key.startswith("states."))  # noqa: SIM118
                for layer in layers:
                    if stored and layer not in stored:
                        raise EesdError(
                            f"{folder}: holds states of layers {stored}, not {layer}. Generate the corpus with that "
                            "layer."
                        )
                traces.setdefault(entry["task"], []).extend(_split_shard(file, layers if stored else []))
    return traces


def _split_shard(file: Any, layers: Sequence[int]) -> list[Trace]:
    """Undo `_save_shard` for some layers."""
    lengths = file.get_tensor("lengths").tolist()
    totals = [total for _, total, _ in lengths]
    texts = zip(lengths, file.get_tensor("tokens").split(totals), strict=True)
    traces = [Trace(prompt, tokens, learnt_from=first) for (prompt, _, first), tokens in texts]
    for layer in layers:
        for trace, states in zip(
            traces, file.get_tensor(f"states.{layer}").split([n - 1 for n in totals]), strict=True
        ):
            trace.states[layer] = states
    if layers:
        for name in TEACHER:
            for trace, part in zip(traces, file.get_tensor(name).split([t.labels for t in traces]), strict=True):
                setattr(trace, name, part)
    return traces
