"""What every piece of decoding costs on this machine: the cost table that explains speedups and that replay uses.

    eesd hardware --model resources/models/smollm2-135m --out resources/hardware/here.json
    eesd hardware --shape llama-2-13b --contexts 128,1024,4096 --out a100-llama-2-13b.json       # random weights

All pieces are timed in turn, round after round in random order, a few rounds of each context length at a time, and
medians are kept, so that drifts of the machine's speed fall on all alike. Before each measurement the caches of the
processor are as decoding leaves them. On a GPU a piece ends when the host knows its result, as in decoding; only
drafting, whose steps decoding queues one behind the other, is timed as a queue.
"""

from __future__ import annotations

import json
import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, product
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from eesd import facts
from eesd.bench.load import Crowding
from eesd.bench.rounds import decision_times, time_rounds
from eesd.control import make_controller
from eesd.control.base import check_count
from eesd.decoding.chain import read_signal
from eesd.decoding.generate import Generation, generate
from eesd.drafting.exit_head import ExitHead, ExitHeadDrafter
from eesd.errors import EesdError, unknown
from eesd.files import write_atomic
from eesd.models.draft_steps import draft_steps
from eesd.models.engine import attach_engine, bfloat16_exact
from eesd.models.graphs import GraphEngine
from eesd.models.loading import load_target
from eesd.models.passes import Passes
from eesd.models.shapes import SHAPES, random_module, random_target
from eesd.models.transformer import Layer, Transformer
from eesd.progress import progress
from eesd.words import DISTURBED

QUERIES = tuple(range(1, 17))
CONTEXTS = (128, 512, 1024)
ROUNDS = 24
# Rounds of one context length before the next has its turn: a shared machine is slow for seconds at a time.
TURN = 4
DRAFT_ROWS = 8192
# What is read to measure bandwidth: many times the caches of a processor.
STREAM_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
# Calls behind one another on a GPU where a single one would mostly measure the way there and back.
QUEUED = 8


@dataclass(frozen=True)
class Cost:
    """Median seconds of one piece, and the bytes of weights and cache it has to read."""

    path: str
    query_tokens: int
    context_tokens: int
    seconds: float
    bytes: int


# What times are kept under: path, query tokens, bytes.
Key = tuple[str, int, int]


@dataclass(frozen=True)
class Piece:
    """Something to time: `run()` once, reading `bytes`; `queued` if decoding does not wait for it on a GPU."""

    path: str
    query_tokens: int
    run: Callable[[], Any]
    bytes: int
    queued: bool = False

    @property
    def key(self) -> Key:
        return self.path, self.query_tokens, self.bytes


