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
# Retiring rows moves those behind them within the cache; worth it once this share of the rows is done.
RETIRE_SHARE = 0.25
# Tokens among which the most probable one is looked for first.
GROUP = 32
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

    def cpu(self) -> Trace:
        """The same trace in the memory of the CPU."""
        labels = [None if part is None else part.cpu() for part in (self.teacher_ids, self.teacher_probs)]
        states = {n: layer_states.cpu() for n, layer_states in self.states.items()}
        return Trace(self.prompt_tokens, self.tokens.cpu(), states, *labels, self.learnt_from)

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


class _Answers:
    """The answers of a batch while they are written, on the CPU: a step fills one slice of every tensor."""

    def __init__(self, count: int, most: int, layers: Collection[int], target: Transformer) -> None:
        top = min(TEACHER_TOP, target.config.vocab_size)
        self.tokens = torch.zeros(count, most, dtype=torch.int32)
        self.lengths = torch.zeros(count, dtype=torch.long)
        self.states = {n: torch.zeros(count, most, target.config.hidden_size, dtype=torch.float16) for n in layers}
        kinds = (torch.int32, torch.float16) if layers else ()
        self.teacher = [torch.zeros(count, most, top, dtype=kind) for kind in kinds]

    def add_tokens(self, step: int, which: Tensor, tokens: Tensor, teacher: Sequence[Tensor]) -> None:
        """The next token of the answers `which` [n], with ids and probabilities [n, 64] of what was probable there."""
        self.tokens[which, step] = tokens.int()
        self.lengths[which] = step + 1
        for all_labels, labels in zip(self.teacher, teacher, strict=True):
            all_labels[which, step] = labels.to("cpu", all_labels.dtype)

    def add_states(self, step: int, which: Tensor, states: dict[int, Tensor]) -> None:
        """States [n, hidden] of that token."""
        for n, layer_states in states.items():
            self.states[n][which, step] = _storable(n, layer_states).cpu()

    def behind(self, prompt: Trace, which: int) -> Trace:
        """One answer behind its prompt, of which every token was fed."""
        length = int(self.lengths[which])
        tokens = torch.cat([prompt.tokens, self.tokens[which, :length]])
        states = {n: torch.cat([part, self.states[n][which, : length - 1]]) for n, part in prompt.states.items()}
        known = (prompt.teacher_ids, prompt.teacher_probs) if self.teacher else ()
        labels = [torch.cat([part, made[which, :length]]) for part, made in zip(known, self.teacher, strict=True)]
        return Trace(prompt.prompt_tokens, tokens, states, *labels, learnt_from=prompt.learnt_from)


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
    device, times = target.device, len(temperatures)
    generator = torch.Generator(device).manual_seed(seed)
    lengths = [len(prompt) for prompt in prompts]
    cache = target.new_cache(max(lengths) + max_new_tokens, batch=len(prompts))
    given = _texts(prompts, [[]] * len(prompts), learnt_from)
    read, final = _read(target, given, lengths, layers, cache)
    read = [prompt.cpu() for prompt in read]
    # The prompt is run once, however often it is continued.
    fan = torch.arange(len(prompts), device=device).repeat_interleave(times)
    if times > 1:
        cache.take_rows(fan)
    slots = torch.tensor(lengths, device=device)[fan]
    final = final[fan, slots - 1]
    heat = torch.tensor(list(temperatures) * len(prompts), device=device)
    answers = _Answers(len(fan), max_new_tokens, layers, target)
    stop = torch.tensor(list(eos), dtype=torch.long)
    # Which answer every batch row writes, and whether it still does.
    which, going = torch.arange(len(fan)), torch.ones(len(fan), dtype=torch.bool)
    for step in range(max_new_tokens):
        logits = target.logits(final).float()
        teacher = _teacher(logits) if layers else ()
        best = teacher[0][:, 0] if layers else logits.argmax(-1)
        tokens = _next_tokens(logits, best, heat, generator).cpu()
        answers.add_tokens(step, which[going], tokens[going], [labels[going] for labels in teacher])
        going = going & ~torch.isin(tokens, stop)
        if step == max_new_tokens - 1 or not going.any():
            break
        if going.sum() <= (1 - RETIRE_SHARE) * len(going):
            rows = going.nonzero()[:, 0]
            cache.keep_rows(rows.tolist())
            slots, heat = slots[rows], heat[rows]
            which, tokens, going = which[rows], tokens[rows], going[rows]
        states, final = _run_by_exits(target, target.embed(tokens[:, None].to(device)), layers, cache, slots[:, None])
        answers.add_states(step, which[going], {n: layer_states[going, 0] for n, layer_states in states.items()})
        slots, final = slots + 1, final[:, 0]
    prompt_of = [prompt if again == 0 else prompt.answer_alone() for prompt in read for again in range(times)]
    return [answers.behind(prompt, i) for i, prompt in enumerate(prompt_of)]


def record_given(
    target: Transformer,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    layers: Sequence[int],
    learnt_from: Sequence[int] | None = None,
) -> list[Trace]:
    """What the target computes while it reads each prompt and its answer, of one token or more; the rest as above."""
    texts = _texts(prompts, answers, learnt_from)
    return reread(target, texts, layers) if layers else texts


