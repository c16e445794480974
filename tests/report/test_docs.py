"""README and guides: their code runs as it stands, their commands exist, the site is built."""

import json
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from transformers import TrainingArguments

import compact_ops
from compact import CompactConfig, CompactTrainer, Student, load_problems, make_weigher
from compact.answers import find_domain
from compact.commands.cli import COMMANDS, main
from compact.commands.recipe import known_keys
from compact.lab import zoo
from compact.lab.zoo_student import build_model, build_tokenizer
from compact.metrics import METRICS
from compact.passes.encode import encode_problem
from compact.passes.forward import observe
from compact.registry import IMPORT_VARIABLE, import_modules
from compact.settings import RecipeConfig
from compact.weighting import PRESETS, TOKEN_WEIGHTS, weigher_names
from helpers.toy import save_student

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


def write_inputs(data):
    """Writes a tiny student and its rationales under the names that the pages use."""
    save_student(Path("path/or/name/of/a/model"))
    rows = zoo.make_rows(("good", "verbose", "wrong-step"), 2, seed=1)
    Path(data).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("page", ["README.md", "docs/trainer.md"])
def test_the_trainer_of_the_page_trains(page, tmp_path, monkeypatch):
    block = block_with(ROOT / page, "CompactTrainer(")
    assert len(ten_lines(block)) <= 10
    monkeypatch.chdir(tmp_path)
    (data,) = re.findall(r'"(\w+\.jsonl)"', block)
    write_inputs(data)
    names = {}
    exec(block, names)
    assert names["trainer"].state.global_step > 0
    assert json.loads(Path("runs/mine/run.json").read_text())["status"] == "complete"
    assert list(Path("runs/mine").glob("checkpoint-*"))


def test_the_loop_of_the_operators_guide_gives_the_gradient_of_full_logits(tmp_path, monkeypatch):
    inputs, loop = (
        block_with(ROOT / "docs/operators.md", word) for word in ("texts = [", "problem_weights(")
    )
    assert len(ten_lines(loop)) <= 12
    monkeypatch.chdir(tmp_path)
    save_student(Path("path/or/name/of/a/model"))
    names = {}
    exec(inputs, names)
    model = names["model"]
    model.lm_head.weight.requires_grad_(False)
    exec(loop, names)
    weight, target, rows = (names[name] for name in ("weight", "target", "rows"))
    assert weight.shape == target.shape and not weight.requires_grad
    assert names["found"].weight[:2].sum() == pytest.approx(1) == names["found"].weight[2]
    flat = names["input_ids"].flatten()
    assert torch.equal(flat[rows + 1], target)  # each is predicted from the place before it
    parameter = model.model.layers[0].mlp.up_proj.weight
    found, parameter.grad = parameter.grad, None
    logits = model(names["input_ids"]).logits.flatten(0, 1)[rows]
    (weight * torch.nn.functional.cross_entropy(logits, target, reduction="none")).sum().backward()
    assert torch.allclose(found, parameter.grad, atol=1e-6) and found.norm() > 0


# --- docs/extending.md ------------------------------------------------------------------------


