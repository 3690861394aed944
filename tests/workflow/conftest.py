"""Snakemake as a user runs it, but in a folder of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Snakemake = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def snakemake(root: Path, tmp_path: Path) -> Snakemake:
    """Run the workflow of `home` (default: this repository) in `tmp_path`; the result has all output in `stdout`."""

    def run(*arguments: str, home: Path = root, directory: Path | None = None) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "snakemake", "--cores", "2", "--snakefile", str(home / "Snakefile")]
        command += ["--directory", str(directory or tmp_path), *arguments]
        return subprocess.run(
            command, cwd=home, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )

    return run
