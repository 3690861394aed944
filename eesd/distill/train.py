"""Training a draft head on a self-generated corpus.

    python -m eesd train --model resources/models/smollm2-135m --corpus results/corpus/smollm2-135m/default \
        --settings '{"exit_layer": 4, "vocab_rows": 8192, ...}' --out results/heads/smollm2-135m/deep4

The head starts from the target's own weights (eesd/distill/heads.py) and is trained along the
corpus; the target stays frozen. Checkpoints in `<out>.work/` make an interrupted run go on.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from eesd.distill.batches import epoch_batches, make_batch
from eesd.distill.calibrate import calibrate
from eesd.distill.checkpoint import load_checkpoint, save_checkpoint
from eesd.distill.corpus import read_corpus, read_index
from eesd.distill.evaluate import candidate_accuracies, evaluate
from eesd.distill.heads import Student, make_student, student_kind
from eesd.distill.losses import mixed_loss
from eesd.distill.record import Trace
from eesd.errors import EesdError
from eesd.files import atomic_path, settings_hash, source_hash, write_atomic
from eesd.models.kernels import multiplies_bfloat16
from eesd.models.loading import load_config, load_target
from eesd.models.special import fingerprint
from eesd.progress import progress

CHECKPOINT_INTERVAL_S = 60.0
WARMUP_SHARE = 0.05
MAX_GRAD_NORM = 1.0
# Weight of each further draft position relative to the one before: fewer rounds get there.
DEPTH_DECAY = 0.8


def train_head(model_dir: Path, corpus: Path, settings: Mapping[str, Any], out: Path) -> None:
    """Train one head and write `head.safetensors` and `card.json` into `out`."""
    config, exit_layer = load_config(model_dir), student_kind(settings).exits_after(settings)
    if exit_layer:
        config.check_exit_layer(exit_layer)
    read = [exit_layer] if exit_layer else []
    index = read_index(corpus)
    if index["model"] != fingerprint(model_dir):
        raise EesdError(
            f"{corpus}: written by a model with fingerprint {index['model']}, but {model_dir} has "
            f"{fingerprint(model_dir)}. Generate the corpus again."
        )
    target = load_target(model_dir, "float32", layers=[*read, config.num_layers - 1])
    splits = {
        split: read_corpus(corpus, [*read, config.num_layers], split)
        for split in ("train", "calibration", "evaluation")
    }
    torch.manual_seed(settings["seed"])
    began = perf_counter()
    traces = limit_tokens(splits["train"], settings["train_tokens"])
    student = make_student(settings, target, traces)
    stamp = settings_hash([index, dict(settings), source_hash()])
    work = out.with_name(out.name + ".work")
    earlier_s = optimise(student, traces, splits["evaluation"], work, stamp)
    seconds = perf_counter() - began + earlier_s
    # What is stored is what is measured.
    weights = student.tensors()
    student.module.load_state_dict(weights, strict=False)
    held_out, calibration = splits["evaluation"], [t for ts in splits["calibration"].values() for t in ts]
    card = {
        "head": out.name,
        "model": model_dir.name,
        "fingerprint": fingerprint(model_dir),
        "kind": settings["kind"],
        **{key: getattr(student, key) for key in ("exit_layer", "init", "context")},
        "loss": loss_name(settings["loss"]),
        "vocab_rows": len(student.head_rows),
        "train_tokens": sum(len(trace.teacher_ids) for trace in traces),
        "train_seconds": round(seconds, 1),
        "settings": dict(settings),
        "corpus": index["settings"],
        "agreement": {task: evaluate(student, held_out[task]) for task in sorted(held_out)},
        "calibration": calibrate(student, splits["calibration"], held_out),
        "accuracies": candidate_accuracies(student, calibration),
    }
    with atomic_path(out / "head.safetensors") as temporary:
        save_file(weights, temporary)
    write_atomic(out / "card.json", json.dumps(card, indent=2) + "\n")
    shutil.rmtree(work, ignore_errors=True)


def limit_tokens(train: Mapping[str, list[Trace]], budget: int | None) -> list[Trace]:
    """Traces of all tasks; with a budget the same share of each task's, of about so many generated tokens in all."""
    sizes = {task: sum(len(trace.teacher_ids) for trace in traces) for task, traces in train.items()}
    share = 1.0 if budget is None else min(1.0, budget / sum(sizes.values()))
    kept = []
    for task in sorted(train):
        taken = 0
        for trace in train[task]:
            if taken < share * sizes[task]:
                kept.append(trace)
                taken += len(trace.teacher_ids)
    return kept


