"""The gate fails only if a ratio is too large in every attempt; pages show the results."""

import csv
import dataclasses
import json
import math
import sys
import types

import pytest
import torch

from benchmarks import draw, gate, harness, run
from benchmarks.harness import Provider

SHAPE = "M=4,V=8"


def bound(what="time", over="theirs", limit=1.0, gated=1.1, claim="ours over theirs"):
    return gate.Bound(claim, "head", SHAPE, "ours", over, what, limit, None, gated, None)


def rows(ours, theirs, peaks=(10.0, 40.0)):
    return [
        {"provider": "ours", "median_s": ours, "peak_mb": peaks[0]},
        {"provider": "theirs", "median_s": theirs, "peak_mb": peaks[1]},
    ]


# --- gate -------------------------------------------------------------------------------------


def measured(*runs):
    """Returns a measure function that returns the given runs in turn, and a list of its calls."""
    left, calls = list(runs), []

    def measure(case, shape, wanted):
        calls.append((case, shape, wanted))
        return left.pop(0)

    return measure, calls


def test_figures_of_a_bound():
    run_rows = rows(2.0, 4.0)
    assert bound().figure(run_rows) == 0.5
    assert bound("memory").figure(run_rows) == 0.25
    assert bound("peak_mb", None).figure(run_rows) == 10.0
    assert bound("memory").figure(rows(1, 1, (3.0, 0.0))) == 3.0  # no division by nothing
    assert math.isnan(bound("memory").figure(rows(1, 1, (None, 4.0))))
    with pytest.raises(ValueError, match="ours over theirs: no figures of provider 'theirs'"):
        bound().figure(run_rows[:1])


def test_one_noisy_run_is_repeated_and_forgiven():
    measure, calls = measured(rows(2.0, 1.0), rows(1.0, 1.0))
    assert gate.judge([bound()], measure) == {bound(): 1.0}
    assert calls == [("head", SHAPE, ["ours", "theirs"])] * 2


def test_a_ratio_that_is_always_out_fails_with_its_best_figure():
    measure, calls = measured(rows(2.0, 1.0), rows(1.5, 1.0), rows(1.7, 1.0))
    assert gate.judge([bound()], measure, attempts=3) == {bound(): 1.5}
    assert len(calls) == 3


def test_only_what_failed_runs_again_and_ungated_claims_never_run():
    slow = bound(claim="slow", gated=None)
    memory = bound("peak_mb", None, 20, 20, "memory")
    measure, calls = measured(rows(2.0, 1.0), rows(1.0, 1.0))
    assert set(gate.judge([slow, bound(), memory], measure)) == {bound(), memory}
    assert [c[2] for c in calls] == [["ours", "theirs"], ["ours", "theirs"]]


def test_the_gate_may_run_a_smaller_shape():
    measure, calls = measured(rows(1.0, 1.0))
    gate.judge([dataclasses.replace(bound(), gate_shape="M=1,V=2")], measure)
    assert calls[0][:2] == ("head", "M=1,V=2")


@pytest.mark.parametrize(("seconds", "code"), [(0.5, 0), (1.09, 0), (1.11, 1), (3.0, 1)])
def test_a_planted_slow_provider_fails_the_gate(monkeypatch, tmp_path, capsys, seconds, code):
    """From providers to the exit status, with a clock that only the providers advance."""
    case, clock, want = types.ModuleType("benchmarks.head"), [0.0], {"x": torch.ones(2)}

    def lasting(duration):
        def call():
            clock[0] += duration
            return {"x": torch.ones(2)}

        return Provider(call, lambda: want)

    case.TITLE = case.LEGEND = "Fake"
    case.SHAPES = ({"M": 4, "V": 8},)
    case.providers = lambda args: {"ours": lasting(seconds), "theirs": lasting(1.0)}
    monkeypatch.setitem(sys.modules, "benchmarks.head", case)
    monkeypatch.setattr(harness.time, "perf_counter", lambda: clock[0])
    path = tmp_path / "bounds.json"
    path.write_text(json.dumps([dataclasses.asdict(bound())]))
    assert gate.main(["--bounds", str(path)]) == code
    printed = capsys.readouterr().out
    assert f"ours over theirs: {'FAILED' if code else 'ok'}" in printed
    assert printed.count("head M=4,V=8") == (3 if code else 1)  # a miss is measured three times