def measure_hardware(
    model: Path | None,
    shape: str | None,
    out: Path,
    exit_layer: int = 4,
    dtype: str = "auto",
    contexts: Sequence[int] = CONTEXTS,
    rounds: int = ROUNDS,
    device: str | None = None,
    draft_rows: int | str = DRAFT_ROWS,
) -> None:
    """Time all pieces and write the cost table as JSON; give a model folder or the name of a shape.

    exit_layer: layers below the exit head. device: `cpu`, `cuda`, `cuda:1` ...; None takes a CUDA device if there is
    one. draft_rows: how many tokens the head can draft, or `full`.
    """
    check_count("rounds of a cost table", rounds)
    for context in contexts:
        check_count("a context of a cost table", context)
    target, name = _target(model, shape, dtype, _device(device), max(contexts, default=0))
    engine = attach_engine(target)
    target.config.check_exit_layer(exit_layer)
    limit = target.config.max_positions - max(QUERIES)
    contexts = [context for context in contexts if context <= limit]
    if not contexts:
        raise EesdError(f"No context length to measure: {name} has room for at most {limit} tokens before a query.")
    bench = Pieces(target, exit_layer, _draft_rows(draft_rows, target.config.vocab_size))
    # Before another library's copy of the model takes memory too.
    peak = peak_memory(target, bench.head, exit_layer, contexts)
    peer = _peer(model, target) if model else None
    crowding = Crowding(torch.get_num_threads())
    matmul, stream = matmul_rate(target.device, target.dtype), read_stream(target.device)
    decisions, rng = decision_times(), random.Random(0)
    times: dict[tuple[Key, int], list[float]] = defaultdict(list)
    turns = [min(TURN, rounds - done) for done in range(0, rounds, TURN)]
    with progress(f"hardware {name}", len(contexts) * rounds, "round") as bar, torch.inference_mode():
        pieces = {context: [*bench.at(context), stream, *([peer(context)] if peer else [])] for context in contexts}
        for count, context in product(turns, contexts):
            alone = time_pieces(pieces[context], count, target.device, rng, bar.update)
            for key, seconds in chain(alone, bench.rounds(pieces[context], context, count, rng)):
                times[key, context] += seconds
    costs = [
        Cost(path, query, context, statistics.median(seconds), size)
        for ((path, query, size), context), seconds in times.items()
    ]
    crowded = crowding.share()
    if crowded > DISTURBED:
        print(f"Other processes took {crowded:.0%} of the processors: measure again on a quiet machine.")
    found = {
        "model": name,
        "device": facts.device_name(str(target.device)),
        "dtype": str(target.dtype).removeprefix("torch."),
        "engine": engine.name,
        "threads": torch.get_num_threads(),
        "layers": len(target.layers),
        "distinct_layers": len(set(target.layers)),
        "exit_layer": exit_layer,
        "draft_rows": bench.draft_rows,
        "read_bandwidth_bytes_per_s": statistics.median(c.bytes / c.seconds for c in costs if c.path == stream.path),
        "matmul_flops_per_s": matmul,
        "controller_step_s": decisions["beta_ts"],
        "decisions_s": decisions,
        "queued_draft_steps": _calls(target.device, True),
        "capture_s": GraphEngine.capture_s,
        "crowding": crowded,
        "peak_memory_bytes": peak,
        "versions": facts.versions(),
        "commit": facts.commit(),
        "costs": [asdict(cost) for cost in costs],
    }
    write_atomic(out, json.dumps(found, indent=1) + "\n")


