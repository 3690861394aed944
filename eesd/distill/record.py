"""Batched generation that leaves behind what a head is trained on, in the same pass; or the same of given texts.

    traces = record_batch(target, prompts, layers=(4, 30), max_new_tokens=128, temperatures=[0], eos={2}, seed=0)
    traces = record_given(target, prompts, answers, layers=(4, 30))
    texts = record_batch(target, prompts, layers=(), ...)       # the tokens alone: a thousandth of the space
    traces = reread(target, texts, layers=(4, 30))

Batches are ragged: row b's token t lies in cache slot t whatever the other rows do, and a query sees the slots up to
its own, so padding behind a short prompt is overwritten before anything can look at it. Finished rows are retired.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eesd.decoding.sampling import draw_rows
from eesd.errors import EesdError
from eesd.models.cache import KVCache
from eesd.models.transformer import Transformer

TEACHER_TOP = 64
# Retiring rows copies the cache; worth it once this share of the rows is done.
RETIRE_SHARE = 0.25
# Positions whose laws over the vocabulary are held at once.
LAWS = 1024


@dataclass
class Trace:
    """One recorded text of T tokens, the first `prompt_tokens` of them given.

    tokens [T] int32. states: number of layers -> [T - 1, hidden] float16, the state of every token that was fed.
    learnt_from: the first token that heads learn to predict; the answer's first unless said otherwise.
    teacher_ids [labels, 64] int32 and teacher_probs (float16): the target's most probable tokens in place of each from
    there on, at temperature 1, most probable first. A text alone has neither.
    """

    prompt_tokens: int
    tokens: Tensor
    states: dict[int, Tensor] = field(default_factory=dict)
    teacher_ids: Tensor | None = None
    teacher_probs: Tensor | None = None
    learnt_from: int = 0

    def __post_init__(self) -> None:
        self.learnt_from = self.learnt_from or self.prompt_tokens

    @property
    def answer_tokens(self) -> int:
        """Tokens after the prompt."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def prompt_teaches(self) -> bool:
        """Whether heads learn to predict some of the prompt."""
        return self.learnt_from < self.prompt_tokens

    @property
    def labels(self) -> int:
        """Tokens that heads learn to predict."""
        return len(self.tokens) - self.learnt_from

    def answer_alone(self) -> Trace:
        """The same trace, of whose prompt nothing is learnt."""
        skipped = self.prompt_tokens - self.learnt_from
        labels = [None if part is None else part[skipped:] for part in (self.teacher_ids, self.teacher_probs)]
        return Trace(self.prompt_tokens, self.tokens, self.states, *labels)


# What gives traces the states and labels that their corpus does not hold.
Complete = Callable[[Sequence[Trace]], Sequence[Trace]]


def as_they_are(traces: Sequence[Trace]) -> Sequence[Trace]:
    """Traces of a corpus that holds their states."""
    return traces


class _Recorder:
    """Collects the trace of one row, step by step."""

    def __init__(self, prompt: Sequence[int], layers: Collection[int], learnt_from: int) -> None:
        self.prompt_tokens, self.learnt_from = len(prompt), learnt_from
        self.tokens = list(prompt)
        self.states: dict[int, list[Tensor]] = {n: [] for n in layers}
        self.teacher: list[tuple[Tensor, Tensor]] = []

    def trace(self) -> Trace:
        tokens = torch.tensor(self.tokens, dtype=torch.int32)
        if not self.teacher:
            return Trace(self.prompt_tokens, tokens, learnt_from=self.learnt_from)
        ids, probs = zip(*self.teacher, strict=True)
        return Trace(
            self.prompt_tokens,
            tokens,
            {n: torch.cat(parts) for n, parts in self.states.items()},
            torch.stack(ids).to("cpu", torch.int32),
            torch.stack(probs).to("cpu", torch.float16),
            self.learnt_from,
        )


