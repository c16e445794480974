"""Does filter_eps change how a student learns? `python -m benchmarks.trajectory [ARM ...]`.

SmolLM2-135M with LoRA learns from SVAMP rationales, one problem per step with equal weights: once
exactly and once per arm. The effect of an arm on the losses is compared with the effect of
rounding: the same run from an initial state that differs in the last bit, and the same run in
bfloat16. benchmarks/results/trajectory.json keeps earlier runs (by arm); the table is written to
docs/results/filter.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from statistics import mean

import torch

from benchmarks.harness import ROOT, commit, machine
from benchmarks.real import CORPUS, problems
from benchmarks.step import student
from compact.passes.encode import encode_problem
from compact.passes.forward import run_pass
from compact.passes.packing import build_batch

STEPS, HELD_OUT, TEACHERS = 24, 6, 2
LEARNING_RATE, WARM_UP = 1e-3, 5  # the rate of recipes/svamp.yaml
SEED = 0
ARMS = {
    "exact": "filter_eps = 0",
    "filter": "filter_eps = 2^-12",
    "last-bit": "filter_eps = 0, every LoRA weight times 1 + 1e-7 x noise before the first step",
    "bfloat16": "filter_eps = 0, autocast to bfloat16, as the recipe trains",
}
RUNS = ROOT / "benchmarks/results/trajectory.json"
TABLE = ROOT / "docs/results/filter.md"


def train(arm: str) -> dict[str, object]:
    """Trains one arm; returns its loss of each step and on held-out problems."""
    taken, tokenizer = student(SEED)
    given = [
        encode_problem(p, tokenizer, max_length=512) for p in problems(STEPS + HELD_OUT, TEACHERS)
    ]
    leaves = [p for p in taken.model.parameters() if p.requires_grad]
    if arm == "last-bit":
        noise = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for leaf in leaves:
                leaf.mul_(1 + 1e-7 * torch.randn(leaf.shape, generator=noise))
    optimizer = torch.optim.AdamW(leaves, lr=LEARNING_RATE, weight_decay=0.0)
    warm_up = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARM_UP)
    )
    eps = 2.0**-12 if arm == "filter" else 0.0
    found: dict[str, list[float]] = {"losses": [], "held_out": []}
    for step, problem in enumerate(given):
        batch = build_batch(
            [problem], layout="tree", leaves=False, pad_token_id=tokenizer.pad_token_id
        )
        half = torch.autocast("cpu", torch.bfloat16)
        learns = step < STEPS
        with (
            half if arm == "bfloat16" else contextlib.nullcontext(),
            torch.set_grad_enabled(learns),
        ):
            loss = run_pass(taken, batch, filter_eps=eps)[0].nll.mean()
        found["losses" if learns else "held_out"].append(float(loss.detach()))
        if learns:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            warm_up.step()
    made = {"commit": commit(), "machine": machine(torch.device("cpu"))}
    return found | made


def moved(run: dict, exact: dict) -> float:
    """Mean distance of the losses of a run's steps from those of the exact run."""
    return mean(abs(a - b) for a, b in zip(run["losses"], exact["losses"], strict=True))


def table(runs: dict[str, dict]) -> str:
    """Returns a Markdown table of what each arm changes."""
    exact = runs["exact"]
    lines = [
        "# Training with filter_eps = 2^-12",
        "",
        f"SmolLM2-135M, LoRA r 16 on every projection, AdamW {LEARNING_RATE:g}, {STEPS} steps of "
        f"one problem with {TEACHERS} rationales of {CORPUS}, equal weights, seed {SEED}; then "
        f"{HELD_OUT} problems that were not trained on. Mean loss (nats a token) of steps 1-8, the "
        "last 8 steps and the held-out problems, and the distance of each step's loss from the "
        "exact run's.",
        "",
        "| run | first 8 | last 8 | held out | mean distance | largest distance |",
        "|---|---|---|---|---|---|",
    ]
    for arm, words in ARMS.items():
        run = runs[arm]
        apart = [abs(a - b) for a, b in zip(run["losses"], exact["losses"], strict=True)]
        lines.append(
            f"| {arm}: {words} | {mean(run['losses'][:8]):.4f} | {mean(run['losses'][-8:]):.4f} | "
            f"{mean(run['held_out']):.4f} | {moved(run, exact):.1e} | {max(apart):.1e} |"
        )
    by_filter, by_bit, by_half = (moved(runs[arm], exact) for arm in list(ARMS)[1:])
    lines += [
        "",
        f"A change in the last bit moves a loss by {by_bit:.0e} on average, the filter by "
        f"{by_filter:.0e} and bfloat16 by {by_half:.0e}: the filter weighs "
        f"{by_filter / by_half:.2f} times what bfloat16 does.",
        "",
        f"{exact['machine']}; `python -m benchmarks.trajectory`; commits: "
        + ", ".join(f"{arm} {runs[arm]['commit']}" for arm in ARMS),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Trains the named arms (or all arms without a run), then writes the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trajectory", description=__doc__)
    parser.add_argument("arms", nargs="*", metavar="ARM", help=f"of {', '.join(ARMS)}")
    wanted = parser.parse_args().arms
    runs = json.loads(RUNS.read_text()) if RUNS.exists() else {}
    for arm in wanted or [arm for arm in ARMS if arm not in runs]:
        if arm not in ARMS:
            parser.error(f"ARM must be one of {', '.join(ARMS)}, got {arm!r}")
        runs[arm] = train(arm)
        RUNS.write_text(json.dumps(runs, indent=1) + "\n")
    if missing := [arm for arm in ARMS if arm not in runs]:
        print(f"no table yet: {', '.join(missing)} not trained", file=sys.stderr)
        return 0
    TABLE.write_text(table(runs))
    print(TABLE.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
