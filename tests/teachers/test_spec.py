"""teachers.yaml: what is read, and errors that name file, line and key but never a secret."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from compact.teachers.prompts import TEMPLATES, messages_of
from compact.teachers.spec import Teacher, read_teachers

URL = "http://localhost:8000/v1"


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "teachers.yaml"
        path.write_text(text)
        return path

    return write


def test_the_keys_of_a_teacher(written: Callable[[str], Path]) -> None:
    path = written(
        f"teachers:\n- name: a\n  model: m\n  base_url: {URL}\n  price: {{in: 1, out: 2.5}}\n"
        "  n: 2\n  extra_body: {seed: 1}\n- {name: b, local: folder/student}\n"
    )
    a, b = read_teachers(path)
    assert (a.n, a.cost(1_000_000, 2_000_000)) == (2, 6.0)
    assert a.parameters() == {"model": "m", "max_tokens": 1024, "extra_body": {"seed": 1}}
    assert b.local == "folder/student" and b.parameters()["model"].startswith("folder/student@")


BAD = [
    ("", ": expected a list of teachers"),
    ("name: a", ": expected a list of teachers"),
    ("- a", ":1: expected `key: value` lines, got str"),
    ("- model: m", ":1: key 'name' is missing"),
    ("- name: a\n  modell: m", ":2: unknown key 'modell'; the keys are name, model"),
    ("- name: a\n  name: b", ":2: key 'name' is given twice"),
    ("- name: a\n  model: m", ":1: base_url or local must be given, got neither"),
    (f"- name: a\n  base_url: {URL}", "model must be given with base_url"),
    (f"- name: a b\n  model: m\n  base_url: {URL}", ":1: name must have no space"),
    (f"- name: a\n  model: m\n  base_url: {URL}\n  n: x", ":4: n must be a whole number"),
    (f"- name: a\n  model: m\n  base_url: {URL}\n  n: 0", ":4: n must be at least 1, got 0"),
    (f"- name: a\n  model: m\n  base_url: {URL}\n  n: 2\n  temperature: 0", ":4: n must be 1"),
    (f"- name: a\n  model: m\n  base_url: {URL}\n  template: x", ":4: template must be one of"),
    (f"- name: a\n  model: m\n  base_url: {URL}\n  extra_body: {{n: 2}}", ":4: extra_body must"),
    (f"- name: a\n  model: m\n  base_url: {URL}\n  price: {{input: 2}}", ":4: price must hold"),
    (f"- name: a\n  model: m\n  base_url: {URL}\n  price: {{in: -1}}", ":4: price: in must"),
    ("- name: a\n  model: m\n  base_url: localhost:8000", ":3: base_url must be an address"),
    (
        f"- {{name: a, model: m, base_url: '{URL}'}}\n- {{name: a, model: n, base_url: '{URL}'}}",
        ":2: name 'a' is also that of the teacher at",
    ),
    (
        f"- {{name: a, model: m, base_url: '{URL}'}}\n- {{name: b, model: m, base_url: '{URL}'}}",
        ":2: teacher 'b' sends the same requests as 'a'",
    ),
]


@pytest.mark.parametrize("text,words", BAD)
def test_bad_teachers(written: Callable[[str], Path], text: str, words: str) -> None:
    path = written(text)
    with pytest.raises(ValueError) as error:
        read_teachers(path)
    assert str(error.value).startswith(f"{path}{words}" if words[0] == ":" else str(path))
    assert words in str(error.value)


@pytest.mark.parametrize(
    "line",
    [
        "api_key: sk-secret-123456",
        "api_key_env: sk-secret-123456",
        "base_url: http://user:sk-secret-123456@host/v1",
        "base_url: http://host/v1?key=sk-secret-123456",
        "api_key_env: [sk-secret-123456]",
    ],
)
def test_a_key_in_the_file_is_refused_and_not_shown(
    written: Callable[[str], Path], line: str
) -> None:
    path = written(f"- name: a\n  model: m\n  {line}\n")
    with pytest.raises(ValueError, match=r"teachers.yaml:3: ") as error:
        read_teachers(path)
    assert "secret" not in str(error.value)


def test_a_key_anywhere_in_the_file_is_refused(
    written: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_KEY", "gsk_secret_1")
    text = (
        f"- {{name: a, model: m, base_url: '{URL}', api_key_env: TEST_KEY, system: gsk_secret_1}}"
    )
    with pytest.raises(ValueError, match="holds the key of teacher 'a'") as error:
        read_teachers(written(text))
    assert "gsk" not in str(error.value)


def test_a_variable_that_is_not_set_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be the key itself, given by mistake."""
    teacher = Teacher("a", model="m", base_url=URL, api_key_env="gsk_secret_2")
    with pytest.raises(ValueError, match="teacher 'a': api_key_env must name") as error:
        teacher.key()
    assert "gsk" not in str(error.value)


def test_every_template_puts_the_question_and_asks_for_a_marker() -> None:
    assert len(TEMPLATES) == 10 and len(set(TEMPLATES.values())) == 10
    for template in TEMPLATES.values():
        (message,) = messages_of("How many {x} are left?", template)
        assert message["content"].startswith("How many {x} are left?")
        assert message["content"].endswith('"The answer is X".')


def test_a_chat_is_put_with_its_history() -> None:
    chat = [
        {"role": "system", "content": "old"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "1 + 1?"},
    ]
    found = messages_of(chat, "{question} Go.", "new")
    assert [m["content"] for m in found] == ["new", "Hi", "Hello", "1 + 1? Go."]
    with pytest.raises(ValueError, match="message of the user"):
        messages_of(chat[:1], "{question}")
