"""Secrets in local variables, which error reporters send with each exception."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import pytest

import clore_client
from clore_client import CloreClient
from tests.conftest import MakeSim, client_for, sent_to
from tests.test_client import plain_server

PASSWORD, TOKEN, VALUE = "pass-4f9d-word", "token-77aa-of-jupyter", "value-31be-of-env"
SECRETS: dict[str, Any] = {
    "ssh_password": PASSWORD,
    "jupyter_token": TOKEN,
    "env": {"HF_TOKEN": VALUE},
}
HERE = os.path.abspath(clore_client.__file__)  # the one file, which stands beside the tests
if os.path.basename(HERE) == "__init__.py":
    HERE = os.path.dirname(HERE) + os.sep


def shown(error: BaseException | None) -> str:
    """Return the local variables that a reporter shows for an exception and its causes."""
    texts: list[str] = []
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if frame.f_code.co_filename.startswith(HERE):
                texts += [f"{frame.f_code.co_name} {k}={v!r}" for k, v in frame.f_locals.items()]
        texts.append(repr(error))
        error = error.__cause__ or error.__context__
    return "\n".join(texts)


def rent(client: CloreClient) -> None:
    with client.rent(**SECRETS, attempts=1, find_timeout=0.2, cancel_timeout=0.2):
        pass


@pytest.mark.parametrize(
    "fault", ["code_1", "lose_response", "html_502", "rate_limit", "bad_input"]
)
@pytest.mark.parametrize(
    "act",
    [lambda client: client.create_order(plain_server(client), **SECRETS, find_timeout=0.1), rent],
    ids=["create_order", "rent"],
)
def test_no_frame_shows_a_secret(
    make_sim: MakeSim, act: Callable[[CloreClient], object], fault: str
) -> None:
    sim = make_sim(visible_after=60.0)
    client = client_for(sim, max_retries=1, order_lag=0.05)
    if fault == "bad_input":
        sim.faults.add("create_order", "envelope", envelope={"code": 2}, times=9)
    else:
        sim.faults.add("create_order", fault, times=9)
    with pytest.raises(clore_client.CloreError) as caught:
        act(client)
    assert sent_to(sim, "create_order")
    text = shown(caught.value)
    assert "_submit" in text or "__enter__" in text, "no frame of the package was looked at"
    for secret in (PASSWORD, TOKEN, VALUE, sim.api_key):
        assert secret not in text, next(line for line in text.splitlines() if secret in line)


def test_returned_values_are_plain_strings(make_sim: MakeSim) -> None:
    sim = make_sim()
    client = client_for(sim)
    order = client.create_order(plain_server(client))
    assert type(order["ssh_password"]) is str
    assert order["ssh_password"] in repr({"password": order["ssh_password"]})
    assert f"{client.api_key}" == sim.api_key
    assert client.api_key == sim.api_key


@pytest.mark.parametrize(
    "act",
    [
        lambda client, order, login, env: client.connect_ssh(order, **login),
        lambda client, order, login, env: client.wait_for_ssh(order, **login),
        lambda client, order, login, env: client.run(order, "true", env=env, **login),
        lambda client, order, login, env: client.start(order, "true", env=env, **login),
        lambda client, order, login, env: client.jobs(order, **login),
        lambda client, order, login, env: client.job(order, "train", **login),
        lambda client, order, login, env: client.shell(order, **login),
        lambda client, order, login, env: client.wait_for_http(order, port=8888, **login),
        lambda client, order, login, env: client.forward(order, 8888, **login),
        lambda client, order, login, env: client.upload(order, __file__, "x", **login),
        lambda client, order, login, env: client.download(order, "x", "x", **login),
        lambda client, order, login, env: client.scp(order, **login),
    ],
    ids=["connect_ssh", "wait_for_ssh", "run", "start", "jobs", "job", "shell", "wait_for_http",
         "forward", "upload", "download", "scp"],
)  # fmt: skip
def test_no_frame_shows_what_a_login_was_given(
    make_sim: MakeSim, act: Callable[..., object]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]  # nothing listens there after this block
    order = {"connection": {"ssh": f"ssh root@127.0.0.1 -p {port}"}}
    login = {"password": PASSWORD, "wait": 0.0}
    with pytest.raises(clore_client.SSHError) as caught:
        act(client_for(make_sim()), order, login, {"HF_TOKEN": VALUE})
    text = shown(caught.value)
    assert "order=" in text, "no frame of the package was looked at"
    for secret in (PASSWORD, VALUE):
        assert secret not in text, next(line for line in text.splitlines() if secret in line)


def test_an_error_names_a_key_that_is_no_secret(make_sim: MakeSim) -> None:
    order = {"connection": {"ssh": "ssh root@127.0.0.1 -p 9"}}
    with pytest.raises(ValueError, match="there is no file '/no/such/key'"):
        client_for(make_sim()).run(order, "true", key_path="/no/such/key")
