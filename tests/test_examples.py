"""The README's code and every example, run as a user runs them."""

from __future__ import annotations

import inspect
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from clore_client import CloreClient, Order, Server, Wallet
from tests.conftest import MakeSim, client_for
from tests.variant import Simulator

pytestmark = pytest.mark.internal  # the examples use the one file anyway

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
# The examples use the client's default limits, so the simulator can have any limits.
EASY = {"ssh": True, "rate_limit": 0.5, "create_order_interval": 0.5, "servers": 200}


def environment(sim: Simulator) -> dict[str, str]:
    return {**os.environ, "CLORE_BASE_URL": sim.url, "CLORE_API_KEY": sim.api_key,
            "PYTHONPATH": str(ROOT)}  # fmt: skip


def run(sim: Simulator, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], env=environment(sim), cwd=ROOT / "examples",
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def section(heading: str) -> str:
    """Return the section of the README with a heading."""
    return README.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]


BLOCKS = [
    (heading, code)
    for heading in re.findall(r"^## (.+)$", README, re.MULTILINE)
    for code in re.findall(r"```python\n(.*?)```", section(heading), re.DOTALL)
]
QUICK = "rate_limit=0.1, create_order_interval=0.1"
CLIENT = f"from clore_client import CloreClient\n\nclient = CloreClient({QUICK})\n"
ORDER = 'order = client.get_orders()[0]\norder["ssh_password"] = "my-password"\n'


def complete(code: str) -> str:
    """Return a block of the README with the setup that it needs."""
    head = "" if "CloreClient(" in code else CLIENT
    return head + (ORDER if "(order" in code and "order = " not in code else "") + code


def test_every_example_is_complete_and_short() -> None:
    assert "`examples/market.ipynb`" in README
    for path in (ROOT / "examples").glob("*.py"):
        source = path.read_text()
        assert path.name in README
        if path.name not in ("clore_client.py", "draw_session.py"):
            assert len(source.splitlines()) <= 40, path
            assert "simulator" not in source.lower()


def test_check_balance(make_sim: MakeSim) -> None:
    sim = make_sim(**EASY)
    done = run(sim, "check_balance.py")
    assert done.returncode == 0, done.stderr
    assert "USD-Blockchain" in done.stdout
    assert "0 active order(s)" in done.stdout


@pytest.mark.parametrize("form", ["live", "documented"])
def test_rent_cheapest(make_sim: MakeSim, form: str) -> None:
    sim = make_sim(**EASY, form=form)
    done = run(sim, "rent_cheapest.py")
    assert done.returncode == 0, done.stderr
    assert "RTX 4090" in done.stdout
    assert "simulat" in done.stdout.lower()
    (order,) = sim.orders
    assert not order.active
    cheapest = min(s.usd_on_demand["CLORE-Blockchain"] for s in sim.servers if "RTX 4090" in s.gpus)
    assert order.usd_per_hour == pytest.approx(cheapest / 24, rel=1e-3)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("visible_after", [0.1, 4.0])
