"""The texts, classes and pickles of errors."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

import clore_client
from clore_client import ApplicationError, CloreAPIError, CloreClient, CloreError
from tests.variant import Simulator

TEXTS = {
    "not_enough_balance": "InsufficientBalanceError",
    "server-already-rented": "ServerAlreadyRentedError",
    "server-offline": "ServerOfflineError",
    "too_low_price": "BidTooLowError",
    "currency-not-allowed": "CurrencyNotAllowedError",
    "exceeded_max_step": "SpotPriceStepError",
    "can_lower_every_600_seconds": "SpotPriceTooSoonError",
    "something new": "ApplicationError",
}
CODES = {
    1: ("DatabaseError", "Database error"),
    2: ("InvalidInputError", "Invalid input"),
    3: ("AuthenticationError", "Invalid or missing API key"),
    4: ("InvalidEndpointError", "Invalid endpoint"),
    5: ("RateLimitError", "Rate limit exceeded"),
    6: ("ApplicationError", "See error field in response"),
    77: ("CloreAPIError", "Unknown error (code 77)"),
    -3: ("CloreAPIError", "Unknown error (code -3)"),
}


def raised(sim: Simulator, client: CloreClient, envelope: dict[str, Any]) -> CloreAPIError:
    sim.faults.add("wallets", "envelope", envelope=envelope, times=999)
    with pytest.raises(CloreAPIError) as caught:
        client._request("GET", "/v1/wallets")
    sim.faults.clear()
    return caught.value


@pytest.mark.parametrize("code", CODES)
def test_a_class_and_a_text_for_each_code(sim: Simulator, client: CloreClient, code: int) -> None:
    cls, text = CODES[code]
    error = raised(sim, client, {"code": code})
    assert type(error).__name__ == cls
    assert f"Clore API Error {code}: {text} | response={{'code': {code}}}" in str(error)
    assert error.code == code
    assert error.response == {"code": code}
    assert error.endpoint == "/v1/wallets"
    assert error.http_status == 200
    assert error.error is None
    assert error.retryable is (code in (1, 5))


@pytest.mark.parametrize("text", TEXTS)
def test_a_class_for_each_known_text(sim: Simulator, client: CloreClient, text: str) -> None:
    error = raised(sim, client, {"code": 6, "error": text})
    assert type(error).__name__ == TEXTS[text]
    assert isinstance(error, ApplicationError)
    assert str(error) == f"Clore API Error 6: {text} | response={{'code': 6, 'error': '{text}'}}"
    assert error.error == text


def test_without_a_code(sim: Simulator, client: CloreClient) -> None:
    error = raised(sim, client, {"status": "ok"})
    expected = "Clore API Error -1: Unknown error (code -1) | response={'status': 'ok'}"
    assert str(error) == expected
    assert error.code == -1


@pytest.mark.parametrize("value", [{"a": 1}, ["x"], 5, True])
def test_an_error_field_of_another_type(sim: Simulator, client: CloreClient, value: Any) -> None:
    error = raised(sim, client, {"code": 6, "error": value})
    assert repr(value) in str(error)


def test_control_characters_are_escaped_and_long_envelopes_cut(
    sim: Simulator, client: CloreClient
) -> None:
    error = raised(sim, client, {"code": 2, "error": "\x1b[2J\u202e", "more": "x" * 100_000})
    assert "\x1b" not in str(error)
    assert "\\x1b[2J\\u202e" in str(error)
    assert len(str(error)) < 3000


def test_every_exported_error_derives_from_clore_error() -> None:
    for name in clore_client.__all__:
        if name.endswith("Error"):
            assert issubclass(getattr(clore_client, name), CloreError), name


@pytest.mark.internal
def test_every_error_is_exported() -> None:
    from clore_client import errors

    names = vars(errors)
    public = {n for n in names if n.endswith("Error") and not n.startswith("_")}
    assert public == {n for n in clore_client.__all__ if n.endswith("Error")}


def test_the_error_of_a_command_pickles() -> None:
    error = clore_client.CommandError(clore_client.CommandResult("c", 1, "out", "err", 0.5))
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert (again.result.exit_code, again.result.stderr) == (1, "err")


def test_every_error_pickles() -> None:
    made: list[CloreError] = [
        clore_client.OutcomeUnknownError("x", endpoint="/v1/y"),
        clore_client.CommandTimeoutError("c", 1.0, "out", "err"),
        clore_client.TransferError("x", name="n", done=1, total=2),
        clore_client.HostKeyChangedError("x", order_id=1, expected="a", found="b"),
        clore_client.OrderEndedError("x", order_id=1, status="expired", order={"a": 1}),
        clore_client.WaitTimeoutError("x", order_id=1),
        clore_client.OrderNotFoundError("x", order_id=1),
        clore_client.CloreConnectionError("x"),
        clore_client.CloreAPIError(7, "text", {"code": 7}, http_status=200, hint="h"),
    ]
    for error in made:
        twin = pickle.loads(pickle.dumps(error))
        assert type(twin) is type(error)
        assert str(twin) == str(error)
        assert twin.__dict__ == error.__dict__
