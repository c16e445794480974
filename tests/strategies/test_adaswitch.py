"""AdaSwitch: the point of the switch, its two limits, the loss, resuming."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compact.config import CompactConfig
from compact.data import load_problems
from compact.lab.zoo_student import build_model, build_tokenizer
from compact.passes import Pass
from compact.passes.encode import encode_problem
from compact.passes.forward import observe, token_states
from compact.passes.segments import segment_mean
from compact.strategies import adaswitch
from compact.strategies.adaswitch import AdaSwitch, switch_point
from compact.student import Student
from compact.student.generation import generate
from compact.weighting.policies import StatefulPolicy
from compact.weighting.weighers import PolicyWeigher
from helpers.resuming import assert_resumes
from helpers.toy import save_student
from helpers.trajectories import TEACHERS, rows_of, train


@pytest.mark.parametrize("planted", [0, 1, 5, 30, 59])
def test_switch_within_two_tokens_of_a_perturbation(planted: int) -> None:
    """Divergences of about 0.1 that grow tenfold at a planted token."""
    g = torch.Generator().manual_seed(planted)
    d = (0.1 * (0.7 + 0.6 * torch.rand(60, generator=g))).tolist()
    d[planted:] = [10 * x for x in d[planted:]]
    found = switch_point(d, 3.0, 16)
    assert found is None if planted == 0 else found is not None and abs(found - planted) <= 2
    assert switch_point(d, math.inf, 16) is None and switch_point(d, 0.0, 16) == 0
    assert switch_point([x * 1e-4 for x in d], 3.0, 16) is None  # rounding


def white_box(strategy: AdaSwitch) -> Student:
    (model,) = strategy.white_boxes.models.values()
    return model


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    folder = tmp_path / "teacher"
    save_student(folder)
    return str(folder)


def _strategy(teacher: str, tokenizer: Any, **options: Any) -> AdaSwitch:
    given = {"max_new_tokens": 12, "temperature": 0.0, "dtype": "float32"} | options
    strategy = AdaSwitch(teacher, **given)
    strategy.prepare(load_problems(rows_of("good")), nn.Identity(), tokenizer)
    return strategy


def test_limits_are_on_policy_and_off_policy(teacher: str) -> None:
    """K = infinity: the student's own text, token by token; K = 0: the teacher's."""
    tokenizer = build_tokenizer()
    student = Student.of(build_model(tokenizer, 3, hidden=32, layers=1).eval(), tokenizer)
    problems = [
        encode_problem(p, tokenizer, max_length=400) for p in load_problems(rows_of("good"))
    ]
    prompts = [p.prompt_ids for p in problems]
    for factor, model in ((math.inf, student), (0.0, None)):
        strategy = _strategy(teacher, tokenizer, factor=factor)
        model = white_box(strategy) if model is None else model
        want = generate(model.model, tokenizer, prompts, 12)
        mixed = strategy.rollout(problems, student)
        end = tokenizer.eos_token_id
        for problem, ids in zip(mixed, want, strict=True):
            (rationale,) = problem.rationales
            assert list(rationale.ids) == (ids if len(ids) == 12 else [*ids, end])
        log = strategy.take_log()
        assert log["switched"] == float(factor == 0.0)


def test_the_prefix_before_the_switch_is_the_students(teacher: str) -> None:
    """With K between, the text is the student's up to the switch and the teacher's after it."""
    tokenizer = build_tokenizer()
    student = Student.of(build_model(tokenizer, 3, hidden=32, layers=1).eval(), tokenizer)
    (problem,) = (
        encode_problem(p, tokenizer, max_length=400)
        for p in load_problems(rows_of("good", problems=1))
    )
    own = generate(student.model, tokenizer, [problem.prompt_ids], 12)[0]
    strategy = _strategy(teacher, tokenizer, factor=1.0, window=4)
    plain = _strategy(teacher, tokenizer, factor=math.inf).rollout([problem], student)
    (at,) = strategy._switches(plain, student)
    assert at is not None
    (mixed,) = strategy.rollout([problem], student)
    ids = mixed.rationales[0].ids
    judgement = mixed.rationales[0].judgement  # an error of the student leaves nothing out
    assert judgement is not None and judgement.validity == 1.0
    assert list(ids[:at]) == own[:at]
    begun = (*problem.prompt_ids, *own[:at])
    rest = generate(white_box(strategy).model, tokenizer, [begun], 12)[0]
    assert list(ids[at : at + 4]) == rest[:4]


def _several(folder: Path) -> dict[str, str]:
    """Three different models, one for each teacher of the data."""
    tokenizer = build_tokenizer()
    names = [row["teacher"] for row in rows_of(*TEACHERS, problems=1)]
    for seed, name in enumerate(names):
        build_model(tokenizer, 10 + seed, hidden=16, layers=1).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: str(folder / name) for name in names}


class _Planted(StatefulPolicy):
    """Weights that are given."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def scores(self, pass_: Pass) -> dict[str, torch.Tensor]:
        return {}

    def weigh(self, scores: Any, pass_: Pass) -> torch.Tensor:
        return self.weight


