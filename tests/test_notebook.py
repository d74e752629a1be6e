"""The notebook in examples/, executed from its first cell to its last."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MakeSim

nbformat: Any = pytest.importorskip("nbformat")
nbclient: Any = pytest.importorskip("nbclient")
matplotlib: Any = pytest.importorskip("matplotlib")
importlib.import_module("ipykernel")  # the kernel of the notebook

ROOT = Path(__file__).resolve().parent.parent


def test_from_the_market_to_a_running_command(
    make_sim: MakeSim, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sim = make_sim(ssh=True, rate_limit=0.5, create_order_interval=0.5, servers=200)
    monkeypatch.setenv("CLORE_BASE_URL", sim.url)
    monkeypatch.setenv("CLORE_API_KEY", sim.api_key)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # With the new home directory, matplotlib would search for the fonts again, which is slow.
    monkeypatch.setenv("MPLCONFIGDIR", matplotlib.get_cachedir())
    notebook = nbformat.read(ROOT / "examples" / "market.ipynb", as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pages = [o["data"]["text/html"] for o in outputs if "text/html" in o.get("data", {})]
    assert any("USD-Blockchain" in page for page in pages)
    assert any("... and" in page and "opacity" in page for page in pages)
    assert any("<th colspan" in page and "Order" in page for page in pages)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    printed = "".join(output.get("text", "") for output in outputs)
    assert "exit_code=0" in printed
    assert "NVIDIA-SMI" in printed
    assert not any(output.output_type == "error" for output in outputs)
    assert [order.active for order in sim.orders] == [False]
    assert os.path.getsize(tmp_path / "servers.csv") > 0
