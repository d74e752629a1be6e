"""One API call: retries, requests that are never sent twice, redirects, secrets, rate limit."""

from __future__ import annotations

import copy
import itertools
import logging
import pickle
import re
import socket
import threading
import time
import traceback
from typing import Any

import pytest
import requests

from clore_client import (
    AuthenticationError,
    CloreAPIError,
    CloreClient,
    CloreConnectionError,
    CloreError,
    ConfigurationError,
    DatabaseError,
    InvalidEndpointError,
    InvalidResponseError,
    OrderOutcomeUnknownError,
    OutcomeUnknownError,
    RateLimitError,
    SpotPriceStepError,
)
from tests.conftest import FAST, RATE_LIMIT, MakeSim, client_for, sent_to
from tests.variant import Simulator

# Faults after which a read is retried: their names, and how they are made.
HEALED = [
    ("lose_request", {}),
    ("lose_response", {}),
    ("reset_mid_body", {}),
    ("reset_mid_body", {"reset": False}),
    ("truncated_json", {}),
    ("not_json", {}),
    ("http_500_before_commit", {}),
    ("code_1", {}),
    ("rate_limit", {}),
    ("rate_limit", {"retry_after": 0}),
    ("rate_limit", {"html": True}),
    *[("html_502", {"status": status}) for status in (500, 502, 503, 504, 520, 522)],
]
# Faults after which the outcome of a purchase is unknown.
PASSWORD = "hunter2hunter2"
DOUBTFUL = [
    ("lose_request", {}),
    ("lose_response", {}),
    ("reset_mid_body", {}),
    ("truncated_json", {}),
    ("not_json", {}),
    ("no_code", {}),
    ("html_502", {}),
    ("html_502", {"status": 524}),
    ("hang_after_commit", {}),
]
NOT_CARRIED_OUT = {"lose_request", "html_502"}


@pytest.mark.parametrize(("kind", "options"), HEALED)
def test_a_read_is_sent_again(sim: Simulator, client: CloreClient, kind: str, options: Any) -> None:
    sim.faults.add("wallets", kind, times=2, **options)
    assert len(client.get_wallets()) == 3
    assert len(sent_to(sim, "wallets")) == 3


def test_a_read_times_out_and_is_sent_again(sim: Simulator) -> None:
    sim.faults.add("wallets", "hang")
    assert len(client_for(sim, timeout=0.2).get_wallets()) == 3
    assert len(sent_to(sim, "wallets")) == 2


@pytest.mark.parametrize(("kind", "options"), [h for h in HEALED if h[0] != "rate_limit"])
def test_giving_up_says_how_often_and_why(sim: Simulator, kind: str, options: Any) -> None:
    sim.faults.add("wallets", kind, times=9, **options)
    with pytest.raises(CloreError, match=r"^Clore API request failed after 2 retries: ") as caught:
        client_for(sim, max_retries=2).get_wallets()
    assert caught.value.retryable
    assert caught.value.sends == 2
    assert len(sent_to(sim, "wallets")) == 2


