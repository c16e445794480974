"""The ledger: what each teacher was asked, what it cost, how it failed, how often it was right."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from compact.teachers.collect import Item, Plans
from compact.teachers.export import RIGHT, Found
from compact.teachers.store import Attempt, Store


def ledger(store: Store, found: Sequence[Found]) -> dict[str, dict[str, Any]]:
    """Returns the account of each teacher over everything in the store.

    Returns:
        Name -> requests (attempts sent), answers, prompt_tokens, completion_tokens, cost, unknown
        (upper bound of costs that were not reported), seconds (median of an answer), slow_seconds
        (95% are faster), failures (kind -> count), cut, empty, merged, missing, marked (answers
        with a gold answer), right (share of them that match it, None without any).
    """
    attempts: dict[str, list[Attempt]] = {}
    for _, teacher, attempt in store.attempts():
        attempts.setdefault(teacher, []).append(attempt)
    return {one.teacher.name: _account(one, attempts.get(one.teacher.name, [])) for one in found}


def _account(one: Found, attempts: Sequence[Attempt]) -> dict[str, Any]:
    times = sorted(a.seconds for a in attempts if a.outcome == "answer")
    marks = [mark for mark in one.marks if mark is not None]
    return {
        "requests": len(attempts),
        "answers": one.requests - one.missing,
        "prompt_tokens": sum(a.prompt_tokens for a in attempts),
        "completion_tokens": sum(a.completion_tokens for a in attempts),
        "cost": sum(a.cost for a in attempts),
        "unknown": sum(a.unknown for a in attempts),
        "seconds": statistics.median(times) if times else None,
        "slow_seconds": times[int(0.95 * (len(times) - 1))] if times else None,
        "failures": dict(Counter(a.outcome for a in attempts if a.outcome != "answer")),
        "cut": one.cut,
        "empty": one.empty,
        "merged": one.merged,
        "missing": one.missing,
        "marked": len(marks),
        "right": marks.count(RIGHT) / len(marks) if marks else None,
    }


def describe_ledger(accounts: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the ledger as a table of text."""
    head = ["teacher", "requests", "answers", "missing", "right", "tokens in", "tokens out"]
    head += ["cost", "median s", "failures"]
    rows = [head]
    for name, account in accounts.items():
        right, seconds = account["right"], account["seconds"]
        cost = f"{account['cost']:.4g}"
        cost += f" (+ at most {account['unknown']:.2g})" if account["unknown"] else ""
        failures = ", ".join(f"{count} {kind}" for kind, count in account["failures"].items())
        rows.append(
            [
                name,
                *(str(account[key]) for key in ("requests", "answers", "missing")),
                "-" if right is None else f"{right:.3f}",
                *(f"{account[key]:,}" for key in ("prompt_tokens", "completion_tokens")),
                cost,
                "-" if seconds is None else f"{seconds:.2f}",
                failures or "-",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def sample_of(items: Sequence[Item], size: int) -> list[Item]:
    """Returns up to `size` requests, evenly spaced."""
    step = max(1, len(items) // size)
    return list(items[::step][:size])


def estimate(store: Store, plans: Plans) -> dict[str, dict[str, float | None]]:
    """Estimates what the whole plan takes, from the answers that the store has of it.

    Returns:
        Name -> requests, left (not answered yet), and for those that are left: tokens and cost
        (None without any answer to judge by) and at_most (upper bound of the cost, None if nothing
        limits the tokens of an answer that costs). An endpoint without a price has neither.
    """
    found: dict[str, dict[str, float | None]] = {}
    paid: dict[str, tuple[int, float]] = {}
    for key, _, attempt in store.attempts():
        tokens, cost = paid.get(key, (0, 0.0))
        tokens += attempt.prompt_tokens + attempt.completion_tokens
        paid[key] = (tokens, cost + attempt.cost)
    known = store.keys()
    for teacher, items in plans:
        seen = [paid.get(item.key, (0, 0.0)) for item in items if item.key in known]
        left = [item for item in items if item.key not in known]
        priced = bool(teacher.price) or teacher.local is not None
        bounded = priced and not (teacher.price.get("out") and teacher.most_tokens is None)
        found[teacher.name] = {
            "requests": len(items),
            "left": len(left),
            "tokens": len(left) * statistics.mean(t for t, _ in seen) if seen else None,
            "cost": len(left) * statistics.mean(c for _, c in seen) if seen and priced else None,
            "at_most": sum(item.at_most for item in left) if bounded else None,
        }
    return found


def describe_estimate(estimates: Mapping[str, Mapping[str, float | None]]) -> str:
    """Returns an estimate as lines of text."""
    lines = []
    for name, one in estimates.items():
        tokens, cost, at_most = one["tokens"], one["cost"], one["at_most"]
        about = "no answer yet to judge by" if tokens is None else f"about {tokens:,.0f} tokens"
        about += "" if cost is None else f", cost {cost:.4g}"
        bound = "no upper bound of the cost" if at_most is None else f"at most {at_most:.4g}"
        lines.append(
            f"{name}: {one['left']:.0f} of {one['requests']:.0f} requests left, {about} ({bound})"
        )
    total = sum(one["cost"] or 0.0 for one in estimates.values())
    return "\n".join([*lines, f"in all: cost {total:.4g}"])
