"""Decodes recorded in enough detail to be watched: every draft with its probabilities, every round with its seconds.

    python -m eesd view --model resources/models/smollm2-135m --settings '{...}' --out results/views/m/asdiv/main.jsonl

Each prompt is decoded twice by every method of a group: once by the clock, and once looking at the probabilities, which
takes time of its own. Both give the same tokens. `eesd viewer` makes a page of the rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from eesd import facts
from eesd.bench.methods import OwnMethod
from eesd.bench.runner import Bench, Prompt
from eesd.decoding.generate import Generation
from eesd.drafting import Drafter, Verified
from eesd.errors import EesdError
from eesd.files import write_atomic
from eesd.models.transformer import Transformer
from eesd.progress import progress


@dataclass(frozen=True)
class Drafted:
    """A drafted token, with its probability for drafter and target; None: copied with certainty."""

    token: int
    q: float | None
    p: float


@dataclass
class Watched:
    """A drafter that notes what it drafts and what becomes of it; all else is the drafter's own."""

    drafter: Drafter
    target: Transformer
    rounds: list[tuple[list[Drafted], int]] = field(default_factory=list)
    shares: list[float | None] = field(default_factory=list)
    tree: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.drafter, name)

    def draft(self, chain: Any, pending: int, slot: int) -> Tensor | None:
        """Let it draft, noting q of every token."""
        self.shares, self.tree = [], None
        return self.drafter.draft(_Chain(chain, self.shares), pending, slot)

    def draft_tree(self, tree: Any, slot: int) -> Tensor | None:
        """Let it draft a tree."""
        self.tree = tree
        return self.drafter.draft_tree(tree, slot)

    def accept(self, verified: Verified) -> None:
        """Note the drafter's own round, with the target's probabilities, before it learns of it."""
        if verified.own:
            self._note(verified)
        self.drafter.accept(verified)

    def _note(self, verified: Verified) -> None:
        laws = self.target.logits(verified.final[0]).float().softmax(-1)
        parents, shares = self._lineage(verified)
        drafts = [
            Drafted(token, share if share is None else round(share, 4), round(float(laws[parent, token]), 4))
            for token, parent, share in zip(verified.drafted, parents, shares, strict=True)
        ]
        self.rounds.append((drafts, verified.accepted))

    def _lineage(self, verified: Verified) -> tuple[Sequence[int], Sequence[float | None]]:
        """For every drafted token: the row of the token it follows, and q."""
        if self.tree is None:
            return range(len(verified.drafted)), self.shares
        tree, order = self.tree, [0]
        for token in verified.drafted[: verified.accepted]:
            order.append(next(n for n in tree.kept if tree.parents[n] == order[-1] and tree.tokens[n] == token))
        order += [node for node in tree.kept if node not in order]
        shares = [torch.tensor(tree.scores[n] - tree.scores[tree.parents[n]]).exp().item() for n in order[1:]]
        return [order.index(tree.parents[node]) for node in order[1:]], shares


class _Chain:
    """A chain that notes the probability of every token drafted into it."""

    def __init__(self, chain: Any, shares: list[float | None]) -> None:
        self._chain, self._shares = chain, shares

    def __getattr__(self, name: str) -> Any:
        return getattr(self._chain, name)

    def extend(self, logits: Tensor, vocabulary: Tensor | None = None) -> Tensor:
        self._shares.append(float(logits.float().softmax(-1).max()))
        return self._chain.extend(logits, vocabulary)

    def copy(self, token: int) -> int:
        self._shares.append(None)
        return self._chain.copy(token)


