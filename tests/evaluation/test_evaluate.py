"""`compact evaluate`: generation, the item file of a killed run, forgetting, bad inputs."""

import argparse
import functools
import itertools
import json
import math
import shutil
import signal
import subprocess
import sys
import time

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    MambaConfig,
    Qwen2Config,
    StaticCache,
)

from compact.answers import Judge
from compact.commands import evaluate as evaluate_command
from compact.data import load_questions
from compact.evaluation import evaluate as module
from compact.evaluation import forgetting, processes
from compact.lab.zoo import make_questions
from compact.lab.zoo_student import build_model
from compact.passes.encode import encode_prompt
from compact.registry import IMPORT_VARIABLE
from compact.resumable import ResumableRows, summary_path
from compact.student import generation, load_model
from helpers.commands import run

ROWS = make_questions(7, seed=3)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


command = functools.partial(run, "evaluate")


def read_items(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_batched_generation_equals_one_prompt_at_a_time(model, tokenizer):
    prompts = [encode_prompt(row["prompt"], tokenizer) for row in ROWS]
    assert len({len(p) for p in prompts}) > 1, "the prompts must differ in length to need padding"
    together = module.generate(model, tokenizer, prompts, 12)
    assert together == [module.generate(model, tokenizer, [p], 12)[0] for p in prompts]
    # Against a greedy loop without cache or padding.
    ids = list(prompts[0])
    for _ in range(12):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    expected = ids[len(prompts[0]) :]
    if tokenizer.eos_token_id in expected:
        expected = expected[: expected.index(tokenizer.eos_token_id)]
    assert together[0] == expected


def test_a_batch_is_watched_token_by_token(model, tokenizer):
    prompts = [encode_prompt(row["prompt"], tokenizer) for row in ROWS[:3]]
    seen = []
    answers = module.generate(
        model, tokenizer, prompts, 9, watch=lambda ended, tokens: seen.append((ended, tokens))
    )
    assert answers == module.generate(model, tokenizer, prompts, 9)
    assert [tokens for _, tokens in seen] == list(range(1, len(seen) + 1))
    ended = [count for count, _ in seen]
    assert ended == sorted(ended) and ended[-1] == sum(len(a) < 9 for a in answers)


def test_rows_that_have_ended_leave_the_batch(tokenizer, monkeypatch):
    """The answers are those of one prompt at a time, and the watch counts on."""
    model = build_model(tokenizer, seed=0, layers=2).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(8.0 if "layers" in name and weight.ndim == 2 else 1.0)  # else it repeats
    rows = make_questions(30, seed=5)
    prompts = [encode_prompt(row["prompt"], tokenizer) for row in rows]
    # One token in five ends an answer, so that rows of an untrained student end one by one.
    ends = list(range(0, model.config.vocab_size, 5))
    monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
    alone = [module.generate(model, tokenizer, [p], 12)[0] for p in prompts]
    assert len({len(a) for a in alone}) > 4, "the answers must end one by one"
    sizes, seen, generate = [], [], model.generate

    def counted(**kwargs):
        sizes.append(len(kwargs["input_ids"]))
        return generate(**kwargs)

    monkeypatch.setattr(model, "generate", counted)
    together = module.generate(
        model, tokenizer, prompts, 12, watch=lambda ended, tokens: seen.append((ended, tokens))
    )
    assert together == alone
    assert len(sizes) > 1 and all(4 * b <= 3 * a for a, b in itertools.pairwise(sizes)), sizes
    assert [tokens for _, tokens in seen] == list(range(1, len(seen) + 1))
    assert seen[-1][0] == sum(len(a) < 12 for a in alone)


def test_a_sample_depends_on_its_own_seed_only(tokenizer, monkeypatch):
    """Alone or in a batch whose rows end one by one; the global random state has no say."""
    model = build_model(tokenizer, seed=0, layers=2).eval()
    ends = list(range(0, model.config.vocab_size, 5))
    monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
    prompts = [encode_prompt(row["prompt"], tokenizer) for row in make_questions(30, seed=5)]
    seeds = [i // 2 for i in range(30)]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    together = module.generate(model, tokenizer, prompts, 12, temperature=1.0, seeds=seeds)
    assert torch.equal(state, torch.get_rng_state())
    alone = [
        module.generate(model, tokenizer, [p], 12, temperature=1.0, seeds=[s])[0]
        for p, s in zip(prompts, seeds, strict=True)
    ]
    assert together == alone and len({len(a) for a in alone}) > 3


@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_samples_have_the_softmax_of_the_temperature(model, tokenizer, top_p):
    """The first token, 4000 times: within four standard errors, also of tokens that are rare.

    With top_p, it is one of the fewest tokens that together have this probability.
    """
    prompt = encode_prompt(ROWS[0]["prompt"], tokenizer)
    with torch.no_grad():
        want = (model(torch.tensor([prompt])).logits[0, -1].double() / 0.7).softmax(-1)
    kept, total = [], 0.0
    for token in want.argsort(descending=True).tolist():
        if total < top_p:
            kept, total = [*kept, token], total + want[token].item()
    assert (len(kept) < len(want)) == (top_p < 1) and len(kept) > 1
    want = torch.zeros_like(want).index_copy(0, torch.tensor(kept), want[kept] / total)
    count = torch.zeros_like(want)
    (end,) = generation.stop_ids(model, tokenizer)
    for first in range(0, 4000, 500):
        seeds = [*range(first, first + 500)]
        more = {"temperature": 0.7, "top_p": top_p, "seeds": seeds}
        found = module.generate(model, tokenizer, [prompt] * 500, 1, **more)
        drawn = torch.tensor([answer[0] if answer else end for answer in found])
        count += torch.bincount(drawn, minlength=len(want))
    error = (want * (1 - want) / 4000).sqrt()
    assert ((count / 4000 - want).abs() <= 4 * error + 1 / 4000).all()


@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=400),
        Qwen2Config(
            **{"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64},
            **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
            **{"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
        ),
    ],
    ids=["mamba", "sliding"],
)
def test_a_cache_of_any_kind(config, tokenizer, monkeypatch):
    """The answers of a batch that shrinks are those of a batch that keeps all rows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    prompts = torch.randint(1, 100, (30, 7)).tolist()
    ends = list(range(0, model.config.vocab_size, 4))
    monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
    found = [module.generate(model, tokenizer, prompts, 12)]
    monkeypatch.setattr(generation, "_FEW_ROWS", 1000)
    found.append(module.generate(model, tokenizer, prompts, 12))
    assert found[0] == found[1] and len({len(answer) for answer in found[0]}) > 1


def test_a_static_cache_is_not_divided(model):
    """Its tensors are those of the whole batch; generate reads all tokens again without it."""
    rows = torch.tensor([0])
    assert generation._divided(StaticCache(model.config, max_cache_len=4), rows) is None
    assert isinstance(generation._divided(DynamicCache(), rows), DynamicCache)


def test_the_bar_moves_within_a_batch(model, tokenizer, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_DRAWINGS", 0)
    problems = load_questions(data)
    module.evaluate(model, tokenizer, problems, tmp_path / "items.jsonl", max_new_tokens=5)
    shown = capsys.readouterr().err
    assert "token 3 of at most 5" in shown and f"{len(problems)}/{len(problems)}" in shown


def test_device_and_dtype(saved, data, tmp_path):
    words = ["--model", saved, "--data", data, "--out", tmp_path / "items.jsonl"]
    words += ["--max_new_tokens", 2]
    with pytest.raises(ValueError, match="device must be one of this machine, got 'nowhere'"):
        command(*words, "--device", "nowhere")
    assert command(*words, "--device", "cpu", "--dtype", "bfloat16") == 0
    with pytest.raises(ValueError, match="dtype was 'bfloat16', now None"):
        command(*words)
    loaded, _ = load_model(str(saved), device="cpu", dtype="bfloat16")
    assert loaded.dtype == torch.bfloat16


def test_several_processes_write_what_one_writes(saved, data, tmp_path, capsys):
    words = ["--model", saved, "--data", data, "--max_new_tokens", 6, "--device", "cpu"]
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    assert command(*words, "--out", one) == 0
    assert command(*words, "--out", two, "--num_processes", 2) == 0
    by_id = [{item["question_id"]: item for item in read_items(path)} for path in (one, two)]
    assert by_id[0] == by_id[1] and len(by_id[0]) == len(ROWS)
    told = [json.loads(summary_path(path).read_text()) for path in (one, two)]
    for summary in told:
        del summary["seconds"]
    assert told[0] == told[1]
    assert not list(tmp_path.glob("*.part-*"))
    assert command(*words, "--out", two) == 0, "one process may go on with it"
    for more in (["--retained", data], ["--part", "1/2"]):
        with pytest.raises(ValueError, match=f"{more[0]} must not be given with --num_processes"):
            command(*words, "--out", two, "--num_processes", 2, *more)
    with pytest.raises(ValueError, match="--part must be k/N with k from 1 to N, got '3/2'"):
        command(*words, "--out", two, "--part", "3/2")
    capsys.readouterr()


def test_the_processes_get_every_option(saved, data, tmp_path, monkeypatch):
    """Also one that is added later; none is lost on the way."""

    class Started(Exception):
        pass

    def started(problems, out, count, options, settings):
        raise Started(*options)

    monkeypatch.setattr(processes, "evaluate_in_processes", started)
    monkeypatch.setattr(evaluate_command, "content_of_student", lambda *_: "")
    given = {"model": saved, "data": data, "out": tmp_path / "x.jsonl", "adapter": "folder"}
    given |= {"limit": 3, "answer_type": "number", "max_new_tokens": 4, "batch_size": 2}
    given |= {"device": "cpu", "dtype": "bfloat16"}
    words = [f"--{name}={value}" for name, value in given.items()]
    with pytest.raises(Started) as found:
        command(*words, "--num_processes", 2)
    assert sorted(found.value.args) == sorted(words)
    parser = argparse.ArgumentParser()
    evaluate_command.add_arguments(parser)
    every = vars(parser.parse_args(["--model", "m", "--data", "d", "--out", "o"]))
    left_out = {"num_processes", "endpoint", "api_key_env"}
    left_out |= {"part", "base", "retained", "retained_task"}  # refused with several processes
    assert every.keys() - given.keys() == left_out


def test_a_process_that_fails_is_named(saved, data, tmp_path, monkeypatch):
    words = ["--model", saved, "--data", data, "--max_new_tokens", 2]
    monkeypatch.setenv(IMPORT_VARIABLE, "no_such_module")
    with pytest.raises(
        ValueError, match="process 1 of 2 failed: |process 2 of 2 failed: .*no_such"
    ):
        command(*words, "--out", tmp_path / "x.jsonl", "--num_processes", 2)


def scripted(answers):
    """Replaces `generate`: returns the scripted answer for each prompt."""
    calls = []

    def generate(model, tokenizer, prompts, max_new_tokens, watch=None):
        calls.append(len(prompts))
        return [tokenizer(answers[tuple(p)])["input_ids"] for p in prompts]

    return generate, calls


@pytest.fixture
def script(monkeypatch, tokenizer):
    """Right answers but for the first question; the second has none."""
    said = {}
    for i, row in enumerate(ROWS):
        answer = int(row["answer"]) + (i == 0)
        text = f"0 + 4 = 4.\nThe answer is {answer}" if i != 1 else " so"
        said[tuple(encode_prompt(row["prompt"], tokenizer))] = text
    generate, calls = scripted(said)
    monkeypatch.setattr(module, "generate", generate)
    return calls


def test_counts_and_item_lines(model, tokenizer, data, tmp_path, script):
    out = tmp_path / "deep" / "items.jsonl"
    summary = module.evaluate(
        model, tokenizer, load_questions(data), out, batch_size=3, progress=False
    )
    assert script == [3, 3, 1]
    assert (summary["items"], summary["correct"], summary["unparsed"]) == (7, 5, 1)
    assert summary["accuracy"] == pytest.approx(5 / 7)
    assert summary["ci_low"] < 5 / 7 < summary["ci_high"]
    items = {item["question_id"]: item for item in read_items(out)}
    assert items.keys() == {row["question_id"] for row in ROWS}
    first = items[ROWS[0]["question_id"]]
    assert first["gold"] == ROWS[0]["answer"] and not first["correct"]
    assert first["completion"].startswith("0 + 4 = 4.") and first["tokens"] > 5
    stored = json.loads((tmp_path / "deep" / "items.summary.json").read_text())
    assert stored["status"] == "complete" and stored["accuracy"] == summary["accuracy"]


def test_killed_run_continues_and_a_half_line_is_dropped(
    model, tokenizer, data, tmp_path, script, monkeypatch
):
    out, problems = tmp_path / "items.jsonl", load_questions(data)
    generate, left = module.generate, [2]

    def killed(*args, **more):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return generate(*args, **more)

    monkeypatch.setattr(module, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        module.evaluate(model, tokenizer, problems, out, batch_size=2, progress=False)
    assert len(read_items(out)) == 4
    with out.open("a") as file:
        file.write('{"question_id": "zoo-te')  # the kill hit in the middle of a write
    monkeypatch.setattr(module, "generate", generate)
    script.clear()
    summary = module.evaluate(model, tokenizer, problems, out, batch_size=2, progress=False)
    assert script == [2, 1], "only what was missing is generated"
    assert summary["items"] == len(read_items(out)) == 7 and summary["correct"] == 5


def test_sigkill_then_the_same_command_gives_the_items_of_an_undisturbed_run(saved, tmp_path):
    data = tmp_path / "many.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in make_questions(40, seed=5)))

    def words(out):
        one_by_one = ["--max_new_tokens", 24, "--batch_size", 1]
        return ["--model", saved, "--data", data, *one_by_one, "--out", out]

    killed = tmp_path / "killed.jsonl"
    line = [sys.executable, "-m", "compact", "evaluate", *map(str, words(killed))]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not (killed.exists() and killed.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline, "no items were written"
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    before = killed.read_bytes()
    assert 3 <= before.count(b"\n") < 40
    assert json.loads(summary_path(killed).read_text())["status"] == "running"
    assert command(*words(killed)) == 0
    assert killed.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    undisturbed = tmp_path / "undisturbed.jsonl"
    assert command(*words(undisturbed)) == 0
    assert read_items(killed) == read_items(undisturbed)


def test_item_file_of_other_settings_is_refused(model, tokenizer, data, tmp_path, script):
    out, problems = tmp_path / "items.jsonl", load_questions(data)
    module.evaluate(model, tokenizer, problems, out, progress=False)
    with pytest.raises(ValueError, match="max_new_tokens was 256, now 99"):
        module.evaluate(model, tokenizer, problems, out, max_new_tokens=99, progress=False)
    (tmp_path / "items.summary.json").unlink()
    with pytest.raises(ValueError, match="expected items.summary.json beside it"):
        module.evaluate(model, tokenizer, problems, out, progress=False)
    with pytest.raises(ValueError, match="at least one problem"):
        module.evaluate(model, tokenizer, [], progress=False)


def test_the_mode_is_put_back_and_its_own_judge_closed(tokenizer, data, script, monkeypatch):
    made, closed = [], []

    class Own(Judge):
        def __init__(self):
            super().__init__()
            made.append(self)

        def close(self):
            super().close()
            closed.append(self)

    monkeypatch.setattr(module, "Judge", Own)
    model = build_model(tokenizer, seed=1, layers=1).train()
    module.evaluate(model, tokenizer, load_questions(data), progress=False)
    assert model.training and len(made) == 1 and closed == made


def test_wilson_interval():
    assert module.wilson_interval(0, 0) == (0.0, 1.0)
    low, high = module.wilson_interval(37, 300)
    # Wilson (1927), computed by hand: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n).
    assert (low, high) == (pytest.approx(0.09089, abs=1e-4), pytest.approx(0.16534, abs=1e-4))


@torch.no_grad()
def test_drift_is_zero_against_itself_and_matches_a_plain_computation(model, tokenizer):
    texts = [row["prompt"] for row in ROWS]
    same = forgetting.text_drift(model, model_twin(model, tokenizer), tokenizer, texts)
    assert same["kl"] == pytest.approx(0, abs=1e-6)
    assert same["base_perplexity"] == pytest.approx(same["student_perplexity"])
    other = build_model(tokenizer, seed=5, layers=2).eval()
    drift = forgetting.text_drift(other, model, tokenizer, texts)
    nll = base_nll = kl = count = 0.0
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        q = torch.log_softmax(other(ids).logits[0, :-1].double(), -1)
        p = torch.log_softmax(model(ids).logits[0, :-1].double(), -1)
        nll -= float(q[range(len(q)), ids[0, 1:]].sum())
        base_nll -= float(p[range(len(p)), ids[0, 1:]].sum())
        kl += float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum"))
        count += len(q)
    assert drift["tokens"] == count
    assert drift["kl"] == pytest.approx(kl / count, rel=1e-4)
    assert drift["student_perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-4)
    assert drift["base_perplexity"] == pytest.approx(math.exp(base_nll / count), rel=1e-4)


def model_twin(model, tokenizer):
    twin = build_model(tokenizer, seed=9, layers=2)
    twin.load_state_dict(model.state_dict())
    return twin.eval()


def save_adapter(model, folder):
    """A LoRA adapter that changes the model."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
    wrapped = peft.get_peft_model(model, config)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    wrapped.save_pretrained(folder)


def test_command_measures_forgetting_of_an_adapter(saved, data, tmp_path, tokenizer, capsys):
    save_adapter(build_model(tokenizer, seed=0, layers=2), tmp_path / "adapter")
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": row["prompt"]}) + "\n" for row in ROWS))
    task = tmp_path / "old.jsonl"
    task.write_text("".join(json.dumps(row) + "\n" for row in make_questions(3, seed=8)))
    out = tmp_path / "run" / "items.jsonl"
    words = ["--model", saved, "--adapter", tmp_path / "adapter", "--data", data, "--out", out]
    words += ["--max_new_tokens", 4, "--retained", texts, "--retained_task", task, "--limit", 5]
    assert command(*words) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"{data}: accuracy 0.") and "(0/5," in printed[0]
    stored = json.loads((tmp_path / "run" / "items.summary.json").read_text())
    text = stored["forgetting"]["text"]
    assert text["kl"] > 1e-3 and text["student_perplexity"] != text["base_perplexity"]
    answers = stored["forgetting"]["answers"]
    assert answers["kl"] > 1e-3 and 0 < answers["tokens"] <= 5 * 4
    layers = stored["forgetting"]["layers"]
    assert len(layers["moved"]) == 2 and min(layers["moved"]) > 0.01
    for name in ("text", "answers"):
        embeddings, *others = layers["states"][name]
        assert embeddings == pytest.approx(1) and len(others) == 2 and max(others) < 0.999
    drop = stored["forgetting"]["tasks"][str(task)]
    assert drop["items"] == 3
    assert drop["drop"] == pytest.approx(drop["base_accuracy"] - drop["student_accuracy"])
    assert (tmp_path / "run" / "items.old.base.jsonl").exists()
    assert "KL 0." in printed[-1]


