"""What more teachers cost: a step on one question for K = 1, 2, 4, 8, padded and as a tree."""

from __future__ import annotations

from benchmarks import step
from benchmarks.harness import Args, Provider, Skipped

SHAPES = ({"K": 4}, {"K": 1}, {"K": 2}, {"K": 8})


def providers(args: Args) -> dict[str, Provider | Skipped]:
    """The same step on padded rows and on one tree, without and with answer leaves."""
    found: dict[str, Provider | Skipped] = {}
    for layout in ("padded", "tree"):
        shape = {"K": args.shape["K"], "layout": layout}
        mine = step.providers(Args(shape, args.device, args.dtype, args.seed))
        found[layout] = mine["compact"]
    found["tree-probes"] = mine["compact-probes"]
    return found
