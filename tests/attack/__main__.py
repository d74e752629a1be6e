"""Run random schedules: ``python -m tests.attack 10000 [first seed]``, or one: ``--seed 4711``."""

from __future__ import annotations

import argparse
import logging
import time

from tests.attack.schedules import Schedule, report, run_many


def main() -> int:
    """Run the command line; return 1 if an invariant was violated."""
    parser = argparse.ArgumentParser(prog="python -m tests.attack", description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=1000, help="how many schedules")
    parser.add_argument("first_seed", type=int, nargs="?", default=1, help="that of the first")
    parser.add_argument("--seed", type=int, help="only this one, step by step")
    parser.add_argument("--threads", type=int, default=24, help="how many at a time")
    parser.add_argument("--log", action="store_true", help="show what the client logs")
    wanted = parser.parse_args()
    logging.basicConfig(level=logging.DEBUG if wanted.log else logging.CRITICAL)
    if wanted.seed is not None:
        verdict = Schedule(wanted.seed).run()
        print(report(verdict))
        return 1 if verdict.wrong else 0
    started, failed = time.monotonic(), 0
    for verdict in run_many(wanted.count, wanted.first_seed, wanted.threads):
        if verdict.wrong:
            failed += 1
            print(report(verdict), flush=True)
    seconds = time.monotonic() - started
    last = wanted.first_seed + wanted.count - 1
    print(
        f"{wanted.count} schedules (seeds {wanted.first_seed} to {last}) in {seconds:.0f} s: "
        f"{failed} violated something"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