def test_paired_drop_counts_lost_questions(tmp_path):
    for name, rights in (("base", [1, 1, 1, 0]), ("student", [1, 0, 0, 1])):
        lines = [{"question_id": str(i), "correct": bool(r)} for i, r in enumerate(rights)]
        (tmp_path / name).write_text("".join(json.dumps(x) + "\n" for x in lines))
    drop = forgetting.paired_drop(tmp_path / "base", tmp_path / "student")
    assert (drop["base_accuracy"], drop["student_accuracy"], drop["drop"]) == (0.75, 0.5, 0.25)
    # Differences 0, 1, 1, -1: variance 0.9167, standard error sqrt(0.9167 / 4), times Student's t
    # of 3 degrees of freedom, 3.182. No drop is below -1 or above 1.
    assert (drop["drop_low"], drop["drop_high"]) == (-1.0, 1.0)
    for i in range(4, 40):
        for name in ("base", "student"):
            with (tmp_path / name).open("a") as file:
                file.write(json.dumps({"question_id": str(i), "correct": True}) + "\n")
    drop = forgetting.paired_drop(tmp_path / "base", tmp_path / "student")
    # 40 differences: mean .025, squares 3, variance (3 - 40 * .025^2) / 39; Student's t is 2.0227.
    half = 2.0227 * (2.975 / 39 / 40) ** 0.5
    assert drop["drop_high"] - drop["drop"] == pytest.approx(half, rel=1e-3)
    assert drop["drop"] - drop["drop_low"] == pytest.approx(half, rel=1e-3)


