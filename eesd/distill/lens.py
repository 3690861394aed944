"""The lens: the linear map from what is known at the exit to the target's final state, in closed form.

weight, bias = fit_lens(traces, exit_layer, target, deep=True)     # [hidden, 2 * hidden], [hidden]

A good start is worth more than a deep exit when data is short, and this one takes seconds: ridge regression of the
normalised final state on the normalised state at the exit and, for deep context, the normalised final state of the
position before. (The idea of reading early states through an affine map is the tuned lens of Belrose et al. 2023.)
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from eesd.distill.record import Complete, Trace, as_they_are
from eesd.models.transformer import Transformer

# Of the mean variance of the inputs: enough to keep rare directions from being fitted to noise.
RIDGE = 1e-3
CHUNK = 32
# Tokens with labels for each input of the map that are enough.
ENOUGH = 256


@torch.inference_mode()
def fit_lens(
    traces: Sequence[Trace],
    exit_layer: int,
    target: Transformer,
    deep: bool,
    complete: Complete = as_they_are,
) -> tuple[Tensor, Tensor]:
    """Weight [hidden, inputs] and bias [hidden] with the least squared error where tokens with labels are predicted.

    inputs: the state at the exit, then (deep) the context, hidden each. complete: gives traces their states. Of a large
    corpus a random part is taken.
    """
    size, device = target.config.hidden_size, target.device
    count = (2 if deep else 1) * size + 1
    share = ENOUGH * count / max(1, sum(trace.labels for trace in traces))
    if share < 1:
        traces = random.Random(0).sample(traces, math.ceil(share * len(traces)))
    gram = torch.zeros(count, count, dtype=torch.float64, device=device)
    moment = torch.zeros(count, size, dtype=torch.float64, device=device)
    for start in range(0, len(traces), CHUNK):
        x, y = _pairs(complete(traces[start : start + CHUNK]), exit_layer, target, deep)
        x = F.pad(x, (0, 1), value=1.0)
        # Sums of float32 products in float64: exact enough, at four times the speed of float64 products.
        gram += (x.T @ x).double()
        moment += (x.T @ y).double()
    ridge = RIDGE * gram.diagonal()[:-1].mean()
    gram.diagonal()[:-1].add_(ridge)
    solution = torch.linalg.solve(gram, moment).float()
    return solution[:-1].T.contiguous(), solution[-1]


def _pairs(traces: Sequence[Trace], exit_layer: int, target: Transformer, deep: bool) -> tuple[Tensor, Tensor]:
    """Inputs [n, inputs] and normalised final states [n, hidden] where some traces have labels, n in all."""

    def labelled(states: Sequence[Tensor], back: int) -> Tensor:
        """The states `back` positions before each that predicts a token with a label, zero before the text."""
        shifted = [F.pad(s[: len(s) - back], (0, 0, back, 0)) if back else s for s in states]
        parts = [s[trace.learnt_from - 1 :] for s, trace in zip(shifted, traces, strict=True)]
        return torch.cat(parts).to(target.device, torch.float32)

    early = labelled([trace.states[exit_layer] for trace in traces], 0)
    inputs = [F.rms_norm(early, early.shape[-1:], eps=target.norm.eps)]
    final = [trace.states[target.config.num_layers] for trace in traces]
    if deep:
        inputs.append(target.norm(labelled(final, 1)))
    return torch.cat(inputs, -1), target.norm(labelled(final, 0))
