"""Serve a simulated marketplace, or run a command against one."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from types import FrameType

from .faults import ENDPOINTS, KINDS
from .settings import Seconds
from .simulator import Simulator

_EPILOG = f"""\
Without a command it prints its URL and key, and serves until Ctrl-C. With a command it
sets CLORE_BASE_URL and CLORE_API_KEY, runs the command, and exits with its status.

LOW,HIGH is a pair of numbers to draw from at random, such as 2,20.
Endpoints of --fault: * {" ".join(ENDPOINTS)}
Kinds of --fault: {" ".join(KINDS)}
"""


def _seconds(text: str) -> Seconds:
    low, comma, high = text.partition(",")
    return (float(low), float(high)) if comma else float(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m clore_client.simulator",
        usage="%(prog)s [options] [command ...]",
        description="A simulated Clore.ai marketplace on this machine, with real SSH hosts.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--servers", type=int, default=200, metavar="N", help="how many servers (default: 200)")
    add(
        "--seed",
        type=int,
        default=1,
        metavar="N",
        help="for servers and --chaos (default: 1)",
    )
    add("--form", choices=("live", "documented"), default="live", help="default: live")
    add("--host", default="127.0.0.1", help="a loopback address (default: 127.0.0.1)")
    add("--port", type=int, default=0, help="default: any that is free")
    add("--tls", action="store_true", help="serve https with a self-signed certificate")
    add("--no-ssh", action="store_true", help="run no SSH hosts")
    add("--balance", type=float, default=100.0, metavar="USD", help="in each wallet (default: 100)")
    add("--rate-limit", type=float, default=1.0, metavar="SECONDS",
        help="minimum between two requests of a key (default: 1)")  # fmt: skip
    add("--create-order-interval", type=float, default=5.0, metavar="SECONDS",
        help="minimum between two create_order of a key (default: 5)")  # fmt: skip
    for name, default, text in (
        ("visible-after", 2.0, "until a new order is listed"),
        ("deploy-after", 5.0, "until a new order is deployed"),
        ("sshd-after", 0.0, "from then until its SSH host accepts connections"),
        ("cancel-lingers", 2.0, "for which an ended order is still listed as active"),
    ):
        add(f"--{name}", type=_seconds, default=default, metavar="SECONDS",
            help=f"{text}, or LOW,HIGH (default: {default:g})")  # fmt: skip
    add("--clock-offset", type=float, default=0.0, metavar="SECONDS",
        help="by which the server's clock is ahead (default: 0)")  # fmt: skip
    add("--create-answer", choices=("none", "order_id", "id", "order"), default="none",
        help="how create_order names the new order (default: none)")  # fmt: skip
    add("--retry-after", action="store_true", help="send Retry-After with HTTP 429")
    add("--chaos", type=float, default=0.0, metavar="SHARE",
        help="fraction of requests that fail at random, such as 0.2")  # fmt: skip
    add("--fault", action="append", default=[], metavar="ENDPOINT:KIND[:TIMES]",
        help="make the next requests to an endpoint fail; may be repeated")  # fmt: skip
    add("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    command: list[str] = options.command
    if command[:1] == ["--"]:
        del command[0]
    try:
        simulator = Simulator(
            servers=options.servers,
            seed=options.seed,
            form=options.form,
            rate_limit=options.rate_limit,
            create_order_interval=options.create_order_interval,
            visible_after=options.visible_after,
            deploy_after=options.deploy_after,
            cancel_lingers=options.cancel_lingers,
            sshd_after=options.sshd_after,
            balance=options.balance,
            ssh=not options.no_ssh,
            tls=options.tls,
            host=options.host,
            port=options.port,
            create_answer=options.create_answer,
            clock_offset=options.clock_offset,
            retry_after=options.retry_after,
            chaos=options.chaos,
            faults=options.fault,
        )
    except ValueError as error:
        parser.error(str(error))
    signals = _Signals()
    try:
        simulator.start()
    except OSError as error:
        print(f"cannot listen on {options.host}:{options.port}: {error}", file=sys.stderr)
        signals.restore()
        return 1
    try:
        if command:
            return _run(command, _variables(simulator), signals)
        _announce(simulator)
        signals.arrived.wait()
        return 0
    finally:
        simulator.stop()
        signals.restore()


class _Signals:
    """Stop the command and this program on Ctrl-C and SIGTERM."""

    def __init__(self) -> None:
        self.arrived = threading.Event()
        self.child: subprocess.Popen[bytes] | None = None
        self._before = [
            (signal.SIGINT, signal.signal(signal.SIGINT, self._interrupt)),
            (signal.SIGTERM, signal.signal(signal.SIGTERM, self._terminate)),
        ]

    def restore(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._before:
            signal.signal(number, handler)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        # The terminal sends Ctrl-C to the command, too, which decides how to end.
        self.arrived.set()

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        self.arrived.set()
        if self.child is not None:
            self.child.send_signal(number)


def _variables(simulator: Simulator) -> dict[str, str]:
    variables = {"CLORE_BASE_URL": simulator.url, "CLORE_API_KEY": simulator.api_key}
    if simulator.ca_file:
        variables["REQUESTS_CA_BUNDLE"] = simulator.ca_file
    return variables


def _announce(simulator: Simulator) -> None:
    print(f"A simulated marketplace listens on {simulator.url}; press Ctrl-C to stop it.")
    print("Nothing in it is real, and nothing costs money.")
    print(f"Key: {simulator.api_key}\n")
    for name, value in _variables(simulator).items():
        print(f"export {name}={shlex.quote(value)}")
    sys.stdout.flush()


def _run(command: list[str], variables: dict[str, str], signals: _Signals) -> int:
    try:
        child = subprocess.Popen(command, env=os.environ | variables)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return 127 if isinstance(error, FileNotFoundError) else 126
    signals.child = child
    if signals.arrived.is_set():
        child.terminate()
    code = child.wait()
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main())
