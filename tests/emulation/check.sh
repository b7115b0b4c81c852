#!/usr/bin/env bash
# Runs core's tests and conformance tests on emulated processors, and checks which kernel tables each of them got.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
logs=target/emulation
mkdir -p "$logs"

check=emulation
. tests/check_functions.sh

# emulate NAME TABLES ARGUMENT...: cargo's tests through the runner that is set must use exactly these tables, weakest
# first, and choose the last one. The arguments pick the conformance tests.
emulate() {
    local name=$1 tables=$2 log=$logs/$1.txt started=$SECONDS seen
    shift 2
    if ! cargo test --locked --package hyperattn-core --lib "${build[@]}" -- --show-output >"$log" 2>&1 ||
        ! cargo test --locked --package hyperattn-conformance "${build[@]}" "$@" --show-output >>"$log" 2>&1; then
        tail -n 60 "$log" >&2
        fail "$name; everything is in $log"
    fi
    seen=$(sed -n 's/^table //p' "$log" | sort -u | paste -s -d ' ')
    [ "$seen" = "$(tr ' ' '\n' <<<"$tables" | sort | paste -s -d ' ')" ] || fail "$name ran the tables: $seen"
    seen=$(sed -n 's/^detected //p' "$log" | sort -u | paste -s -d ' ')
    [ "$seen" = "${tables##* }" ] || fail "$name chose the table: $seen"
    say "$name: $(awk '/^test result: ok/ { n += $4 } END { print n }' "$log") tests with the tables $tables," \
        "the last one chosen; $((SECONDS - started)) s"
}

# What a real x86-64 machine tests with every table, in small: hash, attention, packing, widening of every element type.
small=(--test detection --test decisions --test exact --
    detection table instruction_set limit codes_are_equal large_logits large_values minus_infinity)
# Most of the tests; those that take long under emulation and are about indices, the same for every table, are left out.
large=(--test detection --test estimator_unmasked --test exact --test exp2 --test hash
    --test merge --test nan --test permutation --test step -- --skip groups --skip heads_and_batch)

host=$(rustc --print host-tuple)
if [ "$host" != x86_64-unknown-linux-gnu ]; then
    skip "emulating older x86-64 processors is tried on x86-64 Linux only, not on $host"
elif ! have qemu-x86_64-static; then
    skip "qemu-x86_64-static is missing"
else
    # The caller's flags could ask for instructions that an older processor lacks.
    export CARGO_ENCODED_RUSTFLAGS=
    build=()
    export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="qemu-x86_64-static -cpu Nehalem"
    emulate x86-64-nehalem "scalar" "${small[@]}"
    export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="qemu-x86_64-static -cpu Haswell"
    emulate x86-64-haswell "scalar avx2" "${small[@]}"
fi

# The toolchain on PATH may lack the standard library for aarch64; Debian's, in /usr/bin, has a package for it.
has_aarch64() { compgen -G "$("$1" --print target-libdir --target aarch64-unknown-linux-gnu)/libstd-*.rlib" >/dev/null; }
if ! have qemu-aarch64-static || ! have aarch64-linux-gnu-gcc; then
    skip "qemu-aarch64-static or aarch64-linux-gnu-gcc is missing"
elif has_aarch64 rustc || { [ -x /usr/bin/rustc ] && PATH=/usr/bin:$PATH && has_aarch64 rustc; }; then
    # Static, because the dynamic loader of the other architecture is not at its place, and a panic would hang.
    export CARGO_ENCODED_RUSTFLAGS=-Ctarget-feature=+crt-static
    export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
    build=(--target aarch64-unknown-linux-gnu --target-dir target/aarch64)
    # Plain NEON, then with bf16 products.
    export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64-static -cpu cortex-a72"
    emulate aarch64-cortex-a72 "scalar neon" "${small[@]}"
    export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64-static -cpu max"
    emulate aarch64-max "scalar neon neon_bf16" "${large[@]}"
else
    skip "no rustc with a standard library for aarch64-unknown-linux-gnu"
fi