def _device(name: str | None) -> str:
    """The device that was asked for, if torch can use it here."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda"):
        raise unknown("device", name, ("cpu", "cuda"))
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if not (index or "0").isdigit() or int(index or 0) >= count:
        raise EesdError(f"Device {name} is not here: torch {torch.__version__} finds {count} of its kind.")
    return name


def _draft_rows(given: int | str, vocab_size: int) -> int:
    if given == "full":
        return vocab_size
    if not str(given).isdigit() or int(given) < 1:
        raise EesdError(f"--draft-rows must be a number above 0, or full, not '{given}'.")
    return int(given)


def _target(
    model: Path | None, shape: str | None, dtype: str, device: str, longest_context: int
) -> tuple[Transformer, str]:
    if (model is None) == (shape is None):
        raise EesdError("Give either --model FOLDER or --shape NAME.")
    if model is not None:
        return load_target(model, dtype, device), model.name
    if shape not in SHAPES:
        raise unknown("shape", shape, SHAPES)
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "auto": torch.bfloat16}
    if dtype not in kinds:
        raise unknown("dtype", dtype, kinds)
    # Random weights have no context that they were trained for.
    positions = max(SHAPES[shape].max_positions, longest_context + max(QUERIES))
    return random_target(replace(SHAPES[shape], max_positions=positions), kinds[dtype], device), shape


class Pieces:
    """The pieces of one target at any context length, with an untrained exit head over `draft_rows` tokens.

    The head has lens and deep context, as the suite's own heads: they add two matrices to the paper's layer.
    """

    def __init__(self, target: Transformer, exit_layer: int, draft_rows: int = DRAFT_ROWS) -> None:
        self.target, self.exit_layer = target, exit_layer
        self.draft_rows = min(draft_rows, target.config.vocab_size)
        rows = torch.arange(self.draft_rows)
        with torch.device("meta"):
            head = ExitHead(target.config, rows, lens=True, deep=True)
        # Rounded to what a trained head is stored as.
        head = random_module(head, torch.bfloat16, str(target.device)).to(target.dtype)
        head.token_ids = rows.to(target.device)
        self.head = head.requires_grad_(False)
        self.head.pack(target.engine)

    def at(self, context: int) -> list[Piece]:
        """All pieces with `context` tokens in the cache before the query."""
        target, cut = self.target, self.exit_layer
        cache = target.new_cache(context + max(QUERIES))
        cache.keys.normal_()
        cache.values.normal_()
        exit_cache = target.new_cache(context + max(QUERIES), num_layers=1)
        states = {
            k: torch.randn(1, k, target.config.hidden_size, device=target.device).to(target.dtype) for k in QUERIES
        }
        token = torch.zeros((1, 1), dtype=torch.long, device=target.device)
        whole, rest = Passes(target, cache), Passes(target, cache, cut)

        def layers(part: slice, k: int) -> Tensor:
            return target.run(states[k], part, cache, context)

        def verify(passes: Passes, k: int, at_exit: Tensor | None = None) -> Tensor | list[int]:
            return passes.run([0] * k, at_exit, context).choices()

        def exit_step(k: int) -> Tensor:
            return self.head.step(states[k], states[k], target.rotary, exit_cache, context)

        def draft_head() -> Tensor:
            return self.head.logits(states[1][0]).argmax(-1)

        steps = draft_steps(target, self.head, cut, cache, exit_cache)

        def draft() -> Tensor:
            if steps and steps.begin(states[1][:, :0], states[1], context, 1):
                return steps.step(0).argmax(-1)
            state = target.run(target.embed(token), slice(0, cut), cache, context)
            estimate = self.head.step(state, states[1], target.rotary, exit_cache, context)
            return self.head.logits(estimate).argmax(-1)

        logits = self.head.logits(states[1][0])[0]
        row = logits.argmax()
        depth = target.config.num_layers
        all_layers, first = self._layers(depth, context), self._layers(cut, context)
        draft_bytes = stored_bytes(self.head.head.weight)
        exit_bytes = self._layers(1, context, self.head.layer)
        exit_bytes += stored_bytes(self.head.fuse.weight) + stored_bytes(self.head.estimate.weight)
        full_head = stored_bytes(target.head_weight)
        pieces = [
            Piece("vanilla", 1, lambda: verify(whole, 1), all_layers + full_head),
            Piece("first_layers", 1, lambda: layers(slice(0, cut), 1), first, queued=True),
            Piece("draft_head", 1, draft_head, draft_bytes, queued=True),
            Piece("draft", 1, draft, first + exit_bytes + draft_bytes, queued=True),
            Piece("signal", 1, lambda: read_signal(logits, row, engine=target.engine), 4 * self.draft_rows),
            Piece("full_head", 1, lambda: target.logits(states[1][0]).argmax(-1), full_head),
        ]
        for k in QUERIES:
            late_bytes = all_layers - first + full_head
            pieces.append(Piece("exit_layer", k, lambda k=k: exit_step(k), exit_bytes, queued=True))
            pieces.append(Piece("verify", k, lambda k=k: verify(whole, k), all_layers + full_head))
            pieces.append(Piece("verify_from_exit", k, lambda k=k: verify(rest, k, states[k]), late_bytes))
        return pieces

    def rounds(
        self, pieces: Sequence[Piece], context: int, count: int, rng: random.Random
    ) -> Iterator[tuple[Key, list[float]]]:
        """Seconds of whole rounds of the decode loop that draft 0, 1 ... tokens, `query_tokens` of them; of vanilla's.

        pieces: what they are made of.
        """
        longest = max(QUERIES) - 1
        rounds, vanilla = time_rounds(self.target, self.head, self.exit_layer, context, count, longest, rng)
        read = {(piece.path, piece.query_tokens): piece.bytes for piece in pieces}
        first, draft, whole = read["first_layers", 1], read["draft", 1], read["vanilla", 1]
        for k, seconds in enumerate(rounds):
            yield ("round", k, k * draft + first + read["verify_from_exit", k + 1] if k else whole), seconds
        yield ("vanilla_round", 1, whole), vanilla

    def _layers(self, count: int, context: int, layer: Layer | None = None) -> int:
        """Bytes of `count` layers: weights, and the keys and values of the context."""
        config, layer = self.target.config, layer or self.target.layers[0]
        cached = 2 * context * config.num_kv_heads * config.head_dim * self.target.dtype.itemsize
        return count * (sum(stored_bytes(weight) for weight in layer.parameters()) + cached)


def stored_bytes(weight: Tensor) -> int:
    """Bytes that are read for a weight: the engine keeps it in bfloat16 where that is exact."""
    packed = weight.device.type == "cpu" and weight.dim() > 1 and bfloat16_exact(weight)
    return weight.numel() * (2 if packed else weight.dtype.itemsize)


def time_pieces(
    pieces: Sequence[Piece], rounds: int, device: torch.device, rng: random.Random, tick: Callable[[], Any]
) -> list[tuple[Key, list[float]]]:
    """Seconds of every piece in each of `rounds` rounds, of which each has its own random order."""
    seconds: list[list[float]] = [[] for _ in pieces]
    for piece in pieces:
        piece.run()
    for _ in range(rounds):
        for i in rng.sample(range(len(pieces)), len(pieces)):
            seconds[i].append(_seconds(pieces[i].run, device, _calls(device, pieces[i].queued)))
        tick()
    return [(piece.key, found) for piece, found in zip(pieces, seconds, strict=True)]


def _seconds(run: Callable[[], Any], device: torch.device, calls: int) -> float:
    """Seconds of one of `calls` calls behind one another, from an idle device to an idle device."""
    _wait(device)
    began = perf_counter()
    for _ in range(calls):
        run()
    _wait(device)
    return (perf_counter() - began) / calls


def _calls(device: torch.device, queued: bool) -> int:
    return QUEUED if queued and device.type == "cuda" else 1


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def read_stream(device: torch.device) -> Piece:
    """Summing a long vector: the bound of everything that has to read its weights.

    Timed in the same rounds as the pieces, because on a shared machine bandwidth changes from minute to minute.
    """
    data = torch.ones(STREAM_BYTES[device.type] // 4, device=device)
    return Piece("stream", 0, data.sum, STREAM_BYTES[device.type], queued=True)


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 0) -> float:
    """Floating-point operations per second of a square product, the bound of prefill and of many query rows."""
    size = size or (8192 if device.type == "cuda" else 2048)
    a = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / _best(lambda: a @ a, device, 5)


def _best(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    return min([_seconds(run, device, _calls(device, True)) for _ in range(repeats + 1)][1:])


def peak_memory(target: Transformer, head: ExitHead, exit_layer: int, contexts: Sequence[int]) -> int | None:
    """Most bytes allocated while decoding with a cache for the longest context: weights, caches, states. GPU only."""
    if target.device.type != "cuda" or not contexts:
        return None
    torch.cuda.reset_peak_memory_stats(target.device)
    _decode(target, head, exit_layer, contexts)
    return torch.cuda.max_memory_allocated(target.device)


def _decode(target: Transformer, head: ExitHead, exit_layer: int, contexts: Sequence[int]) -> Generation:
    """A few tokens after a short prompt, in a cache for the longest context."""
    cache = target.new_cache(max(contexts) + max(QUERIES))
    drafter, controller = ExitHeadDrafter(head, exit_layer), make_controller({"name": "static"})
    prompt = [0] * min(contexts[0], cache.capacity // 2)
    new = min(32, cache.capacity - len(prompt))
    return generate(target, prompt, drafter=drafter, controller=controller, max_new_tokens=new, cache=cache)


def _peer(model: Path, target: Transformer) -> Callable[[int], Piece]:
    """One token of the Hugging Face model with its own cache: what `generate` spends on the model alone."""
    from transformers import AutoModelForCausalLM, DynamicCache

    reference: nn.Module = AutoModelForCausalLM.from_pretrained(model, dtype=target.dtype, local_files_only=True)
    reference = reference.to(target.device).eval()
    size = sum(p.numel() * p.element_size() for p in reference.parameters())

    def at(context: int) -> Piece:
        cache = DynamicCache(config=reference.config)
        ids = torch.zeros((1, context), dtype=torch.long, device=target.device)
        reference(ids, past_key_values=cache, use_cache=True)

        def step() -> Tensor:
            logits = reference(ids[:, :1], past_key_values=cache, use_cache=True).logits[0, -1].argmax(-1)
            cache.crop(-1)
            return logits

        return Piece("hf_forward", 1, step, size)

    return at
