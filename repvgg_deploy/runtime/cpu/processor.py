"""What this processor computes well, by the features that Linux lists of it."""

from __future__ import annotations

import platform
from pathlib import Path

from ...errors import InputError

_CPUINFO = Path("/proc/cpuinfo")
_X86 = frozenset({"x86_64", "amd64", "i386", "i686"})
_EXACT = frozenset({"avx512_vnni", "avx_vnni"})
_BFLOAT16 = frozenset({"amx_bf16", "avx512_bf16"})


def read_features() -> frozenset[str] | None:
    """Features of an x86 processor by Linux's names, such as `amx_int8`; none of another, None where not known."""
    if platform.machine().lower() not in _X86:
        return frozenset()
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return frozenset(next((line for line in text.splitlines() if line.startswith("flags")), "").split())


def multiplies_int8_in_tiles() -> bool:
    """Whether it has AMX, which multiplies signed INT8 as fast as unsigned, and several times as fast as VNNI."""
    return "amx_int8" in (read_features() or ())


def require_bfloat16() -> None:
    """Refuses to compute in bfloat16 where that would be slower than FP32, or be FP32 after all.

    Raises:
        InputError: The processor has neither AMX nor AVX512-BF16.
    """
    features = read_features()
    if features is not None and features & _BFLOAT16:
        return
    why = "has neither AMX nor AVX512-BF16" if features is not None else "does not say what it has"
    raise InputError(
        f"bfloat16: this {platform.machine()} processor {why}, and would not compute in it",
        remedy="leave bfloat16 out, and make the model INT8 to be faster: repvgg-trt quantize --int8",
    )


def explain_inexact_products() -> str | None:
    """Why ONNX Runtime might not multiply uint8 by int8 exactly on this CPU; None where it does.

    On x86 without VNNI it uses VPMADDUBSW, which adds two products in 16 bits and saturates: 2 · 255 · 127 is twice
    what fits. VNNI adds them in 32 bits, and so does ARM.
    Source: https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html ("When and why do I need to
    try U8U8?").
    """
    machine = platform.machine().lower()
    if machine not in _X86:
        return None
    features = read_features()
    if features is None:
        return f"whether this {machine} CPU has VNNI is not known, and without it products saturate at 16 bits"
    if features & _EXACT:
        return None
    return f"this {machine} CPU has no VNNI, and without it products saturate at 16 bits"
