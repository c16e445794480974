"""Bad input: one clear line and a non-zero exit, no traceback; or its defined result."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader, Dataset

import compact
from compact.commands.cli import COMMANDS, main, one_line
from compact.commands.recipe import read_settings
from compact.data import load_problems
from compact.lab import zoo
from compact.lab.zoo_student import build_model, build_tokenizer
from compact.passes.encode import encode_problem
from helpers.commands import fails


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny student on disk."""
    folder = tmp_path_factory.mktemp("student")
    tokenizer = build_tokenizer()
    build_model(tokenizer, seed=0, layers=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three problems of two teachers."""
    path = tmp_path / "data.jsonl"
    rows = zoo.make_rows(("good", "verbose"), 3, seed=1)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "change,words",
    [
        ({"model": "no/such/folder.gguf"}, ["no/such/folder.gguf", "no such file"]),
        ({"data": "no-such.jsonl"}, ["no-such.jsonl"]),
        ({"learning_rte": "1e-4"}, ["learning_rte", "did you mean", "learning_rate"]),
        ({"max_length": "long"}, ["max_length", "whole number", "long"]),
        ({"preset": "best"}, ["best", "robust", "uniform"]),
        ({"preset": "single:nobody"}, ["nobody", "good", "verbose"]),
        ({"layout": "loose"}, ["layout", "auto", "tree", "padded", "loose"]),
        ({"max_length": "4"}, ["question_id", "max_length = 4"]),
        ({"per_device_train_batch_size": "0"}, ["per_device_train_batch_size", "at least 1"]),
        ({"gradient_accumulation_steps": "0"}, ["gradient_accumulation_steps", "at least 1"]),
        ({"num_train_epochs": "0"}, ["num_train_epochs", "above 0"]),
        ({"max_problems": "0"}, ["max_problems", "at least 1"]),
        ({"dtype": "float31"}, ["dtype", "bfloat16", "float31"]),
        ({"lora_target_modules": "nope"}, ["nope"]),
        ({"overrides": "{taw: 1}"}, ["taw", "tau"]),
        ({"overrides": "{tau: 0}"}, ["override of robust", "tau must be a number", "got 0"]),
        ({"overrides": "{tau: "}, ["overrides must be a mapping", "{tau:"]),
        ({"report_to": "wandb"}, ["wandb", "pip install"]),
        ({"resume_from_checkpoint": "true"}, ["no undamaged checkpoint"]),
        ({"resume_from_checkpoint": "no/such"}, ["no/such", "manifest.json"]),
        ({"output_dir": "/dev/null/run"}, ["/dev/null/run", "Not a directory"]),
        ({"num_processes": "0"}, ["--num_processes must be a number of at least 1, got 0"]),
        (
            {"accelerate_config": "fsdp7"},
            ["ddp", "fsdp2", "deepspeed-zero2", "deepspeed-zero3", "fsdp7"],
        ),
    ],
)
def test_train(
    capsys: pytest.CaptureFixture[str],
    student: Path,
    data: Path,
    tmp_path: Path,
    change: dict[str, str],
    words: list[str],
) -> None:
    """Wrong path, key, type, preset, teacher, and a prompt longer than max_length."""
    settings = {"model": student, "data": data, "output_dir": tmp_path / "run"}
    settings |= {"report_to": "none"} | change
    argv = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    line = fails(capsys, "train", "--use_cpu", *argv)
    assert all(word in line for word in words), line


def test_yaml_key_is_named_by_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, data: Path
) -> None:
    """A recipe's unknown key: file and line."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"data: {data}\n\nnum_epochs: 3\n")
    assert f"{recipe}:3: unknown key 'num_epochs'" in fails(
        capsys, "train", "--config", str(recipe)
    )
    recipe.write_text(f"data: {data}\narms: [uniform]\n")
    assert f"{recipe}:2: unknown key 'arms', which only `compact compare` takes" in fails(
        capsys, "train", "--config", str(recipe)
    )


def test_names_that_look_like_numbers(tmp_path: Path) -> None:
    """YAML reads 010 as 8 and 12:30 as 750; of a name, and of a date, the text counts."""
    recipe = tmp_path / "recipe.yaml"
    for text, number in (("010", 8), ("1.10", 1.1), ("12:30", 750), ("2026-11-30", None)):
        recipe.write_text(f"output_dir: {text}\n")
        for given in ((recipe, []), (None, ["--output_dir", text])):
            assert read_settings(*given)[1].output_dir == text
        if isinstance(number, int):
            assert read_settings(None, ["--max_steps", text])[1].max_steps == number


@pytest.mark.parametrize(
    ("text", "number"), [("+5", 5), ("-1", -1), ("1_024", 1024), ("0x10", 16), ("+0b11", 3)]
)
def test_whole_numbers_as_yaml_writes_them(tmp_path: Path, text: str, number: int) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"max_steps: {text}\n")
    for given in ((recipe, []), (None, ["--max_steps", text])):
        assert read_settings(*given)[1].max_steps == number
    for text in ("long", "1.5", "true", "[", "+"):
        with pytest.raises(ValueError, match="max_steps must be a whole number, got"):
            read_settings(None, ["--max_steps", text])
    recipe.write_text("learning_rate: 1.0e-4\nweight_decay: 0.10\n")
    config = read_settings(recipe, [])[1]
    assert (config.learning_rate, config.weight_decay) == (1e-4, 0.1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "zoo-b", "--out", "o", "--limit", "3"], "--limit must be used with a file"),
        (
            ["compare", "x.jsonl", "--config", "r", "--out", "o", "--epochs", "2"],
            "--epochs must be used with zoo-a or zoo-b, got DATA x.jsonl",
        ),
        (
            ["evaluate", "--model", "m", "--data", "d", "--out", "o", "--base", "b"],
            "--base must be used with --retained or --retained_task",
        ),
        (
            ["collect", "q", "--teachers", "t", "--out", "o", "--preset", "nll"],
            "--preset must be used with --route",
        ),
    ],
)
def test_an_option_that_would_do_nothing(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert message in fails(capsys, *words)


GOOD: dict[str, Any] = {
    "question_id": "q",
    "prompt": "1 + 1?",
    "teacher": "t",
    "completion": "2. The answer is 2",
    "answer": "2",
}


@pytest.mark.parametrize(
    "lines,where",
    [
        ([], ""),
        ([json.dumps({k: v for k, v in GOOD.items() if k != "teacher"})], ":1"),
        ([json.dumps(GOOD), json.dumps(GOOD | {"teacher": "u", "answer": float("nan")})], ":2"),
        ([json.dumps(GOOD), "{not json"], ":2"),
        ([json.dumps(GOOD), json.dumps(GOOD)], ":2"),
        ([json.dumps(GOOD), json.dumps(GOOD | {"teacher": "u", "answer": "3"})], ":2"),
        ([json.dumps(GOOD | {"completion": 7})], ":1"),
    ],
    ids=["empty", "missing field", "NaN", "not JSON", "twice", "two answers", "wrong type"],
)
def test_rows_are_named_by_file_and_line(tmp_path: Path, lines: list[str], where: str) -> None:
    """Every bad row of a data file."""
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    with pytest.raises((ValueError, TypeError)) as error:
        load_problems(path)
    assert str(error.value).startswith(f"{path}{where}")


def test_a_teacher_may_miss_problems_and_one_teacher_is_enough() -> None:
    """K differs from problem to problem, down to 1."""
    rows = zoo.make_rows(("good", "verbose"), 3, seed=2)
    problems = load_problems(
        [r for r in rows if not (r["teacher"] == "good" and "1" in r["question_id"][-1])]
    )
    assert sorted(len(p.rationales) for p in problems) == [1, 2, 2]
    encoded = encode_problem(problems[1], build_tokenizer(), max_length=400)
    assert len(encoded.rationales) == len(problems[1].rationales)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen_and_shows_an_example(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """At most 50 lines of at most 100 characters, with an example to copy."""
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 50
    assert max(map(len, text.splitlines())) <= 100
    assert f"compact {command}" in text.partition("example")[2], text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """That of the package that is installed."""
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"compact {version('compact-distill')}\n"
    assert version("compact-distill") == compact.__version__


def test_environment(capsys: pytest.CaptureFixture[str]) -> None:
    """`compact env` says what runs."""
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert "torch" in text and "native" in text


def test_doctor(capsys: pytest.CaptureFixture[str], student: Path) -> None:
    """`compact doctor` names layout, head mode and what each metric costs."""
    assert main(["doctor", str(student), "--max_length", "200"]) == 0
    text = capsys.readouterr().out
    assert "layout        tree" in text and "head: frozen, 2 matrix products" in text
    assert "probe-released (padded rows)" in text and "gain (answer leaves" in text
    assert "--tokens must be a number of at least 1, got 0" in fails(
        capsys, "doctor", str(student), "--tokens", "0"
    )


class _Refusing(Dataset[int]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        raise ValueError("question_id 'q1': the prompt leaves no room")


def test_an_error_of_a_worker_process_is_its_message() -> None:
    """torch puts the traceback of the worker before it, which would fill the line."""
    with pytest.raises(ValueError, match="Caught ValueError in DataLoader worker") as found:
        list(DataLoader(_Refusing(), num_workers=1))
    assert one_line(found.value) == "question_id 'q1': the prompt leaves no room"
