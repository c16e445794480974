"""Lean LoRA layers give what peft's forward gives, and step aside where a layer is not plain."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import compact.passes.attention
from compact.passes.fast.lean import (
    _CASTS,
    _Adapted,
    _cast,
    _gated,
    _line,
    _replacements,
    lean,
)
from compact.passes.fast.norms import NormOutputs
from compact.passes.forward import run_pass
from compact.passes.packing import build_batch
from compact.student import Student
from compact_ops import tree_attention
from helpers.toy import CONFIGS, make_problem

MLP = ["gate_proj", "up_proj", "down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def adapted(kind: str, targets: list[str], **options: object) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind])
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model.train()


def changed(model: nn.Module) -> list[str]:
    """Class names of the modules that run leaner, but for norms."""
    found = [type(m).__name__ for m, _ in _replacements(model, NormOutputs())]
    return [name for name in found if not name.endswith("Norm")]


def outcome(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(3)
    model.zero_grad()
    output = model(input_ids=torch.arange(12).view(2, 6)).logits
    output.square().mean().backward()
    return {"": output, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("targets", [ATTENTION + MLP, ["q_proj", "down_proj"]])
@pytest.mark.parametrize("kind", CONFIGS)
def test_lean_equals_the_layers_own_forward(kind: str, targets: list[str]) -> None:
    model = adapted(kind, targets)
    want = outcome(model)
    expected = 2 * len(ATTENTION) + 2 if len(targets) == 7 else 2 * len(targets)
    assert len(changed(model)) == expected
    with lean(model):
        leaner = [m for m in model.modules() if "forward" in m.__dict__]
        norms = [m for m in leaner if type(m).__name__.endswith("RMSNorm")]
        assert len(leaner) - len(norms) == expected
        assert len(norms) == (0 if kind == "gemma" else 5)
        got = outcome(model)
    assert got.keys() == want.keys() and len(want) == 1 + 2 * 2 * len(targets)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-6, msg=name)
    assert len(changed(model)) == expected  # and away again


@pytest.mark.parametrize("kind", CONFIGS)
def test_under_autocast_lean_is_as_near_to_float32_as_the_layers_own_forward(kind: str) -> None:
    model = adapted(kind, ATTENTION + MLP)
    exact = outcome(model)
    with torch.autocast("cpu", torch.bfloat16):
        plain = outcome(model)
        with lean(model):
            inputs: list[torch.dtype] = []
            layer = next(m for m in model.modules() if "forward" in m.__dict__)
            layer.register_forward_hook(lambda _, x, y: inputs.append(y.dtype))
            got = outcome(model)
    assert inputs and got.keys() == exact.keys()
    assert [x.dtype for x in got.values()] == [x.dtype for x in plain.values()]
    errors = [
        sum((found[n].float() - exact[n]).norm() / exact[n].norm() for n in exact) / len(exact)
        for found in (got, plain)
    ]
    assert 0 < errors[0] < 1.3 * errors[1]


def test_autocast_casts_a_frozen_weight_again_only_after_a_change() -> None:
    model = adapted("llama", ["q_proj"])
    weight = next(p for n, p in model.named_parameters() if "q_proj.base_layer.weight" in n)
    with torch.autocast("cpu", torch.bfloat16):
        first = _cast(weight, torch.bfloat16)
        assert first.dtype == torch.bfloat16 and _cast(weight, torch.bfloat16) is first
        with torch.no_grad():
            weight.mul_(2)
        second = _cast(weight, torch.bfloat16)
    assert torch.equal(second, first * 2)
    count = len(_CASTS)
    del model, weight
    gc.collect()
    assert len(_CASTS) < count


def test_fewer_tensors_are_kept() -> None:
    """Of the MLP's inner width two a layer stay (gate and up); peft's own forward keeps four."""
    model = adapted("llama", ATTENTION + MLP)
    width = model.config.intermediate_size

    def kept() -> int:
        seen: dict[int, Tensor] = {}

        def pack(t: Tensor) -> Tensor:
            seen[t.untyped_storage().data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            logits = model(input_ids=torch.arange(7)[None]).logits
        count = sum(t.shape[-1] == width and t.numel() == 7 * width for t in seen.values())
        del logits
        return count

    assert kept() == 2 * 4
    with lean(model):
        assert kept() == 2 * 2


def test_a_norms_output_is_not_kept() -> None:
    """Neither for the layers that read it nor for anything else."""
    model = adapted("llama", ATTENTION + MLP)
    seen: list[weakref.ref[Tensor]] = []
    with lean(model):
        norm = model.get_submodule("base_model.model.model.layers.0.post_attention_layernorm")
        leaner = norm.__dict__["forward"]

        def watched(x: Tensor) -> Tensor:
            output = leaner(x)
            seen.append(weakref.ref(output))
            return output

        norm.__dict__["forward"] = watched
        logits = model(input_ids=torch.arange(7)[None]).logits
    assert logits.requires_grad
    assert len(seen) == 1 and seen[0]() is None


def test_a_pass_without_backward_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a step is left out: no circle of an output and the operator that keeps it."""
    student = Student.of(adapted("llama", ATTENTION + MLP))
    batch = build_batch([make_problem(1, [6, 8])], layout="tree", leaves=False, pad_token_id=0)
    seen: list[weakref.ref[Tensor]] = []

    def watched(*args: Any) -> Tensor:
        output = tree_attention(*args)
        seen.append(weakref.ref(output))
        return output

    monkeypatch.setattr(compact.passes.attention, "tree_attention", watched)
    result = run_pass(student, batch)
    assert result[0].nll.requires_grad
    del result
    gc.collect()
    assert len(seen) == 2 and all(output() is None for output in seen)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_against_differences(dropout: float) -> None:
    """Numerically, in float64, with the same dropout mask in every call."""
    torch.manual_seed(1)
    draw = partial(torch.randn, dtype=torch.float64)
    sizes = [(5, 4), (5, 4), (4, 5)]
    weights = [(draw(o, i), draw(o)) for o, i in sizes]
    factors = [
        t.requires_grad_() for o, i in sizes for t in (draw(2, i), draw(o, 2))
    ]  # A, B of gate, up, down
    x = draw(2, 3, 4).requires_grad_()

    def layers(f: tuple[Tensor, ...]) -> list[_Adapted]:
        return [
            _Adapted(*weights[i], f[2 * i], f[2 * i + 1], scaling=0.7, dropout=dropout)
            for i in range(3)
        ]

    def gated(x: Tensor, *f: Tensor) -> Tensor:
        torch.manual_seed(2)
        return _gated(*layers(f), nn.SiLU(), x)

    def line(x: Tensor, *f: Tensor) -> Tensor:
        torch.manual_seed(2)
        return _line(layers((*f, *factors[2:]))[0], x)

    assert torch.autograd.gradcheck(gated, (x, *factors))
    assert torch.autograd.gradcheck(line, (x, *factors[:2]))
    assert torch.autograd.gradcheck(partial(line, x.detach()), tuple(factors[:2]))


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    x, zero, one = torch.ones(2000, 8), torch.zeros(1, 8), torch.ones(1, 1)
    got = _line(_Adapted(zero, None, torch.ones(1, 8), one, 1.0, 0.25), x)
    assert got.mean() == pytest.approx(8.0, abs=0.1)
    assert got.std() == pytest.approx((8 * 0.25 / 0.75) ** 0.5, abs=0.1)
    model = adapted("llama", ATTENTION + MLP, lora_dropout=0.5)
    with lean(model):
        ids = torch.ones(1, 4, dtype=torch.long)
        assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    with lean(model.eval()):
        got = outcome(model)
    torch.testing.assert_close(got[""], outcome(model)[""])


def test_what_is_not_plain_keeps_its_forward() -> None:
    assert changed(adapted("llama", ["q_proj"])) == ["Linear"] * 2
    assert changed(adapted("llama", ["q_proj"], use_dora=True)) == []
    assert changed(adapted("llama", ["q_proj"], lora_bias=True)) == []
    model = adapted("llama", ["q_proj"])
    model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").register_forward_hook(
        lambda *_: None
    )
    assert changed(model) == ["Linear"]
    with model.disable_adapter():
        assert changed(model) == []
    model.merge_adapter()
    assert changed(model) == []
    model.unmerge_adapter()
    model.base_model.model.model.layers[1].self_attn.q_proj.base_layer.to(torch.bfloat16)
    assert changed(model) == []
    other = adapted("llama", MLP)
    mlp = other.base_model.model.model.layers[0].mlp
    mlp.__class__ = type("Other", (type(mlp),), {"forward": lambda self, x: self.down_proj(x)})
    assert changed(other) == ["Linear"] * 3 + ["LlamaMLP"]
    other.base_model.model.gradient_checkpointing_enable()
    with lean(other.base_model.model.model):
        assert "forward" not in other.base_model.model.model.layers[1].mlp.__dict__
