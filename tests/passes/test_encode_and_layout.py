"""Encoded text reads as running text, rows keep their problems, unfit students are found out."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig, MambaConfig

from compact.data import Problem, Rationale
from compact.lab.zoo_student import build_tokenizer
from compact.passes.attention import _mask, tree_rule
from compact.passes.encode import encode_problem, encode_problems, encode_prompt, tell_of_cuts
from compact.passes.layout import choose_layout
from compact.passes.packing import build_batch, plan_rows
from compact.student import Student, load_student
from compact.validity.judge import UNREAD
from helpers.toy import _SIZES, make_model, make_problem

TEXT = "Mia starts with 7 apples.\nMia buys 5 more, so 7 + 5 = 12.\nThe answer is 12"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def problem(text: str = TEXT) -> Problem:
    return Problem("q", "Mia has 7 apples.", "12.0", (Rationale("a", text, 1),))


def test_steps_marker_and_gold_read_as_in_the_text() -> None:
    tokenizer = build_tokenizer()
    found = encode_problem(problem(), tokenizer, max_length=200)
    (rationale,) = found.rationales
    pieces = [tokenizer.decode(rationale.ids[a:b]).strip() for a, b in rationale.steps]
    assert pieces == list(rationale.step_texts) and len(pieces) >= 2
    assert tokenizer.decode(rationale.ids[rationale.marker : -1]).strip() == "The answer is 12"
    assert rationale.ids[-1] == tokenizer.eos_token_id and rationale.answer == found.gold == "12"
    # The leaf asks for the gold answer as the data write it.
    running = tokenizer("The answer is 12.0", add_special_tokens=False)["input_ids"]
    assert list(found.cue_ids + found.gold_ids) == running
    spaced = tokenizer(" The answer is 12.0", add_special_tokens=False)["input_ids"]
    assert list(found.spaced_cue_ids + found.gold_ids) == spaced


def test_a_cut_step_has_the_text_that_is_kept() -> None:
    tokenizer = build_tokenizer()
    prompt = len(encode_prompt("Mia has 7 apples.", tokenizer))
    (whole,) = encode_problem(problem(), tokenizer, max_length=200).rationales
    for kept in range(1, len(whole.ids)):
        (cut,) = encode_problem(problem(), tokenizer, max_length=prompt + kept).rationales
        assert len(cut.ids) == kept
        pieces = [tokenizer.decode(cut.ids[a:b]).strip() for a, b in cut.steps]
        assert pieces == list(cut.step_texts)


def test_answers_that_match_have_one_text() -> None:
    """Within a problem, equality of texts is equality of answers, in the problem's domain."""
    texts = ("The answer is 1/2", "The answer is 0.5.", "So it is 50%. The answer is 3", "Hm.")
    rationales = tuple(Rationale(str(i), text, i) for i, text in enumerate(texts))
    of_numbers = Problem("q", "Which share?", "0.5", rationales)
    found = encode_problem(of_numbers, build_tokenizer(), max_length=200)
    assert [r.answer for r in found.rationales] == ["0.5", "0.5", "3", None]
    texts = (
        "The answer is (B)",
        "The answer is b) red.",
        "The best answer is:\n\nA) blue",
        "So red.",
    )
    rationales = tuple(Rationale(str(i), text, i) for i, text in enumerate(texts))
    choice = Problem("q", "Which colour?\n(A) blue\n(B) red", "(B)", rationales)
    found = encode_problem(choice, build_tokenizer(), max_length=200)
    assert [r.answer for r in found.rationales] == ["B", "B", "A", "B"] and found.gold == "B"
    as_text = replace(choice, answer="red", answer_type="text")
    assert as_text.domain.name == "text" and choice.domain.name == "choice"


def test_chat_template_ends_the_turn_and_drops_what_follows() -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    tokenizer.chat_template = TEMPLATE
    found = encode_problem(problem(), tokenizer, max_length=200)
    assert found.prompt_ids == encode_prompt("Mia has 7 apples.", tokenizer)
    assert found.rationales[0].ids[-1] == tokenizer.convert_tokens_to_ids("<end>")
    assert found.rationales[0].step_texts == (
        encode_problem(problem(), build_tokenizer(), max_length=200).rationales[0].step_texts
    )
    kept = encode_problem(problem(), tokenizer, max_length=200, keep_tail=True).rationales[0]
    cut = found.rationales[0]
    assert kept == replace(cut, ids=(*cut.ids, *tokenizer("\n")["input_ids"]))
    tokenizer.chat_template = TEMPLATE.replace("m['content']", "m['content'][::-1]")
    with pytest.raises(ValueError, match="chat template must keep the completion"):
        encode_problem(problem(), tokenizer, max_length=200)


def test_length_limits() -> None:
    tokenizer = build_tokenizer()
    full = encode_problem(problem(), tokenizer, max_length=200)
    room = len(full.prompt_ids)
    cut = encode_problem(problem(), tokenizer, max_length=room + 3).rationales[0]
    assert cut.ids == full.rationales[0].ids[:3]
    assert cut.steps == ((0, 3),) and cut.cut and not full.rationales[0].cut
    with pytest.raises(ValueError, match="question_id 'q'.*no room"):
        encode_problem(problem(), tokenizer, max_length=room)
    with pytest.raises(ValueError, match="cue must hold text"):
        encode_problem(problem(), tokenizer, max_length=200, cue=" ")
    with pytest.raises(ValueError, match="at least one rationale"):
        encode_problem(replace(problem(), rationales=()), tokenizer, max_length=200)


