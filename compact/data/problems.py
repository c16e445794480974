"""Reads rationales from a file or data set, checks every row, groups them into problems.

A row is one rationale: question_id, prompt, teacher, completion and, if known, answer (the gold
answer) and answer_type (a domain of `compact.answers`). Prompt and completion are text or chat
messages; `messages` stands for both. Test files have no teacher and no completion, but need the
answer; use `load_questions` for them, or `load_test`, which also reads preference pairs. Every
error names the file and line (or the row of the data set), the field, and what is wrong.
`compact.data.rows` opens the files.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compact.answers import Domain, find_domain
from compact.data.rows import name_of, read_rows

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

REASONING = "reasoning_content"
"""The key of a message's text of reasoning, which many chat templates put in <think>...</think>."""
Message = dict[str, str]
Text = str | list[Message]


@dataclass(frozen=True)
class Rationale:
    """One teacher's solution of a problem.

    Attributes:
        teacher: who wrote it; a teacher has at most one rationale per problem.
        completion: text, or chat messages of the assistant.
        line: its place: line of a file of JSON lines, row of another file (both from 1), or index
            in a data set.
    """

    teacher: str
    completion: Text
    line: int


@dataclass(frozen=True)
class Problem:
    """A question with its gold answer and the rationales of K teachers (K = 0 in a test file).

    Attributes:
        question_id: its id.
        prompt: the question, text or chat messages.
        answer: the gold answer as the data write it; None if the data have none.
        rationales: the rationales, in the order of the rows.
        answer_type: the answer domain that the data name; None if they name none.
    """

    question_id: str
    prompt: Text
    answer: str | None
    rationales: tuple[Rationale, ...]
    answer_type: str | None = None

    @cached_property
    def domain(self) -> Domain:
        """The kind of answer: found once, from gold answer, options in the prompt, answer_type.

        Without a gold answer, the answers that the rationales state take its place.

        Raises:
            ValueError: the gold answer is none of `answer_type`.
        """
        completions = (text_of(r.completion) for r in self.rationales)
        return find_domain(self.answer, text_of(self.prompt), self.answer_type, completions)


@dataclass(frozen=True)
class PreferencePair:
    """Two completions of a prompt, of which one is better: a row of TRL's preference format.

    Attributes:
        question_id: its id, or its place, as `file:line`.
        prompt: the question, text or chat messages.
        chosen: the better completion.
        rejected: the other one.
    """

    question_id: str
    prompt: Text
    chosen: Text
    rejected: Text


def text_of(content: Text) -> str:
    """Returns a prompt or completion as one text, chat messages on lines of their own."""
    return content if isinstance(content, str) else "\n".join(m["content"] for m in content)


def prompt_key(prompt: Text) -> str:
    """Returns the key of a prompt.

    Prompts that differ only in white space have the same key. A lone message has that of its text.
    """
    plain = plain_of(prompt)
    text = plain if isinstance(plain, str) else json.dumps(plain, sort_keys=True)
    return " ".join(text.split())


def plain_of(text: Text) -> Text:
    """Returns the text of a lone message of user or assistant, and anything else unchanged."""
    if isinstance(text, str) or len(text) > 1 or text[0]["role"] == "system":
        return text
    return text if REASONING in text[0] else text[0]["content"]


def load_problems(
    source: str | Path | datasets.Dataset | Sequence[Mapping[str, Any]],
) -> list[Problem]:
    """Reads rationales and groups them by question_id, in order of first appearance.

    The rows of a problem may be anywhere in the file. Problems may have different teachers.

    Args:
        source: path of a file, `hub:OWNER/NAME`, a datasets.Dataset, or a sequence of rows; see
            `compact.data.rows`.

    Returns:
        Problems with K >= 1 rationales each, in order of appearance.

    Raises:
        ValueError: `file:line: field ...` for a row that cannot be used: not JSON, a field missing
            or empty, two rationales of one teacher, prompts or answers that disagree within a
            problem, an answer in only some rows of a problem; or if there is no row.
        TypeError: a field, or `source`, has the wrong type.
        OSError: the file cannot be read.
    """
    return _group(source, with_rationales=True, need_answers=False)


