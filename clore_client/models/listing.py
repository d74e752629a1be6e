"""Show servers, orders and wallets: as tables, in files, and prices as a plot."""

from __future__ import annotations

import importlib
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any, ClassVar, NamedTuple, SupportsIndex, TypeVar, overload

from clore_client.errors import printable
from clore_client.models.order import Order
from clore_client.models.record import Record, Wallet
from clore_client.models.server import Server, is_mixed
from clore_client.validation import check_local_path, check_type, short_repr

Item = TypeVar("Item", bound=Record)
AnyListing = TypeVar("AnyListing", bound="Listing[Any]")

DEFAULT_WIDTH = 100  # columns, where there is no terminal
# The columns of to_dicts() whose unit is not in the name of the property.
UNIT_NAMES = {
    "price": "price_per_hour",
    "reliability": "reliability_percent",
    "started_at": "started_unix_seconds",
}
# A spreadsheet takes a text that starts with one of these as a formula.
FORMULA_STARTS = ("=", "+", "-", "@", "\N{FULLWIDTH EQUALS SIGN}", "\N{FULLWIDTH PLUS SIGN}",
                  "\N{FULLWIDTH HYPHEN-MINUS}", "\N{FULLWIDTH COMMERCIAL AT}")  # fmt: skip
MAX_ROWS = 20
MAX_WIDTH = 28  # characters of a cell, if its column does not say otherwise
GAP = "  "
NUMBER_STYLE = "text-align:right;padding:0.2em 0.6em;font-variant-numeric:tabular-nums"
TEXT_STYLE = "text-align:left;padding:0.2em 0.6em"
DIMMED_STYLE = "opacity:0.5"


# --- tables ---


class Column(NamedTuple):
    """One column of a table.

    Attributes:
        heading: its heading, with the unit.
        value: returns the value of a record, or None.
        right: whether to align the column on the right, as numbers are.
        widest: the most characters of a cell; the rest is cut.
    """

    heading: str
    value: Callable[[Any], Any]
    right: bool = False
    widest: int = MAX_WIDTH


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


def cell_text(value: Any, widest: int = MAX_WIDTH) -> str:
    """Return a value on one line, in printable ASCII; the rest is escaped."""
    text = "" if value is None else str(value)
    plain = printable(text[:widest].encode("ascii", "backslashreplace").decode())
    cut = len(plain) > widest or len(text) > widest
    return re.sub(r"\\([xuU][0-9a-f]{0,7})?$", "", plain[: widest - 3]) + "..." if cut else plain


def cells_of(records: Sequence[Any], columns: Sequence[Column]) -> list[tuple[Column, list[str]]]:
    """Return each column with its cells, without the columns that are empty."""
    filled = [(c, [cell_text(c.value(record), c.widest) for record in records]) for c in columns]
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
        widest = max(map(len, texts))
        if lines and len(lines[0]) + len(GAP) + widest > width:
            break
        padded = [text.rjust(widest) if column.right else text.ljust(widest) for text in texts]
        lines = [f"{a}{GAP}{b}" for a, b in zip(lines, padded, strict=True)] if lines else padded
    return "\n".join([line.rstrip()[: max(width, 1)] for line in lines] + _rest(records))


def _rest(records: Sequence[Any]) -> list[str]:
    more = len(records) - MAX_ROWS
    return [f"... and {more} more"] if more > 0 else []


def html_table(records: Sequence[Any], columns: Sequence[Column], dimmed: str) -> str:
    """Return a table as HTML.

    Parameters:
        records, columns: as for :func:`text_table`.
        dimmed: the property that shows a record in a paler color; empty for none.
    """
    from html import escape  # slow to import, and only notebooks need it

    shown = cells_of(records[:MAX_ROWS], columns)
    styles = [NUMBER_STYLE if column.right else TEXT_STYLE for column, _ in shown]

    def row(tag: str, texts: Iterable[str], style: str = "") -> str:
        cells = "".join(
            f'<{tag} style="{cell_style}">{escape(text)}</{tag}>'
            for cell_style, text in zip(styles, texts, strict=True)
        )
        return f'<tr style="{style}">{cells}</tr>'

    head = row("th", (column.heading for column, _ in shown))
    body = "".join(
        row("td", texts, DIMMED_STYLE if getattr(record, dimmed, False) else "")
        for record, *texts in zip(records[:MAX_ROWS], *(cells for _, cells in shown), strict=True)
    )
    rest = "".join(f"<p>{line}</p>" for line in _rest(records))
    table = f"<thead>{head}</thead><tbody>{body}</tbody>"
    return f'<table style="white-space:nowrap">{table}</table>{rest}'


def html_card(title: str, values: Iterable[tuple[str, Any]]) -> str:
    """Return a table with one row for each value that is not None, as HTML."""
    from html import escape

    def shown(value: Any) -> str:
        return escape(cell_text(f"{value:.6g}" if isinstance(value, float) else value, 120))

    rows = "".join(
        f'<tr><th style="{TEXT_STYLE}">{shown(name)}</th>'
        f'<td style="{TEXT_STYLE}">{shown(value)}</td></tr>'
        for name, value in values
        if value is not None
    )
    head = f'<th colspan="2" style="{TEXT_STYLE}">{shown(title)}</th>'
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


