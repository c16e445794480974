"""TRL's SFTTrainer as a provider of the training step."""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from benchmarks.harness import Outputs, Provider, Skipped


def trl_sft(
    model: nn.Module,
    processing_class: Any,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    outputs_of: Callable[[Tensor, nn.Module], Outputs],
    expected: Callable[[], Outputs],
    rtol: float = 1e-4,
) -> Provider | Skipped:
    """Returns forward and backward of one batch by SFTTrainer.training_step.

    The trainer changes its model, so it gets a copy. Gradient checkpointing, which TRL turns on by
    default, is off, as for the other providers.

    Args:
        model: the student, adapters included.
        processing_class: its tokenizer.
        rows: (prompt ids, completion ids) of each rationale: one batch.
        outputs_of: (loss, model with gradients) -> what is compared.
        expected: the reference.
        rtol: as in Provider.
    """
    if importlib.util.find_spec("trl") is None:
        return Skipped("trl is not installed")
    held: dict[str, Any] = {}

    def setup() -> None:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        own = copy.deepcopy(model)
        config = SFTConfig(
            output_dir=tempfile.mkdtemp(prefix="trl-"),
            per_device_train_batch_size=len(rows),
            gradient_checkpointing=False,
            use_cpu=next(model.parameters()).device.type == "cpu",
            bf16=False,
            max_length=None,
            report_to="none",
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        table = [
            {"input_ids": [*prompt, *answer], "labels": [-100] * len(prompt) + list(answer)}
            for prompt, answer in rows
        ]
        trainer = SFTTrainer(
            own, config, train_dataset=Dataset.from_list(table), processing_class=processing_class
        )
        trainer.current_gradient_accumulation_steps = 1  # as its training loop would set it
        held["trainer"], held["model"] = trainer, own
        held["batch"] = trainer.data_collator(table)

    def run() -> Outputs:
        loss = held["trainer"].training_step(held["model"], dict(held["batch"]))
        return outputs_of(loss, held["model"])

    def reset() -> None:
        held["model"].zero_grad(set_to_none=True)

    return Provider(run, expected, rtol, setup, reset)
