"""Writes docs/performance.md, weighing teachers against plain SFT: `python -m benchmarks.cost`.

The measured part comes from benchmarks/results, the computed part from the formulas below.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.draw import FAINT, read_runs, run_table, style
from benchmarks.harness import ROOT
from benchmarks.run import RESULTS


@dataclass(frozen=True)
class Model:
    """Sizes of a student: parameters outside of the embeddings, width, layers, vocabulary."""

    name: str
    body: float
    width: int
    layers: int
    vocabulary: int


@dataclass(frozen=True)
class Work:
    """What one question asks for, in tokens.

    Attributes:
        prompt: Q, tokens of the question.
        rationale: T, tokens of a rationale.
        steps: S, reasoning steps of a rationale.
        leaf: A, tokens of an answer leaf (cue and gold answer).
        gold: m, tokens of the gold answer.
    """

    prompt: int = 80
    rationale: int = 80
    steps: int = 4
    leaf: int = 7
    gold: int = 2


MODELS = (
    Model("SmolLM2-135M", 106e6, 576, 30, 49152),
    Model("Qwen2.5-0.5B", 358e6, 896, 24, 151936),
    Model("Qwen2.5-1.5B", 1.31e9, 1536, 28, 151936),
    Model("Qwen2.5-3B", 2.77e9, 2048, 36, 151936),
    Model("Qwen2.5-7B", 6.53e9, 3584, 28, 152064),
)
TEACHERS = (1, 2, 3, 4, 5, 6, 7, 8)
MB = 1e6


def _attention(model: Model, queries: int, keys: int, passes: int) -> float:
    """Scores and values: 4 x width x queries x keys a layer, forward; twice that backward."""
    return 4.0 * model.layers * model.width * queries * keys * passes


def sft_flops(model: Model, work: Work, teachers: int) -> float:
    """Forward and backward of K rows of Q + T tokens, LoRA: the head runs on every row."""
    length = work.prompt + work.rationale
    tokens = teachers * length
    body = 4 * model.body * tokens + teachers * _attention(model, length, length, 3)
    return body + 4 * model.width * model.vocabulary * tokens


def compact_flops(model: Model, work: Work, teachers: int, probes: bool) -> float:
    """The same on one tree of Q + K T tokens; the head runs on completions only.

    With probes, 1 + K S answer leaves of A tokens run forward, and the head on their gold tokens.
    """
    tokens = work.prompt + teachers * work.rationale
    flops = 4 * model.body * tokens + _attention(model, tokens, tokens, 3)
    flops += 4 * model.width * model.vocabulary * teachers * work.rationale
    if probes:
        leaves = 1 + teachers * work.steps
        flops += 2 * model.body * leaves * work.leaf
        flops += _attention(model, leaves * work.leaf, tokens + leaves * work.leaf, 1)
        flops += 2 * model.width * model.vocabulary * leaves * work.gold
    return flops


def sft_head_bytes(model: Model, work: Work, teachers: int) -> float:
    """Logits, log-softmax and gradient in float32 over every row: 12 bytes an entry."""
    return 12.0 * teachers * (work.prompt + work.rationale) * model.vocabulary


def compact_head_bytes(model: Model, work: Work, teachers: int) -> float:
    """The unit gradient of every completion token in float32, and blocks of 512 logits."""
    return 4.0 * teachers * work.rationale * (model.width + 512)


def computed_table(work: Work, teachers: int) -> str:
    """Returns a Markdown table over MODELS for K teachers."""
    lines = [
        "| student | SFT, TFLOP | compact / SFT | with leaves / SFT | head memory SFT | compact |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for model in MODELS:
        sft = sft_flops(model, work, teachers)
        plain, probed = (compact_flops(model, work, teachers, p) / sft for p in (False, True))
        theirs = sft_head_bytes(model, work, teachers) / MB
        ours = compact_head_bytes(model, work, teachers) / MB
        lines.append(
            f"| {model.name} | {sft / 1e12:.2f} | {plain:.2f} | {probed:.2f} "
            f"| {theirs:,.0f} MB | {ours:.1f} MB |"
        )
    return "\n".join(lines)


def teachers_table(model: Model, work: Work) -> str:
    """Returns a Markdown table over K for one student."""
    lines = ["| K | compact / SFT | with answer leaves / SFT |", "|--:|--:|--:|"]
    for k in TEACHERS:
        sft = sft_flops(model, work, k)
        plain, probed = (compact_flops(model, work, k, p) / sft for p in (False, True))
        lines.append(f"| {k} | {plain:.2f} | {probed:.2f} |")
    return "\n".join(lines)


def draw(work: Work, path: Path) -> None:
    """Draws computed work over SFT's for K = 1..8, without and with answer leaves."""
    shades = ["#9ccfe3", "#62b0d1", "#2f8fb8", "#0b6e99", "#0a4a66"]
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.4), sharey=True, layout="constrained")
    for ax, probes in zip(axes, (False, True), strict=True):
        for model, colour in zip(MODELS, shades, strict=True):
            ratio = [
                compact_flops(model, work, k, probes) / sft_flops(model, work, k) for k in TEACHERS
            ]
            ax.plot(TEACHERS, ratio, marker="o", markersize=3, color=colour, label=model.name)
        ax.axhline(1, color="#888888", linewidth=1)
        ax.set_ylim(0, 1.4)
        ax.grid(axis="y", color=FAINT)
        ax.set_xlabel("teachers K", fontsize=8)
        leaves = "an answer leaf after every step" if probes else "no answer leaves"
        style(ax, f"computed work / plain SFT, {leaves}")
    axes[0].legend(frameon=False, fontsize=8, loc="lower left")
    figure.savefig(path, dpi=130)
    plt.close(figure)


