"""What holds for every built-in strategy: listed, documented, in the study, survives SIGKILL."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from compact.evaluation.arms import parse_arm
from compact.evaluation.compare import compare, zoo_task
from compact.lab.zoo import RIGHT
from compact.report.page import render
from compact.report.run import read_run
from compact.strategies import STRATEGIES
from compact.trainer.runlog import read_scores
from helpers.commands import run
from helpers.resuming import assert_survives_sigkill
from helpers.toy import save_student
from helpers.trajectories import TEACHERS, rows_of, train

ROOT = Path(__file__).parents[2]
OPTIONS: dict[str, dict[str, Any]] = {
    "adaswitch": {"teachers": "TEACHER", "max_new_tokens": 6},
    "answer-confidence": {"teachers": "TEACHER"},
    "aqg": {"count": 4},
    "co-supervised": {"samples": 1, "probe": 2, "max_new_tokens": 4},
    "crsd": {},
    "feature-contrast": {"teachers": "TEACHER"},
    "fragment-ema": {},
    "mot": {"rounds": 2},
    "orion": {"samples": 1, "max_new_tokens": 3},
    "p-align": {"samples": 1, "max_new_tokens": 3},
    "trico": {"gold": 1, "every": 2},
}

# What the report says of a strategy, by the example of one number.
TOLD = {
    "adaswitch": "share of tokens by the student",
    "answer-confidence": "confidence: good-0",
    "aqg": "kinds: misconception",
    "co-supervised": "keep rate",
    "crsd": "answer nll",
    "feature-contrast": "contrast: student",
    "fragment-ema": "fragments moved",
    "mot": "branch weight: good-0",
    "orion": "rewritten but wrong",
    "p-align": "prefixes kept",
    "trico": "beta: consensus",
}


def _built_in() -> set[str]:
    return {name for name, entry in STRATEGIES.items() if entry.__module__.startswith("compact.")}


def test_every_strategy_is_listed_and_documented(capsys: pytest.CaptureFixture[str]) -> None:
    """`compact strategies` and the table of docs/strategies.md say the same needs."""
    assert _built_in() == set(OPTIONS) == set(TOLD)
    run("strategies")
    told = capsys.readouterr().out
    guide = (ROOT / "docs/strategies.md").read_text()
    for name in _built_in():
        needs = ", ".join(STRATEGIES[name].needs) or "nothing"
        row = next(line for line in guide.splitlines() if line.startswith(f"| `{name}`"))
        assert row.split(" | ")[2] == needs
        assert re.search(rf"{name} .*{needs}", told)
        assert f"**{name}**" in guide


def _study_arms() -> list[str]:
    done = subprocess.run(
        ["make", "-n", "study", "native="], cwd=ROOT, capture_output=True, text=True, check=True
    )
    (line,) = (x for x in done.stdout.replace("\\\n", " ").splitlines() if "compare zoo-b" in x)
    words = shlex.split(line)
    first = words.index("--arms") + 1
    return words[first : words.index("--seeds")]


def test_the_study_has_every_strategy() -> None:
    arms = [parse_arm(text, RIGHT) for text in _study_arms()]
    assert {arm.strategy for arm in arms} == _built_in() | {None}
    assert {"robust", "mgda", "pcgrad", "mind"} <= {arm.preset for arm in arms}
    with pytest.raises(ValueError, match="strategy must be one of"):
        parse_arm("uniform,strategy=mott")
    with pytest.raises(ValueError, match="strategy_options of uniform must be a mapping"):
        parse_arm("uniform,strategy=mot,strategy_options=2")


def test_the_study_runs_in_miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two arms, one seed, four problems, an untrained student; the table has both arms."""
    from compact.lab.zoo_student import build_model, build_tokenizer

    tokenizer = build_tokenizer()
    monkeypatch.setattr(
        "compact.evaluation.compare.load_zoo_student",
        lambda *_, **__: (build_model(tokenizer, 0, hidden=16, layers=1), tokenizer),
    )
    task = zoo_task("b", problems=4, questions=2, epochs=6, stage="early", cache=tmp_path)
    arms = [parse_arm("uniform"), parse_arm("uniform,strategy=mot,strategy_options={rounds: 1}")]
    summary = compare(task, arms, [0], tmp_path / "out")
    assert summary[0]["steps"] == summary[1]["steps"] >= 3
    table = (tmp_path / "out/compare.md").read_text()
    assert all(f"| {arm.name} |" in table for arm in arms) and "strategy=mot" in arms[1].name


@pytest.mark.parametrize("name, told", TOLD.items())
def test_the_report_shows_what_a_strategy_did(tmp_path: Path, name: str, told: str) -> None:
    """The section Method has the strategy's own numbers; without them there is none."""
    settings = _settings(name, tmp_path) | {"max_steps": 6}
    train(tmp_path / "run", rows_of(*TEACHERS), **settings)
    page = render(read_run(tmp_path / "run"))
    assert '<section id="method">' in page
    method = page.split('<section id="method">')[1].split("</section>")[0]
    assert f"<td>{told}</td>" in method
    if name == "mot":  # a line for each round
        assert "branch over the steps" in method
    assert '<section id="method">' not in render(_without(tmp_path / "run"))


@pytest.mark.parametrize("name", [n for n, s in STRATEGIES.items() if "gold" in s.needs])
def test_gold_answers_that_a_strategy_needs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """Without any it is refused; of data with some, it gets the problems that have one."""
    settings = _settings(name, tmp_path)
    rows = rows_of(*TEACHERS)
    first = rows[0]["question_id"]
    none = [{k: v for k, v in row.items() if k != "answer"} for row in rows]
    with pytest.raises(ValueError, match="needs gold answers, and no row of the data has the"):
        train(tmp_path / "refused", none, **settings)
    some = [
        bare if row["question_id"] == first else row for row, bare in zip(rows, none, strict=True)
    ]
    train(tmp_path / "run", some, **settings)
    assert f"{name}: 1 of 4 problems have no gold answer and are left out" in caplog.text
    assert first not in read_scores(tmp_path / "run")["question_id"].to_pylist()


def _without(folder: Path) -> Any:
    found = read_run(folder)
    found.logs = [
        {k: v for k, v in entry.items() if not k.startswith("strategy/")} for entry in found.logs
    ]
    return found


def _settings(name: str, folder: Path) -> dict[str, Any]:
    """Settings of a run with a strategy; its white-box teacher is saved in the folder."""
    teacher = folder / "teacher"
    save_student(teacher)
    options = {k: str(teacher) if v == "TEACHER" else v for k, v in OPTIONS[name].items()}
    preset = "robust" if name == "trico" else "uniform"
    return {"strategy": name, "strategy_options": options, "preset": preset}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_survives_sigkill(tmp_path: Path, name: str) -> None:
    """Killed after two checkpoints and resumed: the same bits as an uninterrupted run."""
    settings = _settings(name, tmp_path) | {"max_steps": 8}
    assert_survives_sigkill(tmp_path, json.dumps(settings))
