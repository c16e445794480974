"""Difficulty as the learning cost of a rationale: the size of its gradient, without a backward.

S_k = 0.5 d_A^2 |mu_A|^2 + 0.5 d_A d_Q <mu_A, mu_Q>. d_A is the mean nll of the rationale's tokens,
d_Q that of the question's. mu_A and mu_Q are the means of the tokens' activations, each scaled to
unit length first, so |mu_A|^2 is the mean cosine over all pairs of answer tokens. Lower is better:
the student learns it at less cost. Source: SCAS (arXiv 2605.26872), with its lambda of 0.5.

Ours: the activations are the final hidden states, the input of the LM head, in place of the output
of the last layer's up_proj, which `scas` reads in a second pass. As published, the question is the
whole prompt with its template, its first token has no nll, and special tokens of the tokenizer do
not count. A student without its tokenizer has no special tokens. The nll of the prompt is read from
the hidden states of the pass: that is one more product of the head, over the prompt's rows only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compact.metrics import TOKEN_MEAN, register
from compact.passes import Pass
from compact.passes.segments import places, segment_sum
from compact.passes.transfer import put


def _counted(ids: Tensor, pass_: Pass) -> Tensor:
    """Returns [n] float32: 0 for special tokens of the tokenizer, else 1."""
    special = getattr(pass_.student.processing_class, "all_special_ids", None) or ()
    return (~torch.isin(ids, ids.new_tensor(list(special)))).float()


def _masked_mean(values: Tensor, mask: Tensor, offsets: Tensor) -> Tensor:
    """Returns the means [n, ...] per segment of values [N, ...] where mask [N] is 1, else 0."""
    wide = mask.reshape(-1, *[1] * (values.dim() - 1))
    count = segment_sum(mask, offsets).clamp(min=1.0)
    return segment_sum(values * wide, offsets) / count.reshape(-1, *[1] * (values.dim() - 1))


def _prompts(pass_: Pass) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns rows [N], ids [N] and nll [N] of all prompt tokens, and offsets [P + 1].

    The nll of a prompt's first token is 0: nothing predicts it.
    """
    batch, student = pass_.batch, pass_.student
    last = batch.prompt_rows[batch.problem_offsets[:-1]]  # the prompt of the first rationale
    lengths = put([len(p.prompt_ids) for p in batch.problems], last, torch.int64)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    ids = put([i for p in batch.problems for i in p.prompt_ids], last, torch.int64)
    problem, place = places(offsets, len(ids))
    rows = last[problem] - lengths[problem] + 1 + place
    inner = place > 0
    stats = student.token_stats(pass_.hidden, ids[inner], rows=rows[inner] - 1)
    nll = stats.nll.new_zeros(ids.shape)
    nll[inner] = stats.nll
    return rows, ids, nll, offsets


@register("scas-final", axis="difficulty", aggregation=TOKEN_MEAN)
def scas_final(pass_: Pass) -> Tensor:
    """Returns [R] learning cost in squared nats."""
    return learning_cost(pass_, pass_.hidden)


def learning_cost(pass_: Pass, activations: Tensor) -> Tensor:
    """Returns [R] S_k in squared nats.

    Args:
        pass_: the results of a forward.
        activations: [B, L, D] of every token of the main block.
    """
    batch = pass_.batch
    rows, ids, prompt_nll, offsets = _prompts(pass_)
    flat = activations.flatten(0, 1)

    def directions(where: Tensor) -> Tensor:
        return torch.nn.functional.normalize(flat[where].float(), dim=1)

    asked, told = _counted(ids, pass_), _counted(batch.target, pass_)
    predicted = asked.clone()
    predicted[offsets[:-1]] = 0.0  # the first token of a prompt has no nll
    question_nll = _masked_mean(prompt_nll, predicted, offsets)[batch.problem]
    question = _masked_mean(directions(rows), asked, offsets)[batch.problem]
    answer_nll = _masked_mean(pass_.stats.nll.detach(), told, batch.token_offsets)
    answer = _masked_mean(directions(batch.token_rows), told, batch.token_offsets)
    own = answer_nll.square() * answer.square().sum(dim=1)
    shared = answer_nll * question_nll * (answer * question).sum(dim=1)
    return 0.5 * own + 0.5 * shared