def test_refusals_for_the_rate_limit_have_a_time_limit(
    sim: Simulator, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    sim.faults.add("wallets", "rate_limit", times=8)
    assert client_for(sim, max_retries=2, rate_limit_wait=20).get_wallets()
    assert len(sent_to(sim, "wallets")) == 9
    retries = [r.levelno for r in caplog.records if "retrying" in r.getMessage()]
    assert retries == [logging.WARNING] + [logging.DEBUG] * 7
    arrived = [call.arrived for call in sim.requests]
    assert min(b - a for a, b in itertools.pairwise(arrived)) >= 0.5 * RATE_LIMIT
    sim.faults.add("wallets", "rate_limit", times=999)
    with pytest.raises(RateLimitError, match=r"of the last 20 requests hit the API") as caught:
        client_for(sim, max_retries=2, rate_limit_wait=0.5).get_wallets()
    assert re.match(r"Clore API request failed after \d+ retries: ", str(caught.value))
    assert "other programs use this key" in str(caught.value)
    assert "rate_limiter=" in str(caught.value)
    assert caught.value.sends > 5


@pytest.mark.parametrize(
    ("kind", "options", "cls"),
    [
        ("html_403", {}, InvalidResponseError),
        ("redirect", {}, InvalidResponseError),
        ("no_code", {}, InvalidResponseError),
        ("html_502", {"status": 404}, InvalidResponseError),
        ("envelope", {"envelope": {"code": 2}}, CloreAPIError),
        ("envelope", {"envelope": {"code": "0"}}, InvalidResponseError),
        ("envelope", {"envelope": {"code": False}}, InvalidResponseError),
    ],
)
def test_what_asking_again_does_not_heal_is_asked_once(
    sim: Simulator, client: CloreClient, kind: str, options: Any, cls: type[CloreAPIError]
) -> None:
    sim.faults.add("wallets", kind, **options)
    with pytest.raises(cls):
        client.get_wallets()
    assert len(sent_to(sim, "wallets")) == 1


@pytest.mark.parametrize(("kind", "options"), DOUBTFUL)
@pytest.mark.parametrize("raw", [False, True])
def test_a_purchase_in_doubt_is_sent_once(
    sim: Simulator, kind: str, options: Any, raw: bool
) -> None:
    client = client_for(sim, timeout=0.3)
    server = client.find_servers("RTX 4090")[0]
    sim.faults.add("create_order", kind, **options)
    body = {
        "renting_server": server.id,
        "type": "on-demand",
        "currency": "USD-Blockchain",
        "image": "x",
        "ssh_password": PASSWORD,
    }

    def order() -> None:
        if raw:
            client._request("POST", "/v1/create_order", json=body)
        else:
            client.create_order(
                server["id"], currency="USD", image="x", ssh_password=PASSWORD, find_timeout=0.3
            )

    if not raw and kind not in NOT_CARRIED_OUT:
        order()  # found, as if nothing had happened
        assert len(sent_to(sim, "create_order")) == 1
        return
    with pytest.raises(OrderOutcomeUnknownError, match="get_orders") as caught:
        order()
    assert len(sent_to(sim, "create_order")) == 1
    assert not caught.value.retryable
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))
    if not raw:
        assert caught.value.server_id == server.id
        assert caught.value.credentials == {"ssh_password": PASSWORD}
        again = pickle.loads(pickle.dumps(caught.value))
        assert type(again) is OrderOutcomeUnknownError
        assert str(again) == str(caught.value)
        assert again.credentials == {}
        assert b"hunter2" not in pickle.dumps(caught.value)


def test_other_posts_in_doubt_are_sent_once(sim: Simulator, client: CloreClient) -> None:
    sim.faults.add("*", "lose_request")
    with pytest.raises(OutcomeUnknownError, match="state of your account") as caught:
        client._request("POST", "/v1/set_server_settings", json={"name": "rig"})
    assert not isinstance(caught.value, OrderOutcomeUnknownError)
    assert not caught.value.retryable
    assert len(sim.requests) == 1


@pytest.mark.parametrize("options", [{}, {"retry_after": 0.05}, {"html": True}])
def test_a_purchase_refused_for_its_pace_is_sent_again(
    sim: Simulator, client: CloreClient, options: Any
) -> None:
    server = client.find_servers("RTX 4090")[0]
    sim.faults.add("create_order", "rate_limit", times=2, **options)
    order = client.create_order(server["id"])
    assert order.id
    assert len(sent_to(sim, "create_order")) == 3
    assert len(sim.orders) == 1


def test_a_purchase_that_never_left_is_sent_again(sim: Simulator) -> None:
    """Nobody listens at first; then a simulator with the same servers takes over the port."""
    server_id = client_for(sim).find_servers("RTX 4090")[0]["id"]
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    late = Simulator(**{**FAST, "port": port})
    client = client_for(
        late,
        base_url=f"http://127.0.0.1:{port}",
        max_retries=500,
        backoff=0.05,
        max_backoff=0.05,
    )
    made: list[Any] = []
    thread = threading.Thread(target=lambda: made.append(client.create_order(server_id)))
    thread.start()
    time.sleep(0.2)
    with late:
        thread.join(30)
        assert made
        assert len(late.orders) == 1
        assert len(sent_to(late, "create_order")) == 1