def test_a_provider_with_a_wrong_result_fails_the_gate(monkeypatch, tmp_path, capsys):
    case = types.ModuleType("benchmarks.head")
    case.TITLE = case.LEGEND = "Fake"
    case.SHAPES = ({"M": 4, "V": 8},)
    case.providers = lambda args: {
        name: Provider(lambda: {"x": torch.ones(2)}, lambda: {"x": torch.zeros(2)})
        for name in ("ours", "theirs")
    }
    monkeypatch.setitem(sys.modules, "benchmarks.head", case)
    path = tmp_path / "bounds.json"
    path.write_text(json.dumps([dataclasses.asdict(bound())]))
    assert gate.main(["--bounds", str(path)]) == 1
    assert "benchmarks.gate: error: ours: output 'x' is wrong" in capsys.readouterr().err


def test_memory_that_cannot_be_measured_does_not_fail():
    measure, _ = measured(rows(1.0, 1.0, (None, None)))
    assert math.isnan(gate.judge([bound("memory")], measure)[bound("memory")])


@pytest.mark.parametrize(("ours", "code"), [(1.0, 0), (1.2, 1)])
def test_the_command_says_what_failed(monkeypatch, tmp_path, capsys, ours, code):
    path = tmp_path / "bounds.json"
    path.write_text(json.dumps([bound().__dict__]))
    monkeypatch.setattr(
        run, "load_case", lambda name: type("Case", (), {"SHAPES": ({"M": 4, "V": 8},)})
    )
    monkeypatch.setattr(run, "run_case", lambda *a, **k: rows(ours, 1.0))
    monkeypatch.setattr(run, "print_rows", lambda rows: None)
    assert gate.main(["--bounds", str(path)]) == code
    assert f"ours over theirs: {'FAILED' if code else 'ok'}" in capsys.readouterr().out


def test_a_bad_bound_is_named():
    with pytest.raises(ValueError, match="what must be time, .* or seconds, got 'speed'"):
        bound("speed")
    with pytest.raises(ValueError, match="over must name a provider"):
        bound("time", None)
    with pytest.raises(ValueError, match="seconds depend on the machine"):
        bound("seconds", None)


def test_committed_bounds_are_complete_and_no_gate_is_tighter_than_what_was_measured():
    bounds = gate.load_bounds()
    assert len({b.claim for b in bounds}) == len(bounds)
    for b in bounds:
        sizes = run.parse_shape(b.shape, run.load_case(b.case).SHAPES[0])
        assert run.shape_text(sizes) == b.shape  # complete, and in the order of the results
        if b.gate_shape is not None:
            sizes = run.parse_shape(b.gate_shape, sizes)
            assert run.shape_text(sizes) == b.gate_shape
        assert b.gate is None or b.measured is None or b.gate > b.measured
    assert sum(b.gate is not None for b in bounds) >= 7


# --- draw -------------------------------------------------------------------------------------


def result(case, provider, shape, median, date="2026-01-02T00:00:00", ratio=1.0, **other):
    row = dict.fromkeys(run.FIELDS, "")
    row |= {"case": case, "provider": provider, "shape": shape, "dtype": "float32"}
    row |= {"device": "cpu", "median_s": median, "p20_s": median, "p80_s": median}
    row |= {"peak_mb": 5.0, "ratio": ratio, "machine": "box", "commit": "abc", "date": date}
    return row | {"versions": "torch=1"} | other


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()

    def write(*table):
        for row in table:
            path = folder / f"{row['case']}.csv"
            fresh = not path.exists()
            with path.open("a", newline="") as file:
                writer = csv.DictWriter(file, run.FIELDS)
                if fresh:
                    writer.writeheader()
                writer.writerow(row)
        return folder

    return write


def test_the_last_run_of_each_shape_counts(results):
    folder = results(
        result("head", "compact", "M=1", 1.0, "2026-01-01T00:00:00"),
        result("head", "torch", "M=1", 2.0, "2026-01-01T00:00:00"),
        result("head", "compact", "M=1", 3.0),
        result("head", "torch", "M=1", 4.0),
        result("head", "compact", "M=1", 9.0, "2026-01-03T00:00:00"),  # alone: compares nothing
        result("head", "compact", "M=2", 5.0),
        result("head", "torch", "M=2", 6.0),
    )
    found = draw.last_runs(draw.all_runs(folder))
    assert [(r.shape, r.figure("compact", "median_s")) for r in found] == [
        ("M=1", 3.0),
        ("M=2", 5.0),
    ]


