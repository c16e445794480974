"""MGDA and PCGrad: weights from the conflicts between the rationales' gradients.

The gradient of rationale k is that of its loss with respect to a linear map A between the final
hidden states and the head, at A = 1:

    G_k = (1 / T_k) sum_m u_m h_m^T   in R^{H x H},

h_m the hidden state that predicts token m and u_m the unit gradient d nll_m / d h_m, which
`compact_ops.linear_token_stats` computes. Both policies read only the K x K Gram matrix <G_k, G_l>.

- `mgda`: the point of least norm in the convex hull, min |sum_k alpha_k G_k|^2, sum alpha = 1.
  Source: MGDA (Desideri 2012; Sener and Koltun, arXiv 1810.04650); for several teachers with
  alpha_k <= C, C = nu: AE-KD (Du et al., NeurIPS 2020). `nu` bounds each weight (1: no bound).
- `pcgrad`: every G_k loses its projection on each G_l with <G_k, G_l> < 0, and the results are
  added. Source: gradient surgery (Yu et al., arXiv 2001.06782). The sum is sum_l c_l G_l with
  c_l >= 0, which follow from the Gram matrix; alpha = c / sum c.

Ours: the map A in place of all shared parameters, so one pass through the head suffices and no
backward through the body for each rationale; PCGrad in the order of the teachers' names, not at
random, and with its coefficients scaled to sum 1. The log holds the mean cosine of each pair of
teachers.

Memory: the gradients of one problem at a time, K H^2 floats: .27 GB for K = 4 and H = 4,096.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from compact.means import Means
from compact.options import check_number
from compact.passes import Pass
from compact.weighting.policies import StatefulPolicy, register_policy
from compact_ops import linear_token_stats

_ROUNDS = 20
"""Most rounds of `least_norm` for each entry; a few are enough."""
_TOLERANCE = 1e-12
"""Most difference of the slopes at the least norm, as a share of the greatest squared norm."""


def head_gradients(pass_: Pass) -> Iterator[Tensor]:
    """Yields for each problem the gradients G_k [K, H * H], float32."""
    batch, student = pass_.batch, pass_.student
    with torch.enable_grad():
        states = pass_.hidden.flatten(0, 1)[batch.rows].float().detach().requires_grad_()
        nll = linear_token_stats(
            states,
            student.weight.detach(),
            batch.target,
            bias=None if student.bias is None else student.bias.detach(),
            softcap=student.softcap,
            logit_scale=student.logit_scale,
        ).nll
        (unit,) = torch.autograd.grad(nll.sum(), states)
    states = states.detach()
    tokens, problems = batch.token_offsets.tolist(), batch.problem_offsets.tolist()
    for first, end in zip(problems[:-1], problems[1:], strict=True):
        own = states.new_empty((end - first, states.shape[1] ** 2))
        for k, r in enumerate(range(first, end)):
            mine = slice(tokens[r], tokens[r + 1])
            own[k] = (unit[mine].T @ states[mine]).flatten() / (mine.stop - mine.start)
        yield own


def gram_matrices(pass_: Pass) -> list[Tensor]:
    """Returns for each problem the matrix [K, K] of <G_k, G_l>, float32."""
    return [g @ g.T for g in head_gradients(pass_)]


def least_norm(gram: Tensor, limit: float = 1.0) -> Tensor:
    """Returns alpha [K] that minimises alpha^T gram alpha on the simplex, with alpha <= limit.

    An active-set method: each round solves for the free entries alone, all others held at a bound.
    An entry that would leave its bounds is held; at the optimum, one that lowers the norm is freed.

    Args:
        gram: [K, K], symmetric and positive semidefinite.
        limit: most weight of one entry, at least 1 / K.
    """
    g = gram.double().cpu()
    g = g / g.diagonal().max().clamp(min=1e-300)
    size = len(g)
    alpha = torch.full((size,), 1.0 / size, dtype=torch.float64)
    free = torch.ones(size, dtype=torch.bool)
    for _ in range(_ROUNDS * size):
        step = _step(g, alpha, free)
        room = torch.where(step < 0, alpha, limit - alpha) / step.abs()
        room = torch.where(step == 0, torch.inf, room)
        alpha = (alpha + min(1.0, float(room.min())) * step).clamp(0.0, limit)
        if float(room.min()) < 1.0:
            free[int(room.argmin())] = False
            continue
        slope = g @ alpha
        worst = int(torch.where(alpha > 0, slope, -torch.inf).argmax())
        best = int(torch.where(alpha < limit, slope, torch.inf).argmin())
        if float(slope[worst] - slope[best]) <= _TOLERANCE:
            break
        free = (alpha > 0) & (alpha < limit)
        level = float(slope[free].mean()) if bool(free.any()) else None
        if level is None:
            free[[worst, best]] = True  # one alone could not move: the sum is 1
        else:
            free[worst if float(slope[worst]) - level > level - float(slope[best]) else best] = True
    # Equal gradients may share their weight in any way: each gives equal parts of its own to all.
    pair = g.diagonal()[:, None] + g.diagonal()
    twins = (pair - 2 * g <= 1e-6 * pair).double()
    alpha = twins @ (alpha / twins.sum(0))
    return alpha.clamp(min=0.0).to(gram)


def _step(g: Tensor, alpha: Tensor, free: Tensor) -> Tensor:
    """Returns the step [K] to the least norm over the free entries; the sum stays the same."""
    count = int(free.sum())
    system = torch.ones(count + 1, count + 1, dtype=g.dtype)
    system[:-1, :-1], system[-1, -1] = g[free][:, free], 0.0
    right = torch.cat([-(g @ alpha)[free], g.new_zeros(1)])
    found = (torch.linalg.pinv(system, hermitian=True) @ right)[:-1]
    step = torch.zeros_like(alpha)
    step[free] = found - found.mean()  # which rounding may have left beside 0
    return step


def surgery(gram: Tensor) -> Tensor:
    """Returns the coefficients c [K] of sum_k PC(G_k) = sum_l c_l G_l, not scaled.

    Each G_k loses its conflicts with the others in their order, which matters for K >= 3.
    """
    g = gram.double().cpu()
    size = len(g)
    total = torch.zeros(size, dtype=torch.float64)
    for k in range(size):
        c = torch.zeros(size, dtype=torch.float64)
        c[k] = 1.0
        for other in range(size):
            product = float(c @ g[:, other])
            if other != k and product < 0 and float(g[other, other]) > 0:
                c[other] -= product / float(g[other, other])
        total += c
    return total.to(gram)


class _Surgery(StatefulPolicy):
    """A policy that reads the Gram matrices and logs the mean cosine of each pair of teachers."""

    def __init__(self) -> None:
        self._means = Means()

    def alpha(self, gram: Tensor, teachers: list[str]) -> Tensor:
        """Returns the weights [K] of a problem."""
        raise NotImplementedError

    def weigh(self, scores: Mapping[str, Tensor], pass_: Pass) -> Tensor:
        batch, weights = pass_.batch, []
        starts = batch.problem_offsets.tolist()
        for gram, first in zip(gram_matrices(pass_), starts[:-1], strict=True):
            teachers = batch.teachers[first : first + len(gram)]
            weights.append(self.alpha(gram, teachers))
            if pass_.student.model.training:
                self._note(gram, teachers)
        return torch.cat(weights)

    def _note(self, gram: Tensor, teachers: list[str]) -> None:
        size = gram.diagonal().sqrt().clamp(min=1e-30)
        cosine = (gram / size[:, None] / size).tolist()
        for k, one in enumerate(teachers):
            for other in range(k + 1, len(teachers)):
                first, second = sorted((one, teachers[other]))  # whatever the problem's order
                self._means.add(f"cosine/{first} x {second}", cosine[k][other])

    def take_log(self) -> dict[str, float]:
        """Returns the conflict matrix of the problems of this process: a mean cosine a pair."""
        return self._means.take()


class _LeastNorm(_Surgery):
    def __init__(self, nu: float) -> None:
        check_number("nu", nu, above=0, most=1)
        super().__init__()
        self.nu = nu

    def alpha(self, gram: Tensor, teachers: list[str]) -> Tensor:
        return least_norm(gram, max(self.nu, 1.0 / len(gram)))


class _Projected(_Surgery):
    def alpha(self, gram: Tensor, teachers: list[str]) -> Tensor:
        order = sorted(range(len(teachers)), key=teachers.__getitem__)  # whatever that of the rows
        c = torch.empty_like(gram[0])
        c[order] = surgery(gram[order][:, order])
        return c / c.sum()


@register_policy("mgda")
def mgda(nu: float = 1.0) -> StatefulPolicy:
    """Weights of least norm of the combined head gradient, each at most nu (MGDA, AE-KD)."""
    return _LeastNorm(nu)


@register_policy("pcgrad")
def pcgrad() -> StatefulPolicy:
    """Weights of the sum of head gradients after each lost its conflicts with the others."""
    return _Projected()
