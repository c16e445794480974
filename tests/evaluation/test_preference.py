"""Preference pairs: read from files, scored by likelihood, as a test of compare and evaluate."""

import functools
import json
from dataclasses import replace

import pytest
import torch

from compact.commands.cli import main
from compact.commands.recipe import read_settings
from compact.data import PreferencePair, load_questions, load_test
from compact.evaluation import compare, preference
from compact.evaluation.arms import parse_arm
from compact.evaluation.preference import evaluate_pairs
from compact.lab import zoo
from compact.passes.encode import encode_prompt
from helpers.commands import fails, run

ROW = {"prompt": "How many?", "chosen": "two", "rejected": "three and more"}


@pytest.fixture
def data(tmp_path):
    """Rationales of a zoo, each question's good one chosen and its wrong one rejected."""
    of_question: dict[str, dict[str, str]] = {}
    rows = zoo.make_rows(("good", "wrong-step"), 8, seed=2)
    for row in rows:
        of_question.setdefault(row["prompt"], {})[row["teacher"]] = row["completion"]
    path = tmp_path / "pairs.jsonl"
    lines = [
        {"prompt": prompt, "chosen": found["good"], "rejected": found["wrong-step"]}
        for prompt, found in of_question.items()
        if found["good"] != found["wrong-step"]
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_pairs_are_read_as_trl_writes_them():
    talk = [{"role": "assistant", "content": "two"}]
    named = {**ROW, "question_id": "q7", "chosen": talk}
    assert load_test([ROW, named]) == [
        PreferencePair("list row 0", "How many?", "two", "three and more"),
        PreferencePair("q7", "How many?", talk, "three and more"),
    ]
    questions = zoo.make_questions(2, seed=0)
    assert load_test(questions) == load_questions(questions)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**ROW, "prompt": None}, "row 1: a preference pair must have .*, got no prompt"),
        ({"prompt": "How many?", "chosen": "two"}, "row 1: a preference pair .*, got no rejected"),
        ({**ROW, "rejected": "two"}, "row 1: chosen and rejected must differ, got the same"),
        ({**ROW, "rejected": " "}, "row 1: rejected must not be empty"),
        ({**ROW, "question_id": "list row 0"}, "row 1: question_id 'list row 0' occurs twice"),
        (
            {**ROW, "chosen": [{"role": r, "content": "x"} for r in ("user", "assistant")]},
            "row 1: chosen must hold what follows the prompt, .* got 'user'",
        ),
        (
            {**ROW, "chosen": [{"role": "user", "content": "two"}]},
            "row 1: chosen must end with a message of role 'assistant', got role 'user'",
        ),
    ],
)
def test_a_bad_pair_is_named(row, message):
    with pytest.raises(ValueError, match=message):
        load_test([ROW, row])


def test_a_file_of_questions_with_another_tools_column_is_no_pairs():
    rows = [{**row, "chosen": "x"} for row in zoo.make_questions(2, seed=0)]
    assert load_test(rows)[0].answer is not None
    with pytest.raises(ValueError, match="are read as a test of compact compare"):
        load_questions([ROW])


