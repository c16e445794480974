"""The arguments of TRL's SFTTrainer, taken with the same meaning; three lines change."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback

from compact.config import CompactConfig
from compact.lab import zoo
from compact.lab.zoo_student import END, build_model, build_tokenizer
from compact.trainer import CompactTrainer
from helpers.toy import save_student

DOCS = Path(__file__).parents[2] / "docs" / "trainer.md"
ROWS = zoo.make_rows(("good", "verbose"), 4, seed=5)
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def settings(folder: Path, **changed: Any) -> dict[str, Any]:
    values = {
        "output_dir": str(folder),
        "max_length": 400,
        "max_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return values | changed


def test_the_changed_lines_of_the_docs(tmp_path: Path) -> None:
    """docs/trainer.md shows what changes in a script for SFTTrainer; the result runs."""
    diff = re.search(r"```diff\n(.*?)```", DOCS.read_text(), re.S)
    assert diff is not None
    new = [line[1:] for line in diff[1].splitlines() if line.startswith("+")]
    assert len(new) == 2 and "SFT" not in "".join(new)
    script = "\n".join(new).replace("CompactConfig(...)", "CompactConfig(**settings)")
    tokenizer = build_tokenizer()
    names: dict[str, Any] = {
        "model": build_model(tokenizer, seed=0, hidden=32, layers=1),
        "settings": settings(tmp_path),
        "dataset": datasets.Dataset.from_list(ROWS),
        "tokenizer": tokenizer,
        "peft": LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
    }
    exec(script, names)
    names["trainer"].train()
    names["trainer"].save_model()
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    assert any(bool((tensor != 0).any()) for name, tensor in adapter.items() if "lora_B" in name)


class Recorder(TrainerCallback):
    """Keeps what was logged."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:  # noqa: ANN001, ANN003
        self.logs.append(logs)


def test_names_paths_evaluation_callbacks_and_tensorboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model by name, data by path, several evaluation sets, a callback, report_to."""
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    save_student(tmp_path / "student")
    data = tmp_path / "rationales.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    recorder = Recorder()
    trainer = CompactTrainer(
        str(tmp_path / "student"),
        args=CompactConfig(
            **settings(tmp_path / "run", report_to="tensorboard", eval_strategy="steps"),
            eval_steps=1,
            model_init_kwargs={"attn_implementation": "eager"},
        ),
        train_dataset=str(data),
        eval_dataset={"few": ROWS[:2], "all": datasets.Dataset.from_list(ROWS)},
        callbacks=[recorder],
    )
    assert trainer.model.config._attn_implementation == "eager"
    trainer.train()
    names = {name for logs in recorder.logs for name in logs}
    assert {"loss", "eval_few_loss", "eval_all_nll", "eval_all_gold_logp"} <= names
    board = event_accumulator.EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    tags = set(board.Tags()["scalars"])
    assert {"train/loss", "train/weight/good", "train/weight/verbose", "eval/all_loss"} <= tags
    losses = [event.value for event in board.Scalars("train/loss")]
    assert losses == pytest.approx([logs["loss"] for logs in recorder.logs if "loss" in logs])


def test_chat_messages_are_trained_as_the_template_writes_them(tmp_path: Path) -> None:
    """Prompt and completion as messages: the loss is that of the template's completion tokens."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    chats = [
        row
        | {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        for row in ROWS
    ]
    model = build_model(tokenizer, seed=0, hidden=32, layers=1)
    expected = []
    for row in chats:
        ask = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        text = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
        ids = tokenizer(text.removesuffix("\n") if not text.endswith(END) else text)["input_ids"]
        labels = torch.tensor([[-100] * len(ask) + ids[len(ask) :]])
        with torch.no_grad():
            expected.append(float(model(torch.tensor([ids]), labels=labels).loss))
    trainer = CompactTrainer(
        model,
        CompactConfig(**settings(tmp_path, max_steps=1, preset="uniform")),
        train_dataset=chats,
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(
        sum(expected) / len(expected), abs=1e-4
    )
