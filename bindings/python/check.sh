#!/usr/bin/env bash
# Builds the wheel, installs it into an environment of its own with pinned versions, and runs the tests.
# Needs Rust, python3 with venv, gcc and binutils. check.sh [ENVIRONMENT]; it is kept, a second run installs nothing twice.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$root/target}
environment=${1:-$CARGO_TARGET_DIR/python-environment}

skip() {
    if [ "${HYPERATTN_REQUIRE_TOOLS:-}" = 1 ]; then
        printf 'error: %s\n' "$*" >&2
        exit 1
    fi
    printf 'SKIPPED: %s\n' "$*"
    exit 0
}
for tool in cargo python3 gcc readelf nm; do
    command -v "$tool" >/dev/null || skip "$tool is not installed"
done
[ -x "$environment/bin/pip" ] || python3 -m venv "$environment" || skip "python3 -m venv does not work"
PATH=$environment/bin:$PATH

started=$SECONDS
pip install --quiet --disable-pip-version-check --requirement "$here/tests/requirements.txt"
if ! python -c 'import torch' 2>/dev/null; then
    pip install --quiet --disable-pip-version-check --no-deps torch==2.15.0
    python "$here/tests/stub_cuda.py"
fi
printf 'environment: %d s\n' "$((SECONDS - started))"

ruff check --no-cache "$here"
ruff format --no-cache --check "$here"

started=$SECONDS
wheels=$CARGO_TARGET_DIR/wheels
mkdir -p "$wheels"
rm -f "$wheels"/hyperattn-*.whl
pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir "$wheels" "$here"
pip install --quiet --disable-pip-version-check --no-deps --force-reinstall "$wheels"/hyperattn-*.whl
printf 'wheel: %d s, %s\n' "$((SECONDS - started))" "$(basename "$wheels"/hyperattn-*.whl)"

# From elsewhere, so that the installed package is tested.
cd "$CARGO_TARGET_DIR"
exec python -m pytest --rootdir "$here" -c "$here/pyproject.toml" "$here/tests"
