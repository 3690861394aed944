"""From a method of the configuration to something that generates: vanilla, a drafter with its controller, or a peer
library.

method = build_method("eesd", settings, target, model_dir)
generation = method(prompt_ids, seed=0, max_new_tokens=128)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from eesd.bench.peers import PEERS
from eesd.control import Controller, calibration_of, make_controller, read_costs, read_verification
from eesd.cost_file import measured_how
from eesd.decoding.generate import Generation, OnTokens, Source, generate
from eesd.decoding.sampling import Sampling
from eesd.decoding.tree import Branching, Typical
from eesd.drafting import DRAFTERS, Drafter
from eesd.drafting.medusa_tree import accuracies_of, best_nodes, choose_tree
from eesd.drafting.stored import read_card
from eesd.errors import EesdError
from eesd.files import settings_hash, sha256_file
from eesd.models.cache import KVCache
from eesd.models.special import fingerprint
from eesd.models.transformer import Transformer

# Peers are called the same way.
Method = Callable[..., Generation]

# Tokens in the cache at which the cost of verifying a tree is read.
TREE_CONTEXT = 256
# Of a tree whose nodes are chosen by cost, at most: cost tables end before.
MOST_NODES = 63


@dataclass(frozen=True)
class OwnMethod:
    """A method of ours, ready to generate: method(prompt_ids, seed=0, max_new_tokens=128, on_tokens=None)."""

    target: Transformer
    drafter: Drafter | None
    controller: Controller | None
    branching: Branching | None
    lookup: Source | None
    sampling: Sampling
    eos: Collection[int]
    cache: KVCache | None

    def __call__(
        self, prompt: Sequence[int], seed: int, max_new_tokens: int, on_tokens: OnTokens | None = None
    ) -> Generation:
        """Continue a prompt."""
        return generate(
            self.target,
            prompt,
            drafter=self.drafter,
            controller=self.controller,
            branching=self.branching,
            lookup=self.lookup,
            sampling=self.sampling,
            max_new_tokens=max_new_tokens,
            eos=self.eos,
            seed=seed,
            cache=self.cache,
            on_tokens=on_tokens,
        )

    def twin(self) -> OwnMethod:
        """The same method whose controllers are copies: they know what these know now, and learn by themselves."""
        return self.with_controllers(*deepcopy(self.controllers))

    @property
    def controllers(self) -> tuple[Controller | None, Controller | None]:
        """The drafter's and the lookup's."""
        return self.controller, self.lookup and self.lookup.controller

    def with_controllers(self, controller: Controller | None, copying: Controller | None) -> OwnMethod:
        """The same method with other controllers, as in `controllers`."""
        return replace(self, controller=controller, lookup=self.lookup and replace(self.lookup, controller=copying))

    @property
    def remembers(self) -> bool:
        """Whether a prompt begins with what others taught."""
        return any(getattr(one, "reset_on", "prompt") == "never" for one in self.controllers)


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
    drafter = controller = branching = lookup = None
    if "drafter" in settings:
        if "controller" not in settings:
            raise EesdError(f"Method '{name}' has a drafter but no controller. Add `controller: {{name: ...}}`.")
        drafter = DRAFTERS[settings["drafter"]].build(settings, target, model_dir)
        controller = make_controller(settings["controller"])
        how = measured_how(str(target.dtype)[6:], target.device.type, torch.get_num_threads())
        equip(name, controller, settings, drafter, how)
        branching = make_branching(settings, controller, drafter)
        if settings.get("lookup"):
            first = DRAFTERS["lookup"].build(settings["lookup"], target, model_dir)
            lookup = Source(first, make_controller(settings["lookup"]["controller"]))
    return OwnMethod(target, drafter, controller, branching, lookup, sampling, eos, cache)


def equip(name: str, controller: Controller, settings: Mapping[str, Any], drafter: Drafter, how: str) -> None:
    """Hand a controller what it needs of its head's card and of the cost table that the settings name.

    how: data type and threads of this run (`measured_how`); a table of others weighs the wrong costs, which is said.
    """
    calibration = costs = None
    if controller.uses_calibration:
        if drafter.card is None:
            raise EesdError(
                f"Method '{name}': controller {settings['controller']['name']} needs the calibration of a trained "
                "head. Give the method a head, or another controller."
            )
        calibration = calibration_of(drafter.card, Path(settings["head_path"]) / "card.json")
    if controller.uses_costs:
        costs = read_costs(
            settings["costs"], drafter.exit_layer, head_context(drafter), rows=(drafter.card or {}).get("vocab_rows")
        )
        if costs.how != how:
            print(f"{name}: costs of {costs.how} ({settings['costs']}) decide in a run of {how}.", file=sys.stderr)
    controller.equip(calibration, costs)


def make_branching(settings: Mapping[str, Any], controller: Controller, drafter: Drafter) -> Branching | None:
    """The trees that a method drafts, None if it drafts chains; Medusa's is chosen here, and as deep as `k_max`."""
    tree = settings.get("tree")
    if tree is None:
        return None
    typical = Typical(tree["epsilon"], tree["delta"]) if is_lossy(settings) else None
    nodes, width = tree["nodes"], tree["width"]
    if width is not None:
        return Branching(nodes, width, typical=typical)
    accuracies = accuracies_of(drafter.card, Path(settings["head_path"]) / "card.json")[: controller.k_max]
    if nodes is None:
        head_s, verify_s = read_verification(settings["costs"], TREE_CONTEXT, drafter.card["vocab_rows"])
        nodes = best_nodes(accuracies, verify_s, head_s * len(accuracies))
    paths = choose_tree(accuracies, nodes)
    return Branching(len(paths), paths=paths, typical=typical)


def tree_room(settings: Mapping[str, Any]) -> int:
    """Cache slots that drafts of a method need beyond its output."""
    tree = settings.get("tree")
    if tree is None:
        return 0
    if tree["width"] is None:
        return tree["nodes"] or MOST_NODES
    return Branching(tree["nodes"], tree["width"]).room(make_controller(settings["controller"]).k_max)


def is_lossy(settings: Mapping[str, Any]) -> bool:
    """Whether a method may change the output by design."""
    return (settings.get("tree") or {}).get("acceptance") == "typical"


def head_context(drafter: Drafter) -> str:
    """What the drafter's head reads beside the state at its exit: `verified` or `none`."""
    return (drafter.card or {}).get("context", "none")


def _decided_by(card: Path) -> str | None:
    """Hash of what controllers and trees read of a head's card; None without one. EesdError for a damaged card."""
    if not card.exists():
        return None
    found = read_card(card.parent)
    calibration = found.get("calibration") or {}
    return settings_hash([calibration.get("x"), calibration.get("y"), found.get("accuracies")])


def method_identity(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Everything a method's rows depend on: its settings, the weights of a head or an assistant, its cost table."""
    identity = dict(settings)
    if "costs" in settings:
        costs = Path(settings["costs"])
        identity["costs_sha256"] = sha256_file(costs) if costs.exists() else None
    if "head_path" in settings:
        weights = Path(settings["head_path"]) / "head.safetensors"
        identity["head_sha256"] = sha256_file(weights) if weights.exists() else None
        identity["head_decides"] = _decided_by(weights.with_name("card.json"))
    if "skips_path" in settings:
        found = Path(settings["skips_path"])
        identity["skips_sha256"] = sha256_file(found) if found.exists() else None
    if "assistant_path" in settings:
        identity["assistant_fingerprint"] = fingerprint(settings["assistant_path"])
    return identity
