"""Training draft heads on a self-generated corpus.

    python -m eesd train --model resources/models/smollm2-135m --corpus results/corpus/smollm2-135m/default \
        --settings '{"exit_layer": 4, "vocab_rows": 8192, ...}' --out results/heads/smollm2-135m/deep4

A head starts from the target's own weights (eesd/distill/heads.py) and is trained along the corpus; the target stays
frozen. With the name of another head as `init`, it goes on from that head's weights instead, which lie in a folder of
that name beside `--out`. Several heads, each with `--settings` and `--out`, share one pass and what the target computes
in it.
Checkpoints in `<out>.work/` make an interrupted run go on.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from eesd.distill.batches import epoch_batches
from eesd.distill.calibrate import calibrate
from eesd.distill.checkpoint import load_checkpoint, save_checkpoint
from eesd.distill.corpus import read_corpus, read_index
from eesd.distill.evaluate import candidate_accuracies, evaluate
from eesd.distill.heads import Student, make_student, student_kind
from eesd.distill.losses import mixed_loss
from eesd.distill.origin import read_origin
from eesd.distill.record import Complete, Trace, as_they_are, reread
from eesd.errors import EesdError
from eesd.facts import now, provenance
from eesd.files import atomic_path, settings_hash, source_hash, write_atomic
from eesd.models.engine import attach_engine
from eesd.models.kernels import multiplies_bfloat16
from eesd.models.loading import load_config, load_target
from eesd.models.special import fingerprint
from eesd.progress import progress
from eesd.words import origin_of

CHECKPOINT_INTERVAL_S = 60.0
WARMUP_SHARE = 0.05
MAX_GRAD_NORM = 1.0
# Weight of each further draft position relative to the one before: fewer rounds get there.
DEPTH_DECAY = 0.8
# What heads of one pass have in common: how they go through the corpus.
SHARED = ("train_tokens", "learn", "batch", "epochs", "seed")


def train_heads(model_dir: Path, corpus: Path, heads: Mapping[Path, Mapping[str, Any]]) -> None:
    """Train a head in every folder by its settings; write `head.safetensors` and `card.json` there.

    EesdError for heads that cannot share a pass, a head to go on from that does not fit, and a corpus of another model,
    without the states of an exit layer, or without the labels that they need.
    """
    shared = shared_settings(heads)
    config = load_config(model_dir)
    exits = {out: student_kind(settings).exits_after(settings) for out, settings in heads.items()}
    read = sorted({exit_layer for exit_layer in exits.values() if exit_layer})
    for exit_layer in read:
        config.check_exit_layer(exit_layer)
    index = read_index(corpus)
    if index["model"] != fingerprint(model_dir):
        raise EesdError(
            f"{corpus}: written by a model with fingerprint {index['model']}, but {model_dir} has "
            f"{fingerprint(model_dir)}. Generate the corpus again."
        )
    if shared["learn"] == "texts" and index["settings"]["labels"] != "texts":
        raise EesdError(
            f"{corpus}: has no labels of prompts, which heads with `learn: texts` need. Generate it again: a corpus "
            "has them if such a head is defined on it."
        )
    target = load_target(model_dir, "float32", layers=[*read, config.num_layers - 1])
    layers = [*read, config.num_layers]
    splits = {split: read_corpus(corpus, layers, split) for split in ("train", "calibration", "evaluation")}
    check_held_out(corpus, splits)
    complete = completer(index, model_dir, layers)
    made, began = provenance(target.device), perf_counter()
    traces = limit_tokens(splits["train"], shared["train_tokens"], shared["seed"])
    if shared["learn"] == "answers":
        traces = [trace.answer_alone() for trace in traces]
    trainings = []
    for out, settings in heads.items():
        torch.manual_seed(settings["seed"])
        origin = read_origin(settings, out, target, index["model"])
        student = make_student(settings, target, traces, complete, origin)
        stamp = settings_hash([index, dict(settings), origin and origin.sha256, source_hash()])
        trainings.append(Training(student, out.with_name(out.name + ".work"), stamp))
    optimise(trainings, traces, splits["evaluation"])
    seconds = perf_counter() - began
    made["time"] = now()
    for out, training in zip(heads, trainings, strict=True):
        facts = {
            "head": out.name,
            "model": model_dir.name,
            "fingerprint": fingerprint(model_dir),
            "train_tokens": sum(trace.answer_tokens for trace in traces),
            "train_labels": sum(trace.labels for trace in traces),
            "train_seconds": round(seconds + training.earlier_s, 1),
            "trained_with": [other.name for other in heads if other != out],
            "trained": made,
            **({"origin": origin.facts} if (origin := training.student.origin) else {}),
            "corpus": index["settings"],
            "corpus_written": index.get("written"),  # older corpora do not say
        }
        write_head(training.student, facts, splits["calibration"], splits["evaluation"], out)
    for training in trainings:  # when all are written: one that is interrupted before goes on from its last step
        shutil.rmtree(training.work, ignore_errors=True)


def check_held_out(corpus: Path, splits: Mapping[str, Mapping[str, list[Trace]]]) -> None:
    """EesdError before hours of training if nothing would be drafted of what heads are measured on.

    A calibration pools tasks, agreement is of each. The pass over a prompt writes the first token of its answer.
    """
    drafted = {
        split: {task: any(t.answer_tokens > 1 for t in ts) for task, ts in splits[split].items()} for split in splits
    }
    missing = [f"{task} (evaluation)" for task, any_token in drafted["evaluation"].items() if not any_token]
    if not any(drafted["calibration"].values()):
        missing.append("all tasks (calibration)")
    if missing:
        raise EesdError(
            f"{corpus}: no answer of two tokens or more of {', '.join(missing)}: heads cannot be measured there. Give "
            "the corpus more prompts, or leave out tasks with answers of one token."
        )


def pair(folders: Sequence[Path], settings: Sequence[Mapping[str, Any]]) -> dict[Path, Mapping[str, Any]]:
    """Settings by folder, in order; EesdError unless there is a folder of its own for each."""
    if not len(folders) == len(set(folders)) == len(settings):
        raise EesdError(
            f"{len(settings)} --settings and {len(set(folders))} different --out: give one of each for every head."
        )
    return dict(zip(folders, settings, strict=True))


def shared_settings(heads: Mapping[Path, Mapping[str, Any]]) -> Mapping[str, Any]:
    """Settings of one of the heads, after checking that all go through the corpus in the same way."""
    first, *others = heads.values()
    for key in SHARED:
        values = [settings[key] for settings in (first, *others)]
        if any(value != values[0] for value in values):
            raise EesdError(f"Heads that are trained in one pass share {', '.join(SHARED)}; here {key} is {values}.")
    for out, settings in heads.items():
        if (name := origin_of(settings)) and out.parent / name in heads:
            raise EesdError(f"{out}: goes on from {name}, which the same pass trains. Train {name} first.")
    return first


def completer(index: Mapping[str, Any], model_dir: Path, layers: Sequence[int]) -> Complete:
    """What gives traces the states after `layers` and the teacher's labels, if the corpus holds texts alone."""
    if index["settings"].get("states") != "recomputed":
        return as_they_are
    teacher = load_target(model_dir, index["settings"]["dtype"])
    attach_engine(teacher)
    return lambda traces: reread(teacher, traces, layers) if traces[0].teacher_ids is None else traces


