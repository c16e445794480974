"""Plants faults in the CUDA kernels and requires the host harness to find every one.

    python tests/simt/mutants.py [--write] [WORD]

For every fault of the table, this copies csrc/kernels/cuda with the fault, compiles
tests/simt/simt_kernels.cpp with the copy and runs it (fibers, up to three seeds, until one finds the
fault). If the text of a fault is not found exactly once, this is an error: update the table when the
kernels change. --write updates docs/results/mutants.md; without it every fault must be there. Where the
kernels, the harness, this file and the compiler are those of the table, the result is too, and nothing
runs. With WORD, only faults whose file or description contains it. The variable JOBS (2) sets how many
run at a time.
"""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "csrc/kernels/cuda"
SIMT = ROOT / "tests/simt"
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
          "  simt::barrier();\n  Online<A, kSquares> all;", "  Online<A, kSquares> all;"),
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
    Fault("slope of the softcap forgotten at the target", "head.cuh",
          "head.through_softcap(at_target, own);", ""),
    Fault("target column off by one", "head.cuh",
          "if (column + i == target) {", "if (column + i + 1 == target) {"),
    Fault("stash keeps the target", "head.cuh", "part[i] = A(0);\n        }", "}"),
    Fault("ignored rows get a gradient", "head.cuh", "if (none) {", "if (false) {"),
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
          "const Online<A, kMore> all = block_merge(mine, largest, sum, moment, squares);",
          "const Online<A, kMore> all = block_merge(mine, largest, sum, moment, squares); if (in_range) "
          "target_logit = args.head.finish_one(simt::to_float(row[target]), target);"),
    Fault("weight of the row forgotten", "row_stats.cuh",
          "args.weight == nullptr ? A(1) : args.weight[r]", "A(1)"),
    Fault("ignored row keeps its nll", "row_stats.cuh",
          "args.nll[r] = ignored ? A(0) :", "args.nll[r] ="),
    Fault("tie counts as wrong", "row_stats.cuh",
          "target_logit >= all.largest", "target_logit > all.largest"),
    Fault("tie counts as larger", "head.cuh",
          "larger += z[i] > own;", "larger += z[i] >= own;"),
    Fault("target counts among its rivals", "head.cuh",
          "if (here && column + i == target) continue;", ""),
    Fault("every pack leaves a rival out", "head.cuh",
          "if (here && column + i == target) continue;", "if (here) continue;"),
    Fault("rivals of one warp too few", "head.cuh",
          "const bool used = simt::lane() < simt::warps();",
          "const bool used = simt::lane() + 1 < simt::warps();"),
    Fault("no barrier before the warps' rivals are read", "head.cuh",
          "  simt::barrier();\n  const bool used", "  const bool used"),
    Fault("squares not rescaled twice", "head.cuh",
          "squares *= factor * factor;", "squares *= factor;"),
    Fault("squares of one warp too few", "head.cuh",
          "if constexpr (kSquares) squares += other.squares;",
          "if constexpr (kSquares) squares = simt::max(squares, other.squares);"),
    Fault("single elements are no rivals", "row_stats.cuh",
          "if constexpr (kMore) rivals.add(single, z);", ""),
    Fault("ignored row keeps its rank", "row_stats.cuh",
          "const bool known = !ignored &&", "const bool known ="),
    Fault("rank of a NaN", "row_stats.cuh",
          "all.sum == all.sum && target_logit == target_logit;", "true;"),
    Fault("absent id has a probability", "row_stats.cuh",
          "score_id == -1 ? -simt::infinity<A>() :", "score_id == -1 ? A(0) :"),
    Fault("ids of the first row for every row", "row_stats.cuh",
          "score_id = args.score_ids[r * args.scores + simt::lane()];",
          "score_id = args.score_ids[simt::lane()];"),
    Fault("last gold token left out", "row_stats.cuh",
          "i < end; i += simt::kWarp) {", "i < end - 1; i += simt::kWarp) {"),
    Fault("gradient with the scale forgotten", "row_stats.cuh",
          "upstream * args.out_scale}", "upstream}"),
    Fault("block of the vocabulary not offset", "head_gradient.cuh",
          "args.target[r] - args.first,", "args.target[r],"),
    Fault("a row of weight 0 and logits that are not finite becomes NaN", "row_stats.cuh",
          "ignored || upstream == A(0),", "ignored,"),
    Fault("a token of weight 0 gets 0 times its gradient", "head_gradient.cuh",
          "return target == ignore_index || upstream == A(0);", "return target == ignore_index;"),
    Fault("an ignored token keeps its factor", "head_gradient.cuh",
          "args.factor[r] = none ? A(0) : args.upstream[r];", "args.factor[r] = args.upstream[r];"),
    Fault("rows without a gradient are not cleared", "head_gradient.cuh",
          "  if (!none) return;", "  return;"),
    Fault("target's own term with the wrong sign", "head_gradient.cuh",
          "simt::expm1(-args.nll[r])", "-simt::expm1(-args.nll[r])"),
    Fault("column past the end summed", "head_gradient.cuh",
          "if (column >= args.cols) return;", "if (column > args.cols) return;"),
    Fault("last row of a column sum left out", "head_gradient.cuh",
          "r < args.rows; ++r)", "r < args.rows - 1; ++r)"),
    Fault("weighted column sum forgets what was there", "head_gradient.cuh",
          "args.weight == nullptr ? A(0) : args.out[column]", "A(0)"),
    Fault("element past the end added", "head_gradient.cuh",
          "if (i < args.count) args.out", "if (i <= args.count) args.out"),
    Fault("KL of excluded classes is NaN", "pairwise_symmetric_kl.cuh",
          "return x > A(0) ? x * y : x;", "return x * y;"),
    Fault("KL(q || p) with the sign of KL(p || q)", "pairwise_symmetric_kl.cuh",
          "weighted(exp_of(log_q), -delta);", "weighted(exp_of(log_q), delta);"),
    Fault("pair gradient without p - q", "pairwise_symmetric_kl.cuh",
          "- kl) + (p - exp_of(log_q)))", "- kl))"),
    Fault("a row's second pair dropped", "pairwise_symmetric_kl.cuh",
          "e < end; ++e)", "e < end && e < begin + 1; ++e)"),
    Fault("right row of a pair taken for the left one", "pairwise_symmetric_kl.cuh",
          "(args.side[e] & 1) != 0", "false"),
    Fault("rows of a tile not offset", "pairwise_symmetric_kl.cuh",
          "(slot - first_slot) * cols", "slot * cols"),
    Fault("statistics of a pair in the order of the tiles", "pairwise_symmetric_kl.cuh",
          "pair = args.index[simt::block()]", "pair = simt::block()"),
    Fault("two merges share one array", "pairwise_symmetric_kl.cuh",
          "block_merge(q, largest_q, sum_q, moment_q)", "block_merge(q, largest_p, sum_p, moment_p)"),
    Fault("weight 0 times a unit gradient that is not finite", "accumulate_weighted.cuh",
          "    if (weight == A(0)) continue;\n", ""),
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
          "simt::warp_sum(different) == 0 || spread <= A(0);", "false;"),
    Fault("z-score of a single rationale not written", "problem_weights.cuh",
          "args.zscores[s * args.rationales + begin] = A(0);", ";"),
    Fault("a z-score's place in 32 bits", "problem_weights.cuh",
          "args.zscores + s * args.rationales;",
          "args.zscores + static_cast<int32_t>(s * args.rationales);"),
    Fault("floor not divided by K", "problem_weights.cuh",
          "+ args.floor / k;", "+ args.floor;"),
    Fault("rationales after the first 32 left out of the sum", "problem_weights.cuh",
          "simt::kWarp) sum += score[i];", "end) sum += score[i];"),
    Fault("a row's place in 32 bits", "row_stats.cuh",
          "T* row = args.logits + r * args.cols;",
          "T* row = args.logits + static_cast<int32_t>(r * args.cols);"),
    Fault("a stash row's place in 32 bits", "row_stats.cuh",
          "args.stash + r * args.cols;", "args.stash + static_cast<int32_t>(r * args.cols);"),
    Fault("a row's place in 32 bits", "head_gradient.cuh",
          "args.logits + r * args.cols, args.cols, gradient",
          "args.logits + static_cast<int32_t>(r * args.cols), args.cols, gradient"),
    Fault("a stash row's place in 32 bits", "head_gradient.cuh",
          "args.stash + r * args.vocabulary",
          "args.stash + static_cast<int32_t>(r * args.vocabulary)"),
    Fault("an element's place in 32 bits", "head_gradient.cuh",
          "args.matrix[r * args.cols + column]",
          "args.matrix[static_cast<int32_t>(r * args.cols + column)]"),
    Fault("an item's place in 32 bits", "accumulate_weighted.cuh",
          "args.unit + item * args.width", "args.unit + static_cast<int32_t>(item * args.width)"),
    Fault("an output row's place in 32 bits", "accumulate_weighted.cuh",
          "args.out + row * args.width", "args.out + static_cast<int32_t>(row * args.width)"),
    Fault("a score's place in 32 bits", "problem_weights.cuh",
          "args.scores + s * args.rationales",
          "args.scores + static_cast<int32_t>(s * args.rationales)"),
    Fault("a row's place in 32 bits", "filtered_matmul.cuh",
          "args.grad + row * args.inner;", "args.grad + static_cast<int32_t>(row * args.inner);"),
    Fault("a weight row's place in 32 bits", "filtered_matmul.cuh",
          "(base + kept_index[k]) * args.width",
          "static_cast<int32_t>((base + kept_index[k]) * args.width)"),
    Fault("block number cut to 16 bits", "accumulate_weighted.cuh",
          "const int64_t first = simt::block();",
          "const int64_t first = simt::block() & 0xffff;"),
    Fault("no barrier before the counts are read", "filtered_matmul.cuh",
          "    simt::barrier();\n    int position", "    int position"),
    Fault("no barrier before the list is read", "filtered_matmul.cuh",
          "    simt::barrier();\n    for (int k = 0;", "    for (int k = 0;"),
    Fault("counts of two tiles in one place", "filtered_matmul.cuh",
          "base += tile, turn ^= 1)", "base += tile)"),
    Fault("barrier in a branch that not all warps take", "filtered_matmul.cuh",
          "if (kept == 0) continue;", "if (of_warp == 0) continue;"),
    Fault("small entries are left out, not rounded", "filtered_matmul.cuh",
          "  if (!(size > hashed(static_cast<float>(value), column) * eps)) return 0;",
          "  return 0;"),
    Fault("a small negative entry rounded to plus eps", "filtered_matmul.cuh",
          "return value < 0 ? -eps : eps;", "return eps;"),
    Fault("rounding forgets the column", "filtered_matmul.cuh",
          "static_cast<uint32_t>(column) * 0x9e3779b1u", "0u"),
    Fault("place in the list off by one", "filtered_matmul.cuh",
          "((1u << simt::lane()) - 1u)", "((2u << simt::lane()) - 1u)"),
    Fault("column past the row's end written", "filtered_matmul.cuh",
          "if (j < owned) out[j]", "if (j <= owned) out[j]"),
)  # fmt: skip


