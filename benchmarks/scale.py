"""Cost of a step for different numbers of teachers, lengths, vocabularies, batches and students.

A batch has P problems: a question of Q tokens with K rationales of T tokens. Token ids and weights
are random, because the time does not depend on them. The student has the published sizes, a
vocabulary of V and LoRA of rank 16 on all linear layers. A step is batch building, forward, loss
and backward.

- `sft`: one padded row per rationale, transformers' own loss on the completions.
- `compact-padded`: COMPACT's head and weights on the same rows, uniform weights.
- `compact`: the tree layout (the question once, then the rationales), uniform weights.
- `compact-probes`: the default preset, with an answer leaf after every step.

Loss and two LoRA gradients are checked against the weighted loss from full logits of padded rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import Args, Outputs, Provider, Skipped
from benchmarks.students import (
    Size,
    backward,
    compact_loss,
    full_loss,
    leaf_weights,
    padded_rows,
    reference,
    size,
    with_lora,
)
from compact.passes import EncodedProblem, EncodedRationale
from compact.student import Student
from compact.weighting import Weigher, make_weigher

TITLE = "How a step grows"
LEGEND = (
    "A step on P questions of Q tokens with K rationales of T tokens and vocabulary V. One size "
    "changes at a time; ratios are to `sft` (plain SFT on padded rows). `compact-padded` runs "
    "COMPACT's head on the same rows; `compact` reads the question once; `compact-probes` is the "
    "default preset with answer leaves. For users: [docs/performance.md](../performance.md)."
)
_BASE = {"K": 4, "Q": 72, "T": 64, "P": 1, "V": 49152, "student": "SmolLM2-135M"}
SHAPES = (
    _BASE,
    *(_BASE | {"K": k} for k in (1, 2, 8)),
    *(_BASE | {"Q": q} for q in (24, 216)),
    *(_BASE | {"T": t} for t in (32, 128, 256)),
    *(_BASE | {"V": v} for v in (16384, 151936)),
    *(_BASE | {"P": p} for p in (2, 4)),
    _BASE | {"student": "SmolLM2-360M"},
    _BASE | {"student": "Qwen2.5-0.5B", "V": 151936},
)
DTYPES = ("float32",)
STEP, CUE, GOLD, PAD = 21, 4, 2, 2  # tokens a step, of the answer cue and the gold answer; pad id


@functools.lru_cache(maxsize=1)
def student(one: Size, vocabulary: int, seed: int) -> Student:
    """A student with random weights and LoRA."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    return Student.of(with_lora(LlamaForCausalLM(one.config(vocabulary))))


def synthetic(count: int, shape: dict[str, int], seed: int) -> list[EncodedProblem]:
    """Returns `count` problems of K rationales of T random tokens, with a sum in every step."""
    generator = torch.Generator().manual_seed(seed)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, shape["V"], (n,), generator=generator).tolist())

    def rationale(k: int) -> EncodedRationale:
        ends = [*range(STEP, shape["T"] - STEP + 1, STEP), shape["T"]]
        texts = tuple(f"so {i + 2} + {i + 3} = {2 * i + 5 + k % 2}" for i in range(len(ends)))
        return EncodedRationale(
            teacher=f"t{k}",
            text="\n".join(texts),
            ids=ids(shape["T"]),
            steps=tuple(zip([0, *ends[:-1]], ends, strict=True)),
            step_texts=texts,
            spaced=(True,) * len(ends),
            marker=shape["T"],
            answer=str(k % 2),
        )

    return [
        EncodedProblem(
            question_id=f"q{p}",
            prompt="",
            prompt_ids=ids(shape["Q"]),
            rationales=tuple(rationale(k) for k in range(shape["K"])),
            gold="0",
            gold_ids=ids(GOLD),
            cue_ids=ids(CUE),
            spaced_cue_ids=ids(CUE),
            raw_gold_ids=ids(GOLD),
        )
        for p in range(count)
    ]


def providers(args: Args) -> dict[str, Provider | Skipped]:
    """Plain SFT, and COMPACT on padded rows, on trees, and on trees with answer leaves."""
    if args.device.type != "cpu":
        return {"sft": Skipped("this case measures the CPU step")}
    shape = {k: v for k, v in args.shape.items() if isinstance(v, int)}
    taken = student(size(str(args.shape["student"])), shape["V"], args.seed)
    model = taken.model
    problems = synthetic(shape["P"], shape, args.seed)
    uniform, robust = map(make_weigher, ("uniform", "robust"))

    def reset() -> None:
        model.zero_grad(set_to_none=True)

    def weighted(weight_of: Callable[[], Tensor]) -> Callable[[], Outputs]:
        return reference(model, lambda: full_loss(model, problems, PAD, weight_of()))

    def provider(loss_of: Callable[[], Tensor], expected: Callable[[], Outputs]) -> Provider:
        return Provider(lambda: backward(loss_of(), model), expected, rtol=2e-3, reset=reset)

    def sft() -> Tensor:
        ids, mask, labels = padded_rows(problems, PAD)
        return model(input_ids=ids, attention_mask=mask, labels=labels).loss

    def ours(weigher: Weigher, layout: str, leaves: bool) -> Callable[[], Tensor]:
        return lambda: compact_loss(taken, problems, weigher, layout, PAD, leaves)

    count = shape["P"] * shape["K"]
    even = weighted(lambda: torch.full((count,), 1.0 / count))
    by_leaves = weighted(lambda: leaf_weights(taken, problems, robust, "tree", PAD))
    return {
        "sft": provider(sft, even),
        "compact-padded": provider(ours(uniform, "padded", False), even),
        "compact": provider(ours(uniform, "tree", False), even),
        "compact-probes": provider(ours(robust, "tree", True), by_leaves),
    }
