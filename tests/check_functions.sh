# What the check.sh of the folders here share; they set `check` before they read it.

say() { printf '%s: %s\n' "$check" "$*"; }
fail() { say "FAILED, $*" >&2; exit 1; }
# A missing tool fails with HYPERATTN_REQUIRE_TOOLS=1.
skip() {
    [ "${HYPERATTN_REQUIRE_TOOLS:-0}" != 1 ] || fail "$*"
    echo "SKIPPED: $*"
}
have() { command -v "$1" >/dev/null; }
