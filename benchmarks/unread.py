"""What a step saves by not reading rationales that are known to have no weight.

`python -m benchmarks.unread DATA` computes loss and gradients of the same problems twice, in turn:
once of all of their rationales, once of those that `CompactTrainer` reads. The student is
SmolLM2-135M with LoRA of rank 16. Problems that are left out altogether are in neither.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks import real
from compact.config import CompactConfig
from compact.data import load_problems
from compact.settings import RecipeConfig
from compact.student import peft_config
from compact.trainer import CompactTrainer
from compact.trainer.batches import Item


def tokens(items: Sequence[Item]) -> int:
    """Returns the completion tokens of the items."""
    return sum(len(r.ids) for item in items for r in item.problem.rationales)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints tokens and seconds of both, and their ratio; returns 0."""
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument("data", help="rationales as JSON lines")
    parse.add_argument("--preset", default="robust")
    parse.add_argument("--problems", type=int, default=48, help="of the data, at even distances")
    parse.add_argument("--batch", type=int, default=2, help="problems of a step")
    parse.add_argument("--bf16", action="store_true")
    options = parse.parse_args(argv)

    model, processing_class = real.smollm2()
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {"preset": options.preset, "bf16": options.bf16}
        args = CompactConfig(
            output_dir=folder, max_length=768, use_cpu=True, report_to="none", **settings
        )
        lora = peft_config(RecipeConfig(use_peft=True, lora_r=16, lora_alpha=32, lora_dropout=0.0))
        trainer = CompactTrainer(
            *(model, args, load_problems(options.data)),
            processing_class=processing_class,
            peft_config=lora,
        )
    data = trainer.train_dataset
    assert data is not None
    whole = {problem.question_id: Item(problem, True) for problem in data.problems}
    apart = max(len(data) // options.problems, 1)
    few = [data[i] for i in range(0, len(data), apart)][: options.problems]
    every = [whole[item.problem.question_id] for item in few]
    trainer.model.train()

    def seconds(items: Sequence[Item]) -> float:
        began = time.perf_counter()
        trainer.compute_loss(trainer.model, items).backward()
        spent = time.perf_counter() - began
        trainer.model.zero_grad()
        trainer._step.micros.clear()
        return spent

    found: list[tuple[float, float]] = []
    size = options.batch
    for start in range(0, len(few), size):
        both = few[start : start + size], every[start : start + size]
        if not start:
            seconds(both[1])  # the first step prepares the model
        turn = both if start % (2 * size) else both[::-1]
        spent = {id(items): seconds(items) for items in turn}
        found.append((spent[id(both[0])], spent[id(both[1])]))
    share = tokens(few) / tokens(every)
    a, b = map(sum, zip(*found, strict=True))
    print(f"{options.data}, {options.preset}: {len(few)} of {len(data)} problems")
    print(f"completion tokens: {tokens(few):,} of {tokens(every):,} are read ({share:.2f})")
    print(
        f"seconds: {a:.1f} of {b:.1f} ({a / b:.2f}; median of steps "
        f"{median(x / y for x, y in found):.2f})"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
