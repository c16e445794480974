"""`compact evaluate`: a student's greedy answers to a test file, judged, and what it forgot."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from compact.checkers import KINDS, Judge
from compact.data import Problem, load_questions
from compact.encode import encode_prompt
from compact.files import content_of, content_of_student, write_whole
from compact.student import base_name, load_model

EPILOG = """example:
  compact evaluate --model runs/svamp --data svamp/test.jsonl --out runs/svamp/evaluate.jsonl

A killed run continues where it stopped when it is started again with the same --out.
"""


def wilson_interval(correct: int, items: int, z: float = 1.96) -> tuple[float, float]:
    """Returns the Wilson score interval of a proportion (z = 1.96: 95%); (0, 1) without items."""
    if items == 0:
        return 0.0, 1.0
    p, n = correct / items, items
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def stop_ids(model: torch.nn.Module, processing_class: Any) -> list[int]:
    """Returns the token ids that end an answer: the model's own and the tokenizer's."""
    own = model.generation_config.eos_token_id
    ids = set(own if isinstance(own, list) else [own]) | {processing_class.eos_token_id}
    return sorted(i for i in ids if i is not None)


@torch.inference_mode()
def generate(
    model: torch.nn.Module,
    processing_class: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> list[list[int]]:
    """Returns the greedy continuation of each prompt, the end token and what follows it cut off.

    Args:
        model: a causal LM of transformers (or a peft model around one), in eval mode.
        processing_class: its tokenizer.
        prompts: token ids of each prompt, any lengths; they become one left-padded batch.
        max_new_tokens: upper limit of the continuation.
    """
    ends = stop_ids(model, processing_class)
    pad = processing_class.pad_token_id
    pad = pad if pad is not None else ends[0]
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    device = next(model.parameters()).device
    # Plain greedy search whatever the model's generation_config suggests.
    output = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        repetition_penalty=1.0,
        eos_token_id=ends,
        pad_token_id=pad,
    )
    texts = []
    for row in output[:, width:].tolist():
        end = next((i for i, token in enumerate(row) if token in ends), len(row))
        texts.append(row[:end])
    return texts


def summary_path(out: Path) -> Path:
    """Returns where the summary of an item file lies: items.jsonl -> items.summary.json."""
    return out.with_name(out.stem + ".summary.json")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON whole or not at all."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_done(out: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the items that an earlier, interrupted run with the same settings has written.

    A half-written last line is cut off the file.

    Raises:
        ValueError: the file belongs to a run with other settings, or a line is not JSON.
    """
    if not out.exists() or out.stat().st_size == 0:
        return {}
    side = summary_path(out)
    if not side.exists():
        raise ValueError(
            f"{out}: exists, but not its {side.name}; choose another --out or delete it"
        )
    before = json.loads(side.read_text(encoding="utf-8"))["settings"]
    changed = sorted(k for k in settings.keys() | before.keys() if settings.get(k) != before.get(k))
    if changed:
        what = ", ".join(f"{k} was {before.get(k)!r}, now {settings.get(k)!r}" for k in changed)
        raise ValueError(f"{out}: holds items of other settings ({what}); choose another --out")
    raw = out.read_bytes()
    whole = raw.rfind(b"\n") + 1
    if whole < len(raw):
        with out.open("r+b") as file:
            file.truncate(whole)
    done = {}
    for number, line in enumerate(raw[:whole].decode("utf-8").split("\n")[:-1], 1):
        try:
            item = json.loads(line)
            done[item["question_id"]] = item
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{out}:{number}: expected one item as JSON, got {line[:60]!r}"
            ) from error
    return done


