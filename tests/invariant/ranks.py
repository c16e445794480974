"""What each of two ranks runs for test_ranks.py: several runs in one start, results of rank 0."""

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, gather_object
from peft import LoraConfig
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
torch.set_num_threads(1)

import compact.trainer.loss  # noqa: E402
from compact.config import CompactConfig  # noqa: E402
from compact.lab.zoo_student import build_model, build_tokenizer  # noqa: E402
from compact.trainer import CompactTrainer, NonFiniteError  # noqa: E402
from compact.trainer.runlog import read_scores  # noqa: E402
from helpers.trajectories import TEACHERS, WEIGHED, rows_of  # noqa: E402

PROBLEMS = 7  # a step of four and one of three: the last round leaves a rank without a problem
SAVING = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 1}
# Its `attention` reads projections of a layer, whose weights FSDP2 splits.
RELEASED = {"preset": "released", "overrides": None, "leaf_every": 1, "num_train_epochs": 1}
RELEASED |= {"gradient_accumulation_steps": 2}
LORA = SAVING | {"lora": True}
FSDP2 = {  # what accelerate makes of recipes/accelerate/fsdp2.yaml
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
DEEPSPEED = {  # as a user's zero3.json; without a threshold, ZeRO-3 shares out small tensors too
    "zero_optimization": {
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
OF_DEEPSPEED = {"": SAVING, " lora": LORA, " released": RELEASED}  # name -> settings of a run
BAD = 5  # the problem that has no finite loss where `poison` is asked for


def start(
    folder: Path, *, resume: bool = False, lora: bool = False, **settings: Any
) -> CompactTrainer:
    """Trains two epochs of two steps with everything that is carried from step to step."""
    values: dict[str, Any] = {
        "output_dir": str(folder),
        **WEIGHED,
        "leaf_every": 2,
        "max_length": 400,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-3,  # no step of full size where a gradient is only rounding
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    rows = rows_of(*TEACHERS, problems=PROBLEMS)
    tokenizer = build_tokenizer()
    trainer = CompactTrainer(
        build_model(tokenizer, seed=0, hidden=32, layers=2),
        CompactConfig(**values | settings),
        train_dataset=rows,
        eval_dataset=rows[: 3 * len(TEACHERS)],
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules="all-linear", r=4) if lora else None,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def outcome(trainer: CompactTrainer) -> dict[str, Any]:
    """What must not depend on the number of ranks; every rank calls it."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # DeepSpeed: on rank 0
    log = trainer.state.log_history
    scores = read_scores(trainer.args.output_dir).drop_columns(["epoch"])
    return {
        "parameters": {name: tensor.clone() for name, tensor in (state or {}).items()},
        "losses": [entry["loss"] for entry in log if "loss" in entry],
        "norms": [entry["grad_norm"] for entry in log if "grad_norm" in entry],
        "evals": [
            {k: v for k, v in entry.items() if k.endswith(("loss", "nll", "gold_logp"))}
            for entry in log
            if "eval_loss" in entry
        ],
        "statistics": trainer.weigher.state_dict(),
        "scores": scores.to_pylist(),
    }


def poison(question_id: str) -> None:
    """Makes the token losses of a problem NaN, as an overflow in the student would."""
    run_pass = compact.trainer.loss.run_pass

    def poisoned(student: Any, batch: Any, **settings: Any) -> Any:
        live, hidden, pass_ = run_pass(student, batch, **settings)
        if question_id in [problem.question_id for problem in batch.problems]:
            bad = live.nll * torch.nan
            live = live._replace(nll=bad)
            pass_ = replace(pass_, stats=pass_.stats._replace(nll=bad.detach()))
        return live, hidden, pass_

    compact.trainer.loss.run_pass = poisoned


def blow_up() -> None:
    """Makes every gradient infinite, although every loss is finite."""
    run_pass = compact.trainer.loss.run_pass

    def endless(*args: Any, **settings: Any) -> Any:
        found = run_pass(*args, **settings)
        if found[0].nll.requires_grad:
            found[0].nll.register_hook(lambda gradient: gradient * torch.inf)
        return found

    compact.trainer.loss.run_pass = endless


def count_gathers() -> list[list[str]]:
    """Returns a list that receives the parameters of every all-gather of FSDP2."""
    gather, seen = _fsdp_param_group.foreach_all_gather, []

    def counted(parameters: list[Any], *args: Any, **kwargs: Any) -> Any:
        seen.append([parameter._param_fqn for parameter in parameters])
        return gather(parameters, *args, **kwargs)

    _fsdp_param_group.foreach_all_gather = counted
    return seen


def resumed(run: Path, **settings: Any) -> dict[str, Any]:
    """Goes on from step 2 of a run whose later checkpoints are taken away."""
    if PartialState().is_main_process:
        for step in (3, 4):
            shutil.rmtree(run / f"checkpoint-{step}")
    PartialState().wait_for_everyone()
    return outcome(start(run, resume=True, **settings or SAVING))


def with_deepspeed(out: Path) -> None:
    """Runs ZeRO-2 and ZeRO-3, and keeps what rank 0 saw."""
    results: dict[str, Any] = {}
    for stage in (2, 3):
        AcceleratorState._reset_state()
        zero = DEEPSPEED["zero_optimization"] | {"stage": stage}
        own = {"deepspeed": DEEPSPEED | {"zero_optimization": zero}}
        for name, settings in OF_DEEPSPEED.items():
            run = out / f"{stage}{name}"
            trainer = start(run, **own | settings)
            assert trainer.accelerator.state.deepspeed_plugin.zero_stage == stage
            results[f"{stage}{name}"] = outcome(trainer)
            if settings is not RELEASED:
                results[f"{stage}{name} resumed"] = resumed(run, **own | settings)
    blow_up()
    try:
        start(out / "endless", **own, max_steps=1)
    except NonFiniteError as error:
        results["endless"] = gather_object([str(error)])
    if PartialState().is_main_process:
        torch.save(results, out / "results.pt")


def main(out: Path) -> None:
    """Runs everything but DeepSpeed, and keeps what rank 0 saw."""
    results: dict[str, Any] = {"ddp": outcome(start(out / "ddp", **SAVING))}
    results["ddp resumed"] = resumed(out / "ddp")

    AcceleratorState._reset_state()
    os.environ |= FSDP2
    gathers = count_gathers()
    sharded = start(out / "fsdp2", **SAVING)
    results["sharded"] = type(sharded.model).__name__
    results["gathers"] = list(gathers)
    results["fsdp2"] = outcome(sharded)
    results["fsdp2 resumed"] = resumed(out / "fsdp2")
    results["fsdp2 released"] = outcome(start(out / "released", **RELEASED))
    AcceleratorState._reset_state()
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    os.environ["ACCELERATE_USE_FSDP"] = "false"

    poison(sorted({row["question_id"] for row in rows_of("good", problems=PROBLEMS)})[BAD])
    once = {"gradient_accumulation_steps": 1, "num_train_epochs": 1, "eval_strategy": "no"}
    skipping = start(out / "skipped", on_nonfinite="skip", **once)
    results["skipped"] = outcome(skipping)
    try:
        start(out / "stopped", **once)
    except NonFiniteError as error:
        results["stopped"] = gather_object([str(error)])
    poison("zoo-11-00001")  # of the evaluation data
    try:
        skipping.evaluate()
    except NonFiniteError as error:
        results["evaluated"] = gather_object([str(error)])
    if PartialState().is_main_process:
        torch.save(results, out / "results.pt")


if __name__ == "__main__":
    {"main": main, "deepspeed": with_deepspeed}[sys.argv[2]](Path(sys.argv[1]))
    PartialState().destroy_process_group()
    os._exit(0)  # the groups of FSDP2 stay, and gloo's threads can abort Python's own end