def test_rent_cheapest_gives_back_when_interrupted(
    make_sim: MakeSim, signum: int, visible_after: float
) -> None:
    """While the order is awaited, and while it is not even listed yet."""
    sim = make_sim(**{**EASY, "deploy_after": 60.0, "visible_after": visible_after})
    child = subprocess.Popen(
        [sys.executable, "rent_cheapest.py"],
        env=environment(sim),
        cwd=ROOT / "examples",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not sim.orders and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    child.send_signal(signum)
    _, errors = child.communicate(timeout=60)
    assert child.returncode != 0
    assert "KeyboardInterrupt" in errors or signum == signal.SIGTERM
    assert not sim.orders[0].active, errors


def test_rent_cheapest_finds_none(make_sim: MakeSim) -> None:
    sim = make_sim(**EASY)
    done = run(sim, "rent_cheapest.py", "RTX 4090", "0.0001")
    assert done.returncode == 1
    assert "no RTX 4090 under 0.0001" in done.stderr
    assert not sim.orders


def test_run_over_ssh(make_sim: MakeSim) -> None:
    sim = make_sim(**EASY)
    client = client_for(sim, rate_limit=0.6)
    server = client.find_servers("RTX 4090", min_reliability=96)[0]
    order = client.create_order(server["id"], ssh_password="my-password")
    client.wait_for_order(order["order_id"], timeout=30)
    done = run(sim, "run_over_ssh.py", "my-password", "echo", "a  b")
    assert "a  b\n" in done.stdout, done.stderr
    assert run(sim, "run_over_ssh.py").returncode == 1


def test_dask_rentals(make_sim: MakeSim, monkeypatch: pytest.MonkeyPatch) -> None:
    # The simulated host is this machine, and its programs are the ones that this PATH finds.
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    done = run(make_sim(**EASY), "dask_rentals.py", "RTX 4090", "1")
    assert done.stdout == f"{sum(n * n for n in range(100))}\n", done.stderr


def test_move_data(make_sim: MakeSim, tmp_path: Path) -> None:
    sim = make_sim(**EASY)
    script, results = tmp_path / "job.sh", tmp_path / "results"
    script.write_text("echo working; echo done > results/log; touch 'results/a b'\n")
    done = run(sim, "move_data.py", str(script), str(results))
    assert done.returncode == 0, done.stderr
    assert "working\n" in done.stdout
    assert "2 files" in done.stdout
    assert (results / "log").read_text() == "done\n"
    assert not any(order.active for order in sim.orders)


def test_plot_prices(make_sim: MakeSim, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sim = make_sim(**EASY)
    picture = tmp_path / "prices.png"
    done = run(sim, "plot_prices.py", str(picture), "RTX 40")
    assert done.returncode == 0, done.stderr
    assert "reliable %" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "(examples/prices.png)" in README
    assert (ROOT / "examples" / "prices.png").is_file()
    assert "no server" in run(sim, "plot_prices.py", str(picture), "nothing").stderr


def test_spot_order(make_sim: MakeSim) -> None:
    sim = make_sim(**EASY)
    done = run(sim, "spot_order.py", "RTX 4090", "1")
    assert done.returncode == 0, done.stderr
    assert "bid raised to" in done.stdout
    (order,) = sim.orders
    assert order.spot
    assert not order.active


@pytest.mark.parametrize(("heading", "code"), BLOCKS, ids=[h for h, _ in BLOCKS])
def test_every_block_of_the_readme_runs(
    make_sim: MakeSim, tmp_path: Path, heading: str, code: str
) -> None:
    sim = make_sim(**{**EASY, "rate_limit": 0.05, "create_order_interval": 0.05})
    if ORDER in complete(code):
        client = client_for(sim, rate_limit=0.1)
        server = client.find_servers("RTX 4090", min_reliability=96)[0]
        made = client.create_order(server["id"], ssh_password="my-password")
        client.wait_for_order(made["order_id"], timeout=30, poll_interval=0.05)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.py").write_text("open('model.bin', 'w').write('trained')\n")
    (tmp_path / "block.py").write_text(complete(code))
    done = subprocess.run(
        [sys.executable, "block.py"], env=environment(sim), cwd=tmp_path,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    if heading == "SSH and files":
        if "model.bin" in code:
            assert (tmp_path / "model.bin").read_text() == "trained"
    else:
        assert not any(order.active for order in sim.orders)
    if heading in ("First example", "Rent"):
        assert "SIMULATED" in done.stdout


@pytest.mark.internal
def test_every_block_of_the_readme_has_sound_types(tmp_path: Path) -> None:
    for number, (_, code) in enumerate(BLOCKS):
        (tmp_path / f"block_{number}.py").write_text(complete(code))
    config = ["--strict", "--config-file", str(ROOT / "pyproject.toml")]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *config, *map(str, tmp_path.glob("block_*.py"))],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_the_readmes_loop_with_tenacity(make_sim: MakeSim, monkeypatch: pytest.MonkeyPatch) -> None:
    sim = make_sim()
    monkeypatch.setenv("CLORE_BASE_URL", sim.url)
    monkeypatch.setenv("CLORE_API_KEY", sim.api_key)
    code = next(code for heading, code in BLOCKS if "tenacity" in code)
    sim.faults.add("wallets", "html_502", times=4)
    namespace: dict[str, object] = {}
    exec(code, namespace)
    assert namespace["wallets"]
    assert len(sim.requests) == 5


@pytest.mark.internal
def test_the_one_file_beside_the_examples_is_current() -> None:
    from clore_client import single_file

    assert (ROOT / "examples" / "clore_client.py").read_text("utf-8") == single_file.write(), (
        "python -I -m clore_client.single_file > examples/clore_client.py"
    )


def test_the_picture_in_the_readme_is_of_a_whole_run() -> None:
    assert "(examples/session.svg)" in README
    picture = (ROOT / "examples" / "session.svg").read_text("utf-8")
    texts = ["".join(element.itertext()) for element in ElementTree.fromstring(picture)[-1]]
    for part in ("$ python rent_cheapest.py", "NVIDIA-SMI", "order cancelled; it cost"):
        assert any(part in text for text in texts), part


def test_the_readme_names_every_method_and_error() -> None:
    import clore_client

    for name in dir(CloreClient):
        if not name.startswith("_") and callable(getattr(CloreClient, name)):
            assert f"`{name}(" in README or f".{name}(" in README, name
    for name in inspect.signature(CloreClient).parameters:
        assert re.search(f"`{name}=?`", section("Settings")), name
    for name in clore_client.__all__:
        if name.endswith(("Error", "List")):
            assert f"`{name}`" in README, name


def test_the_readme_names_every_property() -> None:
    for kind in (Server, Order, Wallet):
        for name, value in inspect.getmembers(kind):
            if isinstance(value, property):
                assert f"`{name}`" in section("Records"), f"{kind.__name__}.{name}"
    for name in ("to_dicts", "to_csv", "to_pandas", "explain"):
        assert f"`.{name}(" in section("Records"), name
