"""The key and the base URL: their sources and their checks."""

from __future__ import annotations

import copy
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from clore_client import CloreClient, ConfigurationError
from tests.variant import Simulator


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "home" / ".clore" / "config.json"
    path.parent.mkdir()
    return path


def test_precedence(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert CloreClient().api_key is None
    config.write_text(json.dumps({"api_key": "from-file"}))
    assert CloreClient().api_key == CloreClient("").api_key == "from-file"
    monkeypatch.setenv("CLORE_API_KEY", "")
    assert CloreClient().api_key == "from-file"
    monkeypatch.setenv("CLORE_API_KEY", "from-env\n")
    assert CloreClient().api_key == "from-env"
    assert CloreClient("from-argument").headers == {"auth": "from-argument"}
    monkeypatch.setenv("CLORE_BASE_URL", "http://127.0.0.1:9/")
    assert CloreClient().BASE_URL == "http://127.0.0.1:9"
    assert CloreClient(base_url="https://other.example").BASE_URL == "https://other.example"


@pytest.mark.parametrize("content", ["{}", '{"api_key": null}', '{"api_key": ""}'])
def test_a_file_without_a_key_gives_none(config: Path, content: str) -> None:
    config.write_text(content)
    assert CloreClient().api_key is None


@pytest.mark.parametrize(
    "content", [b"not json geheim", b'["geheim"]', b'{"api_key": 5}', b"\xff\xfe", b"[" * 99999]
)
def test_the_error_names_a_broken_file(config: Path, content: bytes) -> None:
    config.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"~/\.clore/config\.json") as caught:
        CloreClient()
    assert "geheim" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert CloreClient("key").api_key == "key"


def test_the_error_names_a_folder_in_place_of_the_file(config: Path) -> None:
    config.mkdir()
    with pytest.raises(ConfigurationError, match=r"config\.json"):
        CloreClient()


