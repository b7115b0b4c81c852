#!/usr/bin/env bash
# Builds the wheel, installs it into environments of its own with pinned versions, checks types and runs the tests.
# Needs Rust, python3 with venv, gcc and binutils. check.sh [ENVIRONMENT]; it is kept, a second run is quicker.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$root/target}
environment=${1:-$CARGO_TARGET_DIR/python-environment}
# Bytecode is made for what is imported, once, rather than for all of PyTorch or at every start.
unset PYTHONDONTWRITEBYTECODE

skip() {
    if [ "${HYPERATTN_REQUIRE_TOOLS:-}" = 1 ]; then
        printf 'error: %s\n' "$*" >&2
        exit 1
    fi
    printf 'SKIPPED: %s\n' "$*"
    exit 0
}
started=$SECONDS
took() {
    printf -- '- %s: %d s\n' "$1" "$((SECONDS - started))"
    started=$SECONDS
}
for tool in cargo python3 gcc readelf nm; do
    command -v "$tool" >/dev/null || skip "$tool is not installed"
done
python3 -c 'import venv, ensurepip' 2>/dev/null || skip "python3 -m venv does not work"
"$here/environment.sh" "$environment"
PATH=$environment/bin:$PATH
export UV_CACHE_DIR=$environment/uv-cache
install=(uv pip install --quiet --python)
took environment

ruff check --no-cache "$here"
ruff format --no-cache --check "$here"
(cd "$here" && mypy)
took "style and types"

wheels=$CARGO_TARGET_DIR/wheels
mkdir -p "$wheels"
rm -f "$wheels"/hyperattn-*.whl
pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir "$wheels" "$here"
wheel=("$wheels"/hyperattn-*.whl)
took "$(basename "${wheel[0]}")"

# From elsewhere, so that the installed package is tested.
cd "$CARGO_TARGET_DIR"
bare=$environment/bare
uv venv --quiet --clear --python "$environment/bin/python" "$bare"
"${install[@]}" "$bare" "${wheel[0]}" "$(grep '^numpy==' "$here/tests/requirements.txt")"
"$bare/bin/python" "$here/tests/bare.py"
took "installed with NumPy alone"

"${install[@]}" "$environment" --no-deps --reinstall "${wheel[0]}"
python -m pytest --rootdir "$here" -c "$here/pyproject.toml" "$here/tests"
took tests
