"""Compares registers, shared memory and spills of every CUDA kernel with a committed table.

    python tools/cuda_resources.py BUILD_LOG [--write]

BUILD_LOG is the log of a build from scratch with `-Xptxas -v`. Fails if a kernel uses more than
docs/results/cuda_resources.md says, is not in it, or is in it but was not built; --write updates
the table.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

TABLE = Path(__file__).parents[1] / "docs/results/cuda_resources.md"
TYPES = {"f": "float", "d": "double", "6__half": "half", "13__nv_bfloat16": "bfloat16"}
ENTRY = re.compile(
    r"Compiling entry function '_ZN7compact4cuda\d+(\w+?)_kernelI(\w+?)(Lb[01]E)?EEv\w*' "
    r"for '(\w+)'"
)


def read_log(path: Path) -> dict[tuple[str, str, str], tuple[int, int, int]]:
    """{(kernel, dtype, architecture): (registers, shared bytes, spilled bytes)}."""
    found: dict[tuple[str, str, str], tuple[int, int, int]] = {}
    key, spill = None, 0
    for line in path.read_text().splitlines():
        if entry := ENTRY.search(line):
            kernel, dtype, variant, arch = entry.groups()
            more = " with kMore" if variant == "Lb1E" else ""
            key = (kernel + more, TYPES[dtype], arch)
        elif stores := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spill = int(stores[1]) + int(stores[2])
        elif (used := re.search(r"Used (\d+) registers", line)) and key:
            shared = re.search(r"(\d+) bytes smem", line)
            found[key] = (int(used[1]), int(shared[1]) if shared else 0, spill)
            key, spill = None, 0
    return found


def main() -> int:
    """Compares or writes; returns the number of kernels that got worse."""
    found = read_log(Path(sys.argv[1]))
    if not found:
        raise SystemExit(
            f"cuda_resources: no kernels in {sys.argv[1]}; is it the log of a fresh build?"
        )
    rows = [f"| {' | '.join(k)} | {' | '.join(map(str, v))} |" for k, v in sorted(found.items())]
    if "--write" in sys.argv:
        head = [
            "# What every CUDA kernel uses",
            "",
            "Made by `tools/cuda_checks.sh --write` (nvcc 13.0, -O3 -ftz=true); using more fails.",
            "row_stats is held to 64 registers, so that 1,024 threads fit. Only double spills,",
            "around calls of the mathematical functions.",
            "",
            "| kernel | dtype | architecture | registers | shared bytes | spilled bytes |",
            "|---|---|---|---|---|---|",
        ]
        TABLE.write_text("\n".join(head + rows) + "\n")
        return 0
    known = {}
    for line in TABLE.read_text().splitlines():
        cells = [c.strip() for c in line.strip("|").split("|")]
        if len(cells) == 6 and cells[3].isdigit():
            known[tuple(cells[:3])] = tuple(map(int, cells[3:]))
    worse = [
        f"{' '.join(k)}: {v} (registers, shared, spilled), allowed {known.get(k)}"
        for k, v in sorted(found.items())
        if k not in known or any(a > b for a, b in zip(v, known[k], strict=True))
    ]
    worse += [f"{' '.join(k)}: in the table, but not in the build" for k in known.keys() - found]
    print(*(worse or [f"{len(found)} kernels within the table"]), sep="\n")
    return len(worse)


if __name__ == "__main__":
    raise SystemExit(main())