def load_questions(
    source: str | Path | datasets.Dataset | Sequence[Mapping[str, Any]],
    *,
    need_answers: bool = True,
) -> list[Problem]:
    """Reads the questions and gold answers of a test file; ignores teacher and completion.

    The file may also hold rationales; each question_id then gives one question.

    Args:
        source: as in `load_problems`.
        need_answers: whether every question must have a gold answer.

    Returns:
        Problems without rationales.

    Raises:
        ValueError, TypeError, OSError: as in `load_problems`.
    """
    return _group(source, with_rationales=False, need_answers=need_answers)


def load_test(
    source: str | Path | datasets.Dataset | Sequence[Mapping[str, Any]],
) -> list[Problem] | list[PreferencePair]:
    """Reads a test: preference pairs if its first row has `chosen` and no `answer`, else questions.

    Args:
        source: as in `load_problems`. Pairs are in TRL's preference format with an explicit prompt:
            prompt, chosen and rejected, each text or chat messages. A row may have a question_id;
            without one its place (`file:line`) is its id.

    Returns:
        Questions, as `load_questions` reads them, or pairs in the order of the rows.

    Raises:
        ValueError, TypeError, OSError: as in `load_problems`; or chosen and rejected are the same
            or begin with the user's message, or a question_id occurs twice.
    """
    first = next(iter(read_rows(source)), ("", 0, {}))[2]
    if first.get("chosen") is None or first.get("answer") is not None:
        return load_questions(source)
    pairs: dict[str, PreferencePair] = {}
    for where, _, row in read_rows(source):
        for field in ("prompt", "chosen", "rejected"):
            if row.get(field) is None:
                raise ValueError(
                    f"{where}: a preference pair must have prompt, chosen and rejected (TRL's form "
                    f"without a prompt is not read), got no {field}"
                )
        named = row.get("question_id") is not None
        name = _text(row, "question_id", where, or_number=True) if named else where
        prompt = _content(row, "prompt", where)
        chosen, rejected = (_completion(row, side, where) for side in ("chosen", "rejected"))
        for field, side in (("chosen", chosen), ("rejected", rejected)):
            if isinstance(side, list) and side[0]["role"] != "assistant":
                raise ValueError(
                    f"{where}: {field} must hold what follows the prompt, so its first message is "
                    f"of role 'assistant', got {side[0]['role']!r}"
                )
        if chosen == rejected:
            raise ValueError(f"{where}: chosen and rejected must differ, got the same text twice")
        if name in pairs:
            raise ValueError(f"{where}: question_id {name!r} occurs twice")
        pairs[name] = PreferencePair(name, prompt, chosen, rejected)
    return list(pairs.values())


def of_teacher(teacher: str, problems: Sequence[Problem]) -> list[Problem]:
    """Returns the problems with a rationale of `teacher`, without the other rationales.

    Raises:
        ValueError: there is none; the message lists the teachers of the data.
    """
    found = [
        replace(p, rationales=tuple(r for r in p.rationales if r.teacher == teacher))
        for p in problems
    ]
    found = [problem for problem in found if problem.rationales]
    if not found:
        names = sorted({r.teacher for p in problems for r in p.rationales})
        raise ValueError(
            f"single:{teacher}: no rationale of teacher {teacher!r} in the data; "
            f"its teachers are {', '.join(names)}"
        )
    return found


def warn_of_overlap(
    name: str, asked: Sequence[Problem | PreferencePair], trained: Sequence[Problem]
) -> None:
    """Warns if questions of a test are in the training data too, whatever their ids.

    Args:
        name: what the message calls the test.
        asked: what is asked in it.
        trained: the training data.
    """
    known = {prompt_key(problem.prompt) for problem in trained}
    shared = sum(prompt_key(each.prompt) in known for each in asked)
    if shared:
        logger.warning(
            "%s: %d of its %d questions are in the training data too", name, shared, len(asked)
        )


