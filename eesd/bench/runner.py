"""The benchmark of one (model, task, group): paired units, every method back to back in seeded random order.

    python -m eesd bench --model resources/models/smollm2-135m --settings '{"task": "asdiv", ...}' \
        --out results/bench/smollm2-135m/asdiv/main.jsonl

A speedup is a ratio inside a unit, so drifts of the machine's speed cancel. Warm-up generations are dropped.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import torch

from eesd import facts
from eesd.bench.compare import Comparison, Judge
from eesd.bench.load import Crowding
from eesd.bench.memory import Memory
from eesd.bench.methods import Method, OwnMethod, build_method, is_lossy, method_identity, tree_room
from eesd.bench.records import SCHEMA, Row, RowFile
from eesd.decoding.generate import Generation, Round
from eesd.decoding.sampling import Sampling
from eesd.errors import EesdError
from eesd.files import settings_hash, source_hash
from eesd.models.engine import Engine, attach_engine
from eesd.models.graphs import GraphEngine
from eesd.models.loading import load_target, load_tokenizer
from eesd.models.special import eos_ids, revision
from eesd.models.transformer import Transformer
from eesd.ngrams import LOOKED_UP
from eesd.progress import progress
from eesd.tasks import TASKS, DataSource, Item, encode_prompt
from eesd.words import BASELINE, DISTURBED, PARTS

WARMUP_TOKENS = 16


@dataclass(frozen=True)
class Prompt:
    """An item with the token ids its prompt becomes."""

    item: Item
    tokens: list[int]


class Bench:
    """Everything that stays the same over the units of one (model, task, group)."""

    def __init__(self, model_dir: Path, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        if settings["threads"]:
            torch.set_num_threads(settings["threads"])
        self.task = TASKS[settings["task"]]
        self.target: Transformer = load_target(model_dir, settings["dtype"])
        # The engines know no float64.
        self.engine = attach_engine(self.target, "torch" if self.target.dtype == torch.float64 else None)
        self.exact = settings.get("exact", False)
        if self.exact:
            check_exact(self.engine)
        self.tokenizer = load_tokenizer(model_dir)
        self.sampling = Sampling(settings["temperature"], settings["top_k"], settings["top_p"])
        items = self.task.items("evaluation", DataSource.of(settings))
        # What scores rest on, beside the text: rows against other references are not mixed.
        self.references = settings_hash([[item.id, item.reference, item.extra, item.dataset] for item in items])
        self.prompts = self._select_prompts(items)
        self._check_lengths()
        eos = eos_ids(model_dir, self.tokenizer)
        self.judge = Judge(self.target, model_dir, eos, self.exact)
        self.peer_judge = Judge(self.target, model_dir, eos) if self.exact else self.judge
        longest = max(len(prompt.tokens) for prompt in self.prompts) + settings["max_new_tokens"]
        cache = self.target.new_cache(longest + max(map(tree_room, settings["methods"].values())))
        self.identities = {name: self._identity(method) for name, method in settings["methods"].items()}
        self.methods: dict[str, Method] = {
            name: build_method(name, method, self.target, model_dir, self.sampling, eos, cache)
            for name, method in settings["methods"].items()
        }
        self.row_hashes = self.hashes(model_dir)

    def hashes(self, model_dir: Path) -> dict[str, str]:
        """What rows of each method must agree on to be mixed: settings, and all that they were measured with."""
        surroundings = {
            "model": revision(model_dir),
            "references": self.references,
            "dtype": str(self.target.dtype),
            "device": facts.device_name(str(self.target.device)),
            "engine": self.engine.name,
            "versions": facts.versions(),
            "source": source_hash(),
        }
        return {name: settings_hash({**identity, **surroundings}) for name, identity in self.identities.items()}

    def _check_lengths(self) -> None:
        limit, new = self.target.config.max_positions, self.settings["max_new_tokens"]
        for prompt in self.prompts:
            if len(prompt.tokens) + new > limit:
                raise EesdError(
                    f"{prompt.item.id} has {len(prompt.tokens)} tokens; with max_new_tokens {new} that exceeds the "
                    f"model's context of {limit}. Set max_prompt_tokens of the group to at most {limit - new}."
                )

    def _identity(self, method: Mapping[str, Any]) -> dict[str, Any]:
        """What rows of a method depend on, decoding settings included."""
        shared = {
            key: self.settings[key]
            for key in ("max_new_tokens", "max_prompt_tokens", "temperature", "top_k", "top_p", "dtype")
        }
        exact = {"exact": True} if self.exact else {}
        return {**method_identity(method), **shared, **exact, "threads": torch.get_num_threads()}

    def _select_prompts(self, items: Sequence[Item]) -> list[Prompt]:
        """The first evaluation items whose prompt fits `max_prompt_tokens`; longer ones are left out, never cut."""
        prompts = []
        for item in items:
            tokens = encode_prompt(self.tokenizer, item.prompt)
            if len(tokens) <= self.settings["max_prompt_tokens"]:
                prompts.append(Prompt(item, tokens))
            if len(prompts) == self.settings["prompts"]:
                return prompts
        raise EesdError(
            f"Task {self.settings['task']} has {len(prompts)} evaluation prompts of at most "
            f"{self.settings['max_prompt_tokens']} tokens, but {self.settings['prompts']} are asked for. "
            "Lower `prompts` or raise `max_prompt_tokens` of the group."
        )

    def warm_up(self) -> None:
        """Run every method a few tokens far, so that no unit pays for first calls."""
        for _ in range(self.settings["warmup"]):
            for method in self.methods.values():
                # A twin learns instead: what a controller that never forgets meets first is the first unit.
                warmed = method.twin() if isinstance(method, OwnMethod) else method
                warmed(self.prompts[0].tokens, seed=0, max_new_tokens=WARMUP_TOKENS)

    def run_unit(self, prompt: Prompt, repeat: int) -> list[Row]:
        """All methods on one prompt, in an order drawn from (item, repeat); rows in that order."""
        seed = crc32(f"{prompt.item.id}/{repeat}".encode())
        order = list(self.methods)
        random.Random(seed).shuffle(order)
        outputs, crowding = {}, {}
        for name in order:
            others = Crowding(torch.get_num_threads() if self.target.device.type == "cpu" else 1)
            outputs[name] = self.methods[name](prompt.tokens, seed=seed, max_new_tokens=self.settings["max_new_tokens"])
            crowding[name] = others.share()
        rows = []
        for position, name in enumerate(order):
            comparison = self._compare(prompt, name, outputs)
            row = self._row(prompt, repeat, name, position, seed, outputs[name], comparison, crowding[name])
            rows.append(row)
        return rows

    def _compare(self, prompt: Prompt, name: str, outputs: Mapping[str, Generation]) -> Comparison:
        if name == BASELINE:
            return Comparison("baseline")
        if not self.sampling.greedy:
            return Comparison("not_compared")
        return self._judge(name).compare(prompt.tokens, outputs[BASELINE].tokens, outputs[name].tokens)

    def _judge(self, name: str) -> Judge:
        """A peer computes in its own way, which an exact group promises nothing about."""
        if "peer" in self.settings["methods"][name]:
            return self.peer_judge
        return self.judge

    def _row(
        self,
        prompt: Prompt,
        repeat: int,
        name: str,
        order: int,
        seed: int,
        output: Generation,
        comparison: Comparison,
        crowding: float,
    ) -> Row:
        text = self.tokenizer.decode(output.tokens, skip_special_tokens=True)
        device = str(self.target.device)
        return {
            "schema": SCHEMA,
            "model": self.settings["model"],
            "task": self.settings["task"],
            "dataset": prompt.item.dataset,
            "group": self.settings["group"],
            "method": name,
            "item": prompt.item.id,
            "repeat": repeat,
            "order": order,
            "seed": seed,
            "decoding": "greedy" if self.sampling.greedy else "sampled",
            "temperature": self.sampling.temperature,
            "dtype": str(self.target.dtype).removeprefix("torch."),
            "device": device,
            "engine": "transformers" if "peer" in self.settings["methods"][name] else self.engine.name,
            "settings": self.identities[name],
            "settings_hash": self.row_hashes[name],
            "prompt_tokens": prompt.tokens,
            "output_tokens": output.tokens,
            "text": text,
            "finish": output.finish,
            "rounds": [_listed(one) for one in output.rounds],
            "seconds": {part: _rounded(output.seconds.get(part)) for part in (*PARTS, "total")},
            "crowding": round(crowding, 4),
            "exact": self.exact,
            "lossy": is_lossy(self.settings["methods"][name]) and not self.sampling.greedy,
            "scores": self.task.score(text, prompt.item),
            "comparison": comparison.as_row(),
            **facts.provenance(self.target.device),
        }


def check_exact(engine: Engine | GraphEngine) -> None:
    """EesdError unless a row's numbers do not depend on the rows beside it, which C++ alone promises."""
    if not engine.name.startswith("cpp-"):
        raise EesdError(
            f"`exact: true` needs an engine whose numbers do not depend on how many tokens are computed at once, which "
            f"'{engine.name}' does not promise. Remove EESD_ENGINE, install a C++ compiler and use a CPU with float32 "
            "or bfloat16; or set exact: false."
        )