def _texts(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], learnt_from: Sequence[int] | None
) -> list[Trace]:
    """Prompts and what follows them, without states and labels."""
    return [
        Trace(len(prompt), torch.tensor([*prompt, *answer], dtype=torch.int32), learnt_from=first)
        for prompt, answer, first in zip(prompts, answers, learnt_from or map(len, prompts), strict=True)
    ]


@torch.inference_mode()
def reread(target: Transformer, texts: Sequence[Trace], layers: Sequence[int]) -> list[Trace]:
    """The same texts with states after each of the `layers` and the teacher's labels, all on the target's device."""
    # Only the CPU engine reads keys from a cache; torch has them at hand, and all at once they would fill a GPU.
    most = max(len(text.tokens) for text in texts)
    cache = target.new_cache(most, batch=len(texts)) if target.device.type == "cpu" else None
    # The last token is predicted and not fed.
    return _read(target, texts, [len(text.tokens) - 1 for text in texts], layers, cache)[0]


def _read(
    target: Transformer, texts: Sequence[Trace], fed: Sequence[int], layers: Sequence[int], cache: KVCache | None
) -> tuple[list[Trace], Tensor]:
    """Feed the first `fed` tokens of each text: the texts with states and labels, if there are `layers`, and all final
    states [batch, seq, hidden]."""
    tokens = [text.tokens[:count].long() for text, count in zip(texts, fed, strict=True)]
    padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True).to(target.device)
    states, final = _run_by_exits(target, target.embed(padded), layers, cache, 0)
    if not layers:
        return list(texts), final
    stored = {n: _storable(n, layer_states) for n, layer_states in states.items()}
    predicting = [final[row, text.learnt_from - 1 : len(text.tokens) - 1] for row, text in enumerate(texts)]
    labels = _labels(target, predicting)
    traces = [
        Trace(
            text.prompt_tokens,
            text.tokens,
            {n: layer_states[row, : fed[row]] for n, layer_states in stored.items()},
            *labels[row],
            text.learnt_from,
        )
        for row, text in enumerate(texts)
    ]
    return traces, final


def _labels(target: Transformer, states: Sequence[Tensor]) -> list[list[Tensor]]:
    """Ids and probabilities [n, 64] of the most probable tokens after each of some final states [n, hidden]."""
    counts = [len(part) for part in states]
    if not sum(counts):
        top = min(TEACHER_TOP, target.config.vocab_size)
        return [[torch.zeros(0, top, dtype=torch.int32), torch.zeros(0, top, dtype=torch.float16)] for _ in states]
    taught = [_teacher(target.logits(part).float()) for part in torch.cat(list(states)).split(LAWS)]
    ids, probs = (torch.cat(parts) for parts in zip(*taught, strict=True))
    return [list(pair) for pair in zip(ids.int().split(counts), probs.half().split(counts), strict=True)]


def _storable(layer: int, states: Tensor) -> Tensor:
    stored = states.to(torch.float16)
    if not stored.isfinite().all():
        raise EesdError(f"States of layer {layer} exceed float16, in which heads learn. Choose another exit_layer.")
    return stored


def _teacher(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and probabilities of the most probable tokens, from float32 logits [rows, vocab]; of equals the first."""
    values, ids = _top(logits, min(TEACHER_TOP, logits.shape[-1]))
    ids, order = ids.sort(-1)
    values, order = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(-1, order)
    return ids, (values - logits.logsumexp(-1, keepdim=True)).exp()


def _top(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As `topk`, in half the time on a CPU: the best lie in the `count` groups with the highest maxima."""
    if logits.shape[-1] % GROUP or logits.shape[-1] < count * GROUP:
        return logits.topk(count, -1)
    groups = logits.unflatten(-1, (-1, GROUP))
    best = groups.amax(-1).topk(count, -1).indices
    values, at = groups.gather(-2, best[..., None].expand(-1, -1, GROUP)).flatten(-2).topk(count, -1)
    return values, best.gather(-1, at // GROUP) * GROUP + at % GROUP


def _run_by_exits(
    target: Transformer, hidden: Tensor, layers: Sequence[int], cache: KVCache | None, slots: int | Tensor
) -> tuple[dict[int, Tensor], Tensor]:
    """Run all layers, keeping the states after each of `layers`: ({layer: [batch, seq, hidden]}, final states)."""
    states, start = {}, 0
    for cut in sorted(layers):
        hidden = target.run(hidden, slice(start, cut), cache, slots)
        states[cut], start = hidden, cut
    return states, target.run(hidden, slice(start, None), cache, slots)


def _next_tokens(logits: Tensor, best: Tensor, heat: Tensor, generator: torch.Generator) -> Tensor:
    """Each row's next token from float32 logits [batch, vocab] at its temperature; `best` at 0."""
    sampled = heat > 0
    if not sampled.any():
        return best
    laws = (logits[sampled] / heat[sampled, None]).softmax(-1)
    return best.masked_scatter(sampled, draw_rows(laws, generator).to(best.dtype))
