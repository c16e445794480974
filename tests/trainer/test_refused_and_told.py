"""What the trainer refuses or tells at the start, and what it evaluates."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    TrainerCallback,
)

from compact.config import CompactConfig
from compact.lab import zoo
from compact.lab.zoo_student import build_model, build_tokenizer
from compact.passes import lazily
from compact.trainer import CompactTrainer
from helpers.trajectories import WEIGHED

TOKENIZER = build_tokenizer()
ROWS = zoo.make_rows(("good", "verbose"), 4, seed=1)


def trainer_of(
    folder: Path,
    model: Any = None,
    data: Any = ROWS,
    evals: Any = None,
    callbacks: Any = None,
    **settings: Any,
) -> CompactTrainer:
    """A trainer of a tiny student, or of `model`, that trains every weight."""
    if model is None:
        model = build_model(TOKENIZER, seed=0, hidden=32, layers=1)
    settings = {"preset": "uniform", "max_length": 400, "max_steps": 1} | settings
    args = CompactConfig(output_dir=str(folder), use_cpu=True, report_to="none", **settings)
    return CompactTrainer(model, args, data, evals, TOKENIZER, callbacks)


def learned_positions(count: int) -> Any:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=len(TOKENIZER), n_positions=count, n_embd=32, n_layer=1, n_head=2)
    )


def test_rotary_positions_that_change_for_a_whole_batch(tmp_path: Path) -> None:
    """Some text may be longer than the sample of the data shows, so `max_length` counts."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = LlamaConfig(
        vocab_size=len(TOKENIZER),
        num_attention_heads=2,
        max_position_embeddings=399,
        rope_parameters=rope,
        **sizes,
    )
    with pytest.raises(ValueError, match="max_length must be at most 399, got 400"):
        trainer_of(tmp_path, LlamaForCausalLM(config))


def longest(rows: list[dict[str, Any]]) -> int:
    """The most tokens of prompt and rationale."""
    trainer = CompactTrainer(
        build_model(TOKENIZER, seed=0, hidden=32, layers=1),
        CompactConfig(output_dir="unused", use_cpu=True, report_to="none", preset="uniform"),
        rows,
        processing_class=TOKENIZER,
    )
    problems = trainer.train_dataset.problems.sample
    return max(len(p.prompt_ids) + len(r.ids) for p in problems for r in p.rationales)


def test_leaves_that_are_not_read_need_no_position(tmp_path: Path) -> None:
    trainer_of(tmp_path, learned_positions(longest(ROWS))).train()


def test_evaluation_data_are_checked_at_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short = zoo.make_rows(("good",), 2, seed=1)
    positions = longest(short)
    assert positions < longest(ROWS)
    with pytest.raises(ValueError, match=f"the student has learned {positions} positions"):
        trainer_of(tmp_path, learned_positions(positions), short, {"one": short, "two": ROWS})
    trainer_of(tmp_path, None, short, ROWS, max_length=positions)
    assert f"max_length {positions} cuts" in caplog.text


def test_other_data_are_evaluated(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, evals={"one": ROWS[:2], "two": ROWS})
    own = trainer.evaluate()
    assert own["eval_two_nll"] == pytest.approx(trainer.evaluate(ROWS)["eval_nll"])
    assert own["eval_one_nll"] == pytest.approx(trainer.evaluate("one")["eval_nll"])
    assert "eval_x_nll" in trainer.evaluate({"x": ROWS})
    with pytest.raises(ValueError, match="eval_dataset must be .*one, two.* got 'three'"):
        trainer.evaluate("three")
    with pytest.raises(ValueError, match="eval_dataset must be one data set, got none"):
        trainer_of(tmp_path).evaluate()
    with pytest.raises(NotImplementedError, match="predict: use `evaluate`"):
        trainer.predict(ROWS)


