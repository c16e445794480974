"""Feature contrast (CKA) and CRSD: what the terms compute, on blobs and on the zoo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compact.data import load_problems
from compact.lab.zoo_student import build_model, build_tokenizer
from compact.passes.encode import encode_problem
from compact.passes.forward import run_pass
from compact.passes.packing import build_batch
from compact.strategies import white_box
from compact.strategies.crsd import Crsd
from compact.strategies.feature_contrast import FeatureContrast, contrast, projection
from compact.student import Student
from helpers.resuming import assert_resumes
from helpers.toy import save_student
from helpers.trajectories import TEACHERS, rows_of, train


def test_contrast_against_the_formula() -> None:
    g = torch.Generator().manual_seed(0)
    f, h = (torch.randn(5, 4, generator=g, dtype=torch.float64) for _ in "ab")
    labels = torch.tensor([0, 1, 0, 2, 0])
    for other in (f, h):
        a, b = (nn.functional.normalize(x, dim=1) for x in (f, other))
        terms = []
        for i in range(5):
            columns = [j for j in range(5) if other is not f or j != i]
            partners = [j for j in columns if labels[j] == labels[i]]
            if partners:
                below = sum(torch.exp(a[i] @ b[j] / 0.5) for j in columns)
                own = [torch.log(torch.exp(a[i] @ b[j] / 0.5) / below) for j in partners]
                terms.append(-sum(own) / len(own))
        want = sum(terms) / len(terms)
        assert float(contrast(f, other, labels, 0.5)) == pytest.approx(float(want), abs=1e-6)
    assert float(contrast(f[:1], f[:1], labels[:1], 0.5)) == 0.0


@pytest.mark.parametrize("width, to", [(12, 5), (5, 12), (4, 4)])
def test_projection_is_orthonormal(width: int, to: int) -> None:
    p = projection(width, to, 0)
    small = p.T @ p if width >= to else p @ p.T
    torch.testing.assert_close(small, torch.eye(min(width, to)), rtol=0, atol=1e-5)
    assert projection(width, to, 0) is p and projection(width, to, 1) is not p


def _mlp(seed: int, classes: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, classes))


def test_contrast_beats_soft_targets_alone_on_blobs() -> None:
    """A student of eight classes over two teachers of four each, from few labelled points."""
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(8, 8, generator=g) * 1.2

    def points(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.randint(0, 8, (count,), generator=g)
        return centres[y] + torch.randn(count, 8, generator=g), y

    x, y = points(2000)
    teachers = []
    for t in range(2):
        own = (y // 4) == t
        model = _mlp(t, 4)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(150):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[own]), y[own] % 4).backward()
            optimizer.step()
        teachers.append(model.eval())
    train_x, train_y = points(160)
    test_x, test_y = points(2000)
    right = []
    for factor in (0.0, 1.0):
        scores = []
        for seed in range(3):
            model = _mlp(10 + seed, 8)
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
            for _ in range(100):
                optimizer.zero_grad()
                features = model[1](model[0](train_x))
                logits = model[2](features)
                loss = torch.zeros(())
                seen = torch.zeros_like(features)
                for t, teacher in enumerate(teachers):
                    own = (train_y // 4) == t
                    soft = teacher(train_x[own]).detach().softmax(1)
                    part = logits[own][:, 4 * t : 4 * t + 4].log_softmax(1)
                    loss = loss - (soft * part).sum(1).mean()
                    state = teacher[1](teacher[0](train_x[own])).detach()
                    seen[own] = state @ projection(32, 32, t)
                if factor:
                    loss = loss + factor * contrast(features, features, train_y, 0.1)
                    loss = loss + factor * contrast(features, seen, train_y, 0.1)
                loss.backward()
                optimizer.step()
            # Each teacher knows its own classes only, so soft targets do not compare across them:
            # the classes are read from the nearest mean feature.
            with torch.no_grad():
                embed = lambda p, m=model: nn.functional.normalize(m[1](m[0](p)), dim=1)  # noqa: E731
                means = torch.stack([embed(train_x)[train_y == c].mean(0) for c in range(8)])
                found = (embed(test_x) @ nn.functional.normalize(means, dim=1).T).argmax(1)
            scores.append(float((found == test_y).float().mean()))
        right.append(sum(scores) / 3)
    assert right[1] > right[0] + 0.01, right


def _pass(student: Student, rows: list[dict[str, str]]) -> Any:
    tokenizer = student.processing_class
    problems = [encode_problem(p, tokenizer, max_length=400) for p in load_problems(rows)]
    batch = build_batch(problems, layout="tree", leaves=False, pad_token_id=student.pad_token_id)
    _, hidden, pass_ = run_pass(student, batch)
    return hidden, pass_


def test_crsd_against_full_logits() -> None:
    """The KL and label terms of one problem, from two plain forwards of the whole model."""
    tokenizer = build_tokenizer()
    student = Student.of(build_model(tokenizer, 0, hidden=32, layers=1).eval(), tokenizer)
    rows = rows_of("good", problems=1)
    hidden, pass_ = _pass(student, rows)
    (problem,) = pass_.batch.problems
    (rationale,) = problem.rationales
    answer = rationale.ids[rationale.marker :]
    logps = []
    for context in (problem.prompt_ids + rationale.ids[: rationale.marker], problem.prompt_ids):
        ids = torch.tensor([[*context, *answer]])
        logits = student.model(input_ids=ids).logits[0, len(context) - 1 : -1]
        logps.append(logits.log_softmax(1))
    read, alone = logps
    kl = (read.exp() * (read - alone)).sum(1).mean()
    label = -alone.gather(1, torch.tensor(answer)[:, None]).mean()
    weight = torch.tensor([0.5])
    for options, want in (({"kl": 1.0, "label": 0.0}, kl), ({"kl": 0.0, "label": 1.0}, label)):
        got = Crsd(**options, nce=0.0).term(hidden, pass_, weight)
        torch.testing.assert_close(got, 0.5 * want, rtol=1e-4, atol=1e-5)
        (gradient,) = torch.autograd.grad(got, student.weight, retain_graph=True)
        assert float(gradient.abs().max()) > 0


def test_crsd_uses_right_rationales_only() -> None:
    tokenizer = build_tokenizer()
    student = Student.of(build_model(tokenizer, 0, hidden=32, layers=1).eval(), tokenizer)
    hidden, pass_ = _pass(student, rows_of("wrong-step", problems=2))
    assert float(Crsd().term(hidden, pass_, torch.ones(2))) == 0.0
    hidden, pass_ = _pass(student, rows_of("good", "verbose", "wrong-step", problems=3))
    strategy = Crsd()
    value = strategy.term(hidden, pass_, torch.full((9,), 1 / 3))
    log = strategy.take_log()
    assert float(value) > 0 and set(log) == {"kl", "answer nll", "nce"} and log["nce"] > 0


@pytest.mark.parametrize("name", ["crsd", "feature-contrast"])
def test_resumes(tmp_path: Path, name: str) -> None:
    options: dict[str, Any] = {}
    if name == "feature-contrast":
        save_student(tmp_path / "teacher")
        options = {"teachers": str(tmp_path / "teacher"), "dtype": "float32"}
    assert_resumes(tmp_path / "runs", strategy=name, strategy_options=options)


def test_each_teacher_may_have_its_own_model(tmp_path: Path) -> None:
    rows = rows_of("good", "verbose")
    save_student(tmp_path / "teacher")
    options: dict[str, Any] = {"teachers": {"good-0": str(tmp_path / "teacher")}}
    settings = {"strategy": "feature-contrast", "strategy_options": options}
    with pytest.raises(ValueError, match="found none for .'verbose-1'."):
        train(tmp_path / "a", rows, **settings)
    options["teachers"]["verbose-1"] = str(tmp_path / "teacher")
    one = train(tmp_path / "b", rows, **settings)
    other = {"teachers": str(tmp_path / "teacher")}
    two = train(tmp_path / "c", rows, **settings | {"strategy_options": other})
    assert torch.equal(one[1], two[1])


def test_a_choice_is_an_answer_to_its_question_alone(tmp_path: Path) -> None:
    """(B), yes and no mean something else in each question; 16 and Rome do not."""
    save_student(tmp_path / "teacher")
    tokenizer = build_tokenizer()
    which = "Which?\n(A) red\n(B) blue"
    asked = [("2 + 2?", "4"), ("3 + 1?", "4"), (which, "(B)"), (which + " Now?", "(B)")]
    asked += [("Is it?", "yes"), ("Is it not?", "yes")]
    row = {"teacher": "a", "completion": "So it is. The answer is 4."}
    problems = load_problems(
        [row | {"question_id": f"q{i}", "prompt": p, "answer": a} for i, (p, a) in enumerate(asked)]
    )
    strategy = FeatureContrast(str(tmp_path / "teacher"), dtype="float32")
    encoded = [encode_problem(p, tokenizer, max_length=400) for p in problems]
    assert strategy.labels(encoded) == [0, 0, 1, 2, 3, 4]  # whether it trains on them or not


def test_each_model_reads_the_rationales_of_its_teachers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The term is that of all rationales read by both models, as written out here."""
    tokenizer = build_tokenizer()
    student = Student.of(build_model(tokenizer, 0, hidden=32, layers=1).eval(), tokenizer)
    rows = rows_of("good", "verbose")
    names = [row["teacher"] for row in rows[:2]]
    for seed, name in enumerate(names):
        build_model(tokenizer, 7 + seed, hidden=16, layers=1).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    options: dict[str, Any] = {"dtype": "float32", "factor": 0.5, "soft": 2.0}
    strategy = FeatureContrast({n: str(tmp_path / n) for n in names}, **options)
    strategy.prepare(load_problems(rows), nn.Identity(), tokenizer)
    hidden, pass_ = _pass(student, rows)
    weight = torch.tensor([0.7, 0.3] * 4)
    read = []
    plain = white_box.teacher_states
    monkeypatch.setattr(
        white_box,
        "teacher_states",
        lambda model, ps: (
            read.append([r.teacher for p in ps for r in p.rationales]) or plain(model, ps)
        ),
    )
    got = strategy.term(hidden, pass_, weight)
    assert read == [[name] * 4 for name in names]

    batch, own = pass_.batch, white_box.completion_states(hidden, pass_)
    models = [strategy.white_boxes.models[name] for name in names]
    states = [plain(model, batch.problems) for model in models]
    kl = torch.stack([white_box.divergence(own, student, states[i], models[i]) for i in range(2)])
    soft = sum(
        weight[r] * kl[r % 2, slice(*batch.token_offsets[r : r + 2].tolist())].mean()
        for r in range(8)
    )
    rationales = [r for p in batch.problems for r in p.rationales]
    at = [int(batch.token_offsets[i]) + r.marker for i, r in enumerate(rationales)]
    p = projection(16, 32, 0)
    seen = torch.stack([states[r % 2][t] @ p for r, t in enumerate(at)])
    labels = torch.tensor(strategy.labels(batch.problems)).repeat_interleave(2)
    mine = own[at]
    want = sum(contrast(mine, other, labels, 0.1) for other in (mine, seen))
    torch.testing.assert_close(got, 2.0 * soft + 0.5 * 4 * want, rtol=1e-5, atol=1e-5)


