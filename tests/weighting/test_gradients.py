"""MGDA and PCGrad on Gram matrices, and the gradients that they read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from compact.data import load_problems
from compact.lab.zoo_student import build_model, build_tokenizer
from compact.passes.encode import encode_problem
from compact.passes.forward import observe
from compact.student import Student
from compact.weighting import make_weigher
from compact.weighting.gradients import gram_matrices, least_norm, pcgrad, surgery
from helpers.trajectories import TEACHERS, rows_of


def gram(*vectors: list[float]) -> torch.Tensor:
    stacked = torch.tensor(vectors)
    return stacked @ stacked.T


def test_two_opposite_gradients_get_equal_weights() -> None:
    assert least_norm(gram([1.0, 0.0], [-1.0, 0.0])).tolist() == [0.5, 0.5]


def test_the_shorter_of_two_aligned_gradients_gets_all() -> None:
    assert least_norm(gram([1.0, 0.0], [3.0, 0.0])).tolist() == pytest.approx([1.0, 0.0])
    assert least_norm(gram([1.0, 0.0], [3.0, 0.0]), 0.75).tolist() == pytest.approx([0.75, 0.25])


def test_equal_gradients_share_their_weight() -> None:
    assert least_norm(gram([1.0, 0.0], [1.0, 0.0], [9.0, 0.0])).tolist() == [0.5, 0.5, 0.0]


def test_gradients_that_are_small_beside_a_large_one_are_not_equal() -> None:
    """Neighbours in a row of small gradients, which the scale of the large one would blur."""
    alpha = least_norm(gram([100.0, 0.0], [0.02, 0.0], [0.1, 0.0], [0.18, 0.0]).double())
    assert alpha.tolist() == pytest.approx([0.0, 1.0, 0.0, 0.0])


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.sampled_from([0.4, 0.6, 1.0]), st.integers(0, 99))
@example(4, 1.0, 94)  # more gradients than dimensions, and a norm that is nearly flat
def test_least_norm_is_not_beaten(size: int, nu: float, seed: int) -> None:
    """No random point of the bounded simplex has a smaller norm."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(size, 3, generator=g, dtype=torch.float64)
    matrix, limit = rows @ rows.T, max(nu, 1.0 / size)
    alpha = least_norm(matrix, limit)
    assert float(alpha.sum()) == pytest.approx(1.0)
    assert float(alpha.min()) >= 0 and float(alpha.max()) <= limit + 1e-9
    others = torch.distributions.Dirichlet(torch.ones(size, dtype=torch.float64)).sample((400,))
    others = others[(others <= limit).all(1)]
    if len(others):
        norms = ((others @ matrix) * others).sum(1)
        assert float(alpha @ matrix @ alpha) <= float(norms.min()) + 1e-9


def test_surgery_equals_projecting_the_vectors() -> None:
    """Against the published procedure on the vectors themselves, in the order of the teachers."""
    g = torch.Generator().manual_seed(1)
    vectors = torch.randn(4, 3, generator=g, dtype=torch.float64)
    want = torch.zeros(3, dtype=torch.float64)
    for k in range(4):
        v = vectors[k].clone()
        for other in range(4):
            if other != k and v @ vectors[other] < 0:
                v -= (v @ vectors[other]) / vectors[other].square().sum() * vectors[other]
        want += v
    c = surgery(vectors @ vectors.T)
    torch.testing.assert_close(c @ vectors, want)
    assert float(c.min()) >= 0
    assert surgery(gram([1.0, 0.0], [0.0, 1.0])).tolist() == [1.0, 1.0]


def test_gram_is_that_of_a_map_before_the_head() -> None:
    """Against autograd through such a map, with the whole logits."""
    tokenizer = build_tokenizer()
    student = Student.of(build_model(tokenizer, 0, hidden=16, layers=1).eval(), tokenizer)
    problems = [
        encode_problem(p, tokenizer, max_length=400) for p in load_problems(rows_of(*TEACHERS))[:2]
    ]
    pass_ = observe(student, problems, leaves=False)
    batch = pass_.batch
    states = pass_.hidden.flatten(0, 1)[batch.rows]
    gradients = []
    for r in range(batch.num_rationales):
        mine = slice(*batch.token_offsets[r : r + 2].tolist())
        identity = torch.eye(16, requires_grad=True)
        logits = student.logits(states[mine] @ identity.T)
        loss = torch.nn.functional.cross_entropy(logits, batch.target[mine])
        gradients.append(torch.autograd.grad(loss, identity)[0].flatten())
    want = [torch.stack(gradients[i : i + 3]) for i in (0, 3)]
    for got, rows in zip(gram_matrices(pass_), want, strict=True):
        torch.testing.assert_close(got, rows @ rows.T, rtol=1e-4, atol=1e-6)
    student.model.train()
    for name in ("mgda", "pcgrad"):
        weigher = make_weigher(name)
        weight = weigher(pass_).weight
        assert weight.view(2, 3).sum(1).tolist() == pytest.approx([1.0, 1.0])
        log = weigher.take_log()
        assert len(log) == 3 and all(-1.001 <= value <= 1.001 for value in log.values())
        assert weigher.take_log() == {}
    for nu in (0, "1"):
        with pytest.raises(ValueError, match="override of mgda: nu must be a number above 0"):
            make_weigher("mgda", nu=nu)


def test_surgery_takes_the_teachers_in_the_order_of_their_names() -> None:
    """The weights do not depend on the order of the rows; `surgery` itself does."""
    matrix = gram([1.0, 0.2], [-0.9, 0.5], [0.3, -1.0])
    order = [2, 0, 1]
    turned = matrix[order][:, order]
    assert not torch.allclose(surgery(turned), surgery(matrix)[order])
    policy = pcgrad()
    weights = policy.alpha(matrix, ["a", "b", "c"])
    torch.testing.assert_close(policy.alpha(turned, ["c", "a", "b"]), weights[order])
    torch.testing.assert_close(weights, surgery(matrix) / surgery(matrix).sum())


def test_the_conflict_matrix_has_one_entry_a_pair() -> None:
    """Also if the teachers stand in another order in each problem."""
    tokenizer = build_tokenizer()
    student = Student.of(build_model(tokenizer, 0, hidden=16, layers=1), tokenizer)
    first, second = load_problems(rows_of("good", "verbose", problems=2))
    other = replace(second, rationales=second.rationales[::-1])
    logs = []
    for pair in ([first, second], [first, other]):
        problems = [encode_problem(p, tokenizer, max_length=400) for p in pair]
        student.model.eval()
        pass_ = observe(student, problems, leaves=False)
        student.model.train()
        weigher = make_weigher("pcgrad")
        weigher(pass_)
        logs.append(weigher.take_log())
    assert list(logs[0]) == ["policy/cosine/good-0 x verbose-1"]
    assert logs[1] == pytest.approx(logs[0], abs=1e-5)
