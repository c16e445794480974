"""`CompactTrainer`: transformers' Trainer on problems with K rationales, weighted during training.

A micro-batch is a list of problems. One forward gives token statistics and never stores full
logits. From them the weigher computes a weight for each rationale. The loss of a step is

    L = (1 / N) sum_p [ sum_k alpha_k D_k + lambda sum_{i<j} alpha_i alpha_j symKL(P_i, P_j) ]

over the N problems of the whole optimizer step. D_k is the mean over the tokens of rationale k of
their nll, times their token weights (weighting/token_weights.py). The loss is the same for any
split into micro-batches, accumulation and ranks. Weights carry no gradient. The second term belongs
to the preset (weighting/consistency.py); a strategy may add other terms.

This file holds the hooks of transformers' loop, in the order in which they run. They use setup.py
(before the first step), step.py (a step, non-finite values), records.py (plain numbers), batches.py
(problems of a micro-batch), saving.py and checkpoints.py (files), runlog.py (log of scores).
"""

from __future__ import annotations

import functools
import json
import logging
import shutil
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints

from compact.config import CompactConfig
from compact.means import Means
from compact.passes.packing import tree_length
from compact.sft_names import tokenizer_of
from compact.strategies import Strategy, make_strategy
from compact.student import Student, base_name, load_student, named_students
from compact.trainer import setup, sharding
from compact.trainer.batches import Item, ProblemBatches, ProblemDataset, ProblemLoader
from compact.trainer.card import refresh_card, write_card
from compact.trainer.checkpoints import (
    UNFINISHED_MODEL,
    check_fresh,
    check_no_model,
    check_not_student,
    clear_unfinished,
    move_whole,
    publish,
    staging_folder,
)
from compact.trainer.loss import MicroBatchLoss, Work, routed
from compact.trainer.outcome import GradientCheck, Outcome
from compact.trainer.records import EvalMeans, NonFiniteError, add_scores, score_rows, scores_of
from compact.trainer.runlog import ScoreLog
from compact.trainer.saving import (
    checkpoint_to_resume,
    cleared_up,
    keep_callback_states,
    read_state,
    without_tied,
    write_run_file,
    write_state,
)
from compact.trainer.step import (
    LeftOutSteps,
    Micro,
    OpenStep,
    StrategySteps,
    copy_gradients,
    restore_gradients,
    scale_gradients,
)
from compact.weighting import TOKEN_WEIGHTS, Weigher, make_weigher

if TYPE_CHECKING:
    import datasets
    from peft import PeftConfig

    from compact.data import Problem

logger = logging.getLogger(__name__)


