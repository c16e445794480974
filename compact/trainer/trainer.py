"""`CompactTrainer`: transformers' Trainer on problems with K rationales, weighed as it trains.

A micro-batch is a list of problems. Its one forward gives token statistics without ever holding
full logits; the weigher turns them into a weight a rationale; the loss of a step is

    L = (1 / N) sum_p [ sum_k alpha_k D_k + lambda sum_{i<j} alpha_i alpha_j symKL(P_i, P_j) ]

over the N problems of the whole optimizer step (D_k: mean over the tokens of rationale k), whatever
the micro-batches, the accumulation and the ranks. Weights carry no gradient. The second term is
that of the preset (weighting/consistency.py); a strategy may add others (strategies/base.py).

This file holds the hooks of transformers' loop, in the order in which they run. What they call:
step.py (a step, what is not finite), records.py (plain numbers), batches.py (which problems make up
a micro-batch), saving.py and checkpoints.py (files), runlog.py (the log of scores).
"""

from __future__ import annotations

import functools
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints

from compact.config import CompactConfig
from compact.registry import unknown
from compact.strategies import Strategy, make_strategy
from compact.student import Student, base_name, load_student
from compact.trainer import setup
from compact.trainer.batches import Item, ProblemBatches, ProblemDataset, ProblemLoader
from compact.trainer.checkpoints import (
    UNFINISHED_MODEL,
    clear_unfinished,
    move_whole,
    newest_whole,
    publish,
    staging_folder,
)
from compact.trainer.loss import MicroBatchLoss, Work, routed
from compact.trainer.records import (
    EvaluationSums,
    NonFiniteError,
    ProblemRecord,
    TeacherMeans,
    score_rows,
    scores_of,
)
from compact.trainer.runlog import ScoreLog
from compact.trainer.saving import (
    STATE_FILE,
    checkpoint_to_resume,
    cleared_up,
    keep_callback_states,
    read_state,
    write_run_file,
)
from compact.trainer.step import (
    AfterStep,
    OpenStep,
    bad_gradient,
    clear_gradients,
    copy_gradients,
    named,
    restore_gradients,
    scale_gradients,
)
from compact.weighting import PresetWeigher, Weigher, make_weigher

if TYPE_CHECKING:
    import datasets
    from peft import PeftConfig

    from compact.data import Problem

logger = logging.getLogger(__name__)


