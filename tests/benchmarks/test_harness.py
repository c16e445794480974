"""The harness runs providers in turn, checks results before timing, and measures memory exactly."""

import math
import mmap
import re
import sys
import types

import pytest
import torch

from benchmarks import harness, run
from benchmarks.harness import (
    Args,
    Provider,
    ProviderFailed,
    Skipped,
    Timing,
    WrongResult,
    compare,
    peak_mb,
)

CPU = torch.device("cpu")
MB = 10**6


def answers(value, log=None, name=""):
    """A provider's `run` that returns a constant and records its calls."""

    def call():
        if log is not None:
            log.append(name)
        return {"x": value}

    return call


def test_providers_take_turns_after_a_check_and_the_memory_meter():
    log = []
    one = torch.ones(2)
    providers = {n: Provider(answers(one, log, n), lambda: {"x": one}) for n in "ab"}
    timings = compare(providers, CPU, seconds=0, rounds=(3, 5))
    assert log == list("ab" + "ab" + "ababab")  # check, peak, three rounds
    assert [len(t.seconds) for t in timings.values()] == [3, 3]


def test_rounds_go_on_until_the_time_is_used_and_no_longer():
    one = torch.ones(1)
    provider = {"a": Provider(answers(one), lambda: {"x": one})}
    assert len(compare(provider, CPU, seconds=60, rounds=(2, 4))["a"].seconds) == 4


def test_setup_runs_once_and_reset_before_every_call():
    log = []
    one = torch.ones(1)
    provider = Provider(
        answers(one, log, "run"),
        lambda: {"x": one},
        setup=lambda: log.append("setup"),
        reset=lambda: log.append("reset"),
    )
    compare({"a": provider}, CPU, seconds=0, rounds=(1, 1))
    assert log == ["setup"] + ["reset", "run"] * 3


@pytest.mark.parametrize(
    ("got", "message"),
    [
        ({"x": torch.tensor([1.0, 2.1])}, r"'x' is wrong at \[1\]: expected 2, got 2.1"),
        ({"x": torch.tensor([1.0, math.nan])}, r"wrong at \[1\].*got nan"),
        ({"x": torch.tensor([1.0])}, r"must have shape \[2\], got \[1\]"),
        ({"y": torch.tensor([1.0, 2.0])}, r"'y' is not in the reference \['x'\]"),
        ({}, "returned no outputs"),
    ],
)
def test_a_wrong_provider_is_refused_before_anything_is_timed(got, message):
    calls = []
    want = {"x": torch.tensor([1.0, 2.0])}

    def wrong():
        calls.append(1)
        return got

    providers = {
        "right": Provider(answers(want["x"], calls), lambda: want),
        "wrong": Provider(wrong, lambda: want),
    }
    with pytest.raises(WrongResult, match=f"wrong: .*{message}"):
        compare(providers, CPU)
    assert len(calls) == 2


def test_a_provider_that_raises_is_named():
    def broken():
        raise RuntimeError("no compiler\nand much more")

    with pytest.raises(ProviderFailed, match=r"^bad: RuntimeError: no compiler$"):
        compare({"bad": Provider(broken, dict)}, CPU)


def test_progress_tells_what_runs_and_the_time_left(monkeypatch):
    now, said = [0.0], []
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])

    def call():
        now[0] += 2.0
        return {"x": torch.ones(1)}

    provider = {"a": Provider(call, lambda: {"x": torch.ones(1)})}
    compare(provider, CPU, seconds=0, rounds=(3, 5), report=lambda *pair: said.append(pair))
    assert said[1:] == [
        ("memory of a", 8.0), ("round 1, a", 6.0), ("round 2, a", 4.0), ("round 3, a", 2.0)
    ]  # fmt: skip
    assert said[0][0] == "checking a" and math.isnan(said[0][1])


def test_errors_are_relative_to_the_largest_entry():
    want = {"x": torch.tensor([0.0, 100.0])}
    near = Provider(answers(torch.tensor([0.005, 100.0])), lambda: want, rtol=1e-4)
    timing = compare({"a": near}, CPU, only_check=True)["a"]
    assert timing.error == pytest.approx(5e-5)
    assert timing.seconds == ()
    assert math.isnan(timing.peak_mb)


def test_quantiles_and_median():
    timing = Timing((5.0, 1.0, 2.0, 3.0, 4.0, 6.0), 0.0, 0.0)
    assert timing.median_s == 3.5
    assert timing.quantile(20) == pytest.approx(2.0)
    assert timing.quantile(80) == pytest.approx(5.0)
    assert Timing((7.0,), 0.0, 0.0).quantile(80) == 7.0


