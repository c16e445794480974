"""Matrix products with a layer's weight, by the fastest library that this PyTorch has for them."""

from __future__ import annotations

import torch
from torch import Tensor

from compact.student.internals import onednn_linear

LINEAR = onednn_linear()
# PyTorch gives float32 products on the CPU to MKL, which on AMD runs AVX2 kernels. Where there is
# AVX-512, oneDNN compiles kernels for it, and takes .70 to .95 of the time on the shapes of
# SmolLM2-135M; where there is none, MKL takes .80 to 1.0 of oneDNN's.
_ONEDNN = LINEAR if torch.backends.cpu.get_cpu_capability() == "AVX512" else None


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns x weight^T + bias; nothing of it is recorded for autograd.

    Args:
        x: [N, I].
        weight: [O, I], of x's dtype; also a transposed view.
        bias: [O]; None for none.

    Returns:
        [N, O].
    """
    if _ONEDNN is not None and x.dtype == torch.float32 and x.device.type == "cpu" and x.numel():
        return _ONEDNN(x, weight, bias, "none", [], "")
    return x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)
