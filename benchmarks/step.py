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
from benchmarks.real import problems, smollm2
from benchmarks.trl_sft import trl_sft
from compact.metrics.probe import OTHER_WORDS, thinking_ids
from compact.passes import EncodedProblem
from compact.passes.encode import encode_problem
from compact.passes.forward import run_pass
from compact.passes.packing import build_batch, tree_length
from compact.student import Student
from compact.weighting import Weigher, make_weigher

SHAPES = ({"K": 4, "layout": "tree"},)
DTYPES = ("float32",)
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@functools.cache
def student(seed: int) -> tuple[Student, Any]:
    """SmolLM2-135M with LoRA (r 16, alpha 32, no dropout, so providers agree), its tokenizer."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model, tokenizer = smollm2()
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=LORA_TARGETS)
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # at its initial 0 the gradient of lora_A would be 0 as well
            torch.nn.init.normal_(parameter, std=0.01)
    model.train()
    return Student.of(model, tokenizer), tokenizer


def question(count: int, tokenizer: Any) -> EncodedProblem:
    """Returns the question with the median share of tokens saved, of 63 with `count` rationales."""
    encoded = [encode_problem(p, tokenizer, max_length=1024) for p in problems(63, count)]

    def share(problem: EncodedProblem) -> float:
        longest = max(len(r.ids) for r in problem.rationales)
        return tree_length(problem) / (count * (len(problem.prompt_ids) + longest))

    return sorted(encoded, key=share)[len(encoded) // 2]


def padded_rows(problem: EncodedProblem, pad_token_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, mask and labels [K, L] as any SFT trainer collates them."""
    rows = [torch.tensor(problem.prompt_ids + r.ids) for r in problem.rationales]
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    ids = pad(rows, padding_value=pad_token_id)
    mask = pad([torch.ones_like(row) for row in rows])
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : len(problem.prompt_ids)] = -100
    return ids, mask, labels


def released_loss(model: Any, problem: EncodedProblem, thinking: Tensor, pad: int) -> Tensor:
    """The published step in plain torch, preset `released` of docs/method.md."""
    ids, mask, labels = padded_rows(problem, pad)
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


def compact_loss(
    taken: Student, problem: EncodedProblem, weigher: Weigher, layout: Any, pad: int, leaves: bool
) -> Tensor:
    """The loss of one question as the trainer computes it."""
    layout = "padded" if weigher.needs.padded else layout
    batch = build_batch([problem], layout=layout, leaves=leaves, pad_token_id=pad)
    live, hidden, pass_ = run_pass(taken, batch)
    weight = weigher(pass_).weight
    token_weight = (weight / batch.token_offsets.diff())[batch.rationale]
    loss = (token_weight * live.nll).sum()
    if weigher.consistency is not None:
        loss = loss + weigher.consistency(hidden, pass_, weight)
    return loss


def plain_loss(model: Any, problem: EncodedProblem, pad: int, weight: Tensor) -> Tensor:
    """The weighted loss from full logits of padded rows: the reference for the other providers."""
    ids, mask, labels = padded_rows(problem, pad)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    target = labels[:, 1:]
    nll = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    return (weight * nll.view_as(target).sum(1) / (target != -100).sum(1)).sum()


def watched(model: Any) -> dict[str, Tensor]:
    """The gradients that are compared: an early lora_A and a late lora_B."""
    layers = model.base_model.model.model.layers
    return {
        "early_grad": layers[1].self_attn.v_proj.lora_A["default"].weight.grad,
        "late_grad": layers[-2].mlp.down_proj.lora_B["default"].weight.grad,
    }


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
            loss = loss_of()
            loss.backward()
            return {"loss": loss.detach(), **watched(model)}

        def reset() -> None:
            model.zero_grad(set_to_none=True)
            run()
            model.zero_grad(set_to_none=True)

        return Provider(run, expected, rtol=2e-3, reset=reset)

    def sft() -> Tensor:
        ids, mask, labels = padded_rows(problem, pad)
        return model(input_ids=ids, attention_mask=mask, labels=labels).loss

    def ours(weigher: Weigher, leaves: bool) -> Callable[[], Tensor]:
        return lambda: compact_loss(taken, problem, weigher, layout, pad, leaves)

    uniform, released, robust = map(make_weigher, ("uniform", "released", "robust"))
    thinking = thinking_ids(taken.processing_class)
    published = functools.partial(released_loss, model, problem, thinking, pad)

    def checkpointed() -> Tensor:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = published()
        model.gradient_checkpointing_disable()
        return loss

    lengths = torch.tensor([len(r.ids) for r in problem.rationales])

    def reference(loss_of: Callable[[], Tensor]) -> Callable[[], Outputs]:
        """What `loss_of` gives, computed when first asked for."""

        @functools.cache
        def expected() -> Outputs:
            model.zero_grad(set_to_none=True)
            loss = loss_of()
            loss.backward()
            found = {"loss": loss.detach(), **watched(model)}
            model.zero_grad(set_to_none=True)
            return found

        return expected

    def weighted(weight_of: Callable[[], Tensor]) -> Callable[[], Outputs]:
        return reference(lambda: plain_loss(model, problem, pad, weight_of()))

    def robust_weight() -> Tensor:
        batch = build_batch([problem], layout=layout, leaves=True, pad_token_id=pad)
        with torch.no_grad():
            return robust(run_pass(taken, batch)[2]).weight

    by_length = weighted(lambda: lengths / lengths.sum())
    rows = [(problem.prompt_ids, r.ids) for r in problem.rationales]

    def outputs_of(loss: Tensor, trained: Any) -> Outputs:
        return {"loss": loss.detach(), **watched(trained)}

    return {
        "sft": provider(sft, by_length),
        "trl": trl_sft(model, tokenizer, rows, outputs_of, by_length, rtol=2e-3),
        "released": provider(published, reference(ours(released, False))),
        "released-checkpointed": provider(checkpointed, reference(ours(released, False))),
        "compact": provider(
            ours(uniform, False),
            weighted(lambda: torch.full_like(lengths, 1.0 / len(lengths), dtype=torch.float32)),
        ),
        "compact-probes": provider(ours(robust, True), weighted(robust_weight)),
        "compact-released": provider(ours(released, False), reference(published)),
    }
