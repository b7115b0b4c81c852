#!/usr/bin/env bash
# Installs the libraries and builds an engine against them in every documented way.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
here=$PWD
root=$(cd ../.. && pwd)
output=$root/target/consumer
# One directory for all of cargo's builds but the second one.
export CARGO_TARGET_DIR=$output/cargo
installed=$output/installed
rm -rf "${output:?}"/{installed,moved,static,programs,cmake_*,conan,conan_files,copy,vcpkg}
mkdir -p "$output/programs"

check=consumer
. ../check_functions.sh
# quietly COMMAND...: its output only when it fails.
quietly() { "$@" >"$output/log.txt" 2>&1 || { cat "$output/log.txt" >&2; fail "$*"; }; }
equal() { [ "$1" = "$2" ] || { diff <(echo "$1") <(echo "$2") >&2 || true; fail "$3"; }; }

host=$(rustc --print host-tuple)
case $host in
*-linux-gnu*) ;;
*)
    skip "the installer is for Linux with the GNU C library, not for $host"
    exit 0
    ;;
esac

# The libraries built a second time, from a copy of the sources in another directory: Conan makes one. Beside the first
# build, because neither keeps two cores busy.
export CONAN_HOME=$output/conan
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$root/Cargo.toml" | sed -n 1p)
second_build() {
    if have conan; then
        conan profile detect
        env -u CARGO_TARGET_DIR conan create "$root/bindings/conan"
    else
        mkdir "$output/copy"
        tar -c -C "$root" --exclude=./target --exclude=./.git . | tar -x -C "$output/copy"
        cargo run --locked --manifest-path "$output/copy/Cargo.toml" --target-dir "$output/copy/target" \
            --package hyperattn-install -- --prefix "$output/copy/installed"
    fi
}
second_build >"$output/second.txt" 2>&1 &
second=$!

install_library() {
    quietly cargo run --quiet --locked --manifest-path "$root/Cargo.toml" --package hyperattn-install -- \
        --target-dir "$CARGO_TARGET_DIR" "$@"
}
started=$SECONDS
install_library --prefix "$installed"
say "installed in $((SECONDS - started)) s"
archive=$installed/lib/libhyperattn.a
shared=$(readlink -f "$installed/lib/libhyperattn.so")

# The compiler's own list of the header's functions, not the installer's.
header=$installed/include/hyperattn/hyperattn.h
if gcc -aux-info "$output/declared.txt" -fsyntax-only -xc "$header" 2>"$output/log.txt"; then
    declared=$(sed -n 's/.*hyperattn\.h:.* \**\(hyperattn_[a-z0-9_]*\) (.*/\1/p' "$output/declared.txt" | sort)
    defined() { nm "$@" | awk 'NF == 3 { print $3 }' | sort; }
    equal "$declared" "$(defined -g --defined-only "$archive")" "$archive defines other names than the header declares"
    equal "$declared" "$(defined -D --defined-only "$shared")" "$shared exports other names than the header declares"
    say "both libraries define the $(wc -l <<<"$declared") functions of the header and no other global name"
else
    skip "gcc is missing, or has no -aux-info"
fi
for library in "$archive" "$shared"; do
    for path in "$root" "$output" "$HOME/" "${CARGO_HOME:-$HOME/.cargo}" "$(rustc --print sysroot)"; do
        ! grep -qF "$path" "$library" || fail "$library has the path $path in it"
    done
    size=$(stat -c %s "$library")
    [ "$size" -le 2000000 ] || fail "$library has $size bytes"
    say "$(basename "$library"): $size bytes, no paths of this machine"
done
soname=$(readelf -d "$shared" | sed -n 's/.*(SONAME).*\[\(.*\)\]/\1/p')
[ "$(readlink "$installed/lib/$soname")" = "$(basename "$shared")" ] || fail "no link $soname to $(basename "$shared")"
say "$(basename "$shared") is $soname"

# Nothing may depend on where the tree was installed first.
mv "$installed" "$output/moved"
installed=$output/moved
archive=$installed/lib/libhyperattn.a

strict=(-Wall -Wextra -Werror -O2)
quietly gcc -std=c99 "${strict[@]}" -I "$installed/include" -c engine.c -o "$output/programs/engine.o"
quietly gcc -std=c99 "${strict[@]}" -I "$installed/include" -c layer.c -o "$output/programs/layer_c.o"
quietly g++ -std=c++17 "${strict[@]}" -I "$installed/include" -c layer.cpp -o "$output/programs/layer_cpp.o"
objects=("$output"/programs/{engine,layer_c,layer_cpp}.o)
# run NAME: the program must pass its own checks; says which library it got.
run() {
    local needs=static
    ! readelf -d "$output/programs/$1" | grep -q 'NEEDED.*hyperattn' || needs=shared
    LD_LIBRARY_PATH=$installed/lib quietly "$output/programs/$1"
    [ "$needs" = "$2" ] || fail "$1 is linked to the $needs library"
    say "$1: linked to the $needs library and ran"
}