def record_views(model_dir: Path, settings: Mapping[str, Any], out: Path) -> None:
    """One row for each prompt and method of ours; EesdError for groups that sample, whose two runs would differ."""
    if settings["temperature"] > 0:
        raise EesdError(f"Group {settings['group']} samples. Views are recorded of greedy groups.")
    own = {name: method for name, method in settings["methods"].items() if "peer" not in method}
    bench = Bench(model_dir, {**settings, "methods": own})
    bench.warm_up()
    rows = []
    with progress(f"view {settings['group']}/{settings['task']}", len(bench.prompts) * len(own), "decode") as bar:
        for prompt in bench.prompts:
            for name in own:
                rows.append(_record(bench, prompt, name))
                bar.update()
    write_atomic(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _record(bench: Bench, prompt: Prompt, name: str) -> dict[str, Any]:
    """The row of one prompt and method."""
    method: OwnMethod = bench.methods[name]
    new = bench.settings["max_new_tokens"]
    # Of the second decode: with what the controllers know before the first one teaches them.
    again = method.twin()
    marks: list[float] = []
    timed = method(prompt.tokens, seed=0, max_new_tokens=new, on_tokens=lambda *_: marks.append(perf_counter()))
    drafts = _watch(again, prompt.tokens, timed, new) if method.drafter else [([], 0)] * len(timed.rounds)
    if drafts is None:
        raise EesdError(f"{prompt.item.id}, {name}: the two decodes differ, so what was seen is not what was timed.")
    rounds = list(_rounds(bench.tokenizer, prompt.tokens, timed, drafts, marks))
    return {
        **{key: bench.settings[key] for key in ("model", "task", "group")},
        "method": name,
        "item": prompt.item.id,
        "prompt": prompt.item.prompt,
        "first": _piece(bench.tokenizer, prompt.tokens, timed.tokens[0]),
        "rounds": rounds,
        "decode_s": rounds[-1]["s"] if rounds else 0.0,
        "dtype": str(bench.target.dtype).removeprefix("torch."),
        "device_name": facts.device_name(str(bench.target.device)),
        "engine": bench.engine.name,
        "threads": torch.get_num_threads(),
        "commit": facts.commit(),
    }


def _watch(
    method: OwnMethod, prompt: Sequence[int], timed: Generation, new: int
) -> list[tuple[list[Drafted], int]] | None:
    """Decode again, watching what is drafted in every round; None if it comes out differently."""
    watched = Watched(method.drafter, method.target)
    lookup = method.lookup
    if lookup:
        lookup = replace(lookup, drafter=Watched(lookup.drafter, method.target, watched.rounds))
    seen = replace(method, drafter=watched, lookup=lookup)(prompt, seed=0, max_new_tokens=new)
    return watched.rounds if (seen.tokens, seen.rounds) == (timed.tokens, timed.rounds) else None


def _rounds(
    tokenizer: Any,
    prompt: Sequence[int],
    generation: Generation,
    drafts: Sequence[tuple[list[Drafted], int]],
    marks: Sequence[float],
) -> Iterator[dict[str, Any]]:
    """What the page shows of every round: drafts, tokens kept, the target's own token, seconds since the prompt."""
    # A round tells of accepted tokens and of the target's own one after the other, the prompt of its one token.
    mark, text = 1, [*prompt, generation.tokens[0]]
    for (drafted, accepted), done in zip(drafts, generation.rounds, strict=True):
        left = generation.tokens[len(text) - len(prompt) :]
        kept = min(accepted, len(left))
        token = left[kept] if kept < len(left) else None
        mark += (kept > 0) + (token is not None)
        pieces, before = [], list(text)
        for i, draft in enumerate(drafted):
            if i > accepted:
                before = [*text, *left[:accepted]]  # of rejected tokens, the text they are not part of
            pieces.append({"text": _piece(tokenizer, before, draft.token), "q": draft.q, "p": draft.p})
            before = [*before, draft.token]
        yield {
            "drafts": pieces,
            "accepted": accepted,
            "kept": kept,
            "text": None if token is None else _piece(tokenizer, [*text, *left[:kept]], token),
            "stop": done.stop,
            "looked_up": done.looked_up,
            "s": round(marks[mark - 1] - marks[0], 5),
        }
        text += left[: kept + (token is not None)]


def _piece(tokenizer: Any, before: Sequence[int], token: int) -> str:
    """The text of a token after others, of which the last few decide about spaces and split characters."""
    context = list(before[-4:])
    return tokenizer.decode([*context, token])[len(tokenizer.decode(context)) :]
