"""`compact score` as a user meets it: the rows, the guide docs/auditing.md, errors in one line."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import compact.evaluation.score
from compact.commands.cli import main
from compact.evaluation.score import _file_name
from compact.lab.zoo import make_rows
from compact.passes import EncodedProblem
from helpers.toy import save_student

GUIDE = Path(__file__).parents[2] / "docs/auditing.md"
Score = Callable[..., int]


@pytest.fixture
def score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Score:
    """Runs `compact score` on six problems in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    save_student(Path("student"))
    rows = make_rows(("good", "wrong-step", "unrelated"), 6, seed=1)
    Path("rationales.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(*options: str, data: str = "rationales.jsonl") -> int:
        return main(["score", data, "--model", "student", "--out", "scores.jsonl", *options])

    return run


def test_the_guide_filters(score: Score, capsys: pytest.CaptureFixture[str]) -> None:
    """Its program and its command for filtering; the filtered file is scored in its turn."""
    guide = GUIDE.read_text()
    (find,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    (keep,) = re.findall(r"^compact (score .* --keep .*)$", guide, re.MULTILINE)
    assert main(shlex.split(keep.replace("MODEL", "student"))) == 0
    rows = [json.loads(line) for line in Path("scores.jsonl").read_text().splitlines()]
    fields = {
        field
        for line in re.findall(r"^\| (`.*?) \|", guide.split("\n## ")[0], re.MULTILINE)
        for field in re.findall(r"`(\w+)`", line)
    }
    assert fields == rows[0].keys()
    low = {(row["question_id"], row["teacher"]) for row in rows if row["weight"] < 0.5 / 3}
    assert 0 < len(low) < len(rows)
    capsys.readouterr()
    exec(find, {})
    found = re.findall(r"^(\S+) (\S+) 0\.\d\d: ", capsys.readouterr().out, re.MULTILINE)
    assert set(found) == low
    kept = [json.loads(line) for line in Path("kept.jsonl").read_text().splitlines()]
    assert len(kept) == len(rows) - len(low)
    assert not {(row["question_id"], row["teacher"]) for row in kept} & low
    assert score(data="kept.jsonl") == 0


def test_another_metric_for_an_axis(score: Score) -> None:
    """The vote in place of the preset's consensus."""
    metrics = ("consensus=answer", "adaptability=hsic-linear", "difficulty=rsr")
    assert score(*(word for metric in metrics for word in ("--metric", metric))) == 0
    rows = [json.loads(line) for line in Path("scores.jsonl").read_text().splitlines()]
    assert {round(3 * row["consensus"]) / 3 for row in rows} <= {1 / 3, 2 / 3, 1.0}
    assert all(abs(3 * row["consensus"] - round(3 * row["consensus"])) < 1e-5 for row in rows)
    assert all(row["difficulty"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--metric", "consensus"], "--metric must be AXIS=NAME"),
        (["--metric", "consensus=nll"], "metric of consensus must be one of .*, got 'nll'"),
        (["--metric", "vote=answer"], "--metric must be AXIS=NAME"),
        (["--preset", "robst"], "preset must be one of released, paper, robust"),
        (["--preset", "uniform", "--metric", "consensus=answer"], "override of uniform"),
        (["--limit", "0"], "--limit must be a number of at least 1, got 0"),
        (["--max_length", "10"], "prompt has .* leaves no room .* max_length = 10"),
        (["--max_length", "0"], "max_length"),
        (["--graphs", "rationales.jsonl"], "rationales.jsonl"),
    ],
)
def test_errors_are_one_line(
    score: Score, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    """The line names the option; nothing is left behind."""
    assert score(*options) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(f"^compact: error: .*{message}", error), error
    assert not Path("scores.jsonl").exists()


def test_scores_of_other_options_are_refused(
    score: Score, capsys: pytest.CaptureFixture[str]
) -> None:
    """The partial file of another preset is neither used nor deleted."""
    assert score("--limit", "2") == 0
    limited = Path("scores.jsonl").read_text()
    rows = [{"question_id": "x", "rows": []}]
    Path("scores.jsonl.partial").write_text("".join(json.dumps(row) + "\n" for row in rows))
    side = Path("scores.jsonl.partial.summary.json")
    side.write_text(json.dumps({"settings": {"preset": "paper"}}))
    assert score("--limit", "2") == 1
    assert "has rows from other settings (data was None" in capsys.readouterr().err
    assert Path("scores.jsonl").read_text() == limited
    Path("scores.jsonl.partial").unlink()
    assert score("--limit", "2") == 0
    assert not Path("scores.jsonl.partial").exists() and not side.exists()


def test_a_killed_run_of_some_problems_does_not_go_on_with_all(
    score: Score, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a vote is worth is learned from all problems that are scored."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compact.evaluation.score, "_TOKENS_A_PASS", 1)
    observe = compact.evaluation.score.observe
    given = iter([observe, interrupted])
    with monkeypatch.context() as patch:
        patch.setattr(compact.evaluation.score, "observe", lambda *a, **k: next(given)(*a, **k))
        assert score("--limit", "4") == 130
    assert score() == 1
    assert "has rows from other settings (limit was 4, now None)" in capsys.readouterr().err
    assert score("--limit", "4") == 0


def test_a_killed_run_goes_on(score: Score, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted after two problems it scores the other four, and ends as if never stopped."""
    whole = Path("whole.jsonl")
    assert score() == 0
    whole.write_text(Path("scores.jsonl").read_text())
    Path("scores.jsonl").unlink()
    observe, scored = compact.evaluation.score.observe, []

    def counted(student: object, problems: list[EncodedProblem], **settings: Any) -> object:
        if len(scored) == 2:
            raise KeyboardInterrupt
        scored.extend(problems)
        return observe(student, problems, **settings)

    monkeypatch.setattr(compact.evaluation.score, "_TOKENS_A_PASS", 1)  # a problem a pass
    with monkeypatch.context() as patch:
        patch.setattr(compact.evaluation.score, "observe", counted)
        assert score() == 130
    assert not Path("scores.jsonl").exists()
    done = {problem.question_id for problem in scored}

    def rest(student: object, problems: list[EncodedProblem], **settings: Any) -> object:
        assert not done & {problem.question_id for problem in problems}
        return observe(student, problems, **settings)

    monkeypatch.setattr(compact.evaluation.score, "observe", rest)
    assert score() == 0
    lines = Path("scores.jsonl").read_text().splitlines()
    for line, wanted in zip(lines, whole.read_text().splitlines(), strict=True):
        a, b = json.loads(line), json.loads(wanted)
        assert (a["question_id"], a["teacher"]) == (b["question_id"], b["teacher"])
        assert a["weight"] == pytest.approx(b["weight"], abs=1e-4)


def test_kept_scores_that_are_damaged(score: Score, capsys: pytest.CaptureFixture[str]) -> None:
    """The message names file and line."""
    partial = Path("scores.jsonl.partial")

    def interrupted(*_: object, **__: object) -> None:
        partial.write_text(partial.read_text() + "{}\n{}\n")
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compact.evaluation.score, "observe", interrupted)
        assert score() == 130
    assert score() == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "scores.jsonl.partial:1: expected a JSON object with 'question_id', got '{}'" in error


def test_a_long_question_id_gives_a_short_file_name() -> None:
    """A file system allows 255 bytes; names of different questions stay different."""
    long = "q/" + 100 * "\u4e2d"
    one, two = (_file_name(f"{long}{end}") for end in "ab")
    assert one != two and max(len(one), len(two)) <= 200
    assert _file_name("svamp 17/a") == "svamp 17%2Fa"
