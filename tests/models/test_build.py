"""Building the C++ engine: which compilers, when anew, and what runs without."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

from eesd.errors import EesdError
from eesd.models import kernels
from eesd.models.engine import attach_engine, make_engine
from tests.models.test_engine import AS_TORCH, LENGTH, SHAPES, close, decode, small, with_engine
from tests.toys import needs_compiler, tiny_target


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, AS_TORCH)])
def test_every_compiler_gives_right_numbers_whatever_the_rows(
    compiler: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} here")
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("EESD_CACHE", str(tmp_path))
    plain = decode(small(SHAPES["wide"]), [100, 101, 104, 120])
    target = with_engine(small(SHAPES["wide"], dtype))
    fast = decode(target, [100, 101, 104, 120])
    assert all(close(a, b, tolerance) for a, b in zip(fast, plain, strict=True))
    one_by_one = decode(target, list(range(1, LENGTH)))
    assert all(torch.equal(a, b) for a, b in zip(fast, one_by_one, strict=True))


def test_without_compiler_torch_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.delenv("EESD_ENGINE", raising=False)
    target = tiny_target()
    engine = attach_engine(target)
    assert engine.name == "torch (no compiler)" and "no-such-compiler" in engine.reason
    with torch.inference_mode():
        assert target.logits(target.embed(torch.arange(3)[None])).shape == (1, 3, target.config.vocab_size)
    with pytest.raises(EesdError, match="install"):
        make_engine("cpp")


@needs_compiler
def test_build_failure_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("EESD_CACHE", str(tmp_path))
    monkeypatch.delenv("EESD_ENGINE", raising=False)
    monkeypatch.setattr(kernels, "FLAGS", (*kernels.FLAGS, "--no-such-flag"))
    engine = make_engine()
    assert engine.name == "torch (build failed)" and "no-such-flag" in engine.reason
    assert not list(tmp_path.glob("*.so"))


def test_engine_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EESD_ENGINE", "torch")
    assert make_engine().name == "torch (chosen)"
    with pytest.raises(EesdError, match="Did you mean 'torch'"):
        make_engine("torhc")


@needs_compiler
def test_library_key_follows_sources_and_flags(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    before = kernels.library_key("g++")
    assert kernels.library_key("g++") == before
    monkeypatch.setattr(kernels, "FLAGS", (*kernels.FLAGS, "-g"))
    flagged = kernels.library_key("g++")
    for path in kernels.KERNELS.glob("*.[ch]*"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(kernels, "KERNELS", tmp_path)
    assert kernels.library_key("g++") == flagged
    (tmp_path / "tile.h").write_text("// changed")
    assert len({before, flagged, kernels.library_key("g++")}) == 3


@needs_compiler
@pytest.mark.slow
def test_two_processes_build_one_library(tmp_path) -> None:
    code = "from eesd.models.kernels import build; print(build())"
    environment = {**os.environ, "EESD_CACHE": str(tmp_path)}
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment) for _ in range(2)]
    paths = {run.communicate()[0] for run in runs}
    assert len(paths) == 1 and len(list(tmp_path.glob("*.so"))) == 1 and all(run.returncode == 0 for run in runs)
