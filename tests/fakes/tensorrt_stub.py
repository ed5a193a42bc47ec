"""NVIDIA's own Python bindings of TensorRT over a library that does nothing, without NVIDIA's libraries or a GPU.

Every method of every C++ class answers 2, true, or an object, so that pybind11's conversion of arguments is run and the
call reaches C++; what it answers is meaningless. That shows names, types of arguments and deprecations of a version.

Layout (TensorRT 8.5 to 11, Itanium ABI): a class of NvInfer.h has its table of virtual methods at 0 and its
implementation at 8, an implementation and nvonnxparser's classes have the table at 0. One object is all of them: its
address is 0x100000002 (as int32 2, as bool true), with the table at 0 and itself at 8.
"""

from __future__ import annotations

import ctypes
import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

TOOLS = ("gcc", "readelf", "nm")
_SOURCE = r"""
#define _GNU_SOURCE
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#define OBJECT ((char*)0x100000002UL)
#define TABLE ((void**)0x41414148UL)   /* read as a C string: "HAAA" */
long calls = 0;
int wide_dims = 1;
static void* answer(void* first, void* second) {
    ++calls;
    if (first != (void*)OBJECT && second == (void*)OBJECT) {   /* a struct by value: Dims */
        int64_t wide[] = {2, 3, 8, 8}; int32_t narrow[] = {2, 3, 8, 8};
        *(int32_t*)first = 4;
        if (wide_dims) memcpy((char*)first + 8, wide, sizeof wide);
        else memcpy((char*)first + 4, narrow, sizeof narrow);
        return first;
    }
    return OBJECT;
}
__attribute__((constructor)) static void prepare(void) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
    mmap((void*)0x100000000UL, 1 << 16, PROT_READ | PROT_WRITE, flags, -1, 0);
    mmap((void*)0x41410000UL, 1 << 16, PROT_READ | PROT_WRITE, flags, -1, 0);
    for (int i = 0; i < 600; ++i) TABLE[i] = (void*)answer;
    void* table = TABLE; void* self = OBJECT;
    memcpy(OBJECT, &table, 8); memcpy(OBJECT + 8, &self, 8);
}
"""


def load(folder: Path, scratch: Path) -> tuple[Any, ctypes.c_long]:
    """Imports the bindings of an unpacked wheel; also the number of calls that reached C++, which grows."""
    [package] = [path.name for path in folder.glob("tensorrt*_bindings")]
    [binary] = (folder / package).glob("tensorrt*.so")
    needed = re.findall(r"\(NEEDED\).*\[(lib(?:nv|tensorrt)[^\]]+)\]", _run("readelf", "-dW", str(binary)))
    symbols = (
        line.split()[-1] for line in _run("nm", "-D", "--undefined-only", str(binary)).splitlines() if " U " in line
    )
    names = [name for name in symbols if "@" not in name and not name.startswith(("Py", "_Py", "dl"))]
    source = scratch / "stub.c"
    functions = (
        f"void* {name}(void) {{ return {'(void*)2' if 'Version' in name else 'OBJECT'}; }}\n" for name in names
    )
    source.write_text(_SOURCE + "".join(functions), encoding="utf-8")
    stubs = []
    for index, soname in enumerate(needed):
        inputs = ("-x", "c", str(source) if index == 0 else "/dev/null")
        _run("gcc", "-O1", "-w", "-shared", "-fPIC", *inputs, f"-Wl,-soname,{soname}", "-o", str(scratch / soname))
        stubs.append(ctypes.CDLL(str(scratch / soname), mode=ctypes.RTLD_GLOBAL))
    sys.path.insert(0, str(folder))
    trt = importlib.import_module(package)
    if trt.__version__.startswith("8."):
        ctypes.c_int.in_dll(stubs[0], "wide_dims").value = 0
    return trt, ctypes.c_long.in_dll(stubs[0], "calls")


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
