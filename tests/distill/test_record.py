"""Batched recording equals one-by-one decoding, and what it records equals what the target computes."""

from __future__ import annotations

import pytest
import torch

from eesd.decoding.generate import generate
from eesd.distill.record import TEACHER_TOP, _teacher, _top, record_batch, record_given
from tests.toys import VOCAB, tiny_target

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9], [10], [11, 12, 13, 14]]


def record(target, **changes):
    settings = {"layers": [1, 3], "max_new_tokens": 12, "temperatures": [0.0], "eos": set(), "seed": 0}
    return record_batch(target, PROMPTS, **{**settings, **changes})


def test_greedy_batch_equals_single_decoding():
    target = tiny_target()
    for prompt, trace in zip(PROMPTS, record(target), strict=True):
        assert trace.tokens.tolist() == [*prompt, *generate(target, prompt, max_new_tokens=12).tokens]
        assert trace.prompt_tokens == len(prompt)


def test_rows_that_end_early_are_retired_and_do_not_disturb_the_others():
    target = tiny_target()
    plain = [generate(target, prompt, max_new_tokens=12).tokens for prompt in PROMPTS]
    eos = {plain[0][2], plain[3][5]}
    for prompt, trace in zip(PROMPTS, record(target, eos=eos), strict=True):
        expected = generate(target, prompt, max_new_tokens=12, eos=eos).tokens
        assert trace.tokens[len(prompt) :].tolist() == expected


def test_recorded_states_and_teacher_are_the_targets():
    target = tiny_target()
    for trace in record(target):
        tokens = trace.tokens.long()[None]
        for layer in (1, 3):
            states = target.run(target.embed(tokens), slice(0, layer))[0, :-1]
            torch.testing.assert_close(trace.states[layer].float(), states, rtol=2e-3, atol=2e-3)
        final = target.run(target.embed(tokens), slice(None))[0, trace.prompt_tokens - 1 : -1]
        law = target.logits(final).softmax(-1)
        assert trace.teacher_ids.shape == (12, min(TEACHER_TOP, VOCAB))
        torch.testing.assert_close(
            trace.teacher_probs.float(), law.gather(1, trace.teacher_ids.long()), rtol=2e-3, atol=1e-3
        )
        assert torch.equal(trace.teacher_ids[:, 0].long(), law.argmax(-1))


def test_a_read_answer_leaves_what_writing_it_left():
    target = tiny_target()
    written = record(target)
    lengths = (12, 1, 5, 7)
    answers = [t.tokens[t.prompt_tokens :][:n].tolist() for t, n in zip(written, lengths, strict=True)]
    for one, other, n in zip(written, record_given(target, PROMPTS, answers, [1, 3]), lengths, strict=True):
        total = one.prompt_tokens + n
        assert other.prompt_tokens == one.prompt_tokens
        assert torch.equal(other.tokens, one.tokens[:total])
        assert torch.equal(other.teacher_ids[:, 0], one.teacher_ids[:n, 0])
        torch.testing.assert_close(other.teacher_probs, one.teacher_probs[:n], rtol=2e-3, atol=1e-3)
        for layer in (1, 3):
            torch.testing.assert_close(other.states[layer], one.states[layer][: total - 1], rtol=2e-3, atol=2e-3)


def test_labels_of_prompts_are_the_targets():
    target, first = tiny_target(), [1, 2, 1, 3]
    traces = record(target, temperatures=[0.0, 0.9], learnt_from=first)
    plain = record(target)
    for trace, again, alone, learnt_from in zip(traces[::2], traces[1::2], plain, first, strict=True):
        assert trace.learnt_from == learnt_from
        assert again.learnt_from == again.prompt_tokens  # a prompt is learnt once, however often it is answered
        assert len(trace.teacher_ids) == trace.labels == len(trace.tokens) - learnt_from
        final = target.run(target.embed(trace.tokens.long()[None]), slice(None))[0, learnt_from - 1 : -1]
        assert torch.equal(trace.teacher_ids[:, 0].long(), target.logits(final).argmax(-1))
        for part in ("tokens", "teacher_ids", "teacher_probs"):
            assert torch.equal(getattr(trace.answer_alone(), part), getattr(alone, part))
    answers = [trace.tokens[trace.prompt_tokens :].tolist() for trace in plain]
    for given, trace in zip(record_given(target, PROMPTS, answers, [1, 3], first), traces[::2], strict=True):
        assert given.learnt_from == trace.learnt_from
        assert torch.equal(given.teacher_ids[:, 0], trace.teacher_ids[:, 0])


def test_sampling_follows_its_seed():
    target = tiny_target()

    def outputs(seed):
        return [t.tokens.tolist() for t in record(target, temperatures=[1.0], seed=seed)]

    assert outputs(1) == outputs(1)
    assert outputs(1) != outputs(2)


@pytest.mark.parametrize("limit", [1, 2])
def test_shortest_outputs(limit):
    for trace in record(tiny_target(), max_new_tokens=limit):
        assert len(trace.teacher_ids) == limit
        assert len(trace.states[1]) == len(trace.tokens) - 1


def test_answers_at_several_temperatures_share_the_prompt():
    target = tiny_target()
    together = record(target, temperatures=[0.0, 0.9])
    greedy = record(target)
    assert len(together) == 2 * len(PROMPTS)
    for first, second, alone in zip(together[::2], together[1::2], greedy, strict=True):
        assert torch.equal(first.tokens, alone.tokens)
        assert second.tokens[: second.prompt_tokens].tolist() == alone.tokens[: alone.prompt_tokens].tolist()
        torch.testing.assert_close(first.states[3], alone.states[3], rtol=1e-3, atol=1e-3)
        ids = second.tokens.long()[None]
        states = target.run(target.embed(ids), slice(0, 3))[0, :-1]
        torch.testing.assert_close(second.states[3].float(), states, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("vocab", [4096, 2048, 4100, 100])
def test_the_most_probable_tokens_are_found_in_groups(vocab):
    logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(0))
    values, ids = _top(logits, 64)
    assert torch.equal(values, logits.topk(64).values)
    assert torch.equal(logits.gather(1, ids), values)
    assert all(len(set(row)) == 64 for row in ids.tolist())


def test_of_equally_probable_tokens_the_first_comes_first():
    logits = torch.randint(0, 40, (8, 2048), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(_teacher(logits)[0][:, 0], torch.stack([(row == row.max()).nonzero()[0, 0] for row in logits]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_what_a_gpu_records_lies_on_the_cpu():
    for trace in record(tiny_target().to("cuda"), temperatures=[0.0, 1.0], eos={5}):
        parts = [trace.tokens, trace.teacher_ids, trace.teacher_probs, *trace.states.values()]
        assert {part.device.type for part in parts} == {"cpu"}
