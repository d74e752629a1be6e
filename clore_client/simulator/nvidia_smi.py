"""Imitate `nvidia-smi` on a simulated host, with GPUs from a JSON file."""

# Runs as a separate program on a host, so it imports only modules that load fast.
import json
import os
import sys
import time

DRIVER, CUDA = "580.82.07", "13.0"
NOTICE = "nvidia-smi: this is a simulated host without a real GPU"
HELP = """nvidia-smi of a simulated host. Supported:
    nvidia-smi [-i INDEX[,INDEX...]]
    nvidia-smi -L
    nvidia-smi --query-gpu=FIELD[,FIELD...] --format=csv[,noheader][,nounits] [-i ...]
"""

Gpu = dict[str, object]

# field -> unit
FIELDS = {
    "name": "",
    "gpu_name": "",
    "index": "",
    "count": "",
    "uuid": "",
    "gpu_uuid": "",
    "serial": "",
    "gpu_serial": "",
    "pci.bus_id": "",
    "gpu_bus_id": "",
    "driver_version": "",
    "compute_mode": "",
    "persistence_mode": "",
    "pstate": "",
    "timestamp": "",
    "temperature.gpu": "",
    "fan.speed": "%",
    "utilization.gpu": "%",
    "utilization.memory": "%",
    "memory.total": "MiB",
    "memory.used": "MiB",
    "memory.free": "MiB",
    "memory.reserved": "MiB",
    "power.draw": "W",
    "power.limit": "W",
    "clocks.sm": "MHz",
    "clocks.mem": "MHz",
    "clocks.gr": "MHz",
}


def gpu_fields(index: int, gpu: Gpu, count: int) -> dict[str, str]:
    """Return all fields of a GPU, without units."""
    mib, watts = int(str(gpu["mib"])), float(str(gpu["watts"]))
    idle = 1 + index % 3
    bus = f"00000000:{index + 1:02X}:00.0"
    values = {
        "index": str(index),
        "count": str(count),
        "name": str(gpu["name"]),
        "uuid": str(gpu["uuid"]),
        "serial": "[N/A]",
        "pci.bus_id": bus,
        "driver_version": DRIVER,
        "compute_mode": "Default",
        "persistence_mode": "Enabled",
        "pstate": "P8",
        "timestamp": time.strftime("%Y/%m/%d %H:%M:%S.000"),
        "temperature.gpu": str(30 + idle),
        "fan.speed": "0",
        "utilization.gpu": "0",
        "utilization.memory": "0",
        "memory.total": str(mib),
        "memory.used": str(idle),
        "memory.free": str(mib - idle),
        "memory.reserved": "0",
        "power.draw": f"{watts / 20:.2f}",
        "power.limit": f"{watts:.2f}",
        "clocks.sm": "210",
        "clocks.gr": "210",
        "clocks.mem": "405",
    }
    aliases = {"gpu_name": "name", "gpu_uuid": "uuid", "gpu_serial": "serial"}
    aliases["gpu_bus_id"] = "pci.bus_id"
    return values | {alias: values[field] for alias, field in aliases.items()}


def main(argv: list[str]) -> int:
    """Run as nvidia-smi does; argv[0] is the JSON file."""
    with open(argv[0], encoding="utf-8") as file:
        gpus: list[Gpu] = json.load(file)
    chosen = list(range(len(gpus)))
    visible = os.environ.get("NVIDIA_VISIBLE_DEVICES", "all")
    if visible not in ("all", ""):
        parts = visible.split(",")
        chosen = [n for n in chosen if str(n) in parts or gpus[n]["uuid"] in parts]
    query, form, listing = "", "", False
    rest = argv[1:]
    while rest:
        option, _, value = rest.pop(0).partition("=")
        if option in ("-i", "--id", "-f", "--format", "--query-gpu") and not value and rest:
            value = rest.pop(0)
        if option in ("-L", "--list-gpus"):
            listing = True
        elif option == "--query-gpu":
            query = value
        elif option in ("-f", "--format") and option == "--format":
            form = value
        elif option in ("-i", "--id"):
            wanted = value.split(",")
            chosen = [n for n in chosen if str(n) in wanted or gpus[n]["uuid"] in wanted]
            if not chosen:
                print("No devices were found")
                return 6
        elif option in ("-h", "--help"):
            print(HELP, end="")
            return 0
        else:
            print(f"Invalid combination of input arguments: {option}. Please run -h for help.")
            return 1
    if not chosen:
        print("No devices were found")
        return 6
    found = [gpu_fields(n, gpus[n], len(gpus)) for n in chosen]
    if listing or query:
        # On stderr, because programs read stdout.
        print(NOTICE, file=sys.stderr)
    if listing:
        for gpu in found:
            print(f"GPU {gpu['index']}: {gpu['name']} (UUID: {gpu['uuid']})")
        return 0
    return print_csv(found, query, form) if query else print_table(found)


def print_csv(found: list[dict[str, str]], query: str, form: str) -> int:
    """Print the answer to --query-gpu."""
    options = [part.strip() for part in form.split(",")]
    fields = [part.strip() for part in query.split(",")]
    if "csv" not in options:
        print('"--format=" switch is missing or has an invalid value. It has to include csv.')
        return 1
    for field in fields:
        if field not in FIELDS:
            print(f'Field "{field}" is not a valid field to query.\n')
            return 2
    units = "nounits" not in options
    if "noheader" not in options:
        heads = [f"{f} [{FIELDS[f]}]" if FIELDS[f] else f for f in fields]
        print(", ".join(heads))
    for gpu in found:
        cells = [f"{gpu[f]} {FIELDS[f]}" if units and FIELDS[f] else gpu[f] for f in fields]
        print(", ".join(cells))
    return 0


def print_table(found: list[dict[str, str]]) -> int:
    """Print the default table."""
    line = "+" + "-" * 41 + "+" + "-" * 24 + "+" + "-" * 22 + "+"
    wide = "+" + "-" * 89 + "+"
    print(time.strftime("%a %b %d %H:%M:%S %Y"))
    print(wide)
    title = f"NVIDIA-SMI {DRIVER}    Driver Version: {DRIVER}    CUDA Version: {CUDA}"
    for text in (title, "SIMULATED HOST: these GPUs do not exist"):
        print(f"| {text:<87} |")
    print(line)
    heads = (
        "GPU  Name                 Persistence-M",
        "Bus-Id          Disp.A",
        "Volatile GPU-Util",
    )
    print(f"| {heads[0]:<39} | {heads[1]:<22} | {heads[2]:<20} |")
    heads = ("Fan  Temp   Perf          Pwr:Usage/Cap", "Memory-Usage", "Compute M.")
    print(f"| {heads[0]:<39} | {heads[1]:>22} | {heads[2]:>20} |")
    print(line.replace("-", "="))
    for gpu in found:
        name = f"{gpu['index']:>3}  {gpu['name'][:31]:<31} On"
        print(f"| {name:<39} | {gpu['pci.bus_id']:<16}   Off | {'N/A':>20} |")
        power = f"{float(gpu['power.draw']):.0f}W / {float(gpu['power.limit']):.0f}W"
        heat = f"{gpu['fan.speed']:>3}%  {gpu['temperature.gpu']:>3}C    P8 {power:>20}"
        memory = f"{gpu['memory.used']}MiB / {gpu['memory.total']}MiB"
        print(f"| {heat:<39} | {memory:>22} | {'0%      Default':>20} |")
        print(line)
    print()
    print(wide)
    print(f"| {'Processes:':<87} |")
    print(f"| {'  No running processes found':<87} |")
    print(wide)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
