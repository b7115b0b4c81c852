#!/usr/bin/env bash
# Makes the environment for check.sh: everything that the tests need but the wheel, with pinned versions; 0.5 GB are
# fetched. environment.sh FOLDER; what is there already is kept. Needs python3 with venv, gcc and binutils.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
environment=$1
# Bytecode is made for what is imported, once, rather than for all of PyTorch or at every start.
unset PYTHONDONTWRITEBYTECODE

[ -x "$environment/bin/pip" ] || python3 -m venv "$environment"
PATH=$environment/bin:$PATH
# uv, because it fetches the packages side by side and unpacks them in a tenth of pip's time.
pip install --quiet --disable-pip-version-check uv==0.13.9
export UV_CACHE_DIR=$environment/uv-cache
uv pip install --quiet --python "$environment" --requirement "$here/tests/requirements.txt"
if ! python -c 'import torch' 2>/dev/null; then
    uv pip install --quiet --python "$environment" --no-deps torch==2.15.0
    python "$here/tests/stub_cuda.py"
fi
