"""The lens: the linear map from what is known at the exit to the target's final state, in closed form.

weight, bias = fit_lens(traces, exit_layer, target, deep=True)     # [hidden, 2 * hidden], [hidden]

A good start is worth more than a deep exit when data is short, and this one takes seconds: ridge regression of the
normalised final state on the normalised state at the exit and, for deep context, the normalised final state of the
position before. (The idea of reading early states through an affine map is the tuned lens of Belrose et al. 2023.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from eesd.distill.record import Trace
from eesd.models.transformer import Transformer

# Of the mean variance of the inputs: enough to keep rare directions from being fitted to noise.
RIDGE = 1e-3
CHUNK = 64
# Generated tokens that are enough for the map: hundreds for each of its inputs.
ENOUGH = 500_000


@torch.inference_mode()
def fit_lens(
    traces: Sequence[Trace],
    exit_layer: int,
    target: Transformer,
    deep: bool,
    complete: Callable[[Sequence[Trace]], Sequence[Trace]] = lambda traces: traces,
) -> tuple[Tensor, Tensor]:
    """Weight [hidden, inputs] and bias [hidden] with the least squared error over the generated positions.

    inputs: the state at the exit, then (deep) the context, hidden each. complete: gives traces their states. Of a large
    corpus every so many-th trace is taken.
    """
    traces = traces[:: max(1, sum(trace.answer_tokens for trace in traces) // ENOUGH)]
    size = target.config.hidden_size
    count = (2 if deep else 1) * size + 1
    gram = torch.zeros(count, count, dtype=torch.float64)
    moment = torch.zeros(count, size, dtype=torch.float64)
    for start in range(0, len(traces), CHUNK):
        parts = [_pairs(trace, exit_layer, target, deep) for trace in complete(traces[start : start + CHUNK])]
        x, y = (torch.cat(rows) for rows in zip(*parts, strict=True))
        x = F.pad(x, (0, 1), value=1.0)
        # Sums of float32 products in float64: exact enough, at four times the speed of float64 products.
        gram += (x.T @ x).double()
        moment += (x.T @ y).double()
    ridge = RIDGE * gram.diagonal()[:-1].mean()
    gram.diagonal()[:-1].add_(ridge)
    solution = torch.linalg.solve(gram, moment).float().to(target.device)
    return solution[:-1].T.contiguous(), solution[-1]


def _pairs(trace: Trace, exit_layer: int, target: Transformer, deep: bool) -> tuple[Tensor, Tensor]:
    """Inputs [n, inputs] and normalised final states [n, hidden] of a trace's n generated positions."""
    norm = target.norm
    after = norm(trace.states[target.config.num_layers].to(norm.weight))
    early = trace.states[exit_layer].to(norm.weight)
    early = F.rms_norm(early, early.shape[-1:], eps=norm.eps)
    first = trace.prompt_tokens - 1
    inputs = [early[first:]]
    if deep:
        inputs.append(F.pad(after[:-1], (0, 0, 1, 0))[first:])
    return torch.cat(inputs, -1).cpu(), after[first:].cpu()