def test_a_refused_connection_gives_up_as_retryable() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        client = CloreClient("k", base_url=url, rate_limit=0, backoff=0, create_order_interval=0)
        with pytest.raises(CloreConnectionError, match=r"after 3 retries.*refused") as caught:
            client.create_order(1)
    assert caught.value.retryable
    assert caught.value.sends == 3


def test_tls_that_is_not_trusted_never_leaves(make_sim: MakeSim) -> None:
    sim = make_sim(tls=True)
    client = client_for(sim)
    with pytest.raises(CloreConnectionError, match=r"after 3 retries: SSLError"):
        client.create_order(1)
    assert not sim.requests
    wallets = client._request("GET", "/v1/wallets", verify=sim.ca_file)["wallets"]
    assert len(wallets) == 3


def test_name_that_does_not_resolve_never_leaves() -> None:
    client = CloreClient("k", base_url="https://nowhere.invalid", rate_limit=0, backoff=0,
                         create_order_interval=0)  # fmt: skip
    with pytest.raises(CloreConnectionError, match="after 3 retries"):
        client.create_order(1)


@pytest.mark.parametrize("name", ["cancel_order", "cancel_orders"])
def test_cancels_are_sent_again_after_a_lost_answer(
    sim: Simulator, client: CloreClient, name: str
) -> None:
    order = client.create_order(client.find_servers("RTX 4090")[0]["id"])
    sim.faults.add(name, "lose_response", times=2)
    if name == "cancel_order":
        assert client.cancel_order(order["order_id"]) is True
    else:
        assert client.cancel_orders([order["order_id"]])["failed_to_cancel"] == []
    assert len(sent_to(sim, name)) == 3
    assert not sim.orders[0].active


def test_code_1_on_create_order_names_its_causes_and_is_not_sent_again(
    sim: Simulator, client: CloreClient
) -> None:
    server = client.find_servers("RTX 4090")[0]
    sim.faults.add("create_order", "http_500_before_commit")
    with pytest.raises(DatabaseError, match="empty wallet") as caught:
        client.create_order(server["id"], find_timeout=0.2)
    assert not caught.value.retryable
    assert len(sent_to(sim, "create_order")) == 1
    assert str(caught.value).startswith("Clore API Error 1: Database error | response={'code': 1}")


def test_a_redirect_is_an_error_and_takes_no_key_along(
    make_sim: MakeSim, sim: Simulator, client: CloreClient
) -> None:
    other = make_sim()
    for target in (f"{other.url}/v1/wallets", "http://[bad", "", "//evil.example/x"):
        sim.faults.add("wallets", "redirect", location=target)
        with pytest.raises(InvalidResponseError, match="redirect") as caught:
            client.get_wallets()
        assert caught.value.code == -1
        assert caught.value.http_status == 302
    assert "evil.example" in str(caught.value)
    assert not other.requests


def test_a_redirect_shows_the_host_only(sim: Simulator, client: CloreClient) -> None:
    """The rest of the address can have a token, and be of any length."""
    target = "https://login.example/?session=s3cret&x=" + 5000 * "y"
    sim.faults.add("wallets", "redirect", location=target)
    with pytest.raises(InvalidResponseError) as caught:
        client.get_wallets()
    assert "a redirect to host login.example, which" in str(caught.value)
    assert "s3cret" not in repr(caught.value.__dict__) + str(caught.value)


def test_a_call_that_is_refused_has_a_repr(monkeypatch: pytest.MonkeyPatch) -> None:
    """Error reporters show it: an error in its repr would hide the one that they report."""
    monkeypatch.delenv("CLORE_API_KEY", raising=False)
    with pytest.raises(AuthenticationError) as caught:
        CloreClient().get_wallets()
    frames = traceback.walk_tb(caught.value.__traceback__)
    calls = [frame.f_locals["self"] for frame, _ in frames if "all_headers" in frame.f_locals]
    assert [type(call).__name__ in repr(call) for call in calls] == [True]


def test_the_proxys_refusal_of_the_user_agent_is_explained(
    sim: Simulator, client: CloreClient
) -> None:
    sim.faults.add("wallets", "html_403")
    with pytest.raises(InvalidResponseError, match="refused the User-Agent") as caught:
        client.get_wallets()
    assert caught.value.http_status == 403


