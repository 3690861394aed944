"""The self-generated corpus: prompts of the training splits, continued by the target, with states and teacher
probabilities.

    python -m eesd corpus --model resources/models/smollm2-135m --settings '{...}' --out results/corpus/m/default

Work is cut into shards of one batch. They lie in `<out>.work/` until all are there, so an interrupted run goes on
where it stopped; then the folder is renamed. Prompts of the calibration split become the held-out shards that
training is judged by.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eesd.decoding.sampling import Sampling
from eesd.distill.record import Trace, record_batch
from eesd.errors import EesdError
from eesd.files import atomic_path, settings_hash, source_hash, write_atomic
from eesd.models.engine import attach_engine
from eesd.models.loading import load_target, load_tokenizer
from eesd.models.special import eos_ids, fingerprint
from eesd.models.transformer import Transformer
from eesd.progress import progress
from eesd.tasks import TASKS, DataSource, encode_prompt


@dataclass(frozen=True)
class Shard:
    """One batch of the plan: prompts of one task and split, as token ids."""

    name: str
    task: str
    split: str
    prompts: list[list[int]]


def generate_corpus(model_dir: Path, settings: Mapping[str, Any], out: Path) -> None:
    """Generate every shard that is missing, write `corpus.json`, and move the finished folder to `out`."""
    target = load_target(model_dir, settings["dtype"])
    attach_engine(target)
    tokenizer = load_tokenizer(model_dir)
    for layer in settings["exit_layers"]:
        target.config.check_exit_layer(layer)
    shards = plan_shards(settings, tokenizer)
    _check_lengths(shards, settings, target)
    work = _work_folder(out, model_dir, settings, shards)
    sampling = Sampling(settings["temperature"])
    stop = eos_ids(model_dir, tokenizer)
    done = [shard for shard in shards if (work / f"{shard.name}.safetensors").exists()]
    with progress(f"corpus {out.name}", len(shards), "batch", initial=len(done)) as bar:
        for index, shard in enumerate(shards):
            path = work / f"{shard.name}.safetensors"
            if path.exists():
                continue
            began = perf_counter()
            traces = record_batch(
                target,
                shard.prompts,
                settings["exit_layers"],
                settings["max_new_tokens"],
                sampling,
                stop,
                settings["seed"] + index,
            )
            seconds = perf_counter() - began
            written = sum(len(t.tokens) - t.prompt_tokens for t in traces)
            _save_shard(path, shard, traces, seconds)
            bar.set_postfix_str(f"{shard.task} {written / seconds:.0f} tokens/s")
            bar.update()
    write_atomic(work / "corpus.json", json.dumps(_summary(work, shards, settings, fingerprint(model_dir)), indent=2))
    shutil.rmtree(out, ignore_errors=True)
    os.replace(work, out)


def plan_shards(settings: Mapping[str, Any], tokenizer: Any) -> list[Shard]:
    """The batches to generate: the first prompts of each task's split that fit, sorted by length within a task."""
    source = DataSource.of(settings)
    shards = []
    for split, wanted in (("train", settings["prompts_per_task"]), ("calibration", settings["held_out_per_task"])):
        for task in settings["tasks"]:
            prompts = []
            for item in TASKS[task].items(split, source):
                ids = encode_prompt(tokenizer, item.prompt)
                if len(ids) <= settings["max_prompt_tokens"]:
                    prompts.append(ids)
                if len(prompts) == wanted:
                    break
            if not prompts:
                raise EesdError(
                    f"Task {task} has no {split} prompt of at most {settings['max_prompt_tokens']} tokens. "
                    "Raise max_prompt_tokens."
                )
            prompts.sort(key=len)
            batches = [prompts[i : i + settings["batch"]] for i in range(0, len(prompts), settings["batch"])]
            shards += [Shard(f"{split}-{task}-{i:04d}", task, split, batch) for i, batch in enumerate(batches)]
    # Tasks mixed, so that the rate and the time left mean something from the start.
    random.Random(settings["seed"]).shuffle(shards)
    return shards


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
    plan = [[shard.name, shard.prompts] for shard in shards]
    stamp = settings_hash([fingerprint(model_dir), dict(settings), plan, source_hash()])
    stamp_file = work / "settings_hash"
    if work.exists() and (not stamp_file.exists() or stamp_file.read_text() != stamp):
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    write_atomic(stamp_file, stamp)
    return work


