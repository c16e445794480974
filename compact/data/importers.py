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

`compact.data.foreign` prepares each row first: it renames fields and writes options into the
question.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from compact.answers import Domain, find_domain
from compact.answers.reading import stated_answer
from compact.data.foreign import PROMPTS, is_rationale, prepared
from compact.data.problems import REASONING, Text, plain_of, prompt_key, text_of
from compact.data.rows import field_name, read_rows, stem_of
from compact.text.steps import find_marker, split_steps

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
ROLES["system"] = "system"
_REASONING_NAMES = (REASONING, "reasoning", "thinking")
_COT_NAMES = ("cot", "rationale", "explanation", "solution", "reasoning")
_COMPLETIONS = dict.fromkeys(("completion", "output", "cot"), "-")
"""Stands where a row's format has the completion, when a column is read instead."""
_WRITTEN = ("choice", "math", "text")
"""Domains in which a gold answer keeps the form that the rationale gave it."""
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


class Imported(NamedTuple):
    """What `import_files` returns.

    Attributes:
        rows: in the format of this project, ordered by problem.
        left_out: rationales left out: the same text again, or more than `samples`.
        empty: rows (with columns: fields) without a rationale.
    """

    rows: list[dict[str, Any]]
    left_out: int
    empty: int


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


def _answer(row: Mapping[str, Any], where: str) -> str | None:
    """Returns the gold answer of a row, None if it has none."""
    return _optional(row, where, "answer", "label")


def _contents(row: Mapping[str, Any], name: str, where: str) -> tuple[Text, ...]:
    """Returns what a field holds: a text, chat messages, or a list of texts; () if it is empty."""
    value = row.get(name)
    if value in (None, "", []):
        return ()
    if not isinstance(value, list):
        return (_field(row, name, where),)
    if isinstance(value[0], str | None):
        return tuple(_text(x, f"{where}: {name}[{i}]") for i, x in enumerate(value) if x)
    return (_messages(value, f"{where}: {name}"),)


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
    return Sample(prompt, (_field(row, "output", where),), _answer(row, where))


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
    return Sample(plain_of(before), (plain_of([last]),), _answer(row, where))


def from_mcc_kd(row: Mapping[str, Any], where: str) -> Sample:
    """Reads instruction, output (a list of rationales) and label."""
    outputs = row["output"]
    if not isinstance(outputs, list) or not outputs:
        raise ValueError(f"{where}: output must list at least one text, got {str(outputs)[:60]}")
    texts = tuple(_text(x, f"{where}: output[{i}]") for i, x in enumerate(outputs))
    return Sample(_field(row, "instruction", where), texts, _answer(row, where))


def from_cot(row: Mapping[str, Any], where: str) -> Sample:
    """Reads Question, CoT and Answer; a CoT that states no answer gets the answer appended.

    A CoT that ends in another answer stays as it is. If the answer is a rationale ("... #### 18"),
    the gold answer is the one that it states.
    """
    names = [name for name in _COT_NAMES if name in row]
    name = next((name for name in names if row[name]), names[0] if names else None)
    if name is None:
        raise ValueError(
            f"{where}: expected a rationale as {', '.join(_COT_NAMES)}, got the fields "
            f"{', '.join(row)}"
        )
    question, cot = _field(row, "question", where), _field(row, name, where)
    answer = _optional(row, where, "answer")
    if answer is not None and is_rationale(answer):
        answer = _marked(answer, question)
    unmarked = answer is not None and find_marker(cot) == len(cot)
    if unmarked and not _ends_elsewhere(cot, answer, question):
        cot = f"{cot}\nThe answer is {answer}"
    return Sample(question, (cot,), answer)


def _ends_elsewhere(cot: str, answer: str | None, question: str) -> bool:
    """Whether a text without a marker ends in another answer than the gold one.

    Words and formulas say so behind a marker only. An option must be stated, not only mentioned.
    """
    domain = find_domain(answer, question)
    found = None if domain.name in ("math", "text") else domain.extract(cot)
    if found is None or domain.matches(found, answer):
        return False
    closed = domain.alternatives(answer, question)
    return not closed or any(domain.states(step.text) for step in split_steps(cot))