def _group(source: Any, with_rationales: bool, need_answers: bool) -> list[Problem]:
    """Checks every row of `source` and groups the rows by question_id."""
    first: dict[str, tuple[str, Problem]] = {}
    rationales: dict[str, dict[str, Rationale]] = {}
    places: dict[tuple[str, str], str] = {}
    for where, line, row in read_rows(source):
        question_id = _text(row, "question_id", where, or_number=True)
        for field in ("tools", "chat_template_kwargs"):  # TRL gives them to the chat template
            if row.get(field):
                raise ValueError(f"{where}: {field} must be empty: the prompt is rendered without")
        row = _with_prompt(row, where, with_rationales)
        prompt = _content(row, "prompt", where)
        # Rationales may come without a gold answer. A test question cannot be judged without one.
        unknown = not need_answers and row.get("answer") is None
        answer = None if unknown else _text(row, "answer", where, or_number=True)
        answer_type = None if row.get("answer_type") is None else _text(row, "answer_type", where)
        problem = Problem(question_id, prompt, answer, (), answer_type)
        if question_id not in first:
            if answer_type is not None:
                _check_domain(problem, where)
            first[question_id] = (where, problem)
            rationales[question_id] = {}
        else:
            _check_agreement(problem, where, *first[question_id])
        if not with_rationales:
            continue
        teacher = _text(row, "teacher", where)
        if teacher in rationales[question_id]:
            raise ValueError(
                f"{where}: teacher {teacher!r} already has a rationale for question_id "
                f"{question_id!r} (at {places[question_id, teacher]}); expected one per problem "
                f"(name several samples {teacher}-1, {teacher}-2, ...; `compact import` does)"
            )
        places[question_id, teacher] = where
        completion = _completion(row, "completion", where)
        rationales[question_id][teacher] = Rationale(teacher, completion, line)
    if not first:
        raise ValueError(f"{name_of(source)}: expected at least one row, got none")
    return [
        replace(problem, rationales=tuple(rationales[question_id].values()))
        for question_id, (_, problem) in first.items()
    ]


def _check_domain(problem: Problem, where: str) -> None:
    """Raises ValueError unless the gold answer is one of its answer_type."""
    try:
        _ = problem.domain
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _check_agreement(problem: Problem, where: str, first_where: str, first: Problem) -> None:
    """Raises ValueError if a row has another prompt or answer than the problem's first row."""
    name = f"question_id {problem.question_id!r}"
    if problem.prompt != first.prompt:
        raise ValueError(
            f"{where}: prompt of {name} differs from the one at {first_where}; the rationales of a "
            "problem must share one prompt"
        )
    if problem.answer_type != first.answer_type:
        raise ValueError(
            f"{where}: answer_type of {name} must be {first.answer_type!r} as at {first_where}, "
            f"got {problem.answer_type!r}"
        )
    if (problem.answer is None) != (first.answer is None):
        here, there = ("has no", "has one") if problem.answer is None else ("has an", "has none")
        raise ValueError(
            f"{where}: {name} {here} answer here, but {there} at {first_where}; all rows of a "
            "problem must have it, or none"
        )
    same = problem.answer == first.answer
    if not same and not first.domain.matches(problem.answer, first.answer):
        raise ValueError(
            f"{where}: answer {problem.answer!r} of {name} disagrees with {first.answer!r} at "
            f"{first_where}"
        )


