"""`eesd check`: outputs of other programs against vanilla, and clear words on bad files."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from eesd.bench.compare import Judge
from eesd.certify.outputs import check_outputs
from eesd.cli import app
from eesd.decoding.generate import generate
from eesd.errors import EesdError
from eesd.models.loading import load_target
from tests.toys import write_tiny_model

PROMPTS = [[5, 6, 7], [20, 30, 40, 50]]
LIMIT = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def vanilla(model):
    target = load_target(model, "float32")
    return [generate(target, prompt, max_new_tokens=LIMIT, eos={0}).tokens for prompt in PROMPTS]


def write(path, outputs, **fields):
    pairs = zip(PROMPTS, outputs, strict=True)
    path.write_text("\n".join(json.dumps({"prompt_tokens": p, "output_tokens": o, **fields}) for p, o in pairs))
    return path


def test_hugging_face_generate_is_certified(model, tmp_path, capsys):
    from transformers import LlamaForCausalLM

    theirs = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    outputs = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "max_new_tokens": LIMIT, "eos_token_id": 0, "pad_token_id": 0}
        outputs.append(theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist())
    found = check_outputs(write(tmp_path / "hf.jsonl", outputs), model, max_new_tokens=LIMIT)
    assert {one.kind for one in found} <= {"identical", "tie"}
    assert "2 greedy outputs against vanilla in float32" in capsys.readouterr().out


def test_a_different_output_is_named_and_ends_with_status_1(model, vanilla, tmp_path):
    wrong = [vanilla[0], [*vanilla[1][:4], (vanilla[1][4] + 1) % 257, *vanilla[1][5:]]]
    path = write(tmp_path / "rows.jsonl", wrong)
    result = CliRunner().invoke(app, ["check", str(path), "--model", str(model)])
    assert result.exit_code == 1
    assert "row 2: different at output token 4" in result.output
    assert "float64 logits" in result.output
    assert "1 identical, 0 tie, 1 different" in result.output


def test_an_exact_row_has_no_ties_but_another_library_may(model, vanilla, tmp_path, monkeypatch):
    monkeypatch.setattr(Judge, "_evidence", lambda *_: ((1.0, 1.0), 0.5))  # equal logits: a tie by rounding
    other = [[(token + 1) % 257 for token in tokens] for tokens in vanilla]
    kinds = [one.kind for one in check_outputs(write(tmp_path / "a.jsonl", other), model)]
    assert kinds == ["tie", "tie"]
    with pytest.raises(EesdError, match="2 of 2 outputs differ"):
        check_outputs(write(tmp_path / "b.jsonl", other, exact=True), model)
    path = write(tmp_path / "c.jsonl", other, exact=True, settings={"peer": "hf_generate"})
    assert [one.kind for one in check_outputs(path, model)] == ["tie", "tie"]


def test_a_pair_of_files(model, vanilla, tmp_path):
    own, other = write(tmp_path / "a.jsonl", vanilla), write(tmp_path / "b.jsonl", vanilla)
    assert [one.kind for one in check_outputs(own, model, against=other)] == ["identical"] * 2
    short = write(tmp_path / "c.jsonl", [vanilla[0][:-1], vanilla[1]])
    with pytest.raises(EesdError, match=r"1 of 2 outputs differ\. Again: eesd check"):
        check_outputs(short, model, against=other)
    (tmp_path / "one.jsonl").write_text(other.read_text().splitlines()[0])
    with pytest.raises(EesdError, match=r"no row of .*one\.jsonl has its prompt"):
        check_outputs(own, model, against=tmp_path / "one.jsonl")


def test_rows_are_decoded_again(model, vanilla, tmp_path):
    settings = {"drafter": "lookup", "max_ngram": 2, "controller": {"name": "static", "k": 3}, "max_new_tokens": LIMIT}
    wrong = [[1] * LIMIT, [2] * LIMIT]  # what the file says does not matter
    path = write(tmp_path / "rows.jsonl", wrong, method="lookup", item="x", seed=0, settings=settings)
    found = check_outputs(path, model, method="lookup", item="x", again=True)
    assert [one.kind for one in found] == ["identical"] * 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{}", "'prompt_tokens' is None"),
        ('{"prompt_tokens": [1], "output_tokens": "text"}', "expected a non-empty list of token ids"),
        ('{"prompt_tokens": [1], "output_tokens": [-1]}', "expected a non-empty list"),
        ('{"prompt_tokens": [1], "output_tokens": [9999]}', "token id 9999, but the model has 257"),
        ('{"prompt_tokens": [1], "output_tokens": [1], "decoding": "sampled"}', "differs by chance"),
        ('{"prompt_tokens": [1], "output_tokens": [1], "method": "vanilla"}', "nothing to certify"),
        ("[1]", "expected a JSON object"),
        ("", "empty"),
    ],
)
def test_bad_files_say_what_is_wrong(model, tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(line)
    with pytest.raises(EesdError, match=message):
        check_outputs(path, model)


def test_unknown_methods_and_undecodable_rows(model, vanilla, tmp_path):
    path = write(tmp_path / "rows.jsonl", vanilla, method="mine")
    with pytest.raises(EesdError, match="Did you mean 'mine'"):
        check_outputs(path, model, method="mien")
    with pytest.raises(EesdError, match="Leave --again out"):
        check_outputs(path, model, again=True)
