#!/usr/bin/env bash
# Packs the tests, the C harness and the benchmark into one folder for a machine with a GPU, its driver and nothing else:
#     cuda/pack.sh FOLDER
# There, FOLDER/run.sh runs all tests, and FOLDER/bench the benchmark tool. Needs nvcc here, found as the build finds it.
# HYPERATTN_PACK_NVRTC=1 packs NVRTC's libraries too, and tests the code that it makes.
set -euo pipefail
[ $# -eq 1 ] || { sed -n '2,5s/^# \?//p' "$0"; exit 2; }
folder=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."

nvcc=${HYPERATTN_NVCC:-$(command -v nvcc || ls "${CUDA_HOME:-${CUDA_PATH:-/nowhere}}/bin/nvcc" 2>/dev/null || true)}
[ -x "$nvcc" ] || { echo "error: no nvcc: set HYPERATTN_NVCC, PATH or CUDA_HOME" >&2; exit 1; }
# One build for everything below, which fails where nvcc does.
export HYPERATTN_NVCC=$nvcc

cargo build --release --locked --package hyperattn-ffi --package hyperattn-bench
target=${CARGO_TARGET_DIR:-target}
executables=$(cargo test --release --locked --no-run --package hyperattn-cuda --message-format json-render-diagnostics |
    sed -n 's/.*"executable":"\([^"]*\)".*/\1/p')
mkdir -p "$folder/tests"
for executable in $executables; do
    name=$(basename "$executable")
    strip --strip-debug -o "$folder/tests/${name%-*}" "$executable"
done
strip --strip-debug -o "$folder/bench" "$target/release/hyperattn-bench"
cp -r tests/bench/problems tests/data/qwen2.5-coder-0.5b_novel_layer12 "$folder/"
find "$target/release/build" -path '*hyperattn-cuda-*' -name ptxas.txt -printf '%T@ %p\n' | sort -n | tail -n 1 |
    cut -d ' ' -f 2- | xargs -I '{}' cp '{}' "$folder/ptxas.txt"

toolkit=$(dirname "$(dirname "$(readlink -f "$nvcc")")")
cudart=$(find "$toolkit"/lib* "$toolkit"/targets/*/lib -name libcudart_static.a 2>/dev/null | head -n 1 || true)
if [ -n "$cudart" ]; then
    ${CC:-cc} -std=c99 -O2 -I include -I tests/c/support tests/c/programs/cuda_runtime.c tests/c/support/*.c \
        "$target/release/libhyperattn.a" "$cudart" -lpthread -ldl -lrt -lm -o "$folder/tests/cuda_runtime"
    strip --strip-debug "$folder/tests/cuda_runtime"
else
    echo "warning: no libcudart_static.a beside nvcc; the C harness is left out" >&2
fi
if [ "${HYPERATTN_PACK_NVRTC:-0}" = 1 ]; then
    mkdir -p "$folder/nvrtc"
    find "$toolkit"/lib* "$toolkit"/targets/*/lib -name 'libnvrtc*.so.*' ! -name '*.alt.*' -exec cp -L '{}' "$folder/nvrtc/" ';' \
        2>/dev/null
fi

cat >"$folder/run.sh" <<'RUN'
#!/usr/bin/env bash
# All tests on this machine's first GPU. Goes on after a failure; the last line says how many failed.
cd "$(dirname "${BASH_SOURCE[0]}")"
failed=0
run() {
    printf '\n=== %s\n' "$*"
    local start=$SECONDS
    env "$@" || { failed=$((failed + 1)); printf '*** FAILED: %s\n' "$*"; }
    printf -- '--- %d s\n' "$((SECONDS - start))"
}
export HYPERATTN_REQUIRE_DEVICE=1 HYPERATTN_TEST_DATA=$PWD/qwen2.5-coder-0.5b_novel_layer12
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || true
run tests/hyperattn_cuda
run tests/no_driver
for test in tests/*; do
    case $test in
    tests/hyperattn_cuda | tests/no_driver) ;;
    *) run "$test" ;;
    esac
done
# The kernels that other devices get.
run HYPERATTN_CUDA_KERNELS=mma tests/exact
run HYPERATTN_CUDA_KERNELS=mma tests/backward
run HYPERATTN_CUDA_KERNELS=any tests/exact every_dimension_and_type lengths_around_tiles a_nan_stays
if [ -d nvrtc ]; then
    run LD_LIBRARY_PATH="$PWD/nvrtc" HYPERATTN_CUDA_IMAGE=nvrtc tests/exact heads_share_keys captured_and_replayed
fi
printf '\n%d failed\n' "$failed"
[ "$failed" -eq 0 ]
RUN
chmod +x "$folder/run.sh"
du -sh "$folder" "$folder"/*
