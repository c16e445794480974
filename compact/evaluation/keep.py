"""Filters rationales by their scores: an expression ("weight > 0.5/K") or the best of a problem."""

from __future__ import annotations

import ast
import operator
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from compact.files import MAX_DEPTH

_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_SYNTAX = (ast.BoolOp, ast.boolop, ast.UnaryOp, ast.BinOp, ast.Compare, ast.expr_context)
NAMES = ("weight", "K", "validity", "adaptability", "consensus", "difficulty")
"""What an expression may read: fields of a row of `compact score`, and K."""
Rows = Sequence[Mapping[str, Any]]


def kept_by(rows: Rows, expression: str) -> list[bool]:
    """Returns for each row whether the expression holds.

    Args:
        rows: rows of `compact score`; those of a problem have the same question_id.
        expression: comparisons of `NAMES` and numbers with + - * /, joined by and, or, not.

    Raises:
        ValueError: the expression is not of this kind, or reads a score that the rows do not have.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # about "0.5and"
            tree = ast.parse(expression.strip(), mode="eval").body
        if _depth(tree) > MAX_DEPTH:
            raise ValueError
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"--keep must be like 'weight > 0.5/K', got {expression!r}") from error
    for node in ast.walk(tree):
        if not _is_allowed(node):
            found = ast.unparse(node) if isinstance(node, ast.expr) else expression
            raise ValueError(
                f"--keep may hold numbers, {', '.join(NAMES)}, + - * / and comparisons, got "
                f"{found!r}"
            )
    sizes: dict[str, int] = defaultdict(int)
    for row in rows:
        sizes[row["question_id"]] += 1
    kept = []
    for row in rows:
        value = _value(tree, {**row, "K": sizes[row["question_id"]]}, expression)
        if not isinstance(value, bool):
            raise ValueError(
                f"--keep must be a comparison, as 'weight > 0.5/K', got {expression!r}"
            )
        kept.append(value)
    return kept


def best_of(rows: Rows, count: int) -> list[bool]:
    """Returns for each row whether it is among the `count` of its problem with the most weight.

    Of rows with equal weights the earlier ones count first. A weight of 0 is never kept.

    Raises:
        ValueError: count < 1.
    """
    if count < 1:
        raise ValueError(f"--top must be at least 1, got {count}")
    problems: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        problems[row["question_id"]].append(index)
    kept = [False] * len(rows)
    for indices in problems.values():
        for index in sorted(indices, key=lambda i: -rows[i]["weight"])[:count]:
            kept[index] = rows[index]["weight"] > 0
    return kept


def _depth(tree: ast.AST) -> int:
    """Returns the levels of nesting, at most `MAX_DEPTH` + 1."""
    level, depth = [tree], 0
    while level and depth <= MAX_DEPTH:
        level = [child for node in level for child in ast.iter_child_nodes(node)]
        depth += 1
    return depth


def _value(node: ast.AST, names: Mapping[str, Any], expression: str) -> Any:
    """Evaluates a node; only numbers, `NAMES`, arithmetic, comparisons and and / or / not."""

    def of(child: ast.AST) -> Any:
        return _value(child, names, expression)

    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        if names.get(node.id) is None:
            raise ValueError(f"--keep: the rows have no {node.id}; this preset does not score it")
        return names[node.id]
    if isinstance(node, ast.BoolOp):
        values = [of(value) for value in node.values]
        return all(values) if isinstance(node.op, ast.And) else any(values)
    if isinstance(node, ast.UnaryOp):
        return _OPERATORS[type(node.op)](of(node.operand))
    if isinstance(node, ast.BinOp):
        try:
            return _OPERATORS[type(node.op)](of(node.left), of(node.right))
        except (ZeroDivisionError, OverflowError) as error:
            raise ValueError(f"--keep: {expression!r}: {error}") from None
    if isinstance(node, ast.Compare):
        sides = [of(node.left), *(of(side) for side in node.comparators)]
        return all(
            _OPERATORS[type(op)](a, b)
            for op, a, b in zip(node.ops, sides[:-1], sides[1:], strict=True)
        )
    raise AssertionError(f"{node}: let through by _is_allowed")


def _is_allowed(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return type(node.value) in (int, float)
    if isinstance(node, ast.Name):
        return node.id in NAMES
    return type(node) in _OPERATORS or isinstance(node, _SYNTAX)