@pytest.mark.parametrize("planted", [[1, 2, 0, 1], None])
def test_the_teacher_of_greatest_weight_takes_over(
    tmp_path: Path, planted: list[int] | None
) -> None:
    """K = 0: each text is wholly that of its teacher; of equal weights the likeliest is chosen."""
    tokenizer = build_tokenizer()
    student = Student.of(build_model(tokenizer, 3, hidden=32, layers=1).eval(), tokenizer)
    given = load_problems(rows_of(*TEACHERS))
    problems = [encode_problem(p, tokenizer, max_length=400) for p in given]
    strategy = AdaSwitch(
        _several(tmp_path), 0.0, max_new_tokens=12, temperature=0.0, dtype="float32"
    )
    if planted is None:
        policy = _Planted(torch.full((12,), 1 / 3))
        pass_ = observe(student, problems, leaves=False)
        nll = segment_mean(pass_.stats.nll, pass_.batch.token_offsets).view(4, 3)
        want = nll.argmin(1).tolist()
    else:
        want = planted
        policy = _Planted(nn.functional.one_hot(torch.tensor(want), 3).flatten() * 0.4 + 0.2)
    args = CompactConfig(output_dir=str(tmp_path), use_cpu=True, max_length=400)
    strategy.check(PolicyWeigher("planted", policy), args)
    strategy.prepare(given, nn.Identity(), tokenizer)
    mixed = strategy.rollout(problems, student)
    names = list(strategy.white_boxes.models)
    for problem, k in zip(mixed, want, strict=True):
        (rationale,) = problem.rationales
        assert rationale.teacher == names[k]
        model = strategy.white_boxes.models[names[k]].model
        (ids,) = generate(model, tokenizer, [problem.prompt_ids], 12)
        assert list(rationale.ids[:11]) == [*ids, tokenizer.eos_token_id][:11]
    log = strategy.take_log()
    assert log["switched"] == 1
    for k, name in enumerate(names):
        assert log[f"questions/{name}"] == want.count(k) / 4


