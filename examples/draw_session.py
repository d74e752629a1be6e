"""Draw session.svg: rent_cheapest.py as it runs against the simulated marketplace.

pip install '.[all]'
python examples/draw_session.py
"""

import subprocess
import sys
from html import escape
from pathlib import Path

HERE = Path(__file__).resolve().parent
WIDTH, LINE, LETTER = 880, 19, 8.1  # pixels
MARKET = ["--servers", "200", "--visible-after", "1", "--deploy-after", "2"]


def session() -> list[str]:
    """Return the lines that a terminal shows."""
    script = [sys.executable, str(HERE / "rent_cheapest.py")]
    command = [sys.executable, "-m", "clore_client.simulator", *MARKET, *script]
    run = subprocess.run(
        command, cwd=HERE.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, check=True,
    )  # fmt: skip
    shown = [line for line in run.stdout.splitlines() if "simulator:" not in line]
    return ["$ python rent_cheapest.py", *(line[:106] for line in shown)]


def drawing(lines: list[str]) -> str:
    """Return the lines as an SVG picture of a terminal."""
    height = LINE * (len(lines) + 3)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}">',
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#1b1f27"/>',
        *(
            f'<circle cx="{20 + 18 * i}" cy="18" r="6" fill="{color}"/>'
            for i, color in enumerate(("#ff5f57", "#febc2e", "#28c840"))
        ),
        '<g font-family="ui-monospace, Menlo, Consolas, monospace" font-size="13.5">',
    ]
    for number, line in enumerate(lines):
        color = "#8ab4f8" if line.startswith("$") else "#d6dae2"
        color = "#8c95a6" if line.startswith("   ") else color
        place = f'x="18" y="{LINE * (number + 3)}" textLength="{len(line) * LETTER:.0f}"'
        parts.append(f'<text {place} xml:space="preserve" fill="{color}">{escape(line)}</text>')
    return "\n".join([*parts, "</g>", "</svg>", ""])


if __name__ == "__main__":
    (HERE / "session.svg").write_text(drawing(session()), "utf-8")
