"""What FSDP2 and ZeRO-3 need: checks, whole students, a gathered head. See also test_ranks.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import StateDictType

from compact.config import CompactConfig
from compact.lab import zoo
from compact.lab.zoo_student import build_model, build_tokenizer
from compact.passes import lazily
from compact.strategies import make_strategy
from compact.trainer import CompactTrainer
from compact.trainer.setup import check_strategy, check_training
from compact.trainer.sharding import asked_for, bad_norm, check_sharding, gather_head, give_up_head
from compact.weighting import make_weigher

TOKENIZER = build_tokenizer()


def trainer_with(kind: DistributedType, **others: Any) -> SimpleNamespace:
    """Stands for a trainer whose accelerator shards parameters in some way."""
    accelerator = SimpleNamespace(distributed_type=kind, is_fsdp2=others.get("fsdp2", False))
    zero = {"stage3_gather_16bit_weights_on_model_save": others.get("saves", False)}
    accelerator.state = SimpleNamespace(
        deepspeed_plugin=SimpleNamespace(
            zero_stage=others.get("stage", 2), deepspeed_config={"zero_optimization": zero}
        ),
        fsdp_plugin=SimpleNamespace(
            activation_checkpointing=others.get("checkpoints", False),
            state_dict_type=others.get("saved", StateDictType.FULL_STATE_DICT),
        ),
    )
    accelerator.parallelism_config = others.get("parallelism")
    return SimpleNamespace(accelerator=accelerator, is_fsdp_enabled=kind == DistributedType.FSDP)


def test_fsdp1_is_refused() -> None:
    check_sharding(trainer_with(DistributedType.FSDP, fsdp2=True))
    with pytest.raises(ValueError, match="fsdp_version must be 2, got 1"):
        check_sharding(trainer_with(DistributedType.FSDP))


def test_what_would_not_see_the_tree_or_share_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="set gradient_checkpointing: true in its place"):
        check_sharding(trainer_with(DistributedType.FSDP, fsdp2=True, checkpoints=True))
    split = SimpleNamespace(tp_size=1, cp_size=2, sp_size=1)
    with pytest.raises(ValueError, match="must leave cp_size at 1, .* got 2"):
        check_sharding(trainer_with(DistributedType.MULTI_GPU, parallelism=split))


def test_fsdp_that_cannot_save_is_refused() -> None:
    """At the start: the run would end with an error when it saves the student."""
    kind = StateDictType.SHARDED_STATE_DICT
    with pytest.raises(
        ValueError, match="fsdp_state_dict_type must be FULL_STATE_DICT, .* got .*SHARDED_STATE"
    ):
        check_sharding(trainer_with(DistributedType.FSDP, fsdp2=True, saved=kind))


def test_fsdp_of_the_settings_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before transformers sets the variable that accelerate reads."""
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    for fsdp, expected in ((True, "FSDP"), (False, None)):
        assert asked_for(SimpleNamespace(deepspeed_plugin=None, fsdp=fsdp)) == expected


def test_zero3_that_cannot_save_is_refused() -> None:
    check_sharding(trainer_with(DistributedType.DEEPSPEED))
    check_sharding(trainer_with(DistributedType.DEEPSPEED, stage=3, saves=True))
    with pytest.raises(
        ValueError, match="zero3_save_16bit_model .* must be true with ZeRO-3, .* got false"
    ):
        check_sharding(trainer_with(DistributedType.DEEPSPEED, stage=3))


