"""The cost page: its formulas count the work of a step, and its fit recovers known rates."""

import csv
import math

import pytest

from benchmarks import cost, cost_model, run, scale, students
from benchmarks.cost_model import Rates, Work

SMALL, LARGE = students.SIZES[0], students.SIZES[2]
TRUE = {
    "sft": Rates(7e-12, 2e-8, SMALL.width, 6e-12, 1.1, 14.0),
    "compact": Rates(6e-12, 1.4e-8, SMALL.width, 6e-12, 0.6, 0.0),
    "compact-probes": Rates(6.5e-12, 1.5e-8, SMALL.width, 6e-12, 0.7, 0.0),
}


@pytest.mark.parametrize(
    ("name", "millions"),  # parameters outside of the embeddings, as their makers state them
    [("Qwen2.5-0.5B", 360), ("Qwen2.5-1.5B", 1310), ("Qwen2.5-3B", 2770), ("Qwen2.5-7B", 6530)],
)
def test_sizes_give_the_published_parameters(name, millions):
    assert students.size(name).body / 1e6 == pytest.approx(millions, rel=0.01)


def test_an_unknown_student_is_named():
    with pytest.raises(ValueError, match="student must be one of SmolLM2-135M, .*got 'GPT-2'"):
        students.size("GPT-2")


def test_the_body_of_a_size_is_that_of_the_model_built_from_it():
    from transformers import LlamaForCausalLM

    tiny = students.Size("tiny", 64, 2, 4, 2, 96, 1000)
    model = LlamaForCausalLM(tiny.config(128))
    matrices = [p for n, p in model.model.layers.named_parameters() if p.ndim == 2]
    assert tiny.body == sum(p.numel() for p in matrices)


def test_operations_by_hand():
    one = students.Size("one", 8, 3, 2, 1, 16, 100)
    work = Work(one, 100, teachers=2, prompt=5, rationale=42, problems=1)
    assert (work.sft_tokens, work.tree_tokens, work.leaves) == (94, 89, 1 + 2 * 2)
    rows = 3 * 4 * 3 * 8 * 47 * 47  # forward and backward, three layers, one row
    assert cost_model.body_flops(work, "sft") == 4 * one.body * 94 + 2 * rows
    assert cost_model.logits(work, "sft") == 9400
    pairs = 5 * 5 + 2 * 42 * 47  # the question alone, then each rationale after it
    assert cost_model.body_flops(work, "compact") == 4 * one.body * 89 + 3 * 4 * 3 * 8 * pairs
    assert cost_model.logits(work, "compact") == 8400
    more = cost_model.body_flops(work, "compact-probes") - cost_model.body_flops(work, "compact")
    assert more == 2 * one.body * 25 + 4 * 3 * 8 * 25 * (89 + 25)
    assert cost_model.logits(work, "compact-probes") == 8400 + 100 * 5 * 2 / 2


