"""The router: planted words are found, noise is not believed."""

from __future__ import annotations

import numpy as np
import pytest

from compact.teachers import router as module
from compact.teachers.router import _counts, _scaled, fit_router


def planted(count: int, seed: int) -> tuple[list[str], np.ndarray]:
    """Questions about trains, which teacher 1 serves, and about apples, which teacher 2 serves."""
    draw = np.random.default_rng(seed)
    texts, weights = [], np.zeros((count, 3))
    for i in range(count):
        train = draw.random() < 0.5
        about = "A train leaves at" if train else "Ann buys apples for"
        texts.append(f"{about} {draw.integers(1, 99)}. How much is {draw.integers(1, 99)} more?")
        weights[i, 1 if train else 2] = 1
    return texts, weights


def test_planted_words_are_found() -> None:
    texts, weights = planted(40, seed=1)
    router = fit_router(texts, weights)
    assert router.reads_words and router.expected == 1 and router.single < 0.7
    others, wanted = planted(200, seed=2)
    assert router.choose(others) == wanted.argmax(1).tolist()


def test_words_that_do_not_tell_are_not_read() -> None:
    """In most draws of noise, the best single teacher gets all."""
    read = 0
    for seed in range(10):
        texts, _ = planted(60, seed)
        draw = np.random.default_rng(seed)
        weights = np.eye(3)[draw.choice(3, size=60, p=[0.2, 0.6, 0.2])]
        router = fit_router(texts, weights)
        read += router.reads_words
        if not router.reads_words:
            assert set(router.choose(texts)) == {1} and router.expected == router.single
    assert read <= 3


def test_leave_one_out_is_what_refitting_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PENALTIES", (1.0,))
    texts, weights = planted(12, seed=3)
    weights = weights + np.random.default_rng(0).random(weights.shape)
    router = fit_router(texts, weights)
    features = _scaled(_counts(texts), router.idf)
    found = []
    for i in range(12):
        rest = [j for j in range(12) if j != i]
        x, y = features[rest], weights[rest]
        inner = x - x.mean(0)
        slopes = inner.T @ np.linalg.solve(inner @ inner.T + np.eye(11), y - y.mean(0))
        found.append(weights[i, (y.mean(0) + (features[i] - x.mean(0)) @ slopes).argmax()])
    assert router.reads_words and router.expected == pytest.approx(np.mean(found))


def test_one_question_is_too_few() -> None:
    with pytest.raises(ValueError, match="at least 2 questions, got 1"):
        fit_router(["a"], np.ones((1, 2)))
