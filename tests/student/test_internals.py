"""What `compact` uses of private names of foreign libraries is still there and does the same.

A failure says which name of which library changed. The last part scans the source of `compact`:
only student/internals.py may use a private name of a foreign library.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.integrations.deepspeed import (
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from compact.config import CompactConfig
from compact.student import internals
from compact.trainer import CompactTrainer
from helpers.toy import CONFIGS

SOURCE = Path(internals.__file__).parents[1]
TRAINER_SOURCE = inspect.getsource(transformers.trainer)
OVERRIDDEN = [name for name in internals.TRAINER_METHODS if name in vars(CompactTrainer)]


# Names.


def parameters(method: Callable[..., object]) -> list[inspect.Parameter]:
    return list(inspect.signature(method).parameters.values())[1:]


@pytest.mark.parametrize("name", internals.TRAINER_METHODS)
def test_trainer_method_takes_the_same(name: str) -> None:
    wanted = internals.TRAINER_METHODS[name]
    method = getattr(Trainer, name, None)
    assert method is not None, f"transformers.Trainer has no {name} any more"
    found = parameters(method)
    names = tuple(p.name for p in found)
    assert names[: len(wanted)] == wanted, (
        f"transformers.Trainer.{name} no longer takes {wanted}: it takes {names}"
    )
    needed = [p.name for p in found[len(wanted) :] if p.default is p.empty]
    assert not needed, f"transformers.Trainer.{name} now needs {needed} as well"


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_overridden_trainer_method_is_still_called(name: str) -> None:
    wanted = tuple(p.name for p in parameters(getattr(Trainer, name)))
    own = tuple(p.name for p in parameters(getattr(CompactTrainer, name)))
    assert own == wanted, f"transformers.Trainer.{name} takes {wanted}, CompactTrainer.{name} {own}"
    assert f"self.{name}(" in TRAINER_SOURCE, f"transformers.Trainer no longer calls {name}"


@pytest.mark.parametrize("name", internals.TRAINER_PASSED_ON)
def test_trainer_method_that_is_passed_on_is_still_called(name: str) -> None:
    assert hasattr(Trainer, name), f"transformers.Trainer has no {name} any more"
    own = [p.name for p in parameters(getattr(CompactTrainer, name))]
    assert own == ["args", "kwargs"]
    assert f"self.{name}(" in TRAINER_SOURCE, f"transformers.Trainer no longer calls {name}"


@pytest.mark.parametrize("name", internals.TRAINER_ATTRIBUTES)
def test_trainer_attribute_is_set(name: str) -> None:
    assert f"self.{name} = " in TRAINER_SOURCE, f"transformers.Trainer no longer sets {name}"


@pytest.mark.parametrize("name", internals.CONFIG_ATTRIBUTES)
def test_config_attribute_is_read(name: str) -> None:
    assert hasattr(TrainingArguments, name), (
        f"transformers.TrainingArguments has no {name} any more"
    )


def test_a_mapping_in_quotes_is_read(tmp_path: Path) -> None:
    """As transformers reads the fields of _VALID_DICT_FIELDS."""
    args = CompactConfig(output_dir=str(tmp_path), use_cpu=True, overrides='{"tau": 0.5}')
    assert args.overrides == {"tau": 0.5}, "TrainingArguments no longer uses _VALID_DICT_FIELDS"


def test_no_private_name_of_our_trainer_is_taken() -> None:
    """A name of ours that transformers also uses would change what its own methods do."""
    theirs = {node.attr for node in ast.walk(ast.parse(TRAINER_SOURCE)) if is_attribute(node)}
    ours = defined_names(ast.parse((SOURCE / "trainer/trainer.py").read_text()))
    known = {*internals.TRAINER_METHODS, *internals.TRAINER_PASSED_ON}
    both = theirs & ours - known - set(internals.TRAINER_ATTRIBUTES)
    assert not both, f"transformers.Trainer uses {sorted(both)} too"


# Functions.


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_attention_implementation(name: str) -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"], attn_implementation=name)
    assert internals.attention_implementation(model.config) == name


def test_attention_set_to_switches_and_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers read the switched name, and the model's own after the context, also on errors."""
    config = AutoModelForCausalLM.from_config(CONFIGS["llama"], attn_implementation="sdpa").config
    with (
        pytest.raises(RuntimeError, match="inside"),
        internals.attention_set_to(config, "eager"),
    ):
        found = config._attn_implementation
        assert found == "eager", "PreTrainedConfig no longer reads _attn_implementation_internal"
        raise RuntimeError("inside")
    assert config._attn_implementation == "sdpa"