def test_problems_without_a_loss_are_found_at_the_start_with_deepspeed(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In data that are not encoded as a whole; others leave such problems out."""
    rows = zoo.make_rows(("good", "verbose"), 4, seed=1)
    ids = sorted({row["question_id"] for row in rows})
    rows += [r | {"question_id": "w"} for r in zoo.make_rows(("wrong-step",), 1, seed=2)]
    args = CompactConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")

    def check(data: Any) -> None:
        trainer = CompactTrainer(
            build_model(TOKENIZER, seed=0, hidden=32, layers=1), args, data, None, TOKENIZER
        )
        monkeypatch.setattr(args, "deepspeed_plugin", SimpleNamespace())
        try:
            check_training(trainer, trainer.train_dataset)
        finally:
            monkeypatch.setattr(args, "deepspeed_plugin", None)

    check(rows)
    monkeypatch.setattr(lazily, "AT_ONCE", 4)
    check([row for row in rows if row["question_id"] in ids])
    rows = [row for row in rows if row["question_id"] != ids[0]][::-1]  # the sample has the first
    rows.append(rows[-1] | {"question_id": "last"})
    with pytest.raises(ValueError, match="1 of a sample of 4 problems .* DeepSpeed every problem"):
        check(rows)


def test_a_student_in_parts_is_refused(tmp_path: Any) -> None:
    model = build_model(TOKENIZER, seed=0, hidden=32, layers=1)
    next(model.parameters()).ds_id = 0  # type: ignore[attr-defined]
    args = CompactConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="model must hold whole parameters, but ZeRO-3"):
        CompactTrainer(model, args, processing_class=TOKENIZER)


def test_what_zero3_took_away_is_gathered_once_and_kept() -> None:
    """A stand-in for DeepSpeed's parameters: gathered if missing, and marked as in use."""
    gathered: list[list[str]] = []
    head: Any = nn.Linear(2, 3)
    head.ds_id = 7
    for name, parameter in head.named_parameters():
        parameter.ds_id, parameter.label = 0, name
        parameter.ds_status = SimpleNamespace(name="NOT_AVAILABLE")
        parameter.ds_active_sub_modules = set()

        def all_gather(missing: list[Any]) -> None:
            gathered.append([parameter.label for parameter in missing])
            for parameter in missing:
                parameter.ds_status = SimpleNamespace(name="AVAILABLE")

        parameter.all_gather = all_gather
    for until in (False, True):
        gather_head(head, until=until)
        assert all(p.ds_active_sub_modules == {7} for p in head.parameters())
    give_up_head(head)
    assert all(p.ds_active_sub_modules == set() for p in head.parameters())
    assert gathered == [["weight", "bias"]]


def test_a_plain_head_is_left_alone() -> None:
    head = nn.Linear(2, 3)
    before = {name: dict(vars(p)) for name, p in head.named_parameters()}
    gather_head(head, until=True)
    assert {name: dict(vars(p)) for name, p in head.named_parameters()} == before


@pytest.mark.parametrize(
    ("kind", "precision", "norm", "message"),
    [
        (DistributedType.DEEPSPEED, "no", 1.0, None),
        (DistributedType.DEEPSPEED, "no", None, None),  # before the first step
        (DistributedType.DEEPSPEED, "bf16", float("inf"), "the norm of the gradients is inf"),
        (DistributedType.DEEPSPEED, "fp16", float("inf"), None),
        (DistributedType.MULTI_GPU, "no", float("inf"), None),
    ],
)
def test_norms_of_deepspeed(
    kind: DistributedType, precision: str, norm: float | None, message: str | None
) -> None:
    engine = SimpleNamespace(get_global_grad_norm=lambda: norm)
    accelerator = SimpleNamespace(
        distributed_type=kind, mixed_precision=precision, deepspeed_engine_wrapped=engine
    )
    assert bad_norm(accelerator) == message


@pytest.mark.parametrize("name", ["mot", "fragment-ema"])
def test_a_strategy_for_whole_models_is_refused_with_deepspeed(name: str, tmp_path: Any) -> None:
    """transformers sets `deepspeed_plugin` for the setting `deepspeed` and for accelerate."""
    own = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
    args = CompactConfig(**own, preset="uniform", strategy=name)
    check_strategy(make_weigher("uniform"), make_strategy(name), args)
    args.deepspeed_plugin = SimpleNamespace()
    with pytest.raises(ValueError, match=f"strategy must not be {name} with DEEPSPEED"):
        check_strategy(make_weigher("uniform"), make_strategy(name), args)
