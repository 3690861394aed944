"""The law of the first token after a draft, on a real model: enumerated through the decoding code, beside vanilla's.

    eesd first-tokens --model resources/models/smollm2-135m --out results/first_tokens.csv

A draft of one token by the model's own early exit, at many prefixes of evaluation prompts, with temperature 1 and
top-k 10 for target and draft alike, so that every outcome can be run. Nothing is sampled: the two laws may differ by
the rounding of float32 only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from eesd.analysis.columns import write_csv
from eesd.certify.chance import exactly, spread
from eesd.control import make_controller
from eesd.decoding.chain import Chain
from eesd.decoding.sampling import Sampling, accept_sampled
from eesd.drafting import Drafter, Prompt
from eesd.drafting.early_exit import EarlyExitDrafter
from eesd.errors import EesdError
from eesd.models.engine import attach_engine
from eesd.models.loading import load_target, load_tokenizer
from eesd.models.passes import Passes
from eesd.models.transformer import Transformer
from eesd.progress import progress
from eesd.tasks import TASKS, DataSource, encode_prompt

SAMPLING = Sampling(1.0, top_k=10)
PREFIXES = 20
TOLERANCE = 1e-4  # total variation that float32 explains
LAYERS_LEFT_OUT = 3


@torch.inference_mode()
def total_variation(target: Transformer, drafter: Drafter, prefix: Sequence[int], sampling: Sampling) -> float:
    """Distance between the law of the token after `prefix` when one is drafted, and vanilla's law there."""
    *prompt, pending = prefix
    cut, cache = drafter.exit_layer, target.new_cache(len(prefix) + 2)
    states = target.run(target.embed(torch.tensor([prompt], device=target.device)), slice(0, cut), cache)
    final = target.run(states, slice(cut, None), cache)
    given, passes = Prompt(target, cache, prompt, states, final), Passes(target, cache, cut)

    def run() -> int:
        drafter.begin(given)
        chain = Chain(make_controller({"name": "static", "k": 1}), 2, sampling, None)
        drafted = drafter.draft(chain, pending, len(prompt))
        laws = sampling.probabilities(passes.run([pending, *chain.tokens], drafted, len(prompt)).logits)
        # The token after an accepted one is another law: one outcome is enough.
        laws[1:] = torch.nn.functional.one_hot(laws[1:].argmax(-1), laws.shape[-1])
        accepted, token = accept_sampled(chain.tokens, chain.laws, drafter.vocabulary, laws, None)
        return [*chain.tokens[:accepted], token][0]

    found = spread(run, 1.0, exactly)
    alone = target.new_cache(len(prefix))
    whole = target.run(target.embed(torch.tensor([list(prefix)], device=target.device)), slice(None), alone)
    law = sampling.probabilities(target.logits(whole[0, -1])).tolist()
    rest = sum(p for token, p in enumerate(law) if token not in found)
    return (sum(abs(p - law[token]) for token, p in found.items()) + rest) / 2


def write_first_tokens(model_dir: Path, out: Path, task: str, data_dir: Path | None, resources: Path | None) -> None:
    """Measure at the ends of evaluation prompts, write the table, and raise EesdError if a law is not the target's."""
    target, tokenizer = load_target(model_dir, "float32"), load_tokenizer(model_dir)
    attach_engine(target)
    drafter = EarlyExitDrafter(max(1, target.config.num_layers - LAYERS_LEFT_OUT))
    source = DataSource.of({"data_dir": data_dir and str(data_dir), "resources": resources and str(resources)})
    records = []
    with progress("first-token laws", PREFIXES, "prefix") as bar:
        for item in TASKS[task].items("evaluation", source):
            tokens = encode_prompt(tokenizer, item.prompt)
            distance = total_variation(target, drafter, tokens, SAMPLING)
            records.append({"task": task, "item": item.id, "prefix_tokens": len(tokens), "total_variation": distance})
            bar.update()
            if len(records) == PREFIXES:
                break
    table = pd.DataFrame(records)
    write_csv(table, out)
    worst = table["total_variation"].max()
    print(
        f"First token after a draft at {len(table)} prefixes: total variation from vanilla's law at most {worst:.2g}."
    )
    if worst > TOLERANCE:
        raise EesdError(f"A law differs from vanilla's by more than rounding ({TOLERANCE:g}). All figures: {out}.")
