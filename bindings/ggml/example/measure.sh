#!/usr/bin/env bash
# Prompts of a real model through llama.cpp, with its own attention on the CPU and with hyperattn's, in turns.
#
#     measure.sh MODEL.gguf TEXT [TOKENS...]          default 2048 8192 16384
#
# METHODS (default "own exact refined"), THREADS (default 2) and MICRO_BATCH (default 512, llama.cpp's own) come
# from the environment. Needs what check.sh needs; llama.cpp is built once, in target/ggml.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../../.." && pwd)
folder=$root/target/ggml

[ $# -ge 2 ] || { sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
model=$(realpath "$1")
text=$(realpath "$2")
shift 2
[ $# -gt 0 ] || set -- 2048 8192 16384
read -ra methods <<<"${METHODS:-own exact refined}"
threads=${THREADS:-2}
micro_batch=${MICRO_BATCH:-512}

. "$here/../sources.sh"
download_sources "$folder/sources"
cmake -S "$here" -B "$folder/example" -DLLAMA_SOURCE_DIR="$folder/sources/llama.cpp" >"$folder/log.txt"
cmake --build "$folder/example" --parallel "$(nproc)" >>"$folder/log.txt"
cmake -S "$here/.." -B "$folder/backend" -DGGML_SOURCE_DIR="$folder/sources/llama.cpp/ggml" \
    -DGGML_LIBRARY_DIR="$folder/example/bin" >>"$folder/log.txt"
cmake --build "$folder/backend" >>"$folder/log.txt"

# prompt METHOD TOKENS: the example's line.
prompt() {
    local arguments=("$folder/example/bin/prompt" "$model" "$text" "$2" "$threads" "$micro_batch")
    case $1 in
    own) env -u GGML_BACKEND_PATH "${arguments[@]}" ;;
    *) GGML_BACKEND_PATH=$folder/backend/libggml-hyperattn.so HYPERATTN_GGML_METHOD=$1 "${arguments[@]}" ;;
    esac
}

printf '| tokens | attention | seconds | tokens/s | speed-up | perplexity | the next 32 tokens |\n'
printf '|---|---|---|---|---|---|---|\n'
for tokens; do
    first=
    for method in "${methods[@]}"; do
        line=$(prompt "$method" "$tokens")
        read -r _ _ _ seconds _ rate _ perplexity _ next <<<"$line"
        if [ -z "$first" ]; then
            first=$seconds
            first_next=$next
            agree=-
        else
            # How many tokens the two have in common before they part.
            agree=$(paste <(tr ' ' '\n' <<<"$first_next") <(tr ' ' '\n' <<<"$next") |
                awk '$1 != $2 { exit } { same += 1 } END { print same == 32 ? "the same" : "the first " same + 0 }')
        fi
        printf '| %s | %s | %s | %s | %.2f | %s | %s |\n' "$tokens" "$method" "$seconds" "$rate" \
            "$(awk "BEGIN { print $first / $seconds }")" "$perplexity" "$agree"
    done
done
