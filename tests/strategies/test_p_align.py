"""P-ALIGN: planted prefixes, a judge that is not monotone, rows that are kept and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compact.data import load_problems
from compact.lab.zoo_student import build_model, build_tokenizer
from compact.passes import EncodedProblem
from compact.passes.encode import encode_problem
from compact.passes.forward import observe
from compact.strategies import p_align
from compact.strategies.p_align import PrefixAlign, levels_of, shortest_prefix
from compact.student import Student
from compact.teachers.tasks import Work, work_off
from helpers.resuming import assert_resumes
from helpers.trajectories import TEACHERS, rows_of, train


def worked_off(work: Work[Any]) -> Any:
    return work_off({"it": work}, lambda prompts: [])["it"]


@given(st.integers(0, 20), st.integers(1, 20), st.booleans())
def test_planted_prefix_is_found(planted: int, steps: int, every: bool) -> None:
    """A judge that says yes from `planted` steps on, in log2 n questions."""
    asked: list[int] = []

    def judge(count: int) -> Work[bool]:
        asked.append(count)
        yield from ()
        return count >= planted

    found, monotone = worked_off(shortest_prefix(judge, steps, every=every))
    assert found == (planted if planted <= steps else None) and monotone
    assert len(asked) == len(set(asked)) <= (steps + 1 if every else steps.bit_length() + 2)


def test_judge_that_is_not_monotone_is_reported() -> None:
    def judge(count: int) -> Work[bool]:
        yield from ()
        return [False, True, False, True][count]

    assert worked_off(shortest_prefix(judge, 3, every=True)) == (1, False)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The student's continuations are right in the second sample only; the prompts it was given."""
    prompts: list[list[int]] = []

    def generate(model: Any, tokenizer: Any, given: Any, *_: Any, **__: Any) -> list[list[int]]:
        prompts.extend(map(list, given))
        texts = ["\nThe answer is 99", *["\nThe answer is " + str(ANSWER[0])] * (len(given) - 1)]
        return [tokenizer(text)["input_ids"] for text in texts]

    monkeypatch.setattr(p_align, "generate_in_room", generate)
    return prompts


ANSWER = [0]


def test_levels_give_the_prefix(monkeypatch: pytest.MonkeyPatch, scripted: list[list[int]]) -> None:
    """Levels planted to pass after the second step: two steps and the student's right end."""
    (problem,) = load_problems(rows_of("good", "verbose", problems=1))
    ANSWER[0] = int(problem.answer)
    tokenizer = build_tokenizer()
    student = Student.of(build_model(tokenizer, 0, hidden=16, layers=1).eval(), tokenizer)
    planted = [[-9.0, -9.0, -0.1, -0.1, -0.1, -0.1], [-9.0, -0.1, -9.0, -0.1, -0.1, -0.1]]

    def levels(_: Any, encoded: Any, __: Any) -> list[list[float]]:
        return [own[: len(r.steps) + 1] for own, r in zip(planted, encoded.rationales, strict=True)]

    monkeypatch.setattr(PrefixAlign, "_levels", levels)
    texts, counts = PrefixAlign().built([problem], student)[problem.question_id]
    encoded = encode_problem(problem, tokenizer, max_length=400)
    prefixes = [
        tokenizer.decode(r.ids[: r.steps[steps - 1][1]])
        for r, steps in zip(encoded.rationales, (2, 1), strict=True)
    ]
    assert texts == [f"{prefix}\nThe answer is {problem.answer}" for prefix in prefixes]
    assert counts["not monotone"] == 1 and counts["prefixes kept"] == 2
    ANSWER[0] = 98  # never right: the original stays
    texts, counts = PrefixAlign().built([problem], student)[problem.question_id]
    assert texts == [None, None] and counts["prefixes kept"] == counts["steps"] == 0


