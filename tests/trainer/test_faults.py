"""What goes wrong in a run is named, and nothing whole is lost."""

import json
import re
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from compact.config import CompactConfig
from compact.lab import zoo
from compact.lab.zoo_student import build_model, build_tokenizer
from compact.trainer import CompactTrainer, NonFiniteError
from compact.trainer.checkpoints import clear_unfinished, damage, newest_whole, publish
from compact.trainer.runlog import read_scores

TOKENIZER = build_tokenizer()


def trainer(folder: Path, **settings: object) -> CompactTrainer:
    settings = {"preset": "uniform", "max_steps": 3, "save_steps": 1} | settings
    args = CompactConfig(
        output_dir=str(folder), use_cpu=True, gradient_accumulation_steps=2, **settings
    )
    rows = zoo.make_rows(("good", "verbose"), 8, seed=0)
    model = build_model(TOKENIZER, 0, hidden=32, layers=1)
    return CompactTrainer(model, args, rows, processing_class=TOKENIZER)


def test_damaged_checkpoint_falls_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(tmp_path, max_steps=2).train()
    weights = tmp_path / "checkpoint-2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    again = trainer(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    assert "checkpoint-2 is damaged: model.safetensors" in caplog.text
    assert "resuming from checkpoint-1" in caplog.text


def test_statistics_of_the_metrics_reach_training(tmp_path: Path) -> None:
    """The trainer runs its passes with what the metrics of its preset read."""
    trainer(tmp_path, preset="robust", overrides={"difficulty": "rsr"}, max_steps=1).train()
    assert all(score > 0 for score in read_scores(tmp_path)["difficulty"].to_pylist())


@pytest.mark.parametrize("action", ["stop", "skip"])
def test_loss_that_is_not_finite_names_its_problem(
    tmp_path: Path, action: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = trainer(tmp_path, on_nonfinite=action, max_steps=1)
    bad = run.train_dataset.problems[0].question_id
    forward, before = run._forward, torch.cat([p.flatten() for p in run.model.parameters()]).clone()

    def poisoned(work):  # noqa: ANN001, ANN202
        loss, outcome = forward(work)
        if outcome.problems[0].question_id == bad:
            raise NonFiniteError(f"question_id {bad!r}: poisoned")
        return loss, outcome

    run._forward = poisoned
    run.args.train_sampling_strategy = "sequential"
    if action == "stop":
        with pytest.raises(NonFiniteError, match=bad):
            run.train()
        return
    run.train()
    after = torch.cat([p.flatten() for p in run.model.parameters()])
    assert f"skipped question_id {bad!r}" in caplog.text
    assert bool(torch.isfinite(after).all()) and not torch.equal(before, after)


def test_the_log_repeats_the_loss_before_a_step_that_is_left_out(tmp_path: Path) -> None:
    """A loss of 0 would be the best of all, and lower every mean."""
    run = trainer(tmp_path, on_nonfinite="skip", max_steps=4)
    forward = run._forward

    def poisoned(work):  # noqa: ANN001, ANN202
        if run.state.global_step in (1, 2):
            raise NonFiniteError("poisoned")
        return forward(work)

    run._forward = poisoned
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[0] > 0 and losses[1:3] == pytest.approx([losses[0]] * 2)
    assert losses[3] > 0 and losses[3] != pytest.approx(losses[0], abs=1e-6)
    assert run.state.log_history[-1]["train_loss"] == pytest.approx(sum(losses) / 4)


@pytest.mark.parametrize("there", [False, True])
def test_bfloat16_trains_and_a_cpu_without_it_is_told_of(
    tmp_path: Path, there: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: there)
    run = trainer(tmp_path, bf16=True, max_steps=1)
    assert ("bf16: this CPU has no instructions for it" in caplog.text) != there
    run.train()
    assert run.state.global_step == 1 and run.layout == "tree"


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Lets no file grow beyond `size` bytes, as a quota does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def parameters(run: CompactTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.model.parameters()]).clone()


