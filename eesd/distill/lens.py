"""The lens: the linear map from what is known at the exit to the target's final state, in closed form.

weight, bias = fit_lens(traces, exit_layer, target, deep=True)     # [hidden, 2 * hidden], [hidden]

A good start is worth more than a deep exit when data is short, and this one takes seconds: ridge regression of the
normalised final state on the normalised state at the exit and, for deep context, the normalised final state of the
position before. A trained head that moves to another exit has its map fitted likewise, with its layer's output as a
further input. (The idea of reading early states through an affine map is the tuned lens of Belrose et al. 2023.)
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from eesd.distill.batches import Batch, in_order, make_batch
from eesd.distill.record import Complete, Trace, as_they_are
from eesd.distill.rollout import visible
from eesd.drafting.exit_head import ExitHead
from eesd.models.transformer import Transformer, run_layers

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
    head: ExitHead | None = None,
) -> tuple[Tensor, Tensor]:
    """Weight [hidden, inputs] and bias [hidden] with the least squared error where tokens with labels are predicted.

    inputs: the state at the exit, then (deep) the context, then (of a trained head that has a lens) the output of its
    layer, hidden each. complete: gives traces their states. Of a large corpus a random part is taken.
    """
    size, device = target.config.hidden_size, target.device
    count = (1 + deep + (head is not None)) * size + 1
    share = ENOUGH * count / max(1, sum(trace.labels for trace in traces))
    if share < 1:
        traces = random.Random(0).sample(traces, math.ceil(share * len(traces)))
    gram = torch.zeros(count, count, dtype=torch.float64, device=device)
    moment = torch.zeros(count, size, dtype=torch.float64, device=device)
    for alike in in_order(traces, CHUNK):
        batch = make_batch(complete(alike), exit_layer, target)
        labelled = batch.predicting(1)
        x = F.pad(_inputs(batch, target, deep, head)[labelled], (0, 1), value=1.0)
        # Sums of float32 products in float64: exact enough, at four times the speed of float64 products.
        gram += (x.T @ x).double()
        moment += (x.T @ batch.final[labelled]).double()
    ridge = RIDGE * gram.diagonal()[:-1].mean()
    gram.diagonal()[:-1].add_(ridge)
    solution = torch.linalg.solve(gram, moment).float()
    return solution[:-1].T.contiguous(), solution[-1]


def _inputs(batch: Batch, target: Transformer, deep: bool, head: ExitHead | None) -> Tensor:
    """What is mapped [batch, seq, inputs]."""
    context = batch.context if deep else None
    if head:
        positions = torch.arange(batch.final.shape[1], device=target.device)
        mask = visible(batch.starts, positions, target.config.window)[:, None]
        hidden = run_layers([head.layer], target.rotary, head.enter(batch.states, context), [None], mask=mask)
        return head.parts(batch.states, context, hidden)
    early = F.rms_norm(batch.states, batch.states.shape[-1:], eps=target.norm.eps)
    return torch.cat([early, context], -1) if deep else early
