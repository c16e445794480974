"""Writes docs/performance.md, weighing teachers against plain SFT: `python -m benchmarks.cost`.

Measured figures are those of the cases `scale`, `long` and `host` in benchmarks/results. Computed
figures come from formulas in operations and bytes. The rates of the formulas are fitted to the
smallest student; measurements of larger students show the error of the formulas.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from benchmarks import run
from benchmarks.cost_model import (
    BLOCK,
    LORA_RANK,
    MEASURED_TEACHERS,
    PROVIDERS,
    TEACHERS,
    Results,
    Work,
    flops,
    load,
    size_in,
)
from benchmarks.draw import FAINT, INK, style
from benchmarks.harness import ROOT
from benchmarks.scale import CUE, GOLD, STEP
from benchmarks.students import SIZES

COLOURS = {"compact": "#0b6e99", "compact-probes": "#c2742c"}
LABELS = {
    "compact": "weighing, no answer leaves",
    "compact-probes": "weighing by `robust`, with leaves",
}


def both(measured: float | None, computed: float) -> str:
    """Returns a cell: "0.43 (0.45)" for measured (computed), "(0.45)" for computed alone."""
    return f"({computed:.2f})" if measured is None else f"**{measured:.2f}** ({computed:.2f})"


def cells(results: Results, work: Work) -> str:
    """Returns the four ratios of one step."""
    return " | ".join(
        both(results.measured(work, provider, field), results.computed(work, provider, field))
        for field in ("median_s", "peak_mb")
        for provider in ("compact", "compact-probes")
    )


HEADER = (
    "time | time, leaves | memory | memory, leaves |\n"
    "|---|--:|--:|--:|--:|"
)  # fmt: skip


def teachers_table(results: Results) -> str:
    """Returns a Markdown table over K for the smallest student."""
    base = SIZES[0]
    rows = [
        f"| {k} | {cells(results, Work(base, base.vocabulary, teachers=k))} |" for k in TEACHERS
    ]
    return "\n".join([f"| K | {HEADER}", *rows])


def students_table(results: Results) -> str:
    """Returns a Markdown table over students at K = 4, with the operations themselves."""
    lines = [
        "| student | N | V | operations of SFT | operations | operations, leaves | "
        + HEADER.replace("|---|--:|", "|---|--:|--:|--:|--:|--:|--:|")
    ]
    for one in SIZES:
        work = Work(one, one.vocabulary)
        whole = flops(work, "sft")
        lines.append(
            f"| {one.name} | {one.body / 1e6:,.0f} M | {one.vocabulary:,} | {whole / 1e12:.2f} T "
            f"| {flops(work, 'compact') / whole:.2f} | {flops(work, 'compact-probes') / whole:.2f} "
            f"| {cells(results, work)} |"
        )
    return "\n".join(lines)


def rest_table(results: Results) -> str:
    """Returns a Markdown table of the other measurements, which change one size at a time."""
    base = Work(SIZES[0], SIZES[0].vocabulary)
    lines = [f"| K = 4, {SIZES[0].name}, but | {HEADER}"]
    names = {"prompt": "Q", "rationale": "T", "vocabulary": "V", "problems": "P"}
    for work in results.runs:
        changed = [f"{s} = {getattr(work, n):,}" for n, s in names.items()
                   if getattr(work, n) != getattr(base, n)]  # fmt: skip
        if work.student == base.student and work.teachers == base.teachers and changed:
            lines.append(f"| {', '.join(changed)} | {cells(results, work)} |")
    return "\n".join(lines)


def seconds_table(results: Results) -> str:
    """Returns the measured seconds and MB themselves, over K."""
    base = SIZES[0]
    lines = ["| K | plain SFT | no leaves | leaves |", "|---|--:|--:|--:|"]
    for k in MEASURED_TEACHERS:
        one = results.runs.get(Work(base, base.vocabulary, teachers=k))
        if one is not None:
            shown = [
                f"{one.figure(p, 'median_s'):.2f} s, {one.figure(p, 'peak_mb'):,.0f} MB"
                for p in PROVIDERS
            ]
            lines.append(f"| {k} | {' | '.join(shown)} |")
    return "\n".join(lines)


LONG = """## Long rationales

