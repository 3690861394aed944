"""Files: atomic writes, JSON lines with precise errors, checksums.

Every output except row files is written under a temporary name and renamed, so a reader never sees half a file.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eesd.errors import EesdError


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Give a temporary sibling of `path`; rename it to `path` on success, delete it on any failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: savers such as matplotlib choose a format by it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path | str, content: str | bytes) -> None:
    """Write `content` (text as UTF-8) to `path` in one step."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def read_json(path: Path | str, remedy: str) -> Any:
    """What a JSON file holds; EesdError with its path and the remedy where it is damaged, OSError without the file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise EesdError(f"{path}: damaged ({error}). {remedy}") from error


def read_jsonl(path: Path | str) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file, gzipped if its name ends in `.gz`.

    Raises EesdError naming the file and line for a missing, empty or malformed file.
    """
    path = Path(path)
    if not path.is_file():
        raise EesdError(f"{path}: no such file. Expected JSON lines, one object a line.")
    opener = gzip.open if path.suffix == ".gz" else open
    rows = []
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    rows.append(_parse_object(line, f"{path}:{number}"))
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise EesdError(f"{path}: not readable as UTF-8 JSON lines ({error}). Fetch the file again.") from error
    if not rows:
        raise EesdError(f"{path}: empty. Expected JSON lines, one object a line.")
    return rows


def _parse_object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise EesdError(f"{where}: not valid JSON ({error.msg}). Expected one object a line.") from error
    if not isinstance(row, dict):
        raise EesdError(f"{where}: expected a JSON object, found {type(row).__name__}.")
    return row


def is_disk_full(error: Exception) -> bool:
    """Whether an error of the system or of safetensors, which tells the system's number in its text only, says so."""
    codes = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in codes or any(f"os error {code})" in str(error) for code in codes)


def sha256_file(path: Path | str) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def settings_hash(settings: Any) -> str:
    """Twelve hexadecimal digits that identify a JSON-like value, independent of key order."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def source_hash() -> str:
    """Twelve hexadecimal digits of all sources of this package that the process has loaded, kernels included.

    An interrupted stage resumes only what the same code has begun.
    """
    package = Path(__file__).parent
    loaded = {Path(module.__file__) for module in list(sys.modules.values()) if getattr(module, "__file__", None)}
    kernels = {
        path for name in ("kernels/*.cpp", "kernels/*.h", "fused*.py") for path in package.glob(f"models/{name}")
    }
    files = sorted({path for path in loaded if path.is_relative_to(package)} | kernels)
    return settings_hash([[str(path.relative_to(package)), sha256_file(path)] for path in files])
