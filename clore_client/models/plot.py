"""Plot prices of servers with matplotlib."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Iterable
from typing import Any

from clore_client.errors import printable
from clore_client.models.server import Server, is_mixed
from clore_client.validation import check_local_path, check_type, short_repr

# One for each of the most frequent models; all others have the last color.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#9467bd",
          "#a0a000", "#17becf")  # fmt: skip
OTHER_COLOR = "#c0c0c0"
LABEL_HEIGHT = 0.05  # of the height of the plot
PICTURES = (".png", ".svg", ".pdf")
NAME_LENGTH = 24  # characters
Points = list[tuple[float, float]]  # (reliability, USD per GPU hour)


def prices_by_model(servers: Iterable[Server]) -> dict[str, Points]:
    """Return the points of the plot by model, the most frequent model first.

    Servers without a name, a price or a reliability are left out, and mixed rigs, whose price is of
    several models.
    """
    models: dict[str, Points] = {}
    for server in servers:
        price, reliability = server.usd_per_gpu_hour, server.reliability
        if server.gpu_name and price and reliability is not None and not is_mixed(server):
            models.setdefault(server.gpu_name, []).append((reliability, price))
    return dict(sorted(models.items(), key=lambda item: -len(item[1])))


def check_plot(servers: Any, path: Any) -> None:
    """Check the arguments of ``plot_prices``."""
    if servers is not None and (
        not isinstance(servers, (list, tuple))
        or not all(isinstance(server, Server) for server in servers)
    ):
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
        The ``matplotlib.axes.Axes``. A notebook would show a figure twice.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no server has a price and a reliability.
    """
    models = prices_by_model(servers)
    try:
        # pyplot shows a figure by itself, in a notebook or a window; a file needs no window.
        new_figure = (
            importlib.import_module("matplotlib.figure").Figure
            if path is not None
            else importlib.import_module("matplotlib.pyplot").figure
        )
    except ImportError as error:
        raise ImportError("plot_prices() needs matplotlib: pip install matplotlib") from error
    if not models:
        raise ValueError("servers must have a price and a reliability, but none of them has both")
    figure = new_figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    colors = dict(zip(models, COLORS, strict=False))
    for name, points in reversed(models.items()):  # the frequent ones on top of the others
        color = colors.get(name, OTHER_COLOR)
        axes.scatter(*zip(*points, strict=True), s=16, color=color, alpha=0.7, linewidths=0)
    _set_up_axes(axes, [point for points in models.values() for point in points])
    _label_models(axes, models, colors)
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


def _label_models(axes: Any, models: dict[str, Points], colors: dict[str, str]) -> None:
    """Write each name beside the plot, as near to its median price as there is room."""
    import statistics  # imported here, because it is slow

    bottom, top = (math.log(limit) for limit in axes.get_ylim())
    medians = {name: statistics.median(price for _, price in models[name]) for name in colors}
    height = -math.inf
    labels = []
    for name, median in sorted(medians.items(), key=lambda item: item[1]):
        height = max(height + LABEL_HEIGHT, (math.log(median) - bottom) / (top - bottom))
        labels.append((height, colors[name], f"{printable(name, NAME_LENGTH)}  {median:.3g}"))
    if len(models) > len(colors):
        labels.append(
            (height + LABEL_HEIGHT, "#808080", f"{len(models) - len(colors)} other models")
        )
    above = max(0.0, labels[-1][0] - 1)
    for height, color, text in labels:
        # A $ would start a formula.
        axes.text(1.01, height - above, text.replace("$", r"\$"), color=color, va="center",
                  transform=axes.transAxes)  # fmt: skip