def test_a_data_set_of_the_hub_is_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if there are several data sets by name."""
    (tmp_path / "data").mkdir()
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "data/train.jsonl").write_text(text)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    trainer = trainer_of(tmp_path / "run", evals={"one": ROWS[:2], "two": ROWS[2:]})
    found = trainer.evaluate(f"hub:{tmp_path / 'data'}")
    assert found["eval_nll"] == pytest.approx(trainer.evaluate(ROWS)["eval_nll"])


def test_no_loss_is_not_the_best_loss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`rejection` on data without gold answers weighs nothing."""
    unknown = [{k: v for k, v in row.items() if k != "answer"} for row in ROWS]
    metrics = trainer_of(tmp_path, evals=unknown, preset="rejection").evaluate()
    assert "eval_loss" not in metrics and metrics["eval_nll"] > 0
    assert "no problem can have a loss; there is no eval_loss" in caplog.text


WRONG = zoo.make_rows(("wrong-step",), 2, seed=1)


@pytest.mark.parametrize("preset", ["rejection", "robust"])
def test_a_best_model_needs_a_loss(tmp_path: Path, preset: str) -> None:
    """At the start: transformers finds that there is none when it has trained for an epoch."""
    best = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    best |= {"load_best_model_at_end": True, "preset": preset}
    words = r"metric_for_best_model must be one of .*{}nll.*, got '{}': no problem can have a loss"
    with pytest.raises(ValueError, match=words.format("", "loss")):
        trainer_of(tmp_path, None, ROWS, WRONG, **best)
    sets, name = {"right": ROWS, "wrong": WRONG}, "eval_wrong_loss"
    with pytest.raises(ValueError, match=words.format("wrong_", name)):
        trainer_of(tmp_path, None, ROWS, sets, **best, metric_for_best_model=name)
    other = {"metric_for_best_model": "right_loss"}
    trainer_of(tmp_path / "a", None, ROWS, sets, **best, **other).train()
    trainer = trainer_of(tmp_path / "b", None, ROWS, WRONG, **best, metric_for_best_model="nll")
    trainer.train()
    assert trainer.state.best_metric == trainer.state.log_history[1]["eval_nll"]


@pytest.mark.parametrize(
    ("metric", "greater"),
    [("nll", False), ("eval_nll", False), ("a_nll", False), ("loss", False), ("gold_logp", True)],
)
def test_what_is_better_of_a_metric(metric: str, greater: bool) -> None:
    """The best model by nll was the worst one: transformers only knows names that end with loss."""
    assert CompactConfig(metric_for_best_model=metric).greater_is_better is greater
    set_by_hand = CompactConfig(metric_for_best_model=metric, greater_is_better=not greater)
    assert set_by_hand.greater_is_better is not greater


BEST: dict[str, Any] = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1}
BEST |= {"save_steps": 1, "load_best_model_at_end": True}


@pytest.mark.parametrize(
    ("evals", "settings", "words"),
    [
        ({"a": ROWS, "b": ROWS}, {}, "one of a_loss, a_nll, b_loss, b_nll, got 'loss'$"),
        ({"a": ROWS}, {"metric_for_best_model": "nll"}, "one of a_loss, a_nll, got 'nll'$"),
        (ROWS, {"metric_for_best_model": "accuracy"}, "one of loss, nll, got 'accuracy'$"),
        (ROWS, {"metric_for_best_model": "gold_logp"}, "one of loss, nll, got 'gold_logp'$"),
        ({"a": ROWS}, {"lr_scheduler_type": "reduce_lr_on_plateau"}, "one of a_loss, a_nll, got"),
    ],
)
def test_a_metric_that_is_not_reported_is_refused(
    tmp_path: Path, evals: Any, settings: dict[str, Any], words: str
) -> None:
    """At the start, not at the first evaluation."""
    with pytest.raises(ValueError, match=f"metric_for_best_model must be {words}"):
        trainer_of(tmp_path, evals=evals, **BEST | settings)