def test_the_log_has_the_share_of_steps_kept(
    tmp_path: Path, scripted: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of the first rationale of each question are enough; the other has no prefix."""

    def levels(_: Any, encoded: Any, __: Any) -> list[list[float]]:
        first, other = (len(r.steps) for r in encoded.rationales)
        return [[-9.0, -9.0, *[-0.1] * (first - 1)], [-9.0] * (other + 1)]

    monkeypatch.setattr(PrefixAlign, "_levels", levels)
    monkeypatch.setattr(p_align, "reads_gold", lambda _: lambda text: text)
    rows = rows_of("good", "verbose")
    train(tmp_path, rows, strategy="p-align")
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"][0]
    steps = [
        len(encode_problem(p, build_tokenizer(), max_length=400).rationales[0].steps)
        for p in load_problems(rows)
    ]
    assert log["strategy/share of steps kept"] == pytest.approx(2 * len(steps) / sum(steps))
    assert log["strategy/prefixes kept"] == len(steps) and "strategy/steps" not in log


def test_levels_of_padded_rows_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """They equal those of a tree, and no forward has more tokens than the most."""
    tokenizer = build_tokenizer()
    student = Student.of(build_model(tokenizer, 0, hidden=16, layers=1).eval(), tokenizer)
    (problem,) = (
        encode_problem(p, tokenizer, max_length=400, leaf_budget=float("inf"))
        for p in load_problems(rows_of(*TEACHERS, problems=1))
    )
    rows: list[int] = []

    def counted(student: Student, problems: Any, **options: Any) -> Any:
        pass_ = observe(student, problems, **options)
        rows.append(pass_.batch.main.input_ids.numel())
        if pass_.batch.leaves is not None:
            rows[-1] = pass_.batch.leaves.input_ids.numel()
        return pass_

    monkeypatch.setattr(p_align, "observe", counted)
    tree = levels_of(problem, student, "tree")
    assert len(rows) == 1 and [len(own) for own in tree] == [
        len(r.steps) + 1 for r in problem.rationales
    ]
    longest = len(problem.prompt_ids) + max(len(r.ids) for r in problem.rationales)
    monkeypatch.setattr(p_align, "_MOST_TOKENS", 2 * longest)
    rows.clear()
    padded = levels_of(problem, student, "padded")
    leaf = len(problem.spaced_cue_ids) + len(problem.gold_ids)
    # Besides the leaves of two steps, each forward asks after the bare question.
    assert len(rows) > len(problem.rationales) and max(rows) <= 4 * (longest + leaf)
    for ours, theirs in zip(padded, tree, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("asked, found", [("auto", "tree"), ("padded", "padded")])
def test_the_layout_is_chosen_once(monkeypatch: pytest.MonkeyPatch, asked: str, found: str) -> None:
    tokenizer = build_tokenizer()
    student = Student.of(build_model(tokenizer, 0, hidden=16, layers=1).eval(), tokenizer)
    layouts: list[str] = []

    def levels(encoded: EncodedProblem, _: Any, layout: str) -> list[list[float]]:
        layouts.append(layout)
        return [[-9.0] * (len(r.steps) + 1) for r in encoded.rationales]

    monkeypatch.setattr(p_align, "levels_of", levels)
    chosen: list[str] = []
    choose = p_align.choose_layout
    monkeypatch.setattr(
        p_align, "choose_layout", lambda *args: (chosen.append(args[1]), choose(*args))[1]
    )
    strategy = PrefixAlign()
    strategy._asked_layout = asked
    strategy.built(load_problems(rows_of("good", problems=3)), student)
    assert layouts == [found] * 3 and chosen == [asked]


@pytest.mark.parametrize("judge", ["leaves", "reaches", "asked"])
def test_a_run_keeps_its_rows(tmp_path: Path, judge: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is started again reads the rows of the first; other settings are refused."""

    def again(**changed: Any) -> tuple[list[float], torch.Tensor]:
        """Trains where a first run was killed before its first checkpoint."""
        (tmp_path / "run.json").unlink()
        return train(tmp_path, rows_of(*TEACHERS, problems=2), **settings, **changed)

    options = {"judge": judge, "samples": 2, "max_new_tokens": 4, "level": 1e-9}
    settings = {"strategy": "p-align", "strategy_options": options}
    one = train(tmp_path, rows_of(*TEACHERS, problems=2), **settings)
    rows = [json.loads(line) for line in (tmp_path / "p-align.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and rows[0]["counts"]["rationales"] == 3
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert log[0]["strategy/rationales"] == 6 and "strategy/rationales" not in log[1]
    monkeypatch.setattr(PrefixAlign, "build", None)  # it would fail if it were called
    assert torch.equal(one[1], again()[1])
    with pytest.raises(ValueError, match="rows from other settings"):
        again(seed=4)


def test_resumes(tmp_path: Path) -> None:
    options = {"samples": 1, "max_new_tokens": 3}
    assert_resumes(tmp_path, strategy="p-align", strategy_options=options)


@pytest.mark.parametrize(
    "options",
    [
        {"judge": "me"},
        {"search": "x"},
        {"level": 0},
        {"level": "high"},
        {"samples": 0},
        {"samples": 2.5},
        {"samples": "4"},
        {"temperature": -1},
        {"max_new_tokens": 0},
        {"budget": "5", "writer": "x.yaml:y"},
    ],
)
def test_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} of p-align must be .* got"):
        PrefixAlign(**options)
