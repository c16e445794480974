"""`CompactTrainer`: transformers' Trainer on problems with K rationales, weighed as it trains.

A micro-batch is a list of problems. Its one forward gives token statistics without ever holding
full logits; the weigher turns them into a weight a rationale; the loss of a step is

    L = (1 / N) sum_p [ sum_k alpha_k D_k + lambda sum_{i<j} alpha_i alpha_j symKL(P_i, P_j) ]

over the N problems of the whole optimizer step (D_k: mean over the tokens of rationale k), whatever
the micro-batches, the accumulation and the ranks. Weights carry no gradient.
"""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, gather_object
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints, set_seed

from compact.batches import Item, ProblemBatches, ProblemDataset, ProblemLoader
from compact.checkpoints import (
    UNFINISHED_MODEL,
    clear_unfinished,
    damage,
    move_whole,
    newest_whole,
    publish,
    staging_folder,
)
from compact.config import CompactConfig
from compact.consistency import consistency_loss
from compact.data import Problem, load_problems, of_teacher
from compact.encode import encode_problem
from compact.files import write_whole
from compact.forward import run_pass
from compact.layout import choose_layout
from compact.metrics import AXES
from compact.metrics.segments import segment_mean
from compact.packing import build_batch
from compact.passes import EncodedProblem, Pass
from compact.runlog import ScoreLog
from compact.student import Student, base_name, load_student
from compact.weighting import PresetWeigher, Weights, make_weigher

if TYPE_CHECKING:
    import datasets
    from peft import PeftConfig

logger = logging.getLogger(__name__)

_STATE_FILE = "compact_state.json"
_TOKEN = re.compile(r"(--\w*token[ =])\S+")  # a secret on the command line
_PACKAGES = ("compact-distill", "torch", "transformers", "accelerate", "peft")


class NonFiniteError(ValueError):
    """A loss or gradient that is not finite; the message names the problem and what it was."""


@dataclass(frozen=True)
class ProblemRecord:
    """What a problem left in a step, as plain numbers.

    Attributes:
        question_id: of the problem.
        teachers, tokens: [K] who wrote each rationale, and the tokens of its completion.
        weight, nll: [K].
        scores, zscores: axis -> [K]; empty for plain policies.
        gains: log-likelihood of the gold answer at each answer leaf, the bare question's last; None
            without probes.
    """

    question_id: str
    teachers: list[str]
    tokens: list[int]
    weight: list[float]
    nll: list[float]
    scores: dict[str, list[float]]
    zscores: dict[str, list[float]]
    gains: list[float] | None

    @property
    def has_loss(self) -> bool:
        """False where a policy gave every rationale weight 0."""
        return any(weight > 0 for weight in self.weight)


@dataclass(frozen=True)
class _Work:
    """A micro-batch on its way through the model's forward: opaque to DDP and FSDP."""

    items: Sequence[Item]


