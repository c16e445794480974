"""Registries that users add to: names, errors, `--import`, several processes, lazy imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from compact.commands.cli import main
from compact.registry import Registry, unknown
from helpers.toy import save_student
from helpers.trajectories import rows_of

MODULE = """
from compact import Preset, register_metric, register_policy, register_preset
from compact.answers import Domain, register_domain
from compact.strategies import Strategy, register_strategy

@register_metric("word-count", axis="consensus")
def word_count(pass_):
    \"\"\"Counts tokens.\"\"\"
    return pass_.batch.token_offsets.diff().float()

@register_preset("mine")
def mine():
    return Preset("none", "word-count", "none", beta=(0.0, 1.0, 0.0))

@register_policy("first")
def first():
    \"\"\"All weight on the first rationale.\"\"\"
    def policy(pass_, steps):
        weight = pass_.stats.nll.new_zeros(pass_.batch.num_rationales)
        weight[pass_.batch.problem_offsets[:-1]] = 1.0
        return weight
    return policy

@register_strategy("idle")
class Idle(Strategy):
    \"\"\"Does nothing.\"\"\"
    needs = ("gold",)
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "my_module.py").write_text(MODULE)
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in rows_of("good", "verbose", problems=4))
    )
    save_student(tmp_path / "student")
    return tmp_path


def compact(place: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "compact", *argv]
    return subprocess.run(command, cwd=place, env=env, capture_output=True, text=True)


def test_a_module_of_the_user_s_is_known_to_commands(place: Path) -> None:
    """Metric, preset, policy and strategy by name, listed and used."""
    listed = compact(place, "metrics", "--import", "my_module")
    assert listed.returncode == 0, listed.stderr
    for word in ("word-count", "Counts tokens.", "mine", "1 word-count", "first", "All weight on"):
        assert word in listed.stdout
    listed = compact(place, "--import=my_module", "strategies")
    assert "idle" in listed.stdout and "gold" in listed.stdout and "Does nothing." in listed.stdout
    done = compact(
        place, "score", "data.jsonl", "--model", "student", "--preset", "mine",
        "--out", "scores.jsonl", "--import", "my_module",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (place / "scores.jsonl").read_text().splitlines()]
    assert all(row["consensus"] > 1 and row["adaptability"] is None for row in rows)


def test_training_knows_it_in_every_process(place: Path) -> None:
    """The launcher's processes import the module too."""
    settings = {
        "model": "student", "data": "data.jsonl", "output_dir": "run", "preset": "first",
        "strategy": "idle", "use_peft": "false", "use_cpu": "true", "max_steps": "1",
        "max_length": "400", "report_to": "none", "save_strategy": "no",
    }  # fmt: skip
    argv = [text for key, value in settings.items() for text in (f"--{key}", value)]
    done = compact(place, "train", "--num_processes", "2", *argv, "--import", "my_module")
    assert done.returncode == 0, done.stderr[-2000:]
    about = json.loads((place / "run" / "run.json").read_text())
    assert (about["weigher"], about["strategy"]) == ("first", "idle")


@pytest.mark.parametrize(
    "argv, words",
    [
        (["env", "--import", "no_such_module"], "--import no_such_module: ModuleNotFoundError"),
        (["env", "--import"], "--import must name a module"),
        (["--import", "json"], "--import must be used with a command"),
    ],
)
def test_bad_imports(capsys: pytest.CaptureFixture[str], argv: list[str], words: str) -> None:
    assert main(argv) == 1
    assert words in capsys.readouterr().err


def test_names_are_unique_and_errors_list_them() -> None:
    registry: Registry[object] = Registry("thing")

    @registry.register("apple")
    def apple() -> None: ...

    assert registry["apple"] is apple and list(registry) == ["apple"]
    registry.add("apple", 3, apple)  # its module was run again
    assert registry.get_or_raise("apple") == 3
    with pytest.raises(ValueError, match="thing 'apple' is already taken by .*apple"):
        registry.add("apple", 4, len)
    with pytest.raises(ValueError, match="thing must be one of apple, got 'aple'; did you mean"):
        registry.get_or_raise("aple")
    with pytest.raises(ValueError, match="thing: name must be text that is not empty, got ''"):
        registry.add("", 1, len)
    assert "nothing (none is registered)" in unknown("thing", "x", [])


def test_what_is_added_temporarily_goes_again() -> None:
    registry: Registry[object] = Registry("thing")
    registry.register("kept")(len)
    with pytest.raises(KeyboardInterrupt), registry.temporary():
        registry.register("gone")(max)
        registry.register("kept")(len)
        assert list(registry) == ["kept", "gone"]
        raise KeyboardInterrupt
    assert list(registry) == ["kept"]
    registry.register("gone")(min)  # the name is free again


def test_what_reads_answers_loads_no_torch() -> None:
    """`import compact`, its answers and the list of commands stay light."""
    code = (
        "import sys, compact, compact.answers, compact.commands.cli; "
        "assert 'CompactTrainer' in dir(compact); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'peft')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    import compact as package

    with pytest.raises(AttributeError, match="no attribute 'CompactTrainr'"):
        _ = package.CompactTrainr


def test_public_names_are_those_of_their_modules() -> None:
    """Every public name can be had, and the old places still work."""
    import compact as package
    from compact.config import CompactConfig
    from compact.metrics import register
    from compact.runlog import read_scores
    from compact.trainer import CompactTrainer

    for name in package.__all__:
        assert getattr(package, name) is not None
    assert package.CompactTrainer is CompactTrainer and package.CompactConfig is CompactConfig
    assert package.register_metric is register and package.read_scores is read_scores
