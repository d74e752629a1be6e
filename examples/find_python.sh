#!/bin/sh
# Prints a Python that is new enough and can make virtual environments, or says what to install.
for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python3.10 python3; do
    if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' \
        >/dev/null 2>&1; then
        echo "$candidate"
        exit 0
    fi
done
echo "Python 3.10 or newer with the venv module is needed (Debian: apt install python3-venv)" >&2
exit 1
