"""Every kind of file and data set gives the same problems; errors name the line or the row."""

from __future__ import annotations

import csv
import functools
import json
from datetime import date
from pathlib import Path
from typing import Any

import datasets
import pytest

from compact import load_problems, load_questions
from compact.commands.cli import main
from compact.data.labelled import load_labelled
from compact.data.rows import as_json_lines, content_of_rows
from compact.lab import zoo
from helpers.commands import run
from helpers.toy import save_student

ROWS = zoo.make_rows(("good", "wrong-step"), 3, seed=3)
command = functools.partial(run, "import")


def lines_of(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_as(kind: str, folder: Path, rows: list[dict[str, Any]]) -> str:
    """Writes rows as a file or data set of a kind; returns the source that names it."""
    data = datasets.Dataset.from_list(rows)
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        lines_of(path, rows)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind in ("csv", "tsv"):
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter="," if kind == "csv" else "\t")
            table.writeheader()
            table.writerows(rows)
    elif kind == "parquet":
        data.to_parquet(str(path))
    elif kind == "disk":
        data.save_to_disk(str(path))
    elif kind == "splits":
        datasets.DatasetDict(test=data.select([0]), train=data).save_to_disk(str(path))
    elif kind == "hub":  # the library reads a folder of files like one of the hub
        path.mkdir()
        lines_of(path / "train.jsonl", rows)
        return f"hub:{path}"
    return str(path)


KINDS = ["json", "csv", "tsv", "parquet", "disk", "splits", "hub"]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student") / "model"
    save_student(folder)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def told(problems: list[Any]) -> list[Any]:
    """The problems without the places of their rationales."""
    return [
        (p.question_id, p.prompt, p.answer, [(r.teacher, r.completion) for r in p.rationales])
        for p in problems
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_problems(kind: str, tmp_path: Path) -> None:
    source = write_as(kind, tmp_path, ROWS)
    assert told(load_problems(source)) == told(load_problems(ROWS))
    assert told(load_questions(source)) == told(load_questions(ROWS))
    assert len(load_labelled(source)[1]) == len(ROWS)
    assert content_of_rows(source) == content_of_rows(source)
    out = tmp_path / "out.jsonl"
    assert command(source, "--out", out) == 0
    assert [row["completion"] for row in map(json.loads, out.open())] == [
        row["completion"] for row in ROWS
    ]


@pytest.mark.parametrize("kind", ["json", "csv", "parquet", "hub"])
def test_score_and_its_kept_rows(kind: str, tmp_path: Path, student: Path) -> None:
    """`compact score` gives the same rows as for JSON lines, and keeps the same rationales."""
    kept = {}
    for each in (kind, "jsonl"):
        source, out = write_as(each, tmp_path, ROWS), tmp_path / f"{each}.scores.jsonl"
        more = ["--top", "1", "--kept", tmp_path / f"{each}.kept.jsonl"]
        assert run("score", source, "--model", student, "--out", out, *more) == 0
        kept[each] = told(load_problems(tmp_path / f"{each}.kept.jsonl"))
        kept[each] += [json.loads(line) for line in out.read_text().splitlines()]
    assert kept[kind] == kept["jsonl"]


def test_train_and_evaluate_on_parquet(tmp_path: Path, student: Path) -> None:
    source, out = write_as("parquet", tmp_path, ROWS), tmp_path / "run"
    options = {"model": student, "data": source, "eval_data": source, "output_dir": out}
    options |= {"max_steps": 1, "report_to": "none", "use_cpu": "true", "max_length": 400}
    assert main(["train", *(f"--{key}={value}" for key, value in options.items())]) == 0
    answers = ["--data", source, "--out", out / "e.jsonl", "--max_new_tokens", 4]
    assert run("evaluate", "--model", out, *answers) == 0


MESSAGES = [
    {
        "Question ID": 7,
        "Teacher": teacher,
        "Messages": [
            {"role": "user", "content": "3 + 4?", "reasoning_content": None},
            {"role": "assistant", "content": "The answer is 7", "reasoning_content": thought},
        ],
        "Answer": 7,
    }
    for teacher, thought in (("a", "3 + 4 = 7"), ("b", "4 + 3 = 7"))
]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "disk"])
def test_messages_in_place_of_prompt_and_completion(kind: str, tmp_path: Path) -> None:
    """The last message is the completion; ids and answers are numbers; names in upper case."""
    (problem,) = load_problems(write_as(kind, tmp_path, MESSAGES))
    assert (problem.question_id, problem.answer) == ("7", "7")
    assert problem.prompt == [{"role": "user", "content": "3 + 4?"}]
    assert [r.completion[0]["reasoning_content"] for r in problem.rationales] == [
        "3 + 4 = 7",
        "4 + 3 = 7",
    ]