def test_checkpoint_that_does_not_fit_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk takes no more at step 2; with room again, the run goes on to the same bits."""
    whole = trainer(tmp_path / "whole")
    whole.train()
    size = (tmp_path / "whole/checkpoint-1/model.safetensors").stat().st_size
    save = CompactTrainer._save_checkpoint

    def short_of_room(self: CompactTrainer, model: object, trial: object) -> None:
        with largest_file(size // 2 if self.state.global_step == 2 else resource.RLIM_INFINITY):
            save(self, model, trial)

    monkeypatch.setattr(CompactTrainer, "_save_checkpoint", short_of_room)
    run = tmp_path / "run"
    with pytest.raises(OSError, match="checkpoint-2 could not be written .* MiB free"):
        trainer(run).train()
    monkeypatch.undo()
    assert sorted(p.name for p in run.glob("*checkpoint-*")) == ["checkpoint-1"]
    assert damage(run / "checkpoint-1") is None
    again = trainer(run)
    again.train(resume_from_checkpoint=True)
    assert torch.equal(parameters(again), parameters(whole))


@pytest.mark.parametrize("kibibytes", [24, 260, 700])
def test_full_disk(tmp_path: Path, kibibytes: int) -> None:
    """A disk that fills up in the log, the first checkpoint or a later one: an OSError says so."""
    mount = shutil.which("mount")
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={kibibytes}k", "none", str(disk)]
    if mount is None or subprocess.run([mount, *options], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        with pytest.raises(OSError, match="No space left on device"):
            trainer(disk / "run", max_steps=8).train()
        for checkpoint in (disk / "run").glob("checkpoint-*"):
            assert damage(checkpoint) is None
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_saved_model_is_whole_or_untouched(tmp_path: Path) -> None:
    """`save_model` into a folder that holds a model already."""
    run = trainer(tmp_path, save_strategy="no")
    run.save_model()
    weights = tmp_path / "model.safetensors"
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    run.train()
    with (
        largest_file(len(before[weights.name]) // 2),
        pytest.raises(OSError, match="could not be written"),
    ):
        run.save_model()
    assert all((tmp_path / name).read_bytes() == content for name, content in before.items())
    assert not (tmp_path / "unfinished-model").exists()
    run.save_model()
    assert weights.read_bytes() != before[weights.name]


def test_resuming_at_the_last_step_takes_no_step_more(tmp_path: Path) -> None:
    """As after a kill between the last checkpoint and the end, in the middle of an epoch."""
    settings = {"max_steps": 3, "save_steps": 3, "per_device_train_batch_size": 1}
    whole = trainer(tmp_path, **settings)
    whole.train()
    rows = read_scores(tmp_path).num_rows
    again = trainer(tmp_path, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3 and not (tmp_path / "checkpoint-4").exists()
    assert read_scores(tmp_path).num_rows == rows
    assert torch.equal(parameters(whole), parameters(again))


def test_resuming_from_an_older_checkpoint_sets_newer_ones_aside(tmp_path: Path) -> None:
    """They belong to steps that are trained again; the next resumption must not take them."""
    whole = trainer(tmp_path)
    whole.train()
    last = max(int(p.name.split("-")[1]) for p in tmp_path.glob("checkpoint-*"))
    assert last > 2
    again = trainer(tmp_path, max_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert (tmp_path / f"_superseded-checkpoint-{last}" / "model.safetensors").exists()
    again = trainer(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert torch.equal(parameters(again), parameters(whole))


class Interrupt(TrainerCallback):
    """Ctrl-C in the middle of a step."""

    def on_substep_end(self, args, state, control, **kwargs) -> None:  # noqa: ANN001, ANN003
        if state.global_step == 2:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("settings", [{}, {"preset": "robust", "leaf_every": 3}])
def test_interrupted_and_resumed_equals_uninterrupted(
    tmp_path: Path, settings: dict[str, object]
) -> None:
    """Ctrl-C between checkpoints, also where problems keep gains of earlier steps."""
    settings = settings | {"max_steps": 7, "save_steps": 2}
    whole = trainer(tmp_path / "whole", **settings)
    whole.train()
    run = trainer(tmp_path / "run", **settings)
    run.add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        run.train()
    checkpoint, damaged = newest_whole(tmp_path / "run")
    assert checkpoint == tmp_path / "run" / "checkpoint-2" and not damaged
    again = trainer(tmp_path / "run", **settings)
    again.train(resume_from_checkpoint=True)
    assert torch.equal(parameters(again), parameters(whole))
    assert read_scores(tmp_path / "run").equals(read_scores(tmp_path / "whole"))


@pytest.mark.parametrize("look", [newest_whole, clear_unfinished])
def test_killed_while_a_checkpoint_is_replaced(tmp_path: Path, look: Callable[..., object]) -> None:
    """Between the two renames the older checkpoint has another name; it gets its own back."""
    final, staged = tmp_path / "checkpoint-2", tmp_path / "unfinished-checkpoint-2"
    for content in ("old", "new"):
        staged.mkdir()
        (staged / "weights").write_text(content)
        publish(staged, final)
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
        assert (final / "weights").read_text() == content
    final.rename(tmp_path / "older-checkpoint-2")
    staged.mkdir()
    look(tmp_path)
    assert newest_whole(tmp_path) == (final, []) and (final / "weights").read_text() == "new"
    clear_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


@pytest.mark.parametrize("action", ["stop", "skip"])
def test_gradient_that_is_not_finite_names_its_parameter(
    tmp_path: Path, action: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A finite loss whose backward overflows in the second micro-batch of a step of two."""
    run = trainer(tmp_path, on_nonfinite=action, max_steps=1)
    weight = run.model.model.layers[0].mlp.up_proj.weight
    calls: list[int] = []

    def overflow(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return gradient * (torch.inf if len(calls) == 2 else 1.0)

    weight.register_hook(overflow)
    before = parameters(run)
    message = r"question_id 'zoo-0-0000\d': the gradient of .*up_proj.weight is not finite"
    if action == "stop":
        with pytest.raises(NonFiniteError, match=message):
            run.train()
        return
    run.train()
    after = parameters(run)
    assert re.search("step 1: skipped " + message, caplog.text)
    assert bool(torch.isfinite(after).all()) and not torch.equal(before, after)
    assert len({row["question_id"] for row in read_scores(tmp_path).to_pylist()}) == 1


def test_a_checkpoint_without_optimizer_is_not_resumed(tmp_path: Path) -> None:
    trainer(tmp_path, save_only_model=True, max_steps=1).train()
    with pytest.raises(ValueError, match="checkpoint-1 cannot be used: it was saved with save_on"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


def test_another_preset_does_not_go_on(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=1).train()
    with pytest.raises(ValueError, match="preset must be 'uniform' to resume from"):
        trainer(tmp_path, preset="robust").train(resume_from_checkpoint=True)


def test_a_folder_of_a_like_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "unfinished-thoughts").mkdir()
    trainer(tmp_path, max_steps=1).train()
    assert (tmp_path / "unfinished-thoughts").exists()


def test_a_secret_on_the_command_line_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", "--hub_token", "hf_x", "--seed", "1", "--data", "a b"]
    monkeypatch.setattr("sys.argv", ["/x/compact/__main__.py", *words])
    trainer(tmp_path, max_steps=1).train()
    found = json.loads((tmp_path / "run.json").read_text())["command"]
    assert found == "compact train --hub_token <hidden> --seed 1 --data 'a b'"


@pytest.mark.parametrize(
    "given", ['{"token": "hf_x", "revision": "r"}', "{token: hf_x, revision: r}"]
)
def test_a_secret_to_load_the_student_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setattr("sys.argv", ["compact", "train", "--model_init_kwargs", given])
    kwargs = {"token": "hf_x", "revision": "r"}
    run = trainer(tmp_path, max_steps=1, save_strategy="no", model_init_kwargs=kwargs)
    run.train()
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["settings"]["model_init_kwargs"] == {"token": "<hidden>", "revision": "r"}
    assert found["command"] == f"compact train --model_init_kwargs '{given}'".replace(
        "hf_x", "<hidden>"
    )
    assert "hf_x" not in (tmp_path / "run.json").read_text()
    assert run.args.model_init_kwargs == kwargs


@pytest.mark.parametrize("name", ["label_smoothing_factor", "auto_find_batch_size"])
def test_settings_that_would_do_nothing_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be "):
        trainer(tmp_path, **{name: 1})


def test_evaluation_is_over_the_problems_that_have_a_loss(tmp_path: Path) -> None:
    """As a training step is: with one teacher, over the problems that it has solved."""
    rows = zoo.make_rows(("good", "verbose"), 4, seed=0)
    part = [r for r in rows if r["teacher"] == "good" or r["question_id"] != rows[0]["question_id"]]
    losses = []
    for data in (part, [r for r in part if r["question_id"] != rows[0]["question_id"]]):
        args = CompactConfig(output_dir=str(tmp_path), use_cpu=True, preset="single:verbose")
        model = build_model(TOKENIZER, 0, hidden=32, layers=1)
        run = CompactTrainer(model, args, part, data, processing_class=TOKENIZER)
        losses.append(run.evaluate()["eval_loss"])
    assert losses[0] > 0 and losses[0] == pytest.approx(losses[1])
