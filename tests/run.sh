#!/bin/sh
# Sets up what the tests need, then runs lint, types and all tests; those of public behaviour also
# against the client as one file. Further arguments go to pytest. Eight at a time, as most of them
# wait for something most of the time.
set -eu
cd "$(dirname "$0")/.."

missing=""
command -v sshd >/dev/null 2>&1 || [ -x /usr/sbin/sshd ] || missing="openssh-server"
command -v dropbear >/dev/null 2>&1 || [ -x /usr/sbin/dropbear ] || missing="$missing dropbear-bin"
command -v busybox >/dev/null 2>&1 || missing="$missing busybox-static"
command -v redis-server >/dev/null 2>&1 || missing="$missing redis-server"
for shell in dash fish tcsh zsh rsync; do
    command -v $shell >/dev/null 2>&1 || missing="$missing $shell"
done
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
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
bare=$venv-file # for the one file: the same, without the package
for folder in "$venv" "$bare"; do
    if [ ! -x "$folder/bin/python" ]; then
        echo "== making $folder"
        python=$(sh examples/find_python.sh)
        "$python" -m venv "$folder"
    fi
    echo "== installing the package and its development tools in $folder"
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check -e ".[dev]"
done
# What it needs stays.
"$bare/bin/python" -m pip uninstall --quiet --disable-pip-version-check --yes clore-client

echo "== lint"
"$venv/bin/ruff" format --check .
"$venv/bin/ruff" check .
echo "== types"
"$venv/bin/mypy"

echo "== tests of the client as one file"
# In a folder of its own: beside the package, the package would be found first.
copy=build/one-file
rm -rf "$copy"
mkdir -p "$copy"
"$venv/bin/python" -m clore_client.single_file >"$copy/clore_client.py"
cp -R clore_client/simulator "$copy/clore_simulator"
cp -R tests examples README.md pyproject.toml "$copy"
status=0
(cd "$copy" && "$bare/bin/python" -m pytest -n 8 --dist worksteal "$@") || status=$?
# 4, 5: of the tests that were asked for, none is for the one file.
case $#:$status in *:0 | [1-9]*:[45]) ;; *) exit "$status" ;; esac

echo "== tests of the package"
exec "$venv/bin/python" -m pytest -n 8 --dist worksteal "$@"