def test_messages_of_a_question(tmp_path: Path) -> None:
    """They are the prompt, whoever wrote the last but the assistant; rationales need an end."""
    system, user = ({"role": r, "content": r} for r in ("system", "user"))
    said = {"role": "assistant", "content": "The answer is 5"}
    for turns, prompt in (
        ([user], [user]),
        ([system, user], [system, user]),
        ([user, said, user], [user, said, user]),
        ([user, said], [user]),
    ):
        row = {"question_id": "q", "messages": turns, "answer": "5"}
        assert load_questions([row])[0].prompt == prompt
    row = {"question_id": "q", "messages": [system, user], "answer": "5", "teacher": "a"}
    with pytest.raises(ValueError, match="completion must end with a message of role 'assistant'"):
        load_problems([row])


def test_chosen_rows_of_a_file_with_carriage_returns(tmp_path: Path) -> None:
    """Only a line feed ends a line, in what is read and in what is written."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\r\r\n{"a": 2}\r\n{"a": 3}\n')
    assert as_json_lines(path, {2, 3}) == '{"a": 2}\n{"a": 3}\n'
    table = [{"question_id": "q", "day": date(2026, 11, 30)}]
    source = write_as("parquet", tmp_path, table)
    assert json.loads(as_json_lines(source, {1}))["day"] == "2026-11-30"


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_import_keeps_the_reasoning(name: str, tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "3 + 4?"},
        {"role": "assistant", "content": "The answer is 7", name: "3 + 4 = 7"},
    ]
    source = lines_of(tmp_path / "r1.jsonl", [{"messages": turns, "answer": 7}])
    assert command(source, "--out", tmp_path / "out.jsonl") == 0
    (problem,) = load_problems(tmp_path / "out.jsonl")
    (rationale,) = problem.rationales
    assert rationale.completion == [
        {
            "role": "assistant",
            "content": "The answer is 7",
            "reasoning_content": "3 + 4 = 7",
        }
    ]


def test_import_of_trl_rows_and_of_several_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prompt and completion are enough; the n-th rationale of a teacher is that of teacher-n."""
    rows = [
        {"prompt": "3 + 4?", "completion": "It is 7", "teacher": "a", "answer": 7},
        {"prompt": "3 + 4?", "completion": "So 7", "teacher": "a", "answer": 7},
        {"prompt": "3 + 4?", "completion": "So  7 ", "teacher": "a", "answer": 7},
        {"prompt": "5 + 4?", "completion": "It is 9", "teacher": "a", "answer": 9},
        {"prompt": "5 + 4?", "completion": "So 9", "teacher": "b", "answer": 9},
    ]
    source = lines_of(tmp_path / "x.jsonl", rows)
    assert command(source, "--out", tmp_path / "all.jsonl") == 0
    first, second = load_problems(tmp_path / "all.jsonl")
    assert [(r.teacher, r.completion) for r in first.rationales] == [
        ("a-1", "It is 7"),
        ("a-2", "So 7"),
    ]
    assert [r.teacher for r in second.rationales] == ["a-1", "b"]
    assert "rationales left out: 1" in capsys.readouterr().out
    assert command(source, "--samples", 1, "--out", tmp_path / "one.jsonl") == 0
    assert [r.teacher for p in load_problems(tmp_path / "one.jsonl") for r in p.rationales] == [
        "a",
        "a",
        "b",
    ]
    clash = lines_of(tmp_path / "y.jsonl", [rows[0] | {"teacher": "a-1"}])
    with pytest.raises(ValueError, match="sample 1 of teacher 'a' .* another teacher .* 'a-1'"):
        command(source, clash, "--out", tmp_path / "no.jsonl")