def test_paired_drop_of_few_equal_questions_has_an_interval(tmp_path):
    for items in (1, 5):
        lines = [json.dumps({"question_id": str(i), "correct": True}) + "\n" for i in range(items)]
        (tmp_path / "base").write_text("".join(lines))
        drop = forgetting.paired_drop(tmp_path / "base", tmp_path / "base")
        high = 1.0 if items == 1 else 1 - 0.05**0.2  # of 5, none differs with 5% if .45 of all do
        assert drop["drop"] == 0.0
        assert (drop["drop_low"], drop["drop_high"]) == pytest.approx((-high, high))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--limit": 0}, "--limit must be a number of at least 1, got 0"),
        ({"--batch_size": -1}, "--batch_size must be a number of at least 1, got -1"),
        ({"--data": "absent.jsonl"}, "absent.jsonl"),
        ({"--model": "absent.gguf"}, "absent.gguf: no such file"),
        ({"--retained": "absent.txt"}, "absent.txt"),
    ],
)
def test_bad_input_is_one_clear_error(change, message, saved, data, tmp_path):
    options = {"--model": saved, "--data": data, "--out": tmp_path / "items.jsonl"} | change
    with pytest.raises((ValueError, OSError), match=message):
        command(*[word for pair in options.items() for word in pair])
    assert not (tmp_path / "items.jsonl").exists()


