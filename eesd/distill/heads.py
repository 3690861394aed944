"""Heads to be trained: how each kind starts, and what it predicts at every depth of a draft.

student = ExitStudent(settings, target, traces)
student.parameters                        # to optimise
for depth, (where, logits) in enumerate(student.predictions(batch, depth=3), 1): ...
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eesd.distill.batches import Batch, make_batch
from eesd.distill.lens import fit_lens
from eesd.distill.origin import Origin
from eesd.distill.padding import in_few_shapes, round_down
from eesd.distill.record import Complete, Trace, as_they_are
from eesd.distill.rollout import rollout
from eesd.distill.vocabulary import PromptWords, choose_vocabulary, row_of_token
from eesd.drafting.exit_head import ExitHead
from eesd.drafting.medusa import MedusaHeads
from eesd.errors import EesdError, unknown
from eesd.models.transformer import Transformer, head_logits
from eesd.words import INITS, VOCABULARY_OF_PROMPTS


class Student(ABC):
    """A head in training. `module` is what is stored, `vocabulary` [rows] its tokens (None: all).

    complete: gives traces the states and labels that their corpus does not hold. origin: the trained head to go on
    from, if `init` names one. init, context: as in the head's card.
    tied: name of the output head's weight, which is not stored when it is tied.
    """

    module: nn.Module
    vocabulary: Tensor | None
    depth: int  # drafted tokens that training rolls out
    init: str
    context: str
    tied: str

    def __init__(
        self,
        settings: Mapping[str, Any],
        target: Transformer,
        traces: Sequence[Trace],
        complete: Complete = as_they_are,
        origin: Origin | None = None,
    ) -> None:
        self.settings, self.target, self.complete, self.origin = settings, target, complete, origin
        self.exit_layer = self.exits_after(settings)
        if origin and settings["output_head"] == "free":
            vocabulary = origin.head.token_ids
        else:
            vocabulary = choose_vocabulary(traces, settings["vocab_rows"], target.config.vocab_size)
        self.vocabulary = None if vocabulary is None else vocabulary.to(target.device)
        self.rows = row_of_token(self.vocabulary, target.config.vocab_size, target.device)
        self.start(traces)

    @abstractmethod
    def start(self, traces: Sequence[Trace]) -> None:
        """Make the untrained module, from the target's weights and whatever the traces tell in closed form."""

    @classmethod
    def exits_after(cls, settings: Mapping[str, Any]) -> int:
        """The layer whose states such a head reads; 0: none, only the final ones."""
        return 0

    def batch(self, traces: Sequence[Trace]) -> Batch:
        """What such a head learns from, of some traces."""
        return make_batch(self.complete(traces), self.exit_layer, self.target)

    def rows_of(self, tokens: Tensor, batch: Batch, where: Tensor) -> Tensor:
        """Draft rows of tokens [n, ..] at the n predictions `where` [batch, seq], -1 for what cannot be drafted."""
        if batch.words is None:
            return self.rows[tokens]
        return batch.words.rows_of(tokens, where.nonzero()[:, 0])

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [weight for weight in self.module.parameters() if weight.requires_grad]

    @property
    def head_rows(self) -> Tensor:
        """The target's output head at the draft vocabulary [rows, hidden]."""
        weight = self.target.head_weight
        return weight if self.vocabulary is None else weight[self.vocabulary]

    @abstractmethod
    def predictions(self, batch: Batch, depth: int) -> Iterator[tuple[Tensor, Tensor]]:
        """For every depth of a draft: where its predictions count [batch, seq], and logits [n, rows] there."""

    def tensors(self) -> dict[str, Tensor]:
        """What is stored: bfloat16 halves the bytes that every draft step reads.

        A tied output head is read from the target instead.
        """
        stored = {
            name: (tensor if name == "token_ids" else tensor.bfloat16()).contiguous()
            for name, tensor in self.module.state_dict().items()
        }
        if self.settings["output_head"] == "tied":
            del stored[self.tied]
        return stored


