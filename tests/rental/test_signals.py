"""The handler for SIGTERM and SIGHUP: its installation, its removal, and its exception."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from clore_client import CloreClient, SignalExit
from clore_client.log import warn_once
from clore_client.process import this_process
from clore_client.rental.signals import SIGNALS, SignalHandling
from tests.rental.test_rental import QUICK, active
from tests.variant import Simulator

pytestmark = [
    pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="these signals are POSIX"),
    pytest.mark.internal,
]


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[None]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    before = [(s, signal.signal(s, signal.SIG_DFL)) for s in (*SIGNALS, signal.SIGINT)]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warn_once.cache_clear()
    # An interrupt in another test may have left a user or a handler.
    monkeypatch.setattr(this_process, "signal_users", set())
    monkeypatch.setattr(this_process, "handled_signals", set())
    monkeypatch.setattr(this_process, "stopping_signal", None)  # and forget it after each test
    yield
    for signum, handler in before:
        signal.signal(signum, handler)


def default(signum: int = signal.SIGTERM) -> bool:
    return signal.getsignal(signum) == signal.SIG_DFL


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_raises(sim: Simulator, client: CloreClient, signum: int) -> None:
    with pytest.raises(SignalExit) as caught:  # noqa: PT012
        with client.rent(**QUICK):
            assert len(active(sim)) == 1
            send(signum)
            threading.Event().wait(10)
    assert caught.value.signum == signum
    assert caught.value.code == 128 + signum
    assert not isinstance(caught.value, Exception)
    assert active(sim) == []
    assert default(signum)


def test_the_last_user_restores_the_handlers(sim: Simulator, client: CloreClient) -> None:
    assert default()
    with CloreClient.handle_signals():
        assert not default()
        outer = client.handle_signals()
        with client.rent(**QUICK):
            assert not default()
            assert not default(signal.SIGHUP)
        outer.close()
        outer.close()
        assert not default()
    assert default()
    assert default(signal.SIGHUP)
    with pytest.raises(ValueError, match="mine"):
        with client.rent(**QUICK):
            raise ValueError("mine")
    assert default()


def test_a_handler_of_the_application_stays(caplog: pytest.LogCaptureFixture) -> None:
    arrived: list[int] = []

    def theirs(signum: int, frame: Any) -> None:
        arrived.append(signum)

    signal.signal(signal.SIGTERM, theirs)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for _ in range(2):
        with SignalHandling():
            assert signal.getsignal(signal.SIGTERM) is theirs
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            send(signal.SIGTERM)
            send(signal.SIGHUP)
    assert signal.getsignal(signal.SIGTERM) is theirs
    assert arrived == [signal.SIGTERM] * 2
    assert caplog.text.count("SIGTERM already has a handler") == 1
    assert caplog.text.count("SIGHUP is ignored") == 1


def test_a_handler_that_came_later_stays() -> None:
    def theirs(signum: int, frame: Any) -> None:
        pass

    with SignalHandling():
        signal.signal(signal.SIGTERM, theirs)
    assert signal.getsignal(signal.SIGTERM) is theirs
    assert default(signal.SIGHUP)


def test_another_thread_can_not_install_the_handler(
    sim: Simulator, client: CloreClient, caplog: pytest.LogCaptureFixture
) -> None:
    def work() -> None:
        with client.rent(**QUICK):
            assert default()

    for _ in range(2):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert caplog.text.count("began outside the main thread") == 1
    assert active(sim) == []
    assert default()


def test_the_last_user_may_be_another_thread() -> None:
    handling = SignalHandling()
    thread = threading.Thread(target=handling.close)
    thread.start()
    thread.join()
    # Another thread can't remove it; the next user in the main thread does.
    with SignalHandling():
        with pytest.raises(SignalExit):
            send(signal.SIGTERM)
    assert default()


def test_a_signal_during_the_end_waits_for_the_cancel(
    sim: Simulator, client: CloreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = client._request

    def request(method: str, endpoint: str, *args: Any, **kwargs: Any) -> Any:
        if endpoint == "/v1/cancel_order":
            send(signal.SIGTERM)
        return real(method, endpoint, *args, **kwargs)

    monkeypatch.setattr(client, "_request", request)
    with pytest.raises(SignalExit):
        with client.rent(**QUICK):
            pass
    assert active(sim) == []
    assert default()
    # A KeyboardInterrupt of the block takes precedence, any other exception becomes the context.
    mine = KeyboardInterrupt("mine")
    with pytest.raises(KeyboardInterrupt) as caught:
        with client.rent(**QUICK):
            raise mine
    assert caught.value is mine
    with pytest.raises(SignalExit) as ended:
        with client.rent(**QUICK):
            raise ValueError("mine")
    assert isinstance(ended.value.__context__, ValueError)
    assert active(sim) == []
