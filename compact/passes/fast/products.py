"""Matrix products with the weight of a layer, by the fastest library that PyTorch has."""

from __future__ import annotations

import torch
from torch import Tensor

from compact.student.internals import onednn_linear

LINEAR = onednn_linear()
# PyTorch computes float32 products on CPUs with MKL, which runs AVX2 kernels on AMD. On CPUs with
# AVX-512, oneDNN compiles kernels for it and takes 0.70 to 0.95 of the time of MKL on the shapes of
# SmolLM2-135M. On CPUs without it, MKL takes 0.80 to 1.0 of the time of oneDNN.
_ONEDNN = LINEAR if torch.backends.cpu.get_cpu_capability() == "AVX512" else None


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns x weight^T + bias. For code without autograd: oneDNN's op records no graph.

    Args:
        x: [N, I].
        weight: [O, I], of the dtype of x; may be a transposed view.
        bias: [O], or None.

    Returns:
        [N, O].
    """
    if _ONEDNN is not None and x.dtype == torch.float32 and x.device.type == "cpu" and x.numel():
        return _ONEDNN(x, weight, bias, "none", [], "")
    return x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)