One problem with four rationales and gradient checkpointing: time and peak memory of a step, and the
ratios to plain SFT. A tiny student (two layers of width 128) and rationales of equal length are the
hardest case: nothing is padded, and the question is a small part. The real problem is one of
longcot_gsm8k, with SmolLM2-135M. Compare the seconds of one machine only
([plot and details](results/benchmarks.md)).

{table}

"""
HOST = """## What a step costs besides body and head

That is taking the batch, collating, scores, weights, clipping, the optimizer, records and log
lines. The table has its CPU time in a step with answer leaves, beside transformers' Trainer on the
same rationales (medians of all runs of a commit; P = {P} problems in the only micro-batch, K = {K},
a tiny student; {where}; other machines: [benchmarks](results/benchmarks.md)).

| trained | transformers' Trainer | ours | ratio | over all runs |
|---|--:|--:|--:|--:|
{table}

"""


def long_part(results: Results) -> str:
    """Returns the page's section on long rationales, empty if there are no measurements."""
    if not results.long:
        return ""
    lines = [
        "| tokens of the problem | plain SFT | no leaves | leaves | time | time, leaves | memory "
        "| memory, leaves | measured on |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for one in results.long:
        what = f"{int(size_in(one, 'L')):,}"
        what = what if size_in(one, "data") == "synthetic" else f"real, at most {what}"
        shown = [
            f"{one.figure(p, 'median_s'):.3g} s, {one.figure(p, 'peak_mb'):,.0f} MB"
            for p in PROVIDERS
        ]
        shown += [
            f"**{one.figure(p, field) / one.figure('sft', field):.2f}**"
            for field in ("median_s", "peak_mb")
            for p in PROVIDERS[1:]
        ]
        lines.append(f"| {what} | {' | '.join(shown)} | {one.where} |")
    return LONG.format(table="\n".join(lines))


def host_part(results: Results) -> str:
    """Returns the page's section on host time, empty if there are no measurements."""
    if not results.host:
        return ""
    one, lines = results.host[-1], []
    for kind, name in {"whole": "the whole student", "lora": "LoRA on every linear layer"}.items():
        runs = [r for r in results.host if size_in(r, "student") == kind]
        if not runs:
            continue
        ours, theirs = ([r.figure(p, "median_s") for r in runs] for p in ("compact", "trainer"))
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}" if len(runs) > 1 else "one run"
        lines.append(
            f"| {name} | {1e3 * median(theirs):.1f} ms | {1e3 * median(ours):.1f} ms "
            f"| **{median(ratios):.2f}** | {spread} |"
        )
    return HOST.format(
        table="\n".join(lines), P=size_in(one, "P"), K=size_in(one, "K"), where=one.where
    )


def panel(ax: Axes, results: Results, works: Sequence[Work], labels: Sequence[str], field: str
          ) -> None:  # fmt: skip
    """Draws computed ratios as lines and measured ones as dots."""
    at = range(len(works))
    for provider, colour in COLOURS.items():
        line = [results.computed(w, provider, field) for w in works]
        ax.plot(at, line, color=colour, linewidth=1.2, linestyle="--", alpha=0.8)
        dots = [(i, m) for i, w in enumerate(works)
                if (m := results.measured(w, provider, field)) is not None]  # fmt: skip
        if dots:
            ax.plot(
                *zip(*dots, strict=True), "o", color=colour, markersize=7, label=LABELS[provider]
            )
    ax.axhline(1, color="#888888", linewidth=1)
    ax.text(len(works) - 1, 1.01, "plain SFT", fontsize=8, color="#666666", ha="right")
    ax.set_xticks(at, labels, fontsize=8)
    ax.set_ylim(0, 1.25)
    ax.grid(axis="y", color=FAINT)
    ax.set_axisbelow(True)