def _save_shard(path: Path, shard: Shard, traces: list[Trace], seconds: float) -> None:
    """Traces end to end in one safetensors file; `lengths` [rows, 2] holds prompt and total tokens of each."""
    tensors = {
        "lengths": torch.tensor([[t.prompt_tokens, len(t.tokens)] for t in traces], dtype=torch.int32),
        "tokens": torch.cat([t.tokens for t in traces]),
        "teacher_ids": torch.cat([t.teacher_ids for t in traces]),
        "teacher_probs": torch.cat([t.teacher_probs for t in traces]),
    }
    for layer in traces[0].states:
        tensors[f"states.{layer}"] = torch.cat([t.states[layer] for t in traces])
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, {"task": shard.task, "split": shard.split, "seconds": f"{seconds:.3f}"})


def _summary(work: Path, shards: list[Shard], settings: Mapping[str, Any], model: str) -> dict[str, Any]:
    """What the corpus holds: the model's fingerprint, settings, and generated tokens by split and task."""
    tokens: dict[str, dict[str, int]] = {"train": {}, "calibration": {}}
    for shard in shards:
        lengths = load_file(work / f"{shard.name}.safetensors")["lengths"]
        tokens[shard.split][shard.task] = tokens[shard.split].get(shard.task, 0) + int(
            (lengths[:, 1] - lengths[:, 0]).sum()
        )
    files = {shard.name: {"task": shard.task, "split": shard.split, "rows": len(shard.prompts)} for shard in shards}
    return {
        "model": model,
        "settings": dict(settings),
        "generated_tokens": tokens,
        "shards": dict(sorted(files.items())),
    }


def read_corpus(folder: Path, exit_layer: int, split: str) -> dict[str, list[Trace]]:
    """Traces of one split by task, with the states of one exit layer only.

    Raises EesdError when the corpus is incomplete or does not hold that layer.
    """
    index_file = folder / "corpus.json"
    if not index_file.exists():
        raise EesdError(
            f"{folder}: no complete corpus here (no corpus.json). Generate it: `snakemake --cores all {folder}`."
        )
    index = json.loads(index_file.read_text())
    layers = index["settings"]["exit_layers"]
    if exit_layer not in layers:
        raise EesdError(
            f"{folder}: holds states of layers {layers}, not {exit_layer}. Generate the corpus with that layer."
        )
    traces: dict[str, list[Trace]] = {}
    for name, entry in index["shards"].items():
        if entry["split"] == split:
            tensors = load_file(folder / f"{name}.safetensors")
            traces.setdefault(entry["task"], []).extend(_split_shard(tensors, exit_layer))
    return traces


def _split_shard(tensors: dict[str, Tensor], exit_layer: int) -> list[Trace]:
    """Undo `_save_shard` for one exit layer."""
    lengths = tensors["lengths"].tolist()
    totals = [total for _, total in lengths]
    outputs = [total - prompt for prompt, total in lengths]
    parts = zip(
        lengths,
        tensors["tokens"].split(totals),
        tensors[f"states.{exit_layer}"].split([total - 1 for total in totals]),
        tensors["teacher_ids"].split(outputs),
        tensors["teacher_probs"].split(outputs),
        strict=True,
    )
    return [
        Trace(prompt, tokens, {exit_layer: states}, ids, probs) for (prompt, _), tokens, states, ids, probs in parts
    ]