class CompactTrainer(Trainer):
    """Trains a student on the rationales of several teachers.

    It takes the arguments of TRL's SFTTrainer with the same meaning, see `compact.sft_names`.
    """

    # The types are narrower than in transformers.
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
        **others: Any,
    ) -> None:
        """Loads and checks everything before the first step.

        Args:
            model: a causal LM, its name or folder, or a .gguf file. If it is a folder with an
                adapter, as a run writes it, training of that adapter continues.
            args: settings; the defaults of `CompactConfig` if None.
            train_dataset: rationales as rows, a path or a datasets.Dataset (see
                `compact.data.load_problems`), or a list of problems.
            eval_dataset: the same, or a mapping from names to such datasets.
            processing_class: the tokenizer. May be None if the model is given by name.
            callbacks: callbacks besides those of transformers.
            optimizers: optimizer and schedule; built from `args` if None.
            peft_config: adapters to train instead of every weight. Must be None if the model has
                adapters.
            others: other arguments of SFTTrainer, taken or refused.

        Raises:
            ValueError, TypeError: an argument, a row of the data or a setting is invalid.
            OSError: a file cannot be read.
        """
        args = args if args is not None else CompactConfig()
        if not isinstance(args, CompactConfig):
            raise TypeError(f"args must be a CompactConfig, got {type(args).__name__}")
        processing_class = tokenizer_of(others, processing_class)
        self.weigher: Weigher = make_weigher(args.preset, **setup.mapping(args.overrides))
        self.strategy: Strategy = make_strategy(args.strategy, setup.mapping(args.strategy_options))
        setup.check_strategy(self.weigher, self.strategy, args)
        skips = setup.skips_of(self.weigher, self.strategy, args)
        setup.tell_of_weight_decay(args)
        TOKEN_WEIGHTS.get_or_raise(args.token_weights)
        problems: Sequence[Problem] | None = None
        if train_dataset is not None:
            problems = setup.training_problems(self.weigher, self.strategy, args, train_dataset)
        check_not_student(Path(str(args.output_dir)), *named_students(model))
        if isinstance(model, str | Path):
            self._student_name = base_name(str(model))
            options = setup.mapping(args.model_init_kwargs)
            student, own = load_student(model, is_trainable=True, **options)
            processing_class = processing_class if processing_class is not None else own
        else:
            student = model
            setup.check_loaded(model, args)
            self._student_name = str(model.config.name_or_path or type(model).__name__)
        if processing_class is None:
            raise ValueError("processing_class must be given if model is not a name, got None")
        if peft_config is not None:
            student = setup.with_adapters(student, peft_config, args.seed)

        self._encode = functools.partial(setup.encoded, self.weigher, processing_class, args)
        evals, data = setup.each(self._encode, eval_dataset), None
        setup.fit_machine(args)
        if problems is not None:
            problems = self.strategy.prepare(problems, student, processing_class)
            data = self._encode(problems, skips)
        super().__init__(
            model=student,
            args=args,
            data_collator=list,  # type: ignore[arg-type]  # a batch stays a list of items
            train_dataset=data,
            eval_dataset=evals,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        sharding.check_sharding(self)
        # compute_loss divides by the problems of the step, so transformers must not divide again.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self.student = Student.of(self.model, processing_class)
        self._body_size = sum(p.numel() for p in self.student.body.parameters())
        self.layout = setup.layout_for(self.student, self.weigher, args, data, evals)
        if data is not None:
            setup.check_training(self, data)
        self._loss = MicroBatchLoss(
            self.student, self.weigher, self.strategy, self.layout, args, self.accelerator
        )
        self.add_callback(StrategySteps(self.strategy))
        self._left_out = LeftOutSteps()
        self.add_callback(self._left_out)
        self.data_name = str(train_dataset) if isinstance(train_dataset, str | Path) else None
        self._step, self._means = OpenStep(), Means()
        self._score_log: ScoreLog | None = None
        self._own: set[Path] = set()  # folders whose files this trainer may replace

    @property
    def _alone(self) -> bool:
        """Whether this is the only process."""
        return bool(self.accelerator.num_processes == 1)

    # The loss of a micro-batch.

    def _forward(self, work: Work) -> tuple[Tensor, Outcome | None]:
        return self._loss(work.items, self._step, self.state.global_step)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Sequence[Item],  # type: ignore[override]  # transformers: a dict of tensors
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Returns this micro-batch's part of the loss of the step: its sum over problems / N.

        Args:
            model: the wrapped student.
            inputs: the problems of the micro-batch.
            return_outputs: whether to also return the records of the problems.
            num_items_in_batch: N, the number of problems of the step on all ranks. If None, the
                number of problems of this micro-batch.

        Raises:
            NonFiniteError: with `return_outputs`, the loss is not finite, and there is only one
                process. Otherwise this is found at the end of the step.
        """
        sharding.gather_head(self.student.head, until=self.accelerator.sync_gradients)
        with routed(self.model, self._forward):
            loss, outcome = model(Work(inputs))
        count = num_items_in_batch
        if count is None:
            count = max(sum(item.counted for item in inputs), 1)
        else:
            # DDP, FSDP and DeepSpeed average gradients over the ranks.
            loss = loss * self.accelerator.num_processes
        self._step.micros.append(Micro(inputs, outcome))
        loss = loss / count
        return (loss, self._step.outputs(alone=self._alone)) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: Any, device: Any) -> Tensor | int:
        count: int = sum(item.counted for micro in batch_samples for item in micro)
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
        """Runs forward and backward of a micro-batch; after the last of a step, closes the step.

        Raises:
            NonFiniteError: a loss or gradient is not finite and `on_nonfinite` is "stop".
        """
        skip = self.args.on_nonfinite == "skip" and self._alone
        before = copy_gradients(self.model) if skip else None
        done = len(self._step.micros)
        try:
            batch: Any = inputs  # transformers: a dict of tensors
            loss: Tensor = super().training_step(model, batch, num_items_in_batch)
            if self._alone:
                self._step.micros[-1].gradients = self._gradient_check()
            if skip:
                self._step.micros[-1].records()
        except NonFiniteError as error:
            if before is None:
                raise
            logger.warning("step %d: skipped %s", self.state.global_step + 1, error)
            restore_gradients(before)
            self._step.micros[done:] = [Micro()]
            loss = torch.zeros((), device=self.args.device)
        loss = loss.nan_to_num(0.0, 0.0, 0.0)  # a step with such a loss is not taken
        self._step.add_loss(loss)
        if self.accelerator.sync_gradients:
            loss = loss + self._close_step(int(num_items_in_batch or 0))
        return loss

    def _gradient_check(self) -> GradientCheck | None:
        """Starts to look for non-finite gradients of this rank; fp16 has its loss scaler."""
        scaled = getattr(self.accelerator, "scaler", None) is not None
        return None if scaled else GradientCheck(self.model, self.optimizer)

    def _close_step(self, expected: int) -> Tensor:
        """Gathers the results of all ranks in the step, updates the weigher and writes the log.

        Args:
            expected: the number of problems that the loss was divided by.

        Returns:
            Correction to this rank's logged loss, which is a mean over problems with a loss.

        Raises:
            NonFiniteError: some of several ranks found a loss or gradient that is not finite, and
                `on_nonfinite` is "stop"; raised on every rank.
        """
        check = None if self._alone else self._gradient_check()
        closed = self._step.close(check, alone=self._alone)
        if found := closed.not_finite or sharding.bad_norm(self.accelerator):
            return self._drop_step(found)
        records = closed.records
        correction = self._renormalise(expected, sum(r.has_loss for r in records))
        if not records:
            return correction
        self.weigher.update(*scores_of(records))
        if self.args.leaf_every > 1:
            levels = {r.question_id: r.levels for r in records if r.levels is not None}
            self._loss.kept_levels |= levels
        rows = score_rows(records, self.state.global_step + 1, self.state.epoch or 0.0)
        add_scores(self._means, rows)
        if self._score_log is not None:
            self._score_log.append(rows)
        return correction

    def _drop_step(self, found: str) -> Tensor:
        """Skips a step that was not finite on one of several ranks, or raises NonFiniteError."""
        if self.args.on_nonfinite == "stop" or sharding.uses_deepspeed(self.accelerator):
            raise NonFiniteError(found)
        if self.is_world_process_zero():
            logger.warning("step %d is left out: %s", self.state.global_step + 1, found)
        self._left_out.leave_out(self.model, self.optimizer)
        return self._step.correct_loss(None)

    def _renormalise(self, expected: int, effective: int) -> Tensor:
        """Rescales the gradients, so that the step is a mean over the problems that have a loss."""
        if effective == expected:
            return self._step.correct_loss(1.0)
        if sharding.uses_deepspeed(self.accelerator):
            raise ValueError(
                f"step {self.state.global_step + 1}: {expected - effective} of {expected} problems "
                "have no loss; with DeepSpeed every problem needs one"
            )
        if effective == 0:
            self._left_out.leave_out(self.model, self.optimizer)
            return self._step.correct_loss(None)
        scale_gradients(self.model, expected / effective)
        return self._step.correct_loss(expected / effective)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs like transformers; lines of training also get means per teacher."""
        if "loss" in logs:
            own = {f"strategy/{name}": value for name, value in self.strategy.take_log().items()}
            logs = logs | dict(sorted(self._means.take().items())) | self.weigher.take_log() | own
        super().log(logs, start_time)

    # Data: `_forward` turns problems into tensors.

    def get_train_dataloader(self) -> ProblemLoader:
        """Returns the micro-batches of this rank.

        Raises:
            ValueError: the trainer has no training data.
        """
        if self.train_dataset is None:
            raise ValueError("train_dataset must be given for training, got None")
        args = self.args
        seed = args.data_seed if args.data_seed is not None else args.seed
        shuffled = args.train_sampling_strategy == "random"
        own_order = type(self.strategy).data_step is not Strategy.data_step
        return self._loader(
            self.train_dataset,
            self._train_batch_size,
            training=True,
            seed=seed if shuffled else None,
            drop_last=args.dataloader_drop_last,
            accumulation=args.gradient_accumulation_steps,
            data_step=self.strategy.data_step if own_order else None,
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> ProblemLoader:
        """Returns the micro-batches of an evaluation on this rank; the data as in `setup.one_of`.

        Raises:
            ValueError, TypeError, OSError: there are no such data, or they cannot be used.
        """
        data = setup.one_of(self.eval_dataset, eval_dataset)
        if not isinstance(data, ProblemDataset):
            data = self._encode(data)
            data = setup.fit_data(data, self.layout, self.student, self.weigher, self.args)
        return self._loader(data, self.args.per_device_eval_batch_size, training=False)

    def _loader(
        self, dataset: ProblemDataset, batch_size: int, *, training: bool, **settings: Any
    ) -> ProblemLoader:
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        batches = ProblemBatches(len(dataset), batch_size, rank=rank, world=world, **settings)
        collate = self._loss.collate(training=training)
        return ProblemLoader(dataset, batches, collate, **setup.workers(self.args))

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs

    def floating_point_ops(self, inputs: Any) -> int:
        """Returns 6 x parameters x tokens, the usual estimate of forward plus backward."""
        return 6 * sum(tree_length(item.problem) for item in inputs) * self._body_size

    def evaluation_loop(
        self,
        dataloader: ProblemLoader,  # type: ignore[override]  # transformers: any DataLoader
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Returns means over the problems of the evaluation data, as metrics.

        loss: the loss of training, over the problems that have one. nll: every rationale of a
        problem has the same weight. gold_logp, if the weigher uses answer leaves: the
        log-likelihood of the gold answer after the bare question, in nats per token.

        Raises:
            NonFiniteError: a loss was not finite on some rank; raised on every rank.
        """
        model = setup.for_evaluation(self)
        means = EvalMeans()
        training, self._step = self._step, OpenStep()
        for items in dataloader:
            with torch.no_grad(), self.compute_loss_context_manager():
                loss, records = self.compute_loss(model, items, return_outputs=True)
            if self._step.not_finite is None:
                means.add(float(loss), records, items)
        sharding.give_up_head(self.student.head)
        found, self._step = self._step.not_finite, training
        taken = means.take(found, alone=self._alone)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in taken.items()}
        count = len(dataloader.dataset)
        return EvalLoopOutput(None, None, metrics, count)  # type: ignore[arg-type]  # no predictions

    def predict(self, *_: Any, **__: Any) -> Any:
        """Raises NotImplementedError: the trainer keeps no logits."""
        raise NotImplementedError("predict: use `evaluate`, or compact.evaluation for answers")

    # A run and its checkpoints.

    def train(
        self,
        resume_from_checkpoint: str | Path | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Trains, or resumes from a checkpoint with the result of an uninterrupted run.

        Args:
            resume_from_checkpoint: the folder of a checkpoint. True takes the newest undamaged one
                of `output_dir` and warns of each damaged one. None takes the setting.
            trial: as in transformers.
            ignore_keys_for_eval: as in transformers.

        Raises:
            ValueError: there is no checkpoint to resume from, or a new run is started although
                `output_dir` holds checkpoints, a model or a finished run, or this trainer has run.
            NonFiniteError: see `training_step`.
        """
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        run = Path(self._get_output_dir(trial))
        checkpoint, last_step = None, 0
        if resume_from_checkpoint:
            checkpoint = checkpoint_to_resume(run, resume_from_checkpoint)
            last_step = self._load_compact_state(checkpoint)
        elif self.state.global_step:  # weigher and strategy would go on from where they are
            raise ValueError(
                "resume_from_checkpoint must be given to train again; a new run needs a new trainer"
            )
        elif self.args.should_save:
            check_fresh(run, own=run.resolve() in self._own)
        self._own.add(run.resolve())
        self._step, self._means = OpenStep(), Means()
        note = functools.partial(self._note_run, run, datetime.now(timezone.utc))
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            clear_unfinished(run, checkpoint)
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

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        # Resumed at the last step, within an epoch, transformers would take one step more.
        if self.state.global_step < self.state.max_steps:
            return super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]
        return None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes checkpoint-STEP completely or not at all.

        Raises:
            OSError: it could not be written; older files are unchanged.
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
                write_state(staged, self.args, self.weigher, self._loss.kept_levels, self.strategy)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                publish(staged, final)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            most, kept = self.args.save_total_limit, self.state.best_model_checkpoint
            rotate_checkpoints(str(run), save_total_limit=most, best_model_checkpoint=kept)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes student and tokenizer: all files, or none of them.

        Args:
            output_dir: the folder; `output_dir` of the settings if None.
            _internal_call: set by transformers, so that nothing is pushed to the hub.

        Raises:
            OSError: a file could not be written; older files are unchanged.
            ValueError: the folder holds a model that is not of this trainer.
        """
        final = Path(str(output_dir or self.args.output_dir))
        if self.args.should_save and final.resolve() not in self._own:
            check_no_model(final)
        self._own.add(final.resolve())
        staged = final / UNFINISHED_MODEL
        with cleared_up(staged, final):
            if self.args.should_save:
                shutil.rmtree(staged, ignore_errors=True)
            self.accelerator.wait_for_everyone()  # a late rank must not clear new files
            super().save_model(str(staged), _internal_call=True)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                move_whole(staged, final)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, without_tied(self.model, state_dict))
        run = Path(str(self.args.output_dir))
        if self.args.should_save:
            write_card(Path(output_dir or run), run)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Draws the model card anew, before it is pushed to the hub; see `compact.trainer.card`."""
        if self.is_world_process_zero():
            refresh_card(Path(str(self.args.output_dir)))

    def _load_compact_state(self, checkpoint: Path) -> int:
        """Restores running statistics, kept levels and strategy; returns the step."""
        state, step = read_state(checkpoint, self.args.preset, self.args.strategy)
        self.weigher.load_state_dict(state["weigher"])
        self._loss.kept_levels = state["gains"]
        if "strategy" in state:
            self.strategy.load_state_dict(state["strategy"]["state"])
        return step

    def _note_run(self, run: Path, started: datetime, status: str) -> None:
        """Writes run.json: settings, student, data and the status of the run."""
        about = {
            "settings": json.loads(self.args.to_json_string()),  # type: ignore[no-untyped-call]
            "student": self._student_name,
            "data": self.data_name,
            "weigher": self.weigher.name,
            "strategy": self.args.strategy,
            "layout": self.layout,
            "status": status,
            "started": started.isoformat(timespec="seconds"),
        }
        write_run_file(run, about)
