"""README and guides: their code runs as it stands, their commands exist, the site is built."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import compact_ops
from compact.commands.cli import COMMANDS, main
from compact.commands.recipe import known_keys
from compact.data import load_problems
from compact.lab import zoo
from compact.lab.zoo_student import build_model, build_tokenizer
from compact.passes.encode import encode_problem
from compact.passes.forward import run_pass
from compact.passes.packing import build_batch
from compact.student import Student
from compact.weighting import PRESETS, make_weigher

ROOT = Path(__file__).parents[2]
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path, language):
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", path.read_text(), re.DOTALL | re.MULTILINE)


def block_with(path, word):
    """The one Python block of a page that holds a word."""
    (found,) = [block for block in blocks(path, "python") if word in block]
    return found


def ten_lines(block):
    """Lines that do something: no imports, comments, blank lines or lone brackets."""
    lines = [line.strip() for line in block.splitlines()]
    skipped = ("from ", "import ", "#", ")", "")
    return [line for line in lines if not line.startswith(skipped[:4]) and line]


@pytest.mark.parametrize("page", ["README.md", "docs/trainer.md"])
def test_the_trainer_of_the_page_trains(page, tmp_path, monkeypatch):
    block = block_with(ROOT / page, "CompactTrainer(")
    assert len(ten_lines(block)) <= 10
    monkeypatch.chdir(tmp_path)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed=0, layers=1)
    model.save_pretrained("path/or/name/of/a/model")
    tokenizer.save_pretrained("path/or/name/of/a/model")
    rows = zoo.make_rows(("good", "verbose", "wrong-step"), 2, seed=1)
    (data,) = re.findall(r'"(\w+\.jsonl)"', block)
    Path(data).write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = {}
    exec(block, names)
    assert names["trainer"].state.global_step > 0
    assert json.loads(Path("runs/mine/run.json").read_text())["status"] == "complete"
    with pytest.raises(ValueError, match="already holds"):  # so a checkpoint was written there
        names["trainer"].train()


@pytest.mark.parametrize("page", ["README.md", "docs/operators.md"])
def test_the_loop_of_the_page_gives_the_gradient_of_full_logits(page):
    block = block_with(ROOT / page, "linear_token_stats(")
    assert len(ten_lines(block)) <= 11
    torch.manual_seed(0)
    embedding, lm_head = torch.nn.Embedding(23, 8), torch.nn.Linear(8, 23, bias=False)
    lm_head.requires_grad_(False)
    target = torch.randint(0, 23, (12,))
    rows = torch.arange(12) // 2  # two tokens read one row
    names = {
        "body": embedding,
        "input_ids": torch.randint(0, 23, (2, 3)),
        "lm_head": lm_head,
        "target": target,
        "rows": rows,
        "problem": torch.arange(12) // 6,
        "token_offsets": torch.tensor([0, 2, 6, 9, 12]),
        "rationale_offsets": torch.tensor([0, 2, 4]),
        "my_weights": lambda stats: torch.softmax(stats.gold_logp, 0),
    }
    names["answer_ids"] = names["ids"] = torch.tensor([3, 4, 5])
    names["answer_offsets"] = names["offsets"] = torch.tensor([0, 1, 3])
    names["hidden"] = embedding(names["input_ids"]).flatten(0, 1)  # the README starts from it
    exec(block, names)
    weight, found = names["weight"], embedding.weight.grad.clone()
    assert weight.shape == (12,) and not weight.requires_grad and weight.std() > 0
    if "alpha" in names:  # weights of a problem sum to 1
        assert torch.allclose(names["alpha"].view(2, 2).sum(1), torch.ones(2))
    embedding.weight.grad = None
    logits = lm_head(embedding(names["input_ids"]).flatten(0, 1))[rows]
    (weight * torch.nn.functional.cross_entropy(logits, target, reduction="none")).sum().backward()
    assert torch.allclose(found, embedding.weight.grad, atol=1e-6)


def test_the_metric_of_the_guide_weighs_rationales():
    names = {}
    exec(blocks(ROOT / "docs/metrics.md", "python")[0], names)
    tokenizer = build_tokenizer()
    problems = load_problems(zoo.make_rows(("good", "verbose", "unrelated"), 2, seed=1))
    encoded = [encode_problem(p, tokenizer, max_length=400) for p in problems]
    student = Student.of(build_model(tokenizer, 0, layers=1).eval())
    batch = build_batch(encoded, layout="tree", leaves=True, pad_token_id=0)
    with torch.no_grad():
        pass_ = run_pass(student, batch)[2]
    weights = make_weigher("robust", adaptability="confidence")(pass_)
    assert torch.allclose(weights.weight.view(2, 3).sum(1), torch.ones(2))
    assert torch.equal(weights.scores["adaptability"], names["confidence"](pass_))
    assert weights.scores["adaptability"].std() > 0


def test_the_row_of_the_format_guide_is_read():
    row = json.loads(blocks(ROOT / "docs/data-format.md", "json")[0])
    problem = load_problems([row])[0]
    assert (problem.answer, problem.rationales[0].teacher) == ("16", "gemini")


def test_commands_of_the_guides_exist():
    text = "".join(path.read_text() for path in GUIDES)
    named = set(re.findall(r"^compact (\w+)", text, re.MULTILINE))
    assert {"train", "evaluate", "report", "import", "score", "compare"} <= named <= COMMANDS.keys()


def test_options_of_the_commands_in_the_guides_exist(capsys):
    """Each `--option` of a command line is in that command's help, or is a key of a recipe."""
    asked = set()
    for path in GUIDES:
        text = path.read_text().replace("\\\n", " ")
        for command, rest in re.findall(r"^compact (\w+)(.*)$", text, re.MULTILINE):
            asked |= {(command, option) for option in re.findall(r"--(\w+)", rest)}
    assert ("evaluate", "retained_task") in asked
    for command in {command for command, _ in asked}:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        told = capsys.readouterr().out
        for option in (option for name, option in asked if name == command):
            known = command == "train" and option in known_keys()
            assert known or f"--{option}" in told, f"compact {command} --{option}"


def test_preset_table_says_what_the_presets_are():
    text = (ROOT / "docs/method.md").read_text()
    for name, preset in PRESETS.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}`"))
        metrics = (preset.adaptability, preset.consensus, preset.difficulty)
        assert all(f"`{metric}`" in row for metric in metrics)
        assert f"b3 = {preset.beta[2]:g}" in row


def test_keys_of_the_yaml_in_the_guides_exist():
    keys = re.findall(r"^ *(\w+):", "".join(blocks(ROOT / "docs/quickstart.md", "yaml")), re.M)
    assert "preset" in keys and set(keys) <= set(known_keys())


def test_the_site_is_built_and_every_public_function_is_on_it(tmp_path):
    """docs/build.py stops at a docstring that pdoc cannot read and at a link that leads nowhere."""
    site = tmp_path / "site"
    done = subprocess.run(
        [sys.executable, "docs/build.py", str(site)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    operators = (site / "compact_ops.html").read_text()
    assert all(f'id="{name}"' in operators for name in compact_ops.__all__)
    assert "ForwardRef" not in operators and "Alias for field" not in operators
    front = (site / "index.html").read_text()
    for name in ("quickstart", "trainer", "operators", "evaluation", "distributed"):
        assert f'href="{name}.html"' in front
        assert "<h1" in (site / f"{name}.html").read_text()
    for page in site.rglob("*.html"):
        for link in re.findall(r'(?:href|src)="([^"#:$]+)["#]', page.read_text()):
            assert (page.parent / link).exists(), f"{page.relative_to(site)} -> {link}"
