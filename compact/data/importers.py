"""Converts files of other projects into JSON lines with one rationale per line.

`compact.data.rows` opens the files. The fields of its first row determine the format of a file:

- alpaca (also LLaMA-Factory's): instruction, input, output, and if present system and history;
- sharegpt (also LLaMA-Factory's): conversations of from/value, or messages of role/content;
- mcc-kd: instruction, output as a list of rationales, label;
- cot: Question, CoT (or Rationale, Explanation, Solution, Reasoning), Answer; also question and
  answer alone (GSM8K's);
- compact: the rows of this project, to merge files; also prompt and completion alone (TRL's);
- if columns are named, one row a question: each of them holds the rationales of a teacher, and
  prompt and answer are read as in the format that the row has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from compact.answers import Domain, find_domain
from compact.answers.reading import stated_answer
from compact.data.problems import REASONING, Text, plain_of, prompt_key, text_of
from compact.data.rows import field_name, read_rows, stem_of
from compact.text.steps import find_marker

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
ROLES["system"] = "system"
_REASONING_NAMES = (REASONING, "reasoning", "thinking")
_COT_NAMES = ("cot", "rationale", "explanation", "solution", "reasoning")
_PROMPT_NAMES = ("prompt", "conversations", "messages", "instruction", "question")
_COMPLETIONS = dict.fromkeys(("completion", "output", "cot"), "-")
"""Stands where a row's format has the completion, when a column is read instead."""
_OF_MESSAGES = {"from", "role", "value", "content", *_REASONING_NAMES}


@dataclass(frozen=True)
class Sample:
    """The content of a row of any format.

    Attributes:
        prompt: the question, as text or chat messages.
        completions: the rationales of the row, each as text or chat messages.
        answer: the gold answer, None if the row has none.
        teacher: the teacher that the row names, None if it names none.
        answer_type: the domain of answers that the row names, None if it names none.
    """

    prompt: Text
    completions: tuple[Text, ...]
    answer: str | None
    teacher: str | None = None
    answer_type: str | None = None


def _field(row: Mapping[str, Any], name: str, where: str) -> str:
    """Returns a required field as text; numbers, and "true" and "false", are converted to text."""
    value = row.get(name)
    if isinstance(value, bool):
        value = str(value).lower()
    elif isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        value = str(value)
    found = f"{type(value).__name__} {value!r}" if name in row else f"fields {', '.join(row)}"
    return _text(value, f"{where}: field {name!r}", found)


