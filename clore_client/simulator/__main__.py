"""The simulator from the command line: on its own, or around a command."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
from typing import Any

from .faults import KINDS
from .server import Simulator
from .settings import Seconds


def _seconds(text: str) -> Seconds:
    """A number, or two of them with a comma between."""
    low, comma, high = text.partition(",")
    return (float(low), float(high)) if comma else float(low)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m clore_client.simulator",
        description="A marketplace on loopback that speaks like the Clore.ai API, with real SSH "
        "hosts. Without a command it prints how to reach it and serves until Ctrl-C; with one it "
        "runs the command with CLORE_BASE_URL and CLORE_API_KEY set, and ends with its status.",
    )
    add = parser.add_argument
    add("--servers", type=int, default=200, help="how many servers are listed (200)")
    add("--seed", type=int, default=1, help="same seed, same servers, same chaos (1)")
    add("--form", choices=("live", "documented"), default="live", help="what it speaks (live)")
    add("--rate-limit", type=float, default=1.0, help="seconds between two requests (1)")
    add("--create-order-interval", type=float, default=5.0, help="between two create_order (5)")
    for name, default, text in (
        ("visible-after", 2.0, "until a new order is listed"),
        ("deploy-after", 5.0, "until an order runs"),
        ("cancel-lingers", 2.0, "for which an ended order is still listed"),
        ("sshd-after", 0.0, "from then on until SSH answers"),
    ):
        add(f"--{name}", type=_seconds, default=default, metavar="S[,S]",
            help=f"seconds {text}, or a range ({default:g})")  # fmt: skip
    add("--balance", type=float, default=100.0, help="USD in each wallet (100)")
    add("--host", default="127.0.0.1", help="loopback address to listen on (127.0.0.1)")
    add("--port", type=int, default=0, help="port to listen on (any)")
    add("--create-answer", choices=("none", "order_id", "id", "order"), default="none",
        help="whether create_order answers with an id, and where (none)")  # fmt: skip
    add("--retry-after", action="store_true", help="send Retry-After with a 429")
    add("--no-ssh", dest="ssh", action="store_false", help="no SSH hosts")
    add("--chaos", type=float, default=0.0, metavar="SHARE", help="share of requests that fail")
    add("--fault", action="append", default=[], metavar="ENDPOINT:KIND[:TIMES]",
        help=f"let requests go wrong; kinds: {', '.join(KINDS)}")  # fmt: skip
    add("command", nargs=argparse.REMAINDER, help="a command to run against it")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the simulator; returns the exit status."""
    parser = _parser()
    options: dict[str, Any] = vars(parser.parse_args(arguments))
    command, faults = options.pop("command"), options.pop("fault")
    if command[:1] == ["--"]:
        command = command[1:]
    try:
        simulator = Simulator(**options)
        for fault in faults:
            simulator.faults.add_text(fault)
    except ValueError as error:
        parser.error(str(error))
    # SIGTERM ends it as Ctrl-C does, so that no host and no folder stays behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with simulator as sim:
            if command:
                return _run(sim, command)
            print("A simulated marketplace; nothing here is real, and nothing costs money.")
            print(f"export CLORE_BASE_URL={shlex.quote(sim.url)}")
            print(f"export CLORE_API_KEY={shlex.quote(sim.api_key)}")
            print("Ctrl-C ends it.", flush=True)
            while True:
                signal.pause()
    except KeyboardInterrupt:
        return 0 if not command else 130
    except OSError as error:
        print(f"simulator: {error}", file=sys.stderr)
        return 1


def _run(sim: Simulator, command: list[str]) -> int:
    environment = {**os.environ, "CLORE_BASE_URL": sim.url, "CLORE_API_KEY": sim.api_key}
    try:
        child = subprocess.Popen(command, env=environment)
    except OSError as error:
        print(f"simulator: {command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    while True:
        try:
            status = child.wait()
            return status if status >= 0 else 128 - status
        except KeyboardInterrupt:
            # Ctrl-C has reached the command as well; a SIGTERM only us.
            if child.poll() is None:
                child.terminate()


if __name__ == "__main__":
    sys.exit(main())
