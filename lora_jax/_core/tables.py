"""Tables of text, and the same tables for notebooks."""

import html
from collections.abc import Collection, Iterable, Sequence
from typing import Any

_MOST = 60  # rows of a table in a notebook, and lines below it


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


def format_html(
    rows: Iterable[Sequence[str]],
    right: Collection[int] = (),
    notes: Sequence[str] = (),
    foot: int = 0,
) -> str:
    """The HTML of a table, with notes below it. The first row is the header.

    All texts are escaped. Of many rows and notes the first are shown, and how many more
    there are. `right` is as in `format_table`; the last `foot` rows are always shown.
    """
    header, *body = rows
    end = len(body) - foot
    shown, last = _shortened(body[:end]), body[end:]
    if len(shown) < end:
        more = [f"... and {end - len(shown)} more rows", *[""] * (len(header) - 1)]
        last = [more, *last]
    lines = _shortened(notes)
    if len(lines) < len(notes):
        lines = [*lines, f"... and {len(notes) - len(lines)} more lines"]
    parts = ["<table>", _html_row("th", header, right)]
    parts += [_html_row("td", row, right) for row in (*shown, *last)]
    parts += ["</table>", *(f"<pre>{html.escape(line)}</pre>" for line in lines)]
    return "\n".join(parts)


def _shortened(items: Sequence[Any]) -> Sequence[Any]:
    """The first items, if there are many. One item is never left out."""
    return items if len(items) <= _MOST + 1 else items[:_MOST]


def _html_row(tag: str, row: Sequence[str], right: Collection[int]) -> str:
    cells = (
        f'<{tag} style="text-align:{"right" if i in right else "left"}">'
        f"{html.escape(cell)}</{tag}>"
        for i, cell in enumerate(row)
    )
    return f"<tr>{''.join(cells)}</tr>"
