"""Secrets in local variables, which error reporters send with each exception."""

from __future__ import annotations

import os
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
HERE = os.path.dirname(os.path.abspath(clore_client.__file__))


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


@pytest.mark.parametrize("fault", ["code_1", "lose_answer", "html_502", "rate_limit", "bad_input"])
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
