"""The commands of README and guides, as they stand there, in a fresh interpreter for each page.

Names in the commands (MODEL, train.jsonl, recipe.yaml, ...) are a tiny student and small data in a
temporary folder.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from compact.lab import zoo
from helpers.toy import save_student

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
SLOW = {"docs/choosing.md", "docs/distributed.md", "docs/evaluation.md"}
# Start of a command -> why it is not run here.
NOT_RUN = {
    "make demo": "trains a real student for minutes; tests/lab tests the zoo",
    "make test": "would run this test",
    "hf upload": "needs an account of the hub",
    "python -m benchmarks.leaks": "needs the data of the benchmarks",
    "compact collect": "asks paid teachers; tests/teachers asks served ones",
    "compact import gemini=SVAMP": "reads files of another repository",
    "compact train --config recipes/svamp.yaml --data svamp.jsonl": "trains on those files",
    "compact train --config recipe.yaml --data rationales.jsonl --output_dir runs/mine --strategy": (  # noqa: E501
        "asks a paid teacher; tests/strategies/test_writers.py asks a served one"
    ),
    "compact evaluate --endpoint": "needs a server; tests/teachers/test_served.py has one",
}
RECIPE = """model: MODEL
data: train.jsonl
output_dir: runs/mine
max_steps: 6
max_length: 400
report_to: none
use_cpu: true
"""
# Runs the commands one after another in one interpreter, since importing torch takes seconds.
RUN = """
import json, shlex, sys
from compact.commands.cli import main
for line in json.loads(sys.argv[1]):
    words = shlex.split(line, comments=True)
    print("$", line, flush=True)
    status = main(words[1:])
    if status:
        sys.exit(f"status {status}: {line}")
"""


def commands(page: str) -> list[str]:
    """The command lines of a page's shell blocks, continued lines joined."""
    inside, lines = None, []
    for line in (ROOT / page).read_text().replace("\\\n", " ").splitlines():
        fence = re.fullmatch(r" *```(\w*)", line)
        if fence:
            inside = fence[1] if inside is None else None
        elif inside in ("", "bash", "sh") and line.strip():
            lines.append(" ".join(line.split()))
    return lines


def is_run(command: str) -> bool:
    return not command.startswith(tuple(NOT_RUN))


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the commands name."""
    folder = tmp_path_factory.mktemp("names")
    for name in ("MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        save_student(folder / name)
    teachers = {"good": "gpt-4o", "wrong-step": "gemini", "verbose": "human"}
    rows = [
        row | {"teacher": teachers[row["teacher"]], "question_id": f"svamp-{i // 3:05d}"}
        for i, row in enumerate(zoo.make_rows(tuple(teachers), 4, seed=1))
    ]
    labelled = [row | {"right": row["teacher"] != "gemini"} for row in rows]
    questions = zoo.make_questions(3, seed=9)

    def write(name: str, content: list[dict[str, object]]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in content))

    for name in ("train.jsonl", "rationales.jsonl", "held-out.jsonl"):
        write(name, rows)
    write("labelled.jsonl", labelled)
    for name, teacher in (("a.jsonl", "gpt-4o"), ("b.jsonl", "gemini")):
        kept = ("prompt", "completion", "answer")
        mine = [row for row in rows if row["teacher"] == teacher]
        write(name, [{key: row[key] for key in kept} for row in mine])
    for name in ("test.jsonl", "questions.jsonl", "old-task.jsonl"):
        write(name, questions)
    write("texts.jsonl", [{"text": row["completion"]} for row in rows[:3]])
    for name, teacher in (("gpt4.json", "gpt-4o"), ("human.json", "human")):
        mine = [row for row in rows if row["teacher"] == teacher]
        alpaca = [{"instruction": row["prompt"], "output": row["completion"]} for row in mine]
        (folder / name).write_text(json.dumps(alpaca))
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "recipes").mkdir()
    (folder / "recipes" / "svamp.yaml").write_text(RECIPE.replace("runs/mine", "runs/svamp"))
    blocks = re.findall(r"```python\n(# (my_\w+)\.py\n.*?)```", text_of("extending"), re.DOTALL)
    for text, name in blocks:
        (folder / f"{name}.py").write_text(text)
    return folder


def text_of(guide: str) -> str:
    return (ROOT / "docs" / f"{guide}.md").read_text()


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow) if page in SLOW else page
        for page in PAGES
        if any(map(is_run, commands(page)))
    ],
)
def test_commands_of_the_page_run(page: str, names: Path, tmp_path: Path) -> None:
    shutil.copytree(names, tmp_path, dirs_exist_ok=True)
    lines = [line for line in commands(page) if is_run(line)]
    assert all(line.startswith("compact ") for line in lines), lines
    for made in re.findall(r"--(?:test_)?out (\w+\.\w+)", "\n".join(lines)):
        if f"out {made}" in next(line for line in lines if made in line):
            (tmp_path / made).unlink(missing_ok=True)  # the page makes it itself
    # A page that goes on with a run which another page trains.
    named = {run for line in lines for run in re.findall(r"--model (runs/\w+)", line)}
    if not any(line.startswith("compact train") for line in lines):
        train = "compact train --config recipe.yaml --output_dir"
        lines = [f"{train} {run}" for run in sorted(named)] + lines
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(lines)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


def test_what_is_not_run_is_still_in_the_docs() -> None:
    every = [line for page in PAGES for line in commands(page)]
    assert len(every) > 30
    for start in NOT_RUN:
        assert any(line.startswith(start) for line in every), start
    assert all(shlex.split(line, comments=True) for line in every)
