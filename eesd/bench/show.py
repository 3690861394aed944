"""One generation on the terminal, as it happens.

    eesd generate --method eesd "Write a Python function that reverses a string."

Drafted and accepted tokens are green, the target's own plain; one line of figures closes it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from eesd.bench.methods import build_method
from eesd.decoding.generate import Generation
from eesd.decoding.sampling import Sampling
from eesd.errors import EesdError, unknown
from eesd.models.engine import attach_engine
from eesd.models.loading import load_target, load_tokenizer
from eesd.models.special import eos_ids
from eesd.settings import load_config, model_path, resolve_method
from eesd.tasks import encode_prompt

GREEN, PLAIN = "\033[32m", "\033[0m"


class Stream:
    """Prints tokens as they are settled; characters that span tokens appear once they are whole."""

    def __init__(self, tokenizer, colour: bool) -> None:
        self.tokenizer, self.colour = tokenizer, colour
        self.tokens: list[int] = []
        self.shown = ""

    def __call__(self, tokens: Sequence[int], kind: str) -> None:
        """Print what `tokens` add to the text, coloured by `kind`."""
        self.tokens += tokens
        self._print(kind, last=False)

    def finish(self) -> None:
        """Print what was held back."""
        self._print("target", last=True)

    def _print(self, kind: str, last: bool) -> None:
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        # An unfinished character decodes to the replacement character: wait for its other bytes.
        if text.endswith("\ufffd") and not last:
            return
        new, self.shown = text[len(self.shown) :], text
        if self.colour and kind == "accepted":
            new = f"{GREEN}{new}{PLAIN}"
        print(new, end="", flush=True)


def show(
    prompt: str,
    method: str,
    model: str | None,
    overlays: Sequence[Path],
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> None:
    """Generate and stream one answer; EesdError names what has to be run first when model or head are missing."""
    config = load_config(overlays)
    model = model or config["run"]["models"][0]
    if model not in config["models"]:
        raise unknown("model", model, config["models"])
    settings = resolve_method(config, model, method)
    folder = Path(model_path(model))
    if not folder.exists():
        raise EesdError(f"{folder}: no model here yet. Run `make reproduce`, or `snakemake --cores all {folder}`.")
    target, tokenizer = load_target(folder), load_tokenizer(folder)
    attach_engine(target)
    run = build_method(method, settings, target, folder, Sampling(temperature), eos_ids(folder, tokenizer))
    stream = Stream(tokenizer, colour=sys.stdout.isatty())
    generation = run(encode_prompt(tokenizer, prompt), seed=seed, max_new_tokens=max_new_tokens, on_tokens=stream)
    stream.finish()
    print(f"\n\n{summary(method, generation)}")


def summary(method: str, generation: Generation) -> str:
    """One line: speed, tokens per round and acceptance rate."""
    count, seconds = len(generation.tokens), generation.seconds["total"]
    parts = [f"{method}: {count} tokens in {seconds:.2f} s ({count / seconds:.1f} tokens/s)"]
    drafted = sum(r.drafted for r in generation.rounds)
    if generation.rounds:
        parts.append(f"{(count - 1) / len(generation.rounds):.2f} tokens per round")
    if drafted:
        parts.append(f"acceptance rate {sum(r.accepted for r in generation.rounds) / drafted:.2f} of {drafted} drafted")
    return ", ".join(parts)
