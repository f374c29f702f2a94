"""Tables as text: aligned columns for a terminal, Markdown for a file."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Lines of aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  " + "  ".join(cells))
    return "\n".join(lines)


def format_markdown(rows: Sequence[Sequence[str]]) -> str:
    """The same as a Markdown table, the first row being its head."""
    head, *others = rows
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *others))


def plus_minus(mean: float | None, error: float | None, digits: int, sign: str = "") -> str:
    """A mean with its error, where both are known; `sign` "+" shows the sign of a positive one."""
    if mean is None:
        return "-"
    return f"{mean:{sign}.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")
