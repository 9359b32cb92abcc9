"""Tables of text."""

from collections.abc import Collection, Iterable, Sequence


def format_table(rows: Iterable[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """The lines of a table. The first row is the header.

    `right` has the indices of the columns that are aligned on the right.
    """
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
