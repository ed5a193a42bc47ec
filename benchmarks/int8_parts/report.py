"""The table of the INT8 benchmark."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

_COLUMNS = {
    "top1": ("top-1", "9.2f"),
    "drop": ("drop", "9.2f"),
    "agreement": ("agree %", "9.2f"),
    "median_db": ("med. dB", "9.1f"),
    "map": ("mAP", "9.2f"),
    "map_drop": ("drop", "9.2f"),
    "drop_low": ("from", "9.2f"),
    "drop_high": ("to", "9.2f"),
}
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
    shown = [name for name in _COLUMNS if name in found["rows"][0]]
    heads = "".join(f"{_COLUMNS[name][0]:>9}" for name in shown)
    lines.append(f"{'':54}{heads}{'SQNR dB':>9}{'wall s':>8}{'CPU s':>8}{'MB':>7}")
    for row in found["rows"]:
        if "note" in row:
            lines.append(f"{row['method']:54}{row['note']:>15}")
            continue
        sqnr = "" if row["sqnr_db"] >= 199 else f"{row['sqnr_db']:.1f}"
        cost = f"{row['seconds']:8.1f}{row['cpu_seconds']:8.1f}{row['peak_mb']:7.0f}" if "seconds" in row else ""
        values = "".join(f"{row[name]:{_COLUMNS[name][1]}}" for name in shown)
        lines.append(f"{row['method']:54}{values}{sqnr:>9}{cost}")
        if len(row["outputs"]) > 1 and sqnr:
            each = ", ".join(f"{name} {sqnr_db:.1f}" for name, sqnr_db in row["outputs"].items())
            lines.append(f"{'':58}{each} dB")
    return "\n".join(lines)
