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
from eesd.models.transformer import Rotary, added


def rollout(
    head: ExitHead,
    states: Tensor,
    context: Tensor | None,
    rotary: Rotary,
    depth: int,
    first: int,
    later: int,
    starts: Tensor | None = None,
) -> list[Tensor]:
    """Estimates of final states at depths 1 .. `depth`: [batch, seq - first, hidden], but of depths above 1
    [batch, seq - later, hidden].

    states [batch, seq, hidden] at the exit. context: normalised final states one position before, or None for a head
    without deep context, whose estimates are the same at every depth. later (at least `first`): depth j > 1 means
    something from position later + j - 1 on. starts [batch], at most `later`: where the texts begin, None: at 0.
    """
    kind, context = states.device.type, context if head.deep else None
    if torch.is_autocast_enabled(kind):  # in the type of the products, as decoding passes states from layer to layer
        states, context = (x if x is None else x.to(torch.get_autocast_dtype(kind)) for x in (states, context))
    positions = torch.arange(states.shape[1], device=states.device)
    angles = tuple(part[None, None] for part in rotary(positions, states.dtype))
    entered = head.enter(states, context)
    q, k, v = head.layer.heads(head.layer.attn_norm(entered), angles)
    sight = visible(positions[:1] if starts is None else starts, positions, head.layer.config.window)[:, first:]
    attended = _attend(q[:, :, first:], k, v, sight, [])
    context_from = context if context is None else context[:, first:]
    estimate = head.leave(states[:, first:], context_from, head.layer.finish(entered[:, first:], attended))
    if not head.deep:
        return [estimate] * depth
    estimates, bank = [estimate], []
    cut = later - first
    estimate, states, sight = estimate[:, cut:], states[:, later:], sight[:, cut:]
    ages = positions[later:, None] - positions
    angles = tuple(part[:, :, later:] for part in angles)
    for step in range(1, depth):
        context = F.pad(estimate[:, :-1], (0, 0, 1, 0))
        entered = head.enter(states, context)
        q, own_k, own_v = head.layer.heads(head.layer.attn_norm(entered), angles)
        # One position further in the draft, the keys of the depths before lie one further back.
        bank = [(_back(k_), _back(v_)) for k_, v_ in bank] + [(own_k, own_v)]
        attended = _attend(q, k, v, sight & (ages >= step), bank)
        estimate = head.leave(states, context, head.layer.finish(entered, attended))
        estimates.append(estimate)
    return estimates


def visible(starts: Tensor, positions: Tensor, window: int | None) -> Tensor:
    """Whether each of the `positions` [seq] of a text sees each, [batch, seq, seq]: those of its text, from `starts`
    [batch] on, up to itself, at most `window` of them. One before its text sees itself: attention to nothing is not a
    number."""
    ages = positions[:, None] - positions
    near = (ages >= 0) if window is None else (ages >= 0) & (ages < window)
    return (near & (positions >= starts[:, None])[:, None]) | (ages == 0)


def _back(x: Tensor) -> Tensor:
    """x [batch, heads, seq, dim] as seen from the position after."""
    return F.pad(x[:, :, :-1], (0, 0, 1, 0))


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, bank: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Attention of q [batch, heads, n, dim] over shared keys [batch, kv_heads, seq, dim] where `visible`
    [batch or 1, n, seq], and over one key and value of its own from every pair [batch, kv_heads, n, dim] of the bank.
    """
    if not bank:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None], enable_gqa=True)
    batch, heads, n, dim = q.shape
    kv_heads, seq = k.shape[1:3]
    # Queries that share a key head are rows of one product.
    grouped = q.reshape(batch, kv_heads, -1, n, dim) * dim**-0.5
    shared = (grouped.flatten(2, 3) @ k.transpose(2, 3)).view(batch, heads, n, seq) + added(visible, q.dtype)[:, None]
    own = torch.stack([(grouped * own_k[:, :, None]).sum(-1) for own_k, _ in bank], -1).view(batch, heads, n, -1)
    with torch.autocast(q.device.type, enabled=False):  # which would make it float32, for products in bfloat16
        weights = torch.cat([shared, own], -1).softmax(-1)
    shared, own = weights.split((seq, len(bank)), -1)
    found = (shared.reshape(batch, kv_heads, -1, seq) @ v).view(grouped.shape)
    for weight, (_, own_v) in zip(own.view(*grouped.shape[:-1], -1).unbind(-1), bank, strict=True):
        found = torch.addcmul(found, weight[..., None], own_v[:, :, None])
    return found.view(batch, heads, n, dim)
