"""`reasoning_content` of a message: trained on where the chat template keeps it, else refused."""

from __future__ import annotations

import pytest

from compact.data import load_problems
from compact.lab.zoo_student import build_tokenizer
from compact.passes.encode import encode_problem

KEEPS = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }} ?{% else %}"
    "{% if m.reasoning_content %} think {{ m.reasoning_content }} done {% endif %}"
    "{{ m.content }}{% endif %}{% endfor %}"
)
DROPS = "{% for m in messages %}{{ m.content }} {% endfor %}"
ROW = {
    "question_id": 1,
    "prompt": [{"role": "user", "content": "3 + 4"}],
    "teacher": "t",
    "completion": [
        {
            "role": "assistant",
            "reasoning_content": "3 + 4 = 7. 7 + 0 = 7.",
            "content": "The answer is 7",
        }
    ],
    "answer": 7,
}


def test_reasoning_is_kept() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = KEEPS
    (problem,) = load_problems([ROW])
    (rationale,) = encode_problem(problem, tokenizer, max_length=200).rationales
    assert rationale.text.startswith("3 + 4 = 7.") and rationale.text.endswith("answer is 7")
    assert rationale.step_texts[0] == "3 + 4 = 7." and rationale.answer == "7"


@pytest.mark.parametrize("template", [DROPS, None])
def test_reasoning_is_not_lost_without_a_word(template: str | None) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    (problem,) = load_problems([ROW])
    with pytest.raises(ValueError, match="reasoning_content"):
        encode_problem(problem, tokenizer, max_length=200)
