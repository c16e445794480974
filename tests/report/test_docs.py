"""The guides under docs/: their examples run and their commands exist."""

import json
import re
from pathlib import Path

import torch

from compact import zoo
from compact.cli import COMMANDS
from compact.data import load_problems
from compact.encode import encode_problem
from compact.forward import run_pass
from compact.packing import build_batch
from compact.student import Student
from compact.weighting import PRESETS, make_weigher
from compact.zoo_student import build_model, build_tokenizer

DOCS = Path(__file__).parents[2] / "docs"


def blocks(name, language):
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)


def test_the_metric_of_the_guide_weighs_rationales():
    exec(blocks("metrics.md", "python")[0], {})
    tokenizer = build_tokenizer()
    problems = load_problems(zoo.make_rows(("good", "verbose", "unrelated"), 2, seed=1))
    encoded = [encode_problem(p, tokenizer, max_length=400) for p in problems]
    student = Student.of(build_model(tokenizer, 0, layers=1).eval())
    batch = build_batch(encoded, layout="tree", probes=True, pad_token_id=0)
    with torch.no_grad():
        pass_ = run_pass(student, batch)[2]
    weight = make_weigher("robust", adaptability="confidence")(pass_).weight
    assert torch.allclose(weight.view(2, 3).sum(1), torch.ones(2))
    assert not torch.allclose(weight, make_weigher("uniform")(pass_).weight)


def test_the_row_of_the_format_guide_is_read():
    problem = load_problems([json.loads(blocks("data-format.md", "json")[0])])[0]
    assert (problem.answer, problem.rationales[0].teacher) == ("16", "gemini")


def test_commands_of_the_guides_exist():
    text = "".join(path.read_text() for path in DOCS.glob("*.md"))
    named = set(re.findall(r"^compact (\w+)", text, re.MULTILINE))
    assert {"train", "evaluate", "report", "import", "score"} <= named <= COMMANDS.keys()


def test_preset_table_says_what_the_presets_are():
    text = (DOCS / "method.md").read_text()
    for name, preset in PRESETS.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}`"))
        metrics = (preset.adaptability, preset.consensus, preset.difficulty)
        assert all(f"`{metric}`" in row for metric in metrics)
        assert f"b3 = {preset.beta[2]:g}" in row
