"""Where the key and the base URL come from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from clore_client import CloreClient, ConfigurationError
from clore_client.settings import check_base_url, find_key, is_loopback


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
def test_a_file_without_a_key_is_none(config: Path, content: str) -> None:
    config.write_text(content)
    assert find_key(None) == (None, "nowhere")


@pytest.mark.parametrize(
    "content", [b"not json geheim", b'["geheim"]', b'{"api_key": 5}', b"\xff\xfe", b"[" * 99999]
)
def test_a_broken_file_is_named(config: Path, content: bytes) -> None:
    config.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"~/\.clore/config\.json") as caught:
        CloreClient()
    assert "geheim" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert CloreClient("key").api_key == "key"


def test_a_folder_in_its_place_is_named(config: Path) -> None:
    config.mkdir()
    with pytest.raises(ConfigurationError, match=r"config\.json"):
        CloreClient()


def test_a_file_that_others_may_read_is_warned_about_once(
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
def test_a_key_that_can_be_none_is_refused_without_showing_it(key: Any) -> None:
    with pytest.raises(ValueError, match="API key") as caught:
        CloreClient(key)
    assert "geheim" not in str(caught.value)
    client = CloreClient("good")
    with pytest.raises(ConfigurationError):
        client.api_key = key
    client.headers = {"auth": key}
    with pytest.raises(ConfigurationError):
        client.get_wallets()


def test_urls() -> None:
    assert check_base_url("https://api.clore.ai/", "x") == "https://api.clore.ai"
    for bad in ("", "api.clore.ai", "https://", "https://a@b", "https://h?x", "https://h#x",
                "https://h\\@e", "https://h h", "http://[x", "https://h:x"):  # fmt: skip
        with pytest.raises(ConfigurationError, match="base_url"):
            check_base_url(bad, "base_url")
    for here in ("http://127.0.0.1", "http://127.9.9.9:1", "http://[::1]:5", "http://LOCALHOST"):
        assert is_loopback(here)
    for there in (
        "http://localhost.evil",
        "http://0.0.0.0",
        "http://127.1.evil",
        "http://10.0.0.1",
    ):
        assert not is_loopback(there)
