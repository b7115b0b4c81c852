"""Lets PyTorch's wheel for CUDA run on a machine without the CUDA libraries, for its CPU part.

The wheel's libraries name CUDA's as needed; with the packages of all of them it takes 5 GB, without them it does not
load. The CUDA runtime alone is small and says that there is no device; this writes stand-ins for the others beside
PyTorch's libraries. Their functions are never called, because there is no device.
Needs gcc and binutils: python stub_cuda.py, in the environment that has torch and nvidia-cuda-runtime.
"""

import importlib.util
import pathlib
import re
import subprocess
import tempfile

CUDA_LIBRARY = re.compile(r"NEEDED.*\[(lib(?!cuda\.so)(?:cu|nccl|nv)\w*\.so[.\d]*)\]")
CUDA_FUNCTION = re.compile(r"\b[UT] (_*(?:cu|nccl|nv)\w+)")


def output(*command: object) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def main() -> None:
    torch = pathlib.Path(importlib.util.find_spec("torch").origin).parent
    libraries: set[str] = set()
    functions: set[str] = set()
    for library in (torch / "lib").glob("lib*.so*"):
        libraries.update(CUDA_LIBRARY.findall(output("readelf", "-d", library)))
        functions.update(CUDA_FUNCTION.findall(output("nm", "-D", "--undefined-only", library)))
    installed = [*(torch / "lib").iterdir(), *(torch.parent / "nvidia").glob("*/lib/lib*.so*")]
    for library in installed:
        if library.name in libraries:
            functions.difference_update(CUDA_FUNCTION.findall(output("nm", "-D", "--defined-only", library)))
    missing = sorted(libraries - {library.name for library in installed})
    with tempfile.TemporaryDirectory() as build:
        source = pathlib.Path(build) / "functions.c"
        source.write_text("".join(f"int {name}(void) {{ return -1; }}\n" for name in sorted(functions)))
        empty = pathlib.Path(build) / "empty.c"
        empty.write_text("")
        # Of a name of its own: the loader would want versions of functions in a library that PyTorch's name.
        stub = torch / "lib" / "libcuda_stub.so"
        gcc = ("gcc", "-shared", "-fPIC")
        output(*gcc, f"-Wl,-soname,{stub.name}", "-o", stub, source)
        for name in missing:
            needs = ("-Wl,--no-as-needed,-rpath,$ORIGIN", stub)
            output(*gcc, f"-Wl,-soname,{name}", "-o", stub.with_name(name), empty, *needs)
    print(f"{len(missing)} stub libraries for {len(functions)} functions in {stub.parent}")


if __name__ == "__main__":
    main()
