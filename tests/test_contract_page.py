"""The reference page's recipes, run as they are written: as programs, against both forms.

Each program below is what a reader of the page writes under the heading of the same name, with
nothing but its names, defaults and return shapes.
"""

from __future__ import annotations

import inspect
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

import clore_client
from clore_client import CloreClient
from tests.conftest import FORMS, MakeSim, client_for, sent_to
from tests.variant import Simulator

pytestmark = pytest.mark.internal  # it takes long

ROOT = Path(clore_client.__file__).resolve().parent
IMPORT_FROM = ROOT.parent if hasattr(clore_client, "__path__") else ROOT

QUICK_SETUP = """
from clore_client import CloreClient

client = CloreClient(api_key="your-api-key")

print(len(client.get_marketplace()), "servers are free")
print(client.BASE_URL, client.timeout, client.max_retries, client.headers["auth"])
print(CloreClient.ERROR_CODES[5])
"""

KEY_FROM_THE_ENVIRONMENT = """
import os
from clore_client import CloreClient

client = CloreClient(api_key=os.environ["CLORE_API_KEY"])
print(len(client.get_wallets()), "wallets")
print(len(client._request("GET", "/v1/wallets")["wallets"]), "wallets")
"""

CHECK_BALANCE = """
import os
from clore_client import CloreClient

client = CloreClient(api_key=os.environ["CLORE_API_KEY"])

for wallet in client.get_wallets():
    print(f"{wallet['name']}: {wallet['balance']:.8f} (deposit to {wallet['deposit_address']})")
print(f"CLORE: {client.get_balance():.2f}")
print(f"Bitcoin: {client.get_balance('bitcoin'):.8f}")
"""

FIND_AND_RENT = """
import os
from clore_client import CloreClient

client = CloreClient(api_key=os.environ["CLORE_API_KEY"])

server = client.find_cheapest(gpu_type="RTX 4090", max_price_usd=0.5, min_reliability=90.0)
if not server:
    raise SystemExit("no RTX 4090 is free")
price = server["price"]["usd"]["on_demand_clore"]
print(f"Server {server['id']}: {server['gpu_array']} for ${price:.4f} per hour")
print(f"Reliability {server['reliability']:.1f} %, rented: {server['rented']}")

order = client.create_order(
    server_id=server["id"],
    image="nvidia/cuda:12.1.0-base-ubuntu22.04",
    ports={"22": "tcp", "8888": "http"},
    ssh_password="a-password-1",
)
print(f"Order {order['order_id']} (code {order['code']})")

order = client.wait_for_order(order["order_id"], timeout=120)
print(f"Running on {order['renting_server']}: {order['connection']['ssh']}")
print(order["connection"]["http_ports"]["8888"], order["price"], order["started"])

print([o["order_id"] for o in client.get_orders()])
print(client.get_order(order["order_id"])["status"])
print(client.cancel_order(order["order_id"], issue="only a test"))
"""

SSH_INTO_THE_SERVER = """
import os
from clore_client import CloreClient

client = CloreClient(api_key=os.environ["CLORE_API_KEY"])

server = client.find_cheapest("RTX 4090")
order = client.create_order(server["id"], ssh_password="a-password-1")
try:
    order = client.wait_for_order(order["order_id"])
    info = client.parse_ssh_connection(order)
    print(f"ssh -p {info['port']} {info['user']}@{info['host']}")
    ssh = client.connect_ssh(order, password="a-password-1")
    stdin, stdout, stderr = ssh.exec_command("nvidia-smi -L")
    print(stdout.read().decode())
    ssh.close()
finally:
    client.cancel_order(order["order_id"])
"""

SPOT_ORDER = """
import os
from clore_client import CloreClient

client = CloreClient(api_key=os.environ["CLORE_API_KEY"])

server = client.find_cheapest("RTX 4090", use_spot=True)
market = client.get_spot_market(server["id"])
print(f"{len(market['market']['offers'])} offers, code {market['code']}")

order = client.create_order(
    server_id=server["id"],
    order_type="spot",
    spot_price=0.25,
)
print(f"Spot order {order['order_id']}")
print("raised:", client.set_spot_price(order["order_id"], new_price=0.30))
print(client.cancel_orders([order["order_id"]])["code"])
"""

WHEN_THINGS_GO_WRONG = """
import os
from clore_client import CloreClient

try:
    CloreClient(api_key="no-such-key", rate_limit=0).get_wallets()
except Exception as error:
    print(error)

client = CloreClient(os.environ["CLORE_API_KEY"], 30, 0.2, 3)
try:
    client.wait_for_order(7, timeout=1, poll_interval=0.5)
except TimeoutError as error:
    print(error)
print(client.get_order(7), client.parse_ssh_connection({}))
"""

