"""Training checkpoints in safetensors: weights, AdamW moments and step, stamped with the settings they belong to."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from eesd.files import atomic_path

MOMENTS = ("exp_avg", "exp_avg_sq")


def save_checkpoint(
    work: Path,
    stamp: str,
    module: nn.Module,
    optimiser: torch.optim.Optimizer,
    step: int,
    seconds: float,
) -> None:
    """Write the state after `step` finished steps, replacing the checkpoint before."""
    tensors = {f"module.{name}": tensor for name, tensor in module.state_dict().items()}
    for index, state in optimiser.state_dict()["state"].items():
        tensors |= {f"{moment}.{index}": state[moment] for moment in MOMENTS}
    with atomic_path(work / "checkpoint.safetensors") as temporary:
        save_file(tensors, temporary, {"stamp": stamp, "step": str(step), "seconds": f"{seconds:.1f}"})


def load_checkpoint(
    work: Path,
    stamp: str,
    module: nn.Module,
    optimiser: torch.optim.Optimizer,
) -> tuple[int, float]:
    """Restore the checkpoint that carries this stamp; (finished steps, seconds spent), (0, 0.0) without one."""
    path = work / "checkpoint.safetensors"
    if not path.exists():
        return 0, 0.0
    with safe_open(path, framework="pt") as file:
        facts = file.metadata()
    if facts["stamp"] != stamp:
        return 0, 0.0
    tensors, step = load_file(path), int(facts["step"])
    module.load_state_dict({name[7:]: tensor for name, tensor in tensors.items() if name.startswith("module.")})
    state = optimiser.state_dict()
    count = len(state["param_groups"][0]["params"])
    state["state"] = {
        i: {"step": torch.tensor(float(step)), **{moment: tensors[f"{moment}.{i}"] for moment in MOMENTS}}
        for i in range(count)
        if f"exp_avg.{i}" in tensors  # a head that no text was long enough for has not been trained yet
    }
    optimiser.load_state_dict(state)
    return step, float(facts["seconds"])
