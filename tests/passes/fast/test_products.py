"""The product with a layer's weight against float64, on every way that tensors can lie."""

import pytest
import torch
from torch import Tensor

from compact.passes.fast import products
from compact.passes.fast.products import product


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


LYING = {
    "plain": (random(21, 40), random(30, 40)),
    "transposed weight": (random(21, 40), random(40, 30).T),
    "every second": (random(42, 80)[::2, ::2], random(60, 80)[::2, ::2]),
    "one number for all": (torch.ones(()).expand(21, 40), random(30, 40)),
    "one row": (random(1, 40), random(30, 40)),
    "no rows": (random(0, 40), random(30, 40)),
    "float64": (random(21, 40, dtype=torch.float64), random(30, 40, dtype=torch.float64)),
    "bfloat16": (random(21, 40).bfloat16(), random(30, 40).bfloat16()),
}


@pytest.mark.parametrize("library", ["onednn", "torch"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("lying", LYING)
def test_product(lying: str, biased: bool, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_ONEDNN", products.LINEAR if library == "onednn" else None)
    x, weight = LYING[lying]
    bias = random(len(weight)).to(x.dtype) if biased else None
    found = product(x, weight, bias)
    wanted = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert found.dtype == x.dtype
    tolerance = {torch.bfloat16: 0.1, torch.float32: 1e-5, torch.float64: 1e-12}[x.dtype]
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


def test_onednn_is_there() -> None:
    """The build of PyTorch that the project pins has it: on AVX-512 it saves a sixth of a step."""
    assert products.LINEAR is not None
    avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    assert products._ONEDNN is (products.LINEAR if avx512 else None)