def test_rows_of_gsm8k_are_rationales_or_gold_answers(tmp_path: Path) -> None:
    said = "He has 3 + 4 = <<3+4=7>>7.\n#### 7"
    human = lines_of(tmp_path / "human.jsonl", [{"question": "3 + 4?", "answer": said}])
    gold = lines_of(tmp_path / "gold.jsonl", [{"question": "3 + 4?", "answer": "7"}])
    for more in ([], ["--gold", gold]):
        out = tmp_path / f"{len(more)}.jsonl"
        assert command(human, *more, "--out", out) == 0
        (problem,) = load_problems(out)
        assert (problem.answer, problem.rationales[0].completion) == ("7", said)
    with pytest.raises(ValueError, match="at least one completion, got only questions"):
        command(gold, "--out", tmp_path / "no.jsonl")


GOOD = '{"question_id": "q", "prompt": "p", "teacher": "t", "completion": "c", "answer": "1"}'
HEAD = "question_id,prompt,teacher,completion,answer\n"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("x.json", f'[{GOOD}, {{"question_id": "r"}}]', "x.json:1: row 2: field 'prompt' is miss"),
        ("x.json", f"[{GOOD}, {GOOD}]", "x.json:1: row 2: teacher 't' .*at .*x.json:1: row 1"),
        ("x.json", f"[{GOOD},\n3]", "x.json:2: row 2: expected a JSON object, got int"),
        (
            "x.jsonl",
            GOOD + '\n{"question_id": 1, "messages": []}',
            "x.jsonl:2: messages must hold at least two",
        ),
        ("x.json", '[{"messages": []}]', "row 1: field 'question_id' is missing .found: messages."),
        ("x.jsonl", '{"text": "a"}', "x.jsonl:1: .*'question_id' is missing .*`compact import`"),
        ("x.jsonl", '{"a": 1, "A": 2}', "x.jsonl:1: the key 'a' twice, in upper and lower case"),
        ("x.csv", "", "x.csv: expected at least one row, got none"),
        ("x.csv", HEAD, "x.csv: expected at least one row, got none"),
        ("x.csv", HEAD + 'q,"two\nlines",t,c,1\n\nr,p,t\n', "x.csv:5: expected 5 values .* got 3"),
        ("x.csv", HEAD + "q,,t,c,1\n", "x.csv:2: field 'prompt' is null"),
        ("x.csv", HEAD + 'q,"p"p,t,c,1\n', "x.csv:2: expected a row of CSV"),
        ("x.csv", "a,a\n1,2\n", "x.csv:1: expected names of columns, got 'a' twice"),
        ("x.parquet", GOOD, "x.parquet: expected a Parquet file, got "),
    ],
)
def test_bad_rows_are_named(name: str, text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        load_problems(path)


@pytest.mark.parametrize("more", ["@test", ":other"])
def test_bad_splits_and_configurations(more: str, tmp_path: Path) -> None:
    source = write_as("hub", tmp_path, ROWS) + more
    with pytest.raises(ValueError, match=f"{more}: cannot be read as a data set: "):
        load_problems(source)


def test_other_objects_are_refused(tmp_path: Path) -> None:
    frame = datasets.Dataset.from_list(ROWS).to_pandas()
    for source in (frame, iter(ROWS), {"train": ROWS}):
        with pytest.raises(TypeError, match="source must be a path, hub:OWNER/NAME"):
            load_problems(source)
    with pytest.raises(FileNotFoundError, match="org/none: no such file; on the hub: hub:org/none"):
        load_problems("org/none")
    with pytest.raises(IsADirectoryError, match="got a directory without a data set"):
        load_problems(tmp_path)


def test_reasoning_without_content_is_told() -> None:
    message = {"role": "assistant", "content": " ", "reasoning_content": "3 + 4 = 7"}
    row = {"question_id": 1, "prompt": "3 + 4?", "teacher": "t", "completion": [message]}
    with pytest.raises(ValueError, match="completion has reasoning_content, but its 'content' is"):
        load_problems([row])
    del message["reasoning_content"]
    with pytest.raises(ValueError, match="completion must not be empty"):
        load_problems([row])
