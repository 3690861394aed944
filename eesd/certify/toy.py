"""A target of vocabulary 8, small enough that the law of all its outputs is known, and every drafter on it.

Random weights, no training: drafts agree with the target by halves, so that accepting, rejecting and resampling all
happen often.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from eesd.control import CONTROLLERS, Controller, make_controller
from eesd.control.calibration import Calibration
from eesd.control.costs import Costs, CostTable
from eesd.decoding.sampling import Sampling
from eesd.drafting import Drafter
from eesd.drafting.assistant import AssistantDrafter
from eesd.drafting.early_exit import EarlyExitDrafter
from eesd.drafting.exit_head import ExitHead, ExitHeadDrafter
from eesd.drafting.lookup import LookupDrafter
from eesd.drafting.medusa import MedusaDrafter, MedusaHeads
from eesd.drafting.self_sd import SelfSDDrafter, Skips
from eesd.models.config import ModelConfig
from eesd.models.engine import attach_engine
from eesd.models.transformer import Transformer

VOCAB = 8
K_MAX = 3
PROMPT = (3, 1, 4, 1, 5, 3, 1)
EXIT = 1


def toy_target(vocab: int = VOCAB, dtype: torch.dtype = torch.float32, engine: str | None = None) -> Transformer:
    """A random model of two layers whose next token is open: large weights, large differences between contexts."""
    config = ModelConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_positions=64,
    )
    torch.manual_seed(0)
    target = Transformer(config)
    for weight in target.parameters():
        if weight.dim() > 1:
            weight.data.normal_(0, 0.5)
    target = target.to(dtype).requires_grad_(False).eval()
    if engine != "none":
        attach_engine(target, engine)
    return target


def _exit_head(target: Transformer, deep: bool, follows_prompt: bool = False) -> ExitHeadDrafter:
    torch.manual_seed(1)
    # One token cannot be drafted; or four can, of which the prompt chooses the last.
    rows = torch.tensor([6, 2, 0, 7]) if follows_prompt else torch.arange(target.config.vocab_size - 1)
    head = ExitHead(target.config, rows, lens=deep, deep=deep)
    for weight in head.parameters():
        weight.data.normal_(0, 0.1)
    head.layer.load_state_dict(target.layers[-1].state_dict())
    head.norm.load_state_dict(target.norm.state_dict())
    head.head.weight.data.copy_(target.head_weight[rows])
    head = head.to(target.dtype).requires_grad_(False).eval()
    head.follows_prompt = follows_prompt
    head.pack(target.engine)
    return ExitHeadDrafter(head, EXIT)


def _medusa(target: Transformer) -> MedusaDrafter:
    torch.manual_seed(2)
    size, vocab = target.config.hidden_size, target.config.vocab_size
    heads = MedusaHeads(size, vocab, torch.arange(vocab - 1), K_MAX, False)
    for weight in heads.parameters():
        weight.data.normal_(0, 0.3)
    return MedusaDrafter(heads.to(target.dtype).requires_grad_(False).eval())


def _assistant(target: Transformer) -> AssistantDrafter:
    torch.manual_seed(3)
    other = toy_target(target.config.vocab_size, target.dtype, "none")
    for weight in other.parameters():
        weight += 0.2 * torch.randn_like(weight)
    return AssistantDrafter(other, target)


TOY_DRAFTERS: dict[str, Callable[[Transformer], Drafter]] = {
    "exit_head": lambda target: _exit_head(target, deep=False),
    "exit_head_deep": lambda target: _exit_head(target, deep=True),
    "exit_head_prompt": lambda target: _exit_head(target, deep=True, follows_prompt=True),
    "early_exit": lambda target: EarlyExitDrafter(EXIT),
    "medusa": _medusa,
    "self_sd": lambda target: SelfSDDrafter(target, Skips(attention=(1,))),
    "lookup": lambda target: LookupDrafter(2),
    "assistant": _assistant,
}


def toy_controller(name: str) -> Controller:
    """A registered controller that drafts at most K_MAX tokens, with what it needs of calibration and costs."""
    kind = CONTROLLERS[name]
    controller = make_controller({"name": name, **({"k": K_MAX} if name == "static" else {"k_max": K_MAX})})
    costs = Costs((1.0, *(0.9 + 0.15 * drafted for drafted in range(1, K_MAX + 1))))
    controller.equip(
        Calibration([0.0, 1.0], [0.1, 0.9]) if kind.uses_calibration else None,
        CostTable("toy", (1,), (costs,)) if kind.uses_costs else None,
    )
    return controller


@torch.inference_mode()
def exact_law(
    target: Transformer, prompt: Sequence[int], length: int, sampling: Sampling
) -> dict[tuple[int, ...], float]:
    """Probability of every output of `length` tokens: one pass over all prefixes of the longest kind."""
    vocab = target.config.vocab_size
    prefixes = torch.tensor(list(itertools.product(range(vocab), repeat=length - 1))).view(-1, length - 1)
    tokens = torch.cat((torch.tensor([list(prompt)]).expand(len(prefixes), -1), prefixes), 1).to(target.device)
    final = target.run(target.embed(tokens), slice(None), target.new_cache(tokens.shape[1], len(tokens)))
    laws = sampling.probabilities(target.logits(final[:, len(prompt) - 1 :])).double().cpu()
    # [prefix, position]: probability of the prefix's own tokens, then every last token.
    own = laws[:, :-1].gather(2, prefixes[:, :, None])[:, :, 0].prod(1)
    joint = own[:, None] * laws[:, -1]
    pairs = itertools.product(prefixes.tolist(), range(vocab))
    return {(*prefix, last): p for (prefix, last), p in zip(pairs, joint.flatten().tolist(), strict=True)}
