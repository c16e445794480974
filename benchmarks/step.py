"""One training step on one question: COMPACT compared with the published step and plain SFT.

Student: SmolLM2-135M with LoRA of rank 16 on all linear layers. A step is batch building, forward,
loss and backward of the K rationales of one question. The optimizer is left out, because it is the
same for all.

- `sft`: K padded rows, transformers' own loss on the completions.
- `trl`: SFTTrainer.training_step of TRL on the same rows, if TRL is installed.
- `released`: the published step in plain torch: K padded rows, full logits, three scores, weights,
  and the consistency term, which computes the softmax of whole rows again for every pair.
- `released-checkpointed`: the same with gradient checkpointing, as in the published script: less
  memory, a second forward.
- `compact`: the tree layout with uniform weights; no answer leaves.
- `compact-probes`: the default preset, with an answer leaf after every step of every rationale.
- `compact-released`: COMPACT's step with the formulas of `released`, on padded rows, which these
  formulas need.

Before each timed step an untimed step of the same provider runs, so that the memory which the
allocator has kept fits, as in training. Without it, a step would follow the step of another
provider, and the first use of new memory would make the shorter steps up to 10% slower.

Loss and two LoRA gradients are checked: `released` and `compact-released` against each other, the
others against the weighted loss from full logits.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Args, Outputs, Provider, Skipped
from benchmarks.real import median_problem, problems, smollm2
from benchmarks.students import (
    backward,
    compact_loss,
    full_loss,
    leaf_weights,
    outputs_of,
    padded_rows,
    reference,
    with_lora,
)
from benchmarks.trl_sft import trl_sft
from compact.metrics.probe import OTHER_WORDS, thinking_ids
from compact.passes import EncodedProblem
from compact.passes.encode import encode_problem
from compact.student import Student
from compact.weighting import Weigher, make_weigher

TITLE = "One training step: forward, weights, backward"
LEGEND = (
    "SmolLM2-135M with LoRA of rank 16 on all linear layers, one SVAMP question with K rationales. "
    "`sft` is transformers' own loss on K padded rows; `trl` is TRL's SFTTrainer on the same rows, "
    "in runs that had TRL installed. `released` computes in plain torch what the published "
    "training step computes (arXiv 2601.13992); `released-checkpointed` adds gradient "
    "checkpointing, as the published script does. `compact` reads the question once for all "
    "rationales and weights them evenly, without scores or answer leaves. `compact-probes` is the "
    "default preset: after every step, an answer leaf measures how likely the gold answer is. "
    "`compact-released` computes the scores, weights and consistency term of `released`, with the "
    "same gradients."
)
SHAPES = ({"K": 4, "layout": "tree"},)
DTYPES = ("float32",)


@functools.cache
def student(seed: int) -> tuple[Student, Any]:
    """SmolLM2-135M with LoRA, its tokenizer."""
    torch.manual_seed(seed)
    model, tokenizer = smollm2()
    return Student.of(with_lora(model), tokenizer), tokenizer


def question(count: int, tokenizer: Any) -> EncodedProblem:
    """Returns the question with the median share of tokens saved, of 63 with `count` rationales."""
    return median_problem(
        [encode_problem(p, tokenizer, max_length=1024) for p in problems(63, count)]
    )


def released_loss(model: Any, problem: EncodedProblem, thinking: Tensor, pad: int) -> Tensor:
    """The published step in plain torch, preset `released` of docs/method.md."""
    ids, mask, labels = padded_rows([problem], pad)
    output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    logits = output.logits.float()
    count = len(ids)
    target = labels[:, 1:]
    nll = F.cross_entropy(logits[:, :-1].flatten(0, 1), target.flatten(), reduction="none")
    difficulty = nll.view(count, -1).sum(1) / (target != -100).sum(1)
    with torch.no_grad():
        # Adaptability: rising gold logits, over every token of the padded row.
        gold = logits[:, :, list(problem.raw_gold_ids)].mean(-1)
        words = torch.where(torch.isin(ids[:, 1:], thinking), 1.0, OTHER_WORDS)
        adaptability = (gold.diff(dim=1).relu() * words).sum(1)
        # Consensus: attention between the rationales' last hidden states.
        last = output.hidden_states[-1][torch.arange(count), mask.sum(1) - 1]
        attention = model.base_model.model.model.layers[-1].self_attn
        query, key = attention.q_proj(last), attention.k_proj(last)
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        share = (query @ key.T / query.shape[1] ** 0.5).softmax(-1).fill_diagonal_(0.0)
        consensus = share.sum(0)

        def z(score: Tensor) -> Tensor:
            return (score - score.mean()) / (score.std() + 1e-4)

        weight = (z(adaptability) + z(consensus) - 0.5 * z(difficulty)).softmax(0)
    consistency = logits.new_zeros(())
    for i, j in itertools.combinations(range(count), 2):
        pair = weight[i] * weight[j]
        if pair < 1e-4:
            continue
        # Every position of the row, with prompt and padding; the mask is applied at the end.
        log_p, log_q = logits[i].log_softmax(-1), logits[j].log_softmax(-1)
        there = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        back = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
        both = mask[i] * mask[j]
        consistency = consistency + pair * ((there + back) * both).sum() / both.sum()
    return (weight * difficulty).sum() + 0.1 * consistency


def providers(args: Args) -> dict[str, Provider | Skipped]:
    """SFT, the published step, and COMPACT without and with answer leaves."""
    if args.device.type != "cpu":
        return {"sft": Skipped("this case measures the CPU step")}
    taken, tokenizer = student(args.seed)
    model, pad = taken.model, tokenizer.pad_token_id
    problem = question(int(args.shape["K"]), tokenizer)
    layout = args.shape["layout"]

    def provider(loss_of: Callable[[], Tensor], expected: Callable[[], Outputs]) -> Provider:
        def run() -> Outputs:
            return backward(loss_of(), model)

        def reset() -> None:
            model.zero_grad(set_to_none=True)
            run()
            model.zero_grad(set_to_none=True)

        return Provider(run, expected, rtol=2e-3, reset=reset)

    def sft() -> Tensor:
        ids, mask, labels = padded_rows([problem], pad)
        return model(input_ids=ids, attention_mask=mask, labels=labels).loss

    def ours(weigher: Weigher, leaves: bool) -> Callable[[], Tensor]:
        return lambda: compact_loss(taken, [problem], weigher, layout, pad, leaves)

    uniform, released, robust = map(make_weigher, ("uniform", "released", "robust"))
    thinking = thinking_ids(taken.processing_class)
    published = functools.partial(released_loss, model, problem, thinking, pad)

    def checkpointed() -> Tensor:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = published()
        model.gradient_checkpointing_disable()
        return loss

    lengths = torch.tensor([len(r.ids) for r in problem.rationales])

    def weighted(weight_of: Callable[[], Tensor]) -> Callable[[], Outputs]:
        return reference(model, lambda: full_loss(model, [problem], pad, weight_of()))

    by_length = weighted(lambda: lengths / lengths.sum())
    by_compact = reference(model, ours(released, False))
    rows = [(problem.prompt_ids, r.ids) for r in problem.rationales]

    return {
        "sft": provider(sft, by_length),
        "trl": trl_sft(model, tokenizer, rows, outputs_of, by_length, rtol=2e-3),
        "released": provider(published, by_compact),
        "released-checkpointed": provider(checkpointed, by_compact),
        "compact": provider(
            ours(uniform, False),
            weighted(lambda: torch.full_like(lengths, 1.0 / len(lengths), dtype=torch.float32)),
        ),
        "compact-probes": provider(
            ours(robust, True),
            weighted(lambda: leaf_weights(taken, [problem], robust, layout, pad)),
        ),
        "compact-released": provider(ours(released, False), reference(model, published)),
    }