@torch.inference_mode()
def record_batch(
    target: Transformer,
    prompts: Sequence[Sequence[int]],
    layers: Sequence[int],
    max_new_tokens: int,
    temperatures: Sequence[float],
    eos: Collection[int],
    seed: int,
    learnt_from: Sequence[int] | None = None,
) -> list[Trace]:
    """Continue every prompt once at each temperature (0: greedily), all at once; traces prompt by prompt.

    States are recorded after each of the `layers`, of which `num_layers` are the final ones; without any layer, nothing
    but the text. learnt_from: the first token of every prompt that has labels, in its first trace; None: of its answer.
    Every output has at least one token.
    """
    device = target.device
    generator = torch.Generator(device).manual_seed(seed)
    learnt_from = learnt_from or [len(prompt) for prompt in prompts]
    recorders = [
        _Recorder(prompt, layers, len(prompt) if again else first)
        for prompt, first in zip(prompts, learnt_from, strict=True)
        for again in range(len(temperatures))
    ]
    heat = torch.tensor(list(temperatures) * len(prompts), device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    cache = target.new_cache(int(lengths.max()) + max_new_tokens, batch=len(prompts))
    padded = torch.zeros((len(prompts), int(lengths.max())), dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = torch.tensor(prompt, device=device)

    states, final = _run_by_exits(target, target.embed(padded), layers, cache, 0)
    if layers:
        counts = zip(learnt_from, lengths.tolist(), strict=True)
        known = [final[row, first - 1 : end - 1] for row, (first, end) in enumerate(counts)]
        for recorder, (ids, probs) in zip(recorders[:: len(temperatures)], _labels(target, known), strict=True):
            recorder.teacher += zip(ids, probs, strict=True)
    # The prompt is run once, however often it is continued.
    fan = torch.arange(len(prompts), device=device).repeat_interleave(len(temperatures))
    if len(temperatures) > 1:
        cache.keep_rows(fan)
    states, lengths = {n: layer_states[fan] for n, layer_states in states.items()}, lengths[fan]
    final = final[fan, lengths - 1]
    counts = lengths.tolist()
    live: list[int | None] = list(range(len(recorders)))  # recorder of every batch row; None once it is finished
    for step in range(max_new_tokens):
        for n, layer_states in states.items():
            stored = _storable(n, layer_states).cpu()
            for row, owner in enumerate(live):
                if owner is not None:
                    recorders[owner].states[n].append(stored[row, : counts[owner] if step == 0 else 1])
        logits = target.logits(final).float()
        if layers:
            teacher = _teacher(logits)
        tokens = _next_tokens(logits, heat, generator)
        for row, owner in enumerate(live):
            if owner is not None:
                recorders[owner].tokens.append(tokens[row])
                if layers:
                    recorders[owner].teacher.append((teacher[0][row], teacher[1][row]))
        if step == max_new_tokens - 1:
            break
        live = [None if owner is None or token in eos else owner for owner, token in zip(live, tokens, strict=True)]
        if not any(owner is not None for owner in live):
            break
        if live.count(None) >= RETIRE_SHARE * len(live):
            rows = [row for row, owner in enumerate(live) if owner is not None]
            cache.keep_rows(torch.tensor(rows, device=device))
            lengths, heat, tokens, live = lengths[rows], heat[rows], [tokens[r] for r in rows], [live[r] for r in rows]
        fed = torch.tensor(tokens, device=device)[:, None]
        states, final = _run_by_exits(target, target.embed(fed), layers, cache, lengths[:, None])
        lengths, final = lengths + 1, final[:, 0]
    return [recorder.trace() for recorder in recorders]


def record_given(
    target: Transformer,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    layers: Sequence[int],
    learnt_from: Sequence[int] | None = None,
) -> list[Trace]:
    """What the target computes while it reads each prompt and its answer, of one token or more; the rest as above."""
    learnt_from = learnt_from or [len(prompt) for prompt in prompts]
    texts = [
        Trace(len(prompt), torch.tensor([*prompt, *answer], dtype=torch.int32), learnt_from=first)
        for prompt, answer, first in zip(prompts, answers, learnt_from, strict=True)
    ]
    return reread(target, texts, layers) if layers else texts


@torch.inference_mode()
def reread(target: Transformer, texts: Sequence[Trace], layers: Sequence[int]) -> list[Trace]:
    """The same texts with states after each of the `layers` and the teacher's labels, all on the target's device."""
    # The last token is predicted and not fed.
    fed = torch.nn.utils.rnn.pad_sequence([text.tokens[:-1].long() for text in texts], batch_first=True)
    # Only the CPU engine reads keys from a cache; torch has them at hand, and all at once they would fill a GPU.
    cache = target.new_cache(fed.shape[1], batch=len(texts)) if target.device.type == "cpu" else None
    states, final = _run_by_exits(target, target.embed(fed.to(target.device)), layers, cache, 0)
    stored = {n: _storable(n, layer_states) for n, layer_states in states.items()}
    predicting = [final[row, text.learnt_from - 1 : len(text.tokens) - 1] for row, text in enumerate(texts)]
    return [
        Trace(
            text.prompt_tokens,
            text.tokens,
            {n: layer_states[row, : len(text.tokens) - 1] for n, layer_states in stored.items()},
            ids.to(torch.int32),
            probs.to(torch.float16),
            text.learnt_from,
        )
        for row, (text, (ids, probs)) in enumerate(zip(texts, _labels(target, predicting), strict=True))
    ]


def _labels(target: Transformer, states: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Ids and probabilities [n, 64] of the most probable tokens after each of some final states [n, hidden]."""
    counts = [len(part) for part in states]
    if not sum(counts):
        return [(torch.zeros(0), torch.zeros(0))] * len(states)
    taught = [_teacher(target.logits(part).float()) for part in torch.cat(list(states)).split(LAWS)]
    ids, probs = (torch.cat(parts).split(counts) for parts in zip(*taught, strict=True))
    return list(zip(ids, probs, strict=True))


def _storable(layer: int, states: Tensor) -> Tensor:
    stored = states.to(torch.float16)
    if not stored.isfinite().all():
        raise EesdError(f"States of layer {layer} exceed float16, in which heads learn. Choose another exit_layer.")
    return stored


def _teacher(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and probabilities of the most probable tokens, from float32 logits [rows, vocab]."""
    values, ids = logits.topk(min(TEACHER_TOP, logits.shape[-1]), -1)
    return ids, (values - logits.logsumexp(-1, keepdim=True)).exp()


def _run_by_exits(
    target: Transformer, hidden: Tensor, layers: Sequence[int], cache: KVCache | None, slots: int | Tensor
) -> tuple[dict[int, Tensor], Tensor]:
    """Run all layers, keeping the states after each of `layers`: ({layer: [batch, seq, hidden]}, final states)."""
    states, start = {}, 0
    for cut in sorted(layers):
        hidden = target.run(hidden, slice(start, cut), cache, slots)
        states[cut], start = hidden, cut
    return states, target.run(hidden, slice(start, None), cache, slots)


def _next_tokens(logits: Tensor, heat: Tensor, generator: torch.Generator) -> list[int]:
    """Each row's next token from float32 logits [batch, vocab] at its temperature."""
    chosen = logits.argmax(-1)
    sampled = heat > 0
    if sampled.any():
        laws = (logits[sampled] / heat[sampled, None]).softmax(-1)
        chosen[sampled] = draw_rows(laws, generator).to(chosen.dtype)
    return chosen.tolist()
