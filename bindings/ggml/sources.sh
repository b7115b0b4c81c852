# llama.cpp's sources with ggml's, of one version, as the PyPI package llama-cpp-python carries them: for check.sh and
# example/measure.sh. Needs python3 with venv.

llama_cpp_python=0.3.36
llama_cpp_python_sha256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e

# download_sources FOLDER: after it FOLDER/llama.cpp is there. Does nothing when it is.
download_sources() {
    local archive=$1/llama_cpp_python-$llama_cpp_python.tar.gz
    [ ! -d "$1/llama.cpp" ] || return 0
    mkdir -p "$1" || return
    if [ ! -f "$archive" ]; then
        python3 -m venv "$1/venv" || return
        # pip builds the metadata of what it downloads from source, with tools that it fetches for that.
        "$1/venv/bin/pip" download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-python \
            --dest "$1" "llama-cpp-python==$llama_cpp_python" || return
    fi
    echo "$llama_cpp_python_sha256  $archive" | sha256sum --check --quiet || return
    rm -rf "$1/unpacked"
    mkdir "$1/unpacked" || return
    # By its whole path: the package has another folder of that name, of git's.
    tar -x -z -f "$archive" -C "$1/unpacked" --strip-components 2 \
        "llama_cpp_python-$llama_cpp_python/vendor/llama.cpp" || return
    mv "$1/unpacked/llama.cpp" "$1/llama.cpp" && rmdir "$1/unpacked"
}
