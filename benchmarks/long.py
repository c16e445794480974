"""A training step on long rationales, with gradient checkpointing: one problem, K = 4.

A step is batch building, forward, loss and backward. Gradient checkpointing is on for every
provider, as anyone would have it at these lengths. Its second forward is part of the time.

With `data=synthetic` a row of L tokens has a question of 128 tokens and four rationales of equal
length, so padding costs SFT nothing; token ids are random. The student has two layers of width 128
and LoRA of rank 16 on all linear layers. With `data=longcot` the problem is a real one, with traces
of four long-reasoning models, and the student is SmolLM2-135M with LoRA, as in the case `step`. Of
the problems with at most L tokens in all, the one is taken whose tree is the median share of its
padded rows.

- `sft`: one padded row per rationale, transformers' own loss on the completions.
- `compact`: the tree layout (the question once, then the rationales), uniform weights.
- `compact-probes`: the default preset, with answer leaves; on real problems within the default leaf
  budget, on synthetic ones after every step of 21 tokens, which is about as many.
- `compact-half`, `compact-probes-half`: the same on half of L tokens (synthetic only): how memory
  grows when the length doubles.

Loss and two LoRA gradients are checked against the weighted sum of those of single rows, from full
logits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import real, scale, step
from benchmarks.harness import Args, Outputs, Provider, Skipped
from benchmarks.students import Size, backward, compact_loss, leaf_weights, padded_rows
from compact.data import load_problems
from compact.passes import EncodedProblem
from compact.passes.encode import encode_problem
from compact.passes.packing import tree_length
from compact.weighting import Weigher, make_weigher

TITLE = "A step on long rationales, with gradient checkpointing"
LEGEND = (
    "One problem of L tokens: a question and four rationales, tree layout, against SFT on one "
    "padded row per rationale. `data=synthetic`: rationales of equal length, a student of two "
    "layers of width 128; `-half` is the same provider on half of the tokens, which shows how "
    "memory grows. `data=longcot`: a real problem with the traces of four long-reasoning models, "
    "whose tree is the median share of its padded rows; the student is SmolLM2-135M with LoRA."
)
SHAPES: tuple[dict[str, int | str], ...] = (
    *({"L": 1024 << i, "data": "synthetic"} for i in range(6)),
    {"L": 4096, "data": "longcot"},
)
DTYPES = ("float32",)
LONGCOT = real.SVAMP.parents[1] / "longcot_gsm8k/train.jsonl"
TINY = Size("tiny", 128, 2, 4, 2, 384, 4096)
TEACHERS, QUESTION = 4, 128
MOST = 8192  # tokens of a real prompt and rationale; longer ones are cut


def synthetic(length: int, seed: int) -> EncodedProblem:
    """Returns a problem whose tree has `length` tokens, but for the division by TEACHERS."""
    question = min(QUESTION, length // 4)
    shape = {"Q": question, "K": TEACHERS, "T": (length - question) // TEACHERS}
    (problem,) = scale.synthetic(1, shape | {"V": TINY.vocabulary}, seed)
    return problem


def longcot(most: int, tokenizer: Any) -> EncodedProblem:
    """Returns the problem of longcot_gsm8k whose tree is the median share of its padded rows.

    Args:
        most: most tokens of its tree.
        tokenizer: the student's.

    Raises:
        ValueError: there is no such problem.
    """
    found = [p for p in load_problems(LONGCOT) if len(p.rationales) == TEACHERS]
    # Most tokens have two or more characters: what is certainly too long is not encoded.
    found = [p for p in found if sum(len(r.completion) for r in p.rationales) <= 6 * most]
    encoded = [encode_problem(p, tokenizer, max_length=MOST) for p in found]
    encoded = [p for p in encoded if tree_length(p) <= most]
    if not encoded:
        raise ValueError(f"--shape: longcot has no problem of at most L={most} tokens")
    return real.median_problem(encoded)


def row_parts(model: Any, problem: EncodedProblem, pad: int) -> list[Outputs]:
    """Mean loss and gradients of each rationale, from the full logits of a row of its own."""
    found = []
    ids, mask, labels = padded_rows([problem], pad)
    for k, rationale in enumerate(problem.rationales):
        end = len(problem.prompt_ids) + len(rationale.ids)
        model.zero_grad(set_to_none=True)
        logits = model(input_ids=ids[k : k + 1, :end], attention_mask=mask[k : k + 1, :end]).logits
        found.append(backward(F.cross_entropy(logits[0, :-1], labels[k, 1:end]), model))
    model.zero_grad(set_to_none=True)
    return found


def providers(args: Args) -> dict[str, Provider | Skipped]:
    """Plain SFT, and COMPACT without and with answer leaves; the latter also at half the length."""
    if args.device.type != "cpu":
        return {"sft": Skipped("this case measures the CPU step")}
    length, data = int(args.shape["L"]), args.shape["data"]
    if data not in ("synthetic", "longcot"):
        raise ValueError(f"--shape: data must be synthetic or longcot, got {data!r}")
    half: EncodedProblem | None = None
    if data == "longcot":
        if not LONGCOT.exists():
            return {"sft": Skipped(f"no such file: {LONGCOT}")}
        taken, tokenizer = step.student(args.seed)
        problem, pad = longcot(length, tokenizer), tokenizer.pad_token_id
    else:
        taken, pad = scale.student(TINY, TINY.vocabulary, args.seed), scale.PAD
        problem, half = synthetic(length, args.seed), synthetic(length // 2, args.seed)
    model: Any = taken.model
    uniform, robust = map(make_weigher, ("uniform", "robust"))

    def reset() -> None:
        model.zero_grad(set_to_none=True)
        model.gradient_checkpointing_enable({"use_reentrant": False})  # `step` shares the student

    def reference(weight_of: Callable[[EncodedProblem], Tensor]) -> Any:
        """Returns a function of a problem: what its single rows give under those weights."""

        @functools.cache
        def expected(of: EncodedProblem) -> Outputs:
            parts = rows(of)
            weight = weight_of(of)
            return {
                name: sum(w * part[name] for w, part in zip(weight, parts, strict=True))
                for name in parts[0]
            }

        return expected

    @functools.cache
    def rows(of: EncodedProblem) -> list[Outputs]:
        reset()
        return row_parts(model, of, pad)

    def by_length(of: EncodedProblem) -> Tensor:
        lengths = torch.tensor([float(len(r.ids)) for r in of.rationales])
        return lengths / lengths.sum()

    def even(of: EncodedProblem) -> Tensor:
        return torch.full((len(of.rationales),), 1.0 / len(of.rationales))

    def robust_weight(of: EncodedProblem) -> Tensor:
        return leaf_weights(taken, [of], robust, "tree", pad)

    def sft(of: EncodedProblem) -> Tensor:
        ids, mask, labels = padded_rows([of], pad)
        loss: Tensor = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        return loss

    def ours(weigher: Weigher, leaves: bool) -> Callable[[EncodedProblem], Tensor]:
        return lambda of: compact_loss(taken, [of], weigher, "tree", pad, leaves)

    def provider(
        loss_of: Callable[[EncodedProblem], Tensor], expected: Any, of: EncodedProblem = problem
    ) -> Provider:
        def run() -> Outputs:
            return backward(loss_of(of), model)

        return Provider(run, functools.partial(expected, of), rtol=2e-3, reset=reset)

    evenly, robustly = reference(even), reference(robust_weight)
    found: dict[str, Provider | Skipped] = {
        "sft": provider(sft, reference(by_length)),
        "compact": provider(ours(uniform, False), evenly),
        "compact-probes": provider(ours(robust, True), robustly),
    }
    if half is not None:
        found["compact-half"] = provider(ours(uniform, False), evenly, half)
        found["compact-probes-half"] = provider(ours(robust, True), robustly, half)
    return found