def test_metrics_that_are_reported_or_added_are_taken(tmp_path: Path) -> None:
    name = {"metric_for_best_model": "eval_gold_logp"}
    trainer = trainer_of(tmp_path / "a", evals=ROWS, **BEST | WEIGHED | name)
    trainer.train()
    assert trainer.state.best_metric == trainer.state.log_history[1]["eval_gold_logp"]

    class Accuracy(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            others["metrics"]["eval_accuracy"] = 0.5

    name = {"metric_for_best_model": "accuracy"}
    trainer = trainer_of(tmp_path / "b", evals=ROWS, callbacks=[Accuracy()], **BEST | name)
    trainer.train()
    assert trainer.state.best_metric == 0.5


def test_a_trainer_trains_once_unless_it_resumes(tmp_path: Path) -> None:
    """The running statistics and the strategy would go on, the schedule would start again."""
    trainer = trainer_of(tmp_path, save_strategy="steps", save_steps=1)
    trainer.train()
    for folder in (tmp_path, tmp_path / "other"):
        trainer.args.output_dir = str(folder)
        with pytest.raises(ValueError, match="resume_from_checkpoint must be given to train again"):
            trainer.train()
    trainer.args.max_steps = 2
    trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-1")
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("preset", ["rejection", "robust"])
@pytest.mark.parametrize("strategy", [None, "fragment-ema"])
def test_nothing_to_train_on_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str, strategy: str | None
) -> None:
    words = f"train_dataset must have a rationale that preset {preset} trains on, got none in 2 pr"
    with pytest.raises(ValueError, match=words):
        trainer_of(tmp_path, data=WRONG, preset=preset, strategy=strategy)
    monkeypatch.setattr(lazily, "AT_ONCE", 1)
    with pytest.raises(ValueError, match=words.replace("2 pr", "1 pr")):
        trainer_of(tmp_path, data=WRONG, preset=preset, strategy=strategy)


def test_an_optimizer_with_a_mode_is_told(tmp_path: Path) -> None:
    """As schedule-free ones have it: at other weights in evaluation than in training."""
    model = build_model(TOKENIZER, seed=0, hidden=32, layers=1)
    calls = []

    class Modal(torch.optim.SGD):
        def train(self) -> None:
            calls.append("train")

        def eval(self) -> None:
            calls.append("eval")

    optimizer = Modal(model.parameters(), lr=1e-3)
    args = CompactConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", preset="uniform", max_steps=2
    )
    args.eval_strategy, args.eval_steps = "steps", 1
    trainer = CompactTrainer(model, args, ROWS, ROWS, TOKENIZER, optimizers=(optimizer, None))
    trainer.train()
    assert "eval" in calls and calls[calls.index("eval") + 1] == "train"


def test_the_setting_resumes(tmp_path: Path) -> None:
    once = {"save_strategy": "steps", "save_steps": 1}
    trainer_of(tmp_path, **once).train()
    again = trainer_of(tmp_path, **once | {"max_steps": 2}, resume_from_checkpoint=True)
    again.train()
    assert again.state.global_step == 2 and [e["step"] for e in again.state.log_history][0] == 1
    with pytest.raises(ValueError, match="checkpoint"):
        trainer_of(tmp_path / "new", resume_from_checkpoint=True).train()


def test_a_student_with_nothing_to_train(tmp_path: Path) -> None:
    model = build_model(TOKENIZER, seed=0, hidden=32, layers=1).requires_grad_(False)
    with pytest.raises(ValueError, match="requires a gradient, got none; .* is_trainable=True"):
        trainer_of(tmp_path, model)


def test_a_template_without_an_end_of_turn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = TOKENIZER.chat_template
    trainer_of(tmp_path)
    assert "learn to stop" not in caplog.text
    try:
        TOKENIZER.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
        trainer_of(tmp_path)
    finally:
        TOKENIZER.chat_template = own
    assert "puts no end-of-turn token after a completion" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"include_num_input_tokens_seen": "all"}, "include_num_input_tokens_seen must be no"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches .* must be false"),
    ],
)
def test_settings_without_effect(tmp_path: Path, settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, **settings)


def test_what_a_model_object_ignores_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer_of(tmp_path, model_init_kwargs={"dtype": "bfloat16"})
    assert "model_init_kwargs: without effect" in caplog.text


