"""The C++ of the decode engine, and how it is built: once for each machine and version, in seconds.

    library = load(build())        # compiles, or finds in $EESD_CACHE (default: ~/.cache/eesd), a shared library

Plain C calls through ctypes rather than a torch extension: those take half a minute to compile and need ninja.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch

from eesd.errors import EesdError

KERNELS = Path(__file__).parent
# Products that are added are fused, as tiles fuse them: a default of some compilers.
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-std=c++17", "-shared", "-fPIC")


class BuildError(EesdError):
    """The kernels could not be built; `brief` is short enough for the name of the engine."""

    def __init__(self, brief: str, detail: str) -> None:
        super().__init__(f"The C++ kernels could not be built ({brief}): {detail}")
        self.brief = brief


def cache_dir() -> Path:
    """Where built libraries are kept: $EESD_CACHE or ~/.cache/eesd."""
    return Path(os.environ.get("EESD_CACHE") or Path.home() / ".cache" / "eesd")


def find_compiler() -> str:
    """$CXX, g++, c++ or clang++, whichever comes first; BuildError when there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        raise BuildError("no compiler", f"none of {', '.join(names)} found; install g++ or set CXX.")
    return found


def _runtime() -> list[str]:
    """torch's own OpenMP library: with a second one, the idle threads of either would spin against the other's."""
    return [str(path) for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))]


def _cpu_flags() -> str:
    """What -march=native depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
    return platform.machine() + next(
        (line for line in lines if line.lower().startswith(("flags", "features"))), lines[0]
    )


def multiplies_bfloat16() -> bool:
    """Whether the processor has the dot products of bfloat16 that the kernels use (AVX-512 BF16)."""
    return "avx512_bf16" in _cpu_flags().split()


def library_key(compiler: str) -> str:
    """Hash of all that the built library depends on: sources, flags, compiler, processor, OpenMP library."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    sources = [path.read_text() for path in sorted(KERNELS.iterdir()) if path.suffix in (".cpp", ".h")]
    parts = [*sources, *FLAGS, compiler, version, _cpu_flags(), *_runtime()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def build() -> Path:
    """The built library, from the cache if it is there. Safe against other processes that build the same."""
    compiler = find_compiler()
    path = cache_dir() / f"decode-{library_key(compiler)}.so"
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                _compile(compiler, path)
    except OSError as error:
        raise BuildError("cache not writable", f"{error}; set EESD_CACHE to a folder that can be written.") from error
    return path


def _compile(compiler: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        source = str(KERNELS / "decode.cpp")
        # --as-needed: the compiler's own OpenMP library is left out where torch's has served all symbols.
        command = [compiler, *FLAGS, source, "-Wl,--as-needed", *_runtime(), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BuildError("build failed", f"{' '.join(command)}\n{done.stderr.strip()}")
        os.replace(made, path)


@lru_cache
def load(path: Path) -> ctypes.PyDLL:
    """The library's functions."""
    # PyDLL keeps the interpreter locked: to unlock it costs more than others could do in a call of milliseconds.
    library = ctypes.PyDLL(str(path))
    library.eesd_simd.restype = ctypes.c_char_p
    for name in ("run_layers", "linear", "softmax_statistics", "exit_step", "draft_step", "pass"):
        getattr(library, f"eesd_{name}").restype = None
    return library