PAGE = """# What does weighing teachers cost over plain SFT?

Written by `python -m benchmarks.cost`; do not edit. Plain SFT means: each of the K rationales is
a padded row of its own, the loss is transformers', and LoRA trains the student. COMPACT reads the
question once for all K rationales, and its head runs on completion tokens only: that is what pays
for the weights. The longer the question, the more it saves; with one teacher it saves the head's
work on the prompt and no more.

## Measured

{measured}

## Computed, not measured

Assumed sizes: Q = {w.prompt} tokens of question, T = {w.rationale} of a rationale (all of equal
length), S = {w.steps} steps, A = {w.leaf} tokens of an answer leaf of which m = {w.gold} are gold;
N parameters outside of the embeddings, width H, n layers, vocabulary V. Attention takes a(q, k) =
4 n H q k forward and twice that backward.

- SFT: K (Q + T) (4 N + 4 H V) + 3 K a(Q + T, Q + T)
- COMPACT: 4 N (Q + K T) + 4 H V K T + 3 a(Q + K T, Q + K T): a dense mask computes every pair
- answer leaves, L = 1 + K S: + 2 N L A + a(L A, Q + K T + L A) + 2 H V L m, forward only
- head memory of SFT: 12 K (Q + T) V bytes (logits, log-softmax, gradient in float32); of COMPACT:
  4 K T (H + 512) bytes (unit gradients, and the block of logits in cache)

4 N is forward and the gradient of activations (LoRA: no gradient of the frozen weights). Work in
operations is not time: kernels differ in how near they come to the machine's peak, and packing,
metrics and Python are not in it. Activations of the body grow with the tokens, hence in the ratio
(Q + K T) / (K (Q + T)), and are not in the table.

K = 4:

{students}

{model.name}, K = 1 to 8:

{teachers}

![Computed work over plain SFT for K = 1 to 8](results/cost.png)
"""


def main() -> int:
    """Writes page and picture."""
    work = Work()
    runs = read_runs(RESULTS)
    shown = [run_table(one) for one in runs if one.case in ("step", "scale")]
    measured = "\n\n".join(shown) if shown else (
        "No quiet run of `step` and `scale` is in `benchmarks/results` yet: "
        "`python -m benchmarks.run step`, `python -m benchmarks.run scale`, then this script."
    )  # fmt: skip
    folder = ROOT / "docs/results"
    folder.mkdir(parents=True, exist_ok=True)
    draw(work, folder / "cost.png")
    page = PAGE.format(
        measured=measured,
        w=work,
        model=MODELS[0],
        students=computed_table(work, 4),
        teachers=teachers_table(MODELS[0], work),
    )
    (ROOT / "docs/performance.md").write_text(page)
    print("wrote docs/performance.md and docs/results/cost.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
