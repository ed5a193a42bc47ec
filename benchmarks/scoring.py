"""Batch scoring (`repvgg-trt infer --out`, and Ray) beside a bare loop of decoding and ONNX Runtime.

A folder of JPEG files of `../shared/data` and A0, where they are; else the repository's own sample and its digits. The
bare loop is what one writes by hand: decode one image after the other, fill a batch, run the session; its answers are
compared with the table's. All run in turns; figures are medians, of all threads that this machine has.

Then the memory of a million rows: images and answers are simulated, the table is written in full.

    python benchmarks/scoring.py --repeats 5            # --ray also measures Ray, where it is installed
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "scoring.json"
SHARED = ROOT.parent / "shared" / "data"
BATCH, TOP = 32, 1
sys.path.insert(0, str(ROOT))


def make_images(folder: Path, count: int) -> tuple[Path, Path]:
    """The checkpoint, and a folder of image files."""
    import numpy as np

    folder.mkdir()
    archive, checkpoint = SHARED / "imagenette128.npz", SHARED / "repvgg-a0-imagenette.pth"
    if not (archive.is_file() and checkpoint.is_file()):
        sample = ROOT / "models" / "sample"
        digits = sorted((sample / "images").glob("*.png"))
        for index in range(count):
            (folder / f"{index:05d}.png").write_bytes(digits[index % len(digits)].read_bytes())
        return sample / "repvgg-sample.pth", folder
    with np.load(archive) as data:
        blob, offset = data["blob"], data["offset"]
    for index in range(count):
        where = index % (len(offset) - 1)
        (folder / f"{index:05d}.jpg").write_bytes(blob[offset[where] : offset[where + 1]].tobytes())
    return checkpoint, folder


def run_bare(model: Path, folder: Path) -> tuple[float, dict[str, int]]:
    """Seconds, and the best class of each image."""
    import numpy as np
    import onnxruntime

    from repvgg_deploy.files.onnx import read_metadata
    from repvgg_deploy.images.decode import load_image, normalize

    how = read_metadata(model).spec.preprocessing
    assert how is not None
    start = time.perf_counter()
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    found: dict[str, int] = {}
    files = sorted(folder.iterdir())
    for first in range(0, len(files), BATCH):
        piece = files[first : first + BATCH]
        batch = normalize(np.stack([load_image(file, how) for file in piece]), how)
        best = session.run(None, {name: batch})[0].argmax(1)
        found |= dict(zip(map(str, piece), best.tolist(), strict=True))
    return time.perf_counter() - start, found


def run_table(model: Path, folder: Path, out: Path) -> tuple[float, dict[str, int]]:
    """The same by `infer --out`."""
    from repvgg_deploy.cli.trt import main

    start = time.perf_counter()
    command = ["infer", str(model), str(folder), "--out", str(out), "--force", "--top", str(TOP)]
    assert main([*command, "--batch-size", str(BATCH)]) == 0
    seconds = time.perf_counter() - start
    with out.open(encoding="utf-8", newline="") as file:
        return seconds, {row["image"]: int(row["class_1"]) for row in csv.DictReader(file)}


def run_ray(model: Path, folder: Path, out: Path) -> float:
    """The same by Ray on this machine, two workers, without the start of Ray."""
    from examples.score_on_ray import score, start_ray

    start_ray(None, workers=2)
    return score(model, folder, out, workers=2, batch_size=BATCH, top=TOP)


def measure_memory(rows: int) -> float:
    """Megabytes at the peak of a process that writes so many simulated rows."""
    command = [sys.executable, __file__, "--simulate", str(rows)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def simulate(rows: int) -> float:
    """In a process of its own: a table of simulated images, written in full."""
    import numpy as np

    from repvgg_deploy import Engine, export_checkpoint
    from repvgg_deploy.images import ahead
    from repvgg_deploy.serving.scoring import Scorer, ScoringOptions, score
    from repvgg_deploy.serving.tables import GrowingTable

    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "sample.onnx"
        export_checkpoint(ROOT / "models" / "sample" / "repvgg-sample.pth", model)
        picture = np.zeros((32, 32, 3), np.uint8)
        setattr(ahead, "load_picture", lambda path, preprocessing: picture)  # noqa: B010
        with Engine(model) as engine:
            answer = engine.logits(np.zeros((BATCH, *engine.spec.input.shape[1:]), np.float32))
            setattr(engine, "infer", lambda batch: answer[: len(batch)])  # noqa: B010
            scorer = Scorer(engine, ScoringOptions(top=TOP))
            with GrowingTable(Path(folder) / "table.csv", scorer.columns, run={}) as table:
                score((f"photos/{index:08d}.jpg" for index in range(rows)), scorer, table, batch_size=BATCH)
                assert table.finish() == rows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=1_000_000, help="simulated rows")
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--simulate", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.simulate is not None:
        print(simulate(args.simulate))
        return
    from repvgg_deploy import export_checkpoint
    from repvgg_deploy.images.ahead import count_cores
    from repvgg_deploy.measure.peaks import cpu_name

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        checkpoint, folder = make_images(work / "photos", args.images)
        model = work / "model.onnx"
        export_checkpoint(checkpoint, model)
        seconds: dict[str, list[float]] = {"bare loop": [], "infer --out": []}
        for turn in range(args.repeats):
            bare, expected = run_bare(model, folder)
            table, found = run_table(model, folder, work / "table.csv")
            assert found == expected, "the table says something else than the bare loop"
            seconds["bare loop"].append(bare)
            seconds["infer --out"].append(table)
            print(f"turn {turn + 1}: {args.images / bare:.0f} and {args.images / table:.0f} images/s", flush=True)
        if args.ray:
            seconds["Ray, 2 workers"] = [run_ray(model, folder, work / "ray")]
    rates = {key: args.images / statistics.median(values) for key, values in seconds.items()}
    memory = {str(rows): measure_memory(rows) for rows in (args.rows // 100, args.rows)}
    machine = {
        "processor": cpu_name().rpartition(",")[0],
        "cores": count_cores(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "command": f"python {' '.join(sys.argv)}",
    }
    result: dict[str, Any] = {
        "machine": machine,
        "checkpoint": checkpoint.name,
        "images": args.images,
        "images_per_second": rates,
        "peak_mb_by_rows": memory,
    }
    for key, rate in rates.items():
        print(f"{key:16s} {rate:7.1f} images/s")
    for rows, megabytes in memory.items():
        print(f"{int(rows):>12,d} rows   {megabytes:6.0f} MB at the peak, the export before it included")
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
