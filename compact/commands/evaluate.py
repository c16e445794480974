"""`compact evaluate`: measures a student's accuracy on a test file, and what it forgot."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from compact.answers import Judge, domain_names
from compact.data import PreferencePair, Problem, load_questions, load_test
from compact.data.rows import content_of_rows
from compact.evaluation.imported import imports_of
from compact.files import check_input, check_output, content_of_student
from compact.options import check_given
from compact.student import base_name

EPILOG = """example:
  compact evaluate --model runs/svamp --data svamp/test.jsonl --out runs/svamp/evaluate.jsonl

To resume a killed run, start it again with the same --out.
"""
DEFAULTS = {"max_new_tokens": 256, "batch_size": 32}
"""The options of generation."""
_WEIGHTS = ("base", "retained", "retained_task")
_WITHOUT = {
    "preference pairs": (
        *(*_WEIGHTS, "endpoint", "api_key_env", "num_processes", "part", "answer_type"),
        *DEFAULTS,
    ),
    "--endpoint": (*_WEIGHTS, "adapter", "device", "dtype", "num_processes", "part"),
    "--num_processes": (*_WEIGHTS, "part"),
}
"""Way of evaluating -> the options that may not be given. The processes get all others."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `compact evaluate`."""
    parser.add_argument("--model", required=True, help="folder, Hugging Face name or .gguf file")
    parser.add_argument("--adapter", metavar="DIR", help="LoRA adapter to load onto the model")
    parser.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help="JSON lines: question_id, prompt, answer; or preference pairs: prompt, chosen, "
        "rejected",
    )
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="file of answers, JSON lines; appended to"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N items")
    parser.add_argument(
        "--answer_type",
        choices=domain_names(),
        help="answer domain of all questions [detected per question; see compact metrics]",
    )
    parser.add_argument(
        "--endpoint", metavar="URL", help="a server that answers for --model, its name there"
    )
    parser.add_argument(
        "--api_key_env", metavar="NAME", help="environment variable with the endpoint's key"
    )
    parser.add_argument(
        "--max_new_tokens", type=int, metavar="N", help="most tokens of an answer [256]"
    )
    parser.add_argument("--batch_size", type=int, metavar="N", help="questions at once [32]")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 [the GPU if any]")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "auto"),
        help="number format of the weights; auto: that of the files [float32]",
    )
    parser.add_argument(
        "--num_processes", type=int, metavar="N", help="answer in N processes, one a GPU"
    )
    parser.add_argument(
        "--part",
        metavar="k/N",
        help="only every N-th question from the k-th on; their answers go to OUT.part-k.jsonl",
    )
    group = parser.add_argument_group("forgetting, against the base student")
    group.add_argument(
        "--base", metavar="MODEL", help="the student before training [--model without its adapter]"
    )
    group.add_argument("--retained", metavar="FILE", help="texts for perplexity and KL to the base")
    group.add_argument(
        "--retained_task",
        metavar="FILE",
        action="append",
        default=[],
        help="questions for the drop in accuracy; may be repeated",
    )


def run(args: argparse.Namespace) -> int:
    """Runs `compact evaluate`; returns the exit status."""
    check_given(args, "limit", *DEFAULTS, "num_processes", least=1)
    forgetting = bool(args.retained or args.retained_task)
    for name, used, what in (
        ("base", forgetting or args.endpoint, "--retained or --retained_task"),
        ("api_key_env", args.endpoint is not None, "--endpoint"),
    ):
        if getattr(args, name) is not None and not used:
            raise ValueError(f"--{name} must be used with {what}")
    stems = [Path(path).stem for path in args.retained_task]
    if len(set(stems)) < len(stems):
        raise ValueError(f"--retained_task must be files of different names, got {stems}")
    texts_of = [args.retained] if args.retained else []
    out = check_output(args.out, args.data, *args.retained_task, *texts_of)
    test = load_test(args.data)[: args.limit]
    if isinstance(test[0], PreferencePair):
        return _pairs(args, test, out)
    for way in ("--endpoint", "--num_processes"):
        if getattr(args, way[2:]) is not None:
            _refuse(args, way)
    for name, default in DEFAULTS.items():
        setattr(args, name, getattr(args, name) or default)
    problems = _checked(args, args.data, test)
    tasks = {p: _checked(args, p, load_questions(p)[: args.limit]) for p in args.retained_task}
    if args.endpoint is not None:
        return _served(args, problems)
    if args.num_processes is not None:
        return _in_processes(args, problems, out)
    for path in texts_of:
        check_input(path)
    # What needs no torch is refused before it loads, which takes seconds.
    import torch

    from compact.evaluation import against_base
    from compact.evaluation.evaluate import describe, evaluate
    from compact.evaluation.forgetting import describe_forgetting, read_texts
    from compact.evaluation.processes import part_file, part_of
    from compact.student import load_model
    from compact.trainer.card import refresh_card

    if args.part is not None:
        k, count = part_of(args.part)
        problems, out = problems[k - 1 :: count], part_file(out, k)
        if args.device is None and torch.cuda.is_available():
            args.device = f"cuda:{(k - 1) % torch.cuda.device_count()}"
    texts = read_texts(args.retained) if args.retained else []
    where = {"device": args.device, "dtype": args.dtype}
    model, processing_class = load_model(args.model, args.adapter, **where)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and args.max_new_tokens > positions:
        raise ValueError(
            f"--max_new_tokens must be at most {positions}, the positions of {args.model}, got "
            f"{args.max_new_tokens}"
        )
    base = model
    if forgetting and args.base:
        base, _ = load_model(args.base, **where)
    elif forgetting and not hasattr(model, "disable_adapter"):
        raise ValueError(f"--base must name the base student: {args.model} is not an adapter")
    started_as = args.base or (args.model if args.adapter else base_name(args.model))
    names = {"student": args.model, "base": args.base or f"{args.model} (base)"}
    contents = {
        "student": content_of_student(args.model, args.adapter),
        "base": content_of_student(started_as),
    }

    def answer(of: str, data: str, items: Sequence[Problem], file: Path) -> None:
        bare = of == "base" and base is model
        with model.disable_adapter() if bare else nullcontext():
            summary = evaluate(
                base if of == "base" else model,
                processing_class,
                items,
                file,
                settings=_settings(args, names[of], data, contents[of]),
                judge=judge,
                max_new_tokens=args.max_new_tokens,
                batch_size=args.batch_size,
            )
        print(f"{describe(data, summary)} -> {file}", flush=True)

    with closing(Judge()) as judge:
        answer("student", args.data, problems, out)
        drops = against_base.task_drops(answer, tasks, out)
    if forgetting:
        found = against_base.drift(
            model,
            base,
            processing_class,
            retained=(args.retained, texts),
            answers=(f"{args.data} (own answers)", against_base.own_answers(problems, out)),
        )
        found |= {"tasks": drops}
        against_base.add_forgetting(out, found)
        print(describe_forgetting(found))
    refresh_card(out.parent)
    return 0


