"""The repository agrees with itself: versions, pins, make targets, file sizes."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import eesd
from eesd.analysis.readme import BEGIN, END, readme_block, results_block

MAX_LINES = 400
MAX_BYTES = 16 * 2**20
TARGETS = ("reproduce", "test", "smoke", "format", "lint", "clean", "distclean")


@pytest.fixture
def project(root: Path) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


@pytest.fixture
def lock(root: Path) -> dict[str, str]:
    lines = [line for line in (root / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    lines = [line.partition("; platform_system == ")[0] for line in lines]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line) for line in lines), "exact pins only"
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def test_one_version_everywhere(root: Path, project: dict):
    citation = yaml.safe_load((root / "CITATION.cff").read_text())
    assert eesd.__version__ == project["version"] == citation["version"]
    assert f"## [{eesd.__version__}]" in (root / "CHANGELOG.md").read_text()


def test_lock_satisfies_the_loose_requirements(project: dict, lock: dict[str, str]):
    loose = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    for requirement in map(Requirement, loose):
        pinned = lock[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pinned), f"{requirement} but locked {pinned}"
    assert lock["torch"] == "2.13.0"


def test_conda_environment_reads_the_same_lock(root: Path, project: dict):
    environment = yaml.safe_load((root / "environment.yml").read_text())
    pip = next(part["pip"] for part in environment["dependencies"] if isinstance(part, dict))
    assert pip == ["-r requirements.lock", "-e ."]
    python = next(part for part in environment["dependencies"] if str(part).startswith("python="))
    assert Requirement("python" + project["requires-python"]).specifier.contains(python.removeprefix("python="))


def test_formatters_are_pinned_as_locked(project: dict, lock: dict[str, str]):
    pinned = dict(re.findall(r"(ruff|snakefmt)==([\d.]+)", " ".join(project["optional-dependencies"]["dev"])))
    assert pinned == {name: lock[name] for name in ("ruff", "snakefmt")}


@pytest.mark.parametrize("target", TARGETS)
def test_make_target_plans(root: Path, tmp_path: Path, target: str):
    # In an empty folder: make runs recipes that mention make even in a dry run.
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copyfile(root / name, tmp_path / name)
    command = ["make", "--dry-run", "--no-print-directory", target]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_files_beside_the_code_ship_with_the_package(root: Path):
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["eesd"]
    shipped = {path for pattern in patterns for path in (root / "eesd").glob(pattern)}
    assert {
        path for path in (root / "eesd").rglob("*.*") if path.suffix in (".cpp", ".h", ".html", ".css", ".js")
    } <= shipped


def test_no_large_file_is_tracked(root: Path):
    """What is made is not committed; the largest published head has 10 MB."""
    if not (root / ".git").exists():
        pytest.skip("no git checkout, so nothing is tracked")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True).stdout
    sizes = {name: (root / name).stat().st_size for name in tracked.split("\0") if (root / name).is_file()}
    assert {name: size for name, size in sizes.items() if size > MAX_BYTES} == {}


def test_no_source_file_is_long(root: Path):
    files = [path for part in ("eesd", "tests", "workflow") for path in (root / part).rglob("*.*")]
    files = [path for path in files if path.suffix in (".py", ".smk", ".cpp", ".yaml", ".rst")]
    assert [str(path) for path in files if len(path.read_text().splitlines()) > MAX_LINES] == []


@pytest.mark.parametrize(("page", "block"), [("README.md", readme_block), ("docs/results.md", results_block)])
def test_pages_show_the_published_results(root: Path, page: str, block: Callable[[Path, Path], str]):
    shown = (root / page).read_text().split(BEGIN)[1].split(END)[0]
    assert shown == block(root / "published", root / page)


# What each part may not know. Of other parts, models name types alone.
APART = {
    "models": ("drafting", "control", "decoding", "distill", "tasks", "bench", "replay", "analysis", "certify"),
    "control": ("models", "drafting", "decoding", "distill", "tasks", "bench", "replay", "analysis", "certify"),
    "drafting": ("control", "decoding", "distill", "tasks", "bench", "replay", "analysis", "certify"),
    "decoding": ("distill", "tasks", "bench", "replay", "analysis", "certify"),
    "distill": ("control", "bench", "replay", "analysis", "certify"),
    "tasks": ("models", "drafting", "control", "decoding", "distill", "bench", "replay", "analysis", "certify"),
    "replay": ("models", "drafting", "decoding", "distill", "tasks", "bench", "certify"),
}


@pytest.mark.parametrize("part", APART)
def test_data_flow_one_way(root: Path, part: str):
    found = {name for path in (root / "eesd" / part).rglob("*.py") for name in imported(ast.parse(path.read_text()))}
    assert {name for name in found if name.split(".")[1] in APART[part]} == set()


def imported(tree: ast.Module) -> set[str]:
    """Names of this package that a module imports, except for types alone."""
    typing = [node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    left_out = {id(node) for block in typing for node in ast.walk(block)}
    names = set()
    for node in ast.walk(tree):
        if id(node) in left_out or not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        assert not getattr(node, "level", 0), "imports are absolute here"
        names |= {f"{getattr(node, 'module', '')}.{alias.name}".lstrip(".") for alias in node.names}
    return {name for name in names if name.startswith("eesd.")}
