"""Certifying anybody's greedy outputs: any rows with `prompt_tokens` and `output_tokens` against vanilla.

    eesd check rows.jsonl --model resources/models/smollm2-135m                 # vanilla is decoded now
    eesd check rows.jsonl --against vanilla.jsonl --model resources/models/...  # or read from another file
    eesd check results/bench/.../main.jsonl --model ... --method eesd --item asdiv-3 --again    # decode both again

A file may be rows of a benchmark (their own vanilla rows are the reference) or JSON lines of any program, such as the
ids that Hugging Face `generate` returned. Status 1 if an output is `different`.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eesd.bench.compare import Comparison, Judge
from eesd.bench.methods import build_method
from eesd.decoding.generate import generate
from eesd.decoding.sampling import Sampling
from eesd.errors import EesdError, unknown
from eesd.files import read_jsonl
from eesd.models.engine import attach_engine
from eesd.models.loading import load_target, load_tokenizer
from eesd.models.special import eos_ids
from eesd.models.transformer import Transformer
from eesd.words import BASELINE

Row = dict[str, Any]


def check_outputs(
    path: Path,
    model_dir: Path,
    against: Path | None = None,
    dtype: str | None = None,
    method: str | None = None,
    item: str | None = None,
    max_new_tokens: int | None = None,
    again: bool = False,
) -> list[Comparison]:
    """Compare every output with vanilla's and print the certificate; EesdError if one is `different`.

    dtype: of the arithmetic that made the outputs; None takes the rows' own, else float32. max_new_tokens: the limit
    that was in force, for outputs whose rows do not say it; None takes each output's own length.
    """
    rows = _read(path)
    own = [row for row in rows if row.get("method") == BASELINE]
    chosen = _choose(rows, path, method, item)
    dtype = dtype or chosen[0].get("dtype", "float32")
    target = load_target(model_dir, dtype)
    attach_engine(target, "torch" if dtype == "float64" else None)
    _check_ids(chosen, target)
    eos = eos_ids(model_dir, load_tokenizer(model_dir))
    reference = {} if again else _reference(_read(against) if against else own)
    judge = Judge(target, model_dir, eos)
    found = []
    for row in chosen:
        vanilla = reference.get(tuple(row["prompt_tokens"]))
        if vanilla is None and against:
            raise EesdError(f"{row['where']}: no row of {against} has its prompt. Leave --against out to decode it.")
        limit = max_new_tokens or (row.get("settings") or {}).get("max_new_tokens") or len(row["output_tokens"])
        if vanilla is None:
            vanilla = generate(target, row["prompt_tokens"], max_new_tokens=limit, eos=eos).tokens
        output = _decode_again(row, target, model_dir, eos, limit) if again else row["output_tokens"]
        # As in the run: an exact group promises bits, though not those of another library.
        judge.exact = bool(row.get("exact")) and "peer" not in (row.get("settings") or {})
        found.append(judge.compare(row["prompt_tokens"], vanilla, output))
    _report(chosen, found, path, model_dir, dtype)
    return found


def _read(path: Path) -> list[Row]:
    rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        row["where"] = f"{path}, row {number}"
        for field in ("prompt_tokens", "output_tokens"):
            tokens = row.get(field)
            if not isinstance(tokens, list) or not tokens or any(type(t) is not int or t < 0 for t in tokens):
                raise EesdError(
                    f"{row['where']}: '{field}' is {str(tokens)[:60]}, expected a non-empty list of token ids. One "
                    'object a line: {"prompt_tokens": [..], "output_tokens": [..]}, without the prompt in the output.'
                )
        if row.get("decoding", "greedy") != "greedy":
            raise EesdError(
                f"{row['where']}: a sampled output, which differs by chance. `eesd certify` tests sampling."
            )
    return rows


def _choose(rows: Sequence[Row], path: Path, method: str | None, item: str | None) -> list[Row]:
    """The rows to certify: all but vanilla's own, or those of a method and item."""
    chosen = [row for row in rows if row.get("method") != BASELINE]
    for key, wanted in (("method", method), ("item", item)):
        if wanted is not None:
            known = {str(row.get(key)) for row in chosen}
            if wanted not in known:
                raise EesdError(f"{path}: {unknown(key, wanted, sorted(known))}")
            chosen = [row for row in chosen if str(row.get(key)) == wanted]
    if not chosen:
        raise EesdError(f"{path}: every row is vanilla's own, so there is nothing to certify.")
    dtypes = {row.get("dtype") for row in chosen}
    if len(dtypes) > 1:
        raise EesdError(f"{path}: outputs of several dtypes ({', '.join(map(str, dtypes))}). Certify them one by one.")
    return chosen


def _check_ids(rows: Sequence[Row], target: Transformer) -> None:
    size = target.config.vocab_size
    for row in rows:
        largest = max(*row["prompt_tokens"], *row["output_tokens"])
        if largest >= size:
            raise EesdError(
                f"{row['where']}: token id {largest}, but the model has {size}. Name the model that wrote it."
            )


def _reference(rows: Sequence[Row]) -> dict[tuple[int, ...], list[int]]:
    """Vanilla's output by prompt; rows of other methods in the same file are no reference."""
    own = [row for row in rows if row.get("method", BASELINE) == BASELINE]
    return {tuple(row["prompt_tokens"]): row["output_tokens"] for row in own}


def _decode_again(row: Row, target: Transformer, model_dir: Path, eos: frozenset[int], limit: int) -> list[int]:
    settings: Mapping[str, Any] = row.get("settings") or {}
    if not {"drafter", "peer"} & settings.keys():
        raise EesdError(
            f"{row['where']}: says nothing about how it was decoded. Leave --again out to compare it as it is."
        )
    run = build_method(row["method"], settings, target, model_dir, Sampling(), eos)
    return run(row["prompt_tokens"], seed=row["seed"], max_new_tokens=limit).tokens


def _report(rows: Sequence[Row], found: Sequence[Comparison], path: Path, model_dir: Path, dtype: str) -> None:
    """Print every divergence and the counts; EesdError if there is a different output."""
    lines = []
    for row, comparison in zip(rows, found, strict=True):
        if comparison.kind == "identical":
            continue
        who = " ".join(str(row[key]) for key in ("method", "item") if key in row)
        evidence = f"{row['where']}{who and f' ({who})'}: {comparison.kind} at output token {comparison.position}: "
        evidence += f"{comparison.token} where vanilla has {comparison.vanilla_token}"
        if comparison.length_rule:
            evidence += f", length: {comparison.length_rule}"
        else:
            evidence += f", float64 logits {comparison.logit:.6g} and {comparison.vanilla_logit:.6g}, gap "
            evidence += f"{comparison.gap:.3g}, bound of {dtype} {comparison.bound:.3g}"
        lines.append(evidence)
    counts = {kind: sum(one.kind == kind for one in found) for kind in ("identical", "tie", "different")}
    said = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    print("\n".join([*lines, f"{len(found)} greedy outputs against vanilla in {dtype}: {said}."]))
    if counts["different"]:
        command = shlex.join(["eesd", "check", str(path), "--model", str(model_dir), "--dtype", dtype])
        raise EesdError(f"Not lossless: {counts['different']} of {len(found)} outputs differ. Again: {command}")