def loss_name(weights: Mapping[str, float]) -> str:
    """`soft`, or `soft + 0.5 tv`."""
    used = {name: weight for name, weight in weights.items() if weight}
    return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in used.items())


def optimise(
    student: Student, traces: Sequence[Trace], held_out: Mapping[str, list[Trace]], work: Path, stamp: str
) -> float:
    """AdamW with warm-up and cosine decay, resumed from a checkpoint; returns seconds spent by earlier runs."""
    settings = student.settings
    per_epoch = math.ceil(len(traces) / settings["batch"])
    total = per_epoch * settings["epochs"]
    optimiser = torch.optim.AdamW(student.parameters, settings["learning_rate"], betas=(0.9, 0.95), weight_decay=0.01)
    start, earlier_s = load_checkpoint(work, stamp, student.module, optimiser)
    began = saved = perf_counter()
    with progress(f"train {work.stem}", total, "step", initial=start) as bar:
        for step in range(start, total):
            epoch, index = divmod(step, per_epoch)
            if step == start or index == 0:
                order = epoch_batches(traces, settings["batch"], settings["seed"] + epoch)
            with mixed_precision(student.target.device):
                loss = batch_loss(student, order[index])
            for group in optimiser.param_groups:
                group["lr"] = settings["learning_rate"] * learning_rate_factor(step, total)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters, MAX_GRAD_NORM)
            optimiser.step()
            if not math.isfinite(loss.item()):
                raise EesdError(f"Training diverged at step {step} (loss {loss.item()}). Lower learning_rate.")
            bar.update()
            if index == per_epoch - 1:
                first = [evaluate(student, held_out[task])["top1"][0] for task in sorted(held_out)]
                bar.set_postfix_str(f"loss {loss.item():.3f}, held-out top-1 {sum(first) / len(first):.3f}")
            if perf_counter() - saved > CHECKPOINT_INTERVAL_S:
                saved = perf_counter()
                save_checkpoint(work, stamp, student.module, optimiser, step + 1, earlier_s + saved - began)
    return earlier_s


def mixed_precision(device: torch.device) -> torch.autocast:
    """Products in bfloat16 where the device multiplies it faster; weights, sums and losses stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" or multiplies_bfloat16())


def learning_rate_factor(step: int, total: int) -> float:
    """Linear warm-up over the first steps, then a cosine to a tenth."""
    warmup = max(1, int(WARMUP_SHARE * total))
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def batch_loss(student: Student, traces: Sequence[Trace]) -> Tensor:
    """The loss of one batch: the mean over the positions of every depth, earlier depths counting more."""
    batch = make_batch(traces, student.exit_layer, student.target)
    total, weights = torch.zeros((), device=student.target.device), 0.0
    for step, (where, logits) in enumerate(student.predictions(batch, student.depth)):
        if not len(logits):
            break
        losses = mixed_loss(
            student.settings["loss"],
            logits.log_softmax(-1),
            student.rows[batch.teacher_ids[where]],
            batch.teacher_probs[where],
            student.rows[batch.tokens[where]],
        )
        total = total + DEPTH_DECAY**step * losses.mean()
        weights += DEPTH_DECAY**step
    return total / weights
