"""Plants faults in the CUDA kernels and requires the host harness to find every one.

    python tests/simt/mutants.py [--write]

Copies csrc/kernels/cuda, puts every fault of the table beside the right code under a switch, compiles
tests/simt/simt_kernels.cpp once and runs it once a fault. A fault whose text is not found exactly once is
an error: the table must follow the kernels. --write renews docs/results/mutants.md.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "csrc/kernels/cuda"
BUILD = ROOT / "build/mutants"
TABLE = ROOT / "docs/results/mutants.md"


class Fault(NamedTuple):
    """One fault: in `file`, `right` (found once) becomes `wrong`; `what` says it in words."""

    what: str
    file: str
    right: str
    wrong: str


# ruff: noqa: E501
FAULTS = (
    Fault("no barrier before the warps' results are merged", "head.cuh",
          "  simt::barrier();\n  Online<A> all;", "  Online<A> all;"),
    Fault("no barrier before the warps' sums are added", "head.cuh",
          "  simt::barrier();\n  return simt::warp_sum(simt::lane()",
          "  return simt::warp_sum(simt::lane()"),
    Fault("one warp too few merged", "head.cuh",
          "if (simt::lane() < simt::warps()) {", "if (simt::lane() + 1 < simt::warps()) {"),
    Fault("one warp too many merged", "head.cuh",
          "if (simt::lane() < simt::warps()) {", "if (simt::lane() <= simt::warps()) {"),
    Fault("merge over half of the warp", "head.cuh",
          "for (int mask = simt::kWarp / 2; mask > 0;", "for (int mask = simt::kWarp / 4; mask > 0;"),
    Fault("old sums not rescaled under a new maximum", "head.cuh",
          "rescale(before - reference());", "(void)before;"),
    Fault("entropy moment not moved with the reference", "head.cuh",
          "factor * (moment + shift * sum)", "factor * moment"),
    Fault("-inf times 0 in the entropy", "head.cuh",
          "e * simt::max(d, A(-1e4))", "e * d"),
    Fault("infinite reference for a row of -inf", "head.cuh",
          "largest > -simt::infinity<A>() && largest < simt::infinity<A>() ? largest : A(0)",
          "largest"),
    Fault("bias before scale", "head.cuh",
          "if (scale != A(1)) {", "if (scale != A(1) && bias == nullptr) {"),
    Fault("slope of the softcap forgotten", "head.cuh", "g[i] *= A(1) - t * t;", "g[i] *= A(1);"),
    Fault("target column off by one", "head.cuh",
          "if (column + i == target) {", "if (column + i + 1 == target) {"),
    Fault("stash keeps the target", "head.cuh", "part[i] = A(0);\n        }", "}"),
    Fault("ignored rows get a gradient", "head.cuh", "if (ignored) {", "if (false) {"),
    Fault("backward: last single elements skipped", "head.cuh",
          "if (single >= 0) {", "if (single > 0) {"),
    Fault("head longer than the row", "simt.cuh", "if (head > count) head = count;", ""),
    Fault("head of a misaligned row ignored", "simt.cuh",
          "head = (Pack<T>::kSize - past) % Pack<T>::kSize;", "head = 0;"),
    Fault("tail one element short", "simt.cuh",
          "if (i < head + tail) return", "if (i + 1 < head + tail) return"),
    Fault("warp sum over half of the warp", "simt.cuh",
          "for (int mask = kWarp / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);",
          "for (int mask = kWarp / 4; mask > 0; mask /= 2) value += shuffle_xor(value, mask);"),
    Fault("second load in flight dropped", "row_stats.cuh",
          "if (second) take(i + step, b);", ""),
    Fault("staged packs one too many", "row_stats.cuh",
          "const simt::Pack<T> a = i < args.staged ?", "const simt::Pack<T> a = i <= args.staged ?"),
    Fault("staged write past the end", "row_stats.cuh",
          "if (i < args.staged) stage[i] = pack;", "if (i <= args.staged) stage[i] = pack;"),
    Fault("second sweep leaves the first round out", "row_stats.cuh",
          "k >= 0; k -= 2)", "k > 0; k -= 2)"),
    Fault("target read after the row is overwritten by a quick warp", "row_stats.cuh",
          "const Online<A> all = block_merge(mine, largest, sum, moment);",
          "const Online<A> all = block_merge(mine, largest, sum, moment); if (in_range) "
          "target_logit = args.head.finish_one(simt::to_float(row[target]), target);"),
    Fault("weight of the row forgotten", "row_stats.cuh",
          "args.weight == nullptr ? A(1) : args.weight[r]", "A(1)"),
    Fault("ignored row keeps its nll", "row_stats.cuh",
          "args.nll[r] = ignored ? A(0) :", "args.nll[r] ="),
    Fault("tie counts as wrong", "row_stats.cuh",
          "target_logit >= all.largest", "target_logit > all.largest"),
    Fault("last gold token left out", "row_stats.cuh",
          "i < end; i += simt::kWarp) {", "i < end - 1; i += simt::kWarp) {"),
    Fault("gradient with the scale forgotten", "row_stats.cuh",
          "upstream * args.out_scale}", "upstream}"),
    Fault("block of the vocabulary not offset", "head_gradient.cuh",
          "target - args.first, target ==", "target, target =="),
    Fault("target's own term with the wrong sign", "head_gradient.cuh",
          "simt::expm1(-args.nll[r])", "-simt::expm1(-args.nll[r])"),
    Fault("column past the end summed", "head_gradient.cuh",
          "if (column >= args.cols) return;", "if (column > args.cols) return;"),
    Fault("last row of a column sum left out", "head_gradient.cuh",
          "r < args.rows; ++r)", "r < args.rows - 1; ++r)"),
    Fault("KL of excluded classes is NaN", "pairwise_symmetric_kl.cuh",
          "return x > A(0) ? x * y : x;", "return x * y;"),
    Fault("KL(q || p) with the sign of KL(p || q)", "pairwise_symmetric_kl.cuh",
          "weighted(exp_of(log_q), -delta);", "weighted(exp_of(log_q), delta);"),
    Fault("pair gradient without p - q", "pairwise_symmetric_kl.cuh",
          "weighted(p, delta - kl_left) + (p - q)", "weighted(p, delta - kl_left)"),
    Fault("two merges share one array", "pairwise_symmetric_kl.cuh",
          "block_merge(q, largest_q, sum_q, moment_q)", "block_merge(q, largest_p, sum_p, moment_p)"),
    Fault("a row's second item dropped", "accumulate_weighted.cuh",
          "i < args.items && args.sorted_rows[i] == row; ++i)",
          "i < first + 1 && args.sorted_rows[i] == row; ++i)"),
    Fault("every item's block writes the row", "accumulate_weighted.cuh",
          "if (first > 0 && args.sorted_rows[first - 1] == row) return;", ""),
    Fault("row one past the end written", "accumulate_weighted.cuh",
          "row >= args.num_rows) return;", "row > args.num_rows) return;"),
    Fault("last column left out", "accumulate_weighted.cuh",
          "for (int64_t c = simt::thread(); c < args.width;",
          "for (int64_t c = simt::thread(); c < args.width - 1;"),
    Fault("variance divided by K whatever ddof is", "problem_weights.cuh",
          "count - args.ddof;", "count;"),
    Fault("equal scores divided by 0", "problem_weights.cuh",
          "spread <= A(0) ? A(0) :", "spread < A(0) ? A(0) :"),
    Fault("floor not divided by K", "problem_weights.cuh",
          "+ args.floor / k;", "+ args.floor;"),
    Fault("rationales after the first 32 left out of the sum", "problem_weights.cuh",
          "simt::kWarp) sum += score[i];", "end) sum += score[i];"),
    Fault("no barrier before the counts are read", "filtered_matmul.cuh",
          "    simt::barrier();\n    int position", "    int position"),
    Fault("no barrier before the list is read", "filtered_matmul.cuh",
          "    simt::barrier();\n    for (int k = 0;", "    for (int k = 0;"),
    Fault("counts of two tiles in one place", "filtered_matmul.cuh",
          "base += tile, turn ^= 1)", "base += tile)"),
    Fault("barrier in a branch that not all warps take", "filtered_matmul.cuh",
          "if (kept == 0) continue;", "if (of_warp == 0) continue;"),
    Fault("the threshold itself is skipped", "filtered_matmul.cuh",
          "!(simt::abs(g[j]) < eps)", "!(simt::abs(g[j]) <= eps)"),
    Fault("place in the list off by one", "filtered_matmul.cuh",
          "((1u << simt::lane()) - 1u)", "((2u << simt::lane()) - 1u)"),
    Fault("column past the row's end written", "filtered_matmul.cuh",
          "if (j < owned) out[j]", "if (j <= owned) out[j]"),
)  # fmt: skip


def run(index: int, fault: Fault) -> str | None:
    """Builds and runs one fault; returns what found it, or None where nothing did."""
    folder = BUILD / str(index)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(KERNELS, folder / "kernels/cuda")
    path = folder / "kernels/cuda" / fault.file
    text = path.read_text()
    if text.count(fault.right) != 1:
        raise SystemExit(
            f"mutants: {fault.what!r}: must be found once in {fault.file}, "
            f"got {text.count(fault.right)} times: {fault.right!r}"
        )
    path.write_text(text.replace(fault.right, fault.wrong))
    program = folder / "simt_kernels"
    subprocess.run(
        ["g++", "-std=c++20", "-O1", f"-I{folder}", f"-I{ROOT / 'tests/simt'}",
         str(ROOT / "tests/simt/simt_kernels.cpp"), str(BUILD / "simt_host.o"),
         "-pthread", "-o", str(program)],
        check=True,
    )  # fmt: skip
    for seed in ("1", "2", "3"):
        try:
            done = subprocess.run(
                [program, "fibers", seed], capture_output=True, text=True, timeout=120
            )
        except subprocess.TimeoutExpired:
            return f"does not end (seed {seed})"
        if done.returncode == 0:
            continue
        lines = done.stdout.splitlines()
        failed = [line for line in lines if line.startswith("FAILED")]
        case = next((line for line in reversed(lines) if not line.startswith("FAILED")), "start")
        found = failed[0].removeprefix("FAILED ").split(":")[0] if failed else "abort"
        if not failed and done.stderr:
            found = done.stderr.strip().splitlines()[0].removeprefix("simt: ").split(" (")[0]
        return f"{case}: {found.partition('[')[0]}"
    return None


def main() -> int:
    """Runs every fault, two at a time; non-zero where one survives."""
    from concurrent.futures import ThreadPoolExecutor

    BUILD.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        ["g++", "-std=c++20", "-O2", "-c", str(ROOT / "tests/simt/simt_host.cpp"),
         "-o", str(BUILD / "simt_host.o")],
        check=True,
    )  # fmt: skip
    with ThreadPoolExecutor(int(os.environ.get("JOBS", "2"))) as pool:
        found = list(pool.map(run, range(len(FAULTS)), FAULTS))
    rows = [
        f"| {fault.file} | {fault.what} | {by or '**survived**'} |"
        for fault, by in zip(FAULTS, found, strict=True)
    ]
    table = "\n".join(["| kernel file | fault | found by |", "|---|---|---|", *rows])
    print(table)
    survivors = found.count(None)
    print(f"{len(FAULTS) - survivors} of {len(FAULTS)} faults found")
    if "--write" in sys.argv:
        TABLE.parent.mkdir(parents=True, exist_ok=True)
        TABLE.write_text(
            "# Faults planted in the CUDA kernels, and what found each\n\n"
            "Made by `python tests/simt/mutants.py --write`, on a machine without a GPU: the kernels run\n"
            "in the host harness (fibers, seeds 1 to 3).\n\n" + table + "\n"
        )
    return survivors != 0


if __name__ == "__main__":
    raise SystemExit(main())
