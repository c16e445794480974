"""How long training on large data takes to start: `python -m benchmarks.start --rationales 200000`.

The data are made from a file of rationales: its problems again and again, with other numbers in
every copy. The student is tiny, so that time and memory are those of reading and encoding. Memory
is what the process holds at its peak beyond what it holds once the student is loaded.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from random import Random
from typing import Any

_NUMBER = re.compile(r"\d+")


def copies(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields the rows again and again; each copy of the data has other numbers."""
    for copy in count():
        for row in rows:
            changed = Random(f"{copy}/{row['question_id']}").sample(range(2, 99), 10)
            # The same number becomes the same one in all rationales of a question.

            def other(match: re.Match[str], changed: list[int] = changed) -> str:
                return str(int(match[0]) + changed[int(match[0]) % 10])

            texts = {k: _NUMBER.sub(other, v) for k, v in row.items() if isinstance(v, str)}
            texts |= {"question_id": f"{row['question_id']}/{copy}"}
            texts |= {"teacher": row["teacher"]}
            yield row | texts


def memory() -> float:
    """Returns the peak of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the seconds until the first step and the memory; returns 0."""
    parse = argparse.ArgumentParser(description=__doc__)
    parse.add_argument("data", type=Path, help="rationales as JSON lines")
    parse.add_argument("--rationales", type=int, default=200_000)
    parse.add_argument("--workers", type=int, default=0, help="worker processes of the loader")
    options = parse.parse_args(argv)
    with options.data.open() as file:
        rows = [json.loads(line) for line in file]

    from transformers import TrainerCallback

    from compact.config import CompactConfig
    from compact.lab.zoo_student import build_model, build_tokenizer
    from compact.trainer import CompactTrainer

    class Stop(TrainerCallback):
        """Notes when the first step begins and ends, and ends the run."""

        at: list[float] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.at.append(time.monotonic())

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.at.append(time.monotonic())
            control.should_training_stop = True

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "data.jsonl")
        with path.open("w") as file:
            file.writelines(json.dumps(r) + "\n" for r in islice(copies(rows), options.rationales))
        tokenizer = build_tokenizer()
        model = build_model(tokenizer, 0, hidden=32, layers=1)
        args = CompactConfig(
            output_dir=str(Path(folder, "run")),
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            gradient_accumulation_steps=1,
            dataloader_num_workers=options.workers,
        )
        before, start, stop = memory(), time.monotonic(), Stop()
        run = CompactTrainer(model, args, path, processing_class=tokenizer, callbacks=[stop])
        made = time.monotonic()
        run.train()
        first, end = stop.at[:2]
        print(f"{options.rationales} rationales in {len(run.train_dataset or ())} problems")
        print(f"trainer made after {made - start:.1f} s, first step begins {first - start:.1f} s")
        print(f"first step ends {end - start:.1f} s; peak {memory() - before:.0f} MB above")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
