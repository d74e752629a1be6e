"""Responses decode to the same values with msgspec and without it."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clore_client.api import retry
from tests.conftest import client_for
from tests.variant import Simulator

BODIES = [
    b'{"a": 123456789012345678901234567890}', b"18446744073709551616", b"-9223372036854775809",
    b'{"a": NaN}', b"1e400", b"-0.0", b"5e-324", b"1E5", b'"\\ud800"', b'"\\u0000"',
    b'{"a": 1, "a": 2}', b"\xef\xbb\xbf{}", '{"a": "é"}'.encode("utf-16"), b" [1] \n",
    b"[1,]", b'"\xff"', b'"\x00"', b"", b"<html>", b"[" * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("body", BODIES)
def test_msgspec_changes_no_value(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("msgspec")
    fast = repr(retry.decode_json(body))
    monkeypatch.setattr(retry, "fast_json", lambda: None)
    assert fast == repr(retry.decode_json(body))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=9,
)


@given(json_values)
def test_msgspec_decodes_what_json_does(value: Any) -> None:
    pytest.importorskip("msgspec")
    for ascii_only in (True, False):
        body = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
        try:
            expected = repr(json.loads(body))
        except ValueError:
            expected = "None"
        assert repr(retry.decode_json(body)) == expected


def test_without_msgspec(sim: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "msgspec", None)
    monkeypatch.setattr(retry, "fast_json", retry.fast_json.__wrapped__)
    assert retry.fast_json() is None
    assert client_for(sim).get_marketplace()