def test_the_last_run_that_has_the_providers_counts(results):
    early = "2026-01-01T00:00:00"
    runs = draw.all_runs(
        results(
            *(result("head", name, "M=1", 1.0, early) for name in ("compact", "torch", "liger")),
            *(result("head", name, "M=1", 2.0) for name in ("compact", "torch")),
        )
    )
    assert [r.figure("compact", "median_s") for r in draw.last_runs(runs)] == [2.0]
    assert [r.figure("compact", "median_s") for r in draw.last_runs(runs, {"liger"})] == [1.0]
    assert draw.last_runs(runs, {"unheard"}) == []


def test_a_provider_of_earlier_runs_is_quoted_below_the_table(results):
    early = {"commit": "old", "date": "2026-01-01T00:00:00"}
    runs = draw.all_runs(
        results(
            *(result("step", name, "K=4", 2.0, **early) for name in ("sft", "compact")),
            result("step", "trl", "K=4", 2.28, ratio=1.14, **early),
            *(result("step", name, "K=4", 2.0) for name in ("sft", "compact")),
            # no quotations: another machine, and ratios to another provider
            *(result("step", name, "K=4", 2.0, machine="other") for name in ("sft", "compact")),
            *(result("head", name, "M=1", 2.0, **early) for name in ("stash", "compact", "torch")),
            *(result("head", name, "M=1", 2.0) for name in ("compact", "torch")),
        )
    )
    head, step, other = (draw.run_table(one, runs) for one in draw.last_runs(runs))
    assert "| trl |" not in step
    assert (
        "`trl` did not take part. In its last run on this machine (commit old, 2026-01-01) it took "
        "1.14 of the time of `sft`, and 5.0 MB.\n"
    ) in step
    assert "did not take part" not in other + head


def test_products_are_named_for_their_buffers(results):
    runs = draw.all_runs(results(*(result("head", n, "M=1", 1.0) for n in ("compact", "products"))))
    table = draw.run_table(runs[0], runs)
    assert "| products, whole buffers | 1 s |" in table


def test_the_bounds_table_says_met_missed_and_not_measured(results):
    folder = results(
        result("head", "ours", SHAPE, 3.0, ratio=1.0), result("head", "theirs", SHAPE, 4.0)
    )
    claims = [
        bound(limit=0.8, claim="fast"),
        bound(limit=0.7, claim="faster"),
        gate.Bound("elsewhere", "kl", "K=2", "ours", "theirs", "time", 1.0, 0.3, None, None),
    ]
    runs = draw.all_runs(folder)
    assert [b.measured for b in draw.judged(claims, runs)] == [0.75, 0.75, None]
    table = draw.bounds_table(claims, runs)
    assert "| claim | at most | box | |" in table
    assert "| fast | 0.8 | 0.75 | met |" in table
    assert "| faster | 0.7 | 0.75 | **not met** on box |" in table
    assert "| elsewhere | 1 | - | not measured |" in table


def test_a_bound_is_met_only_if_the_newest_commit_of_every_machine_meets_it(results):
    def run_of(machine, ours, date, other="theirs"):
        each = {"machine": machine, "date": date, "commit": f"of {date}"}
        return [
            result("head", "ours", SHAPE, ours, **each),
            result("head", other, SHAPE, 4, **each),
        ]

    folder = results(
        *run_of("slow", 3.8, "2026-01-03"),
        *run_of("quick", 3.9, "2026-01-01"),
        *run_of("quick", 2.0, "2026-01-04"),
        *run_of("slow", 1.0, "2026-01-05", other="else"),  # says nothing of the claim
        *run_of("third", 1.0, "2026-01-06", other="else"),
    )
    runs = draw.all_runs(folder)
    claims = [bound(limit=0.96, claim="easy"), bound(limit=0.9, claim="hard")]
    claims.append(bound(limit=0.4, claim="harder"))
    assert [b.measured for b in draw.judged(claims, runs)] == [0.95, 0.95, 0.95]
    assert draw.bounds_table(claims, runs).splitlines() == [
        "| claim | at most | quick | slow | |",
        "|---|--:|--:|--:|---|",
        "| easy | 0.96 | 0.5 | 0.95 | met |",
        "| hard | 0.9 | 0.5 | 0.95 | **not met** on slow |",
        "| harder | 0.4 | 0.5 | 0.95 | **not met** on quick; slow |",
    ]


def test_a_bound_is_judged_by_the_median_of_the_newest_commit(results):
    def run_of(ours, date, commit, other="theirs"):
        each = {"date": f"2026-01-0{date}", "commit": commit}
        return [
            result("head", "ours", SHAPE, ours, **each),
            result("head", other, SHAPE, 1.0, **each),
        ]

    folder = results(
        *run_of(9.0, 1, "old"),
        *run_of(0.5, 2, "new"),
        *run_of(0.7, 3, "new"),
        *run_of(2.0, 4, "new"),
        *run_of(9.0, 5, "newer", other="else"),  # says nothing of the claim
    )
    assert draw.figures(bound(), draw.all_runs(folder)) == {"box": 0.7}