def mean_logp(model, tokenizer, prompt, completion):
    """The mean log-probability of a completion and the end of turn, by transformers alone."""
    before = list(encode_prompt(prompt, tokenizer))
    after = tokenizer(completion, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    logits = model(input_ids=torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(after)[:, None]).mean().item()


def test_scores_are_those_of_transformers(model, tokenizer, data):
    pairs, items = load_test(data), {}
    model.train()
    found = evaluate_pairs(model, tokenizer, pairs, items=items, progress=False)
    assert model.training
    model.eval()
    right = 0
    with torch.no_grad():
        for pair in pairs:
            chosen, rejected = (
                mean_logp(model, tokenizer, pair.prompt, text)
                for text in (pair.chosen, pair.rejected)
            )
            row = items[pair.question_id]
            assert row["chosen"] == pytest.approx(chosen, abs=1e-4)
            assert row["rejected"] == pytest.approx(rejected, abs=1e-4)
            assert row["correct"] == (row["chosen"] > row["rejected"])
            right += chosen > rejected
    assert (found["correct"], found["items"]) == (right, len(pairs))
    margins = [row["chosen"] - row["rejected"] for row in items.values()]
    assert found["margin"] == pytest.approx(sum(margins) / len(margins))


def test_pairs_that_are_scored_are_not_repeated(model, tokenizer, data, tmp_path, monkeypatch):
    pairs, out = load_test(data), tmp_path / "out.jsonl"
    whole = evaluate_pairs(model, tokenizer, pairs, out, progress=False)
    lines = out.read_text().splitlines(keepends=True)
    assert len(lines) == len(pairs)
    out.write_text("".join(lines[:3]) + lines[3][:20])  # killed while it wrote the fourth
    again = evaluate_pairs(model, tokenizer, pairs, out, progress=False)
    assert again["correct"] == whole["correct"]
    assert again["margin"] == pytest.approx(whole["margin"], abs=1e-4)
    monkeypatch.setattr("compact.evaluation.preference.observe", None)
    evaluate_pairs(model, tokenizer, pairs, out, progress=False)
    with pytest.raises(ValueError, match="other settings"):
        evaluate_pairs(model, tokenizer, pairs, out, settings={"data": "x"}, progress=False)


def test_pairs_that_cannot_be_scored_are_named(model, tokenizer, data):
    with pytest.raises(ValueError, match="at least one preference pair"):
        evaluate_pairs(model, tokenizer, [])
    pair = load_test(data)[0]
    with pytest.raises(ValueError, match="question_id '.*' occurs twice"):
        evaluate_pairs(model, tokenizer, [pair, pair])
    same = replace(pair, chosen="qwx", rejected="qwy")  # words that the tokenizer does not know
    with pytest.raises(ValueError, match="must differ, got the same tokens"):
        evaluate_pairs(model, tokenizer, [same])
    with pytest.raises(ValueError, match="question_id 'q': .* finite, got nan"):
        preference._row("q", torch.nan, -1.0)


def test_the_command_scores_pairs(saved, data, tmp_path, capsys):
    out = tmp_path / "scores.jsonl"
    command = functools.partial(run, "evaluate")
    assert command("--model", saved, "--data", data, "--out", out, "--limit", 3) == 0
    assert "the chosen completion is preferred in" in capsys.readouterr().out
    assert len(out.read_text().splitlines()) == 3
    words = ["evaluate", "--model", str(saved), "--data", str(data), "--out", str(out)]
    for name, value in (("part", "1/2"), ("max_new_tokens", "9"), ("batch_size", "2")):
        told = fails(capsys, *words, f"--{name}", value)
        assert f"--{name} must not be given with preference pairs" in told


def test_pairs_that_cannot_be_read_are_refused_before_training(saved, data, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "CompactTrainer", None)  # a training would fail otherwise
    pair = json.loads(data.read_text().splitlines()[0])
    talk = [{"role": role, "content": pair["prompt"]} for role in ("system", "user")]
    data.write_text(json.dumps(pair | {"prompt": talk}) + "\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {saved}\nuse_peft: false\nuse_cpu: true\n")
    settings = read_settings(recipe, [])
    given = (str(tmp_path / "train.jsonl"), [str(data)], recipe, *settings)
    task = compare.file_task(*given, model=None, limit=None)
    with pytest.raises(ValueError, match="pairs.jsonl:1.*chat template"):
        compare.compare(task, [parse_arm("uniform")], [0], tmp_path)


def test_a_comparison_is_tested_on_pairs(saved, data, tmp_path, capsys):
    """Each arm learns from one side of the pairs, and prefers that."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {saved}\ndata: {tmp_path / 'train.jsonl'}\ntests: [{data}]\nseeds: [0]\n"
        "arms: ['single:good', 'single:wrong-step']\nper_device_train_batch_size: 4\n"
        "num_train_epochs: 15\nlearning_rate: 0.02\nuse_peft: false\nuse_cpu: true\n"
    )
    out = tmp_path / "out"
    assert main(["compare", "--config", str(recipe), "--out", str(out)]) == 0
    rows = [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
    (name,) = rows[0]["right"]
    assert len(rows[0]["right"][name]) == len(load_test(data))
    good, wrong = (row["accuracy"] for row in rows)
    assert good == 1.0
    assert wrong == 0.0
    assert name in (out / "paired.md").read_text()


def test_other_pairs_are_other_settings(data, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {tmp_path}\n")
    settings = read_settings(recipe, [])
    given = (str(tmp_path / "train.jsonl"), [str(data)], recipe, *settings)
    before = compare.file_task(*given, model=None, limit=None).about
    lines = data.read_text().splitlines(keepends=True)
    data.write_text("".join(lines[1:]))
    assert compare.file_task(*given, model=None, limit=None).about != before
