"""Wait for a web service in an order: at its public address, or on a port of its machine."""

from __future__ import annotations

import contextlib
import http.client
import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import requests
import urllib3

from clore_client.api.connection import Session, exchange, reason_of
from clore_client.errors import CloreConnectionError, SSHError, WaitTimeoutError, printable
from clore_client.log import logger
from clore_client.models.order import Order
from clore_client.progress import ProgressEvent, ProgressOptions, readable_seconds
from clore_client.ssh.connection_pool import ConnectionPool
from clore_client.ssh.transport import Watchdog, connection_errors, reason
from clore_client.ssh.tunnel import FORWARD_OPENING, REMOTE_HOST, check_forward_arguments
from clore_client.validation import check_number, check_order_id, check_string, short_repr

SERVICE_PAUSE = 2.0  # seconds between two requests
SERVICE_LIMIT = 10.0  # seconds for one request
# Statuses of a proxy, or of a service that loads, before it answers itself.
NOT_YET_STATUSES = frozenset({502, 503, 504, *range(520, 528), 530})


class HTTPWait:
    """The arguments of ``wait_for_http``, checked.

    Parameters:
        read: returns the order with an id.

    Attributes:
        url: the public address to ask; None to ask ``port`` on the machine.
        port: the port of the service.
    """

    def __init__(
        self, order: Mapping[str, Any] | int, read: Callable[[int], Order], path: str,
        port: int | None, timeout: float, progress: ProgressOptions,
    ) -> None:  # fmt: skip
        if not re.fullmatch(r"/[!-~]*", check_string("path", path)):
            raise ValueError(f"path must begin with '/' and be encoded, not {short_repr(path)}")
        self.timeout = check_number("timeout", timeout, infinite=True, unit="seconds")
        if port is not None:
            check_forward_arguments(port)
        if not isinstance(order, Mapping):
            order = read(check_order_id("order", order))
        record = Order(order)
        urls = record.http_urls
        if port is None and not urls:
            raise ValueError(
                "the order has no HTTP port: pass port= for one of the machine, or order with "
                "ports={'8888': 'http'}"
            )
        self.port = port
        self.path = path
        base = next(iter(urls.values())) if port is None else urls.get(str(port))
        self.url = None if base is None else base.rstrip("/") + path
        self.where = self.url or f"port {port} of the machine"
        self.order = record
        self.progress = progress

    def at_public_address(self, user_agent: str) -> int:
        """Wait for the public address, and return the status of its answer."""
        session = Session(user_agent)
        try:
            return self._wait(lambda: self._get(session))
        finally:
            session.close()

    def on_machine(self, pool: ConnectionPool) -> int:
        """Wait for the port on the machine, over SSH."""
        transport = pool.ssh.get_transport()
        with Watchdog() as watchdog:
            return self._wait(lambda: self._get_forwarded(transport, watchdog))

    def _wait(self, get: Callable[[], int | str]) -> int:
        started = time.monotonic()
        with self.progress.reporting() as report:
            while True:
                answer = get()
                passed = time.monotonic() - started
                if isinstance(answer, int) and answer not in NOT_YET_STATUSES:
                    return answer
                why = f"HTTP {answer}" if isinstance(answer, int) else answer
                logger.debug("no service at %s yet: %s", self.where, why)
                if report is not None:
                    text = f"no service at {self.where} yet: {why}, {readable_seconds(passed)}"
                    report(ProgressEvent("http", passed, text))
                if passed >= self.timeout:
                    raise self._too_late(why)
                time.sleep(max(0.0, min(SERVICE_PAUSE, self.timeout - passed)))

    def _too_late(self, why: str) -> WaitTimeoutError:
        error = WaitTimeoutError(
            f"no service at {self.where} within {self.timeout:g}s, the last answer: {why}. Does it "
            "listen on 0.0.0.0 and on the right port?",
            order_id=self.order.id or 0, order=self.order,
        )  # fmt: skip
        error.reason = why
        return error

    def _get(self, session: Session) -> int | str:
        """Return the status of an answer, or why there is none."""
        exchange.begin(lambda: None, lambda: None, time.monotonic() + SERVICE_LIMIT)
        try:
            response = session.get(
                self.url or "", timeout=SERVICE_LIMIT, allow_redirects=False, stream=True,
                auth=lambda request: request,  # else requests would send a password of ~/.netrc
            )  # fmt: skip
            response.close()
            return response.status_code
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise CloreConnectionError(
                    f"the certificate of {self.where} is not valid: {printable(str(error), 300)}"
                ) from error
            return printable(str(reason_of(error)) or type(error).__name__, 200)
        finally:
            exchange.begin(lambda: None, lambda: None, math.inf)

    def _get_forwarded(self, transport: Any, watchdog: Watchdog) -> int | str:
        if transport is None or not transport.is_active():
            raise SSHError("the connection to the machine broke while it was waited for")
        channel: Any = None
        try:
            with watchdog.limit(SERVICE_LIMIT + 2.0, transport.close):
                channel = transport.open_channel(
                    "direct-tcpip", (REMOTE_HOST, self.port), ("127.0.0.1", 0),
                    timeout=FORWARD_OPENING,
                )  # fmt: skip
            with watchdog.limit(SERVICE_LIMIT, channel.close):
                return self._ask(channel)
        except connection_errors() as error:
            return reason(error)
        finally:
            if channel is not None:
                with (
                    watchdog.limit(2.0, transport.close),
                    contextlib.suppress(*connection_errors()),
                ):
                    channel.close()

    def _ask(self, channel: Any) -> int | str:
        channel.settimeout(SERVICE_LIMIT)
        connection = http.client.HTTPConnection("localhost", self.port)
        connection.sock = channel
        connection.request(
            "GET", self.path, headers={"User-Agent": "clore-client", "Connection": "close"}
        )
        try:
            return connection.getresponse().status
        except http.client.HTTPException:
            return "it does not answer with HTTP"