def test_rationales_without_a_marker_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"teacher": "a", "prompt": "2 + 2?", "answer": "4"}
    texts = ["2 + 2 = 4.", "2 + 2 = 4. The answer is 4.", "So. The answer is 5."]
    problems = load_problems(
        [row | {"question_id": f"q{i}", "completion": text} for i, text in enumerate(texts)]
    )
    save_student(tmp_path / "teacher")
    strategy = FeatureContrast(str(tmp_path / "teacher"), dtype="float32")
    with pytest.raises(ValueError, match="must have an answer marker.*got none among 1 right"):
        strategy.prepare([problems[0], problems[2]], nn.Identity(), build_tokenizer())
    strategy.prepare(problems, nn.Identity(), build_tokenizer())
    assert "1 of 2 right rationales lack an answer marker" in caplog.text


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"strategy": "crsd"}, "must be at least 2 with strategy crsd"),
        (
            {"strategy": "feature-contrast", "strategy_options": {"teachers": "x"}},
            "must be at least 2 with strategy feature-contrast",
        ),
    ],
)
def test_micro_batches_of_one_are_refused(
    tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        train(tmp_path, rows_of(*TEACHERS), **settings, per_device_train_batch_size=1)


def test_bad_options() -> None:
    for options in ({"kl": -1}, {"temperature": 0}, {"rationales": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} of crsd must be .* got"):
            Crsd(**options)  # type: ignore[arg-type]
    for options in ({"factor": -1}, {"soft": "1"}, {"temperature": 0}, {"seed": 0.5}):
        name = next(iter(options))
        with pytest.raises(ValueError, match=f"{name} of feature-contrast must be .* got"):
            FeatureContrast("x", **options)  # type: ignore[arg-type]
    for teachers in (["a", "b"], {"a": 3}):
        with pytest.raises(ValueError, match="teachers of feature-contrast must be a model, or"):
            FeatureContrast(teachers)  # type: ignore[arg-type]