def test_leaves_and_tokens_are_those_of_the_batch():
    from compact.passes.packing import build_batch

    shape = {"K": 3, "Q": 11, "T": 64, "V": 50}
    batch = build_batch(scale.synthetic(2, shape, 0), layout="tree", leaves=True, pad_token_id=2)
    work = Work(SMALL, 50, teachers=3, prompt=11, rationale=64, problems=2)
    assert batch.main.input_ids.numel() == work.tree_tokens
    assert len(batch.leaf_step) == 2 * work.leaves
    assert batch.leaves.input_ids.numel() == 2 * work.leaves * (scale.CUE + scale.GOLD - 1)
    assert len(batch.leaf_target) == 2 * work.leaves * scale.GOLD
    ids, mask, labels = students.padded_rows(scale.synthetic(2, shape, 0), scale.PAD)
    assert ids.numel() == work.sft_tokens and bool(mask.all())
    assert int((labels != -100).sum()) == len(batch.target)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Writes results that obey the formulas with the rates TRUE, one student beside the fit."""
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    rows = []

    def add(case, shape, provider, seconds, peak):
        row = dict.fromkeys(run.FIELDS, "")
        row |= {"case": case, "provider": provider, "shape": shape, "dtype": "float32"}
        row |= {"device": "cpu", "median_s": seconds, "p20_s": seconds, "p80_s": seconds}
        row |= {"peak_mb": peak, "ratio": 1, "machine": "box", "commit": "abc", "date": "2026"}
        rows.append(row | {"versions": "torch=1"})

    for shape in scale.SHAPES:
        text = run.shape_text(shape)
        work = Work.of(text)
        for name, rates in TRUE.items():
            add("scale", text, name, rates.seconds(work, name), rates.bytes(work, name) / 1e6)
    for provider in ("compact", "products"):
        add("head", "M=10,H=8,V=100,head=frozen,hidden=random", provider, 6e-12 * 4 * 8000, 1)
    for case in ("scale", "head"):
        with (tmp_path / f"{case}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, run.FIELDS)
            writer.writeheader()
            writer.writerows(r for r in rows if r["case"] == case)
    return tmp_path


def test_the_fit_finds_the_rates(results):
    found = cost_model.load(results)
    for name, rates in TRUE.items():
        for field in ("body", "head", "product", "kept", "logit"):
            got, want = getattr(found.rates[name], field), getattr(rates, field)
            assert got == pytest.approx(want, rel=1e-3, abs=1e-15), (name, field)
    assert max(found.errors("median_s", fitted=False)) < 1e-3
    assert max(found.errors("peak_mb", fitted=True)) < 1e-3


def test_errors_of_what_was_held_out_are_told(results, tmp_path):
    path = results / "scale.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if LARGE.name in row["shape"] and row["provider"] == "sft":
            row["median_s"] = float(row["median_s"]) / 1.25
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, run.FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    found = cost_model.load(results)
    assert max(found.errors("median_s", fitted=True)) < 1e-3
    assert max(found.errors("median_s", fitted=False)) == pytest.approx(0.2, rel=1e-3)
    assert "(20%)" in cost.page(found)


def test_the_page_marks_what_is_measured_and_what_is_computed(results, tmp_path):
    found = cost_model.load(results)
    text = cost.page(found)
    work = Work(SMALL, SMALL.vocabulary)
    four = f"{TRUE['compact'].seconds(work, 'compact') / TRUE['sft'].seconds(work, 'sft'):.2f}"
    assert f"With K = 4 teachers a step takes {four} of plain SFT's time" in text
    assert f"| 4 | **{four}** ({four}) |" in text
    (three,) = [line for line in text.splitlines() if line.startswith("| 3 |")]
    assert "**" not in three  # K = 3 is not measured
    (seven,) = [line for line in text.splitlines() if line.startswith("| Qwen2.5-7B |")]
    assert "**" not in seven
    assert "| T = 256 | **" in text
    cost.draw(found, tmp_path / "cost.png")
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_has_long_rationales_and_the_time_around_the_student(results):
    bare = cost.page(cost_model.load(results))
    assert "Long rationales" not in bare and "besides body and head" not in bare
    one = dict.fromkeys(run.FIELDS, "") | {"dtype": "float32", "device": "cpu", "ratio": 1}
    one |= {"machine": "box", "commit": "abc", "date": "2026-01-02", "versions": "torch=1"}
    figures = {
        ("long", "L=2048,data=synthetic"): {"sft": (4, 100), "compact": (3, 60)},
        ("long", "L=1024,data=synthetic"): {"sft": (2, 50), "compact": (1, 30)},
        ("host", "P=4,K=4,student=whole"): {"trainer": (0.01, 5), "compact": (0.014, 6)},
        ("host", "P=4,K=4,student=lora"): {"trainer": (0.02, 5), "compact": (0.026, 6)},
    }
    for (case, shape), providers in figures.items():
        rows = [
            one | {"case": case, "shape": shape, "provider": p, "median_s": s, "peak_mb": mb}
            for p, (s, mb) in providers.items()
        ]
        if case == "long":
            rows.append(rows[-1] | {"provider": "compact-probes", "median_s": 1.0})
        path = results / f"{case}.csv"
        fresh = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, run.FIELDS)
            if fresh:
                writer.writeheader()
            writer.writerows(rows)
    text = cost.page(cost_model.load(results))
    assert text.index("| 1,024 | 2 s, 50 MB |") < text.index("| 2,048 | 4 s, 100 MB |")
    assert "| **0.75** | **0.25** | **0.60** | **0.60** |" in text
    assert "| the whole student | 10.0 ms | 14.0 ms | **1.40** | one run |" in text
    assert "| LoRA on every linear layer | 20.0 ms | 26.0 ms | **1.30** | one run |" in text
    assert "P = 4 problems in the only micro-batch, K = 4" in text
    assert "box; commit abc, 2026-01-02; other machines: " in text
    for ours, date in ((0.02, "2026-01-03"), (0.016, "2026-01-04")):
        rows = [
            one | {"case": "host", "shape": "P=4,K=4,student=whole", "provider": provider}
            | {"median_s": seconds, "peak_mb": 5, "date": date}
            for provider, seconds in (("trainer", 0.01), ("compact", ours))
        ]  # fmt: skip
        with (results / "host.csv").open("a", newline="") as file:
            csv.DictWriter(file, run.FIELDS).writerows(rows)
    text = cost.page(cost_model.load(results))
    assert "| the whole student | 10.0 ms | 16.0 ms | **1.60** | 1.40 to 2.00 |" in text


def copy_with(path, count=None, **other):
    """Appends the first rows of a file of results again (default: all), with other values."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))[:count]
    with path.open("a", newline="") as file:
        csv.DictWriter(file, run.FIELDS).writerows(row | other for row in rows)


