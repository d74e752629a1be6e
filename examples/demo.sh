#!/bin/sh
# The main job against the embedded simulator: find the cheapest RTX 4090, rent it, wait, run
# nvidia-smi over SSH, cancel the order. Costs nothing and touches nothing outside this folder.
set -eu
cd "$(dirname "$0")/.."

venv=${CLORE_DEMO_VENV:-.venv-demo}
if [ ! -x "$venv/bin/python" ]; then
    echo "== making a virtual environment in $venv"
    python=$(sh examples/find_python.sh)
    "$python" -m venv "$venv"
fi
echo "== installing clore-client, with SSH and the simulator"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check ".[all]"

echo "== renting from the simulator"
XDG_STATE_HOME=$(cd "$venv" && pwd)/state
export XDG_STATE_HOME
# The script finds examples/clore_client.py beside it; the simulator comes from what was installed.
examples=$PWD/examples
cd "$venv"
exec bin/python -m clore_client.simulator --servers 200 \
    --visible-after 2 --deploy-after 5 bin/python "$examples/rent_cheapest.py" "$@"
