"""What is read of a reply, and what the export makes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compact.data import load_problems, load_questions
from compact.teachers.collect import plan
from compact.teachers.endpoint import Endpoint, Failure
from compact.teachers.export import data_card, find_rows, rows_of
from compact.teachers.spec import Teacher
from compact.teachers.store import Answer, Attempt, Store

TEACHER = Teacher("a", model="m", base_url="http://127.0.0.1:1/v1", api_key_env="TEST_REPLY_KEY")


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Endpoint:
    monkeypatch.setenv("TEST_REPLY_KEY", "sk-reply-secret")
    return Endpoint(TEACHER)


def reply(finish: Any = "stop", usage: Any = None, **message: Any) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish}
    return json.dumps({"model": "m-1", "choices": [choice], "usage": usage}).encode()


def test_an_answer(endpoint: Endpoint) -> None:
    usage = {"prompt_tokens": 5, "completion_tokens": 7}
    answer = endpoint._answer(reply(usage=usage, content="It is 4.", reasoning_content="2 + 2"))
    assert answer == Answer("It is 4.", "2 + 2", "stop", "m-1", 5, 7)
    assert endpoint._answer(reply(content="x", reasoning="why")).reasoning == "why"
    assert endpoint._answer(reply(finish=None, content="x")).finish == "stop"
    assert endpoint._answer(reply(usage={"prompt_tokens": "5"}, content="x")).prompt_tokens == 0


def test_a_short_key_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """A local server takes any word as its key; the word may stand in an answer."""
    monkeypatch.setenv("TEST_REPLY_KEY", "none")
    assert Endpoint(TEACHER)._answer(reply(content="There are none.")).text == "There are none."


def test_a_key_in_a_reply_is_hidden(endpoint: Endpoint) -> None:
    answer = endpoint._answer(
        reply(content="You sent sk-reply-secret.", reasoning="sk-reply-secret")
    )
    assert (answer.text, answer.reasoning) == ("You sent [key].", "[key]")
    with pytest.raises(Failure) as failure:
        endpoint._answer(b"sk-reply-secret is no JSON")
    assert "secret" not in str(failure.value) and failure.value.kind == "broken reply"


@pytest.mark.parametrize("finish", ["length", "content_filter"])
def test_an_empty_answer_that_another_attempt_would_not_fill(
    endpoint: Endpoint, finish: str
) -> None:
    """All tokens went into the reasoning, or a filter took the text: paid, and not asked again."""
    assert endpoint._answer(reply(finish=finish, content=None)).text == ""


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"[]", b"null", b"{}", b'{"choices": null}', b'{"choices": [{}]}', b"\xff\xfe"),
        *(b'{"choices": [{"message": null}]}', reply(content=["x"]), b"[" * 100_000),
        b'{"choices": [{"message": {"content": "x"}}], "usage": 3}',
        reply(content="half of a pair: \ud83d"),
    ],
)
def test_a_broken_reply(endpoint: Endpoint, content: bytes) -> None:
    with pytest.raises(Failure) as failure:
        endpoint._answer(content)
    assert failure.value.kind == "broken reply" and failure.value.again


@pytest.mark.parametrize("content", [None, "", " \n"])
def test_an_empty_answer(endpoint: Endpoint, content: str | None) -> None:
    with pytest.raises(Failure) as failure:
        endpoint._answer(reply(content=content, usage={"prompt_tokens": 3}))
    assert failure.value.kind == "empty" and failure.value.usage == (3, 0)


def test_a_reply_in_parts(endpoint: Endpoint) -> None:
    """As Mistral's thinking models send it; another content would be another the next time too."""
    thought = [{"type": "text", "text": "2 + 2 is 4"}]
    parts = [{"type": "thinking", "thinking": thought}, {"type": "text", "text": "The answer is 4"}]
    answer = endpoint._answer(reply(content=parts))
    assert (answer.text, answer.reasoning) == ("The answer is 4", "2 + 2 is 4")


@pytest.mark.parametrize("finish", ["error", "abort", "cancelled"])
def test_an_answer_that_the_server_broke_off_is_asked_again(
    endpoint: Endpoint, finish: str
) -> None:
    with pytest.raises(Failure) as failure:
        endpoint._answer(reply(content="2 + 3 = 5, and then we", finish=finish))
    assert failure.value.kind == "broken off" and failure.value.again and failure.value.billed


@pytest.mark.parametrize(
    "error,kind",
    [
        ({"code": 429, "message": "slow down"}, "rate limit"),
        ({"code": "502", "message": "the provider sent nothing"}, "server error"),
        ({"code": 402, "message": "no credits"}, "no credit"),
        ({"code": 400, "message": "too long"}, "refused"),
        ({"code": "rate_limit_exceeded"}, "rate limit"),
        ({"code": "insufficient_quota"}, "no credit"),
        ({"code": None, "message": "overloaded"}, "server error"),
        ("overloaded sk-reply-secret", "server error"),
    ],
)
def test_an_error_under_status_200(endpoint: Endpoint, error: Any, kind: str) -> None:
    """As OpenRouter sends it. Nothing was written, so nothing is charged."""
    with pytest.raises(Failure) as failure:
        endpoint._answer(json.dumps({"error": error, "model": "m"}).encode())
    found = failure.value
    assert found.kind == kind and not found.billed and "secret" not in str(found)
    assert found.again == (kind in ("rate limit", "server error"))
    assert found.fatal == (kind == "no credit")


def test_a_refusal_is_an_answer_that_a_filter_took(endpoint: Endpoint) -> None:
    answer = endpoint._answer(reply(content=None, refusal="I cannot help with that."))
    assert (answer.text, answer.finish) == ("", "content_filter")
    assert endpoint._answer(reply(content="It is 4.", refusal=None)).finish == "stop"


@pytest.mark.parametrize("finish", ["model_length", "max_tokens", "MAX_TOKENS"])
def test_an_answer_that_was_cut_has_one_name(endpoint: Endpoint, finish: str) -> None:
    assert endpoint._answer(reply(content="2 + 3 =", finish=finish)).finish == "length"


def test_reasoning_in_the_export(tmp_path: Path) -> None:
    questions = load_questions([{"question_id": "q", "prompt": "2 + 2?", "answer": "4"}])
    store = Store(tmp_path / "s.sqlite")
    (item,) = plan(TEACHER, questions)
    answer = Answer("The answer is 4", "It may be 5. The answer is 5", "stop", "m-1")
    store.close_attempt(item.key, "a", Attempt("answer"), answer, item.request)
    rows = {}
    for where in ("apart", "completion", "drop"):
        teacher = replace(TEACHER, reasoning=where)
        found = find_rows(store, [(teacher, plan(teacher, questions))])
        (rows[where],) = rows_of(found)
        assert rows[where]["mark"] == "right" and load_problems([rows[where]])
        assert "| a | m | 127.0.0.1 |" in data_card(found, "q.jsonl", 1)
    assert rows["apart"]["reasoning"] == answer.reasoning
    assert rows["completion"]["completion"] == (
        "<think>\nIt may be 5. The answer is 5\n</think>\n\nThe answer is 4"
    )
    assert "reasoning" not in rows["completion"] | rows["drop"]
    assert rows["drop"]["completion"] == "The answer is 4"
