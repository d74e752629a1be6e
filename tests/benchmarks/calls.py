"""Measure one small call on a kept-alive connection."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import requests

from clore_client import CloreClient

from .rows import Row, compare


def rows(urls: dict[str, str], key: str) -> Iterator[Row]:
    """Yield the two lines about ``get_wallets()``."""
    headers = {"auth": key}

    with requests.Session() as session, _client(urls["http"], key) as client:
        url = urls["http"] + "/v1/wallets"
        ratio, detail = compare(
            client.get_wallets,
            lambda: session.get(url, headers=headers, timeout=30).json(),
            clock=time.perf_counter,
            rounds=15,
            calls=100,
        )
    yield Row("get_wallets() / a bare Session's get", ratio, 1.15, detail=detail)

    os.environ["REQUESTS_CA_BUNDLE"] = urls["ca"]
    try:
        with _client(urls["https"], key) as client:
            url = urls["https"] + "/v1/wallets"
            ratio, detail = compare(
                lambda: requests.get(url, headers=headers, timeout=30).json(),
                client.get_wallets,
                clock=time.perf_counter,
                rounds=9,
                calls=20,
            )
    finally:
        del os.environ["REQUESTS_CA_BUNDLE"]
    what = "over TLS: a connection for each call / get_wallets()"
    yield Row(what, ratio, 2.0, at_least=True, detail=detail)


def _client(url: str, key: str) -> CloreClient:
    return CloreClient(key, base_url=url, rate_limit=0)