def summarise(items: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Returns accuracy with its 95% interval and the counts behind it."""
    items = list(items)
    correct = sum(item["correct"] for item in items)
    low, high = wilson_interval(correct, len(items))
    return {
        "items": len(items),
        "correct": correct,
        "accuracy": correct / len(items) if items else 0.0,
        "ci_low": low,
        "ci_high": high,
        "unparsed": sum(item["predicted"] is None for item in items),
        "unjudged": sum(bool(item["note"]) for item in items),
        "mean_tokens": sum(item["tokens"] for item in items) / max(1, len(items)),
    }


def describe(name: str, summary: dict[str, Any]) -> str:
    """Returns a summary as one line."""
    return (
        f"{name}: accuracy {summary['accuracy']:.3f} ({summary['correct']}/{summary['items']}, "
        f"95% CI {summary['ci_low']:.3f}-{summary['ci_high']:.3f}), "
        f"{summary['unparsed']} without an answer, "
        f"{summary['mean_tokens']:.0f} tokens an answer, {summary['seconds']:.0f} s"
    )


def describe_forgetting(found: dict[str, Any]) -> str:
    """Returns what was forgotten, a line a text set or task."""
    lines = [
        f"{path}: accuracy {x['base_accuracy']:.3f} -> {x['student_accuracy']:.3f}, drop "
        f"{x['drop']:+.3f} (95% CI {x['drop_low']:+.3f} to {x['drop_high']:+.3f})"
        for path, x in found["tasks"].items()
    ]
    if "text" in found:
        x = found["text"]
        lines.append(
            f"{x['data']}: perplexity {x['base_perplexity']:.2f} -> {x['student_perplexity']:.2f}, "
            f"KL {x['kl']:.4f} nats a token over {x['tokens']} tokens"
        )
    return "\n".join(lines)


def evaluate(
    model: torch.nn.Module,
    processing_class: Any,
    problems: Sequence[Problem],
    out: str | Path | None = None,
    *,
    settings: dict[str, Any] | None = None,
    judge: Judge | None = None,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    progress: bool = True,
) -> dict[str, Any]:
    """Answers each problem greedily and judges the answers.

    Args:
        model: a causal LM; it is put in eval mode and back.
        processing_class: its tokenizer.
        problems: the questions; only question_id, prompt and answer are read.
        out: item file (JSON lines, appended batch by batch); items that it holds already are kept.
        settings: what identifies the run; kept beside `out` and compared when a run continues.
        judge: judges the completions; None decides by each gold answer how (numbers, letters, ...).
        max_new_tokens: upper limit of an answer.
        batch_size: answers generated at once; results do not depend on it but for rounding.
        progress: whether to draw a progress bar.

    Returns:
        items, correct, accuracy, ci_low, ci_high (95%), unparsed, unjudged, mean_tokens, seconds.

    Raises:
        ValueError: no problems, a question_id that occurs twice, or `out` of another run.
    """
    if not problems:
        raise ValueError("evaluate: problems must hold at least one problem, got none")
    ids = [p.question_id for p in problems]
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise ValueError(f"evaluate: question_id {twice!r} occurs twice")
    start = time.monotonic()
    settings = {"max_new_tokens": max_new_tokens, **(settings or {})}
    done: dict[str, dict[str, Any]] = {}
    file = None
    if out is not None:
        out = Path(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        done = read_done(out, settings)
        write_json(summary_path(out), {"settings": settings, "status": "running"})
        file = out.open("a", encoding="utf-8")
    todo = [
        (encode_prompt(p.prompt, processing_class), p)
        for p in problems
        if p.question_id not in done
    ]
    # Longest first: a batch holds prompts of like length, and memory runs out at once or never.
    todo.sort(key=lambda pair: -len(pair[0]))
    training = model.training
    model.eval()
    own_judge = judge is None
    judge = judge or Judge()
    try:
        with tqdm(
            total=len(problems),
            initial=len(problems) - len(todo),
            unit="item",
            disable=not progress,
        ) as bar:
            for first in range(0, len(todo), batch_size):
                part = todo[first : first + batch_size]
                answers = generate(model, processing_class, [x for x, _ in part], max_new_tokens)
                texts = [processing_class.decode(x, skip_special_tokens=True) for x in answers]
                verdicts = judge([(x, p.answer) for x, (_, p) in zip(texts, part, strict=True)])
                for i, (_, problem) in enumerate(part):
                    done[problem.question_id] = item = {
                        "question_id": problem.question_id,
                        "completion": texts[i].strip(),
                        "gold": problem.answer,
                        **asdict(verdicts[i]),
                        "tokens": len(answers[i]),
                    }
                    if file:
                        file.write(json.dumps(item, ensure_ascii=False) + "\n")
                if file:
                    file.flush()
                bar.update(len(part))
                right = sum(item["correct"] for item in done.values())
                bar.set_postfix_str(f"accuracy {right / len(done):.3f}")
    finally:
        model.train(training)
        if own_judge:
            judge.close()
        if file:
            file.close()
    summary = summarise(done[i] for i in ids) | {"seconds": round(time.monotonic() - start, 1)}
    if out is not None:
        write_json(summary_path(out), {"settings": settings, "status": "complete", **summary})
    return summary


def read_texts(path: str | Path) -> list[str]:
    """Reads retained texts: JSON lines {"text": ...}, or plain text with blank lines between them.

    Raises:
        ValueError: `file:line` of a row without text, or a file without any text.
        OSError: the file cannot be read.
    """
    raw = Path(path).read_text(encoding="utf-8")
    if Path(path).suffix != ".jsonl":
        texts = [part.strip() for part in raw.split("\n\n") if part.strip()]
    else:
        texts = []
        for number, line in enumerate(raw.split("\n"), 1):
            try:
                text = json.loads(line)["text"] if line.strip() else ""
            except (json.JSONDecodeError, KeyError, TypeError):
                raise ValueError(
                    f'{path}:{number}: expected {{"text": ...}}, got {line[:60]!r}'
                ) from None
            if not isinstance(text, str):
                raise ValueError(
                    f"{path}:{number}: text must be a string, got {type(text).__name__}"
                )
            texts += [text] if text.strip() else []
    if not texts:
        raise ValueError(f"{path}: holds no text")
    return texts


@torch.inference_mode()
def text_drift(
    student: torch.nn.Module,
    base: torch.nn.Module,
    processing_class: Any,
    texts: Sequence[str],
    *,
    max_length: int = 1024,
) -> dict[str, float]:
    """Measures how far a student has moved from its base on texts it should still know.

    Args:
        student: the distilled model.
        base: the model it started from; the student itself with its adapter switched off, where the
            student is a peft model and `base` is the same object.
        processing_class: the tokenizer of both.
        texts: the retained text set.
        max_length: tokens of a text that are read.

    Returns:
        tokens, base_perplexity, student_perplexity and kl = KL(base || student), nats a token.

    Raises:
        ValueError: no text has two tokens.
    """
    device = next(student.parameters()).device
    count, nll, base_nll, kl = 0, 0.0, 0.0, 0.0
    for text in tqdm(texts, unit="text", desc="retained text"):
        ids = torch.tensor([processing_class(text)["input_ids"][:max_length]], device=device)
        if ids.shape[1] < 2:
            continue
        target = ids[0, 1:, None]
        ours = student(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        with student.disable_adapter() if base is student else nullcontext():
            theirs = base(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        nll -= ours.gather(1, target).sum().item()
        base_nll -= theirs.gather(1, target).sum().item()
        kl += (theirs.exp() * (theirs - ours)).sum().item()
        count += len(target)
    if not count:
        raise ValueError("retained text: expected a text of at least two tokens, got none")
    return {
        "tokens": count,
        "base_perplexity": math.exp(base_nll / count),
        "student_perplexity": math.exp(nll / count),
        "kl": kl / count,
    }


def paired_drop(base: Path, student: Path) -> dict[str, float]:
    """Compares two item files on the same questions.

    Returns:
        base_accuracy, student_accuracy, drop = base - student, and its 95% interval drop_low,
        drop_high from the per-question differences (normal approximation).
    """
    rights = []
    for path in (base, student):
        items = map(json.loads, path.read_text(encoding="utf-8").split("\n")[:-1])
        rights.append({item["question_id"]: item["correct"] for item in items})
    lost = [rights[0][i] - rights[1][i] for i in rights[0]]
    n = len(lost)
    drop = sum(lost) / n
    half = 1.96 * math.sqrt(sum((x - drop) ** 2 for x in lost) / max(1, n - 1) / n)
    return {
        "items": n,
        "base_accuracy": sum(rights[0].values()) / n,
        "student_accuracy": sum(rights[1].values()) / n,
        "drop": drop,
        "drop_low": drop - half,
        "drop_high": drop + half,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `compact evaluate`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("--model", required=True, help="folder, Hugging Face name or .gguf file")
    parser.add_argument("--adapter", metavar="DIR", help="LoRA adapter to load onto the model")
    parser.add_argument(
        "--data", required=True, metavar="FILE", help="JSON lines: question_id, prompt, answer"
    )
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="item file, JSON lines, appended"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N items")
    parser.add_argument("--checker", choices=KINDS, default="auto", help="how answers are compared")
    parser.add_argument("--max_new_tokens", type=int, default=256, metavar="N", help="[256]")
    parser.add_argument("--batch_size", type=int, default=32, metavar="N", help="[32]")
    group = parser.add_argument_group("forgetting, against the base student")
    group.add_argument("--base", metavar="MODEL", help="[--model without its adapter]")
    group.add_argument("--retained", metavar="FILE", help="texts: perplexity and KL to the base")
    group.add_argument(
        "--retained_task", metavar="FILE", action="append", default=[], help="questions: the drop"
    )


def run(args: argparse.Namespace) -> int:
    """Runs `compact evaluate`; returns the exit status."""
    for name in ("limit", "max_new_tokens", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    forgetting = bool(args.retained or args.retained_task)
    stems = [Path(path).stem for path in args.retained_task]
    if len(set(stems)) < len(stems):
        raise ValueError(f"--retained_task must be files of different names, got {stems}")
    problems = load_questions(args.data)[: args.limit]
    tasks = {path: load_questions(path)[: args.limit] for path in args.retained_task}
    texts = read_texts(args.retained) if args.retained else []
    model, processing_class = load_model(args.model, args.adapter)
    base = model
    if forgetting and args.base:
        base, _ = load_model(args.base)
    elif forgetting and not hasattr(model, "disable_adapter"):
        raise ValueError(f"{args.model}: is no adapter, so --base must name the model it came from")
    judge = Judge(args.checker)

    own = content_of_student(args.model, args.adapter)
    before = content_of_student(
        args.base or (args.model if args.adapter else base_name(args.model))
    )

    def measure(
        model: torch.nn.Module, name: str, data: str, items: Sequence[Problem], out: Path, of: str
    ):
        settings = {"model": name, "adapter": args.adapter, "data": data, "limit": args.limit}
        settings |= {"content": content_of(data), "weights": of}
        summary = evaluate(
            model,
            processing_class,
            items,
            out,
            settings=settings | {"checker": args.checker},
            judge=judge,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
        )
        print(f"{describe(data, summary)} -> {out}", flush=True)
        return summary

    out = Path(args.out)
    try:
        measure(model, args.model, args.data, problems, out, own)
        drops = {}
        for path, items in tasks.items():
            files = [
                out.with_name(f"{out.stem}.{Path(path).stem}.{x}.jsonl")
                for x in ("base", "student")
            ]
            with model.disable_adapter() if base is model else nullcontext():
                measure(base, args.base or f"{args.model} (base)", path, items, files[0], before)
            measure(model, args.model, path, items, files[1], own)
            drops[path] = paired_drop(*files)
    finally:
        judge.close()
    if forgetting:
        found = {"tasks": drops}
        if texts:
            found["text"] = {"data": args.retained} | text_drift(
                model, base, processing_class, texts
            )
        report = json.loads(summary_path(out).read_text(encoding="utf-8"))
        write_json(summary_path(out), report | {"forgetting": found})
        print(describe_forgetting(found))
    return 0