def from_question(row: Mapping[str, Any], where: str) -> Sample:
    """Reads question and answer, as in GSM8K, where the answer is a rationale ("... #### 18").

    So is a text of several lines or of more than `LONGEST_GOLD` characters; without a marker it has
    no gold answer. Any other answer is a gold answer alone.
    """
    question, text = _field(row, "question", where), _field(row, "answer", where)
    if not is_rationale(text):
        return Sample(question, (), text)
    return Sample(question, (text,), _marked(text, question))


def _marked(rationale: str, prompt: str) -> str | None:
    """Returns the answer that a rationale states behind a marker, None without a marker."""
    return _stated(rationale, prompt) if find_marker(rationale) < len(rationale) else None


def _stated(rationale: str, prompt: str) -> str | None:
    """Returns the answer that a rationale states, as a gold answer.

    Letters, words and mathematics are returned as written. The domain general would remove their
    brackets and capitals.
    """
    domain, said = find_domain(None, prompt), (stated_answer(rationale) or "").strip().rstrip(".")
    if domain.name == "general" and said and find_domain(said, prompt).name in _WRITTEN:
        return said
    answer = domain.extract(rationale)
    # "Jar A. Jar B." in a prompt are no options if the rationale states none.
    return _stated(rationale, "") if answer is None and domain.name == "choice" else answer


def from_compact(row: Mapping[str, Any], where: str) -> Sample:
    """Reads a row of this project; a test question has no completion."""
    prompt: Text | list[Any] | None = row.get("prompt")
    if isinstance(prompt, list) and prompt:
        prompt = _messages(prompt, f"{where}: prompt")
    else:
        prompt = _field(row, "prompt", where)
    return Sample(prompt, _contents(row, "completion", where), _optional(row, where, "answer"))


def from_column(
    row: Mapping[str, Any], where: str, column: str, columns: Sequence[str] = ()
) -> Sample:
    """Reads the rationales in one column of a row, and the rest as the row's format says.

    The row may have no rationale there, and no completion where its format has it. The text of
    one of the `columns` is a rationale, so it is no gold answer.
    """
    if not any(name in row for name in PROMPTS):
        raise ValueError(
            f"{where}: expected a question as {', '.join(PROMPTS)}, problem or query, got the "
            f"fields {', '.join(row)}"
        )
    whole = {**row, **_COMPLETIONS}
    sample = reader_of(whole, where)(whole, where)
    named = {"answer", "label"} & {field_name(each) for each in (column, *columns)}
    said = [text for name in named for text in _contents(row, name, where)]
    golds = (sample.answer, _optional(row, where, "label"))
    answer = next((gold for gold in golds if gold is not None and gold not in said), None)
    completions = _contents(row, field_name(column), where)
    return replace(sample, completions=completions, answer=answer, teacher=column)


def reader_of(
    row: Mapping[str, Any], where: str, column: str | None = None, columns: Sequence[str] = ()
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
        return partial(from_column, column=column, columns=columns)
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


def read_samples(
    path: Path, column: str | None = None, columns: Sequence[str] = ()
) -> Iterator[tuple[str, Sample]]:
    """Yields (`file:line`, sample); the first row determines the format of the file.

    Args:
        path: the file.
        column: the field that holds the rationales, of the teacher of this name; None to take the
            format's.
        columns: all fields that hold rationales.

    Raises:
        ValueError: `file:line: ...` for a row that cannot be used; or the file has no rows.
        OSError: the file cannot be read.
    """
    reader = None
    for where, _, given in read_rows(path):
        row = prepared(given, where)
        reader = reader or reader_of(row, where, column, columns)
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
) -> Imported:
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

    Raises:
        ValueError: `file:line: ...` for a row that cannot be used.
        OSError: a file cannot be read.
    """
    golds = gold_answers(gold) if gold else {}
    firsts: dict[str, tuple[str, Text]] = {}
    types: dict[str, tuple[str, str | None]] = {}
    answers: dict[str, tuple[str, str]] = {}
    # prompt -> teacher -> digest of a completion, up to white space -> its row
    problems: dict[str, dict[str, dict[bytes, dict[str, Any]]]] = {}
    left_out = empty = 0
    read = [(name, path, column) for name, path in sources for column in columns or (None,)]
    for name, path, column in read:
        completions = 0
        for where, sample in read_samples(path, column, columns):
            completions += len(sample.completions)
            empty += not sample.completions
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
                same = hashlib.sha256(prompt_key(completion).encode()).digest()
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
    return Imported(found, left_out, empty)


def _name_teachers(problems: Mapping[str, Mapping[str, Mapping[bytes, dict[str, Any]]]]) -> None:
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