def test_an_html_page_becomes_a_short_clean_excerpt(sim: Simulator, client: CloreClient) -> None:
    page = "<html><style>p{}</style><h1>Down\x1b[2J &amp; out</h1>" + "<p>x</p>" * 5000
    sim.faults.add("wallets", "status", status=418, body=page, content_type="text/html")
    with pytest.raises(InvalidResponseError) as caught:
        client.get_wallets()
    text = str(caught.value)
    assert "HTTP 418: Down\\x1b[2J & out x x" in text
    assert "\x1b" not in text
    assert "<" not in text
    assert len(text) < 300


def test_user_agent_and_headers(sim: Simulator) -> None:
    client = client_for(sim, user_agent="my-tool/1.0")
    client._request("GET", "/v1/wallets", headers={"X-Trace": "7"})
    headers = sim.requests[0].headers
    assert headers["User-Agent"].startswith("clore-client/")
    assert "python-requests/" in headers["User-Agent"]
    assert headers["User-Agent"].endswith(" my-tool/1.0")
    assert headers["X-Trace"] == "7"
    assert headers["auth"] == sim.api_key


def test_netrc_is_not_sent(
    sim: Simulator, client: CloreClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("default login me password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    client.get_wallets()
    assert "Authorization" not in sim.requests[0].headers


def test_a_proxy_does_not_see_a_key_for_loopback(
    sim: Simulator, client: CloreClient, monkeypatch: pytest.MonkeyPatch, make_sim: MakeSim
) -> None:
    proxy = make_sim()
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, proxy.url)
    assert len(client.get_wallets()) == 3
    assert not proxy.requests


@pytest.mark.parametrize(
    "url", ["http://api.clore.ai", "http://10.0.0.1", "http://localhost.evil.example", "http://0"]
)
def test_http_to_another_machine_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: Any) -> None:
        raise AssertionError("something was sent")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    with pytest.raises(ConfigurationError, match="not https"):
        CloreClient("secret-key", base_url=url).get_wallets()


def test_the_base_url_is_looked_up_for_each_request(sim: Simulator, make_sim: MakeSim) -> None:
    other = make_sim()

    class Other(CloreClient):
        BASE_URL = other.url

    client = Other(other.api_key, rate_limit=0)
    assert other.url == client.BASE_URL
    client.get_wallets()
    client.BASE_URL, client.api_key = sim.url + "/", sim.api_key
    client.get_wallets()
    assert (len(other.requests), len(sim.requests)) == (1, 1)
    assert CloreClient("k").BASE_URL == "https://api.clore.ai"


@pytest.mark.parametrize(
    "endpoint",
    [
        "v1/wallets",
        "https://evil.example/v1",
        "//evil.example",
        "/v1/../x",
        "/v1/a b",
        "",
        5,
        "/\\x",
    ],
)
def test_an_endpoint_is_a_path(client: CloreClient, sim: Simulator, endpoint: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="endpoint"):
        client._request("GET", endpoint)
    assert not sim.requests


def test_bad_arguments_of_a_request(client: CloreClient, sim: Simulator) -> None:
    with pytest.raises(ValueError, match="allow_redirects"):
        client._request("GET", "/v1/wallets", allow_redirects=True)
    with pytest.raises(ValueError, match="json"):
        client._request("POST", "/v1/x", json={"a": float("nan")})
    with pytest.raises(TypeError):
        client._request("GET", "/v1/wallets", nonsense=1)
    for timeout in (0, -1, float("nan"), (1,), "5"):
        with pytest.raises((ValueError, TypeError), match="timeout"):
            client._request("GET", "/v1/wallets", timeout=timeout)
    assert not sim.requests


def test_unknown_endpoints_and_wrong_keys(sim: Simulator, client: CloreClient) -> None:
    with pytest.raises(InvalidEndpointError):
        client._request("GET", "/v1/nonsense")
    with pytest.raises(AuthenticationError, match=r"^Clore API Error 3: Invalid or missing"):
        client_for(sim, api_key="wrong").get_wallets()


def test_without_a_key_only_the_marketplace_works(sim: Simulator) -> None:
    client = client_for(sim, api_key=None)
    assert client.headers == {}
    assert client.get_marketplace()
    for call in (client.get_wallets, client.get_orders, lambda: client.create_order(1)):
        with pytest.raises(AuthenticationError, match="no API key"):
            call()
    assert len(sim.requests) == 1