def write_head(
    student: Student,
    facts: Mapping[str, Any],
    calibration: Mapping[str, list[Trace]],
    held_out: Mapping[str, list[Trace]],
    out: Path,
) -> None:
    """Measure and calibrate what is stored of a trained head, and write it and its card; facts: what else that says."""
    weights = student.tensors()
    student.module.load_state_dict(weights, strict=False)
    card = {
        **facts,
        "kind": student.settings["kind"],
        **{key: getattr(student, key) for key in ("exit_layer", "init", "context")},
        "loss": loss_name(student.settings["loss"]),
        "vocab_rows": len(student.head_rows),
        "settings": dict(student.settings),
        "agreement": {task: evaluate(student, held_out[task]) for task in sorted(held_out)},
        "calibration": calibrate(student, calibration, held_out),
        "accuracies": candidate_accuracies(student, [t for traces in calibration.values() for t in traces]),
    }
    with atomic_path(out / "head.safetensors") as temporary:
        save_file({name: tensor.cpu() for name, tensor in weights.items()}, temporary)
    write_atomic(out / "card.json", json.dumps(card, indent=2) + "\n")


def limit_tokens(train: Mapping[str, list[Trace]], budget: int | None, seed: int) -> list[Trace]:
    """Traces of all tasks; with a budget the same share of each task's, of about so many generated tokens in all.

    A budget draws at random: a corpus is sorted by the length of its prompts, so its first traces are its shortest.
    """
    sizes = {task: sum(trace.answer_tokens for trace in traces) for task, traces in train.items()}
    share = 1.0 if budget is None else min(1.0, budget / sum(sizes.values()))
    kept, order = [], random.Random(seed)
    for task in sorted(train):
        taken = 0
        for trace in train[task] if share == 1.0 else order.sample(train[task], len(train[task])):
            if taken < share * sizes[task]:
                kept.append(trace)
                taken += trace.answer_tokens
    return kept