needs_meter = pytest.mark.skipif(
    math.isnan(peak_mb(lambda: None, CPU)), reason="this system has no resettable high-water mark"
)


@needs_meter
@pytest.mark.parametrize("megabytes", [80, 200])
def test_the_meter_sees_a_tensor_that_lived_for_a_moment(megabytes):
    def call():  # both above 32 MB, up to which malloc may keep what is freed
        torch.ones(megabytes * MB // 4)
        torch.ones(megabytes * MB // 8)

    call()  # in a fresh process the first call also brings in torch's code, above a megabyte
    # The least of three: other threads of the test's process can only add to it.
    assert min(peak_mb(call, CPU) for _ in range(3)) == pytest.approx(megabytes, abs=2)


@needs_meter
def test_the_meter_sees_what_torch_does_not_allocate():
    def call():
        with mmap.mmap(-1, 30 * MB) as block:
            block.write(b"x" * (10 * MB))

    assert peak_mb(call, CPU) == pytest.approx(20, abs=2)  # touched pages, and the bytes object


@needs_meter
def test_memory_in_use_before_does_not_count_but_reused_free_memory_does():
    kept = torch.ones(100 * MB // 4)
    for _ in range(3):
        small = [torch.ones(1000) for _ in range(10_000)]  # 40 MB below malloc's mmap threshold
        del small
    assert peak_mb(lambda: kept.sum(), CPU) < 2
    assert peak_mb(lambda: [torch.ones(1000) for _ in range(10_000)], CPU) > 38


# --- the driver -------------------------------------------------------------------------------

FAKE_SHAPES = ({"n": 4, "kind": "plain"}, {"n": 8, "kind": "plain"})


def fake_providers(args: Args):
    one = torch.ones(int(args.shape["n"]), dtype=args.dtype)
    wrong = one * 2 if args.shape["kind"] == "wrong" else one
    return {
        "base": Provider(answers(one), lambda: {"x": one}),
        "other": Provider(answers(wrong), lambda: {"x": one}),
        "absent": Skipped("it is not installed"),
        "tardy": Provider(answers(one), lambda: {"x": one}, slow=True),
    }


@pytest.fixture
def case(monkeypatch):
    """Replaces the case `kl` by a fake case."""
    module = types.ModuleType("benchmarks.kl", "A fake.\n\nAnd more.")
    module.TITLE, module.LEGEND = "Fake", "A fake."
    module.SHAPES, module.providers = FAKE_SHAPES, fake_providers
    module.DTYPES = ("float32", "float64")
    monkeypatch.setitem(sys.modules, "benchmarks.kl", module)


def driver(tmp_path, *arguments):
    return run.main(["kl", "--results", str(tmp_path), "--seconds", "0", *arguments])


def test_rows_hold_every_field_and_csv_grows(case, tmp_path, capsys):
    import csv
    import json

    for _ in range(2):
        assert driver(tmp_path, "--json", str(tmp_path / "out.json")) == 0
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [(r["provider"], r["shape"]["n"]) for r in rows] == [
        ("base", 4), ("other", 4), ("base", 8), ("other", 8)
    ]  # fmt: skip
    assert all(tuple(r) == run.FIELDS for r in rows)
    assert rows[0]["ratio"] == 1.0
    assert rows[1]["ratio"] == pytest.approx(rows[1]["median_s"] / rows[0]["median_s"], rel=1e-3)
    assert rows[0]["versions"]["torch"] == torch.__version__
    with (tmp_path / "kl.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 8
    assert table[0]["shape"] == "n=4,kind=plain"
    printed = capsys.readouterr()
    assert "absent: skipped, it is not installed" in printed.err
    assert "other" in printed.out


def test_refcheck_times_and_writes_nothing(case, tmp_path):
    assert driver(tmp_path, "--refcheck") == 0
    assert not list(tmp_path.iterdir())


def test_a_named_provider_is_its_own_base(case, tmp_path, capsys):
    assert driver(tmp_path, "--provider", "other", "--shape", "n=2") == 0
    assert "base" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "n=two"], "--shape: n must be a whole number from 1, got 'two'"),
        (["--shape", "n=0"], "--shape: n must be a whole number from 1, got '0'"),
        (["--shape", "m=2"], "--shape: expected parts of 'n=4,kind=plain', got 'm=2'"),
        (["--provider", "nobody"], "expected one of base, other, absent, tardy; got 'nobody'"),
        (["--provider"], "argument --provider: expected at least one argument"),
        (["--provider", "absent"], "absent cannot run here: it is not installed"),
        (["--shape", "kind=wrong"], "other: output 'x' is wrong at [0]: expected 1, got 2"),
        (["--dtype", "bfloat16"], "--dtype: case kl takes float32, float64; got bfloat16"),
        (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["--seconds", "soon"], "--seconds: invalid float value: 'soon'"),
        (["--json", "/no/such/folder/h.json"], "--json: no such folder: /no/such/folder"),
        (["--speed"], "unrecognized arguments: --speed"),
    ],
)
def test_bad_arguments_and_wrong_results_end_in_one_line(
    case, tmp_path, capsys, arguments, message
):
    assert driver(tmp_path, *arguments) == 1
    printed = capsys.readouterr().err.strip().splitlines()
    assert printed[-1].startswith("benchmarks.run: error: ")
    assert message in printed[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], f"CASE must be one of {', '.join(run.CASES)}"),
        (["haed"], f"case must be one of {', '.join(run.CASES)}; got 'haed'"),
    ],
)
def test_a_bad_case_is_one_line(capsys, arguments, message):
    assert run.main(arguments) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("benchmarks.run: error: ") and message in line


