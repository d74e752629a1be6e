"""Tables and cards of records, as text for a terminal and as HTML for a notebook."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from clore_client.errors import printable

MAX_ROWS = 20
MAX_WIDTH = 28  # characters of a cell, if its column does not say otherwise
GAP = "  "
NUMBER_STYLE = "text-align:right;padding:0.2em 0.6em;font-variant-numeric:tabular-nums"
TEXT_STYLE = "text-align:left;padding:0.2em 0.6em"
DIMMED_STYLE = "opacity:0.5"


class Column:
    """One column of a table.

    Attributes:
        heading: its heading, with the unit.
        text: returns the text of a record, or None.
        right: whether to align the column on the right, as numbers are.
        widest: the most characters of a cell; the rest is cut.
    """

    def __init__(
        self,
        heading: str,
        text: Callable[[Any], str | None],
        right: bool = False,
        widest: int = MAX_WIDTH,
    ) -> None:
        self.heading = heading
        self.text = text
        self.right = right
        self.widest = widest


def decimal(number: float | None, digits: int) -> str | None:
    """Return a number with a fixed number of digits, so that the numbers of a column align.

    A number that is too small or too large for that has an exponent.
    """
    if number is None:
        return None
    if number and not 0.5 * 10**-digits <= abs(number) < 1e9:
        return f"{number:.2g}"
    return f"{number:.{digits}f}"


def utc_time(seconds: float | None) -> str | None:
    """Return a Unix time as ``"2026-07-16 12:00"``, in UTC, or None."""
    import time

    if seconds is None:
        return None
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))
    except (ValueError, OverflowError, OSError):  # not a time at all
        return None


def cell_text(text: str | None, widest: int = MAX_WIDTH) -> str:
    """Return the text of a cell on one line, without characters that a terminal obeys."""
    if text is None or (len(text) <= widest and text.isascii() and text.isprintable()):
        return text or ""
    import unicodedata

    # Many combining marks on one letter would run over the lines above and below.
    composed = unicodedata.normalize("NFC", text[: 4 * widest])
    plain = printable("".join(c for c in composed if not unicodedata.combining(c)))
    return plain if len(plain) <= widest else f"{plain[: widest - 3]}..."


def text_width(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    import unicodedata

    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def cells_of(records: Sequence[Any], columns: Sequence[Column]) -> list[tuple[Column, list[str]]]:
    """Return each column with its cells, without the columns that have no text at all."""
    filled = [(c, [cell_text(c.text(record), c.widest) for record in records]) for c in columns]
    return [(column, cells) for column, cells in filled if any(cells)]


def text_table(records: Sequence[Any], columns: Sequence[Column], width: int) -> str:
    """Return a table as lines of text.

    The last columns are left out where the table would be wider than ``width``.

    Parameters:
        records: the rows; after ``MAX_ROWS`` of them, a last line says how many more there are.
        columns: the columns, the most important first.
        width: columns of the terminal.
    """
    lines: list[str] = []
    for column, cells in cells_of(records[:MAX_ROWS], columns):
        texts = [column.heading, *cells]
        widest = max(map(text_width, texts))
        if lines and text_width(lines[0]) + len(GAP) + widest > width:
            break
        padded = [_padded(text, widest, column.right) for text in texts]
        lines = [f"{a}{GAP}{b}" for a, b in zip(lines, padded, strict=True)] if lines else padded
    shown = [_cut(line.rstrip(), width) for line in lines]
    return "\n".join(shown + _rest(records))


def _padded(text: str, width: int, right: bool) -> str:
    blanks = " " * (width - text_width(text))
    return blanks + text if right else text + blanks


def _cut(line: str, width: int) -> str:
    """Cut a line at the width of a very narrow terminal."""
    while text_width(line) > max(width, 1):
        line = line[:-1]
    return line


def _rest(records: Sequence[Any]) -> list[str]:
    more = len(records) - MAX_ROWS
    return [f"... and {more} more"] if more > 0 else []


def html_table(
    records: Sequence[Any], columns: Sequence[Column], dimmed: Callable[[Any], bool]
) -> str:
    """Return a table as HTML.

    Parameters:
        records, columns: as for :func:`text_table`.
        dimmed: returns whether to show a record in a paler color.
    """
    from html import escape  # slow to import, and only notebooks need it

    shown = cells_of(records[:MAX_ROWS], columns)
    styles = [NUMBER_STYLE if column.right else TEXT_STYLE for column, _ in shown]
    head = "".join(
        f'<th style="{style}">{escape(column.heading)}</th>'
        for style, (column, _) in zip(styles, shown, strict=True)
    )
    rows = [f"<tr>{head}</tr>"]
    for record, *cells in zip(records[:MAX_ROWS], *(cells for _, cells in shown), strict=True):
        row = "".join(
            f'<td style="{style};white-space:nowrap">{escape(cell)}</td>'
            for style, cell in zip(styles, cells, strict=True)
        )
        rows.append(
            f'<tr style="{DIMMED_STYLE}">{row}</tr>' if dimmed(record) else f"<tr>{row}</tr>"
        )
    rest = "".join(f"<p>{line}</p>" for line in _rest(records))
    return f"<table><thead>{rows[0]}</thead><tbody>{''.join(rows[1:])}</tbody></table>{rest}"


def html_card(title: str, facts: Iterable[tuple[str, Any]]) -> str:
    """Return a table with one row for each fact that is not None, as HTML."""
    from html import escape

    def shown(value: Any) -> str:
        if isinstance(value, float):
            value = f"{value:.6g}"
        return escape(cell_text(str(value), 120))

    rows = "".join(
        f'<tr><th style="{TEXT_STYLE}">{shown(name)}</th>'
        f'<td style="{TEXT_STYLE}">{shown(value)}</td></tr>'
        for name, value in facts
        if value is not None
    )
    head = f'<th colspan="2" style="{TEXT_STYLE}">{shown(title)}</th>'
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