def _checked(args: argparse.Namespace, path: str, found: list[Problem]) -> list[Problem]:
    """Returns the questions of a file in the answer domain that was asked for.

    Raises:
        ValueError: a gold answer is none of its domain; so this is told before the model loads.
    """
    if args.answer_type is not None:
        found = [replace(p, answer_type=args.answer_type) for p in found]
    for problem in found:
        try:
            _ = problem.domain
        except ValueError as error:
            raise ValueError(f"{path}: question_id {problem.question_id!r}: {error}") from None
    return found


def _refuse(args: argparse.Namespace, way: str) -> None:
    """Raises ValueError for an option that may not be given with this way of evaluating."""
    for name in _WITHOUT[way]:
        if getattr(args, name):
            raise ValueError(f"--{name} must not be given with {way}")


def _pairs(args: argparse.Namespace, pairs: Sequence[PreferencePair], out: Path) -> int:
    """Evaluates on preference pairs."""
    _refuse(args, "preference pairs")
    from compact.evaluation.preference import describe_pairs, evaluate_pairs
    from compact.student import load_model

    model, processing_class = load_model(
        args.model, args.adapter, device=args.device, dtype=args.dtype
    )
    of = content_of_student(args.model, args.adapter)
    settings = _settings(args, args.model, args.data, of)
    summary = evaluate_pairs(model, processing_class, pairs, out, settings=settings)
    print(f"{describe_pairs(args.data, summary)} -> {out}", flush=True)
    return 0


def _settings(args: argparse.Namespace, model: str, data: str, weights: str) -> dict[str, Any]:
    """Returns what identifies the answers to a file of questions."""
    return {
        "model": model,
        "adapter": args.adapter,
        "data": data,
        "limit": args.limit,
        "content": content_of_rows(data),
        "weights": weights,
        "dtype": args.dtype,
        "answer_type": args.answer_type,
        **({"part": args.part} if args.part is not None else {}),
        **imports_of(),
    }


def _in_processes(args: argparse.Namespace, problems: Sequence[Problem], out: Path) -> int:
    """Evaluates in several processes."""
    from compact.evaluation.evaluate import describe
    from compact.evaluation.processes import evaluate_in_processes
    from compact.trainer.card import refresh_card

    options = [
        f"--{name}={value}"
        for name, value in vars(args).items()
        if name != "num_processes" and value not in (None, [])
    ]
    of = content_of_student(args.model, args.adapter)
    settings = {
        "max_new_tokens": args.max_new_tokens,
        **_settings(args, args.model, args.data, of),
    }
    summary = evaluate_in_processes(problems, out, args.num_processes, options, settings)
    print(f"{describe(args.data, summary)} -> {out}", flush=True)
    refresh_card(out.parent)
    return 0


def _served(args: argparse.Namespace, problems: Sequence[Problem]) -> int:
    """Evaluates the student behind --endpoint."""
    from compact.evaluation.evaluate import describe
    from compact.evaluation.served import evaluate_served

    settings = {"data": args.data, "limit": args.limit, "content": content_of_rows(args.data)}
    summary = evaluate_served(
        args.endpoint,
        args.model,
        problems,
        args.out,
        settings=settings | {"answer_type": args.answer_type} | imports_of(),
        api_key_env=args.api_key_env,
        max_new_tokens=args.max_new_tokens,
        concurrency=args.batch_size,
    )
    print(f"{describe(args.data, summary)} -> {args.out}", flush=True)
    return 0
