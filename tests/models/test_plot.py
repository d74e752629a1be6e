"""plot_prices(): what the picture shows, also with odd values."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from clore_client import CloreClient, Server, ServerList
from tests.conftest import client_for
from tests.variant import Simulator

pytest.importorskip("matplotlib").use("Agg")


def server(name: str, price: float | None, reliability: Any = 97.0, count: int = 1) -> Server:
    prices = {"usd": {"on_demand_clore": price}}
    return Server(gpu_array=[name] * count, price=prices, reliability=reliability)


def points_of(axes: Any) -> list[tuple[float, float]]:
    return sorted(tuple(p) for dots in axes.collections for p in dots.get_offsets().tolist())


def texts_of(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.fixture
def plotter() -> CloreClient:
    return CloreClient(base_url="http://127.0.0.1:9")


def test_it_plots_the_market(sim: Simulator, tmp_path: Path) -> None:
    from matplotlib import pyplot

    client = client_for(sim)
    path = tmp_path / "prices.png"
    axes = client.plot_prices(path=path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert pyplot.get_fignums() == []
    listed = client.get_marketplace()
    expected = sum(bool(s.usd_per_hour and s.gpu_name and s.reliability) for s in listed)
    assert len(points_of(axes)) == expected
    assert axes.get_yscale() == "log"
    assert "reliability" in axes.get_xlabel()
    assert axes.get_ylabel() == "USD per GPU hour, on demand, without fees"


def test_a_price_is_that_of_one_gpu(plotter: CloreClient, tmp_path: Path) -> None:
    listed = ServerList([server("RTX 4090", 0.5, 99.0), server("RTX 4090", 1.2, 98.0, 4),
                         server("A100", 2.0, 97.0, 2), server("A100", None),
                         server("A100", 1.0, None)])  # fmt: skip
    axes = plotter.plot_prices(listed, tmp_path / "a.svg")
    assert points_of(axes) == [(97.0, 1.0), (98.0, 0.3), (99.0, 0.5)]
    assert texts_of(axes) == ["A100  1", "RTX 4090  0.4"]
    assert "3 servers" in axes.get_title()


def test_many_models_and_a_few_unreliable_servers(plotter: CloreClient, tmp_path: Path) -> None:
    listed = [server(f"Model {n % 15}", 0.1 + n % 15 / 100, 90.0 + n % 10) for n in range(300)]
    listed += [server("Model 0", 0.1, 1.0)] * 3
    axes = plotter.plot_prices(listed, tmp_path / "a.png")
    assert len(texts_of(axes)) == 11
    assert texts_of(axes)[-1] == "5 other models"
    assert axes.get_xlabel() == "reliability in % (not shown: 3 below 90)"
    assert len({tuple(dots.get_facecolor()[0]) for dots in axes.collections}) == 11


@pytest.mark.parametrize(
    "name", [r"$\frac{", "$x$", "_hidden", "\x1b[2J\u202e", "x" * 10_000, "显卡"]
)
def test_hostile_names(plotter: CloreClient, tmp_path: Path, name: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the font has no Chinese
        axes = plotter.plot_prices([server(name, 0.1)], tmp_path / "a.png")
    (text,) = texts_of(axes)
    assert text.isprintable()
    assert len(text) < 80


@pytest.mark.parametrize("price", [5e-324, 1e-300, 1e300])
def test_absurd_prices(plotter: CloreClient, tmp_path: Path, price: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plotter.plot_prices([server("A", price), server("B", 0.1)], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 0


@pytest.mark.parametrize("servers", [5, "x", [5], {"a": 1}, [None], object()])
def test_what_is_no_list_of_servers(sim: Simulator, servers: Any) -> None:
    with pytest.raises(TypeError, match="servers must be a list of servers"):
        client_for(sim).plot_prices(servers)


@pytest.mark.parametrize("path", ["", "x", "a.gif", "\0.png", 5, b"x.png", "x" * 5000 + ".png"])
def test_what_is_no_path_of_a_picture(sim: Simulator, path: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="path"):
        client_for(sim).plot_prices(path=path)
    assert sim.requests == []


def test_nothing_to_plot(plotter: CloreClient) -> None:
    with pytest.raises(ValueError, match="must have a price and a reliability"):
        plotter.plot_prices([server("A", None)])


def test_without_a_path_pyplot_has_the_figure(plotter: CloreClient) -> None:
    from matplotlib import pyplot

    axes = plotter.plot_prices([server("A", 0.1)])
    assert [pyplot.gcf()] == [axes.figure]
    pyplot.close("all")


def test_without_matplotlib(plotter: CloreClient, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib.pyplot", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    for path in (None, "a.png"):
        with pytest.raises(ImportError, match="pip install matplotlib"):
            plotter.plot_prices([server("A", 0.1)], path)