class CompactTrainer(Trainer):
    """Trains a student on the rationales of several teachers.

    Takes those arguments of TRL's SFTTrainer that apply here, with the same meaning.
    """

    # Narrower than in transformers.
    args: CompactConfig
    model: nn.Module
    train_dataset: ProblemDataset | None
    eval_dataset: ProblemDataset | dict[str, ProblemDataset] | None

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
        setup.refuse_zero3()
        self.weigher: Weigher = make_weigher(args.preset, **setup.mapping(args.overrides))
        self.strategy: Strategy = make_strategy(args.strategy, setup.mapping(args.strategy_options))
        if args.leaf_every > 1 and self.weigher.leaf_hidden_readers:
            raise ValueError(
                f"leaf_every must be 1 with {self.weigher.leaf_hidden_readers[0]}, which reads "
                f"the hidden states of fresh answer leaves, got {args.leaf_every}"
            )
        problems: Sequence[Problem] | None = None
        if train_dataset is not None:
            problems = setup.problems_of(self.weigher, train_dataset)
        if isinstance(model, str | Path):
            self._student_name = base_name(str(model))
            options = setup.mapping(args.model_init_kwargs)
            student, own = load_student(model, is_trainable=True, **options)
            processing_class = processing_class if processing_class is not None else own
        else:
            student = model
            self._student_name = str(model.config.name_or_path or type(model).__name__)
        if processing_class is None:
            raise ValueError("processing_class must be given where model is no name, got None")
        if peft_config is not None:
            student = setup.with_adapters(student, peft_config, args.seed)

        encode = functools.partial(setup.encoded, self.weigher, processing_class, args.max_length)
        if isinstance(eval_dataset, Mapping):
            evals: Any = {name: encode(e) for name, e in eval_dataset.items()}
        else:
            evals = None if eval_dataset is None else encode(eval_dataset)
        setup.fit_machine(args)
        if problems is not None:
            problems = self.strategy.prepare(problems, student, processing_class)
        super().__init__(
            model=student,
            args=args,
            data_collator=list,  # type: ignore[arg-type]  # a batch stays a list of items
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
        self.layout = setup.layout_for(self.student, self.weigher, args)
        self._loss = MicroBatchLoss(
            self.student, self.weigher, self.strategy, self.layout, args, self.accelerator
        )
        self.add_callback(AfterStep(self.strategy))
        self.data_name = str(train_dataset) if isinstance(train_dataset, str | Path) else None
        self._step = OpenStep()
        self._means = TeacherMeans()
        self._score_log: ScoreLog | None = None

    @property
    def _alone(self) -> bool:
        """Whether this is the only process."""
        return bool(self.accelerator.num_processes == 1)

    # The loss of a micro-batch.

    def _forward(self, work: Work) -> tuple[Tensor, list[ProblemRecord]]:
        return self._loss(work.items, self._step, self.state.global_step)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Sequence[Item],  # type: ignore[override]  # transformers: a dict of tensors
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
        with routed(self.model, self._forward):
            loss, records = model(Work(inputs))
        count = num_items_in_batch
        if count is None:
            count = max(sum(item.counted for item in inputs), 1)
        else:
            # DDP, FSDP and DeepSpeed average gradients over the ranks.
            loss = loss * self.accelerator.num_processes
        self._step.micros.append(
            [record for record, item in zip(records, inputs, strict=False) if item.counted]
        )
        loss = loss / count
        return (loss, records) if return_outputs else loss

    def _get_num_items_in_batch(
        self, batch_samples: list[list[Item]], device: torch.device
    ) -> Tensor | int:
        count = sum(item.counted for micro in batch_samples for item in micro)
        if self._alone:
            return count
        gathered: Tensor = self.accelerator.gather(torch.tensor(count, device=self.args.device))
        return gathered.sum()

    # A step.

    def training_step(
        self,
        model: nn.Module,
        inputs: Sequence[Item],  # type: ignore[override]  # transformers: a dict of tensors
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Runs forward and backward of a micro-batch, and closes the step after its last one.

        Raises:
            NonFiniteError: a loss or gradient is not finite and `on_nonfinite` is "stop".
        """
        skip = self.args.on_nonfinite == "skip"
        before = copy_gradients(self.model) if skip and self._alone else None
        if isinstance(self.student.head, FSDPModule):
            # Gathered in the first micro-batch of the step, given up in backward of the last.
            last = self.accelerator.sync_gradients
            self.student.head.set_reshard_after_backward(last, recurse=False)
        done = len(self._step.micros)
        try:
            batch: Any = inputs  # transformers: a dict of tensors
            loss: Tensor = super().training_step(model, batch, num_items_in_batch)
            found = self._bad_gradient() if self._alone else None
            if found is not None:
                raise NonFiniteError(f"{named([item.problem for item in inputs])}: {found}")
        except NonFiniteError as error:
            if before is None:
                raise
            logger.warning("step %d: skipped %s", self.state.global_step + 1, error)
            restore_gradients(before)
            self._step.micros[done:] = [[]]
            loss = torch.zeros((), device=self.args.device)
        if self._step.not_finite is not None:
            loss = torch.zeros_like(loss)
        self._step.loss = self._step.loss.to(loss.device) + loss
        if self.accelerator.sync_gradients:
            loss = loss + self._close_step(int(num_items_in_batch or 0))
        return loss

    def _bad_gradient(self) -> str | None:
        """Which gradient of this rank is not finite. A loss scaler looks itself, for fp16."""
        if getattr(self.accelerator, "scaler", None) is not None:
            return None
        return bad_gradient(self.model)

    def _close_step(self, expected: int) -> Tensor:
        """Gathers what all ranks saw in the step and acts on it.

        Args:
            expected: the number of problems that the loss was divided by.

        Returns:
            Correction to this rank's logged loss, whose mean is over problems that have one.

        Raises:
            NonFiniteError: on every rank, when one of several met a loss or gradient that is not
                finite and `on_nonfinite` is "stop".
        """
        closed = self._step.close(None if self._alone else self._bad_gradient(), alone=self._alone)
        if closed.not_finite is not None:
            return self._drop_step(closed.not_finite)
        records = closed.records
        correction = self._renormalise(expected, sum(r.has_loss for r in records))
        if not records:
            return correction
        self.weigher.update(*scores_of(records))
        if self.args.leaf_every > 1:
            self._loss.kept_levels |= {
                r.question_id: r.levels for r in records if r.levels is not None
            }
        rows = score_rows(records, self.state.global_step + 1, self.state.epoch or 0.0)
        self._means.add(rows)
        if self._score_log is not None:
            self._score_log.append(rows)
        return correction

    def _drop_step(self, found: str) -> Tensor:
        """Leaves a step out that was not finite on one of several ranks, or stops."""
        deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        if self.args.on_nonfinite == "stop" or deepspeed:
            raise NonFiniteError(found)
        if self.is_world_process_zero():
            logger.warning("step %d is left out: %s", self.state.global_step + 1, found)
        clear_gradients(self.model)
        return -self._step.take_loss()

    def _renormalise(self, expected: int, effective: int) -> Tensor:
        """Makes the step a mean over the problems that have a loss, where some have none."""
        loss = self._step.take_loss()
        if effective == expected:
            return torch.zeros_like(loss)
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError(
                f"step {self.state.global_step + 1}: {expected - effective} of {expected} problems "
                "have no loss; with DeepSpeed every problem needs one"
            )
        if effective == 0:
            clear_gradients(self.model)
            return -loss
        scale_gradients(self.model, expected / effective)
        return loss * (expected / effective - 1.0)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs as transformers does, and for training each teacher's mean weight and scores."""
        if "loss" in logs:
            logs = logs | self._means.take()
            if isinstance(self.weigher, PresetWeigher) and self.weigher.preset.reliable:
                logs["reliability"] = self.weigher.reliability
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
            several = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
            if eval_dataset not in several:
                raise ValueError(unknown("eval_dataset", eval_dataset, list(several)))
            eval_dataset = several[eval_dataset]
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

    def floating_point_ops(
        self,
        inputs: Sequence[Item],  # type: ignore[override]  # transformers: a dict of tensors
    ) -> int:
        """Returns 6 x parameters x tokens, the usual estimate for forward and backward."""
        tokens = sum(
            len(item.problem.prompt_ids) + sum(len(r.ids) for r in item.problem.rationales)
            for item in inputs
        )
        return 6 * tokens * sum(p.numel() for p in self.student.body.parameters())

    def evaluation_loop(
        self,
        dataloader: ProblemLoader,  # type: ignore[override]  # transformers: any DataLoader
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
        sums = EvaluationSums()
        under_way, self._step = self._step, OpenStep()
        for items in dataloader:
            with torch.no_grad(), self.compute_loss_context_manager():
                loss, records = self.compute_loss(model, items, return_outputs=True)
            if self._step.not_finite is None:
                sums.add(float(loss), records, items)
        found, self._step = self._step.not_finite, under_way
        count = len(dataloader.dataset)
        means = sums.means(count, found, alone=self._alone)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        return EvalLoopOutput(
            predictions=None,  # type: ignore[arg-type]  # as transformers does without predictions
            label_ids=None,
            metrics=metrics,
            num_samples=count,
        )

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
            checkpoint = checkpoint_to_resume(run, resume_from_checkpoint)
            last_step = self._load_compact_state(checkpoint)
        elif self.args.should_save:
            newest, _ = newest_whole(run)
            if newest is not None:
                raise ValueError(
                    f"output_dir {run} already holds {newest.name}; resume from it "
                    "(resume_from_checkpoint: true), or choose another output_dir"
                )
        self._step, self._means = OpenStep(), TeacherMeans()
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        note = functools.partial(self._note_run, run, started)
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

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes checkpoint-STEP, whole or not at all.

        Raises:
            OSError: the disk does not take it; what was there before is untouched.
        """
        self.store_flos()
        run = Path(self._get_output_dir(trial))
        final = run / f"checkpoint-{self.state.global_step}"
        staged = staging_folder(final)
        with cleared_up(staged, final):
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
                keep_callback_states(self.state, [*self.callback_handler.callbacks, self.control])
                self.state.save_to_json(str(staged / "trainer_state.json"))
                compact_state = {
                    "preset": self.args.preset,
                    "weigher": self.weigher.state_dict(),
                    "gains": self._loss.kept_levels,
                }
                if self.args.strategy is not None:
                    compact_state["strategy"] = self.strategy.state_dict()
                (staged / STATE_FILE).write_text(json.dumps(compact_state))
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
        folder = output_dir or self.args.output_dir
        assert folder is not None  # transformers fills it in
        final = Path(folder)
        staged = final / UNFINISHED_MODEL
        with cleared_up(staged, final):
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

    def _load_compact_state(self, checkpoint: Path) -> int:
        """Restores running statistics, kept levels and strategy; returns the checkpoint's step."""
        state, step = read_state(checkpoint, self.args.preset)
        self.weigher.load_state_dict(state["weigher"])
        self._loss.kept_levels = state["gains"]
        self.strategy.load_state_dict(state.get("strategy", {}))
        return step

    def _note_run(self, run: Path, started: str, status: str) -> None:
        """Writes run.json: what is trained how, and how it ended."""
        about = {
            "settings": json.loads(self.args.to_json_string()),  # type: ignore[no-untyped-call]
            "student": self._student_name,
            "data": self.data_name,
            "weigher": self.weigher.name,
            "strategy": self.args.strategy,
            "layout": self.layout,
            "status": status,
            "started": started,
        }
        write_run_file(run, about)
