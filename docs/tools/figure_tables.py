"""Tables and bars of measured figures, from the files in benchmarks/results/, each with its command and processor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .svg import DARK, LIGHT, make_bars

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
_METHODS = {
    "fp32": "FP32",
    "fp16": "FP16",
    "max": "INT8, per-channel weights, max calibration (what most tools do)",
    "onnxruntime": "INT8, ONNX Runtime `quantize_static`, the best of five settings",
    "modelopt max": "INT8, NVIDIA ModelOpt, max",
    "modelopt entropy": "INT8, NVIDIA ModelOpt, entropy",
    "fast": "**INT8, ours, `--fast`**",
    "ours": "**INT8, ours, FP32 for the rest** (`--target trt8`)",
    "ours trt10": "**INT8, ours, FP16 for the rest** (`--target trt10`, the default)",
    "synthetic": "**INT8, ours, no images: `--synthetic-calibration`**",
    "statistics": "**INT8, ours, no images: `--calib statistics`**",
}
_CLASSIFIERS = ("A0", "A0g4", "sample")
_GRAPHS = {"detector": "detector, SiLU", "detector-relu": "detector, ReLU", "A0-fpn": "A0 under a pyramid, SiLU"}
_DEEP = {
    "deep-24-none": "24 blocks, no SE",
    "deep-24-after": "24 blocks, SE after ReLU",
    "deep-24-before": "24 blocks, SE before ReLU",
    "deep-48-none": "48 blocks, no SE",
    "deep-48-after": "48 blocks, SE after ReLU",
    "deep-48-before": "48 blocks, SE before ReLU",
}
_MODELS = {"int8": _CLASSIFIERS, "int8_graphs": tuple(_GRAPHS), "int8_deep": tuple(_DEEP)}


def make_table(name: str) -> str:
    """The table of this name in Markdown, and below it where its figures come from: `benchmarks/NAME.py`, usually."""
    file, make = _TABLES[name]
    found = json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8"))
    if "processors" in found:
        return "\n\n".join(f"{make(each)}\n\n{_source(file, each['machine'])}" for each in found["processors"].values())
    if "models" in found:  # each measured by itself, perhaps elsewhere
        shown = [key for key in _MODELS[name] if key in found["models"]]
        if not shown:
            return f"*Not measured yet:* `python benchmarks/{file}.py --models {' '.join(_MODELS[name])}`"
        machines = [found["models"][key]["machine"] for key in shown]
    else:
        machines = [found["machine"]]
    machine = "; ".join(dict.fromkeys(map(describe_machine, machines)))
    return f"{make(found)}\n\n{_source(file, machine)}"


def _source(file: str, machine: str) -> str:
    return f"*Measured by* `python benchmarks/{file}.py` *on {machine}.*"


def draw_charts() -> dict[str, str]:
    """The same figures as SVG, by file name, each for a light and a dark page."""
    charts = {}
    for name, (unit, choose) in _CHARTS.items():
        found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        for look, colours in (("light", LIGHT), ("dark", DARK)):
            charts[f"chart-{name}-{look}.svg"] = make_bars(choose(found), unit, colours)
    return charts


def show_chart(name: str) -> str:
    """Markdown of a chart of this name."""
    unit = _CHARTS[name][0]
    return "\n".join(f"![{unit}](images/chart-{name}-{look}.svg#only-{look})" for look in ("light", "dark"))


def describe_machine(machine: dict[str, Any] | str) -> str:
    """`AMD EPYC, 2 cores, Python 3.11.7`."""
    if isinstance(machine, str):
        return machine
    threads = machine.get("threads")
    count = f"{threads} thread{'s' if threads > 1 else ''}" if threads else f"{machine['cores']} cores"
    return f"{machine['processor']}, {count}, Python {machine['python']}"


def _rows(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _fold(found: dict[str, Any]) -> str:
    rows = []
    for row in found["results"]:
        before, after = row["cpu_milliseconds"]
        less = [1 - row["macs_share"], 1 - row["bytes"][1] / row["bytes"][0]]
        rows.append(
            [row["network"], "<br>".join(row["kernels"]), *(f"−{100 * share:.0f} %" for share in less),
             f"{before:.1f} → {after:.1f}"]
        )  # fmt: skip
    return _rows(["network", "kernels", "MACs", "bytes", "CPU ms"], rows)


def _scoring(found: dict[str, Any]) -> str:
    rows = [[name, f"{rate:.1f}"] for name, rate in found["images_per_second"].items()]
    return _rows([f"{found['images']:,} JPEG files, {found['checkpoint']}", "images/s"], rows)


def _export(found: dict[str, Any]) -> str:
    names = {
        "plain": "plain recipe: `torch.onnx.export`, `onnxsim.simplify`, one comparison of the deploy form",
        "ours": "`repvgg-export`: every block, two precisions, and the file against the training form",
    }
    rows = [
        [names[key], f"{row['seconds']:.1f}", f"{row['cpu_seconds']:.1f}", f"{row['peak_mb']:.0f}"]
        for key, row in found["medians"].items()
    ]
    return _rows([found["variant"], "wall s", "CPU s", "peak MB"], rows)


def _int8(found: dict[str, Any]) -> str:
    models = {name: {row["key"]: row for row in found["models"][name]["rows"]} for name in _CLASSIFIERS}
    main, *others = models
    rows = []
    for key, method in _METHODS.items():
        row = models[main].get(key, {"note": "not measured"})
        if "note" in row:
            continue
        exact = key == "fp32"
        noise = ["" if exact else f"{models[name][key]['sqnr_db']:.1f}" for name in (main, *others)]
        cost = ["", ""] if exact else [f"{row['cpu_seconds']:.0f}", f"{row['peak_mb']:.0f}"]
        rows.append([method, f"{row['top1']:.2f}", f"{row['agreement']:.1f}", *noise, *cost])
    header = ["", f"{main} top-1 %", f"{main} agreement %", *(f"{name} SQNR dB" for name in models)]
    return _rows([*header, f"{main} CPU s", f"{main} peak MB"], rows)


def _int8_graphs(found: dict[str, Any]) -> str:
    models = {
        name: {row["key"]: row for row in found["models"][name]["rows"]} for name in _GRAPHS if name in found["models"]
    }
    heads, rows = [""], []
    for name, shown in ((name, _GRAPHS[name]) for name in models):
        heads += [f"{shown}: mAP lost, of {models[name]['fp32']['map']:.2f}"] if "map" in models[name]["fp32"] else []
        heads.append(f"{shown}: SQNR dB")
    for key, method in _METHODS.items():
        cells, costs = list[str](), list[str]()
        for model in models.values():
            row = model.get(key, {"note": "not measured"})
            is_empty = "note" in row or key == "fp32"
            if "map" in model["fp32"]:
                drop = "" if is_empty else f"{row['map_drop']:.2f} ({row['drop_low']:.2f} … {row['drop_high']:.2f})"
                cells.append(drop)
            cells.append("" if is_empty else f"{row['sqnr_db']:.1f}")
            costs.append("" if is_empty else f"{row['cpu_seconds']:.0f}")
        if any(cells):
            rows.append([method, *cells, costs[0]])
    return _rows([*heads, f"{next(iter(models))} CPU s"], rows)


def _int8_deep(found: dict[str, Any]) -> str:
    rows = []
    for key, shown in ((key, _DEEP[key]) for key in _DEEP if key in found["models"]):
        by_key = {row["key"]: row for row in found["models"][key]["rows"]}
        if "ours" in by_key:
            row = by_key["ours"]
            exact = [f"{by_key['fp32']['top1']:.2f}", f"{row['drop']:.2f}", f"{row['agreement']:.1f}"]
            rows.append([shown, *exact, f"{row['sqnr_db']:.1f}", f"{row['median_db']:.1f}", str(len(row["runs"]))])
    header = ["", "FP32 top-1 %", "lost", "agreement %", "SQNR of all dB", "of the median image dB", "draws"]
    return _rows(header, rows)


def _runtime(found: dict[str, Any]) -> str:
    speed = found["speed"]
    rows = [
        [
            f"**`{name}`**" if name.startswith("Engine") else name,
            *(f"{row['images_per_second'][name]:.0f}" for row in speed),
        ]
        for name in speed[0]["images_per_second"]
    ]
    return _rows(["images a second", *(f"batch {row['batch']}" for row in speed)], rows)


def _runtime_share(found: dict[str, Any]) -> str:
    names = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
    rows = []
    for row in found["share"]:
        precision, dtype, *unchecked = row["model"].split()
        shares = [f"{share:.1f} %" for share in row["percent"].values()]
        what = f"{precision.upper()}, {dtype} images{', `check_finite=False`' if unchecked else ''}"
        rows.append([f"{what}, {names[row['backend']]}", *shares])
    table = _rows(["Engine of the bare backend", *(f"batch {count}" for count in found["share"][0]["percent"])], rows)
    return f"{table}\n\nThe Engine itself works {found['wrapper_microseconds']:.0f} µs a call."


def _runtime_clients(found: dict[str, Any]) -> str:
    names = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
    rows = [
        [f"{row['model']}, {names[row['backend']]}", *(f"{speed:.0f}" for speed in row["images_per_second"].values()),
         f"{row['percent']:.1f} %", f"{row['mean_batch']:.1f}"]
        for row in found["clients"]
    ]  # fmt: skip
    return _rows(["", "full batches, images/s", "64 clients", "share", "mean batch"], rows)


def _reparameterize(found: dict[str, Any]) -> str:
    rows = []
    for row in found["results"]:
        before, after = row["forms"]["training"], row["forms"]["deploy"]
        left = [
            sum(part[what] for part in after["work"].values()) / sum(part[what] for part in before["work"].values())
            for what in ("macs", "bytes_moved", "calls")
        ]
        rows.append([
            f"{row['variant']}, batch {row['batch']}",
            f"{before['cpu_ms']:.0f} → {after['cpu_ms']:.0f}",
            f"{before['cpu_ms'] / after['cpu_ms']:.2f} ×",
            f"{before['peak_rss_mb']:.0f} → {after['peak_rss_mb']:.0f}",
            *(f"{100 * share:.0f} %" for share in left),
        ])  # fmt: skip
    return _rows(["", "CPU ms", "faster", "peak MB", "MACs left", "bytes left", "calls left"], rows)


_TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "export": ("export", _export),
    "fold": ("fold", _fold),
    "int8": ("int8", _int8),
    "int8_deep": ("int8", _int8_deep),
    "int8_graphs": ("int8", _int8_graphs),
    "reparameterize": ("reparameterize", _reparameterize),
    "runtime": ("runtime", _runtime),
    "runtime_share": ("runtime", _runtime_share),
    "runtime_clients": ("runtime", _runtime_clients),
    "scoring": ("scoring", _scoring),
}


def _choose_int8(found: dict[str, Any]) -> list[tuple[str, float, bool]]:
    names = {
        "max": "max calibration",
        "onnxruntime": "ONNX Runtime quantize_static",
        "fast": "ours, --fast",
        "ours trt10": "ours",
        "synthetic": "ours, synthetic images",
        "statistics": "ours, --calib statistics",
    }
    rows = {row["key"]: row for row in found["models"]["A0"]["rows"]}
    return [(label, 100 - rows[key]["agreement"], label.startswith("ours")) for key, label in names.items()]


def _choose_runtime(found: dict[str, Any]) -> list[tuple[str, float, bool]]:
    first = next(iter(found["processors"].values()))
    (batch,) = (each for each in first["speed"] if each["batch"] == 8)
    return [(name, speed, name.startswith("Engine")) for name, speed in batch["images_per_second"].items()]


_CHARTS: dict[str, tuple[str, Callable[[dict[str, Any]], list[tuple[str, float, bool]]]]] = {
    "int8": ("A0 in INT8: % of images that change their best class (less is better)", _choose_int8),
    "runtime": ("A0 on two CPU cores: images a second in batches of 8 (more is better)", _choose_runtime),
}