def test_the_answer_of_a_cut_rationale_is_that_of_the_whole_text(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Right and wrong are told apart as on whole texts; the tokens to train on stay cut."""
    right, wrong = TEXT, TEXT.replace("= 12", "= 13").replace("is 12", "is 13")
    texts = (right, wrong, "Mia has some apples.\nNobody knows how many they are.")
    both = Problem("q", "Mia has 7.", "12", tuple(Rationale(t, t, i) for i, t in enumerate(texts)))
    tokenizer = build_tokenizer()
    whole = encode_problems([both], tokenizer, max_length=200)[0]
    tell_of_cuts([whole], 200)
    assert not caplog.text
    length = len(whole.prompt_ids) + 4
    cut = encode_problems([both], tokenizer, max_length=length)[0]
    assert [r.answer for r in cut.rationales] == ["12", "13", None]
    assert cut.right == whole.right == (True, False, False)
    assert all(r.ids == w.ids[:4] for r, w in zip(cut.rationales, whole.rationales, strict=True))
    judged = [r.judgement for r in cut.rationales]
    assert [j.validity if j else None for j in judged] == [1.0, 0.0, UNREAD]
    assert [f.kind for j in judged if j for f in j.findings] == ["answer", "unread"]
    tell_of_cuts([cut], length)
    assert f"max_length {length} cuts 3 of 3 rationales" in caplog.text


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=20), capacity=st.integers(0, 80))
def test_plan_rows_places_every_problem_once(lengths: list[int], capacity: int) -> None:
    rows = plan_rows(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(len(row) == 1 or sum(lengths[i] for i in row) <= capacity for row in rows)


@pytest.mark.parametrize("leaves", [False, True])
def test_mask_of_flex_attention_is_the_dense_mask(leaves: bool) -> None:
    """The rule that FlexAttention compiles, evaluated on the CPU at every pair of indices."""
    from torch.nn.attention.flex_attention import create_mask

    problems = [make_problem(1, [6, 9]), make_problem(2, [4])]
    batch = build_batch(problems, layout="tree", leaves=True, pad_token_id=0)
    rule, queries, keys = tree_rule(batch, leaves=leaves)
    mask = create_mask(lambda b, h, q, k: rule(b, q, k), 2, 1, queries, keys, device="cpu")
    assert mask.any(dim=-1).all()  # no query without a key
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        body: Any = SimpleNamespace(weight=torch.zeros(1, dtype=dtype))
        dense = _mask("sdpa", body, batch, leaves=leaves)
        assert isinstance(dense, torch.Tensor) and dense.dtype == dtype
        assert torch.equal(
            dense, torch.zeros_like(dense).masked_fill(~mask, torch.finfo(dtype).min)
        )


def test_mask_of_a_long_row_is_exact_in_every_default_dtype() -> None:
    batch = build_batch([make_problem(1, [600])], layout="tree", leaves=True, pad_token_id=0)
    body: Any = SimpleNamespace(weight=torch.zeros(1))
    expected = _mask("sdpa", body, batch, leaves=True)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = _mask("sdpa", body, batch, leaves=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert isinstance(found, torch.Tensor) and torch.equal(found, expected)


def student(config: object, **kwargs: str) -> Student:
    return Student.of(AutoModelForCausalLM.from_config(config, **kwargs).eval())


def test_layout_is_chosen_with_its_reason() -> None:
    fit = Student.of(make_model("llama"))
    assert choose_layout(fit, "auto", 100)[0] == choose_layout(fit, "tree", 100)[0] == "tree"
    assert choose_layout(fit, "padded", 100) == ("padded", "as asked")
    short = student(Gemma2Config(**_SIZES, head_dim=8, sliding_window=64))
    layout, reason = choose_layout(short, "auto", 100)
    assert layout == "padded" and "64 tokens" in reason
    with pytest.raises(ValueError, match="layout must be 'auto' or 'padded'.*64 tokens"):
        choose_layout(short, "tree", 100)
    recurrent = student(MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2))
    assert choose_layout(recurrent, "auto", 100)[0] == "padded"
    fit.config._attn_implementation_internal = "flash_attention_2"
    try:
        layout, reason = choose_layout(fit, "auto", 100)
    finally:
        fit.config._attn_implementation_internal = "sdpa"
    assert layout == "padded" and "flash_attention_2" in reason
    with pytest.raises(ValueError, match="layout must be"):
        choose_layout(fit, "flat", 100)


def test_head_is_taken_apart_or_refused() -> None:
    assert student(GraniteConfig(**_SIZES, logits_scaling=8.0)).logit_scale == 0.125
    assert Student.of(make_model("gemma")).softcap == 30.0
    unknown = AutoModelForCausalLM.from_config(GraniteConfig(**_SIZES, logits_scaling=8.0))
    unknown.lm_head.register_forward_hook(lambda _, __, out: out * 3)
    with pytest.raises(ValueError, match="not covered"):
        Student.of(unknown)
    with pytest.raises(TypeError, match="transformers model"):
        Student.of(torch.nn.Linear(2, 2))
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_student("/nowhere/x.gguf")
