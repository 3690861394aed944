"""Which sublayers a drafting target leaves out: Bayesian optimisation, as in Self-SD (arXiv 2309.08168).

    eesd skips --model resources/models/smollm2-135m --costs resources/hardware/smollm2-135m.json \
        --settings '{...}' --out results/skips/smollm2-135m/default.json

There each trial decodes and is timed. Here a trial replays: the target answers training prompts once, and for every
position of the answers it is found exactly how many tokens a set would draft rightly, all positions in one pass for
each drafted token. Rounds follow from these lengths, and seconds from the cost table, so a trial has no noise. The
first sets tried leave out the sublayers that are missed least alone, more and more of them. Half of the answers decide;
the figures of the best set on the other half are reported beside its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch

from eesd.cost_file import read_measured
from eesd.decoding.generate import generate
from eesd.drafting.self_sd import Skips
from eesd.errors import EesdError
from eesd.files import settings_hash, sha256_file, source_hash, write_atomic
from eesd.models.cache import KVCache
from eesd.models.engine import attach_engine
from eesd.models.kernels.layout import BLOCK_ROWS
from eesd.models.loading import load_target, load_tokenizer
from eesd.models.special import eos_ids, fingerprint, revision
from eesd.models.transformer import LayerCaches, Transformer, run_layers
from eesd.progress import progress
from eesd.tasks import TASKS, DataSource, encode_prompt

# Sets to begin with; the largest leaves out this share of all sublayers. Beyond, nothing is drafted rightly.
FIRST_TRIALS = 40
LARGEST_SHARE = 0.6


@dataclass(frozen=True)
class Prices:
    """Seconds of a vanilla token, of its head alone, and of verifying n tokens (`verify[n - 1]`)."""

    vanilla: float
    head: float
    verify: tuple[float, ...]

    def draft(self, kept: float) -> float:
        """A draft step that reads this share of the bytes of all layers: reading is what a token's time is spent on."""
        return self.head + kept * (self.vanilla - self.head)


def read_prices(path: Path, k_max: int) -> Prices:
    """Prices at the shortest context of a cost table; EesdError if verification of k_max + 1 tokens has none."""
    measured = read_measured(path)
    context = measured.contexts[0]
    if measured.longest("verify", context) <= k_max:
        raise EesdError(f"{path}: no cost of verifying {k_max + 1} tokens. Lower k_max, or measure longer ones.")
    verify = tuple(measured.cost("verify", n, context) for n in range(1, k_max + 2))
    return Prices(measured.cost("vanilla", 1, context), measured.cost("full_head", 1, context), verify)


class Answer:
    """A recorded answer, and how far a draft at any of its positions would agree with it.

    The cache holds the target's keys and values of prompt and answer, and behind them slots for every draft depth. The
    draft at a position sees the settled tokens before it and its own drafted ones.
    """

    def __init__(self, target: Transformer, prompt: Sequence[int], answer: Sequence[int], k_max: int) -> None:
        self.target, self.prompt_tokens, self.answer, self.k_max = target, len(prompt), list(answer), k_max
        self.settled = len(prompt) + len(answer)
        self.cache: KVCache = target.new_cache(self.settled + k_max * len(answer))
        window = target.config.window
        if window is not None and window < self.cache.capacity:
            raise EesdError("Self-SD is searched on answers within the attention window. Lower max_prompt_tokens.")
        target.run(target.embed(torch.tensor([[*prompt, *answer]], device=target.device)), slice(None), self.cache)

    def matches(self, layers: Sequence[Any]) -> list[int]:
        """For every token but the last: how many of the next ones, at most k_max, a draft after it has right."""
        count = len(self.answer)
        lengths = [0] * (count - 1)
        alive = list(range(count - 1))
        for depth in range(self.k_max):
            # The token that position i feeds at this depth is the answer's: a draft that left it is dead already.
            alive = [i for i in alive if i + depth + 1 < count]
            if not alive:
                break
            # Drafts do not see each other: in blocks that the engine takes.
            blocks = [alive[first : first + BLOCK_ROWS] for first in range(0, len(alive), BLOCK_ROWS)]
            best = [token for block in blocks for token in self._step(layers, block, depth)]
            alive = [i for i, token in zip(alive, best, strict=True) if token == self.answer[i + depth + 1]]
            for i in alive:
                lengths[i] = depth + 1
        return lengths

    def _step(self, layers: Sequence[Any], alive: list[int], depth: int) -> list[int]:
        """The token that each draft proposes after feeding its token of this depth."""
        target, device = self.target, self.target.device
        rows = torch.tensor(alive, device=device)
        tokens = torch.tensor([[self.answer[i + depth] for i in alive]], device=device)
        own = self.settled + torch.arange(depth + 1, device=device)[:, None] * len(self.answer) + rows  # [depth + 1, n]
        mask = torch.arange(int(own.max()) + 1, device=device) < self.prompt_tokens + rows[:, None]
        mask = mask.scatter(1, own.T, True)
        caches = LayerCaches(self.cache.keys, self.cache.values)
        positions = self.prompt_tokens + rows[None] + depth
        states = run_layers(layers, target.rotary, target.embed(tokens), caches, own[-1:], positions, mask[None, None])
        return target.logits(states[0]).argmax(-1).tolist()


