"""A head's estimates as decoding makes them: at the first drafted token, at the second, and so on.

    estimates = rollout(head, states, context, rotary, depth=3, first=0, later=40)
    # [batch, seq, hidden] at the first drafted token, [batch, seq - 40, hidden] at the second and third

With deep context only the first drafted token of a round sees verified contexts; those after it see what the head has
estimated on the way, in their inputs and in the keys and values of the tokens drafted before them. Estimate j of
position i is what position i gives as the j-th drafted token of a round that began at i - j + 1, for all positions at
once: its queries see the verified keys up to where the round began, and one key of each depth since. (Rolling a
drafter out in training is the training-time test of EAGLE-3, arXiv 2503.01840.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from eesd.drafting.exit_head import ExitHead
from eesd.models.transformer import Rotary, run_layers


def rollout(
    head: ExitHead, states: Tensor, context: Tensor | None, rotary: Rotary, depth: int, first: int, later: int
) -> list[Tensor]:
    """Estimates of final states at depths 1 .. `depth`: [batch, seq - first, hidden], but of depths above 1
    [batch, seq - later, hidden].

    states [batch, seq, hidden] at the exit. context: normalised final states one position before, or None for a head
    without deep context, whose estimates are the same at every depth. later (at least `first`): depth j > 1 means
    something from position later + j - 1 on.
    """
    if not head.deep:
        hidden = run_layers([head.layer], rotary, states, [None])
        return [head.leave(states[:, first:], None, hidden[:, first:])] * depth
    positions = torch.arange(states.shape[1], device=states.device)
    angles = tuple(part[None, None] for part in rotary(positions, states.dtype))
    entered = head.enter(states, context)
    q, k, v = head.layer.heads(head.layer.attn_norm(entered), angles)
    ages = positions[first:, None] - positions[None, :]
    window = head.layer.config.window or states.shape[1]
    attended = _attend(q[:, :, first:], k, v, (ages >= 0) & (ages < window), [])
    estimate = head.leave(states[:, first:], context[:, first:], head.layer.finish(entered[:, first:], attended))
    estimates, bank = [estimate], []
    estimate, states, ages = estimate[:, later - first :], states[:, later:], ages[later - first :]
    angles = tuple(part[:, :, later:] for part in angles)
    for step in range(1, depth):
        context = F.pad(estimate[:, :-1], (0, 0, 1, 0))
        entered = head.enter(states, context)
        q, own_k, own_v = head.layer.heads(head.layer.attn_norm(entered), angles)
        # One position further in the draft, the keys of the depths before lie one further back.
        bank = [(_back(k_), _back(v_)) for k_, v_ in bank] + [(own_k, own_v)]
        attended = _attend(q, k, v, (ages >= step) & (ages < window), bank)
        estimate = head.leave(states, context, head.layer.finish(entered, attended))
        estimates.append(estimate)
    return estimates


def _back(x: Tensor) -> Tensor:
    """x [batch, heads, seq, dim] as seen from the position after."""
    return F.pad(x[:, :, :-1], (0, 0, 1, 0))


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, bank: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Attention of q [batch, heads, n, dim] over shared keys [batch, kv_heads, seq, dim] where `visible` [n, seq],
    and over one key and value of its own from every pair [batch, kv_heads, n, dim] of the bank."""
    if not bank:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
    batch, heads, n, dim = q.shape
    grouped = q.view(batch, k.shape[1], -1, n, dim) * dim**-0.5
    scores = (grouped @ k[:, :, None].transpose(3, 4)).masked_fill(~visible, float("-inf"))
    own = [(grouped * own_k[:, :, None]).sum(-1, keepdim=True) for own_k, _ in bank]
    weights = torch.cat([scores, *own], -1).softmax(-1)
    seq = k.shape[2]
    found = weights[..., :seq] @ v[:, :, None]
    for i, (_, own_v) in enumerate(bank):
        found = found + weights[..., seq + i, None] * own_v[:, :, None]
    return found.view(batch, heads, n, dim)