def test_a_file_that_others_may_read_gives_one_warning(
    config: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config.write_text('{"api_key": "geheim"}')
    config.chmod(0o644)
    CloreClient()
    CloreClient()
    assert caplog.text.count("chmod 600") == 1
    assert "geheim" not in caplog.text
    caplog.clear()
    os.chmod(config, 0o600)
    assert CloreClient().api_key == "geheim"
    assert not caplog.text


@pytest.mark.parametrize(
    "key",
    ["Bearer geheim", "auth: geheim", "gehe im", "geh\neim", " geheim", "gehéim", "ge\x00heim"],
)
def test_an_invalid_key_is_refused_and_not_shown(key: Any) -> None:
    with pytest.raises(ValueError, match="API key") as caught:
        CloreClient(key)
    assert "geheim" not in str(caught.value)
    client = CloreClient("good")
    with pytest.raises(ConfigurationError):
        client.api_key = key
    client.headers = {"auth": key}
    with pytest.raises(ConfigurationError):
        client.get_wallets()


def test_the_error_names_the_source_of_a_bad_key(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.write_text('{"api_key": "Bearer geheim"}')
    with pytest.raises(ConfigurationError, match=r"from ~/\.clore/config\.json starts") as caught:
        CloreClient()
    assert "geheim" not in str(caught.value)
    monkeypatch.setenv("CLORE_API_KEY", "ge heim")
    with pytest.raises(ConfigurationError, match="from the environment variable CLORE_API_KEY has"):
        CloreClient()
    assert CloreClient("from-argument").api_key == "from-argument"


def test_the_file_is_never_written(config: Path) -> None:
    config.parent.rmdir()
    CloreClient().describe()
    assert not config.parent.exists()
    config.parent.mkdir()
    config.write_text('{"api_key": "from-file\\n", "other": 1}')
    config.chmod(0o400)
    before = config.stat()
    client = CloreClient()
    client.api_key = "another"
    client.close()
    assert CloreClient.from_env().api_key == "from-file"
    assert config.read_text() == '{"api_key": "from-file\\n", "other": 1}'
    assert config.stat().st_mtime_ns == before.st_mtime_ns
    assert [path.name for path in config.parent.iterdir()] == ["config.json"]


def test_urls() -> None:
    assert CloreClient(base_url="https://api.clore.ai/").BASE_URL == "https://api.clore.ai"
    for bad in ("x", "api.clore.ai", "https://", "https://a@b", "https://h?x", "https://h#x",
                "https://h\\@e", "https://h h", "http://[x", "https://h:x"):  # fmt: skip
        with pytest.raises(ConfigurationError, match="base_url"):
            CloreClient(base_url=bad)


@pytest.mark.internal
def test_loopback_hosts() -> None:
    from clore_client.config import is_loopback

    for here in ("http://127.0.0.1", "http://127.9.9.9:1", "http://[::1]:5", "http://LOCALHOST"):
        assert is_loopback(here)
    for there in (
        "http://localhost.evil",
        "http://0.0.0.0",
        "http://127.1.evil",
        "http://10.0.0.1",
    ):
        assert not is_loopback(there)


# --- from_env() and describe() ---


def test_from_env(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = r"CLORE_API_KEY is not set or empty.*~/\.clore/config\.json does not exist or has none"
    with pytest.raises(ConfigurationError, match=looked):
        CloreClient.from_env()
    config.write_text("{}")
    monkeypatch.setenv("CLORE_API_KEY", "")
    with pytest.raises(ConfigurationError, match=looked):
        CloreClient.from_env()
    config.write_text('{"api_key": "from-file"}')
    assert CloreClient.from_env().api_key == "from-file"
    monkeypatch.setenv("CLORE_API_KEY", "from-env")

    class Mine(CloreClient):
        pass

    client = Mine.from_env(timeout=7, base_url="http://127.0.0.1:9")
    assert type(client) is Mine
    assert (client.api_key, client.timeout, client.BASE_URL) == (
        "from-env", 7, "http://127.0.0.1:9")  # fmt: skip
    with pytest.raises(TypeError, match="api_key"):
        CloreClient.from_env(api_key="x")
    monkeypatch.setenv("CLORE_API_KEY", "Bearer geheim")
    with pytest.raises(ConfigurationError, match="give only the key"):
        CloreClient.from_env()


def test_describe_names_the_source_of_the_key(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = CloreClient().describe()
    assert told.startswith("no key in CLORE_API_KEY or ~/.clore/config.json\n")
    config.write_text('{"api_key": "geheim-in-a-file-1234"}')
    told = CloreClient().describe()
    assert told.startswith("a key that ends in '1234', from file ~/.clore/config.json\n")
    assert "geheim" not in told
    monkeypatch.setenv("CLORE_API_KEY", "geheim-of-the-env-5678\n")
    told = CloreClient().describe()
    assert "ends in '5678', from environment variable CLORE_API_KEY" in told
    client = CloreClient("geheim-of-the-call-9abc")
    assert "ends in '9abc', from argument" in client.describe()
    client.headers["auth"] = "geheim-set-later-def0"
    assert "ends in 'def0', from attribute" in client.describe()
    client.api_key = None
    assert client.describe().startswith("no key any more")
    for short in ("abc", "abcdefg"):  # four of seven characters would be most of the key
        assert short[-2:] not in CloreClient(short).describe().splitlines()[0]


def test_describe_names_the_source_of_the_url(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(CloreClient):
        BASE_URL = "https://mine.example"

    ending = "https://api.clore.ai, from class attribute CloreClient.BASE_URL"
    assert CloreClient("k").describe().splitlines()[1].endswith(ending)
    assert "https://mine.example, from class attribute Mine.BASE_URL" in Mine("k").describe()
    monkeypatch.setenv("CLORE_BASE_URL", "https://env.example/")
    assert "https://env.example, from environment variable CLORE_BASE_URL" in Mine("k").describe()
    client = Mine("k", base_url="https://call.example")
    assert "https://call.example, from argument" in client.describe()
    client.BASE_URL = "https://later.example"
    assert "https://later.example, from attribute" in client.describe()


# --- copies ---


def test_a_client_can_not_be_pickled(client: CloreClient) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match=r"can't be pickled.*from_env") as caught:
            pickle.dumps(client, protocol)
        assert str(client.api_key) not in str(caught.value)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy])
def test_a_copy_is_an_independent_client(sim: Simulator, how: Any) -> None:
    class Mine(CloreClient):
        pass

    client = Mine(sim.api_key, base_url=sim.url, rate_limit=0.02, create_order_interval=0.05)
    order = client.create_order(client.find_servers("RTX 4090")[0]["id"])
    twin = how(client)
    assert type(twin) is Mine
    assert twin._sessions is not client._sessions
    assert (twin.api_key, twin.BASE_URL, twin.rate_limit) == (sim.api_key, sim.url, 0.02)
    assert twin.describe() == client.describe()
    twin.headers["auth"] = "other"
    twin.timeout = 3
    assert client.api_key == sim.api_key
    assert client.timeout == 30
    twin.api_key = client.api_key
    twin.close()
    assert client.cancel_order(order["order_id"])
    twin_order = twin.get_order(order["order_id"])
    assert twin_order is not None
    assert twin_order.status in (
        "cancelled",
        "creating",
        "running",
    )  # the cancelled order may still be listed