def test_memory_that_was_not_measured_is_no_figure(results):
    runs = draw.all_runs(
        results(*(result("head", name, SHAPE, 1.0, peak_mb="") for name in ("ours", "theirs")))
    )
    assert [b.measured for b in draw.judged([bound("memory"), bound()], runs)] == [None, 1.0]


def test_the_command_writes_pictures_and_page(results, tmp_path):
    folder = results(
        result("head", "compact", "M=1", 0.0123),
        result("head", "torch", "M=1", 2.0, ratio=162.6, peak_mb=""),
        *(
            result("scale", name, shape, 1.0)
            for shape in ("K=1,T=8", "K=2,T=8", "K=4,T=8", "K=1,T=16")
            for name in ("compact", "sft")
        ),
    )
    claims = tmp_path / "bounds.json"
    claim = dataclasses.replace(bound(), provider="compact", over="torch", shape="M=1")
    claims.write_text(json.dumps([dataclasses.asdict(claim)]))
    command = ["--results", str(folder), "--docs", str(tmp_path / "d"), "--bounds", str(claims)]
    assert draw.main(command) == 0
    assert gate.load_bounds(claims) == [dataclasses.replace(claim, measured=0.00615)]
    page = (tmp_path / "d/benchmarks.md").read_text()
    assert draw.main(command) == 0
    assert (tmp_path / "d/benchmarks.md").read_text() == page
    assert "| **compact** | 12.3 ms | 12.3 ms to 12.3 ms | 1.00 | 5.0 MB |" in page
    assert "| torch | 2 s | 2 s to 2 s | 162.60 | - |" in page
    assert "`python -m benchmarks.run head --shape M=1`" in page
    assert "| K=4,T=8 | 1 s, 5.0 MB | 1.00 | 1.00 |" in page
    for picture in ("head.png", "scale.png"):
        assert (tmp_path / "d" / picture).read_bytes().startswith(b"\x89PNG")


def test_sizes_that_vary_alone_become_lines(results):
    shapes = ("K=1,T=8", "K=2,T=8", "K=1,T=16", "K=2,T=16")
    folder = results(
        *(result("scale", name, shape, 1.0) for shape in shapes for name in ("a", "b"))
    )
    lines = draw.varied(draw.all_runs(folder))
    assert {key: [value for value, _ in line] for key, line in lines.items()} == {
        "K": ["1", "2"],
        "T": ["8", "16"],
    }


def test_lines_and_tables_of_sizes_keep_machines_apart(results, tmp_path, monkeypatch):
    pairs = [("K=1", "box"), ("K=1", "other"), ("K=2", "other"), ("K=4", "other"), ("K=2", "box")]
    folder = results(
        *(
            result("scale", name, shape, 1.0, machine=machine)
            for shape, machine in pairs
            for name in ("sft", "compact")
        )
    )
    runs = draw.all_runs(folder)
    seen = []
    monkeypatch.setattr(draw, "varied", lambda some: seen.extend(some) or {})
    draw.draw_lines(runs, tmp_path / "scale.png")
    assert [(r.shape, r.machine) for r in seen] == [(f"K={k}", "other") for k in (1, 2, 4)]
    box, other = draw.scale_tables(runs)
    assert "| K=2 | 1 s" in box and "| K=4 |" not in box
    assert "float32 (box; commit abc, 2026-01-02)" in box
    assert "| K=4 | 1 s" in other and "float32 (other; commit abc, 2026-01-02)" in other


def test_the_committed_page_is_what_the_committed_results_give():
    runs = draw.all_runs(run.RESULTS)
    bounds = draw.judged(gate.load_bounds(), runs)
    pictures = [f"{case}.png" for case in run.CASES if any(one.case == case for one in runs)]
    page = (run.RESULTS.parents[1] / "docs/results/benchmarks.md").read_text()
    assert draw.document(bounds, runs, pictures) == page


def test_no_results_yet_is_said_in_one_line(tmp_path, capsys):
    assert draw.main(["--results", str(tmp_path)]) == 1
    assert "expected results of runs, got none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(12.345, "12.3 s"), (0.5, "500 ms"), (2e-5, "20 us"), (math.nan, "-"), (12345.6, "12346 s")],
)
def test_times_are_easy_to_read(seconds, text):
    assert draw.seconds_text(seconds) == text