def test_every_long_row_says_where_it_was_measured(results):
    one = dict.fromkeys(run.FIELDS, "") | {"dtype": "float32", "device": "cpu", "ratio": 1}
    one |= {"case": "long", "shape": "L=2048,data=synthetic", "median_s": 1, "peak_mb": 1}
    with (results / "long.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, run.FIELDS)
        writer.writeheader()
        for machine, commit, date in (("a", "1a", "2026-01-02"), ("b", "2b", "2026-01-05")):
            for name in cost_model.PROVIDERS:
                where = {"machine": machine, "commit": commit, "date": date}
                writer.writerow(one | where | {"provider": name})
    lines = [x for x in cost.page(cost_model.load(results)).splitlines() if x[:8] == "| 2,048 "]
    assert [line.split(" | ")[-1] for line in lines] == [
        "a; commit 1a, 2026-01-02 |",
        "b; commit 2b, 2026-01-05 |",
    ]


def test_the_figures_over_teachers_are_of_one_machine_and_commit(results):
    before = cost_model.load(results)
    two_shapes = 2 * len(TRUE)
    copy_with(results / "scale.csv", two_shapes, machine="other", median_s=99, date="2027")
    copy_with(results / "scale.csv", two_shapes, commit="later", median_s=99, date="2027")
    copy_with(results / "head.csv", machine="other", median_s=99, date="2027")
    after = cost_model.load(results)
    assert after.rates == before.rates and after.runs == before.runs
    assert (after.machine, after.when) == ("box", "commit abc, 2026")
    copy_with(results / "scale.csv", machine="third", date="2028")  # as many shapes, but later
    with pytest.raises(ValueError, match="`... head` first, on one machine"):
        cost_model.load(results)
    copy_with(results / "head.csv", machine="third")
    assert cost_model.load(results).machine == "third"


def test_without_measurements_there_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    assert cost.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmarks.cost: error: ") and "run `python -m benchmarks.run" in line


def test_a_factor_below_zero_is_left_out():
    import numpy as np

    grows, shrinks = np.array([1.0, 2.0, 4.0]), np.array([4.0, 3.0, 1.0])
    factors = cost_model._least_squares([grows, shrinks], 3.0 * grows - 0.1 * shrinks)
    assert factors[1] == 0.0 and math.isclose(factors[0], 2.8, rel_tol=0.1)


def test_the_committed_page_is_what_the_committed_results_give():
    page = (run.RESULTS.parents[1] / "docs/performance.md").read_text()
    assert cost.page(cost_model.load(run.RESULTS)) == page