@pytest.fixture
def extending(own_registries, tmp_path, monkeypatch):
    """Imports a module of docs/extending.md as `--import` does; returns it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(IMPORT_VARIABLE, "")

    def load(name, page="docs/extending.md"):
        Path(f"{name}.py").write_text(block_with(ROOT / page, f"# {name}.py\n"))
        import_modules([name])
        return sys.modules[name]

    before = set(sys.modules)
    yield load
    for name in set(sys.modules) - before:
        if name.startswith("my_"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def some_pass():
    """What a tiny student makes of two problems with three rationales each."""
    tokenizer = build_tokenizer()
    problems = load_problems(zoo.make_rows(("good", "verbose", "unrelated"), 2, seed=1))
    encoded = [encode_problem(p, tokenizer, max_length=400) for p in problems]
    return observe(Student.of(build_model(tokenizer, 0, layers=1).eval(), tokenizer), encoded)


def train(**settings):
    """Trains a tiny student for one step; returns its last log line with a loss."""
    write_inputs("rationales.jsonl")
    config = CompactConfig(output_dir="run", max_steps=1, report_to="none", **settings)
    trainer = CompactTrainer("path/or/name/of/a/model", config, train_dataset="rationales.jsonl")
    trainer.train()
    return next(entry for entry in trainer.state.log_history if "loss" in entry)


def test_the_metric_of_the_guide_weighs_rationales(extending, some_pass):
    module = extending("my_metrics")
    names = {}
    exec(block_with(ROOT / "docs/extending.md", "args = CompactConfig("), names)
    weights = make_weigher(names["args"].preset, **names["args"].overrides)(some_pass)
    assert torch.allclose(weights.weight.view(2, 3).sum(1), torch.ones(2))
    assert torch.equal(weights.scores["adaptability"], module.confidence(some_pass))
    assert weights.scores["adaptability"].std() > 0


def test_the_policy_of_the_guide_weighs_and_trains(extending, some_pass):
    extending("my_policies")
    weight = make_weigher("short", power=2.0)(some_pass).weight
    assert torch.allclose(weight.view(2, 3).sum(1), torch.ones(2))
    lengths = some_pass.batch.token_offsets.diff().view(2, 3)
    assert torch.equal(weight.view(2, 3).argmax(1), lengths.argmin(1))
    assert train(preset="short", overrides={"power": 2.0})["loss"] > 0


def test_the_preset_of_the_guide_weighs_and_trains(extending, some_pass):
    extending("my_presets")
    weights = make_weigher("agreement-only")(some_pass)
    assert set(weights.scores) == {"consensus"} and weights.weight.std() > 0
    assert train(preset="agreement-only")["loss"] > 0


def test_the_token_weights_of_the_guide_train(extending):
    extending("my_token_weights", "docs/metrics.md")
    plain = train(preset="uniform")["loss"]
    shutil.rmtree("run")
    assert 0 < train(preset="uniform", token_weights="uncertain")["loss"] < plain


def test_the_token_weights_of_the_guide_give_the_gradient_of_full_logits():
    torch.manual_seed(0)
    hidden, head = torch.randn(9, 8, requires_grad=True), torch.nn.Linear(8, 23, bias=False)
    target, rows = torch.randint(0, 23, (12,)), torch.arange(12) % 9
    names = {
        "hidden": hidden,
        "lm_head": head,
        "target": target,
        "rows": rows,
        "token_offsets": torch.tensor([0, 2, 6, 9, 12]),
        "alpha": torch.tensor([0.2, 0.8, 0.5, 0.5]),
    }
    exec(block_with(ROOT / "docs/metrics.md", "TOKEN_WEIGHTS["), names)
    found = hidden.grad.clone(), head.weight.grad.clone()
    hidden.grad = head.weight.grad = None
    nll = torch.nn.functional.cross_entropy(head(hidden)[rows], target, reduction="none")
    (names["share"] * (-nll).exp().detach() * nll).sum().backward()
    assert torch.allclose(found[0], hidden.grad, atol=1e-6)
    assert torch.allclose(found[1], head.weight.grad, atol=1e-6)


def test_the_strategy_of_the_guide_adds_its_term(extending):
    extending("my_strategies")
    (recipe,) = blocks(ROOT / "docs/extending.md", "yaml")
    settings = yaml.safe_load(recipe)
    assert set(settings) <= set(known_keys())
    plain = train(preset="uniform")["loss"]
    shutil.rmtree("run")
    assert train(preset="uniform", **settings)["loss"] > plain


def test_the_answer_domain_of_the_guide_reads_and_compares(extending):
    module = extending("my_answers")
    domain = find_domain("1.5 km", "How far is it?")
    assert isinstance(domain, module.Length) and domain.name == "length"
    assert domain.extract("He walks 300 m and rides the rest. The answer is 1.5 km.") == "1500 m"
    assert domain.matches("1500 m", "1.5 km") and not domain.matches("150 m", "1.5 km")
    assert domain.extract("Nobody knows.") is None
    assert not isinstance(find_domain("16", "26 - 10?"), module.Length)
    assert pickle.loads(pickle.dumps(domain)) == domain


def test_the_forward_of_the_guide_gives_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_inputs("rationales.jsonl")
    names = {}
    exec(block_with(ROOT / "docs/extending.md", "observe("), names)
    assert torch.allclose(names["weights"].weight.view(-1, 3).sum(1), torch.ones(2))
    assert "wrong-step" in capsys.readouterr().out


def test_the_commands_import_the_module_of_the_guide(extending, capsys):
    extending("my_metrics")
    assert main(["metrics", "--import", "my_metrics"]) == 0
    assert "confidence" in capsys.readouterr().out


# --- rows, commands, tables -------------------------------------------------------------------


@pytest.mark.parametrize("page", ["README.md", "docs/data-format.md"])
def test_the_row_of_the_page_is_read(page):
    row = json.loads(blocks(ROOT / page, "json")[0])
    problem = load_problems([row])[0]
    assert (problem.answer, problem.rationales[0].teacher) == ("16", row["teacher"])


def test_the_readme_is_read_in_ten_minutes():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 135 and max(map(len, lines)) <= 100


def test_commands_of_the_guides_exist():
    text = "".join(path.read_text() for path in GUIDES)
    named = set(re.findall(r"^compact (\w+)", text, re.MULTILINE))
    assert {"train", "evaluate", "report", "import", "score", "compare"} <= named <= COMMANDS.keys()


def test_the_quickstart_names_commands_with_their_guides(capsys):
    text = (ROOT / "docs/quickstart.md").read_text()
    rows = re.findall(r"^\| `compact (\w+)` (.*)", text, re.MULTILINE)
    assert len(rows) > 5 and all("](" in what for _, what in rows)
    assert {name for name, _ in rows} <= set(COMMANDS)
    assert main(["--help"]) == 0
    listed = re.findall(r"^  (\w+) ", capsys.readouterr().out, re.MULTILINE)
    assert set(COMMANDS) <= set(listed)


def test_the_method_lists_every_policy():
    text = (ROOT / "docs/method.md").read_text().split("## Policies")[1]
    assert set(re.findall(r"^\| `([^`]+)`", text, re.MULTILINE)) == {
        name for name in weigher_names() if name not in PRESETS
    }


def test_the_metrics_page_lists_every_metric_and_token_weight():
    text, token_weights = (ROOT / "docs/metrics.md").read_text().split("## Token weights")
    told = {}
    for row in re.findall(r"^\| `.*", text, re.MULTILINE):
        cells = [cell.strip() for cell in row.replace("\\|", "").split("|")]
        names, _, direction, axis, needs = cells[1:6]
        gold = "gold answers" in needs
        told |= {name: (direction, axis, gold) for name in re.findall(r"`([\w-]+)`", names)}
    assert set(told) == set(METRICS)
    for name, metric in METRICS.items():
        direction = "" if name == "random" else metric.direction
        assert told[name] == (direction, metric.axis, metric.needs.gold), name
    named = re.findall(r"^\| `(\w+)`", token_weights, re.MULTILINE)
    assert named == list(TOKEN_WEIGHTS)


def test_the_trainer_guide_lists_every_setting():
    text = (ROOT / "docs/trainer.md").read_text().split("## Settings")[1]
    named = {name for row in re.findall(r"^\| (`[^|]+)", text, re.MULTILINE)
             for name in re.findall(r"`(\w+)`", row)}  # fmt: skip
    inherited = {field.name for field in fields(TrainingArguments)}
    own = {field.name for field in fields(CompactConfig)} - inherited
    assert named == own | {field.name for field in fields(RecipeConfig)}


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
            known = known or option == "import"  # every command takes it
            assert known or f"--{option}" in told, f"compact {command} --{option}"


def test_preset_table_says_what_the_presets_are():
    text = (ROOT / "docs/method.md").read_text()
    titles = "| preset | validity | adaptability | consensus | difficulty | scale | tau |\n|---"
    assert text.count(titles) == 1
    table = text.split(titles)[1].partition("\n\n")[0].splitlines()[1:]
    told = [[cell.strip() for cell in row.strip("|").split("|")] for row in table]
    assert sorted(row[0].partition(" ")[0] for row in told) == sorted(f"`{n}`" for n in PRESETS)
    default = CompactConfig(output_dir="run", use_cpu=True).preset
    for first, validity, *axes, scale, tau in told:
        name = first.split("`")[1]
        preset = PRESETS[name]
        assert first == f"`{name}` (default)" if name == default else first == f"`{name}`"
        assert validity == ("-" if preset.validity == "none" else f"`{preset.validity}`")
        named = (preset.adaptability, preset.consensus, preset.difficulty)
        for i, (cell, metric) in enumerate(zip(axes, named, strict=True)):
            metric_told, _, factor = cell.partition(", ")
            assert metric_told == f"`{metric}`"
            assert (factor or f"b{i + 1} = 1") == f"b{i + 1} = {preset.beta[i]:g}"
        assert (scale == "running") == (preset.shrink > 0 and not preset.eps)
        assert scale == "running" or float(scale.removeprefix("std + ")) == preset.eps
        assert float(tau) == preset.tau


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
    for name in ("quickstart", "choosing", "trainer", "extending", "operators", "distributed"):
        assert f'href="{name}.html"' in front
        assert "<h1" in (site / f"{name}.html").read_text()
    for page in site.rglob("*.html"):
        for link in re.findall(r'(?:href|src)="([^"#:$]+)["#]', page.read_text()):
            assert (page.parent / link).exists(), f"{page.relative_to(site)} -> {link}"


# --- CONTRIBUTING.md --------------------------------------------------------------------------


def paths_named(text):
    """Paths in backticks, the first word of a command; `<op>` stands for any name."""
    named = (part.split()[0] for part in re.findall(r"`([^`\n]+)`", text))
    top = {path.name for path in ROOT.iterdir()}
    return {name for name in named if name.split("/")[0] in top}


def test_every_path_in_contributing_exists():
    named = paths_named((ROOT / "CONTRIBUTING.md").read_text())
    assert len(named) >= 40 and {"compact/config.py", "csrc/ops/<op>_cpu.cpp"} <= named
    for name in named:
        pattern = re.sub(r"<\w+>", "*", name)
        assert [*ROOT.glob(pattern)], f"CONTRIBUTING.md: {name} does not exist"


def test_contributing_says_where_twenty_things_are():
    section = (ROOT / "CONTRIBUTING.md").read_text().split("\n## ")[1]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    assert section.startswith("I want to change") and len(rows) > 20
    assert all(paths_named(row) for row in rows[1:])


def test_contributing_lists_the_layers_of_the_contract():
    contract = (ROOT / "pyproject.toml").read_text().split("layers = [")[1].split("]")[0]
    layers = re.findall(r'"(\w+)"', contract)
    text = " ".join((ROOT / "CONTRIBUTING.md").read_text().split())
    listed = re.search(r"fails otherwise [^:]*: ([\w, ]+)\.", text)[1].split(", ")
    assert listed == [name for name in layers if name in listed]
    assert {name for name in layers if (ROOT / "compact" / name).is_dir()} <= set(listed)


def test_links_into_a_page_lead_to_a_heading():
    for page in GUIDES:
        for name, anchor in re.findall(r"\]\(([\w./-]*\.md)?#([\w-]+)\)", page.read_text()):
            target = page.parent / name if name else page
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
            assert anchor in slugs, f"{page.name}: {name}#{anchor}"
