"""The small modules everything else stands on."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eesd.errors import EesdError, unknown
from eesd.files import atomic_path, read_json, read_jsonl, settings_hash, sha256_file, write_atomic
from eesd.registry import Registry
from eesd.words import first_divergence


def test_first_divergence():
    assert first_divergence([1, 2, 3], [1, 2, 3]) is None
    assert first_divergence([1, 2, 3], [1, 9, 3]) == 1
    assert first_divergence([1, 2, 3], [1, 2]) == first_divergence([1, 2], [1, 2, 3]) == 2


def test_unknown_suggests_the_closest_name():
    message = str(unknown("method", "eeds", ["vanilla", "eesd"]))
    assert message == "Unknown method 'eeds'. Did you mean 'eesd'? Known: eesd, vanilla"


def test_unknown_without_a_close_or_any_name():
    assert "Did you mean" not in str(unknown("task", "zzz", ["gsm8k"]))
    assert str(unknown("task", "zzz", [])).endswith("Known: none")


def test_registry_keeps_finds_and_refuses():
    parts: Registry[type] = Registry("part")

    @parts.register("one")
    class One:
        pass

    assert parts["one"] is One
    assert parts.names() == ["one"]
    with pytest.raises(EesdError, match=r"Unknown part 'oen'\. Did you mean 'one'"):
        parts["oen"]
    with pytest.raises(ValueError, match="registered twice"):
        parts.register("one")(One)


def test_atomic_path_leaves_nothing_behind_on_failure(tmp_path: Path):
    target = tmp_path / "deep" / "table.csv"
    write_atomic(target, "old")
    # A lone surrogate cannot be encoded, so writing fails half way.
    with pytest.raises(UnicodeEncodeError), atomic_path(target) as temporary:
        temporary.write_text("half" * 10_000 + "\udc80", encoding="utf-8")
    assert target.read_text() == "old"
    assert list(target.parent.iterdir()) == [target]


def test_atomic_path_keeps_the_suffix(tmp_path: Path):
    with atomic_path(tmp_path / "figure.svg") as temporary:
        assert temporary.suffix == ".svg"
        temporary.write_bytes(b"x")
    assert (tmp_path / "figure.svg").read_bytes() == b"x"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_read_jsonl_reads_text_and_gzip(tmp_path: Path, name: str):
    content = '{"a": "é"}\n\n{"a": 2}\n'.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert read_jsonl(tmp_path / name) == [{"a": "é"}, {"a": 2}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty. Expected JSON lines"),
        (b"\n  \n", "empty. Expected JSON lines"),
        (b'{"a": 1}\n{"a": \n', "rows.jsonl:2: not valid JSON"),
        (b'{"a": 1}\n[1]\n', "rows.jsonl:2: expected a JSON object, found list"),
        (b"\xff\xfe\x00", "not readable as UTF-8 JSON lines"),
    ],
)
def test_read_jsonl_names_file_line_and_expectation(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(EesdError) as error:
        read_jsonl(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_read_jsonl_missing_file(tmp_path: Path):
    with pytest.raises(EesdError, match="no such file"):
        read_jsonl(tmp_path / "none.jsonl")


def test_a_damaged_json_file_says_what_to_do(tmp_path: Path):
    path = tmp_path / "card.json"
    for content in (b'{"a": ', b"\xff"):
        path.write_bytes(content)
        with pytest.raises(EesdError, match=r"card\.json: damaged .* Fetch it again\."):
            read_json(path, "Fetch it again.")


@given(st.integers(0, 200), st.integers(0, 255))
def test_read_jsonl_of_a_damaged_gzip_is_one_clear_error(
    tmp_path_factory: pytest.TempPathFactory, place: int, byte: int
):
    """Whatever byte of the archive is wrong, the reader either still gets the rows or says what to do."""
    rows = [{"n": n, "text": "abc" * n} for n in range(30)]
    good = gzip.compress("".join(f'{{"n": {row["n"]}, "text": "{row["text"]}"}}\n' for row in rows).encode(), mtime=0)
    place %= len(good)
    path = tmp_path_factory.mktemp("damaged") / "rows.jsonl.gz"
    path.write_bytes(good[:place] + bytes([byte]) + good[place + 1 :])
    try:
        found = read_jsonl(path)
    except EesdError as error:
        found, message = None, str(error)
    assert found == rows or (found is None and str(path) in message)


def test_hashes(tmp_path: Path):
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256_file(tmp_path / "f") == hashlib.sha256(b"abc").hexdigest()
    assert settings_hash({"a": 1, "b": [1, 2]}) == settings_hash({"b": [1, 2], "a": 1})
    assert settings_hash({"a": 1}) != settings_hash({"a": 2})
    assert len(settings_hash({})) == 12
