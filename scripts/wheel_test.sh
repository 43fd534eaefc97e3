#!/usr/bin/env bash
# Build the sdist and from it the wheel, install it into another environment, and run it from an empty folder as a newcomer would.
# The other environment sees this one's packages, so that only the wheel itself is installed anew.
set -euo pipefail
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
project=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m build --quiet --outdir "$work/dist" "$project" # an sdist, and from it the wheel
"$python" -m venv "$work/env"
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$work/env/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$work"/dist/*.whl
echo "$packages" >"$("$work/env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz_dependencies.pth"

mkdir "$work/empty folder"
cd "$work/empty folder"
found=$("$work/env/bin/python" -c 'import hft_cli; print(hft_cli.__file__)')
case "$found" in "$work"/env/*) ;; *) echo "the wheel is not what runs: $found" >&2; exit 1 ;; esac
site=$(dirname "$(dirname "$found")")
cd "$project"
{ find hft_cli -type f ! -name '*.pyc'; find conf -type f | sed 's|^|hft_cli/|'; } | while read -r file; do
    [ -e "$site/$file" ] || { echo "the wheel does not have $file" >&2; exit 1; }
done
cd "$work/empty folder"
"$work/env/bin/hft" train +method=hft train.max_steps=3 output_dir=run
"$work/env/bin/hft" verify run
"$work/env/bin/hft" report run
echo "wheel test passed"
