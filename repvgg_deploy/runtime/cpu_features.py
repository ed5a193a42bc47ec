"""What the CPU can do that decides how an INT8 graph may be computed."""

from __future__ import annotations

import platform
from pathlib import Path

_X86 = frozenset({"x86_64", "amd64", "i386", "i686"})
_EXACT = frozenset({"avx512_vnni", "avx_vnni"})
_CPUINFO = Path("/proc/cpuinfo")


def explain_inexact_products() -> str | None:
    """Why ONNX Runtime might not multiply uint8 by int8 exactly on this CPU; None where it does.

    On x86 without VNNI it uses VPMADDUBSW, which adds two products in 16 bits and saturates: 2 · 255 · 127 is twice what fits. VNNI adds them in 32
    bits, and so does ARM.
    Source: https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html ("When and why do I need to try U8U8?").
    """
    machine = platform.machine().lower()
    if machine not in _X86:
        return None
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return f"whether this {machine} CPU has VNNI is not known, and without it products saturate at 16 bits"
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    return None if _EXACT & set(flags) else f"this {machine} CPU has no VNNI, and without it products saturate at 16 bits"
