"""The `nvidia-smi` of a simulated host. Runs as a program of its own, and imports nothing else."""

from __future__ import annotations

import json
import sys

NOTE = "simulated by clore_client.simulator: there is no such GPU"
UNITS = {"memory.total": "MiB", "memory.used": "MiB", "memory.free": "MiB", "power.limit": "W"}


def main(gpus: list[tuple[str, int, int]], arguments: list[str]) -> int:
    """Answer like nvidia-smi.

    Parameters:
        gpus: name, memory in MiB and power limit in W of each.
        arguments: the command line.
    """
    options = dict(a.partition("=")[::2] for a in arguments)
    query = options.get("--query-gpu")
    if query is not None:
        print(NOTE, file=sys.stderr)
        return _query(gpus, query.split(","), options.get("--format", "").split(","))
    if "-L" in options or "--list-gpus" in options:
        print(NOTE, file=sys.stderr)
        for n, (name, _, _) in enumerate(gpus):
            print(f"GPU {n}: {name} (UUID: GPU-simulated-{n})")
        return 0
    if arguments:
        print(f"nvidia-smi (simulated): not understood: {' '.join(arguments)}", file=sys.stderr)
        return 6
    _table(gpus)
    return 0


def _query(gpus: list[tuple[str, int, int]], fields: list[str], options: list[str]) -> int:
    options = [option.strip() for option in options]
    fields = [field.strip() for field in fields]
    if "csv" not in options:
        print('"--format=" switch is missing "csv".', file=sys.stderr)
        return 6
    rows = []
    for n, (name, mib, watts) in enumerate(gpus):
        known = {
            "index": str(n),
            "name": name,
            "gpu_name": name,
            "uuid": f"GPU-simulated-{n}",
            "count": str(len(gpus)),
            "driver_version": "0.0",
            "memory.total": str(mib),
            "memory.used": "0",
            "memory.free": str(mib),
            "utilization.gpu": "0 %",
            "temperature.gpu": "35",
            "power.limit": f"{watts:.2f}",
        }
        for field in fields:
            if field not in known:
                print(f'Field "{field}" is not a valid field to query.', file=sys.stderr)
                return 2
        units = {} if "nounits" in options else UNITS
        rows.append(", ".join(f"{known[f]} {units[f]}" if f in units else known[f] for f in fields))
    if "noheader" not in options:
        units = {} if "nounits" in options else UNITS
        print(", ".join(f"{f} [{units[f]}]" if f in units else f for f in fields))
    print("\n".join(rows))
    return 0


def _table(gpus: list[tuple[str, int, int]]) -> None:
    line = "+" + "-" * 70 + "+"
    print(line)
    print(f"| {'NVIDIA-SMI (a simulation)':<68} |")
    print(f"| {NOTE:<68} |")
    print(line)
    print(f"| {'GPU':<4} {'Name':<34} {'Memory':>16} {'Power limit':>11} |")
    print(line)
    for n, (name, mib, watts) in enumerate(gpus):
        print(f"| {n:<4} {name[:34]:<34} {f'0 / {mib} MiB':>16} {f'{watts} W':>11} |")
    print(line)


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1]), sys.argv[2:]))