if have pkg-config; then
    # Installed alone, the archive is what -lhyperattn finds.
    install_library --prefix "$output/static" --libraries static
    ask() { PKG_CONFIG_PATH=$1/lib/pkgconfig pkg-config "${@:2}"; }
    read -ra flags <<<"$(ask "$output/static" --cflags --libs --static hyperattn)"
    quietly g++ "${objects[@]}" -o "$output/programs/pkg_config_static" "${flags[@]}"
    run pkg_config_static static
    read -ra flags <<<"$(ask "$installed" --cflags --libs hyperattn)"
    quietly g++ "${objects[@]}" -o "$output/programs/pkg_config_shared" "${flags[@]}"
    run pkg_config_shared shared
    read -ra flags <<<"$(ask "$installed" --cflags --libs --static hyperattn)"
    quietly g++ -static "${objects[@]}" -o "$output/programs/pkg_config_all_static" "${flags[@]}"
    run pkg_config_all_static static
else
    skip "pkg-config is missing"
fi

quietly cargo build --quiet --release --manifest-path neighbour/Cargo.toml --target-dir "$output/neighbour"
neighbour=$output/neighbour/release/libneighbour.a
quietly gcc -std=c99 "${strict[@]}" -DWITH_NEIGHBOUR -I neighbour -I "$installed/include" -c engine.c \
    -o "$output/programs/engine_neighbour.o"
objects[0]=$output/programs/engine_neighbour.o
for order in "$archive $neighbour" "$neighbour $archive"; do
    read -ra libraries <<<"$order"
    quietly g++ "${objects[@]}" -o "$output/programs/beside_another_rust_library" "${libraries[@]}" -lpthread -ldl -lm
    run beside_another_rust_library static
done
# The check is worth something only if the archive as cargo leaves it cannot do this.
if g++ "${objects[@]}" -o "$output/programs/control" "$neighbour" "$CARGO_TARGET_DIR/$host/release/libhyperattn.a" \
    -lpthread -ldl -lm 2>"$output/log.txt"; then
    say "note: this linker joins the two libraries also as cargo leaves them"
else
    grep -q 'multiple definition\|duplicate symbol' "$output/log.txt" || fail "$(cat "$output/log.txt")"
    say "as cargo leaves it, the archive collides with the other library"
fi

# engines DIRECTORY NAME ARGUMENT...: configures, builds, runs the tests.
engines() {
    quietly cmake -S "$here/$1" -B "$output/cmake_$2" -DCMAKE_BUILD_TYPE=Release "${@:3}"
    quietly cmake --build "$output/cmake_$2"
    (cd "$output/cmake_$2" && quietly ctest --output-on-failure)
    say "cmake, $2: $(grep -o '[0-9]* tests failed.*' "$output/log.txt")"
}
if have cmake; then
    engines cmake_package package -DCMAKE_PREFIX_PATH="$installed"
    engines cmake_package static_only -DCMAKE_PREFIX_PATH="$output/static" -DTARGETS=hyperattn::hyperattn
    if cmake -S cmake_package -B "$output/cmake_missing" -DCMAKE_PREFIX_PATH="$output/static" -DCOMPONENTS=shared \
        >"$output/log.txt" 2>&1; then
        fail "a component that is not installed was found"
    fi
    grep -q 'not installed: shared' "$output/log.txt" || fail "$(cat "$output/log.txt")"
    engines cmake_source source -DHYPERATTN_CARGO_TARGET_DIR="$CARGO_TARGET_DIR"
    # vcpkg's own functions are stubs; the port's commands are real.
    quietly cmake -DOUTPUT="$output" -P vcpkg_port.cmake
    engines cmake_package vcpkg -DCMAKE_PREFIX_PATH="$output/vcpkg" -DTARGETS=hyperattn::hyperattn
else
    skip "cmake is missing"
fi

wait "$second" || { cat "$output/second.txt" >&2; fail "the second build"; }
if have conan; then
    quietly conan install --requires "hyperattn/$version" --generator CMakeDeps --output-folder "$output/conan_files"
    engines cmake_package conan -DCMAKE_PREFIX_PATH="$output/conan_files" -DTARGETS=hyperattn::hyperattn
    again=$(find "$CONAN_HOME/p" -path '*/p/lib/libhyperattn.a')
    again_shared=$(find "$CONAN_HOME/p" -path '*/cargo/*/release/libhyperattn.so')
else
    skip "conan is missing"
    again=$output/copy/installed/lib/libhyperattn.a
    again_shared=$output/copy/installed/lib/libhyperattn.so
fi
cmp "$archive" "$again" || fail "two builds differ"
cmp "$installed/lib/libhyperattn.so" "$again_shared" || fail "two builds differ"
say "a second build in another directory made the same bytes"
rm -rf "${output:?}"/{conan,copy}
