"""From a method of the configuration to something that generates: vanilla, a drafter with its controller, or a peer
library.

method = build_method("eesd", settings, target, model_dir)
generation = method(prompt_ids, seed=0, max_new_tokens=128)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from eesd.bench.peers import PEERS
from eesd.control import Controller, calibration_of, make_controller, read_costs
from eesd.decoding.generate import Generation, OnTokens, generate
from eesd.decoding.sampling import Sampling
from eesd.drafting import DRAFTERS, Drafter
from eesd.errors import EesdError
from eesd.files import sha256_file
from eesd.models.cache import KVCache
from eesd.models.special import fingerprint
from eesd.models.transformer import Transformer

Method = Callable[..., Generation]


def build_method(
    name: str,
    settings: Mapping[str, Any],
    target: Transformer,
    model_dir: Path,
    sampling: Sampling,
    eos: Collection[int],
    cache: KVCache | None = None,
) -> Method:
    """A function (prompt, seed, max_new_tokens, on_tokens=None) -> Generation for one configured method."""
    if "peer" in settings:
        peer = PEERS[settings["peer"]](model_dir, target.dtype, sampling, eos, settings.get("generation"))
        return peer.generate
    drafter = controller = None
    if "drafter" in settings:
        if "controller" not in settings:
            raise EesdError(f"Method '{name}' has a drafter but no controller. Add `controller: {{name: ...}}`.")
        drafter = DRAFTERS[settings["drafter"]].build(settings, target, model_dir)
        controller = make_controller(settings["controller"])
        equip(name, controller, settings, drafter)

    def run(prompt: Sequence[int], seed: int, max_new_tokens: int, on_tokens: OnTokens | None = None) -> Generation:
        return generate(
            target,
            prompt,
            drafter=drafter,
            controller=controller,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            eos=eos,
            seed=seed,
            cache=cache,
            on_tokens=on_tokens,
        )

    return run


def equip(name: str, controller: Controller, settings: Mapping[str, Any], drafter: Drafter) -> None:
    """Hand a controller what it needs of its head's card and of the cost table that the settings name."""
    calibration = costs = None
    if controller.uses_calibration:
        if drafter.card is None:
            raise EesdError(
                f"Method '{name}': controller {settings['controller']['name']} needs the calibration of a trained "
                "head. Give the method a head, or another controller."
            )
        calibration = calibration_of(drafter.card, Path(settings["head_path"]) / "card.json")
    if controller.uses_costs:
        costs = read_costs(settings["costs"], drafter.exit_layer, head_context(drafter))
    controller.equip(calibration, costs)


def head_context(drafter: Drafter) -> str:
    """What the drafter's head reads beside the state at its exit: `verified` or `none`."""
    return (drafter.card or {}).get("context", "none")


def method_identity(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Everything a method's rows depend on: its settings, the weights of a head or an assistant, its cost table."""
    identity = dict(settings)
    if "costs" in settings:
        costs = Path(settings["costs"])
        identity["costs_sha256"] = sha256_file(costs) if costs.exists() else None
    if "head_path" in settings:
        weights = Path(settings["head_path"]) / "head.safetensors"
        identity["head_sha256"] = sha256_file(weights) if weights.exists() else None
    if "skips_path" in settings:
        found = Path(settings["skips_path"])
        identity["skips_sha256"] = sha256_file(found) if found.exists() else None
    if "assistant_path" in settings:
        identity["assistant_fingerprint"] = fingerprint(settings["assistant_path"])
    return identity