def _text(row: Mapping[str, Any], field: str, where: str, *, or_number: bool = False) -> str:
    """Returns a required field that holds text; with `or_number`, a number becomes text."""
    value = _required(row, field, where)
    number = isinstance(value, Real) and not isinstance(value, bool)  # also those of numpy
    if or_number and number and math.isfinite(value):
        value = str(value)
    if not isinstance(value, str):
        raise TypeError(f"{where}: {field} must be text, got {_found(value)}")
    if not value.strip():
        raise ValueError(f"{where}: {field} must not be empty")
    if not value.isascii():
        _check_unicode(value, f"{where}: {field}")
    return value


def _check_unicode(value: str, what: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{what} must be text, got half of a surrogate pair") from None


def _content(row: Mapping[str, Any], field: str, where: str) -> Text:
    """Returns a required field that holds text or chat messages."""
    value = _required(row, field, where)
    if isinstance(value, str):
        return _text(row, field, where)
    if not isinstance(value, list):
        raise TypeError(f"{where}: {field} must be text or chat messages, got {_found(value)}")
    if not value:
        raise ValueError(f"{where}: {field} must hold at least one message, got none")
    for index, message in enumerate(value):
        label = f"{field}[{index}]"
        if not isinstance(message, Mapping):
            raise TypeError(f"{where}: {label} must be a chat message, got {_found(message)}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise TypeError(
                    f"{where}: {label} must have text under {key!r}, got {_found(message.get(key))}"
                )
            _check_unicode(message[key], f"{where}: {label}")
        for key in sorted(message.keys() - {"role", "content"}):
            if message[key] and not (key == REASONING and isinstance(message[key], str)):
                raise ValueError(
                    f"{where}: {label} must hold role, content and {REASONING} as text, got "
                    f"{key!r}, which would be lost"
                )
    if not any(message["content"].strip() for message in value):
        if any(message.get(REASONING) for message in value):
            raise ValueError(f"{where}: {field} has {REASONING}, but its 'content' is empty")
        raise ValueError(f"{where}: {field} must not be empty")
    return [
        {key: message[key] for key in ("role", "content", REASONING) if message.get(key)}
        | {"content": message["content"]}
        for message in value
    ]


def _completion(row: Mapping[str, Any], field: str, where: str) -> Text:
    """Returns a required field that holds text, or chat messages of which the assistant's ends."""
    completion = _content(row, field, where)
    if isinstance(completion, list) and completion[-1]["role"] != "assistant":
        raise ValueError(
            f"{where}: {field} must end with a message of role 'assistant', "
            f"got role {completion[-1]['role']!r}"
        )
    return completion


def _with_prompt(row: Mapping[str, Any], where: str, with_rationales: bool) -> Mapping[str, Any]:
    """Returns a row of `messages` with prompt and completion, its last message, in their place.

    Of a question the messages are the prompt, unless the assistant's ends them.
    """
    messages = row.get("messages")
    if messages is None or row.get("prompt") is not None or row.get("completion") is not None:
        return row
    if not with_rationales and isinstance(messages, list) and messages:
        last = messages[-1]
        if isinstance(last, Mapping) and last.get("role") != "assistant":
            return {**row, "prompt": messages}
    if not isinstance(messages, list) or len(messages) < 2:
        raise ValueError(
            f"{where}: messages must hold at least two messages, got {_found(messages)}"
        )
    return {**row, "prompt": messages[:-1], "completion": messages[-1:]}


def _required(row: Mapping[str, Any], field: str, where: str) -> Any:
    if row.get(field) is None:
        if field in row:
            raise ValueError(f"{where}: field {field!r} is null")
        hint = "" if "question_id" in row else "; `compact import` reads the rows of other tools"
        if "chosen" in row:
            hint = (
                "; preference pairs are read as a test of compact compare or compact evaluate only"
            )
        found = ", ".join(name for name in row) or "none"
        raise ValueError(f"{where}: field {field!r} is missing (found: {found}){hint}")
    return row[field]


def _found(value: Any) -> str:
    """Returns the description of a wrong value for error messages."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"a number that is not finite ({value})"
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 40 else shown[:37] + '...'}"
