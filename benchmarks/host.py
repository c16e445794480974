"""Host time of an optimizer step beyond body and head, beside transformers.Trainer.

Both trainers run their own training loop on the same rationales: P zoo problems with K rationales
each a step, one micro-batch, AdamW, a log line after every step. The student is tiny, so that most
of a step is the work around it; `student=lora` has LoRA on every linear layer of the body, which
peft makes of ten modules each.

- `trainer`: transformers.Trainer on P K padded rows, which were tokenised beforehand.
- `compact`: CompactTrainer with the default preset `robust`, tree layout and answer leaves.
- `compact-no-leaves`: the same with uniform weights, without answer leaves.

The time of a step goes from the end of the step before to its own end, so it has everything: taking
the batch, collating, moving, scoring, weighting, clipping, the optimizer, the schedule, records and
logs. What each trainer spends in body and head is subtracted, in the very same steps:

- forward: the calls of the body (main block and leaves) and of the head operator; with
  transformers' Trainer, the call of the model, which has its loss inside;
- backward: from the moment the gradient reaches the output of the head (a hook on it) until
  `backward` returns.

What is left is the figure: its median over the steps of a run, in CPU seconds of the thread that
runs the loop, which waits for nothing here; so other work on the machine matters little. It belongs
to the trainer, however many tokens a layout gives to the body. Loss and gradient norm of the first
step are checked against full logits of padded rows. The learning rate is 0, so that every run takes
the same steps.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerState

from benchmarks.harness import Args, Outputs, Provider, Skipped
from benchmarks.students import full_loss
from compact.config import CompactConfig
from compact.lab import zoo
from compact.lab.zoo_student import build_model, build_tokenizer
from compact.passes import EncodedProblem
from compact.passes.forward import observe
from compact.student import Student
from compact.trainer import CompactTrainer
from compact.weighting import make_weigher

TITLE = "What a trainer does in a step besides body and head"
LEGEND = (
    "CPU time of an optimizer step outside of body and head: taking the batch, collating, scores, "
    "weights, clipping, the optimizer, records and log lines. P zoo problems with K rationales "
    "each, a tiny student. `trainer` is transformers' Trainer on padded rows; `compact` is "
    "CompactTrainer with the default preset and answer leaves, `compact-no-leaves` with uniform "
    "weights. Each trainer's own time in body and head, forward and backward, is subtracted in the "
    "same steps; benchmarks/host.py says how. Memory is that of whole steps."
)
SHAPES: tuple[dict[str, int | str], ...] = (
    {"P": 4, "K": 4, "student": "whole"},
    {"P": 4, "K": 4, "student": "lora"},
)
DTYPES = ("float32",)
STEPS, WARM = 14, 4  # steps of a run; the first ones are not counted
LORA = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
# All are right: what is wrong, `robust` would not read, and the other trainer would.
TEACHERS = ("good", "verbose", "style-shifted", "honest", "friendly", "filler")


class Watch(TrainerCallback):
    """The time of each step, and what of it was spent in body and head.

    Attributes:
        steps: (seconds of the step, seconds in body and head) of each step but the first.
    """

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []
        self._inside = 0.0
        self._end: float | None = None  # of the step before
        self._open: list[float] = []  # when the calls that have not returned were entered
        self._arrived: float | None = None  # when the gradient reached the head

    @property
    def seconds(self) -> float:
        """Median of the seconds of a step outside of body and head."""
        return median(whole - inside for whole, inside in self.steps[WARM:])

    def enter(self, *_: Any) -> None:
        """A call of body or head begins."""
        self._open.append(time.thread_time())

    def leave(self, *_: Any) -> None:
        """It returns."""
        self._inside += time.thread_time() - self._open.pop()

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Returns `call` with its time counted."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.enter()
            try:
                return call(*args, **kwargs)
            finally:
                self.leave()

        return timed

    def await_gradient(self, output: Tensor) -> None:
        """The backward of body and head begins when the gradient of `output` is there."""

        def arrive(_: Tensor) -> None:
            if self._arrived is None:
                self._arrived = time.thread_time()

        if output.requires_grad:
            output.register_hook(arrive)

    def around_backward(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        """Returns `backward` with its time counted from the arrival of the gradient."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            found = backward(*args, **kwargs)
            assert self._arrived is not None
            self._inside += time.thread_time() - self._arrived
            self._arrived = None
            return found

        return timed

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """A run begins."""
        self.steps, self._inside, self._end = [], 0.0, None

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """An optimizer step is taken; its log line belongs to the next one."""
        now = time.thread_time()
        if self._end is not None:
            self.steps.append((now - self._end, self._inside))
        self._inside, self._end = 0.0, now

    @contextmanager
    def of_trainer(self, trainer: Trainer) -> Iterator[None]:
        """Within the context, counts the time that transformers' Trainer spends in the model."""
        model: nn.Module = trainer.model

        def leave(_: Any, __: Any, output: Any) -> None:
            self.leave()
            self.await_gradient(output.loss)

        hooks = [model.register_forward_pre_hook(self.enter), model.register_forward_hook(leave)]
        with mock.patch.object(
            trainer.accelerator, "backward", self.around_backward(trainer.accelerator.backward)
        ):
            yield
        for hook in hooks:
            hook.remove()

    @contextmanager
    def of_compact(self, trainer: CompactTrainer) -> Iterator[None]:
        """Within the context, counts the time that our trainer spends in body and head."""
        body = trainer.student.body
        head = self.around(Student.token_stats)

        def head_of(*args: Any, **kwargs: Any) -> Any:
            stats = head(*args, **kwargs)
            self.await_gradient(stats.nll)
            return stats

        hooks = [
            body.register_forward_pre_hook(self.enter),
            body.register_forward_hook(self.leave),
        ]
        with (
            mock.patch.object(Student, "token_stats", head_of),
            mock.patch.object(
                trainer.accelerator, "backward", self.around_backward(trainer.accelerator.backward)
            ),
        ):
            yield
        for hook in hooks:
            hook.remove()