def _listed(one: Round) -> list[Any]:
    """A round as rows hold it."""
    return [one.drafted, one.accepted, one.stop, *([LOOKED_UP] if one.looked_up else [])]


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 7)


def run_bench(model_dir: Path, settings: Mapping[str, Any], out: Path) -> None:
    """Measure every unit that is missing, then give the file its final name."""
    if BASELINE not in settings["methods"]:
        raise EesdError(
            f"Group {settings['group']} has no method '{BASELINE}', the baseline of all comparisons. Add it."
        )
    bench = Bench(model_dir, settings)
    prompts = {prompt.item.id: prompt.tokens for prompt in bench.prompts}
    rows = RowFile(out, bench.row_hashes, prompts, settings["repeats"])
    memory = Memory(out.with_name(out.name + ".memory"), bench.methods)
    if not memory.restore(rows.done):
        rows.start_anew("does not tell what its controllers with `reset_on: never` had learnt")
    units = [(prompt, repeat) for repeat in range(settings["repeats"]) for prompt in bench.prompts]
    missing = [(prompt, repeat) for prompt, repeat in units if (prompt.item.id, repeat) not in rows.done]
    if missing:
        bench.warm_up()
    title = f"bench {settings['group']}/{settings['task']}"
    seconds = lost = 0.0
    with progress(title, len(units), "unit", initial=len(units) - len(missing)) as bar:
        for prompt, repeat in missing:
            unit = bench.run_unit(prompt, repeat)
            seconds += sum(row["seconds"]["total"] for row in unit)
            lost += sum(row["seconds"]["total"] * row["crowding"] for row in unit)
            memory.save({*rows.done, (prompt.item.id, repeat)})
            rows.append(unit)
            bar.update()
    rows.finish()
    memory.forget()
    if lost > DISTURBED * seconds:
        print(
            f"{title}: other processes took {lost / seconds:.0%} of the processors, so these times say little. Stop "
            f"them, delete {out} and run again."
        )