def test_attention_set_to_reaches_the_layers() -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"], attn_implementation="sdpa").eval()
    ids = torch.arange(5)[None]
    with internals.attention_set_to(model.config, "eager"):
        attentions = model(ids, output_attentions=True).attentions
    assert attentions and attentions[0] is not None, "layers no longer read the config's attention"


def test_can_be_checkpointed() -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    found = [m for m in model.modules() if internals.can_be_checkpointed(m)]
    assert not any(map(internals.is_checkpointed, found))
    model.gradient_checkpointing_enable()
    checkpointed = {m for m in model.modules() if internals.is_checkpointed(m)}
    assert set(model.model.layers) <= checkpointed <= set(found)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_within_covers_both_runs(reentrant: bool) -> None:
    """Every layer runs twice in the context, the second time after `checkpointed_within`."""
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    entered = []

    @contextmanager
    def noted() -> Iterator[None]:
        entered.append("in")
        yield
        entered.append("out")

    with internals.checkpointed_within(list(model.model.modules()), noted):
        loss = model(torch.arange(5)[None], use_cache=False).logits.sum()
    layers = len(model.model.layers)
    assert entered == ["in", "out"] * layers, "layers no longer checkpoint by this attribute"
    entered.clear()
    loss.backward()
    assert entered.count("in") == layers
    entered.clear()
    model(torch.arange(5)[None], use_cache=False).logits.sum().backward()
    assert not entered


def test_use_one_gpu(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    vars(args)["_n_gpu"] = 4
    assert args.n_gpu == 4, "TrainingArguments.n_gpu no longer reads _n_gpu"
    internals.use_one_gpu(args)
    assert args.n_gpu == 1


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU),
        (DistributedType.NO, DistributedType.NO),
    ],
)
def test_let_cpu_ranks_shard(
    before: DistributedType, after: DistributedType, monkeypatch: pytest.MonkeyPatch
) -> None:
    PartialState(cpu=True)
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", before)
    assert PartialState().distributed_type == before, "PartialState no longer uses _shared_state"
    internals.let_cpu_ranks_shard()
    assert PartialState().distributed_type == after


def test_loading_whole() -> None:
    set_hf_deepspeed_config(config := Mock(is_zero3=lambda: True))
    try:
        assert is_deepspeed_zero3_enabled()
        with pytest.raises(OSError), internals.loading_whole():
            assert not is_deepspeed_zero3_enabled()
            raise OSError
        assert is_deepspeed_zero3_enabled()
        assert config.is_zero3()
    finally:
        unset_hf_deepspeed_config()
    with internals.loading_whole():
        pass
    assert not is_deepspeed_zero3_enabled()


def test_is_sharded() -> None:
    """ZeRO-3 is tried out by `make deepspeed`, FSDP2 by test_ranks.py."""
    module: Any = nn.Linear(2, 2)
    assert not internals.is_sharded(module)
    module.ds_id = 0
    assert internals.is_sharded(module)


def test_has_bf16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    assert internals.has_bf16_products() in (False, True)
    for there in (False, True):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda t=there: t)
        assert internals.has_bf16_products() is there


def test_foreach_norm() -> None:
    tensors = [torch.randn(3, 4), torch.randn(7)]
    norms = internals.foreach_norm(tensors)
    torch.testing.assert_close(list(norms), [t.norm() for t in tensors])