def loss_name(weights: Mapping[str, float]) -> str:
    """`soft`, or `soft + 0.5 tv`."""
    used = {name: weight for name, weight in weights.items() if weight}
    return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in used.items())


class Training:
    """One head on its way, from the checkpoint in `work` that carries `stamp`, if there is one."""

    def __init__(self, student: Student, work: Path, stamp: str) -> None:
        self.student, self.work, self.stamp = student, work, stamp
        rate = student.settings["learning_rate"]
        self.optimiser = torch.optim.AdamW(student.parameters, rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
        self.step, self.earlier_s = load_checkpoint(work, stamp, student.module, self.optimiser)

    def learn(self, traces: Sequence[Trace], total: int) -> Tensor:
        """One of `total` steps of AdamW, with warm-up and cosine decay, on one batch; its loss []."""
        loss = batch_loss(self.student, traces)
        for group in self.optimiser.param_groups:
            group["lr"] = self.student.settings["learning_rate"] * learning_rate_factor(self.step, total)
        self.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters, MAX_GRAD_NORM)
        self.optimiser.step()
        self.step += 1
        return loss.detach()

    def save(self, seconds: float) -> None:
        """Write a checkpoint; seconds: spent by this run."""
        save_checkpoint(self.work, self.stamp, self.student.module, self.optimiser, self.step, self.earlier_s + seconds)


def optimise(trainings: Sequence[Training], traces: Sequence[Trace], held_out: Mapping[str, list[Trace]]) -> None:
    """Train all along the same batches; one that an interruption left behind catches up first."""
    settings, complete = trainings[0].student.settings, trainings[0].student.complete
    per_epoch = math.ceil(len(traces) / settings["batch"])
    total, start = per_epoch * settings["epochs"], min(training.step for training in trainings)
    began = saved = perf_counter()
    title = " ".join(training.work.stem for training in trainings)
    with progress(f"train {title}", total, "step", initial=start) as bar:
        for step in range(start, total):
            epoch, index = divmod(step, per_epoch)
            if step == start or index == 0:
                order = epoch_batches(traces, settings["batch"], settings["seed"] + epoch)
            batch = complete(order[index])
            learning = [training for training in trainings if training.step == step]
            # Read together: each reading waits for the device.
            losses = torch.stack([training.learn(batch, total) for training in learning]).tolist()
            for training, loss in zip(learning, losses, strict=True):
                if not math.isfinite(loss):
                    raise EesdError(
                        f"Training of {training.work.stem} diverged at step {step} (loss {loss}). Lower learning_rate."
                    )
            bar.update()
            if index == per_epoch - 1:
                first = [evaluate(learning[0].student, held, 1)["top1"][0] for held in held_out.values()]
                bar.set_postfix_str(f"loss {losses[0]:.3f}, held-out top-1 {sum(first) / len(first):.3f}")
            if perf_counter() - saved > CHECKPOINT_INTERVAL_S or step == total - 1:
                saved = perf_counter()
                for training in trainings:
                    training.save(saved - began)


def mixed_precision(device: torch.device) -> torch.autocast:
    """Products in bfloat16 where the device multiplies it faster, and with them an exit head's states and angles;
    weights, their gradients and losses stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" or multiplies_bfloat16())


def learning_rate_factor(step: int, total: int) -> float:
    """Linear warm-up over the first steps, then a cosine to a tenth."""
    warmup = max(1, int(WARMUP_SHARE * total))
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def batch_loss(student: Student, traces: Sequence[Trace]) -> Tensor:
    """The loss of one batch: the mean over the positions of every depth, earlier depths counting more."""
    device = student.target.device
    batch = student.batch(traces)
    total, weights = torch.zeros((), device=device), 0.0
    with mixed_precision(device):
        for step, (where, logits) in enumerate(student.predictions(batch, student.depth)):
            if not len(logits):
                break
            losses = mixed_loss(
                student.settings["loss"],
                logits.log_softmax(-1),
                student.rows_of(batch.teacher_ids[where], batch, where),
                batch.teacher_probs[where],
                student.rows_of(batch.tokens[where], batch, where),
            )
            total = total + DEPTH_DECAY**step * losses.mean()
            weights += DEPTH_DECAY**step
    return total / weights