def test_columns_of_the_template_are_refused(tmp_path: Path) -> None:
    for column, value in (("tools", [{}]), ("chat_template_kwargs", {"enable_thinking": True})):
        with pytest.raises(ValueError, match=f"row 0: {column} must be empty"):
            trainer_of(tmp_path, data=[ROWS[0] | {column: value}])


def windowed(reach: int) -> Any:
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=len(TOKENIZER),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            sliding_window=reach,
        )
    )


def test_padded_rows_are_told_and_keep_the_leaf_budget(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A leaf repeats prompt and rationale there, so the budget holds fewer of them."""
    given = WEIGHED | {"max_length": 200}
    caplog.set_level(logging.INFO)
    tree = trainer_of(tmp_path, windowed(300), **given)
    assert tree.layout == "tree"
    padded = trainer_of(tmp_path, windowed(150), **given)
    assert padded.layout == "padded"
    (told,) = [r for r in caplog.records if r.levelno == logging.WARNING and "layout" in r.msg]
    assert "its attention reaches 150 tokens" in told.getMessage()
    for trainer, most in ((tree, 0.25), (padded, 1.3)):  # the last step of each is always asked
        problem = trainer.train_dataset[0].problem
        batch = trainer._loss.build([problem], leaves=True)
        assert int(batch.leaves.attention_mask.sum()) <= most * int(batch.main.attention_mask.sum())


def test_the_longest_answer_counts_for_the_window(tmp_path: Path) -> None:
    """An answer of more tokens than a guess of 32: known at the start, not in the middle."""
    rows = [row | {"answer": "1 " * 45, "answer_type": "text"} for row in ROWS[:2]]
    trainer = trainer_of(tmp_path, windowed(200 + 40), rows, **WEIGHED, max_length=200)
    assert trainer.layout == "padded"
    trainer.train()


def of_lengths(*answers: int) -> list[dict[str, Any]]:
    """Rows with answers of so many words, and rationales of more than 50 tokens."""
    texts = [row["completion"] for row in zoo.make_rows(("verbose",), len(answers), seed=1)]
    return [
        {
            "question_id": f"q{i}",
            "prompt": "Ann has 3 beads.",
            "teacher": "a",
            "completion": text,
            "answer": "1 " * length,
            "answer_type": "text",
        }
        for i, (text, length) in enumerate(zip(texts, answers, strict=True))
    ]


def test_answers_beyond_the_sample_have_room_in_the_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sample has short answers: as much room is kept as for an answer that is not known."""
    monkeypatch.setattr(lazily, "AT_ONCE", 2)
    own: dict[str, Any] = WEIGHED | {"max_length": 50, "max_steps": 4}
    own["per_device_train_batch_size"] = 1
    rows = of_lengths(20, 2, 20, 2)  # the sample is of the second and the fourth
    for window, layout in ((64, "padded"), (50 + 32, "tree")):
        trainer = trainer_of(tmp_path / str(window), windowed(window), rows, **own)
        assert trainer.layout == layout
        trainer.train()
    without_leaves = trainer_of(tmp_path, windowed(50), rows, max_length=50)
    assert without_leaves.layout == "tree"
    trainer = trainer_of(tmp_path / "named", windowed(82), of_lengths(2, 2, 40, 2), **own)
    words = "question_id 'q2': prompt, rationale and .* at most 82 tokens in a tree, .*layout: pad"
    with pytest.raises(ValueError, match=words):
        trainer.train()


def test_data_that_are_given_later_must_be_within_the_window(tmp_path: Path) -> None:
    own: dict[str, Any] = WEIGHED | {"max_length": 50}
    trainer = trainer_of(tmp_path, windowed(82), of_lengths(2, 2), **own)
    assert trainer.layout == "tree" and trainer.evaluate(of_lengths(20))["eval_nll"] > 0
    with pytest.raises(ValueError, match=r"question_id 'q1': .* 82 tokens in a tree, .* got \d+;"):
        trainer.get_eval_dataloader(of_lengths(2, 40))
