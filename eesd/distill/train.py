"""Training an exit head on a self-generated corpus.

    python -m eesd train --model resources/models/smollm2-135m --corpus results/corpus/smollm2-135m/default \
        --settings '{"exit_layer": 4, "vocab_rows": 8192, ...}' --out results/heads/smollm2-135m/exit4

The exit layer starts as a copy of a target layer, norm and head as the target's own, the head cut to the tokens most
frequent in the corpus; all of it is trained, the target stays frozen. Checkpoints in `<out>.work/` make an
interrupted run go on.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from eesd.distill.checkpoint import load_checkpoint, save_checkpoint
from eesd.distill.corpus import read_corpus
from eesd.distill.losses import expected_acceptance, soft_cross_entropy
from eesd.distill.record import Trace
from eesd.drafting.exit_head import ExitHead
from eesd.errors import EesdError, unknown
from eesd.files import atomic_path, settings_hash, source_hash, write_atomic
from eesd.models.loading import load_config, load_target
from eesd.models.special import fingerprint
from eesd.models.transformer import Transformer, head_logits
from eesd.progress import progress

CHECKPOINT_INTERVAL_S = 60.0
WARMUP_SHARE = 0.05
MAX_GRAD_NORM = 1.0


def train_head(model_dir: Path, corpus: Path, settings: Mapping[str, Any], out: Path) -> None:
    """Train one head and write `head.safetensors` and `card.json` into `out`."""
    exit_layer = settings["exit_layer"]
    config = load_config(model_dir)
    config.check_exit_layer(exit_layer)
    target = load_target(model_dir, "float32", layers=(exit_layer, config.num_layers - 1))
    train = read_corpus(corpus, [exit_layer], "train")
    held_out = read_corpus(corpus, [exit_layer], "evaluation")
    traces = [trace for task in sorted(train) for trace in train[task]]
    torch.manual_seed(settings["seed"])
    head = build_head(target, choose_vocabulary(traces, settings["vocab_rows"], target.config.vocab_size), settings)
    index = json.loads((corpus / "corpus.json").read_text())
    if index["model"] != fingerprint(model_dir):
        raise EesdError(
            f"{corpus}: written by a model with fingerprint {index['model']}, but {model_dir} has "
            f"{fingerprint(model_dir)}. Generate the corpus again."
        )
    stamp = settings_hash([index, dict(settings), source_hash()])
    work = out.with_name(out.name + ".work")
    began = perf_counter()
    earlier_s = optimise(head, target, traces, held_out, settings, work, stamp)
    # What is stored is what is measured: bfloat16 halves the bytes that every draft step reads.
    weights = {name: t if name == "token_ids" else t.bfloat16() for name, t in head.state_dict().items()}
    head.load_state_dict(weights)
    card = {
        "head": out.name,
        "kind": settings["kind"],
        "model": model_dir.name,
        "fingerprint": fingerprint(model_dir),
        "exit_layer": exit_layer,
        "vocab_rows": head.head.out_features,
        "init": settings["init"],
        "loss": "soft",
        "context": "none",
        "train_tokens": sum(len(t.teacher_ids) for t in traces),
        "train_seconds": round(perf_counter() - began + earlier_s, 1),
        "settings": dict(settings),
        "agreement": {task: measure(head, target, held_out[task], exit_layer) for task in sorted(held_out)},
    }
    with atomic_path(out / "head.safetensors") as temporary:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, temporary)
    write_atomic(out / "card.json", json.dumps(card, indent=2) + "\n")
    shutil.rmtree(work, ignore_errors=True)


def choose_vocabulary(traces: Sequence[Trace], rows: int | str, vocab_size: int) -> Tensor | None:
    """Token ids [rows] of the draft vocabulary in increasing order, or None for `full`.

    The most frequent tokens of the generated text; where the text has fewer different ones, those the teacher gave
    most mass.
    """
    if rows == "full" or rows >= vocab_size:
        return None
    counts, mass = torch.zeros(vocab_size, dtype=torch.float64), torch.zeros(vocab_size, dtype=torch.float64)
    for trace in traces:
        written = trace.tokens[trace.prompt_tokens :].long()
        counts.index_add_(0, written, torch.ones(len(written), dtype=torch.float64))
        mass.index_add_(0, trace.teacher_ids.flatten().long(), trace.teacher_probs.flatten().double())
    # A count outweighs any mass, which is below 1 once normalised.
    return (counts + mass / (mass.sum() + 1)).topk(rows).indices.sort().values


def build_head(target: Transformer, vocabulary: Tensor | None, settings: Mapping[str, Any]) -> ExitHead:
    """An untrained head: layer copied from the target (`last`, or `same`: the one at the exit), norm and head too."""
    sources = {"last": -1, "same": settings["exit_layer"]}
    if settings["init"] not in sources:
        raise unknown("init", settings["init"], sources)
    vocabulary = None if vocabulary is None else vocabulary.to(target.device)
    head = ExitHead(target.config, vocabulary).to(target.device)
    head.layer.load_state_dict(target.layers[sources[settings["init"]]].state_dict())
    head.norm.load_state_dict(target.norm.state_dict())
    with torch.no_grad():
        head.head.weight.copy_(target.head_weight if vocabulary is None else target.head_weight[vocabulary])
    return head


def optimise(
    head: ExitHead,
    target: Transformer,
    traces: Sequence[Trace],
    held_out: Mapping[str, list[Trace]],
    settings: Mapping[str, Any],
    work: Path,
    stamp: str,
) -> float:
    """AdamW with warm-up and cosine decay, resumed from a checkpoint; returns seconds spent by earlier runs."""
    per_epoch = math.ceil(len(traces) / settings["batch"])
    total = per_epoch * settings["epochs"]
    optimiser = torch.optim.AdamW(head.parameters(), settings["learning_rate"], betas=(0.9, 0.95), weight_decay=0.01)
    start, earlier_s = load_checkpoint(work, stamp, head, optimiser)
    rows = row_of_token(head, target.config.vocab_size)
    began = saved = perf_counter()
    with progress(f"train {settings['kind']} at layer {settings['exit_layer']}", total, "step", initial=start) as bar:
        for step in range(start, total):
            epoch, index = divmod(step, per_epoch)
            if step == start or index == 0:
                order = epoch_batches(traces, settings["batch"], settings["seed"] + epoch)
            loss = batch_loss(head, target, order[index], settings["exit_layer"], rows)
            for group in optimiser.param_groups:
                group["lr"] = settings["learning_rate"] * learning_rate_factor(step, total)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), MAX_GRAD_NORM)
            optimiser.step()
            if not math.isfinite(loss.item()):
                raise EesdError(f"Training diverged at step {step} (loss {loss.item()}). Lower learning_rate.")
            bar.update()
            if index == per_epoch - 1:
                parts = [
                    measure(head, target, held_out[task], settings["exit_layer"])["top1"] for task in sorted(held_out)
                ]
                bar.set_postfix_str(f"loss {loss.item():.3f}, held-out top-1 {sum(parts) / len(parts):.3f}")
            if perf_counter() - saved > CHECKPOINT_INTERVAL_S:
                saved = perf_counter()
                save_checkpoint(work, stamp, head, optimiser, step + 1, earlier_s + saved - began)
    return earlier_s


def learning_rate_factor(step: int, total: int) -> float:
    """Linear warm-up over the first steps, then a cosine to a tenth."""
    warmup = max(1, int(WARMUP_SHARE * total))
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def epoch_batches(traces: Sequence[Trace], batch: int, seed: int) -> list[list[Trace]]:
    """All traces once, in batches of similar length (padding costs time) and random order."""
    shuffled = list(traces)
    rng = random.Random(seed)
    rng.shuffle(shuffled)
    pool = 8 * batch
    batches = []
    for i in range(0, len(shuffled), pool):
        alike = sorted(shuffled[i : i + pool], key=lambda trace: len(trace.tokens))
        batches += [alike[j : j + batch] for j in range(0, len(alike), batch)]
    rng.shuffle(batches)
    return batches


def row_of_token(head: ExitHead, vocab_size: int) -> Tensor:
    """Draft row of every token [vocab], -1 for tokens the head cannot draft."""
    device = head.head.weight.device
    if head.token_ids is None:
        return torch.arange(vocab_size, device=device)
    rows = torch.full((vocab_size,), -1, device=device)
    rows[head.token_ids] = torch.arange(len(head.token_ids), device=device)
    return rows


def predict(
    head: ExitHead, target: Transformer, traces: Sequence[Trace], exit_layer: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Draft logits [n, rows], teacher ids and probabilities [n, top] at all n generated positions of a batch."""
    longest = max(len(trace.tokens) - 1 for trace in traces)
    device = target.device
    states = torch.zeros(len(traces), longest, target.config.hidden_size, device=device)
    generated = torch.zeros(len(traces), longest, dtype=torch.bool, device=device)
    for row, trace in enumerate(traces):
        states[row, : len(trace.tokens) - 1] = trace.states[exit_layer].float()
        # The state of the last prompt token predicts the first generated one.
        generated[row, trace.prompt_tokens - 1 : len(trace.tokens) - 1] = True
    logits = head_logits(head(states, target.rotary)[generated], head.norm, head.head.weight)
    ids = torch.cat([trace.teacher_ids for trace in traces]).to(device, torch.long)
    return logits, ids, torch.cat([trace.teacher_probs for trace in traces]).to(device, torch.float32)


