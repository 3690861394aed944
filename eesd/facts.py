"""Facts that measurements and trained weights depend on: machine, versions, commit."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

import eesd


@cache
def device_name(device: str) -> str:
    """What the device calls itself, for example `AMD EPYC` or `NVIDIA H200`."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@cache
def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "eesd": eesd.__version__,
    }


@cache
def commit() -> str | None:
    """The package's git commit, marked `-dirty` when tracked files differ; None outside a checkout."""
    here = Path(eesd.__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True)
    except OSError:
        return None
    return head.stdout.strip() + ("-dirty" if changed.stdout.strip() else "") if head.returncode == 0 else None


def now() -> str:
    """The time in UTC, `2026-01-31T12:00:00Z`."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def provenance(device: torch.device) -> dict[str, Any]:
    """Where, by what and when something was made."""
    return {
        "device_name": device_name(str(device)),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
        "time": now(),
    }
