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
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Args, Outputs, Provider, Skipped
from benchmarks.step import LORA_TARGETS, padded_rows, watched
from benchmarks.students import Size, size
from compact.passes import EncodedProblem, EncodedRationale
from compact.passes.forward import run_pass
from compact.passes.packing import build_batch
from compact.student import Student
from compact.weighting import Weigher, make_weigher

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
def student(name: str, vocabulary: int, seed: int) -> Student:
    """`with_lora` of the student of that name."""
    return with_lora(size(name), vocabulary, seed)


def with_lora(one: Size, vocabulary: int, seed: int) -> Student:
    """A student with random weights and LoRA whose two factors are both random."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(one.config(vocabulary))
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=LORA_TARGETS)
    model = get_peft_model(model, config)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:  # at its initial 0 the gradient of lora_A would be 0 as well
            torch.nn.init.normal_(parameter, std=0.01)
    return Student.of(model.train())


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


def rows_of(problems: Sequence[EncodedProblem]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, mask and labels [P K, Q + T] of all rationales: equal lengths, so no padding."""
    each = [padded_rows(problem, PAD) for problem in problems]
    ids, mask, labels = (torch.cat(part) for part in zip(*each, strict=True))
    return ids, mask, labels


def compact_loss(
    taken: Student, problems: Sequence[EncodedProblem], weigher: Weigher, layout: Any, leaves: bool
) -> Tensor:
    """The loss of a batch as the trainer computes it: the mean over its problems."""
    batch = build_batch(problems, layout=layout, leaves=leaves, pad_token_id=PAD)
    live, _, pass_ = run_pass(taken, batch)
    weight = weigher(pass_).weight
    token_weight = (weight / batch.token_offsets.diff())[batch.rationale]
    return (token_weight * live.nll).sum() / len(problems)


def full_loss(model: Any, problems: Sequence[EncodedProblem], weight: Tensor) -> Tensor:
    """The same from full logits, given the weights [P K]."""
    ids, mask, labels = rows_of(problems)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    target = labels[:, 1:]
    nll = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    means = nll.view_as(target).sum(1) / (target != -100).sum(1)
    return (weight * means).sum() / len(problems)


def providers(args: Args) -> dict[str, Provider | Skipped]:
    """Plain SFT, and COMPACT on padded rows, on trees, and on trees with answer leaves."""
    if args.device.type != "cpu":
        return {"sft": Skipped("this case measures the CPU step")}
    shape = {k: v for k, v in args.shape.items() if isinstance(v, int)}
    taken = student(str(args.shape["student"]), shape["V"], args.seed)
    model = taken.model
    problems = synthetic(shape["P"], shape, args.seed)
    uniform, robust = map(make_weigher, ("uniform", "robust"))

    def outputs(loss: Tensor) -> Outputs:
        loss.backward()
        return {"loss": loss.detach(), **watched(model)}

    def reset() -> None:
        model.zero_grad(set_to_none=True)

    def reference(weight_of: Callable[[], Tensor]) -> Callable[[], Outputs]:
        """What the full logits give under those weights, computed when first asked for."""

        @functools.cache
        def expected() -> Outputs:
            reset()
            found = outputs(full_loss(model, problems, weight_of()))
            reset()
            return found

        return expected

    def robust_weight() -> Tensor:
        batch = build_batch(problems, layout="tree", leaves=True, pad_token_id=PAD)
        with torch.no_grad():
            return robust(run_pass(taken, batch)[2]).weight

    def provider(loss_of: Callable[[], Tensor], expected: Callable[[], Outputs]) -> Provider:
        return Provider(lambda: outputs(loss_of()), expected, rtol=2e-3, reset=reset)

    def sft() -> Tensor:
        ids, mask, labels = rows_of(problems)
        return model(input_ids=ids, attention_mask=mask, labels=labels).loss

    def ours(weigher: Weigher, layout: str, leaves: bool) -> Callable[[], Tensor]:
        return lambda: compact_loss(taken, problems, weigher, layout, leaves)

    even = reference(lambda: torch.full((shape["P"] * shape["K"],), 1.0 / shape["K"]))
    return {
        "sft": provider(sft, even),
        "compact-padded": provider(ours(uniform, "padded", False), even),
        "compact": provider(ours(uniform, "tree", False), even),
        "compact-probes": provider(ours(robust, "tree", True), reference(robust_weight)),
    }
