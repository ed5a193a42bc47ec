"""Aims and tables of what `benchmarks/gpu.py` measured."""

from __future__ import annotations

from typing import Any

from repvgg_deploy.specs.variants import count_macs, get_variant

from . import models

AIMS = {
    "overhead_us": 25.0,
    "device_share": 0.98,
    "numpy_share": 0.90,
    "clients_share": 0.80,
    "matrix_share": 0.60,
    "int8_gain": 1.6,
}


def judge(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every aim whose figures there are, with its figure."""
    plans, peak = result["plans"], result["peak"].get("fp16_tflops")
    rows = [(name, row) for name, row in plans.items() if "speed" in row]
    found: dict[str, dict[str, Any]] = {}
    for name, row in rows:
        for part in row["speed"]:
            if part["batch"] == 1:
                found[f"{name}: overhead at batch 1, µs"] = {
                    "value": part["overhead_us"],
                    "met": part["overhead_us"] <= AIMS["overhead_us"],
                }
            elif part["batch"] >= 32:
                found[f"{name}: device arrays at batch {part['batch']}, share of the bare loop"] = _at_least(
                    part["device_share"], "device_share"
                )
    for name, row in plans.items():  # of a plan whose stage broke off there may be the one and not the other
        if "clients" in row and "speed" in row:
            found[f"{name}: 64 clients, share of full batches"] = _at_least(row["clients"]["share"], "clients_share")
        if "numpy" in row:
            found[f"{name}: NumPy, share of the bare loop"] = _at_least(row["numpy"]["share"], "numpy_share")
    for variant in models.VARIANTS:
        halves, bytes_ = (_rate(plans, f"{variant} {precision}", 128) for precision in ("fp16", "int8"))
        if halves and bytes_:
            found[f"{variant}: INT8 against FP16 at batch 128"] = _at_least(bytes_ / halves, "int8_gain")
        if halves and peak and variant == "B2":
            reached = 2 * count_macs(get_variant(variant), models.SIZE, models.SIZE) * halves / 1e12
            found["B2 FP16 at batch 128, share of the matrix peak"] = {
                **_at_least(reached / peak, "matrix_share"),
                "tflops": reached,
            }
    return found


def _at_least(value: float, aim: str) -> dict[str, Any]:
    return {"value": value, "met": value >= AIMS[aim]}


def _rate(plans: dict[str, Any], name: str, batch: int) -> float | None:
    parts = [part for part in plans.get(name, {}).get("speed", ()) if part["batch"] == batch]
    return float(parts[0]["images_per_second"]["bare"]) if parts else None


def find_problems(result: dict[str, Any]) -> list[str]:
    """What failed, and what was run and answered wrongly; missed aims are not among them."""
    found = [f"{name}: {reason}" for name, reason in result["failures"].items()]
    for name, row in result["plans"].items():
        if not row.get("parity", {"met": True})["met"]:
            found.append(f"{name}: not what the reference gives")
        for way, outcome in row.get("ways", {}).items():
            if "left_out" not in outcome and not outcome["met"]:
                found.append(f"{name}: {way}: {outcome.get('problem') or 'error ' + format(outcome['error'], '.3g')}")
    found += [f"{name}: the program ended in the midst of it" for name in result.get("broke_off", ())]
    if not result["plans"]:
        found.append("nothing was measured")
    return found


def show(result: dict[str, Any]) -> str:
    """Tables for the terminal."""
    machine = result["machine"]
    drivers = sorted({machine["driver"], *(row["driver"] for row in result["plans"].values() if "driver" in row)})
    lines = [
        f"\n{machine['gpu']}, driver {' and '.join(drivers)}, {machine['flavour']} {machine['versions']['tensorrt']}",
        "",
    ]
    lines.append(
        f"{'plan':<14}{'build s':>8}{'MB':>7}  "
        f"{'inspected':<14}{'parity':<24}{'images/s at batch 1, 8, 32, 128 (bare loop)'}"
    )
    for name, row in result["plans"].items():
        parity = row.get("parity")
        text = (
            ""
            if parity is None
            else f"{'ok' if parity['met'] else 'WRONG'}, {parity['sqnr_db']:.0f} dB, {parity['agreement']:.0%}"
        )
        rates = " ".join(f"{part['images_per_second']['bare']:8.0f}" for part in row.get("speed", ()))
        lines.append(
            f"{name:<14}{row['build_seconds']:>8.1f}{row['plan_bytes'] / 1e6:>7.1f}  "
            f"{row['inspected']:<14}{text:<24}{rates}"
        )
    left_out = {
        f"{way}: {found['left_out']}"
        for row in result["plans"].values()
        for way, found in row.get("ways", {}).items()
        if "left_out" in found
    }
    left_out |= {
        f"the bare loop of {name} at batch {part['batch']} has no CUDA graph: {part['bare_without_graph']}"
        for name, row in result["plans"].items()
        for part in row.get("speed", ())
        if part.get("bare_without_graph")
    }
    lines += ["", *(f"left out  {text}" for text in sorted(left_out)), ""]
    for name, aim in result["aims"].items():
        lines.append(f"{'met    ' if aim['met'] else 'NOT MET'}  {aim['value']:8.2f}  {name}")
    peak = result["peak"]
    if peak.get("fp16_tflops"):
        lines.append(f"matrix peak {peak['fp16_tflops']:.0f} TFLOP/s, FP16 ({peak['source']})")
    else:
        lines.append(f"not judged: the share of the matrix peak ({peak.get('problem', 'not measured yet')})")
    lines += [f"WRONG    {problem}" for problem in find_problems(result)]
    return "\n".join(lines)
