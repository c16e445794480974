"""TRL's names: taken with their meaning or refused in one line, and the docs show the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compact import CompactConfig, CompactTrainer, sft_names
from compact.commands.recipe import read_settings
from compact.lab import zoo
from compact.lab.zoo_student import build_model, build_tokenizer

DOCS = Path(__file__).parents[1] / "docs" / "trainer.md"
# The fields of SFTConfig of TRL 1.16 that transformers lacks, and older ones, with their defaults.
OF_TRL: dict[str, Any] = {
    "model_init_kwargs": None,
    "trust_remote_code": False,
    "router_aux_loss_coef": None,
    "chat_template_path": None,
    "dataset_text_field": "text",
    "dataset_kwargs": None,
    "dataset_num_proc": None,
    "eos_token": None,
    "max_length": 1024,
    "truncation_mode": "keep_start",
    "shuffle_dataset": False,
    "packing": False,
    "packing_strategy": "bfd",
    "padding_free": False,
    "pad_to_multiple_of": "auto",
    "eval_packing": None,
    "completion_only_loss": None,
    "assistant_only_loss": False,
    "loss_type": "nll",
    "activation_offloading": False,
    "pad_token": None,
    "dataset_batch_size": 1000,
    "neftune_noise_alpha": None,
    "num_of_sequences": 1024,
    "chars_per_token": 3.6,
    "use_liger_kernel": False,
}


def test_the_defaults_of_trl_are_accepted() -> None:
    config = CompactConfig(output_dir="x", **OF_TRL)
    assert config.max_length == 1024
    assert config.to_dict() == CompactConfig(output_dir="x", max_length=1024).to_dict()


OTHER_VALUES: dict[str, Any] = {
    "dataset_kwargs": {"skip_prepare_dataset": True},
    "dataset_text_field": "body",
    "completion_only_loss": False,
    "eos_token": "<|im_end|>",
    "pad_token": "<pad>",
    "chat_template_path": "t.jinja",
    "truncation_mode": "keep_end",
    "loss_type": "sum",
    "neftune_noise_alpha": 5.0,
    "label_smoothing_factor": 0.1,
    "router_aux_loss_coef": 0.01,
    "include_for_metrics": ["loss"],
    "torch_compile_backend": "inductor",
    "torch_compile_mode": "default",
}


@pytest.mark.parametrize("name", sorted(sft_names.SETTINGS))
def test_each_setting_is_refused_in_one_line_or_takes_any_value(name: str, tmp_path: Path) -> None:
    rule = sft_names.SETTINGS[name]
    value = OTHER_VALUES.get(name, 512 if name == "max_seq_length" else True)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: m\n{name}: {json.dumps(value)}\n")
    if rule.accepted is sft_names.ANY:
        CompactConfig(**{name: value})
        assert read_settings(recipe, [])
        return
    for make in (
        lambda: CompactConfig(**{name: value}),
        lambda: read_settings(recipe, []),
    ):
        with pytest.raises(ValueError, match=f"{name} must be .*: .*, got ") as error:
            make()
        assert rule.instead in str(error.value) and "\n" not in str(error.value)


def test_names_that_become_others(tmp_path: Path) -> None:
    config = CompactConfig(max_seq_length=99, loss_type="dft")
    assert (config.max_length, config.token_weights) == (99, "dft")
    _, config = read_settings(None, ["--max_seq_length", "98", "--packing=false"])
    assert config.max_length == 98
    assert read_settings(None, ["--max_seq_length", "1_024"])[1].max_length == 1024
    with pytest.raises(
        ValueError, match="^--max_seq_length: max_seq_length must be a whole number"
    ):
        read_settings(None, ["--max_seq_length", "long"])
    with pytest.raises(ValueError, match="max_seq_length must not stand beside max_length"):
        CompactConfig(max_seq_length=99, max_length=98)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("packing: true\n")
    with pytest.raises(ValueError, match=r"recipe.yaml:1: packing must be False: .*layout: tree"):
        read_settings(recipe, [])
    with pytest.raises(ValueError, match="--max_seq_length: max_seq_length must not stand beside"):
        read_settings(None, ["--max_seq_length", "98", "--max_length", "99"])
    for value in (None, "long"):
        with pytest.raises(
            ValueError, match=f"max_length must be a whole number of at least 2, got {value!r}"
        ):
            CompactConfig(max_length=value)
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_len'"):
        CompactConfig(max_len=3)


def trainer(folder: Path, **arguments: Any) -> CompactTrainer:
    tokenizer = build_tokenizer()
    settings = CompactConfig(output_dir=str(folder), report_to="none", use_cpu=True)
    arguments.setdefault("processing_class", tokenizer)
    rows = zoo.make_rows(("good",), 2, seed=1)
    model = build_model(tokenizer, seed=0, hidden=32, layers=1)
    return CompactTrainer(model, settings, train_dataset=rows, **arguments)


@pytest.mark.parametrize("name", sorted(sft_names.ARGUMENTS.keys() - {"tokenizer"}))
def test_each_argument_is_refused_unless_none(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name} must be None: ") as error:
        trainer(tmp_path, **{name: print})
    assert sft_names.ARGUMENTS[name].instead in str(error.value)


def test_arguments(tmp_path: Path) -> None:
    own = build_tokenizer()
    nothing = dict.fromkeys(sft_names.ARGUMENTS.keys() - {"tokenizer"})
    made = trainer(tmp_path, tokenizer=own, processing_class=None, **nothing)
    assert made.processing_class is own
    with pytest.raises(ValueError, match="tokenizer must not stand beside processing_class"):
        trainer(tmp_path, tokenizer=own)
    with pytest.raises(TypeError, match="no argument 'packing'; settings belong into args="):
        trainer(tmp_path, packing=True)
    with pytest.raises(TypeError, match="no argument 'datasets'$"):
        trainer(tmp_path, datasets=1)


def test_the_docs_show_the_tables() -> None:
    text = DOCS.read_text()
    for table in (sft_names.SETTINGS, sft_names.ARGUMENTS):
        assert sft_names.as_markdown(table) in text