@dataclass(frozen=True)
class Outcome:
    """What a set of sublayers gives with drafts of k tokens."""

    speedup: float
    k: int
    acceptance_rate: float
    tokens_per_round: float


def replay(answers: Sequence[Sequence[int]], k: int, kept: float, prices: Prices) -> Outcome:
    """Decode the answers, given as the right tokens of a draft at each position, in rounds of k drafted tokens."""
    rounds = drafted = accepted = tokens = 0
    seconds = 0.0
    for lengths in answers:
        i = 0
        while i < len(lengths):
            n = min(k, len(lengths) - i - 1)  # the last token of an answer is the target's own
            hits = min(lengths[i], n)
            seconds += n * prices.draft(kept) + prices.verify[n]
            rounds, drafted, accepted, i = rounds + 1, drafted + n, accepted + hits, i + hits + 1
        tokens += len(lengths)
    return Outcome(tokens * prices.vanilla / seconds, k, accepted / max(drafted, 1), tokens / rounds)


class Search:
    """Scores sets of sublayers on recorded answers."""

    def __init__(self, target: Transformer, answers: Sequence[Answer], prices: Prices, k_max: int) -> None:
        self.target, self.answers, self.prices, self.k_max = target, answers, prices, k_max
        layer = target.layers[0]
        sizes = [sum(w.numel() for w in part.parameters()) for part in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        self.attention_share = sum(sizes[:2]) / sum(sizes)

    def kept(self, skips: Skips) -> float:
        """Share of the bytes of all layers that a draft step still reads."""
        share, depth = self.attention_share, len(self.target.layers)
        return 1 - (len(skips.attention) * share + len(skips.mlp) * (1 - share)) / depth

    @torch.inference_mode()
    def score(self, skips: Skips, k: int | None = None) -> Outcome:
        """The outcome at this k, or at the best one."""
        layers = skips.layers(self.target)
        lengths = [answer.matches(layers) for answer in self.answers]
        choices = range(1, self.k_max + 1) if k is None else [k]
        return max((replay(lengths, k, self.kept(skips), self.prices) for k in choices), key=lambda o: o.speedup)

    def least_missed(self) -> list[str]:
        """All sublayers, those first whose absence alone costs the fewest accepted tokens for the bytes it saves."""
        cost = {}
        for name in _names(self.target):
            alone = _chosen({name: 1})
            cost[name] = (1 - self.score(alone, k=1).acceptance_rate) / (1 - self.kept(alone))
        return sorted(cost, key=cost.get)


def search_skips(model_dir: Path, costs: Path, settings: Mapping[str, Any], out: Path) -> None:
    """Try `trials` sets and write the best one as JSON; an interrupted search goes on where it stopped."""
    target = load_target(model_dir, settings["dtype"])
    attach_engine(target)
    prices = read_prices(costs, settings["k_max"])
    decide, check = _record(target, model_dir, settings)
    search = Search(target, decide, prices, settings["k_max"])
    texts = [[[one.prompt_tokens, one.answer] for one in answers] for answers in (decide, check)]
    stamp = settings_hash([revision(model_dir), dict(settings), sha256_file(costs), source_hash(), texts])
    study = _study(out, stamp, settings["seed"], search)
    with progress(f"skips {out.stem}", settings["trials"], "trial", initial=_done(study)) as bar:
        while _done(study) < settings["trials"]:
            trial = study.ask()
            skips = _chosen({name: trial.suggest_categorical(name, [0, 1]) for name in _names(target)})
            # Where reading weights is all that costs, drafts of the whole target come out even and would win.
            allowed = search.kept(skips) <= settings["max_kept"]
            study.tell(trial, search.score(skips).speedup if allowed else 0.0)
            bar.set_postfix_str(f"best {study.best_value:.2f}")
            bar.update()
    if study.best_value == 0:
        raise EesdError(
            f"No set of {settings['trials']} keeps at most {settings['max_kept']} of the layers. Raise trials."
        )
    best = _chosen(study.best_params)
    outcome = search.score(best)
    other = Search(target, check, prices, settings["k_max"]).score(best, outcome.k)
    found = {
        "fingerprint": fingerprint(model_dir),
        **best.as_json(),
        "kept_share": search.kept(best),
        "outcome": vars(outcome),
        "held_out": vars(other),
        "settings": dict(settings),
    }
    write_atomic(out, json.dumps(found, indent=1) + "\n")
    _journal(out, stamp).unlink(missing_ok=True)


def _record(target: Transformer, model_dir: Path, settings: Mapping[str, Any]) -> tuple[list[Answer], list[Answer]]:
    """Answers that decide and answers that only check, from the same tasks."""
    tokenizer = load_tokenizer(model_dir)
    stop, wanted = eos_ids(model_dir, tokenizer), 2 * settings["prompts_per_task"]
    parts: tuple[list[Answer], list[Answer]] = ([], [])
    for task in settings["tasks"]:
        found = 0
        for item in TASKS[task].items("train", DataSource.of(settings)):
            prompt = encode_prompt(tokenizer, item.prompt)
            if len(prompt) > settings["max_prompt_tokens"]:
                continue
            answer = generate(target, prompt, max_new_tokens=settings["max_new_tokens"], eos=stop).tokens
            if len(answer) > 2:
                with torch.inference_mode():
                    parts[found % 2].append(Answer(target, prompt, answer, settings["k_max"]))
                found += 1
            if found == wanted:
                break
    if not all(parts):
        raise EesdError("Too few training prompts fit to search sublayers on. Raise max_prompt_tokens of `skips`.")
    return parts


def _journal(out: Path, stamp: str) -> Path:
    return out.with_name(f"{out.stem}.{stamp}.journal")


def _study(out: Path, stamp: str, seed: int, search: Search) -> optuna.Study:
    """The study of this search, with what an interrupted run of it has tried."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    out.parent.mkdir(parents=True, exist_ok=True)
    backend = optuna.storages.journal.JournalFileBackend(str(_journal(out, stamp)))
    storage = optuna.storages.JournalStorage(backend)
    study = optuna.create_study(study_name="skips", storage=storage, direction="maximize", load_if_exists=True)
    # A restart must not repeat the random numbers of the trials that it finds.
    study.sampler = optuna.samplers.TPESampler(
        seed=seed + _done(study), n_startup_trials=FIRST_TRIALS, multivariate=True
    )
    if not study.trials:
        order = search.least_missed()
        for n in range(1, FIRST_TRIALS + 1):
            left_out = set(order[: round(LARGEST_SHARE * len(order) * n / FIRST_TRIALS)])
            study.enqueue_trial({name: int(name in left_out) for name in order})
    return study


def _done(study: optuna.Study) -> int:
    return len(study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,)))


def _names(target: Transformer) -> list[str]:
    return [f"{part}.{i}" for i in range(target.config.num_layers) for part in ("attention", "mlp")]


def _chosen(values: Mapping[str, int]) -> Skips:
    chosen = {"attention": set(), "mlp": set()}
    for name, value in values.items():
        part, layer = name.split(".")
        if value:
            chosen[part].add(int(layer))
    return Skips(frozenset(chosen["attention"]), frozenset(chosen["mlp"]))