class CompactTrainer(Trainer):
    """Trains a student on the rationales of several teachers.

    Takes those arguments of TRL's SFTTrainer that apply here, with the same meaning.
    """

    args: CompactConfig

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        args: CompactConfig | None = None,
        train_dataset: str | Path | datasets.Dataset | Sequence[Any] | None = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: PeftConfig | None = None,
    ) -> None:
        """Loads and checks everything before the first step.

        Args:
            model: a causal LM, its name or folder, or a .gguf file. A folder with an adapter, as a
                run leaves it: the adapter is trained on.
            args: settings; the defaults of `CompactConfig` when None.
            train_dataset: rationales as rows, a path or a datasets.Dataset (see
                `compact.data.load_problems`), or a list of problems.
            eval_dataset: the same, or a mapping of names to them.
            processing_class: the tokenizer; the model's own where the model is given by name.
            callbacks: besides transformers' own.
            optimizers: optimizer and schedule, made from `args` where None.
            peft_config: adapters to train instead of every weight; None where model has some.

        Raises:
            ValueError, TypeError: an argument, a row of the data or a setting that cannot be used.
            OSError: a file that cannot be read.
        """
        args = args if args is not None else CompactConfig()
        if not isinstance(args, CompactConfig):
            raise TypeError(f"args must be a CompactConfig, got {type(args).__name__}")
        if is_deepspeed_zero3_enabled():
            raise ValueError(
                "zero_stage must be 1 or 2, got 3: it takes the LM head's weight away; "
                "fsdp2 shards parameters too"
            )
        self.weigher = make_weigher(args.preset, **(args.overrides or {}))
        if args.probe_every > 1 and self.weigher.leaf_hidden_readers:
            raise ValueError(
                f"probe_every must be 1 with {self.weigher.leaf_hidden_readers[0]}, which reads "
                f"the hidden states of fresh answer leaves, got {args.probe_every}"
            )
        problems = None if train_dataset is None else _problems_of(args.preset, train_dataset)
        if isinstance(model, str | Path):
            self._student_name = base_name(str(model))
            model, own = load_student(model, is_trainable=True, **(args.model_init_kwargs or {}))
            processing_class = processing_class if processing_class is not None else own
        else:
            self._student_name = str(model.config.name_or_path or type(model).__name__)
        if processing_class is None:
            raise ValueError("processing_class must be given where model is no name, got None")
        if peft_config is not None:
            from peft import get_peft_model

            if hasattr(model, "peft_config"):
                raise ValueError(
                    "peft_config must be None with a model that has adapters, which are then "
                    "trained on; merge them (merge_and_unload) to train new ones"
                )
            set_seed(args.seed)  # LoRA matrices start at random
            model = get_peft_model(model, peft_config)

        def encode(dataset: Any) -> ProblemDataset:
            length, problems = args.max_length, _problems_of(args.preset, dataset)
            return ProblemDataset(
                [encode_problem(p, processing_class, max_length=length) for p in problems]
            )

        if isinstance(eval_dataset, Mapping):
            evals: Any = {name: encode(e) for name, e in eval_dataset.items()}
        else:
            evals = None if eval_dataset is None else encode(eval_dataset)
        if args.n_gpu > 1:
            logger.warning("one process uses one GPU; start %d with accelerate", args.n_gpu)
            args._n_gpu = 1
        if (
            args.bf16
            and args.device.type == "cpu"
            and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        ):
            logger.warning(
                "bf16: this CPU has no instructions for it, and products take tens of times as "
                "long as without"
            )
        _let_cpu_ranks_shard()
        super().__init__(
            model=model,
            args=args,
            data_collator=list,
            train_dataset=None if problems is None else encode(problems),
            eval_dataset=evals,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise ValueError("fsdp_version must be 2, got 1: its wrapper hides the LM head")
        # compute_loss divides by the problems of the step; transformers must not divide again.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self.student = Student.of(self.model, processing_class)
        packing = args.packing
        if self.weigher.needs_padded:
            if packing == "tree":
                raise ValueError(f"packing must be auto or padded with {args.preset}, got 'tree'")
            packing = "padded"
        self.layout, reason = choose_layout(self.student, packing, args.max_length)
        logger.info("packing: %s (%s)", self.layout, reason)
        pad = processing_class.pad_token_id
        self._pad_token_id = processing_class.eos_token_id if pad is None else pad
        self.data_name = str(train_dataset) if isinstance(train_dataset, str | Path) else None
        self._kept_gains: dict[str, list[float]] = {}
        self._micros: list[list[ProblemRecord]] = []  # counted problems of the step so far
        self._not_finite: str | None = None  # what this rank met in the step so far
        self._step_loss = torch.zeros(())
        self._sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._score_log: ScoreLog | None = None

    # The loss of a micro-batch.

    def _forward(self, work: _Work) -> tuple[Tensor, list[ProblemRecord]]:
        """Runs a micro-batch in place of the model's own forward, so inside DDP, FSDP or DeepSpeed.

        Returns:
            The loss summed over the counted problems (scalar), and a record of each problem; none
            where `_meet_not_finite` lets a loss that is not finite pass.

        Raises:
            NonFiniteError: something that the loss is made of is not finite.
        """
        problems = [item.problem for item in work.items]
        needs_probes = self.weigher.needs_probes
        kept = [self._gains_of(p) if needs_probes else None for p in problems]
        batch = build_batch(
            problems,
            layout=self.layout,
            probes=needs_probes and self._probes_due(kept),
            pad_token_id=self._pad_token_id,
            row_capacity=self.args.max_length,
        ).to(self.args.device)
        with self.accelerator.autocast():
            live, hidden, pass_ = run_pass(
                self.student,
                batch,
                head_grad=self.args.head_grad,
                filter_eps=self.args.filter_eps,
            )
            if needs_probes:
                pass_ = with_kept_gains(pass_, kept)
            found = _not_finite_in(pass_)
            if found is not None:
                self._meet_not_finite(found)
                return live.nll.sum(), []
            with torch.no_grad():
                weights = self.weigher(pass_)
            counted = torch.tensor([item.counted for item in work.items], device=hidden.device)
            weight = weights.weight.detach() * counted[batch.problem]
            nll = segment_mean(live.nll, batch.token_offsets)
            loss = (weight * nll).sum()
            if self.weigher.consistency is not None:
                factor, kind = self.weigher.consistency
                loss = loss + factor * consistency_loss(hidden, pass_, weight, kind)
        if not bool(torch.isfinite(loss)):
            self._meet_not_finite(f"{_named(problems)}: the consistency term is {float(loss)}")
        return loss, _records(pass_, weights, nll.detach(), needs_probes)

    def _meet_not_finite(self, what: str) -> None:
        """Raises NonFiniteError, unless other ranks wait for this one.

        Then the step or the evaluation goes on to its end, where it is found noted and all ranks
        act alike.
        """
        if self.accelerator.num_processes == 1:
            raise NonFiniteError(what)
        self._not_finite = self._not_finite or what

    def _gains_of(self, problem: EncodedProblem) -> list[float] | None:
        """The kept gains of a problem, or None when its probes are due."""
        if not self.model.training or self.state.global_step % self.args.probe_every == 0:
            return None
        return self._kept_gains.get(problem.question_id)

    def _probes_due(self, kept: Sequence[list[float] | None]) -> bool:
        """Whether the micro-batch runs answer probes: some problem has kept no gains.

        Where parameters are sharded every pass over the body gathers them, so one rank's probes are
        everyone's.
        """
        due = None in kept
        sharded = self.accelerator.distributed_type in (
            DistributedType.FSDP,
            DistributedType.DEEPSPEED,
        )
        if sharded and self.args.probe_every > 1:
            due = any(gather_object([due]))
        return due

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Sequence[Item],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Returns the micro-batch's share of the step's loss: its sum over problems / N.

        Args:
            model: the wrapped student.
            inputs: the problems of the micro-batch.
            return_outputs: whether to return the records of the problems too.
            num_items_in_batch: N, the problems of the step on all ranks; those of this micro-batch
                when None.

        Raises:
            NonFiniteError: the loss is not finite.
        """
        with _routed(self.model, self._forward):
            loss, records = model(_Work(inputs))
        count = num_items_in_batch
        if count is None:
            count = max(sum(item.counted for item in inputs), 1)
        else:
            # DDP, FSDP and DeepSpeed average gradients over the ranks.
            loss = loss * self.accelerator.num_processes
        self._micros.append(
            [record for record, item in zip(records, inputs, strict=False) if item.counted]
        )
        loss = loss / count
        return (loss, records) if return_outputs else loss

    def _get_num_items_in_batch(
        self, batch_samples: list[list[Item]], device: torch.device
    ) -> Tensor | int:
        count = sum(item.counted for micro in batch_samples for item in micro)
        if self.accelerator.num_processes == 1:
            return count
        return self.accelerator.gather(torch.tensor(count, device=self.args.device)).sum()

    # A step.

    def training_step(
        self,
        model: nn.Module,
        inputs: Sequence[Item],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Runs forward and backward of a micro-batch, and closes the step after its last one.

        Raises:
            NonFiniteError: a loss or gradient is not finite and `on_nonfinite` is "stop".
        """
        skip = self.args.on_nonfinite == "skip"
        alone = self.accelerator.num_processes == 1
        before = self._copy_gradients() if skip and alone else None
        if isinstance(self.student.head, FSDPModule):
            # Gathered in the first micro-batch of the step, given up in backward of the last.
            last = self.accelerator.sync_gradients
            self.student.head.set_reshard_after_backward(last, recurse=False)
        done = len(self._micros)
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
            found = self._bad_gradient() if alone else None
            if found is not None:
                raise NonFiniteError(f"{_named([item.problem for item in inputs])}: {found}")
        except NonFiniteError as error:
            if before is None:
                raise
            logger.warning("step %d: skipped %s", self.state.global_step + 1, error)
            for parameter, gradient in before.items():
                parameter.grad = gradient
            self._micros[done:] = [[]]
            loss = torch.zeros((), device=self.args.device)
        if self._not_finite is not None:
            loss = torch.zeros_like(loss)
        self._step_loss = self._step_loss.to(loss.device) + loss
        if self.accelerator.sync_gradients:
            loss = loss + self._close_step(int(num_items_in_batch))
        return loss

    def _copy_gradients(self) -> dict[nn.Parameter, Tensor | None]:
        return {
            p: None if p.grad is None else p.grad.clone()
            for p in self.model.parameters()
            if p.requires_grad
        }

    def _bad_gradient(self) -> str | None:
        """Which gradient of this rank is not finite. A loss scaler looks itself, for fp16."""
        if getattr(self.accelerator, "scaler", None) is not None:
            return None
        named = [(n, p.grad) for n, p in self.model.named_parameters() if p.grad is not None]
        if not named:
            return None
        norms = torch._foreach_norm([_own_part(gradient) for _, gradient in named])
        finite = torch.isfinite(torch.stack([norm.float() for norm in norms]))
        if bool(finite.all()):
            return None
        return f"the gradient of {named[int((~finite).nonzero()[0])][0]} is not finite"

    def _close_step(self, expected: int) -> Tensor:
        """Gathers what all ranks saw in the step and acts on it.

        Args:
            expected: the number of problems that the loss was divided by.

        Returns:
            What is missing from this rank's logged loss: the mean is over problems that have one.

        Raises:
            NonFiniteError: on every rank, when one of several met a loss or gradient that is not
                finite and `on_nonfinite` is "stop".
        """
        ranks = [(self._micros, self._not_finite, None)]
        if self.accelerator.num_processes > 1:
            ranks = gather_object([(self._micros, self._not_finite, self._bad_gradient())])
        self._micros, self._not_finite = [], None
        # Data order: micro-batch, then rank.
        micros = zip(*(rank[0] for rank in ranks), strict=True)
        records = [r for micro in micros for of_rank in micro for r in of_rank]
        losses = [rank[1] for rank in ranks if rank[1] is not None]
        gradients = [rank[2] for rank in ranks if rank[2] is not None]
        if losses or gradients:
            where = f"one of question_ids {', '.join(repr(r.question_id) for r in records)}"
            return self._drop_step(losses[0] if losses else f"{where}: {gradients[0]}")
        correction = self._renormalise(expected, sum(r.has_loss for r in records))
        if not records:
            return correction
        offsets = torch.tensor([0, *(len(r.weight) for r in records)]).cumsum(0)
        scores = {
            axis: torch.tensor([s for r in records for s in r.scores[axis]])
            for axis in records[0].scores
        }
        self.weigher.update(scores, offsets)
        if self.args.probe_every > 1:
            self._kept_gains |= {r.question_id: r.gains for r in records if r.gains is not None}
        self._note(records)
        return correction

    def _drop_step(self, found: str) -> Tensor:
        """Leaves a step out that was not finite on one of several ranks, or stops."""
        deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        if self.args.on_nonfinite == "stop" or deepspeed:
            raise NonFiniteError(found)
        if self.is_world_process_zero():
            logger.warning("step %d is left out: %s", self.state.global_step + 1, found)
        self._clear_gradients()
        loss, self._step_loss = self._step_loss, torch.zeros(())
        return -loss

    def _clear_gradients(self) -> None:
        """Takes the gradients away, so that the optimizer leaves every parameter alone."""
        for parameter in self.model.parameters():
            parameter.grad = None

    def _renormalise(self, expected: int, effective: int) -> Tensor:
        """Makes the step a mean over the problems that have a loss, where some have none."""
        loss, self._step_loss = self._step_loss, torch.zeros(())
        if effective == expected:
            return torch.zeros_like(loss)
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError(
                f"step {self.state.global_step + 1}: {expected - effective} of {expected} problems "
                "have no loss; with DeepSpeed every problem needs one"
            )
        if effective == 0:
            self._clear_gradients()
            return -loss
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        torch._foreach_mul_([_own_part(g) for g in gradients], expected / effective)
        return loss * (expected / effective - 1.0)

    def _note(self, records: list[ProblemRecord]) -> None:
        """Enters a step into the logs."""
        rows = []
        for record in records:
            axes = {**record.scores, **{f"z_{a}": z for a, z in record.zscores.items()}}
            for k, teacher in enumerate(record.teachers):
                values = {axis: score[k] for axis, score in axes.items()}
                row = {"weight": record.weight[k], "nll": record.nll[k], **values}
                for name in ("weight", *(axis for axis in AXES if axis in values)):
                    total = self._sums[f"{name}/{teacher}"]
                    total[0] += row[name]
                    total[1] += 1
                rows.append(
                    row
                    | {
                        "step": self.state.global_step + 1,
                        "epoch": self.state.epoch or 0.0,
                        "question_id": record.question_id,
                        "teacher": teacher,
                        "tokens": record.tokens[k],
                    }
                )
        if self._score_log is not None:
            self._score_log.append(rows)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs as transformers does, and for training each teacher's mean weight and scores."""
        if "loss" in logs:
            logs = logs | {name: total / n for name, (total, n) in sorted(self._sums.items())}
            if isinstance(self.weigher, PresetWeigher) and self.weigher.preset.reliable:
                logs["reliability"] = self.weigher.reliability
            self._sums.clear()
        super().log(logs, start_time)

    # Data: problems stay what they are until `_forward` packs them.

    def get_train_dataloader(self) -> ProblemLoader:
        """Returns the micro-batches of this rank.

        Raises:
            ValueError: there is no training data.
        """
        if self.train_dataset is None:
            raise ValueError("train_dataset must be given for training, got None")
        args = self.args
        seed = args.data_seed if args.data_seed is not None else args.seed
        shuffled = args.train_sampling_strategy == "random"
        return self._loader(
            self.train_dataset,
            self._train_batch_size,
            seed=seed if shuffled else None,
            drop_last=args.dataloader_drop_last,
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> ProblemLoader:
        """Returns the micro-batches of an evaluation on this rank.

        Raises:
            ValueError: there is no such evaluation data.
        """
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        eval_dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        if not isinstance(eval_dataset, ProblemDataset):
            raise ValueError(f"eval_dataset must be given to CompactTrainer, got {eval_dataset!r}")
        return self._loader(eval_dataset, self.args.per_device_eval_batch_size)

    def _loader(self, dataset: ProblemDataset, batch_size: int, **settings: Any) -> ProblemLoader:
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        batches = ProblemBatches(len(dataset), batch_size, rank=rank, world=world, **settings)
        return ProblemLoader(dataset, batches)

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs

    def floating_point_ops(self, inputs: Sequence[Item]) -> int:
        """Returns 6 x parameters x tokens, the usual estimate for forward and backward."""
        tokens = sum(
            len(item.problem.prompt_ids) + sum(len(r.ids) for r in item.problem.rationales)
            for item in inputs
        )
        return 6 * tokens * sum(p.numel() for p in self.student.body.parameters())

    def evaluation_loop(
        self,
        dataloader: ProblemLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Returns, as metrics, means over the problems of the evaluation data.

        loss (as in training: over the problems that have one), nll (each rationale counting alike)
        and, where the weigher uses answer probes, gold_logp: the log-likelihood of the gold answer
        after the bare question, in nats a token.

        Raises:
            NonFiniteError: on every rank, when one of them met a loss that is not finite.
        """
        model = self.model_wrapped
        model.eval()
        sums: dict[str, float] = defaultdict(float)
        step_so_far, self._micros = self._micros, []
        for items in dataloader:
            with torch.no_grad(), self.compute_loss_context_manager():
                loss, records = self.compute_loss(model, items, return_outputs=True)
            if self._not_finite is not None:
                continue
            counted = [r for r, item in zip(records, items, strict=True) if item.counted]
            sums["loss"] += float(loss) * len(counted)
            sums["with_loss"] += sum(r.has_loss for r in counted)
            sums["nll"] += sum(sum(r.nll) / len(r.nll) for r in counted)
            if self.weigher.needs_probes:
                sums["gold_logp"] += sum(r.gains[-1] for r in counted if r.gains is not None)
        self._micros = step_so_far
        if self.accelerator.num_processes > 1:
            ranks = gather_object([(dict(sums), self._not_finite)])
            self._not_finite = None
            bad = [found for _, found in ranks if found is not None]
            if bad:
                raise NonFiniteError(bad[0])
            sums = {name: sum(part[name] for part, _ in ranks) for name in sums}
        count = len(dataloader.dataset)
        sums["loss"] *= count / max(sums.pop("with_loss"), 1)
        metrics = {f"{metric_key_prefix}_{name}": total / count for name, total in sums.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=count)

    # A run and its checkpoints.

    def train(
        self,
        resume_from_checkpoint: str | Path | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Trains, or goes on from a checkpoint as if there had been no break.

        Args:
            resume_from_checkpoint: a checkpoint's folder; True takes the newest of `output_dir`
                that is whole, and says which ones are damaged.
            trial: as in transformers.
            ignore_keys_for_eval: as in transformers.

        Raises:
            ValueError: nothing to resume from, or a new run where there are checkpoints already.
            NonFiniteError: see `training_step`.
        """
        run = Path(self._get_output_dir(trial))
        checkpoint, last_step = None, 0
        if resume_from_checkpoint:
            checkpoint = _checkpoint_to_resume(run, resume_from_checkpoint)
            last_step = self._load_compact_state(checkpoint)
        elif newest_whole(run)[0] is not None and self.args.should_save:
            raise ValueError(
                f"output_dir {run} already holds {newest_whole(run)[0].name}; resume from it "
                "(resume_from_checkpoint: true), or choose another output_dir"
            )
        self._micros, self._step_loss = [], torch.zeros(())
        self._sums.clear()
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        note = functools.partial(self._write_run_file, run, started)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            clear_unfinished(run)
            self._score_log = ScoreLog(run, last_step)
            note("running")
        status = "failed"
        try:
            output = super().train(
                resume_from_checkpoint=str(checkpoint) if checkpoint else None,
                trial=trial,
                ignore_keys_for_eval=ignore_keys_for_eval,
            )
            if self.is_world_process_zero():
                self.save_state()
            status = "complete"
        finally:
            if self._score_log is not None:
                self._score_log.close()
                self._score_log = None
                note(status)
        return output

    def _write_run_file(self, run: Path, started: str, status: str) -> None:
        """Writes run.json: what was trained how, and how it ended."""
        text = {
            "settings": json.loads(self.args.to_json_string()),
            "student": self._student_name,
            "data": self.data_name,
            "weigher": self.weigher.name,
            "packing": self.layout,
            "versions": {name: version(name) for name in _PACKAGES},
            "status": status,
            "started": started,
            "command": _TOKEN.sub(r"\1<hidden>", " ".join(sys.argv)),
        }
        write_whole(run / "run.json", json.dumps(text, indent=2) + "\n")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes checkpoint-STEP, whole or not at all.

        Raises:
            OSError: the disk does not take it; what was there before is untouched.
        """
        self.store_flos()
        run = Path(self._get_output_dir(trial))
        final = run / f"checkpoint-{self.state.global_step}"
        staged = staging_folder(final)
        with _cleared_up(staged, final):
            if self._score_log is not None:
                self._score_log.seal()
            if self.args.should_save:
                shutil.rmtree(staged, ignore_errors=True)
                staged.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            super().save_model(str(staged), _internal_call=True)
            best = run / f"checkpoint-{self.state.best_global_step}"
            if self.state.best_global_step and (best == final or best.is_dir()):
                self.state.best_model_checkpoint = str(best)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(str(staged))
                self._save_scaler(str(staged))
                self._save_rng_state(str(staged))
            if self.args.should_save:
                self._keep_callback_states()
                self.state.save_to_json(str(staged / "trainer_state.json"))
                compact_state = {
                    "preset": self.args.preset,
                    "weigher": self.weigher.state_dict(),
                    "gains": self._kept_gains,
                }
                (staged / _STATE_FILE).write_text(json.dumps(compact_state))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                publish(staged, final)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes student and tokenizer: every file whole, or none of them.

        Args:
            output_dir: the folder; that of the settings when None.
            _internal_call: transformers' own: nothing is pushed to the hub.

        Raises:
            OSError: the disk does not take it; what was there before is untouched.
            ValueError: sharded parameters, set up to be saved as shards only.
        """
        final = Path(output_dir or self.args.output_dir)
        staged = final / UNFINISHED_MODEL
        with _cleared_up(staged, final):
            if self.args.should_save:
                shutil.rmtree(staged, ignore_errors=True)
            self.accelerator.wait_for_everyone()  # or one would clear what another has written
            super().save_model(str(staged), _internal_call=True)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                if not staged.is_dir():
                    raise ValueError("fsdp_state_dict_type must be FULL_STATE_DICT to save a model")
                move_whole(staged, final)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if state_dict is not None:
            # Gathered from shards, a tied weight would be written under each of its names.
            tied = getattr(self.model, "all_tied_weights_keys", {})
            state_dict = {name: w for name, w in state_dict.items() if name not in tied}
        super()._save(output_dir, state_dict)

    def _keep_callback_states(self) -> None:
        """Enters the state of the callbacks that have one into the trainer's state."""
        states: dict[str, list[Any]] = defaultdict(list)
        for callback in (*self.callback_handler.callbacks, self.control):
            if isinstance(callback, ExportableState):
                states[type(callback).__name__].append(callback.state())
        for name, several in states.items():
            self.state.stateful_callbacks[name] = several if len(several) > 1 else several[0]

    def _load_compact_state(self, checkpoint: Path) -> int:
        """Restores running statistics and kept gains; returns the checkpoint's step."""
        state = json.loads((checkpoint / _STATE_FILE).read_text())
        if state.get("preset", self.args.preset) != self.args.preset:
            raise ValueError(
                f"preset must be {state['preset']!r} to go on from {checkpoint}, whose running "
                f"statistics are its own, got {self.args.preset!r}"
            )
        self.weigher.load_state_dict(state["weigher"])
        self._kept_gains = state["gains"]
        return int(json.loads((checkpoint / "trainer_state.json").read_text())["global_step"])


def _problems_of(preset: str, dataset: Any) -> list[Problem]:
    """Rows, a path or problems, as problems: those that a `single:` teacher has a rationale for."""
    if isinstance(dataset, Sequence) and dataset and isinstance(dataset[0], Problem):
        given = list(dataset)
    else:
        given = load_problems(dataset)
    if not preset.startswith("single:"):
        return given
    problems = of_teacher(preset.partition(":")[2], given)
    if len(problems) < len(given):
        left = f"{len(given) - len(problems)} of {len(given)}"
        logger.warning("%s: %s problems have no rationale", preset, left)
    return problems


def _let_cpu_ranks_shard() -> None:
    """Has accelerate's FSDP taken up by ranks on CPUs, where it would quietly be left out.

    torch shards over gloo as over NCCL; accelerate asks for several accelerators.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return
    state = PartialState()
    if state.distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def _own_part(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this rank holds; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def _cleared_up(staged: Path, final: Path) -> Iterator[None]:
    """Removes a half-written folder, and tells a full disk as the OSError that it is.

    torch and safetensors report a full disk each in an error of their own.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(staged, ignore_errors=True)
        free = shutil.disk_usage(next(p for p in staged.parents if p.exists())).free
        code = error.errno if isinstance(error, OSError) else None
        full = code == errno.ENOSPC or "No space left" in str(error) or free < 1 << 20
        if not full and not isinstance(error, OSError) and "File too large" not in str(error):
            raise
        reason = os.strerror(errno.ENOSPC) if full else str(error).splitlines()[0]
        raise OSError(
            errno.ENOSPC if full else code,
            f"{final} could not be written ({free >> 20} MiB free): {reason}",
        ) from error


@contextmanager
def _routed(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Lets `forward` answer a call of the module: hooks and wrappers around it stay in force."""
    own = module.__dict__.get("forward")  # accelerate puts one there for mixed precision
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def with_kept_gains(pass_: Pass, kept: Sequence[list[float] | None]) -> Pass:
    """Returns the pass with the leaf likelihoods of an earlier step where a problem has kept them.

    Args:
        pass_: a pass; without answer leaves when every problem has kept its own.
        kept: for each problem its likelihoods, leaves in order and the bare question's last; None
            takes those of the pass.
    """
    if all(gains is None for gains in kept):
        return pass_
    problems = pass_.batch.problems
    counts = [len(r.steps) for p in problems for r in p.rationales]
    of_steps, of_questions = [], []
    for p, gains in enumerate(kept):
        gains = _gains(pass_, p) if gains is None else pass_.leaf_logp.new_tensor(gains)
        of_steps.append(gains[:-1])
        of_questions.append(gains[-1:])
    device, total = pass_.leaf_logp.device, sum(counts)
    steps = [i for count in counts for i in range(count)] + [-1] * len(problems)
    batch = replace(
        pass_.batch,
        leaf_offsets=torch.tensor([0, *counts], device=device).cumsum(0),
        leaf_step=torch.tensor(steps, device=device),
        question_leaf=torch.arange(total, total + len(problems), device=device),
    )
    return replace(pass_, batch=batch, leaf_logp=torch.cat([*of_steps, *of_questions]))


def _gains(pass_: Pass, problem: int) -> Tensor:
    """[leaves + 1] likelihoods of a problem's leaves, the bare question's last."""
    batch = pass_.batch
    first, end = batch.leaf_offsets[batch.problem_offsets[problem : problem + 2]].tolist()
    question = batch.question_leaf[problem]
    return torch.cat([pass_.leaf_logp[first:end], pass_.leaf_logp[question][None]])


def _named(problems: Sequence[EncodedProblem]) -> str:
    names = ", ".join(repr(p.question_id) for p in problems)
    return f"question_id {names}" if len(problems) == 1 else f"one of question_ids {names}"


def _not_finite_in(pass_: Pass) -> str | None:
    """Names the first statistic of the pass that is not finite."""
    batch = pass_.batch
    bad = ~torch.isfinite(pass_.stats.nll)
    if bool(bad.any()):
        token = int(bad.nonzero()[0])
        rationale = int(batch.rationale[token])
        problem = batch.problems[int(batch.problem[rationale])]
        place = token - int(batch.token_offsets[rationale])
        return (
            f"question_id {problem.question_id!r}, teacher {batch.teachers[rationale]!r}: the loss "
            f"of completion token {place} is {float(pass_.stats.nll[token])}"
        )
    if not bool(torch.isfinite(pass_.leaf_logp).all()):
        return f"{_named(batch.problems)}: the log-likelihood of the gold answer is not finite"
    return None


def _records(pass_: Pass, weights: Weights, nll: Tensor, with_gains: bool) -> list[ProblemRecord]:
    """Turns the outcome of a pass into plain numbers, a record a problem."""
    batch = pass_.batch
    ends = batch.problem_offsets.tolist()
    weight, losses = weights.weight.tolist(), nll.tolist()
    tokens = batch.token_offsets.diff().tolist()
    scores = {axis: s.tolist() for axis, s in weights.scores.items()}
    zscores = {axis: z.tolist() for axis, z in weights.zscores.items()}
    records = []
    for p, problem in enumerate(batch.problems):
        mine = slice(ends[p], ends[p + 1])
        records.append(
            ProblemRecord(
                question_id=problem.question_id,
                teachers=[r.teacher for r in problem.rationales],
                tokens=tokens[mine],
                weight=weight[mine],
                nll=losses[mine],
                scores={axis: s[mine] for axis, s in scores.items()},
                zscores={axis: z[mine] for axis, z in zscores.items()},
                gains=_gains(pass_, p).tolist() if with_gains else None,
            )
        )
    return records


def _checkpoint_to_resume(run: Path, wanted: str | Path | bool) -> Path:
    """The checkpoint to go on from, checked to be whole."""
    if wanted is not True:
        problem = damage(Path(wanted))
        if problem is not None:
            raise ValueError(f"resume_from_checkpoint {wanted} cannot be used: {problem}")
        return _with_optimizer(Path(wanted))
    checkpoint, damaged = newest_whole(run)
    if checkpoint is None:
        raise ValueError("; ".join([f"output_dir {run} holds no whole checkpoint", *damaged]))
    for line in damaged:
        logger.warning("%s; going on from %s", line, checkpoint.name)
    return _with_optimizer(checkpoint)


def _with_optimizer(checkpoint: Path) -> Path:
    """The checkpoint; transformers would go on without optimizer and schedule, and not say so."""
    if any(checkpoint.glob("optimizer*")) or any(checkpoint.glob("global_step*")):
        return checkpoint
    raise ValueError(
        f"resume_from_checkpoint {checkpoint} cannot be used: it was saved with save_only_model, "
        "without optimizer and schedule; give it as model to start anew from its weights"
    )