PROGRAMS = {
    "Quick setup": (QUICK_SETUP, ["servers are free", "30 3", "Rate limit exceeded"]),
    "Key from the environment": (KEY_FROM_THE_ENVIRONMENT, ["3 wallets\n3 wallets"]),
    "Check balance": (CHECK_BALANCE, ["CLORE-Blockchain: ", "Bitcoin: 0.00"]),
    "Find and rent the cheapest RTX 4090": (
        FIND_AND_RENT,
        ["'RTX 4090'", "(code 0)", "ssh root@127.0.0.1 -p", "https://", "running\nTrue"],
    ),
    "SSH into the server and run a command": (SSH_INTO_THE_SERVER, ["root@127.0.0.1", "GPU 0: "]),
    "Spot order": (SPOT_ORDER, ["offers, code 0", "raised: True\n0"]),
    "When things go wrong": (
        WHEN_THINGS_GO_WRONG,
        [
            "Clore API Error 3: Invalid or missing API key | response={",
            "Order 7 did not reach status 'running' within 1s",
            "None {'host': '', 'port': 22, 'user': 'root', 'raw': ''}",
        ],
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("heading", list(PROGRAMS))
def test_a_program_of_the_page(make_sim: MakeSim, tmp_path: Path, heading: str, form: str) -> None:
    sim = make_sim(form=form, ssh=True, servers=200)
    program, shown = PROGRAMS[heading]
    script = tmp_path / "recipe.py"
    script.write_text(program.replace("your-api-key", sim.api_key))
    environment = {
        **os.environ,
        "CLORE_API_KEY": sim.api_key,
        "CLORE_BASE_URL": sim.url,
        "PYTHONPATH": str(IMPORT_FROM),
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        env=environment, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for text in shown:
        assert text in done.stdout
    assert not any(order.active for order in sim.orders)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("use_spot", [False, True])
def test_the_spot_recipe_in_twenty_markets(
    make_sim: MakeSim, form: str, use_spot: bool, caplog: pytest.LogCaptureFixture
) -> None:
    for seed in range(20):
        sim = make_sim(form=form, seed=seed, servers=200)
        with client_for(sim) as client:
            server = client.find_cheapest("RTX 4090", use_spot=use_spot)
            assert server is not None
            caplog.clear()
            order = client.create_order(server["id"], order_type="spot", spot_price=0.25)
        (made,) = sim.orders
        assert (made.id, made.spot) == (order["order_id"], True)
        assert made.usd_per_hour == pytest.approx(0.25, rel=1e-4)
        warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
        above = "spot_price=0.25 USD per hour is above the on-demand price"
        assert len([text for text in warnings if above in text]) == 1
        sim.stop()


SIGNATURES = {
    "__init__": "api_key=None, timeout=30, rate_limit=1.1, max_retries=3",
    "_request": "method, endpoint, params=None, json=None",
    "get_wallets": "",
    "get_balance": "currency='CLORE-Blockchain'",
    "get_marketplace": "include_rented=False",
    "find_servers": "gpu_type=None, max_price_usd=None, min_reliability=0.0, use_spot=False",
    "find_cheapest": "gpu_type=None, max_price_usd=None, min_reliability=0.0, use_spot=False",
    "get_orders": "include_completed=False",
    "get_order": "order_id",
    "create_order": "server_id, image='nvidia/cuda:12.1.0-base-ubuntu22.04', "
    "order_type='on-demand', currency='CLORE-Blockchain', ports=None, env=None, "
    "ssh_password=None, ssh_key=None, spot_price=None, jupyter_token=None",
    "cancel_order": "order_id, issue=None",
    "cancel_orders": "order_ids",
    "wait_for_order": "order_id, timeout=300, poll_interval=5.0, target_status='running'",
    "parse_ssh_connection": "order",
    "connect_ssh": "order, password=None, key_path=None",
    "get_spot_market": "server_id",
    "set_spot_price": "order_id, new_price",
}


@pytest.mark.parametrize("method", list(SIGNATURES))
def test_the_positional_parameters_are_those_of_the_page(method: str) -> None:
    parameters = list(inspect.signature(getattr(CloreClient, method)).parameters.values())
    positional = [
        p.replace(annotation=p.empty)
        for p in parameters
        if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"
    ]
    assert ", ".join(map(str, positional)) == SIGNATURES[method]
    rest = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert all(p.default is not p.empty for p in rest)


def test_what_the_page_says_is_sent(any_sim: Simulator, any_client: CloreClient) -> None:
    server = any_client.find_cheapest("RTX 4090")
    assert server is not None
    order = any_client.create_order(server["id"], order_type="spot", spot_price=0.25)
    body = sent_to(any_sim, "create_order")[0].body
    assert {"renting_server": server["id"], "type": "spot", "ports": {"22": "tcp"},
            "env": {"NVIDIA_VISIBLE_DEVICES": "all"}}.items() <= body.items()  # fmt: skip
    assert body["ssh_password"] == order["ssh_password"]
    any_client.set_spot_price(order["order_id"], 0.3)
    sent = sent_to(any_sim, "set_spot_price")[0].body
    assert sent.keys() == {"order_id", "desired_price"}
    any_client.get_spot_market(server["id"])
    assert sent_to(any_sim, "spot_marketplace")[-1].query == {"market": str(server["id"])}
    any_client.get_orders(True)
    assert sent_to(any_sim, "my_orders")[-1].query == {"return_completed": "true"}
    any_client.cancel_order(order["order_id"], "x" * 3000)
    sent = sent_to(any_sim, "cancel_order")[0].body
    assert sent == {"id": order["order_id"], "issue": "x" * 2048}
    any_client.cancel_orders([order["order_id"]])
    assert sent_to(any_sim, "cancel_orders")[0].body == {"order_ids": [order["order_id"]]}