def test_a_text_ends_as_the_chat_template_ends_it(
    teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base model's end of text is another token than the end of turn that it learns."""
    tokenizer = build_tokenizer()
    strategy = _strategy(teacher, tokenizer)
    student = white_box(strategy)
    own = student.tokenizer
    own.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    own.chat_template = "{% for m in messages %}{{ m.content + '<turn>' }}{% endfor %}"
    monkeypatch.setattr(adaswitch, "generate_in_room", lambda *_, **__: [[5, 6]])
    (ids,) = strategy._written(student, [(3, 4)], [0], [12])
    assert ids == [5, 6, own.convert_tokens_to_ids("<turn>")]


def test_each_text_is_compared_with_its_own_teacher(tmp_path: Path) -> None:
    """The divergences of several teachers are those of each alone, in data order."""
    tokenizer = build_tokenizer()
    student = Student.of(build_model(tokenizer, 3, hidden=32, layers=1).eval(), tokenizer)
    given = load_problems(rows_of(*TEACHERS))
    problems = [encode_problem(p, tokenizer, max_length=400) for p in given]
    models = _several(tmp_path)
    found, batch = {}, observe(student, problems, leaves=False).batch
    own = token_states(student, batch).detach()
    for teachers in (models, *models.values()):
        strategy = AdaSwitch(teachers, dtype="float32")
        strategy.prepare(given, nn.Identity(), tokenizer)
        each = strategy.divergences(own, problems, student)
        found[str(teachers)] = each.split(batch.token_offsets.diff().tolist())
    together, *alone = found.values()
    for r, part in enumerate(together):
        torch.testing.assert_close(part, alone[r % 3][r], rtol=1e-5, atol=1e-7)
        assert not torch.allclose(part, alone[(r + 1) % 3][r], rtol=1e-2)


def test_a_text_has_at_most_max_new_tokens(teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Student's and teacher's part together, whatever the other prompts of the micro-batch."""
    tokenizer = build_tokenizer()
    student = Student.of(build_model(tokenizer, 3, hidden=32, layers=1).eval(), tokenizer)
    given = load_problems(rows_of("good", problems=2))
    problems = [encode_problem(p, tokenizer, max_length=400) for p in given]
    longer = replace(problems[1], prompt_ids=problems[1].prompt_ids * 2)
    monkeypatch.setattr(adaswitch, "switch_point", lambda d, *_: len(d) - 1)
    strategy = _strategy(teacher, tokenizer, max_new_tokens=12)
    strategy.max_length = len(longer.prompt_ids) + 5
    strategy.max_length = max(strategy.max_length, len(problems[0].prompt_ids) + 12)
    alone = strategy.rollout([problems[0]], student)
    mixed = strategy.rollout([problems[0], longer], student)
    assert mixed[0] == alone[0] and len(mixed[0].rationales[0].ids) == 12
    assert len(longer.prompt_ids) + len(mixed[1].rationales[0].ids) <= strategy.max_length


@pytest.mark.parametrize("wanted", ["auto", "padded"])
def test_the_teachers_are_chosen_in_the_layout_of_the_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    tokenizer = build_tokenizer()
    student = Student.of(build_model(tokenizer, 3, hidden=32, layers=1).eval(), tokenizer)
    given = load_problems(rows_of(*TEACHERS))
    problems = [encode_problem(p, tokenizer, max_length=400) for p in given]
    strategy = AdaSwitch(_several(tmp_path), dtype="float32")
    args = CompactConfig(output_dir=str(tmp_path), use_cpu=True, max_length=400, layout=wanted)
    strategy.check(PolicyWeigher("even", _Planted(torch.full((12,), 1 / 3))), args)
    layouts = []
    plain = adaswitch.observe
    monkeypatch.setattr(
        adaswitch, "observe", lambda *a, **k: layouts.append(k["layout"]) or plain(*a, **k)
    )
    with torch.autocast("cpu", torch.bfloat16):
        strategy._chosen(problems, student)
    assert layouts == ["tree" if wanted == "auto" else "padded"]


def test_a_preset_may_read_option_leaves(tmp_path: Path) -> None:
    """The written text has none; the leaf after the bare question stands for it."""
    models = _several(tmp_path)
    prompt = "Ann has {} beads and gets {}. How many?\n(A) {}\n(B) {}\n(C) 3"
    rows = [
        {
            "question_id": f"q{i}",
            "prompt": prompt.format(i + 2, i, 2 * i + 2, i),
            "teacher": name,
            "completion": "So many beads. The answer is (A)",
            "answer": "(A)",
        }
        for i in range(4)
        for name in models
    ]
    losses, _ = train(
        tmp_path / "run",
        rows,
        preset="robust",
        overrides={"consensus": "posterior-consensus"},
        strategy="adaswitch",
        strategy_options={"teachers": models, "max_new_tokens": 4, "dtype": "float32"},
    )
    assert all(map(math.isfinite, losses))


@pytest.mark.parametrize("preset", ["uniform", "robust"])
def test_resumes_with_several_teachers(tmp_path: Path, preset: str) -> None:
    options = {"teachers": _several(tmp_path), "max_new_tokens": 6, "dtype": "float32"}
    assert_resumes(tmp_path / "runs", preset=preset, strategy="adaswitch", strategy_options=options)


def test_resumes(tmp_path: Path, teacher: str) -> None:
    options = {"teachers": teacher, "max_new_tokens": 6, "dtype": "float32"}
    assert_resumes(tmp_path / "runs", strategy="adaswitch", strategy_options=options)


def test_refused(tmp_path: Path, teacher: str) -> None:
    for teachers, words in (
        (teacher, "preset must be uniform with strategy adaswitch and one white-box teacher"),
        ({"good-0": teacher}, r"teachers of adaswitch must .* found none for \['verbose-1'"),
    ):
        with pytest.raises(ValueError, match=words):
            train(
                tmp_path,
                rows_of(*TEACHERS),
                preset="robust",
                strategy="adaswitch",
                strategy_options={"teachers": teachers},
            )
    for options in (
        *({"kind": "l2"}, {"factor": -1}, {"factor": "x"}, {"window": 0}, {"window": 2.5}),
        *({"temperature": -1}, {"max_new_tokens": 0}, {"max_new_tokens": 8.0}),
        *({"teachers": ["a", "b"]}, {"teachers": {"a": 3}}, {"teachers": 3}),
    ):
        with pytest.raises(ValueError, match=f"{next(iter(options))} of adaswitch must be .*got"):
            AdaSwitch(**{"teachers": teacher} | options)  # type: ignore[arg-type]