# Precompiled: these headers take half of the time of a compilation.
STANDARD_HEADERS = (
    "algorithm array bit cmath cstdio cstdint cstdlib cstring functional limits memory random "
    "string vector sys/mman.h"
)
COMPILE = ["g++", "-std=c++20", "-O0", "-pthread"]
CPU_SECONDS = 60  # a run without a fault takes 8; other processes do not count


def limit_time() -> None:
    """In the child: SIGXCPU after CPU_SECONDS."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))


def row(fault: Fault) -> tuple[str, bool]:
    """Tries one fault; its row of the table, printed at once, and whether it was found."""
    by = run(fault)
    text = f"| {fault.file} | {fault.what} | {by or '**survived**'} |"
    print(text, flush=True)
    return text, by is not None


def run(fault: Fault) -> str | None:
    """Builds and runs one fault; returns what found it, or None where nothing did."""
    folder = BUILD / str(FAULTS.index(fault))
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
        [*COMPILE, "-include", str(BUILD / "standard.h"), f"-I{folder}", f"-I{ROOT / 'csrc'}", f"-I{SIMT}",
         str(SIMT / "simt_kernels.cpp"), str(BUILD / "simt_host.o"), "-o", str(program)],
        check=True,
    )  # fmt: skip
    for seed in ("1", "2", "3"):
        done = subprocess.run(
            [program, "fibers", seed], capture_output=True, text=True, preexec_fn=limit_time
        )
        if done.returncode == 0:
            continue
        lines = done.stdout.splitlines()
        case = next(line for line in reversed(lines) if not line.startswith("FAILED"))
        return f"{case}: {symptom(done)}"
    return None


def symptom(done: subprocess.CompletedProcess[str]) -> str:
    """Returns the symptom of a failed run: a wrong value, an error of the harness, or a signal."""
    for line in done.stdout.splitlines():
        if line.startswith("FAILED "):
            return "wrong " + line.removeprefix("FAILED ").split(":")[0].partition("[")[0]
    if done.stderr.startswith("simt: "):
        return done.stderr.splitlines()[0].removeprefix("simt: ").split(" (")[0]
    name = signal.Signals(-done.returncode).name if done.returncode < 0 else done.returncode
    return "does not end" if name == "SIGXCPU" else f"ends with {name}"


def inputs() -> str:
    """Returns a hash of all that the result depends on."""
    sources = [str(SIMT / name) for name in ("simt_kernels.cpp", "simt_host.cpp")]
    command = ["g++", "-std=c++20", "-MM", f"-I{ROOT / 'csrc'}", f"-I{SIMT}", *sources]
    rules = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    read = {Path(word).resolve() for word in rules.split() if word.endswith((".cpp", ".h", ".cuh"))}
    version = subprocess.run(["g++", "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(version)
    for path in sorted(read | {Path(__file__).resolve()}):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def main() -> int:
    """Runs the faults; returns the number of faults not found plus those missing in the table."""
    words = [word for word in sys.argv[1:] if word != "--write"]
    given = inputs()
    if "--write" not in sys.argv and not words and f"`{given}`" in TABLE.read_text():
        print(
            f"kernels, harness and compiler are those of {TABLE.relative_to(ROOT)}: nothing to try"
        )
        return 0
    faults = [f for f in FAULTS if all(word in f"{f.file} {f.what}" for word in words)]
    start = time.monotonic()
    BUILD.mkdir(parents=True, exist_ok=True)
    standard = BUILD / "standard.h"
    standard.write_text("".join(f"#include <{name}>\n" for name in STANDARD_HEADERS.split()))
    for command in (
        [*COMPILE, "-x", "c++-header", str(standard), "-o", f"{standard}.gch"],
        ["g++", "-std=c++20", "-O2", "-c", str(SIMT / "simt_host.cpp"),
         "-o", str(BUILD / "simt_host.o")],
    ):  # fmt: skip
        subprocess.run(command, check=True)
    with ThreadPoolExecutor(int(os.environ.get("JOBS", "2"))) as pool:
        tried = list(pool.map(row, faults))
    rows = [text for text, _ in tried]
    survivors = sum(not found for _, found in tried)
    seconds = time.monotonic() - start
    print(f"{len(faults) - survivors} of {len(faults)} faults found in {seconds:.0f} s")
    if "--write" in sys.argv and not (words or survivors):
        TABLE.write_text(
            "# Faults planted in the CUDA kernels, and what found each\n\n"
            "Made by `python tests/simt/mutants.py --write`, without a GPU: the kernels run in the host\n"
            "harness (`tests/simt/simt_kernels.cpp`, fibers, seeds 1 to 3). The last column names the\n"
            "case that failed and how.\n\n"
            f"SHA-256 of kernels, harness and compiler: `{given}`\n\n"
            + "\n".join(["| kernel file | fault | found by |", "|---|---|---|", *rows])
            + "\n"
        )
    table = TABLE.read_text()
    missing = [f.what for f in faults if f"| {f.file} | {f.what} |" not in table]
    if missing:
        print(f"not in {TABLE.relative_to(ROOT)} (--write renews it): {missing}")
    return survivors + len(missing)


if __name__ == "__main__":
    raise SystemExit(main())
