#!/bin/sh
# Writes constraints.txt: what pip installs today, as bare name==version lines, from a fresh environment, so that nothing which
# somebody tried out in .venv gets in. PYTHON=… names the interpreter.
set -eu
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check -e '.[embedded,dev]'
"$work/venv/bin/python" -m pip freeze --disable-pip-version-check --exclude-editable >"$work/all"
if grep -Ev '^[A-Za-z0-9._-]+==[^ ;@]+$' "$work/all" >&2; then
    echo "constraints: the lines above are no plain name==version; constraints.txt is unchanged" >&2
    exit 1
fi
cp "$work/all" constraints.txt
echo "constraints: constraints.txt holds $(wc -l <constraints.txt) versions"
