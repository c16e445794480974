"""Any number of ranks: two processes (gloo, CPU) train what one process trains."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from compact.trainer import NonFiniteError


def run_ranks(out: Path, what: str = "main") -> dict[str, Any]:
    """Starts ranks.py on two processes and returns the results that rank 0 saved.

    Args:
        out: folder of the runs and results.
        what: "main", or "deepspeed" for what needs DeepSpeed.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_processes", "2", str(Path(__file__).with_name("ranks.py"))]
    command += [str(out), what]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return torch.load(out / "results.pt")


def assert_same_run(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Compares two outcomes: parameters, losses, evaluations, statistics and every logged score."""
    for name, parameter in one["parameters"].items():
        torch.testing.assert_close(two["parameters"][name], parameter, rtol=0, atol=2e-6)
    for key in ("losses", "norms"):
        assert two[key] == pytest.approx(one[key], abs=1e-4)
    for a, b in zip(one["evals"], two["evals"], strict=True):
        assert b == pytest.approx(a, abs=1e-4)
    assert two["statistics"].keys() == one["statistics"].keys()
    assert two["statistics"]["spread"] == pytest.approx(one["statistics"]["spread"], abs=1e-4)
    assert len(two["scores"]) == len(one["scores"])
    for a, b in zip(one["scores"], two["scores"], strict=True):
        assert b == pytest.approx(a, abs=2e-3)


def assert_same_bits(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Compares a run with the one that was resumed in its middle."""
    assert all(torch.equal(p, two["parameters"][n]) for n, p in one["parameters"].items())
    for key in ("losses", "norms", "statistics", "scores"):
        assert two[key] == one[key], key


def test_two_ranks(tmp_path: Path) -> None:
    """Two ranks, copied (DDP) and sharded (FSDP2), against one process; resumed; not finite.

    One test, since a start of two ranks costs more than all that they do.
    """
    from ranks import RELEASED, SAVING, outcome, start

    found = run_ranks(tmp_path)
    accumulates = SAVING | {"gradient_accumulation_steps": 4, "save_strategy": "no"}
    one = outcome(start(tmp_path / "one", **accumulates))
    spread = {w["question_id"]: 0.0 for w in one["scores"]}
    for row in one["scores"]:
        spread[row["question_id"]] = max(spread[row["question_id"]], row["weight"])
    assert min(spread.values()) > 0.35  # the comparison says nothing of uniform weights

    assert_same_run(one, found["ddp"])
    assert_same_bits(found["ddp"], found["ddp resumed"])

    assert found["sharded"].startswith("FSDP")
    assert_same_run(one, found["fsdp2"])
    assert_same_bits(found["fsdp2"], found["fsdp2 resumed"])
    released = outcome(start(tmp_path / "r", **RELEASED | {"gradient_accumulation_steps": 4}))
    assert_same_run(released, found["fsdp2 released"])
    # Two micro-batches a step and two evaluations; the head is whole from one to the next.
    head = [name for names in found["gathers"] for name in names if "embed" in name]
    assert len(head) <= 4 + 2, head

    for name, question in (("stopped", "zoo-11-00005"), ("evaluated", "zoo-11-00001")):
        assert len(found[name]) == 2  # both ranks, the one that met it and the other
        assert all(f"question_id '{question}'" in told for told in found[name])
        assert all("is nan" in told for told in found[name])
    skipped = found["skipped"]
    steps = {row["step"] for row in skipped["scores"]}
    (left_out,) = set(range(1, len(skipped["losses"]) + 1)) - steps
    assert left_out > 1 and skipped["losses"][left_out - 1] == skipped["losses"][left_out - 2] > 0
    assert "zoo-11-00005" not in {row["question_id"] for row in skipped["scores"]}
    moved = [
        bool((p != one["parameters"][n]).any()) and bool(torch.isfinite(p).all())
        for n, p in skipped["parameters"].items()
    ]
    assert all(moved)


def test_two_ranks_of_deepspeed(tmp_path: Path) -> None:
    """ZeRO-2 and ZeRO-3 on two ranks against one process; `make deepspeed` installs DeepSpeed."""
    pytest.importorskip("deepspeed", reason="`make deepspeed` runs this")
    from ranks import OF_DEEPSPEED, RELEASED, outcome, start

    found = run_ranks(tmp_path, "deepspeed")
    alone = {"gradient_accumulation_steps": 4, "save_strategy": "no"}
    for name, settings in OF_DEEPSPEED.items():
        one = outcome(start(tmp_path / f"one{name}", **settings | alone))
        for stage in "23":
            assert_same_run(one, found[f"{stage}{name}"])
            if settings is not RELEASED:
                assert_same_bits(found[f"{stage}{name}"], found[f"{stage}{name} resumed"])
    assert len(found["endless"]) == 2
    assert all("the norm of the gradients is" in told for told in found["endless"])


def test_one_process_names_the_problem_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same NaN with one process: `stop` names problem and teacher."""
    from ranks import poison, start

    import compact.trainer.loss

    monkeypatch.setattr(compact.trainer.loss, "run_pass", compact.trainer.loss.run_pass)
    poison("zoo-11-00002")
    with pytest.raises(NonFiniteError, match="'zoo-11-00002', teacher 'good-0'.*is nan"):
        start(tmp_path, num_train_epochs=1, eval_strategy="no")