def test_a_case_without_a_legend_does_not_start(case, tmp_path, capsys):
    del sys.modules["benchmarks.kl"].LEGEND
    assert driver(tmp_path) == 1
    assert "error: benchmarks/kl.py must define LEGEND" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_every_case_is_complete_and_in_the_readme(capsys):
    """`make bench` runs the cases that --names prints."""
    assert run.main(["--names"]) == 0
    assert capsys.readouterr().out.split() == list(run.CASES)
    readme = (harness.ROOT / "benchmarks/README.md").read_text()
    assert all(map(run.load_case, run.CASES))
    assert sorted(re.findall(r"^\| `(\w+)` \|", readme, re.M)) == sorted(run.CASES)


def test_cases_and_providers_are_listed(case, capsys):
    assert run.main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert "kl     A fake.\n       --shape n=4,kind=plain\n       --shape n=8" in printed
    assert all(f"\n{name}" in f"\n{printed}" for name in run.CASES)
    assert run.main(["kl", "--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "base",
        "other",
        "absent: cannot run here, it is not installed",
        "tardy: runs only when named",
    ]


def test_a_slow_provider_runs_only_when_named(case, tmp_path, capsys):
    assert driver(tmp_path, "--shape", "n=4") == 0
    printed = capsys.readouterr()
    assert "tardy: slow, runs only with --provider tardy" in printed.err
    assert "tardy" not in printed.out
    assert driver(tmp_path, "--shape", "n=4", "--provider", "tardy") == 0
    assert "tardy" in capsys.readouterr().out


def test_the_bar_adds_the_shapes_to_come(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(run.time, "monotonic", lambda: now[0])
    bar = run.Bar(3)
    bar.next_shape()
    now[0] = 10.0
    assert math.isnan(bar.left(math.nan))  # nothing is known before every provider ran once
    assert bar.left(20.0) == 20.0 + 2 * 30.0
    now[0] = 30.0
    bar.next_shape()
    now[0] = 40.0
    assert bar.left(math.nan) == 20.0 + 30.0  # the first shape took 30 s
    assert bar.left(5.0) == 5.0 + 30.0


def test_the_bar_is_drawn_on_a_terminal_only(case, tmp_path, capsys, monkeypatch):
    assert driver(tmp_path) == 0
    assert "\r" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert driver(tmp_path) == 0
    printed = capsys.readouterr().err
    assert "shape 2 of 2: round 1, other" in printed
    assert "0:00 left" in printed


def test_cuda_without_a_gpu_is_an_error(case, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert driver(tmp_path, "--device", "cuda") == 1
    assert "--device: this torch sees no CUDA device" in capsys.readouterr().err


def test_a_csv_with_other_columns_is_not_appended_to(case, tmp_path, capsys):
    (tmp_path / "kl.csv").write_text("a,b\n1,2\n")
    assert driver(tmp_path) == 1
    assert "kl.csv:1: expected the columns case,provider" in capsys.readouterr().err
    assert (tmp_path / "kl.csv").read_text() == "a,b\n1,2\n"
