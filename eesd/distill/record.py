"""Batched generation that leaves behind what a head is trained on, in the same pass.

    traces = record_batch(target, prompts, exit_layers=(4,), max_new_tokens=128, sampling=GREEDY, eos={2}, seed=0)

Batches are ragged: row b's token t lies in cache slot t whatever the other rows do, and a query sees the slots up to
its own, so padding behind a short prompt is overwritten before anything can look at it. Finished rows are retired.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eesd.decoding.sampling import Sampling
from eesd.errors import EesdError
from eesd.models.cache import KVCache
from eesd.models.transformer import Transformer

TEACHER_TOP = 64
# Retiring rows copies the cache; worth it once this share of the rows is done.
RETIRE_SHARE = 0.25


@dataclass
class Trace:
    """One recorded generation of T tokens, the first `prompt_tokens` of them given.

    tokens [T] int32. states: exit layer -> [T - 1, hidden] float16, the state of every token that was fed.
    teacher_ids [T - prompt_tokens, 64] int32 and teacher_probs (float16): the target's most probable next tokens at
    each generated position, at temperature 1, most probable first.
    """

    prompt_tokens: int
    tokens: Tensor
    states: dict[int, Tensor]
    teacher_ids: Tensor
    teacher_probs: Tensor


class _Recorder:
    """Collects the trace of one row, step by step."""

    def __init__(self, prompt: Sequence[int], exit_layers: Collection[int]) -> None:
        self.prompt_tokens = len(prompt)
        self.tokens = list(prompt)
        self.states: dict[int, list[Tensor]] = {n: [] for n in exit_layers}
        self.teacher: list[tuple[Tensor, Tensor]] = []

    def trace(self) -> Trace:
        ids, probs = zip(*self.teacher, strict=True)
        return Trace(
            self.prompt_tokens,
            torch.tensor(self.tokens, dtype=torch.int32),
            {n: torch.cat(parts) for n, parts in self.states.items()},
            torch.stack(ids).to("cpu", torch.int32),
            torch.stack(probs).to("cpu", torch.float16),
        )


@torch.inference_mode()
def record_batch(
    target: Transformer,
    prompts: Sequence[Sequence[int]],
    exit_layers: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    eos: Collection[int],
    seed: int,
) -> list[Trace]:
    """Continue all prompts at once; one trace for each, in order. Every output has at least one token."""
    device = target.device
    generator = torch.Generator(device).manual_seed(seed)
    recorders = [_Recorder(prompt, exit_layers) for prompt in prompts]
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    cache = target.new_cache(int(lengths.max()) + max_new_tokens, batch=len(prompts))
    padded = torch.zeros((len(prompts), int(lengths.max())), dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = torch.tensor(prompt, device=device)

    states, final = _run_by_exits(target, target.embed(padded), exit_layers, cache, 0)
    final = final[torch.arange(len(prompts), device=device), lengths - 1]
    counts = lengths.tolist()
    live = list(range(len(prompts)))  # recorder of every batch row; None once it is finished
    for step in range(max_new_tokens):
        for n, layer_states in states.items():
            stored = layer_states.to("cpu", torch.float16)
            if not stored.isfinite().all():
                raise EesdError(
                    f"States of layer {n} exceed float16, in which they are stored. Choose another exit_layer."
                )
            for row, owner in enumerate(live):
                if owner is not None:
                    recorders[owner].states[n].append(stored[row, : counts[owner] if step == 0 else 1])
        tokens = _next_tokens(target.logits(final), sampling, generator, live, recorders)
        if step == max_new_tokens - 1:
            break
        live = [None if owner is None or token in eos else owner for owner, token in zip(live, tokens, strict=True)]
        if not any(owner is not None for owner in live):
            break
        if live.count(None) >= RETIRE_SHARE * len(live):
            rows = [row for row, owner in enumerate(live) if owner is not None]
            cache.keep_rows(torch.tensor(rows, device=device))
            lengths, tokens, live = lengths[rows], [tokens[r] for r in rows], [live[r] for r in rows]
        fed = torch.tensor(tokens, device=device)[:, None]
        states, final = _run_by_exits(target, target.embed(fed), exit_layers, cache, lengths[:, None])
        lengths, final = lengths + 1, final[:, 0]
    return [recorder.trace() for recorder in recorders]


def _run_by_exits(
    target: Transformer, hidden: Tensor, exit_layers: Sequence[int], cache: KVCache, slots: int | Tensor
) -> tuple[dict[int, Tensor], Tensor]:
    """Run all layers, keeping the states after each exit layer: ({exit: [batch, seq, hidden]}, final states)."""
    states, start = {}, 0
    for cut in sorted(exit_layers):
        hidden = target.run(hidden, slice(start, cut), cache, slots)
        states[cut], start = hidden, cut
    return states, target.run(hidden, slice(start, None), cache, slots)


def _next_tokens(
    logits: Tensor, sampling: Sampling, generator: torch.Generator, live: list[int | None], recorders: list[_Recorder]
) -> list[int]:
    """Draw every row's next token from logits [batch, vocab] and note it with the teacher's most probable ones."""
    logits = logits.float()
    values, ids = logits.topk(min(TEACHER_TOP, logits.shape[-1]), -1)
    probs = (values - logits.logsumexp(-1, keepdim=True)).exp()
    if sampling.greedy:
        tokens = ids[:, 0].tolist()
    else:
        tokens = torch.multinomial(sampling.probabilities(logits), 1, generator=generator)[:, 0].tolist()
    for row, owner in enumerate(live):
        if owner is not None:
            recorders[owner].tokens.append(tokens[row])
            recorders[owner].teacher.append((ids[row], probs[row]))
    return tokens