def draw(results: Results, path: Path) -> None:
    """Draws time and memory over plain SFT, over teachers (left) and students (right)."""
    base = SIZES[0]
    over_k = [Work(base, base.vocabulary, teachers=k) for k in TEACHERS]
    over_size = [Work(one, one.vocabulary) for one in SIZES]
    names = [one.name.replace("-", "-\n") for one in SIZES]
    figure, axes = plt.subplots(2, 2, figsize=(9.6, 6.2), sharey=True, layout="constrained")
    for row, (field, what) in enumerate((("median_s", "time"), ("peak_mb", "extra memory"))):
        panel(axes[row][0], results, over_k, [str(k) for k in TEACHERS], field)
        panel(axes[row][1], results, over_size, names, field)
        style(axes[row][0], f"{what} of a step / plain SFT, over teachers K ({base.name})")
        style(axes[row][1], f"{what} of a step / plain SFT, over students (K = 4)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    handles.append(plt.Line2D([], [], color=INK, linestyle="--", linewidth=1.2))
    handles.append(plt.Line2D([], [], color=INK, marker="o", linestyle="", markersize=7))
    labels += ["computed", "measured"]
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


PAGE = """# What does weighing teachers cost over plain SFT?

![Time and memory of a step over plain SFT, over teachers and students](results/cost.png)

**{answer}**

{machines}Plain SFT means: each of the K rationales is a padded row of its own, the loss is
transformers', and LoRA of rank {rank} trains the student; TRL's trainer takes longer ([case
`step`](results/benchmarks.md)). COMPACT reads the question once for all K
rationales and runs the head on completion tokens only, without ever holding their logits. This
saves more time than the weights cost, except with leaves on very long rationales of equal length.
With one teacher there is nothing to share and nothing to weigh. The longer the question, the more
is saved. "Leaves": after every step the student is asked how likely the gold answer is, as the
default preset `robust` wants it; without, any policy that does not ask.

Written by `python -m benchmarks.cost` from `benchmarks/results`; do not edit.

## Over teachers

Ratios to plain SFT: **measured** (computed). One question of Q = {w.prompt} tokens, rationales of
T = {w.rationale} tokens with a step every {step} tokens, {w.student.name}, float32, {machine}
({when}).

{teachers}

The measured figures themselves, time and peak memory above the model's own:

{seconds}

## Over students, K = 4

Ratios to plain SFT: **measured** (computed). The columns of operations are counted, the same on any
machine. The computed times are this CPU's: rates fitted on {w.student.name}, carried over to the
larger students. Students up to 0.5B were measured with random weights of the published sizes, which
cost the same. On a GPU nothing has been measured ([why](trainer.md#on-a-gpu)).

{students}

## What else changes it

P problems in a micro-batch; in all other rows and tables P = {w.problems}.

{rest}

{long}{host}Which operator does what in one pass: [operators](operators.md#what-is-fused-with-what).

## How it is computed

N weights in the layers' matrices, H width, F inner width, n layers, V vocabulary; attention costs
a(q, k) = 4 n H q k operations forward and twice that backward; L = 1 + K S answer leaves of
A = {fed} tokens, m = {gold} of them predicted.

- operations of SFT: K (Q + T) (4 N + 4 H V) + 3 K a(Q + T, Q + T)
- of COMPACT: 4 N (Q + K T) + 4 H V K T + 3 a(Q, Q) + 3 K a(T, Q + T)
- of the leaves: + 2 N L A + a(L A, Q + K T + L A) + 2 H V L m, forward only
- seconds = s_body x operations of the body
  + (s_logit + 4 (H - {w.student.width}) s_product) x logits
- bytes = kept x 4 n (10 H + 4 F) x tokens + gradients of LoRA + for SFT b x logits, for COMPACT
  4 K T (H + {block})

4 N is forward and the gradient of activations: LoRA needs no gradient of the frozen weights. Fitted
on the {fitted} shapes of {w.student.name}:

{rates}

How far off are computed ratios? On those shapes, time {t_in}, memory {m_in}. On the students that
took no part in the fit ({held}):
time {t_out}, memory {m_out} (mean, and worst in brackets).

`python -m benchmarks.run scale` repeats every measurement; `--shape K=4,T=512` asks for your own.
"""


def answer(results: Results) -> str:
    """Returns the short answer."""
    base = SIZES[0]

    def at(k: int, provider: str, field: str) -> str:
        work = Work(base, base.vocabulary, teachers=k)
        found = results.measured(work, provider, field)
        return f"{results.computed(work, provider, field) if found is None else found:.2f}"

    time, memory, leaves = "median_s", "peak_mb", "compact-probes"
    return (
        f"With K = 4 teachers a step takes {at(4, 'compact', time)} of plain SFT's time, and "
        f"{at(4, leaves, time)} with an answer leaf after every reasoning step. Its extra memory "
        f"is {at(4, 'compact', memory)} of plain SFT's, with leaves {at(4, leaves, memory)}. With "
        f"one teacher the time is {at(1, 'compact', time)}, with leaves {at(1, leaves, time)}. "
        f"(Measured with {base.name} on {results.machine}; larger students and how they were "
        "computed: below.)"
    )


def machines(results: Results) -> str:
    """Returns how a step with four teachers differs by machine; "" if none was measured."""
    if not results.steps:
        return ""
    found = {
        name: [one.figure(name, "ratio") for one in results.steps]
        for name in ("compact", "compact-probes")
    }
    without, leaves = (f"{min(r):.2f} to {max(r):.2f}" for r in found.values())
    return (
        f"Machines differ: on {len(results.steps)} of them, one real question with four rationales "
        f"took {without} of plain SFT's time, {leaves} with leaves ([case `step`]"
        "(results/benchmarks.md)).\n\n"
    )


def spread(errors: Sequence[float]) -> str:
    """Returns mean and worst of relative errors: "4% (11%)"."""
    return f"{np.mean(errors):.0%} ({max(errors):.0%})" if errors else "not measured"


def rates_table(results: Results) -> str:
    """Returns the fitted rates."""
    lines = [
        "| | 1 / s_body | s_logit | kept | b |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, title in zip(PROVIDERS, ("plain SFT", "no leaves", "leaves"), strict=True):
        r = results.rates[name]
        speed = f"{1 / r.body / 1e9:.0f} GFLOP/s" if r.body else "-"
        lines.append(
            f"| {title} | {speed} | {r.head * 1e9:.1f} ns | {r.kept:.2f} | {r.logit:.1f} bytes |"
        )
    product = 1 / results.rates["sft"].product / 1e9
    return "\n".join(
        [
            *lines,
            "",
            f"1 / s_product = {product:.0f} GFLOP/s (case `head`, products, whole buffers).",
        ]
    )


def page(results: Results) -> str:
    """Returns docs/performance.md."""
    held = sorted({w.student.name for w in results.runs} - {SIZES[0].name})
    return PAGE.format(
        answer=answer(results),
        machines=machines(results),
        rank=LORA_RANK,
        w=Work(SIZES[0], SIZES[0].vocabulary),
        step=STEP,
        machine=results.machine,
        when=results.when,
        teachers=teachers_table(results),
        seconds=seconds_table(results),
        students=students_table(results),
        rest=rest_table(results),
        long=long_part(results),
        host=host_part(results),
        fed=CUE + GOLD - 1,
        gold=GOLD,
        block=BLOCK,
        fitted=sum(w.student == SIZES[0] for w in results.runs),
        rates=rates_table(results),
        held=", ".join(held) or "none",
        t_in=spread(results.errors("median_s", fitted=True)),
        m_in=spread(results.errors("peak_mb", fitted=True)),
        t_out=spread(results.errors("median_s", fitted=False)),
        m_out=spread(results.errors("peak_mb", fitted=False)),
    )


def main() -> int:
    """Writes page and picture; returns 0, or 1 after one line of error."""
    try:
        results = load(run.RESULTS)
    except (ValueError, OSError) as error:
        print(f"benchmarks.cost: error: {error}", file=sys.stderr)
        return 1
    folder = ROOT / "docs/results"
    folder.mkdir(parents=True, exist_ok=True)
    draw(results, folder / "cost.png")
    (ROOT / "docs/performance.md").write_text(page(results))
    print("wrote docs/performance.md and docs/results/cost.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