def test_forgetting_without_a_base_is_refused(saved, data, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("One text.\nIts second line.\n\nAnother text.\n")
    assert forgetting.read_texts(texts) == ["One text.\nIts second line.", "Another text."]
    with pytest.raises(ValueError, match="--base must name the base student"):
        command(
            "--model", saved, "--data", data, "--out", tmp_path / "x.jsonl", "--retained", texts
        )


def test_retained_texts_with_any_line_ends(tmp_path):
    for end in ("\n", "\r\n"):
        (tmp_path / "x.txt").write_bytes(f"A{end}a{end}{end}B{end} {end}C".encode())
        texts = forgetting.read_texts(tmp_path / "x.txt")
        assert [text.split() for text in texts] == [["A", "a"], ["B"], ["C"]]


def test_retained_texts_name_the_bad_line(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "fine"}\n{"content": "no"}\n')
    with pytest.raises(ValueError, match=r"texts.jsonl:2: expected"):
        forgetting.read_texts(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="expected at least one text, got none"):
        forgetting.read_texts(path)


def test_items_of_other_weights_or_questions_are_not_taken_over(saved, data, tmp_path):
    """The names of model and data stay the same, but their contents change."""
    student, questions = tmp_path / "student", tmp_path / "questions.jsonl"
    shutil.copytree(saved, student)
    shutil.copy(data, questions)
    words = ["--model", student, "--data", questions, "--out", tmp_path / "items.jsonl"]
    words += ["--max_new_tokens", 2, "--limit", 2]
    assert command(*words) == 0 and command(*words) == 0
    weights = load_file(student / "model.safetensors")
    save_file({k: v * 1.5 for k, v in weights.items()}, student / "model.safetensors")
    with pytest.raises(ValueError, match=r"has rows from other settings \(weights was"):
        command(*words)
    shutil.copy(saved / "model.safetensors", student)
    assert command(*words) == 0
    questions.write_text(questions.read_text() + "\n")
    with pytest.raises(ValueError, match=r"has rows from other settings \(content was"):
        command(*words)


def test_retained_tasks_need_names_of_their_own(saved, data, tmp_path):
    words = ["--model", saved, "--data", data, "--out", tmp_path / "x.jsonl"]
    for folder in ("a", "b"):
        words += ["--retained_task", tmp_path / folder / "test.jsonl"]
    with pytest.raises(ValueError, match="--retained_task must be files of different names"):
        command(*words)


def test_a_start_that_fails_leaves_the_answers_unlocked(
    model, tokenizer, data, tmp_path, monkeypatch
):
    """The error is still alive when the same process tries again."""

    def broken():
        raise OSError("no process can be started")

    out, problems = tmp_path / "items.jsonl", load_questions(data)[:1]
    for _ in ("new", "begun"):
        with monkeypatch.context() as patched:
            patched.setattr(module, "Judge", broken)
            with pytest.raises(OSError, match="no process") as error:
                module.evaluate(model, tokenizer, problems, out, max_new_tokens=2, progress=False)
        module.evaluate(model, tokenizer, problems, out, max_new_tokens=2, progress=False)
        assert error.value.__traceback__ is not None


def test_a_line_ends_at_a_newline_and_nowhere_else(tmp_path):
    """JSON leaves U+2028 as it is, and str.splitlines cuts there."""
    out = tmp_path / "items.jsonl"
    item = {"question_id": "q", "completion": "one\u2028two"}
    out.write_text(json.dumps(item, ensure_ascii=False) + "\n")
    summary_path(out).write_text('{"settings": {}}')
    with ResumableRows(out, {}, key="question_id") as rows:
        assert rows.done == {"q": item}
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": item["completion"]}, ensure_ascii=False) + "\n")
    assert forgetting.read_texts(texts) == [item["completion"]]
