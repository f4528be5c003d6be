"""Tables for a terminal: cells under each other."""

from collections.abc import Sequence


def align(rows: Sequence[Sequence[str]], numbers: bool = False) -> list[str]:
    """One line for each row, columns two spaces apart; with `numbers` all columns but the first end flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if numbers and i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
