"""Prepares the trainer before its first step: problems, adapters, layout, machine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, set_seed

from compact.config import CompactConfig
from compact.data import Problem, load_problems, of_teacher
from compact.data.rows import HUB
from compact.passes import EncodedProblem
from compact.passes.encode import tell_of_cuts
from compact.passes.forward import check_ids, check_positions, check_window, reach
from compact.passes.layout import LEAF_ROOM, choose_layout
from compact.passes.lazily import LazyProblems
from compact.passes.packing import Layout
from compact.registry import unknown
from compact.strategies import Strategy
from compact.student import Student
from compact.student.generation import keep_stop_ids, stop_ids
from compact.student.internals import has_bf16_products, let_cpu_ranks_shard, use_one_gpu
from compact.trainer import sharding
from compact.trainer.batches import ProblemDataset, asks_leaves
from compact.validity.summary import describe
from compact.weighting import Skips, Weigher, check_gold, skip_beyond, skip_wrong

logger = logging.getLogger(__name__)

RELEASED_WEIGHT_DECAY = 0.01
"""That of the public training code: the default of torch.optim.AdamW. Here the default is 0."""


def mapping(setting: dict[str, Any] | str | None) -> dict[str, Any]:
    """Returns a setting that `CompactConfig` has checked to be a mapping; {} for None."""
    assert not isinstance(setting, str)
    return setting or {}


def check_strategy(weigher: Weigher, strategy: Strategy, args: CompactConfig) -> None:
    """Raises ValueError if weigher, strategy and settings do not go together."""
    strategy.check(weigher, args)
    sharded = sharding.asked_for(args)
    if sharded and strategy.needs_whole_model:
        raise ValueError(
            f"strategy must not be {args.strategy} with {sharded}, because it needs whole "
            "parameters on each process; use one process or ddp"
        )
    if args.leaf_every > 1 and _changes(strategy, "rollout"):
        raise ValueError(
            f"leaf_every must be 1 with strategy {args.strategy}, whose rationales change from "
            f"step to step, got {args.leaf_every}"
        )
    if args.leaf_every > 1 and (weigher.needs.options or weigher.needs.leaf_hidden):
        raise ValueError(
            "leaf_every must be 1 with metrics that read option leaves or the hidden states of "
            f"answer leaves, got {args.leaf_every}"
        )


def tell_of_weight_decay(args: CompactConfig) -> None:
    """Warns if the preset is `released`, but the weight decay is not that of the public code."""
    if args.preset == "released" and args.weight_decay != RELEASED_WEIGHT_DECAY:
        logger.warning(
            "released: the public training code has weight_decay %g, this run has %g; "
            "recipes/released.yaml has all its settings",
            RELEASED_WEIGHT_DECAY,
            args.weight_decay,
        )


def problems_of(weigher: Weigher, dataset: Any) -> list[Problem]:
    """Returns the problems of a dataset that the weigher can use.

    Args:
        weigher: the weigher. If it uses a single teacher, problems without a rationale of that
            teacher are left out, with a warning.
        dataset: rows, a path, a datasets.Dataset or a list of problems.
    """
    if isinstance(dataset, Sequence) and dataset and isinstance(dataset[0], Problem):
        given = list(dataset)
    else:
        given = load_problems(dataset)
    if weigher.teacher is None:
        return given
    problems = of_teacher(weigher.teacher, given)
    if len(problems) < len(given):
        left = f"{len(given) - len(problems)} of {len(given)}"
        logger.warning("%s: %s problems have no rationale", weigher.name, left)
    return problems


def training_problems(
    weigher: Weigher, strategy: Strategy, args: CompactConfig, dataset: Any
) -> list[Problem]:
    """Returns the problems of a dataset that weigher and strategy can train on.

    A strategy that needs gold answers gets the problems that have one, with a warning.

    Raises:
        ValueError: weigher or strategy needs gold answers, and no problem has one.
    """
    problems = problems_of(weigher, dataset)
    check_gold(weigher, problems)
    if "gold" not in strategy.needs:
        return problems
    known = [problem for problem in problems if problem.answer is not None]
    if not known:
        raise ValueError(
            f"strategy: {args.strategy} needs gold answers, and no row of the data has the field "
            "'answer'"
        )
    if len(known) < len(problems):
        left = f"{len(problems) - len(known)} of {len(problems)}"
        logger.warning("%s: %s problems have no gold answer and are left out", args.strategy, left)
    return known


def skips_of(weigher: Weigher, strategy: Strategy, args: CompactConfig) -> Skips | None:
    """Returns which rationales of a problem are not read in training; None: all are read.

    Raises:
        ValueError: `max_rationales_per_problem` is set, and the strategy may read any rationale: it
            changes rationales or weights, or adds to the loss.
    """
    plain = not _changes(strategy, "rollout", "weigh", "loss_terms")
    most = args.max_rationales_per_problem
    if most is None:
        return weigher.skips if plain else None
    if not plain:
        raise ValueError(
            f"max_rationales_per_problem must be None with strategy {args.strategy}, which may "
            f"read any rationale, got {most}"
        )
    return partial(skip_beyond, most, args.seed, weigher.skips)


def _changes(strategy: Strategy, *hooks: str) -> bool:
    """Returns whether a strategy has a hook of its own among these."""
    return any(getattr(type(strategy), hook) is not getattr(Strategy, hook) for hook in hooks)


def encoded(
    weigher: Weigher,
    processing_class: PreTrainedTokenizerBase,
    args: CompactConfig,
    dataset: Any,
    skips: Skips | None = None,
) -> ProblemDataset:
    """Returns the problems of `problems_of` as token ids."""
    options: dict[str, Any] = {"max_length": args.max_length, "leaf_budget": args.leaf_budget}
    options["keep_tail"] = weigher.keep_tail
    options["options"] = weigher.needs.options
    problems = problems_of(weigher, dataset)
    judged = weigher.needs.judgements
    lazily = LazyProblems(problems, processing_class, judged=judged, **options)
    return ProblemDataset(lazily, skips, args.leaf_budget)


def each(encode: Callable[[Any], ProblemDataset], evals: Any) -> Any:
    """Returns one or several (by name) data sets of an evaluation, encoded; None stays None."""
    if isinstance(evals, Mapping):
        return {name: encode(data) for name, data in evals.items()}
    return None if evals is None else encode(evals)


def check_loaded(model: Any, args: CompactConfig) -> None:
    """Checks a student that was not loaded here, and warns of settings for loading one.

    Raises:
        ValueError: its parameters are sharded.
    """
    sharding.check_whole(model)
    if args.model_init_kwargs:
        logger.warning("model_init_kwargs: without effect, because model is not a name")


def with_adapters(model: Any, peft_config: Any, seed: int) -> Any:
    """Returns the model with new adapters.

    Raises:
        ValueError: the model already has adapters.
    """
    from peft import get_peft_model

    if hasattr(model, "peft_config"):
        raise ValueError(
            "peft_config must be None with a model that has adapters, because their training "
            f"continues, got {type(peft_config).__name__}; to train new adapters, merge the old "
            "ones first (merge_and_unload)"
        )
    set_seed(seed)  # LoRA matrices are initialised at random
    return get_peft_model(model, peft_config)


def fit_machine(args: CompactConfig) -> None:
    """Adapts the settings to this machine, and warns if a setting will be slow."""
    # It reads the loss of every micro-batch, for which a GPU waits; here none is NaN (`step.py`).
    args.logging_nan_inf_filter = False
    if args.n_gpu > 1:
        logger.warning(
            "this process uses one GPU; to use all %d, start one process per GPU with accelerate",
            args.n_gpu,
        )
        use_one_gpu(args)
    if args.bf16 and args.device.type == "cpu" and not has_bf16_products():
        logger.warning(
            "bf16: this CPU has no instructions for it; matrix products take tens of times as "
            "long as in float32"
        )
    if sharding.asked_for(args) == "FSDP":
        let_cpu_ranks_shard()


def workers(args: CompactConfig) -> dict[str, Any]:
    """Returns the settings of DataLoader for its worker processes."""
    count = args.dataloader_num_workers
    if not count:
        return {}
    return {
        "num_workers": count,
        "prefetch_factor": args.dataloader_prefetch_factor,
        "persistent_workers": args.dataloader_persistent_workers,
        "multiprocessing_context": args.dataloader_multiprocessing_context,
    }


def one_of(own: Any, asked: Any) -> Any:
    """Returns the data of an evaluation.

    Args:
        own: the trainer's, of which there may be several by name.
        asked: the name of one of several, or data in any form that the trainer takes; None for the
            trainer's own.

    Raises:
        ValueError: there are none.
    """
    several = own if isinstance(own, Mapping) else {}
    if isinstance(asked, str) and asked in several:
        return several[asked]
    path = isinstance(asked, str) and (asked.startswith(HUB) or Path(asked).exists())
    if several and isinstance(asked, str) and not path:
        raise ValueError(unknown("eval_dataset", asked, list(several)))
    found = own if asked is None else asked
    if found is None or isinstance(found, Mapping):
        what = "none" if found is None else f"several: {', '.join(found)}"
        raise ValueError(f"eval_dataset must be one data set, got {what}")
    return found


def for_evaluation(trainer: Any) -> Any:
    """Returns the trainer's model, on its device and in the mode of evaluation."""
    model = trainer.model_wrapped
    if model is trainer.model and (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        model.to(trainer.args.device)  # transformers leaves that to the first step of training
    model.eval()
    if callable(getattr(trainer.optimizer, "eval", None)):
        trainer.optimizer.eval()  # a schedule-free one evaluates at other weights
    return model


def layout_for(
    student: Student, weigher: Weigher, args: CompactConfig, data: ProblemDataset | None, evals: Any
) -> Layout:
    """Chooses the layout of the batches, logs why, and prepares the data for that layout.

    Raises:
        ValueError: the layout must be "tree", but the student or the weigher does not support it;
            or as in `check_positions`.
    """
    wanted = args.layout
    if weigher.needs.padded:
        if wanted == "tree":
            raise ValueError(f"layout must be auto or padded with {args.preset}, got 'tree'")
        wanted = "padded"
    given = list(evals.values()) if isinstance(evals, Mapping) else [evals]
    given = [each for each in (data, *given) if each is not None]
    problems = [problem for each in given for problem in each.problems.sample]
    reaches = [reach(problem, weigher.needs.leaves) for problem in problems]
    whole = all(len(each.problems.sample) == len(each.problems) for each in given)
    asks = weigher.needs.leaves or weigher.needs.options
    least = LEAF_ROOM if asks and not whole else 0
    room = max([least, *(leaf - row for row, leaf in reaches)])
    check_positions(student, args.max_length, room)
    layout, reason = choose_layout(student, wanted, args.max_length, room)
    if weigher.needs.padded:
        reason = f"as {args.preset} needs"
    fallen = layout == "padded" and wanted == "auto"  # each rationale repeats the prompt
    logger.log(logging.WARNING if fallen else logging.INFO, "layout: %s (%s)", layout, reason)
    for each in given:
        fit_data(each, layout, student, weigher, args)
    return layout


def fit_data(
    data: ProblemDataset, layout: Layout, student: Student, weigher: Weigher, args: CompactConfig
) -> ProblemDataset:
    """Returns the data, set to a layout. Warns if `max_length` cuts rationales.

    Of data that are encoded when they are needed, a sample is checked.

    Raises:
        ValueError: it has no embedding for a token or a position, or its attention does not reach
            over a problem's tree.
    """
    data.padded = layout == "padded"
    sample = data.problems.sample
    check_ids(student, sample, leaves=weigher.needs.leaves)
    if layout == "tree":
        check_window(student, sample, leaves=weigher.needs.leaves)
    tell_of_cuts(sample, args.max_length)
    return data


def check_training(trainer: Any, data: ProblemDataset) -> None:
    """Checks what a trainer trains and evaluates, and logs what the weights rest on.

    It warns if the student would not learn to stop. The tokens at which it learns to stop are added
    to its generation config, which is saved with it.

    Raises:
        ValueError: no parameter would be trained, or no problem would be; with DeepSpeed, some
            problem would not be; or as in `check_losses`.
    """
    student, weigher, strategy = trainer.student, trainer.weigher, trainer.strategy
    args = trainer.args
    if not any(parameter.requires_grad for parameter in student.model.parameters()):
        raise ValueError(
            "model must have a parameter that requires a gradient, got none; an adapter is loaded "
            "for training with PeftModel.from_pretrained(..., is_trainable=True)"
        )
    if not _changes(strategy, "rollout", "weigh"):  # else also what the preset gives weight 0
        with_loss, count = have_loss(weigher, strategy, data), len(data.problems.sample)
        if not any(with_loss):
            raise ValueError(
                f"train_dataset must have a rationale that preset {args.preset} trains on, got "
                f"none in {count} problems: all have weight 0"
            )
        # Of data that are encoded as a whole, such problems are not read.
        if sharding.asked_for(args) == "DEEPSPEED" and count < len(data) and not all(with_loss):
            raise ValueError(
                f"train_dataset: {with_loss.count(False)} of a sample of {count} problems have no "
                "loss; with DeepSpeed every problem needs one (filter with compact score --keep)"
            )
    check_losses(trainer)
    whole = [r for problem in data.problems.sample for r in problem.rationales if not r.cut]
    ends = {token for r in whole for token in r.ids[-3:]}  # `keep_tail` has a newline behind it
    keep_stop_ids(student.model, student.tokenizer)
    if ends and ends.isdisjoint(stop_ids(student.model, student.tokenizer)):
        logger.warning(
            "the chat template puts no end-of-turn token after a completion, so the student does "
            "not learn to stop"
        )
    log_data(data, weigher, args.leaf_budget)


def have_loss(weigher: Weigher, strategy: Strategy, data: ProblemDataset) -> list[bool]:
    """Returns whether each problem can have a loss; of large data, the sample is read."""

    def can(problem: EncodedProblem) -> bool:
        skips: Sequence[bool] = [False] * len(problem.rationales)
        if weigher.skips is not None:
            skips = weigher.skips(problem)
        pairs = zip(skips, problem.rationales, strict=True)
        return any(not skip and strategy.knows(r.teacher) for skip, r in pairs)

    return list(map(can, data.problems.sample))


def check_losses(trainer: Any) -> None:
    """Warns of evaluation data in which no problem can have a loss.

    Raises:
        ValueError: a trainer would choose its best model by a metric that it does not report.
    """
    weigher, strategy, args = trainer.weigher, trainer.strategy, trainer.args
    evals = trainer.eval_dataset
    each = {f"{name}_": data for name, data in evals.items()} if isinstance(evals, Mapping) else {}
    reported, without = list[str](), list[str]()
    for name, data in (each or {"": evals}).items():
        if data is None:
            continue
        (reported if any(have_loss(weigher, strategy, data)) else without).append(f"{name}loss")
        reported.append(f"{name}nll")
        if weigher.needs.leaves and asks_leaves(data.problems.sample):
            reported.append(f"{name}gold_logp")
    for name in without:
        logger.warning("eval_dataset: no problem can have a loss; there is no eval_%s", name)
    given = args.metric_for_best_model
    best = (given or "").removeprefix("eval_")
    # Code of others may add metrics to those of an evaluation.
    hooks = [trainer.evaluate, trainer.evaluation_loop]
    hooks += [callback.on_evaluate for callback in trainer.callback_handler.callbacks]
    ours = all(hook.__module__.split(".")[0] in ("compact", "transformers") for hook in hooks)
    if args.eval_strategy != "no" and best and (best in without or ours and best not in reported):
        why = f"no problem can have a loss with preset {args.preset} and strategy {args.strategy}"
        raise ValueError(
            f"metric_for_best_model must be one of {', '.join(reported)}, got {given!r}"
            + (f": {why}" if best in without else "")
        )


def log_data(data: ProblemDataset, weigher: Weigher, budget: float) -> None:
    """Logs what the weights rest on, what is not read, and what the leaf budget leaves out.

    Args:
        data: the data.
        weigher: the weigher that is trained with.
        budget: the leaf budget.
    """
    problems = data.problems.sample
    if len(problems) < len(data):
        logger.info(
            "data: %d problems, encoded when they are needed; what follows is of a sample of %d",
            len(data),
            len(problems),
        )
    judged = [[r.judgement for r in p.rationales if r.judgement is not None] for p in problems]
    if any(judged):
        weighed = weigher.skips is skip_wrong
        for sentence in describe([found for found in judged if found], weighed=weighed):
            logger.info("weights: %s", sentence)
    count = sum(len(p.rationales) for p in problems)
    if len(problems) == len(data.problems):
        problems = [data[i].problem for i in range(len(data))]  # without those that are left out
    else:
        problems = [data.read(problem) for problem in problems]
    rationales = [r for p in problems for r in p.rationales]
    if unread := count - len(rationales):
        logger.info("weights: %d of %d rationales are not read and have weight 0", unread, count)
    steps = sum(len(r.steps) for r in rationales)
    asked = sum(len(r.asked_steps) for r in rationales)
    if weigher.needs.leaves and asked < steps:
        logger.info("answer leaves: after %d of %d steps (leaf_budget %g)", asked, steps, budget)