def settings(problems: int) -> dict[str, Any]:
    """The settings of both trainers."""
    return {
        "per_device_train_batch_size": problems,
        "gradient_accumulation_steps": 1,
        "max_steps": STEPS,
        "learning_rate": 0.0,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
    }


def rows_of(problems: Sequence[EncodedProblem]) -> list[dict[str, list[int]]]:
    """The rationales as rows of token ids and labels, for transformers' Trainer."""
    return [
        {
            "input_ids": [*p.prompt_ids, *r.ids],
            "labels": [-100] * len(p.prompt_ids) + list(r.ids),
            "attention_mask": [1] * (len(p.prompt_ids) + len(r.ids)),
        }
        for p in problems
        for r in p.rationales
    ]


def gradient_norm(model: nn.Module) -> Tensor:
    """The norm of all gradients, as clipping reports it."""
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    return torch.stack(norms).norm()


def providers(args: Args) -> dict[str, Provider | Skipped]:
    """Trainer of transformers, and ours with and without answer leaves."""
    if args.device.type != "cpu":
        return {"trainer": Skipped("this case measures the CPU step")}
    count, teachers = int(args.shape["P"]), int(args.shape["K"])
    kind = args.shape["student"]
    if kind not in ("whole", "lora"):
        raise ValueError(f"--shape: student of host must be whole or lora; got student={kind}")
    if teachers > len(TEACHERS):
        raise ValueError(f"--shape: host takes K up to {len(TEACHERS)}; got K={teachers}")
    tokenizer = build_tokenizer()
    data = zoo.make_rows(TEACHERS[:teachers], count * STEPS, seed=args.seed)
    folder = tempfile.mkdtemp(prefix="host-")

    def student() -> Any:
        model = build_model(tokenizer, args.seed)
        return model if kind == "whole" else get_peft_model(model, LORA)

    def ours(preset: str) -> CompactTrainer:
        own: dict[str, Any] = settings(count) | {"output_dir": f"{folder}/{preset}"}
        config = CompactConfig(preset=preset, layout="tree", **own)
        return CompactTrainer(student(), config, data, processing_class=tokenizer)

    @functools.cache
    def encoded() -> list[EncodedProblem]:
        problems = ours("robust").train_dataset
        assert problems is not None
        return [problems[i].problem for i in range(len(problems))]

    def theirs() -> Trainer:
        rows: Any = rows_of(encoded())
        own = settings(count) | {"output_dir": f"{folder}/trainer"}
        own["per_device_train_batch_size"] = count * teachers
        return Trainer(
            student(),
            TrainingArguments(**own),
            train_dataset=rows,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
        )

    def expected(weight_of: Callable[[nn.Module, list[EncodedProblem]], Tensor]) -> Any:
        @functools.cache
        def found() -> Outputs:
            model, first = student().train(), encoded()[:count]
            weight = weight_of(model, first)
            loss = full_loss(model, first, tokenizer.pad_token_id, weight)
            loss.backward()
            return {"loss": loss.detach(), "gradient_norm": gradient_norm(model)}

        return found

    def by_length(_: nn.Module, first: list[EncodedProblem]) -> Tensor:
        lengths = torch.tensor([float(len(r.ids)) for p in first for r in p.rationales])
        return lengths / lengths.sum()

    def by_policy(name: str) -> Callable[[nn.Module, list[EncodedProblem]], Tensor]:
        def weights(model: nn.Module, first: list[EncodedProblem]) -> Tensor:
            weigher = make_weigher(name)
            pass_ = observe(Student.of(model, tokenizer), first, leaves=weigher.needs.leaves)
            return weigher(pass_).weight / len(first)

        return weights

    def provider(make: Callable[[], Trainer], reference: Any) -> Provider:
        watch, held = Watch(), dict[str, Trainer]()

        def setup() -> None:
            held["trainer"] = trainer = make()
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(watch)

        def run() -> Outputs:
            trainer = held["trainer"]
            trainer.state = TrainerState()  # it counts as new, so it trains again
            ours = isinstance(trainer, CompactTrainer)
            with watch.of_compact(trainer) if ours else watch.of_trainer(trainer):
                trainer.train()
            first = trainer.state.log_history[0]
            return {
                "loss": torch.tensor(first["loss"]),
                "gradient_norm": torch.tensor(first["grad_norm"]),
            }

        return Provider(run, reference, 2e-3, setup, seconds=lambda: watch.seconds)

    return {
        "trainer": provider(theirs, expected(by_length)),
        "compact": provider(functools.partial(ours, "robust"), expected(by_policy("robust"))),
        "compact-no-leaves": provider(
            functools.partial(ours, "uniform"), expected(by_policy("uniform"))
        ),
    }