def test_foreach_multiply() -> None:
    tensors = [torch.randn(3, 4), torch.randn(7)]
    wanted = [t * 0.5 for t in tensors]
    internals.foreach_multiply(tensors, 0.5)
    torch.testing.assert_close(tensors, wanted)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_onednn_linear_equals_linear(bias: bool, transposed: bool) -> None:
    linear = internals.onednn_linear()
    assert linear is not None, "torch.ops.mkldnn has no _linear_pointwise any more"
    x, b = torch.randn(6, 8), torch.randn(5) if bias else None
    weight = torch.randn(8, 5).T if transposed else torch.randn(5, 8)
    found = linear(x, weight, b, "none", [], "")
    torch.testing.assert_close(found, nn.functional.linear(x, weight, b))


def test_onednn_linear_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert internals.onednn_linear() is None


def test_saved_tensor_hooks_are_the_innermost() -> None:
    def outer(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def inner(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    hooked = torch.autograd.graph.saved_tensors_hooks
    assert internals.saved_tensor_hooks() is None
    with hooked(outer, outer):
        assert internals.saved_tensor_hooks() == (outer, outer)
        with hooked(inner, outer):
            assert internals.saved_tensor_hooks() == (inner, outer)
        assert internals.saved_tensor_hooks() == (outer, outer)
    assert internals.saved_tensor_hooks() is None


def test_version_of_counts_changes_in_place() -> None:
    tensor = torch.zeros(4)
    before = internals.version_of(tensor)
    tensor[:2].add_(1)
    assert internals.version_of(tensor) == before + 1
    internals.version_of(tensor + 1)
    assert internals.version_of(tensor) == before + 1


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_has_hooks(register: str) -> None:
    module = nn.Linear(2, 2)
    assert not internals.has_hooks(module)
    handle = getattr(module, register)(lambda *_: None)
    assert internals.has_hooks(module), f"{register} is no longer seen by has_hooks"
    handle.remove()
    assert not internals.has_hooks(module)


def test_has_child() -> None:
    """A child is seen by its name; a parameter is none."""
    module = torch.nn.Module()
    module.gate_proj = torch.nn.Linear(2, 2)
    assert internals.has_child(module, "gate_proj")
    assert not internals.has_child(module, "up_proj")
    assert not internals.has_child(module.gate_proj, "weight")


def test_is_checkpointed() -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    assert not any(internals.is_checkpointed(m) for m in model.modules())
    model.gradient_checkpointing_enable()
    on = [m for m in model.modules() if internals.is_checkpointed(m)]
    assert on == [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)] != []


def test_is_compiled() -> None:
    module = nn.Linear(2, 2)
    assert not internals.is_compiled(module)
    module.compile()
    assert internals.is_compiled(module), "Module.compile no longer sets _compiled_call_impl"


def test_every_function_is_tried_out() -> None:
    functions = [
        name
        for name, value in vars(internals).items()
        if inspect.isfunction(value) and value.__module__ == internals.__name__
    ]
    text = Path(__file__).read_text()
    missing = [name for name in functions if f"internals.{name}(" not in text]
    assert not missing, f"no test calls {missing}"


# The scan of the source.

ALLOWED = {
    "trainer/trainer.py": {
        *internals.TRAINER_METHODS,
        *internals.TRAINER_PASSED_ON,
        *internals.TRAINER_ATTRIBUTES,
        *(name for names in internals.TRAINER_METHODS.values() for name in names),
    },
    "config.py": {*internals.CONFIG_ATTRIBUTES},
}
FOREIGN = set().union(*ALLOWED.values())
BY_NAME = {"getattr", "hasattr", "setattr", "delattr", "attrgetter"}
# Public in spite of the _: of a NamedTuple, and os._exit.
STANDARD = {"_replace", "_asdict", "_fields", "_make", "_exit"}


def is_private(name: object) -> bool:
    return (
        isinstance(name, str)
        and name.startswith("_")
        and name.strip("_") != ""
        and not (name.startswith("__") and name.endswith("__"))
    )


def is_attribute(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and is_private(node.attr)


def of_self(node: ast.expr) -> bool:
    """Whether this is `self`, `cls`, `super()` or the base class of `CompactConfig`."""
    return ast.unparse(node) in ("self", "cls", "super()", "TrainingArguments")


def targets(node: ast.AST) -> list[ast.expr]:
    """What an assignment assigns to, tuples taken apart."""
    if isinstance(node, ast.Assign):
        found = list(node.targets)
    elif isinstance(node, ast.AnnAssign | ast.AugAssign):
        found = [node.target]
    else:
        return []
    return [
        part
        for one in found
        for part in (one.elts if isinstance(one, ast.Tuple | ast.List) else [one])
    ]


def defined_names(tree: ast.Module) -> set[str]:
    """Private names that a file defines: functions, classes, attributes, slots, assignments."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.Module | ast.ClassDef):
            for statement in node.body:
                for target in targets(statement):
                    if isinstance(target, ast.Name):
                        names.add(target.id)
                        if target.id == "__slots__":
                            names |= set(ast.literal_eval(statement.value))
        for target in targets(node):
            if isinstance(target, ast.Attribute) and of_self(target.value):
                names.add(target.attr)
    return {name for name in names if is_private(name)}


def foreign_uses(tree: ast.Module, own: set[str], allowed: set[str]) -> Iterator[tuple[int, str]]:
    """(line, name) of every private name that is neither `own` nor `allowed` on self or super()."""
    for node in ast.walk(tree):
        found: list[str] = []
        if isinstance(node, ast.Attribute):
            if not (node.attr in allowed and of_self(node.value)):
                found = [node.attr]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] != "compact":
            found = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            found = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Call):
            if ast.unparse(node.func).split(".")[-1] in BY_NAME:
                strings = [a.value for a in node.args if isinstance(a, ast.Constant)]
                found = [part for s in strings if isinstance(s, str) for part in s.split(".")]
            found += [k.arg for k in node.keywords if k.arg and k.arg not in allowed]
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            text = ast.unparse(node.value)
            if text.endswith(".__dict__") or text.startswith("vars("):
                found = [str(node.slice.value)]
        for name in found:
            if is_private(name) and name not in own | STANDARD:
                yield node.lineno, name


def trees() -> dict[str, ast.Module]:
    return {
        str(path.relative_to(SOURCE)): ast.parse(path.read_text())
        for path in sorted(SOURCE.rglob("*.py"))
    }


def test_only_internals_uses_private_names_of_others() -> None:
    files = trees()
    own = set().union(*(defined_names(tree) for tree in files.values())) - FOREIGN
    found = [
        f"compact/{file}:{line}: {name}"
        for file, tree in files.items()
        if file != "student/internals.py"
        for line, name in foreign_uses(tree, own, ALLOWED.get(file, set()))
    ]
    assert not found, "move these into compact/student/internals.py: " + ", ".join(found)


@pytest.mark.parametrize("file", ALLOWED)
def test_what_is_allowed_is_used(file: str) -> None:
    text = (SOURCE / file).read_text()
    unused = [name for name in filter(is_private, ALLOWED[file]) if name not in text]
    assert not unused, f"compact/{file} no longer uses {unused}: take them out of internals.py"


@pytest.mark.parametrize(
    "line",
    [
        "model._parameters",
        "model._parameters = {}",
        "getattr(model, '_parameters')",
        "setattr(model, '_parameters', 1)",
        "operator.attrgetter('body._parameters')",
        "model.__dict__['_parameters']",
        "vars(model)['_parameters']",
        "from torch._dynamo import config",
        "from torch import _dynamo",
        "import torch._dynamo",
        "model.save(_internal_call=True)",
        "trainer._save('there')",
        "super()._inner_training_loop()",
    ],
)
def test_the_scan_sees(line: str) -> None:
    assert list(foreign_uses(ast.parse(line), {"_own"}, set()))


@pytest.mark.parametrize(
    "line",
    [
        "model._own",
        "self._save('there')",
        "super()._save('there')",
        "super().save_model(_internal_call=True)",
        "model.__dict__['forward']",
        "row._replace(a=1)",
        "a, _ = pair",
        "table['_parameters']",
    ],
)
def test_the_scan_lets_through(line: str) -> None:
    allowed = {"_save", "_internal_call"}
    assert not list(foreign_uses(ast.parse(line), {"_own"}, allowed))
