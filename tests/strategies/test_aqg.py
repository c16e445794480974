"""AQG: every answer is that of the solved graph, and planted misconceptions are wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random

import pytest

from compact.commands.cli import main
from compact.data import Problem
from compact.strategies.aqg import (
    KINDS,
    MISCONCEPTION,
    TEACHER,
    QuestionGraphs,
    make_graph,
    make_problems,
)
from compact.text.equations import equations
from helpers.toy import save_student
from helpers.trajectories import TEACHERS, rows_of, train


@pytest.mark.parametrize("leaves, steps", [(2, 2), (3, 3), (4, 4)])
def test_answers_are_those_of_the_equations(leaves: int, steps: int) -> None:
    """Every equation of the right rationale holds and the last one gives the answer."""
    problems = make_problems(40, 1, KINDS, leaves, steps)
    assert len({p.question_id for p in problems}) == 40
    for problem in problems:
        right = str(problem.rationales[0].completion)
        found = re.findall(r"(\d+) ([-+*/]) (\d+) = (-?\d+)", right)
        for a, sign, b, result in found:
            assert eval(f"{a} {sign} {b}") == int(result)
        assert found[-1][3] == problem.answer
        assert problem.domain.matches(problem.domain.extract(right), problem.answer)


def test_misconceptions_are_found_by_their_answer() -> None:
    """A quarter of the questions have a wrong rationale; its arithmetic holds, its answer not."""
    problems = make_problems(80, 2, KINDS, 3, 3)
    wrong = [
        (p, str(r.completion)) for p in problems for r in p.rationales if r.teacher == MISCONCEPTION
    ]
    assert len(wrong) == 20
    for problem, text in wrong:
        assert equations(text)
        assert not problem.domain.matches(problem.domain.extract(text), problem.answer)


def _rows(problems: list[Problem], *, gold: bool) -> str:
    rows = [
        {"question_id": p.question_id, "prompt": p.prompt, "teacher": r.teacher}
        | {"completion": r.completion}
        | ({"answer": p.answer} if gold else {})
        for p in problems
        for r in p.rationales
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_compact_score_finds_planted_misconceptions(tmp_path: Path) -> None:
    """With gold answers all of them; without, none: a misconception's arithmetic holds.

    The student is untrained: it is the texts that tell.
    """
    save_student(tmp_path / "student")
    problems = make_problems(20, 2, ["misconception"], 3, 3)
    found = {}
    for gold in (True, False):
        data, out = tmp_path / f"{gold}.jsonl", tmp_path / f"{gold}.scores.jsonl"
        data.write_text(_rows(problems, gold=gold))
        command = ["score", str(data), "--model", str(tmp_path / "student"), "--out", str(out)]
        assert main(command) == 0
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        weight = {(row["question_id"], row["teacher"]): row["weight"] for row in rows}
        found[gold] = sum(
            weight[p.question_id, MISCONCEPTION] < 0.1 and weight[p.question_id, TEACHER] > 0.9
            for p in problems
        )
        wrong = [row for row in rows if row["teacher"] == MISCONCEPTION]
        assert not gold or all(row["findings"] for row in wrong)
    assert found == {True: 20, False: 0}


def test_graphs_are_solved_from_their_leaves() -> None:
    for seed in range(50):
        graph = make_graph(Random(seed), 3, 4)
        assert graph.solve({n: graph.values[n] for n in graph.leaves}) == graph.values


def test_questions_join_the_training_problems(tmp_path: Path) -> None:
    strategy = QuestionGraphs(count=8)
    assert len(strategy.prepare([], None, None)) == 8  # type: ignore[arg-type]
    log = strategy.take_log()
    assert log["questions"] == 8 and log["kinds/backward"] == 2 and strategy.take_log() == {}
    options = {"strategy": "aqg", "strategy_options": {"count": 2}}
    with pytest.raises(ValueError, match="preset must not be single:good-0 with strategy aqg"):
        train(tmp_path, rows_of(*TEACHERS), **options, preset="single:good-0")


@pytest.mark.parametrize(
    "options",
    [
        {"count": 0},
        {"leaves": 1},
        {"steps": 9},
        {"steps": 1},
        {"kinds": ["odd"]},
        {"kinds": []},
        {"kinds": 3},
    ],
)
def test_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} of aqg must be .*got"):
        QuestionGraphs(**options)  # type: ignore[arg-type]
