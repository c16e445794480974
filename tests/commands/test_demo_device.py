"""`compact demo` up to its training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compact.commands import demo


def test_it_trains_on_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also on a machine with a GPU, where the CUDA kernels may not be built."""
    seen: list[Any] = []

    def trainer(_model: object, config: Any, **_: object) -> None:
        seen.append(config)
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "smollm2_path", lambda: tmp_path / "student.gguf")
    monkeypatch.setattr(demo, "load_student", lambda _: (None, None))
    monkeypatch.setattr(demo, "encode_problem", lambda *_, **__: None)
    monkeypatch.setattr(demo.Student, "of", lambda *_: None)
    monkeypatch.setattr(demo, "gold_logp", lambda *_: (0.0, 0.0))
    monkeypatch.setattr(demo, "CompactTrainer", trainer)
    with pytest.raises(KeyboardInterrupt):
        demo.run(None)  # type: ignore[arg-type]
    assert seen[0].use_cpu