class ExitStudent(Student):
    """One transformer layer behind the target's first N (`exit_layer`), as `init`, `context` and `output_head` say."""

    tied = "head.weight"

    @property
    def follows_prompt(self) -> bool:
        """Whether tokens of each prompt take the place of the rarest ones in the draft vocabulary."""
        return self.settings["vocabulary"] == "prompt" and self.vocabulary is not None

    def start(self, traces: Sequence[Trace]) -> None:
        """From a layer of the target, from the lens, or from another head."""
        settings = self.settings
        if self.follows_prompt and settings["output_head"] == "free":
            raise EesdError(f"vocabulary: {VOCABULARY_OF_PROMPTS}")
        self.init, self.context = settings["init"], settings["context"]
        self.depth = settings["depth"] if self.context == "verified" else 1
        if self.origin:
            self.go_on(self.origin, traces)
        else:
            self.start_anew(traces)
        self.module.head.requires_grad_(settings["output_head"] == "free")

    def go_on(self, origin: Origin, traces: Sequence[Trace]) -> None:
        """Take over a trained head; at another exit than its own its layer reads other states: fit its lens anew."""
        self.module = head = origin.head
        if self.settings["output_head"] == "tied":  # perhaps to other rows than before
            head.token_ids, head.head.weight = self.vocabulary, nn.Parameter(self.head_rows)
        head.requires_grad_(True)
        if head.lens and origin.card["exit_layer"] != self.exit_layer:
            weight, bias = fit_lens(traces, self.exit_layer, self.target, head.deep, self.complete, head)
            with torch.no_grad():
                head.estimate.weight.copy_(weight)
                head.estimate.bias.copy_(bias)

    def start_anew(self, traces: Sequence[Trace]) -> None:
        """Take the weights that `init` names from the target."""
        target, init, deep = self.target, self.init, self.context == "verified"
        if init not in INITS:
            raise unknown("init", init, INITS)
        self.module = head = ExitHead(target.config, self.vocabulary, init == "lens", deep).to(target.device)
        source = target.layers[-1 if init == "last" else self.exit_layer]
        head.layer.load_state_dict(source.state_dict())
        head.norm.load_state_dict(target.norm.state_dict())
        head.head.load_state_dict({"weight": self.head_rows})
        with torch.no_grad():
            if deep:
                head.fuse.weight.zero_()
            if init == "lens":
                weight, bias = fit_lens(traces, self.exit_layer, target, deep, self.complete)
                head.estimate.weight.zero_()
                head.estimate.weight[:, : weight.shape[1]] = weight
                head.estimate.bias.copy_(bias)

    @classmethod
    def exits_after(cls, settings: Mapping[str, Any]) -> int:
        """Its exit layer."""
        return settings["exit_layer"]

    def batch(self, traces: Sequence[Trace]) -> Batch:
        """As in the base class, with the draft vocabulary after each prompt; tokens of the prompt, where they are
        learnt, are among it."""
        batch = super().batch(traces)
        if not self.follows_prompt:
            return batch
        prompts = [trace.tokens[: trace.prompt_tokens].tolist() for trace in traces]
        return replace(batch, words=PromptWords.of(self.vocabulary, prompts, self.target.head_weight))

    def predictions(self, batch: Batch, depth: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Rolled out as decoding does; see `rollout`."""
        spans = round_down(int(batch.begins.min())), batch.answer
        estimates = rollout(
            self.module, batch.states, batch.context, self.target.rotary, depth, *spans, starts=batch.starts
        )
        logits = None
        for step, estimate in enumerate(estimates, 1):
            where = batch.predicting(step)
            if self.module.deep or step == 1:
                logits = self._logits(estimate[where[:, -estimate.shape[1] :]], batch, where)
                yield where, logits
            else:  # without deep context every depth predicts the same
                yield where, logits[where[batch.predicting(1)]]

    def _logits(self, estimates: Tensor, batch: Batch, where: Tensor) -> Tensor:
        """Logits [n, rows] of the estimates [n, hidden] at the n predictions `where` [batch, seq]."""
        words = batch.words
        if words is None:
            return in_few_shapes(self.module.logits, estimates)
        logits = in_few_shapes(lambda x: head_logits(x, None, words.weight), estimates)
        return words.mask(logits, where.nonzero()[:, 0])


class MedusaStudent(Student):
    """`medusa_heads` heads on the target's final state, each starting as the target's own output head."""

    init, context, tied = "output", "verified", "outputs.0.weight"

    def start(self, traces: Sequence[Trace]) -> None:
        """As the target's own output head, behind blocks that pass states on."""
        self.depth, tied = self.settings["medusa_heads"], self.settings["output_head"] == "tied"
        config = self.target.config
        self.module = heads = MedusaHeads(config.hidden_size, config.vocab_size, self.vocabulary, self.depth, tied)
        heads.to(self.target.device)
        for block in heads.blocks:
            nn.init.zeros_(block.weight)
            nn.init.zeros_(block.bias)
        for output in heads.outputs:
            output.load_state_dict({"weight": self.head_rows})
        heads.outputs.requires_grad_(not tied)

    def predictions(self, batch: Batch, depth: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Of at most as many depths as there are heads."""
        states = batch.context
        for head in range(min(depth, self.depth)):
            where = batch.predicting(head + 1)
            yield where, in_few_shapes(partial(self.module.logits, head=head), states[where])
            # The next token of the same round lies one position further from the state that all heads read.
            states = F.pad(states[:, :-1], (0, 0, 1, 0))


STUDENTS: dict[str, type[Student]] = {"exit_layer": ExitStudent, "medusa": MedusaStudent}


def student_kind(settings: Mapping[str, Any]) -> type[Student]:
    """The class that trains heads of the kind that these settings name."""
    if settings["kind"] not in STUDENTS:
        raise unknown("kind of head", settings["kind"], STUDENTS)
    return STUDENTS[settings["kind"]]


def make_student(
    settings: Mapping[str, Any],
    target: Transformer,
    traces: Sequence[Trace],
    complete: Complete = as_they_are,
    origin: Origin | None = None,
) -> Student:
    """The head that these settings describe, before it is trained on these traces."""
    if not traces:
        raise EesdError("The corpus has no training traces. Raise its train_answers.")
    return student_kind(settings)(settings, target, traces, complete, origin)
