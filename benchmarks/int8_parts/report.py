"""The table of the INT8 benchmark."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

_VERSIONS = ("repvgg-deploy", "numpy", "onnx", "onnxruntime", "torch", "nvidia-modelopt")


def describe_machine() -> dict[str, Any]:
    """Processor, cores, Python, and the versions that figures depend on."""
    versions = {}
    for name in _VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    return {"processor": processor, "cores": os.cpu_count(), "python": platform.python_version(), "versions": versions}


def table(subject: str, found: dict[str, Any]) -> str:
    """One line a method; medians over the seeds."""
    lines = [f"\n{subject}: {found['calibration']} calibration images, {found['evaluation']} evaluation images"]
    lines.append(f"{'':54}{'top-1':>7}{'drop':>7}{'agree %':>9}{'SQNR dB':>9}{'wall s':>8}{'CPU s':>8}{'MB':>7}")
    for row in found["rows"]:
        if "note" in row:
            lines.append(f"{row['method']:54}{row['note']:>15}")
            continue
        sqnr = "" if row["sqnr_db"] >= 199 else f"{row['sqnr_db']:.1f}"
        cost = f"{row['seconds']:8.1f}{row['cpu_seconds']:8.1f}{row['peak_mb']:7.0f}" if "seconds" in row else ""
        lines.append(f"{row['method']:54}{row['top1']:7.2f}{row['drop']:7.2f}{row['agreement']:9.2f}{sqnr:>9}{cost}")
    return "\n".join(lines)