def test_attributes_may_be_set_later(sim: Simulator) -> None:
    client = client_for(sim, api_key=None)
    client.headers = {"auth": sim.api_key}
    assert client.api_key == sim.api_key
    client.get_wallets()
    client.headers["auth"] = "wrong"
    assert client.api_key == "wrong"
    client.api_key = sim.api_key
    assert client.headers == {"auth": sim.api_key}
    client.timeout, client.max_retries = 3, 1
    sim.faults.add("wallets", "lose_request")
    with pytest.raises(CloreConnectionError):
        client.get_wallets()
    client.api_key = None
    assert client.headers == {}


def test_the_client_works_again_after_close(client: CloreClient) -> None:
    with client:
        client.get_wallets()
    client.get_wallets()
    client.close()
    client.close()
    client.get_wallets()


def test_no_secret_in_logs_reprs_and_tracebacks(
    sim: Simulator, client: CloreClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    password, token, env = "passw0rd-of-mine", "jupyter-token", "env-value-of-mine"
    options: Any = {"ssh_password": password, "jupyter_token": token, "env": {"A": env}}
    servers = client.find_servers("RTX 4090")
    texts = []
    echo = {"code": 2, "error": f"bad {password} {sim.api_key} {env}", "ssh_password": password}
    sim.faults.add("create_order", "envelope", envelope=echo)
    sim.faults.add("create_order", "lose_request")
    for _ in range(2):
        with pytest.raises(CloreError) as caught:
            client.create_order(servers[0]["id"], **options, find_timeout=0.2)
        texts += [repr(caught.value), *traceback.format_exception(caught.value)]
    order = client.create_order(servers[1]["id"], **options)
    made_up = client.create_order(servers[2]["id"])
    texts += [repr(order), str(made_up), repr([made_up]), repr(client), caplog.text]
    for record in caplog.records:
        texts.append(repr(record.__dict__))
    for secret in (sim.api_key, password, token, env, made_up["ssh_password"]):
        assert secret
        assert secret not in "".join(texts)


def test_errors_copy_and_pickle(sim: Simulator, client: CloreClient) -> None:
    sim.faults.add("wallets", "envelope", envelope={"code": 6, "error": "exceeded_max_step",
                                                    "max_step": 3})  # fmt: skip
    with pytest.raises(SpotPriceStepError) as caught:
        client.get_wallets()
    for twin in (pickle.loads(pickle.dumps(caught.value)), copy.deepcopy(caught.value)):
        assert type(twin) is type(caught.value)
        assert str(twin) == str(caught.value)
        assert twin.max_step == 3
        assert twin.endpoint == "/v1/wallets"


def test_no_error_of_requests_comes_through(sim: Simulator, client: CloreClient) -> None:
    sim.faults.add("wallets", "lose_request", times=3)
    with pytest.raises(CloreConnectionError) as caught:
        client.get_wallets()
    assert not isinstance(caught.value, requests.RequestException)
    cause = caught.value.__cause__
    assert isinstance(cause, requests.RequestException)
    assert cause.request is None  # it would hold the key


def test_a_missing_ca_bundle_is_explained(client: CloreClient, make_sim: MakeSim) -> None:
    sim = make_sim(tls=True)
    with pytest.raises(ConfigurationError, match="not sent"):
        client_for(sim)._request("GET", "/v1/wallets", verify="/no/such/file.pem")


@pytest.mark.parametrize("clock", [-1e6, 1e6])
def test_the_wall_clock_changes_nothing(
    sim: Simulator, client: CloreClient, monkeypatch: pytest.MonkeyPatch, clock: float
) -> None:
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + clock)
    order = client.create_order(client.find_servers("RTX 4090")[0]["id"])
    client.wait_for_order(order["order_id"], timeout=10, poll_interval=0.02)
    assert len(sim.orders) == 1


def test_a_forked_child_uses_its_own_connections(sim: Simulator, client: CloreClient) -> None:
    import os

    client.get_wallets()
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if len(client.get_wallets()) == 3 else 1)
        finally:
            os._exit(2)
    assert len(client.get_wallets()) == 3
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
