#!/usr/bin/env bash
# Proves that hyperattn-core needs neither std nor alloc: the compiler gets a sysroot in which they do not exist.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
here=$PWD
root=$(cd ../.. && pwd)
output=$root/target/no_std
sysroot=$output/sysroot
host=$(rustc --print host-tuple)
libraries=lib/rustlib/$host/lib

check=no_std
. ../check_functions.sh

# Name, version and checksum of every package from a registry.
packages() {
    awk -F '"' '/^name = /{name=$2} /^version = /{version=$2} /^checksum = /{print name, version, $2}' "$1" | sort
}
# The program is not in the workspace, but it builds with the workspace's pins: cargo drops what it does not need.
cp "$root/Cargo.lock" Cargo.lock
cargo metadata --format-version 1 >/dev/null
other=$(comm -23 <(packages Cargo.lock) <(packages "$root/Cargo.lock"))
[ -z "$other" ] || fail "Cargo.lock differs from the workspace's in: $other"
say "Cargo.lock pins the packages of the workspace's Cargo.lock"

rm -rf "$sysroot"
mkdir -p "$sysroot/$libraries"
for crate in core compiler_builtins; do
    ln -s "$(rustc --print sysroot)/$libraries/lib$crate"-* "$sysroot/$libraries/"
done

# The sysroot is only worth something if the compiler really finds nothing else.
for crate in std alloc; do
    if printf '#![no_std]\nextern crate %s;\n' "$crate" |
        rustc --sysroot "$sysroot" --crate-type lib --emit "metadata=$output/control" - 2>"$output/control.txt"; then
        fail "a crate that uses $crate compiled: the sysroot hides nothing"
    fi
    grep -q "can't find crate for \`$crate\`" "$output/control.txt" || fail "$(cat "$output/control.txt")"
done
say "the sysroot holds libcore and libcompiler_builtins; the compiler refuses a crate that names std or alloc"

# Encoded, because RUSTFLAGS would split a path with a space. --target keeps it from the build scripts, which need std.
export CARGO_ENCODED_RUSTFLAGS=--sysroot=$sysroot
cargo check --locked --manifest-path "$root/Cargo.toml" --package hyperattn-core --no-default-features \
    --target "$host" --target-dir "$output"
say "hyperattn-core, half and libm compile against that sysroot: none of them uses std or alloc"

case $host in
x86_64-*-linux-*) ;;
*)
    [ "${HYPERATTN_REQUIRE_TOOLS:-0}" != 1 ] || fail "the program is for x86-64 Linux, not for $host"
    echo "SKIPPED: the program without std is for x86-64 Linux, not for $host"
    exit 0
    ;;
esac

for profile in dev release; do
    cargo run --locked --manifest-path "$here/Cargo.toml" --profile "$profile" --target "$host" --target-dir "$output"
    say "the program ($profile) linked with no library but libcore, hyperattn-core and its dependencies, and ran"
done
