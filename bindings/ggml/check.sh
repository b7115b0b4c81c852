#!/usr/bin/env bash
# Builds ggml's CPU backend from the sources of a pinned package, the hyperattn backend against it, and runs the tests.
# check.sh [FOLDER]; downloads and builds are kept there, a second run does neither again.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
folder=${1:-$root/target/ggml}

check=ggml
. "$root/tests/check_functions.sh"
. "$here/sources.sh"
for tool in cargo cmake g++ nm python3 sha256sum; do
    have "$tool" || { skip "$tool is not installed"; exit 0; }
done
mkdir -p "$folder"
unset GGML_BACKEND_PATH HYPERATTN_GGML_METHOD HYPERATTN_GGML_BUDGET HYPERATTN_GGML_TARGET_ERROR

started=$SECONDS
download_sources "$folder/sources" || { skip "the sources of ggml cannot be downloaded"; exit 0; }
say "sources: $((SECONDS - started)) s"

# quietly COMMAND...: its output only when it fails.
quietly() { "$@" >"$folder/log.txt" 2>&1 || { cat "$folder/log.txt" >&2; fail "$*"; }; }

started=$SECONDS
# hyperattn as tests/consumer has built it already. Little of ggml is worth the time of optimising it.
quietly cmake -S "$here" -B "$folder/build" -DGGML_HYPERATTN_TESTS=ON \
    -DGGML_SOURCE_DIR="$folder/sources/llama.cpp/ggml" \
    -DHYPERATTN_CARGO_TARGET_DIR="$root/target/consumer/cargo" -DCMAKE_DISABLE_FIND_PACKAGE_hyperattn=ON \
    -DCMAKE_CXX_FLAGS_RELEASE="-O1 -DNDEBUG" -DCMAKE_C_FLAGS_RELEASE="-O1 -DNDEBUG" \
    -DGGML_CPU_REPACK=OFF -DGGML_CCACHE=OFF
quietly cmake --build "$folder/build" --parallel "$(nproc)"
! grep "$here.*warning:" "$folder/log.txt" || fail "a warning"
say "built in $((SECONDS - started)) s"

exported=$(nm -D --defined-only "$folder/build/libggml-hyperattn.so" | awk '{ print $3 }')
[ "$exported" = ggml_backend_init ] || fail "the backend exports $exported"

started=$SECONDS
(cd "$folder/build" && quietly ctest --output-on-failure)
say "$(grep -o '[0-9]*% tests passed.*' "$folder/log.txt"), $((SECONDS - started)) s"

# The example is built in earnest by example/measure.sh only, with llama.cpp.
quietly g++ -std=c++17 -Wall -Wextra -Werror -fsyntax-only -I "$folder/sources/llama.cpp/include" \
    -I "$folder/sources/llama.cpp/ggml/include" "$here/example/prompt.cpp"