def _text(value: Any, what: str, found: str | None = None) -> str:
    """Returns a text without the white space around it.

    Args:
        value: the text.
        what: how the error names it.
        found: how the error describes a wrong value; None for its repr.

    Raises:
        ValueError: no text, only white space, or text that UTF-8 cannot encode.
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{what} must hold text, got {(found or repr(value))[:80]}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{what} must hold text, got half of a surrogate pair") from None
    return value.strip()


def _messages(turns: list[Any], what: str) -> list[dict[str, str]]:
    """Returns chat messages from objects of from/value or role/content."""
    messages = []
    for index, turn in enumerate(turns):
        at = f"{what}[{index}]"
        if not isinstance(turn, dict):
            raise ValueError(f"{at} must be an object, got {type(turn).__name__}")
        role = turn.get("from", turn.get("role"))
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"{at} must come from {', '.join(ROLES)}, got {role!r}")
        content = _text(turn.get("value", turn.get("content")), at)
        message = {"role": ROLES[role], "content": content}
        reasoning = next((turn[name] for name in _REASONING_NAMES if turn.get(name)), None)
        if reasoning is not None:
            message[REASONING] = _text(reasoning, f"{at}: {REASONING}")
        for key in sorted(turn.keys() - _OF_MESSAGES):
            if turn[key] and isinstance(turn[key], str | list | dict):
                raise ValueError(
                    f"{at} must hold role, content and {REASONING}, got {key!r}, which would be "
                    "lost"
                )
        messages.append(message)
    return messages


def _optional(row: Mapping[str, Any], where: str, *names: str) -> str | None:
    """Returns the first of the named fields that the row has, None if it has none of them."""
    return next((_field(row, n, where) for n in names if row.get(n) not in (None, "")), None)


def from_alpaca(row: Mapping[str, Any], where: str) -> Sample:
    """Reads instruction, input, output; with system or history the prompt is a chat."""
    user = _field(row, "instruction", where)
    extra = _optional(row, where, "input")
    user = f"{user}\n{extra}" if extra else user
    system = _optional(row, where, "system")
    messages = [{"role": "system", "content": system}] if system else []
    history = row.get("history") or []
    for turn in history if isinstance(history, list) else [history]:
        if not isinstance(turn, list) or len(turn) != 2:
            raise ValueError(
                f"{where}: history must hold [instruction, answer] pairs, got {str(turn)[:60]}"
            )
        messages += [
            {"role": role, "content": _text(text, f"{where}: history")}
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
    prompt = [*messages, {"role": "user", "content": user}] if messages else user
    return Sample(prompt, (_field(row, "output", where),), _optional(row, where, "answer", "label"))


def from_sharegpt(row: Mapping[str, Any], where: str) -> Sample:
    """Reads conversations (from, value) or messages (role, content).

    The last message is the completion.
    """
    name = "conversations" if "conversations" in row else "messages"
    turns = row[name]
    if not isinstance(turns, list) or len(turns) < 2:
        raise ValueError(f"{where}: {name} must hold at least two messages, got {str(turns)[:60]}")
    system = _optional(row, where, "system")
    messages = [{"role": "system", "content": system}] if system else []
    messages += _messages(turns, f"{where}: {name}")
    *before, last = messages
    if last["role"] != "assistant":
        raise ValueError(f"{where}: {name} must end with the assistant, got {last['role']!r}")
    return Sample(plain_of(before), (plain_of([last]),), _optional(row, where, "answer", "label"))


def from_mcc_kd(row: Mapping[str, Any], where: str) -> Sample:
    """Reads instruction, output (a list of rationales) and label."""
    outputs = row["output"]
    if not isinstance(outputs, list) or not outputs:
        raise ValueError(f"{where}: output must list at least one text, got {str(outputs)[:60]}")
    return Sample(
        _field(row, "instruction", where),
        tuple(_text(x, f"{where}: output[{i}]") for i, x in enumerate(outputs)),
        _optional(row, where, "label"),
    )


def from_cot(row: Mapping[str, Any], where: str) -> Sample:
    """Reads Question, CoT and Answer; a CoT that states no answer gets the answer appended.

    If the answer is a rationale ("... #### 18"), the gold answer is the one that it states.
    """
    name = next((name for name in _COT_NAMES if name in row), None)
    if name is None:
        raise ValueError(
            f"{where}: expected a rationale as {', '.join(_COT_NAMES)}, got the fields "
            f"{', '.join(row)}"
        )
    question, cot = _field(row, "question", where), _field(row, name, where)
    answer = _optional(row, where, "answer")
    if answer is not None and find_marker(answer) < len(answer):
        answer = _stated(answer, question)
    if answer is not None and find_marker(cot) == len(cot):
        cot = f"{cot}\nThe answer is {answer}"
    return Sample(question, (cot,), answer)


def from_question(row: Mapping[str, Any], where: str) -> Sample:
    """Reads question and answer, as in GSM8K: an answer behind a marker ("#### 18") is a rationale.

    Any other answer is a gold answer alone.
    """
    question, text = _field(row, "question", where), _field(row, "answer", where)
    if find_marker(text) == len(text):
        return Sample(question, (), text)
    return Sample(question, (text,), _stated(text, question))


def _stated(rationale: str, prompt: str) -> str | None:
    """Returns the answer that a rationale states, as a gold answer.

    Letters, words and mathematics are returned as written. The domain general would remove their
    brackets and capitals.
    """
    domain, said = find_domain(None, prompt), (stated_answer(rationale) or "").strip().rstrip(".")
    written = ("choice", "math", "text")
    if domain.name == "general" and said and find_domain(said, prompt).name in written:
        return said
    return domain.extract(rationale)


def from_compact(row: Mapping[str, Any], where: str) -> Sample:
    """Reads a row of this project; a test question has no completion."""

    def content(name: str) -> Text:
        value = row.get(name)
        if isinstance(value, list) and value:
            return _messages(value, f"{where}: {name}")
        return _field(row, name, where)

    return Sample(
        content("prompt"),
        () if row.get("completion") in (None, "", []) else (content("completion"),),
        _optional(row, where, "answer"),
    )


def from_column(row: Mapping[str, Any], where: str, column: str) -> Sample:
    """Reads the rationale in one column of a row, and the rest as the row's format says.

    The row may have no rationale there, and no completion where its format has it.
    """
    if not any(name in row for name in _PROMPT_NAMES):
        raise ValueError(
            f"{where}: expected a question as {', '.join(_PROMPT_NAMES)}, got the fields "
            f"{', '.join(row)}"
        )
    whole = {**row, **_COMPLETIONS}
    sample = reader_of(whole, where)(whole, where)
    found = _optional(row, where, field_name(column))
    return replace(
        sample,
        completions=() if found is None else (found,),
        answer=sample.answer or _optional(row, where, "label"),
        teacher=column,
    )


def reader_of(
    row: Mapping[str, Any], where: str, column: str | None = None
) -> Callable[[Mapping[str, Any], str], Sample]:
    """Returns the reader of a row's format, or that of a column.

    Raises:
        ValueError: no known format has these fields, or the column is not among them.
    """
    if column is not None:
        if field_name(column) not in row:
            raise ValueError(
                f"{where}: --columns must be among the fields {', '.join(row)}, got {column!r}"
            )
        return partial(from_column, column=column)
    if {"prompt", "completion"} <= row.keys():
        return from_compact
    if "conversations" in row or "messages" in row:
        return from_sharegpt
    if {"instruction", "output"} <= row.keys():
        return from_mcc_kd if isinstance(row["output"], list) else from_alpaca
    if "question" in row and any(name in row for name in _COT_NAMES):
        return from_cot
    if {"question", "answer"} <= row.keys():
        return from_question
    if "question_id" in row:
        return from_compact
    raise ValueError(
        f"{where}: expected the fields of alpaca (instruction, output), sharegpt (conversations or "
        f"messages), MCC-KD (instruction, output list, label), Question/CoT/Answer, "
        f"question/answer or compact (prompt, completion, answer), got {', '.join(row) or 'none'}"
    )


def read_samples(path: Path, column: str | None = None) -> Iterator[tuple[str, Sample]]:
    """Yields (`file:line`, sample); the first row determines the format of the file.

    Args:
        path: the file.
        column: the field that holds the rationales, of the teacher of this name; None to take the
            format's.

    Raises:
        ValueError: `file:line: ...` for a row that cannot be used; or the file has no rows.
        OSError: the file cannot be read.
    """
    reader = None
    for where, _, row in read_rows(path):
        reader = reader or reader_of(row, where, column)
        try:
            sample = reader(row, where)
        except KeyError as error:
            raise ValueError(f"{where}: field {error} is missing; the first row has it") from None
        teacher = sample.teacher or _optional(row, where, "teacher")
        yield (
            where,
            replace(sample, teacher=teacher, answer_type=_optional(row, where, "answer_type")),
        )
    if reader is None:
        raise ValueError(f"{path}: expected at least one row, got none")


def gold_answers(path: Path) -> dict[str, str]:
    """Returns the gold answer of each prompt key.

    The gold answer is the answer field of the row, else the final answer in its completion.

    Raises:
        ValueError: `file:line: ...` for a row that cannot be used or has no answer.
        OSError: the file cannot be read.
    """
    found: dict[str, tuple[str, str]] = {}
    for where, sample in read_samples(path):
        answer = sample.answer
        if answer is None:
            if not sample.completions:
                raise ValueError(f"{where}: field 'answer' must hold text, got a row without it")
            text = text_of(sample.completions[0])
            answer = _stated(text, text_of(sample.prompt)) or (text if len(text) <= 40 else None)
            if not answer:
                raise ValueError(
                    f"{where}: expected a final answer in the completion, got none in "
                    f"{text[-60:]!r}"
                )
        first, agreed = found.setdefault(prompt_key(sample.prompt), (where, answer))
        domain = find_domain(agreed, text_of(sample.prompt))
        _check_agreement(domain, where, answer, first, agreed)
    return {key: answer for key, (_, answer) in found.items()}


def _check_agreement(
    domain: Domain, where: str, answer: str, first: str, agreed: str, hint: str = ""
) -> None:
    """Raises ValueError if the answer at `where` is another than the agreed one at `first`."""
    if answer != agreed and not domain.matches(answer, agreed):
        raise ValueError(
            f"{where}: answer {answer!r} disagrees with {agreed!r} of the same prompt at "
            f"{first}{hint}"
        )


def import_files(
    sources: list[tuple[str | None, Path]],
    gold: Path | None = None,
    *,
    prefix: str = "problem",
    samples: int | None = None,
    columns: Sequence[str] = (),
) -> tuple[list[dict[str, Any]], int]:
    """Reads files of any known format and groups their rows into problems.

    Args:
        sources: pairs (teacher, file). If the teacher is None, it is the teacher that the row
            names, else the file's stem. If a teacher has several rationales of some problem, its
            n-th of every problem is named `teacher-n`.
        gold: file of gold answers, which replace those of the rows. Without it, a prompt has the
            answer of any of its rows; it may have none.
        prefix: start of the question ids; a number follows, in order of first appearance.
        samples: most rationales of a teacher that are kept for a problem; None keeps all.
        columns: the fields that hold rationales, in files of one row a question; each is a teacher.

    Returns:
        Rows in the format of this project, ordered by problem, and the number of rationales left
        out: the same text again, or more than `samples`.

    Raises:
        ValueError: `file:line: ...` for a row that cannot be used.
        OSError: a file cannot be read.
    """
    golds = gold_answers(gold) if gold else {}
    firsts: dict[str, tuple[str, Text]] = {}
    types: dict[str, tuple[str, str | None]] = {}
    answers: dict[str, tuple[str, str]] = {}
    # prompt -> teacher -> completion, up to white space -> its row
    problems: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    left_out = 0
    read = [(name, path, column) for name, path in sources for column in columns or (None,)]
    for name, path, column in read:
        completions = 0
        for where, sample in read_samples(path, column):
            completions += len(sample.completions)
            key = prompt_key(sample.prompt)
            answer = golds.get(key, sample.answer)
            fresh = (f"{prefix}-{len(firsts):05d}", sample.prompt)
            question_id, prompt = firsts.setdefault(key, fresh)
            first, answer_type = types.setdefault(key, (where, sample.answer_type))
            if answer_type != sample.answer_type:
                raise ValueError(
                    f"{where}: answer_type must be {answer_type!r} as for the same prompt at "
                    f"{first}, got {sample.answer_type!r}"
                )
            first, agreed = answers.get(key, (where, answer))
            try:
                domain = find_domain(agreed, text_of(prompt), answer_type)
            except ValueError as error:  # the type is unknown, or the answer is none of it
                raise ValueError(f"{where}: {error}") from None
            if answer is not None and agreed is not None:
                answers[key] = (first, agreed)
                hint = "; give a file of the right answers as --gold"
                _check_agreement(domain, where, answer, first, agreed, hint)
            elif gold:
                raise ValueError(
                    f"{where}: the row has no gold answer (answer or label); {gold} has no such "
                    "prompt"
                )
            teacher = name or sample.teacher or stem_of(path)
            mine = problems.setdefault(key, {}).setdefault(teacher, {})
            for completion in sample.completions:
                same = prompt_key(completion)
                if same in mine or (samples is not None and len(mine) >= samples):
                    left_out += 1
                    continue
                row = {"question_id": question_id, "prompt": prompt, "completion": completion}
                if answer_type is not None:
                    row["answer_type"] = answer_type
                mine[same] = row
        whose = name or column
        if whose is not None and not completions:
            raise ValueError(f"{path}: expected completions of {whose}, got only questions")
    _name_teachers(problems)
    for key, (_, agreed) in answers.items():
        for mine in problems.get(key, {}).values():
            for row in mine.values():
                row["answer"] = agreed
    found = [row for each in problems.values() for mine in each.values() for row in mine.values()]
    if not found:
        path = sources[0][1]
        _, _, first_row = next(read_rows(path))
        raise ValueError(
            f"{path}: expected at least one completion, got only questions; the fields are "
            f"{', '.join(first_row)} (--columns names those that hold rationales)"
        )
    return found, left_out


def _name_teachers(problems: Mapping[str, Mapping[str, Mapping[str, dict[str, Any]]]]) -> None:
    """Writes the teacher into each row: `name`, or `name-n` if it has several for some problem.

    Raises:
        ValueError: another teacher already has such a name.
    """
    teachers = {teacher for each in problems.values() for teacher in each}
    several = {t for each in problems.values() for t, mine in each.items() if len(mine) > 1}
    for each in problems.values():
        for teacher, mine in each.items():
            for n, row in enumerate(mine.values(), 1):
                name = f"{teacher}-{n}" if teacher in several else teacher
                if teacher in several and name in teachers:
                    raise ValueError(
                        f"sample {n} of teacher {teacher!r} must get a name of its own, but "
                        f"another teacher is named {name!r}; rename one (TEACHER=FILE)"
                    )
                row["teacher"] = name
