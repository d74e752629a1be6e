#!/bin/sh
# Sets up what the tests need, then runs lint, types and all tests. Further arguments go to pytest.
set -eu
cd "$(dirname "$0")/.."

missing=""
command -v sshd >/dev/null 2>&1 || [ -x /usr/sbin/sshd ] || missing="openssh-server"
if [ -n "$missing" ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        echo "== installing $missing"
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing
    else
        echo "== $missing is missing and can't be installed here: the tests that need it will fail"
    fi
fi

venv=${CLORE_TEST_VENV:-.venv-test}
if [ ! -x "$venv/bin/python" ]; then
    echo "== making $venv"
    python=$(sh examples/find_python.sh)
    "$python" -m venv "$venv"
fi
echo "== installing the package and its development tools"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e ".[dev]"

echo "== lint"
"$venv/bin/ruff" format --check .
"$venv/bin/ruff" check .
echo "== types"
"$venv/bin/mypy"
echo "== tests"
exec "$venv/bin/python" -m pytest "$@"
