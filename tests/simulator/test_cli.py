"""`python -m clore_client.simulator`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests

from clore_client.simulator import Simulator
from clore_client.simulator.__main__ import main

COMMAND = [sys.executable, "-m", "clore_client.simulator", "--servers", "5"]
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def simulator(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=30, env=ENVIRONMENT
    )


LOOK = """
import os, sys, requests
url, key = os.environ["CLORE_BASE_URL"], os.environ["CLORE_API_KEY"]
answer = requests.get(url + "/v1/wallets", headers={"auth": key}).json()
print(answer["code"], len(requests.get(url + "/v1/marketplace").json()["servers"]), sys.argv[1:])
sys.exit(42)
"""


@pytest.mark.parametrize("options", [["--"], ["--tls"]])
def test_with_a_command(options: list[str]) -> None:
    ended = simulator("--rate-limit", "0", *options, sys.executable, "-c", LOOK, "--servers", "x")
    assert ended.returncode == 42, ended.stderr
    assert ended.stdout == "0 5 ['--servers', 'x']\n"


def test_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert main(["true"]) == 0
    assert main(["sh", "-c", "kill -KILL $$"]) == 128 + signal.SIGKILL
    assert main(["no-such-command-anywhere"]) == 127
    assert "no-such-command-anywhere" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


def test_faults_and_chaos(capfd: pytest.CaptureFixture[str]) -> None:
    code = "import os,requests;print(requests.get(os.environ['CLORE_BASE_URL']).status_code)"
    code = code.replace("['CLORE_BASE_URL']", "['CLORE_BASE_URL'] + '/v1/marketplace'")
    ask = [sys.executable, "-c", code]
    assert main(["--servers", "1", "--fault", "marketplace:html_403", *ask]) == 0
    assert capfd.readouterr().out == "403\n"
    assert main(["--servers", "1", "--chaos", "0", *ask]) == 0
    assert capfd.readouterr().out == "200\n"


@pytest.mark.parametrize(
    "wrong",
    [["--chaos", "2"], ["--fault", "x:y"], ["--servers", "-1"], ["--host", "0.0.0.0"], ["--nope"]],
)
def test_wrong_arguments(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*wrong, "true"])
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_help_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for word in ("--chaos", "--fault", "create_order", "lose_response", "CLORE_BASE_URL"):
        assert word in text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serving_until_a_signal(number: signal.Signals) -> None:
    with subprocess.Popen(
        COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as child:
        try:
            assert child.stdout is not None
            exports: dict[str, str] = {}
            while len(exports) < 2:
                line = child.stdout.readline()
                assert line, child.communicate()
                if line.startswith("export "):
                    name, _, value = line.removeprefix("export ").strip().partition("=")
                    exports[name] = value
            headers = {"auth": exports["CLORE_API_KEY"]}
            url = f"{exports['CLORE_BASE_URL']}/v1/wallets"
            assert requests.get(url, headers=headers, timeout=5).json()["code"] == 0
            child.send_signal(number)
            _, errors = child.communicate(timeout=10)
        finally:
            child.kill()
    assert child.returncode == 0
    assert errors == ""
    with pytest.raises(requests.ConnectionError):
        requests.get(url, timeout=2)


def test_sigterm_reaches_the_command(tmp_path: Path) -> None:
    mark = tmp_path / "started"
    script = f"trap 'exit 9' TERM; touch {mark}; while true; do sleep 0.05; done"
    with subprocess.Popen([*COMMAND, "sh", "-c", script], env=ENVIRONMENT) as child:
        try:
            end = time.monotonic() + 10
            while not mark.exists():
                assert time.monotonic() < end
                time.sleep(0.02)
            child.terminate()
            assert child.wait(10) == 9
        finally:
            child.kill()


def test_a_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with Simulator(servers=1, ssh=False) as sim:
        assert main(["--port", sim.url.rsplit(":", 1)[1], "true"]) == 1
    assert "cannot listen" in capsys.readouterr().err