# --- lists ---


class Listing(list[Item]):
    """A list of records that shows as a table, in a terminal and in a notebook.

    It is a list in every other way. Slices, copies and sums are of the same type.

    Attributes:
        report: what a search left out and why, or None.
    """

    report: Any = None
    _things: ClassVar[str] = "records"
    _columns: ClassVar[tuple[Column, ...]] = ()
    _record: ClassVar[type[Record]] = Record
    _dimmed: ClassVar[str] = ""  # the property that shows a record in a paler color

    @overload
    def __getitem__(self, index: SupportsIndex, /) -> Item: ...

    @overload
    def __getitem__(self: AnyListing, index: slice, /) -> AnyListing: ...

    def __getitem__(self, index: Any, /) -> Any:
        found = super().__getitem__(index)
        return self._like(found) if isinstance(index, slice) else found

    def __add__(self: AnyListing, other: Any) -> AnyListing:  # type: ignore[override]
        return type(self)(super().__add__(other)) if isinstance(other, list) else NotImplemented

    def __radd__(self: AnyListing, other: Any) -> AnyListing:
        return type(self)([*other, *self]) if isinstance(other, list) else NotImplemented

    def copy(self: AnyListing) -> AnyListing:
        """Return a list of the same type with the same records."""
        return self._like(self)

    def _like(self: AnyListing, records: Iterable[Any]) -> AnyListing:
        twin = type(self)(records)
        twin.report = self.report
        return twin

    def __repr__(self) -> str:
        if not self:
            hint = "" if self.report is None else "; .explain() says why"
            return f"<{type(self).__name__}: no {self._things}{hint}>"
        import shutil

        width = shutil.get_terminal_size((DEFAULT_WIDTH, 0)).columns
        return text_table(self, self._columns, width)

    __str__ = __repr__

    def _repr_html_(self) -> str:
        if not self:
            from html import escape

            return f"<p>{escape(repr(self))}</p>"
        return html_table(self, self._columns, self._dimmed)

    def explain(self) -> str:
        """Return a text that says what a search left out, and why.

        Example:
            >>> print(client.get_marketplace().explain())
            nothing was excluded
        """
        return "nothing was excluded" if self.report is None else str(self.report)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return one flat dict for each record, with units in the names, for a table or a file.

        Credentials are not in it. Text of strangers is in it as the API sent it.

        Example:
            >>> client.get_wallets().to_dicts()[0]
            {'name': 'bitcoin', 'balance': 0.0419, 'deposit_address': 'bc1...'}
        """
        headings = list(zip(self._headings(), self._record.FIELDS, strict=True))
        return [{heading: getattr(record, name) for heading, name in headings} for record in self]

    def _headings(self) -> list[str]:
        return [UNIT_NAMES.get(name, name) for name in self._record.FIELDS]

    def to_pandas(self) -> Any:
        """Return the rows of :meth:`to_dicts` as a ``pandas.DataFrame``.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            pandas = importlib.import_module("pandas")
        except ImportError as error:
            raise ImportError("to_pandas() needs pandas: pip install pandas") from error
        return pandas.DataFrame(self.to_dicts(), columns=self._headings())

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the rows of :meth:`to_dicts` to a CSV file in UTF-8, and replace an old one.

        Control characters are escaped. A text that a spreadsheet would take for a formula gets a
        ``'`` in front.

        Parameters:
            path: the file.
        """
        import csv

        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self._headings())
            writer.writeheader()
            for row in self.to_dicts():
                writer.writerow({name: _csv_cell(value) for name, value in row.items()})


def _csv_cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.lstrip().startswith(FORMULA_STARTS) else text


def _number(heading: str, name: str, digits: int) -> Column:
    return Column(heading, lambda record: decimal(getattr(record, name), digits), right=True)


def _text(heading: str, name: str, **options: Any) -> Column:
    return Column(heading, attrgetter(name), **options)


class ServerList(Listing[Server]):
    """A list of servers."""

    _things = "servers"
    _record = Server
    _columns = (
        _text("id", "id", right=True),
        _text("gpu", "gpu"),
        _number("USD/h", "usd_per_hour", 4),
        _number("spot USD/h", "spot_usd_per_hour", 4),
        _number("reliable %", "reliability", 2),
        _text("country", "country"),
        Column("rented", lambda server: "rented" if server.rented else None),
        _number("VRAM GB", "vram_gb", 0),
        _number("RAM GB", "ram_gb", 0),
        _number("USD/GPU h", "usd_per_gpu_hour", 4),
        _number("disk GB", "disk_gb", 0),
        _text("cores", "cpu_cores", right=True),
        _number("down Mbps", "download_mbps", 0),
        _text("CUDA", "cuda_version", right=True),
    )
    _dimmed = "rented"


class OrderList(Listing[Order]):
    """A list of orders."""

    _things = "orders"
    _record = Order
    _columns = (
        _text("id", "id", right=True),
        _text("status", "status"),
        _text("gpu", "gpu"),
        _number("USD/h", "usd_per_hour", 4),
        _number("cost USD", "cost_usd", 4),
        _text("currency", "currency"),
        _number("price/h", "price", 4),
        _text("server", "server_id", right=True),
        Column("started UTC", lambda order: utc_time(order.started_at)),
        _text("ssh", "ssh_command", widest=60),
        _text("image", "image", widest=60),
    )
    _dimmed = "has_ended"


class WalletList(Listing[Wallet]):
    """A list of wallets."""

    _things = "wallets"
    _record = Wallet
    _columns = (
        _text("name", "name"),
        _number("balance", "balance", 8),
        _number("USD", "balance_usd", 2),
        _text("deposit address", "deposit_address", widest=60),
    )


# --- the plot of prices ---

# One color for each of the most frequent models.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#9467bd",
          "#a0a000", "#17becf")  # fmt: skip
OTHER_COLOR = "#c0c0c0"
PICTURES = (".png", ".svg", ".pdf")
NAME_LENGTH = 24  # characters
Points = list[tuple[float, float]]  # (reliability, USD per GPU hour)


def prices_by_model(servers: Iterable[Server]) -> dict[str, Points]:
    """Return the points of the plot by model, the most frequent model first.

    Servers without a name, a price or a reliability are left out, and those with several models.
    """
    models: dict[str, Points] = {}
    for server in servers:
        price, reliability = server.usd_per_gpu_hour, server.reliability
        if server.gpu_name and price and reliability is not None and not is_mixed(server):
            models.setdefault(server.gpu_name, []).append((reliability, price))
    return dict(sorted(models.items(), key=lambda item: -len(item[1])))


def check_plot(servers: Any, path: Any) -> None:
    """Check the arguments of ``plot_prices``."""
    given = () if servers is None else servers
    if not isinstance(given, (list, tuple)) or not all(isinstance(s, Server) for s in given):
        shown = short_repr(servers)
        raise TypeError(f"servers must be a list of servers, as of find_servers(), not {shown}")
    if path is None:
        return
    check_type("path", path, "a path", str, os.PathLike)
    check_local_path("path", path)
    if os.path.splitext(os.fsdecode(path))[1] not in PICTURES:
        raise ValueError(f"path must end with one of {PICTURES}, not {short_repr(path)}")


def plot_server_prices(servers: Iterable[Server], path: str | os.PathLike[str] | None) -> Any:
    """Plot the price per GPU hour against the reliability, with a color for each model.

    Parameters:
        servers: the servers.
        path: a picture file to write; with None, pyplot shows the plot.

    Returns:
        The ``matplotlib.axes.Axes``, and not the figure, which a notebook would show twice.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no server has a price and a reliability.
    """
    models = prices_by_model(servers)
    try:
        # pyplot shows a figure by itself, in a notebook or a window; a file needs no window.
        if path is None:
            new_figure = importlib.import_module("matplotlib.pyplot").figure
        else:
            new_figure = importlib.import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise ImportError("plot_prices() needs matplotlib: pip install matplotlib") from error
    if not models:
        raise ValueError("servers must have a price and a reliability, but none of them has both")
    import statistics  # imported here, because it is slow

    figure = new_figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    colors = dict(zip(models, COLORS, strict=False))
    medians = {name: statistics.median(price for _, price in models[name]) for name in colors}
    others = [point for name, points in models.items() if name not in colors for point in points]
    style = {"s": 16, "alpha": 0.7, "linewidths": 0}
    if others:
        label = f"{len(models) - len(colors)} other models"
        axes.scatter(*zip(*others, strict=True), color=OTHER_COLOR, label=label, **style)
    for name, median in sorted(medians.items(), key=lambda item: item[1]):
        label = f"{printable(name, NAME_LENGTH)}  {median:.3g}"
        # matplotlib hides a label that starts with _, and takes a $ for a formula.
        label = label.lstrip("_").replace("$", r"\$")
        axes.scatter(*zip(*models[name], strict=True), color=colors[name], label=label, **style)
    axes.legend(
        loc="upper left", bbox_to_anchor=(1, 1), frameon=False, handletextpad=0, reverse=True
    )
    _set_up_axes(axes, [point for points in models.values() for point in points])
    if path is not None:
        figure.savefig(path, dpi=150)
    return axes


def _set_up_axes(axes: Any, points: Points) -> None:
    ticker = importlib.import_module("matplotlib.ticker")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel("reliability in %")
    # A few unreliable servers would push all others into a corner.
    least = math.floor(sorted(reliability for reliability, _ in points)[len(points) // 20])
    hidden = sum(reliability < least for reliability, _ in points)
    if hidden and least < 100:
        axes.set_xlim(least, 100 + 0.02 * (100 - least))
        axes.set_xlabel(f"reliability in % (not shown: {hidden} below {least})")
    axes.set_ylabel("USD per GPU hour, on demand, without fees")
    axes.set_title(f"Prices of {len(points)} servers by GPU model, with the median of each model")
    axes.grid(True, which="major", alpha=0.3)
    axes.set_axisbelow(True)
