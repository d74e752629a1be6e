"""Lists of records: they behave as lists, and print as tables."""

from __future__ import annotations

import copy
import csv
import inspect
import json
import pickle
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clore_client import CloreClient, Order, OrderList, Server, ServerList, Wallet, WalletList
from tests.conftest import MakeSim, client_for

EVIL = "\x1b[2J\u202e<script>alert(1)</script>\r\n"


def server(number: int, **fields: Any) -> Server:
    return Server(
        {
            "id": number,
            "gpu_array": ["RTX 4090", "RTX 4090"],
            "price": {"usd": {"on_demand_clore": 0.25 + number / 1000, "spot": None}},
            "reliability": 97.31,
            "rented": False,
            "specs": {"gpuram": 23, "ram": 31.81, "net": {"cc": "NO"}},
            **fields,
        }
    )


def servers(count: int) -> ServerList:
    return ServerList(server(number) for number in range(count))


def lines_of(listing: Any, monkeypatch: pytest.MonkeyPatch, width: int = 100) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(width))
    return repr(listing).split("\n")


class Page(HTMLParser):
    """The rows of a page, with the style of each row, and its tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.styles: list[str] = []
        self.tags: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
            self.styles.append(dict(attrs).get("style") or "")
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


# --- a list ---


def test_it_is_a_list() -> None:
    found = servers(3)
    assert found == list(found)
    assert list(found) == found
    assert json.loads(json.dumps(found)) == [dict(s) for s in found]
    assert isinstance(found, list)
    assert found[1]["id"] == 1
    assert [s.id for s in reversed(found)] == [2, 1, 0]


def test_slices_sums_copies_and_sorting_keep_the_type() -> None:
    found = servers(4)
    found.report = "one is too expensive"
    for part in (found[:2], found[::-1], found.copy(), copy.copy(found), copy.deepcopy(found),
                 pickle.loads(pickle.dumps(found))):  # fmt: skip
        assert type(part) is ServerList
        assert part.explain() == "one is too expensive"
    for both in (found + list(servers(1)), list(servers(1)) + found, found + servers(1)):
        assert type(both) is ServerList
        assert len(both) == 5
    with pytest.raises(TypeError):
        found + tuple(found)
    found.sort(key=lambda s: -(s.id or 0))
    found += [server(9)]
    assert type(found) is ServerList
    assert [s.id for s in found] == [3, 2, 1, 0, 9]


def test_what_the_client_returns(make_sim: MakeSim) -> None:
    client = client_for(make_sim())
    kinds = [
        (client.get_wallets(), WalletList),
        (client.get_marketplace(), ServerList),
        (client.find_servers("RTX 4090"), ServerList),
        (client.get_orders(), OrderList),
    ]
    for listing, kind in kinds:
        assert type(listing) is kind
    assert client.get_marketplace().explain() == "nothing was excluded"
    assert repr(client.get_orders()) == "<OrderList: no orders>"


def test_a_search_explains_what_it_left_out(client: CloreClient) -> None:
    found = client.find_servers("RTX 4090")
    assert "gpu_type='RTX 4090' left out" in found.explain()
    assert found[:1].explain() == found.explain()
    none = client.find_servers("RTX 4090", max_price_usd=0.0001)
    assert repr(none) == "<ServerList: no servers; .explain() says why>"
    assert "of which the cheapest costs" in none.explain()


def test_an_empty_list_with_a_report_names_explain() -> None:
    found = ServerList()
    assert repr(found) == "<ServerList: no servers>"
    found.report = "min_reliability left out 7"
    assert repr(found) == "<ServerList: no servers; .explain() says why>"
    assert found.explain() == "min_reliability left out 7"
    assert "&lt;ServerList" in found._repr_html_()


# --- a table in a terminal ---


def test_a_table_of_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ServerList([server(7), server(12345, rented=True, reliability=8.5)])
    assert lines_of(found, monkeypatch) == [
        "   id  gpu            USD/h  reliable %  country  rented  VRAM GB  RAM GB  USD/GPU h",
        "    7  2x RTX 4090   0.2570       97.31  NO                    23      32     0.1285",
        "12345  2x RTX 4090  12.5950        8.50  NO       rented       23      32     6.2975",
    ]


@pytest.mark.parametrize("width", [1, 10, 40, 79, 80, 100, 200])
def test_a_table_fits_its_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    lines = lines_of(servers(200), monkeypatch, width)
    assert max(map(len, lines[:-1])) <= width
    assert len(lines) == 22
    assert lines[-1] == "... and 180 more"
    assert lines_of(servers(20), monkeypatch, width)[-1] != lines[-1]
    assert len(lines_of(servers(20), monkeypatch, width)) == 21


def test_odd_numbers_stay_short(monkeypatch: pytest.MonkeyPatch) -> None:
    prices = (1e300, 1e-9, 0.00004, 1e8)
    found = ServerList(server(1, price={"usd": {"on_demand_clore": p}}) for p in prices)
    shown = [line.split()[-6] for line in lines_of(found, monkeypatch)[1:]]
    assert shown == ["1e+300", "1e-09", "4e-05", "100000000.0000"]


def test_hostile_text_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    zalgo = "R" + "\u0336" * 100
    found = ServerList([server(1, gpu_array=[EVIL]), server(2, gpu_array=[zalgo]),
                        server(3, gpu_array=["x" * 9999], cuda_version=EVIL)])  # fmt: skip
    lines = lines_of(found, monkeypatch)
    assert len(lines) == 4
    assert all(line.isascii() and line.isprintable() for line in lines)
    assert max(map(len, lines)) <= 100
    torn = r"\\(x[0-9a-f]?|u[0-9a-f]{0,3}|U[0-9a-f]{0,7})?\.\.\."
    assert not any(re.search(torn, line) for line in lines)
    orders = OrderList([Order(order_id=1, status=EVIL, image=EVIL, currency=EVIL)])
    wallets = WalletList([Wallet(name=EVIL, deposit_address=EVIL)])
    for listing in (orders, wallets):
        assert all(line.isprintable() for line in lines_of(listing, monkeypatch))


def test_a_table_of_5000_servers_shows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = servers(5000)
    start = time.perf_counter()
    assert lines_of(found, monkeypatch)[-1] == "... and 4980 more"
    assert found._repr_html_()
    assert time.perf_counter() - start < 0.1


def test_orders_and_wallets(monkeypatch: pytest.MonkeyPatch) -> None:
    order = Order(order_id=5, renting_server=7, status="running", price=0.25, gpu_array=["A40"],
                  currency="USD-Blockchain", started=1784203200, image="ubuntu",
                  connection={"ssh": "ssh root@h -p 1"}, ssh_password="geheim")  # fmt: skip
    lines = lines_of(OrderList([order]), monkeypatch, 200)
    assert lines[1].split("  ")[0] == " 5"
    for part in ("running", "1x A40", "0.2500", "2026-07-16 12:00", "ssh root@h -p 1"):
        assert part in lines[1]
    assert "geheim" not in "".join(lines)
    order = Order(order_id=1958009, status="running", renting_server=7, currency="CLORE-Blockchain",
                  price=46.5188, gpu_array=["RTX 4090"], price_usd_per_hour=0.1)  # fmt: skip
    for width in range(1, 200):  # a price without its currency would be taken for USD
        heading = lines_of(OrderList([order]), monkeypatch, width)[0]
        assert "price/h" not in heading or "currency" in heading
    assert "price/h" in heading
    wallet = Wallet(name="bitcoin", balance=0.0419, deposit_address="bc1")
    assert lines_of(WalletList([wallet]), monkeypatch) == [
        "name        balance  deposit address",
        "bitcoin  0.04190000  bc1",
    ]


# --- a table in a notebook ---


def test_a_table_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ServerList([server(7), server(8, rented=True)]) + servers(30)
    page = Page(found._repr_html_())
    assert page.rows[0] == re.split("  +", lines_of(found, monkeypatch, 300)[0].strip())
    assert page.rows[1][:3] == ["7", "2x RTX 4090", "0.2570"]
    assert [bool(style) for style in page.styles[1:4]] == [False, True, False]
    assert "opacity" in page.styles[2]
    assert len(page.rows) == 21
    assert "... and 12 more" in found._repr_html_()
    ended = OrderList([Order(order_id=1, status="expired"), Order(order_id=2, status="running")])
    assert [bool(style) for style in Page(ended._repr_html_()).styles] == [False, True, False]


def test_cards() -> None:
    rows = dict(Page(server(7)._repr_html_()).rows[1:])
    assert Page(server(7)._repr_html_()).rows[0] == ["Server 7"]
    assert (rows["gpu_name"], rows["gpu_count"], rows["usd_per_hour"]) == ("RTX 4090", "2", "0.257")
    order = Order(order_id=5, status="running", started=1784203200, ssh_password="geheim")
    card = order._repr_html_()
    assert dict(Page(card).rows[1:])["started_at"] == "2026-07-16 12:00 UTC"
    assert "geheim" not in card
    preview = Order(usd_per_hour=1.0, body={"image": "x", "ssh_password": "geheim"})
    assert "image" in preview._repr_html_()
    assert "geheim" not in preview._repr_html_()


def test_hostile_text_in_a_notebook() -> None:
    things: list[Any] = [
        server(1, gpu_array=[EVIL], cuda_version=EVIL),
        Order(order_id=EVIL, status=EVIL),
        Wallet(name=EVIL, deposit_address=EVIL),
    ]
    pages = [thing._repr_html_() for thing in things]
    pages += [ServerList(things[:1])._repr_html_(), OrderList(things[1:2])._repr_html_(),
              WalletList(things[2:])._repr_html_()]  # fmt: skip
    for page in pages:
        assert Page(page).tags <= {"table", "thead", "tbody", "tr", "th", "td", "p"}
        assert page.isprintable()


# --- files and DataFrames ---


def test_flat_dicts() -> None:
    (row,) = ServerList([server(7)]).to_dicts()
    assert row["usd_per_hour"] == 0.257
    assert row["reliability_percent"] == 97.31
    assert (row["gpu_name"], row["gpu_count"], row["vram_gb"]) == ("RTX 4090", 2, 23)
    assert not any(isinstance(value, (dict, list)) for value in row.values())
    (row,) = OrderList([Order(order_id=5, price=0.5, ssh_password="geheim")]).to_dicts()
    assert row["price_per_hour"] == 0.5
    assert "geheim" not in str(row)


def test_a_csv_file(tmp_path: Path) -> None:
    formulas = ["=1+1", "+1", "-1", "@x", " =1", "\t=1", "\n=1", "\uff1d1"]
    found = ServerList([server(0)] + [server(1, gpu_array=["A", "A"], cuda_version=formula)
                                      for formula in formulas])  # fmt: skip
    found[0]["cuda_version"] = 'a "b", c'
    found[0]["gpu_array"] = [EVIL]
    path = tmp_path / "servers.csv"
    found.to_csv(path)
    assert all(line.isprintable() for line in path.read_text("utf-8").splitlines())
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(found.to_dicts()[0])
    assert rows[0]["cuda_version"] == 'a "b", c'
    assert float(rows[0]["usd_per_hour"]) == 0.25
    assert len(rows) == len(found)
    for row in rows[1:]:
        assert row["cuda_version"][0] == "'" or row["cuda_version"].startswith(("\\t", "\\n"))
    ServerList().to_csv(path)
    assert path.read_text("utf-8").strip() == ",".join(rows[0])


def test_a_data_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    pandas = pytest.importorskip("pandas")
    frame = servers(3).to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame["usd_per_hour"]) == [0.25, 0.251, 0.252]
    assert list(ServerList().to_pandas().columns) == list(frame.columns)
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        servers(3).to_pandas()


# --- names ---


@pytest.mark.parametrize(
    "record",
    [
        server(7, cuda_version="13.0"),
        Order(order_id=5, renting_server=7, status="running", price=0.25, gpu_array=["A40"],
              currency="USD-Blockchain", started=1784203200, image="ubuntu", spot=True,
              connection={"ssh": "ssh root@h -p 1"}, ssh_password="geheim"),
        Order(usd_per_hour=1.0, body={"image": "x"}),
        Wallet(name="bitcoin", balance=1.0, deposit_address="bc1"),
    ],
)  # fmt: skip
def test_the_names_in_a_repr_work(record: Any) -> None:
    names = re.findall(r"[ (](\w+)=", repr(record))
    assert names
    for name in names:
        assert name in dir(record), name
        value = getattr(record, name)
        assert value is not None
        assert name == "ssh_password" or f"{name}={value!r}" in repr(record), name


@pytest.mark.parametrize("kind", [Server, Order, Wallet])
def test_dir_shows_what_is_meant_to_be_used(kind: Any) -> None:
    names = dir(kind())
    properties = [n for n, v in inspect.getmembers(kind) if isinstance(v, property)]
    assert set(properties) <= set(names)
    assert not {"clear", "pop", "update", "fromkeys"} & set(names)
    assert not any(name.startswith("_") for name in names)
    for name in properties:
        assert inspect.getdoc(getattr(kind, name)), name


@pytest.mark.internal
def test_dir_of_the_package_shows_what_it_exports() -> None:
    import clore_client

    assert dir(clore_client) == sorted(clore_client.__all__)
    assert "ServerList" in dir(clore_client)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
inner_names = ["usd", "spot", "on_demand_clore", "gpu", "gpuram", "net", "cc", "ssh"]
values = (
    scalars
    | st.lists(scalars, max_size=3)
    | st.dictionaries(st.sampled_from(inner_names), scalars, max_size=3)
)
fields = st.dictionaries(
    st.sampled_from(["id", "order_id", "gpu_array", "price", "specs", "rented", "reliability",
                     "started", "status", "name", "balance", "body", "connection", "currency"]),
    values,
    max_size=5,
)  # fmt: skip


@given(st.lists(fields, max_size=3))
def test_no_record_breaks_a_table(records: list[dict[str, Any]]) -> None:
    for kind, of in ((ServerList, Server), (OrderList, Order), (WalletList, Wallet)):
        made: list[Any] = [of(record) for record in records]
        listing: Any = kind(made)
        assert all(line.isprintable() for line in repr(listing).split("\n"))
        assert listing._repr_html_().isprintable()
        assert all(item._repr_html_().isprintable() for item in listing)
        assert len(listing.to_dicts()) == len(records)