def batch_loss(head: ExitHead, target: Transformer, traces: Sequence[Trace], exit_layer: int, rows: Tensor) -> Tensor:
    """Soft-label cross-entropy of one batch."""
    logits, ids, probs = predict(head, target, traces, exit_layer)
    return soft_cross_entropy(logits.log_softmax(-1), rows[ids], probs)


@torch.inference_mode()
def measure(head: ExitHead, target: Transformer, traces: Sequence[Trace], exit_layer: int) -> dict[str, float]:
    """Held-out quality at the first draft position: top-1 agreement with the target, expected acceptance, positions."""
    rows = row_of_token(head, target.config.vocab_size)
    agreed, accepted, positions = 0.0, 0.0, 0
    for batch in _chunks(sorted(traces, key=lambda trace: len(trace.tokens)), 8):
        logits, ids, probs = predict(head, target, batch, exit_layer)
        agreed += float((logits.argmax(-1) == rows[ids[:, 0]]).sum())
        accepted += float(expected_acceptance(logits.softmax(-1), rows[ids], probs).sum())
        positions += len(ids)
    return {"top1": agreed / positions, "expected_acceptance": accepted / positions, "positions": positions}


def _chunks(traces: Sequence[Trace], size: int) -> Iterator[Sequence[Trace]]:
    for i in range(0, len(traces), size):
        yield traces[i : i + size]
