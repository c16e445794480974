"""The completion is found where the chat template writes it, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest

from compact.data import Problem, Rationale
from compact.passes import EncodedRationale
from compact.passes.encode import encode_problem, encode_question
from helpers.templates import CHATML, byte_tokenizer

QWEN3 = (
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
    "{% else %}{% set c = m.content %}{% set r = m.reasoning_content or '' %}"
    "{% if not r and '</think>' in c %}"
    r"{% set r = c.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    r"{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    r"{{ '<|im_start|>assistant\n<think>\n' + r.strip('\n') + '\n</think>\n\n' }}"
    r"{{ c.lstrip('\n') + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>' + m.content }}{% else %}"
    "{{ '<|im_end|>' + m.content.split('</think>')[-1] + '<end>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_end|><think>\n' }}{% endif %}"
)


def encode(completion: Any, template: str, prompt: Any = "What is 3 + 4?") -> EncodedRationale:
    problem = Problem("q", prompt, "7", (Rationale("t", completion, 0),))
    own = byte_tokenizer(template, "<end>")
    (found,) = encode_problem(problem, own, max_length=900).rationales
    return found


def written(rationale: EncodedRationale) -> str:
    return str(byte_tokenizer(None, "<end>").decode(rationale.ids))


def assistant(content: str, reasoning: str = "") -> dict[str, str]:
    own = {"role": "assistant", "content": content}
    return own | ({"reasoning_content": reasoning} if reasoning else {})


@pytest.mark.parametrize("template", [CHATML, QWEN3])
def test_an_earlier_message_with_the_words_of_the_last(template: str) -> None:
    """All messages are trained on, up to the end of the last turn."""
    first, last = assistant("The answer is 7"), assistant("7")
    user = {"role": "user", "content": "Only the number ?"}
    found = encode([first, user, last], template)
    assert found.text == "7" and found.answer == "7"
    text = written(found)
    assert text.endswith("7<|im_end|>") and text.count("<|im_end|>") == 3


@pytest.mark.parametrize("content", ["7", "The answer is 7", "So the answer is 7"])
def test_reasoning_with_the_words_of_the_answer(content: str) -> None:
    found = encode([assistant(content, "3 + 4 = 7. The answer is 7")], QWEN3)
    assert found.text == f"3 + 4 = 7. The answer is 7\n</think>\n\n{content}"
    assert found.answer == "7" and written(found) == f"<think>\n{found.text}<|im_end|>"


def test_a_word_of_the_end_of_turn() -> None:
    """The end of turn holds "end", which is no answer."""
    assert encode("end", CHATML).text == "end"
    assert len(encode("end", CHATML).steps) == 1


@pytest.mark.parametrize(
    "content",
    [
        "<think>3 + 4 = 7 .</think>The answer is 7",
        "<think>\n3 + 4 = 7 .\n</think>\n\nThe answer is 7",
        "\n<think>  3 + 4 = 7 .\n</think>The answer is 7\n",
    ],
)
def test_a_thought_whose_white_space_the_template_changes(content: str) -> None:
    apart = encode([assistant("The answer is 7", "3 + 4 = 7 .")], QWEN3)
    found = encode(content, QWEN3)
    assert (found.text, found.step_texts) == (apart.text, apart.step_texts)
    assert encode(content, CHATML).text in (content, content.strip())


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ("3 + 4 = 7 . The answer is 7", "3 + 4 = 7 . The answer is 7"),
        (
            "<think>\n3 + 4 = 7 .\n</think>\n\nThe answer is 7",
            "3 + 4 = 7 .\n</think>\n\nThe answer is 7",
        ),
        (
            [assistant("The answer is 7", "3 + 4 = 7 .")],
            "3 + 4 = 7 .\n</think>\n\nThe answer is 7",
        ),
    ],
)
def test_a_generation_prompt_that_opens_a_thought(completion: Any, text: str) -> None:
    found = encode(completion, R1)
    assert found.text == text and found.answer == "7"
    assert written(found) == f"{text}<end>"


def test_another_template_says_what_to_do() -> None:
    other = CHATML.replace("assistant\n' }}", "assistant<think>ok ' }}")
    with pytest.raises(ValueError, match=r"'q', teacher 't': .* edit chat_template in a copy"):
        encode("The answer is 7", other)


def test_a_template_that_refuses_a_chat_names_the_problem() -> None:
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('No system') }}{% endif %}"
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "3 + 4"}]
    with pytest.raises(ValueError, match="question_id 'q': the chat template refuses .*No system"):
        encode("The answer is 7", refuses + CHATML, messages)
    problem = Problem("q", messages, "7", ())
    with pytest.raises(ValueError, match="question_id 'q': the chat template refuses .*No system"):
        encode_question(problem, byte_tokenizer(refuses + CHATML), 300)
    late = "{% if messages[-1].role == 'assistant' %}{{ raise_exception('Never') }}{% endif %}"
    with pytest.raises(ValueError, match="'q', teacher 't': the chat template refuses .*Never"):
        encode("The answer is 7", late + CHATML)


def test_what_follows_a_special_token_without_a_role_is_dropped() -> None:
    """`all_special_ids` lacks such tokens."""
    assert written(encode("The answer is 7", CHATML)) == "The answer is 7<|im_end|>"
