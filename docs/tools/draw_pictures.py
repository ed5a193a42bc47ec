"""Draws the pictures of the README and of the site, each for a light and for a dark page.

    python -m docs.tools.draw_pictures            # or: python -m docs.tools.draw_pictures --out FOLDER

`flow` is the way from a checkpoint to predictions, with those that the sample of `make demo` really gives; `rooms` is
the package by rank. Digits: E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, CC BY 4.0; more about them in
models/sample/README.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from repvgg_deploy import Engine, export_checkpoint
from repvgg_deploy.images.classes import softmax
from repvgg_deploy.images.decode import load_image

from .svg import DARK, LIGHT, Colours, make_arrow, make_box, make_svg, make_text

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "models" / "sample"
IMAGES = ROOT / "docs" / "images"
LEVELS = 6
# Lowest first, as in tests/contract/test_imports.py; what stands beside another imports it not.
ROOMS = (
    (("specs", "values, JSON, variants"),),
    (("files", "outputs, ONNX reader, passports"),),
    (("images", "files → batches"),),
    (("graph", "algebra on ONNX"),),
    (("model", "PyTorch, checkpoints"), ("evaluate", "accuracy, agreement")),
    (("precision", "FP16, INT8"), ("runtime", "Engine"), ("upstream", "original names")),
    (("export", "checkpoint → ONNX"),),
    (("build", "ONNX → plan"),),
    (("measure", "speed, advice"), ("serving", "Triton, KServe")),
    (("cli", "one file a command"),),
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the sample says of one digit: uint8 (16, 16) grey levels, label, probability."""

    pixels: NDArray[np.uint8]
    label: str
    probability: float


def main() -> int:
    """Writes all pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=IMAGES, metavar="FOLDER")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    answers = predict()
    for name, colours in (("light", LIGHT), ("dark", DARK)):
        (out / f"flow-{name}.svg").write_text(draw_flow(answers, colours), encoding="utf-8")
        (out / f"rooms-{name}.svg").write_text(draw_rooms(colours), encoding="utf-8")
    return 0


def predict() -> list[Answer]:
    """Exports the sample as `make demo` does, and runs its ten images."""
    paths = sorted((SAMPLE / "images").glob("*.png"))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sample.onnx"
        export_checkpoint(SAMPLE / "repvgg-sample.pth", file)
        with Engine(file) as engine:
            scores = softmax(cast("NDArray[np.float32]", engine.infer_images(paths)))
            labels, preprocessing = engine.spec.labels, engine.spec.preprocessing
            assert labels is not None and preprocessing is not None
            grey = [load_image(path, preprocessing)[..., 0] for path in paths]
    return [
        Answer(image.reshape(16, 2, 16, 2).mean((1, 3)).astype(np.uint8), labels[row.argmax()], float(row.max()))
        for image, row in zip(grey, scores, strict=True)
    ]


def draw_flow(answers: Sequence[Answer], colours: Colours) -> str:
    """Four files, the gates between them, the Engine, and what it says of ten digits."""
    boxes = (("x.pth", "checkpoint"), ("x.onnx", "FP32"), ("x-int8.onnx", "FP16, INT8"), ("x.plan", "TensorRT"))
    width, gap, top = 132, 70, 44
    left = [4 + (width + gap) * index for index in range(4)]
    body = []
    for index, ((name, what), x) in enumerate(zip(boxes, left, strict=True)):
        body += [
            make_box(x, top, width, 68, colours),
            make_text(x + width / 2, top + 29, name, 17, colours.ink, bold=True),
        ]
        body.append(make_text(x + width / 2, top + 53, what, 15, colours.quiet))
        if index:
            start, middle = left[index - 1] + width, x - gap / 2
            body += [make_arrow((start + 4, top + 34), (x - 4, top + 34), colours)]
            body.append(
                make_text(middle, top - 12, ("", "export", "quantize", "build")[index], 17, colours.accent, bold=True)
            )
            body += [] if name == "x.plan" else [_gate(middle, top + 34, colours)]
    body.append(make_text(left[0] + width / 2, top + 96, "3 branches a block", 14, colours.quiet))
    body.append(make_text(left[1] + width / 2, top + 96, "1 convolution", 14, colours.quiet))
    engine = top + 152
    for x in left[1:]:
        foot = top + (106 if x == left[1] else 72)
        body.append(make_arrow((x + width / 2, foot), (x + width / 2, engine - 4), colours))
    body.append(_gate(left[0] + 14, engine + 24, colours))
    body.append(make_text(left[0] + 34, engine + 20, "agrees with the", 14, colours.quiet, anchor="start"))
    body.append(make_text(left[0] + 34, engine + 38, "model before", 14, colours.quiet, anchor="start"))
    wide = left[3] + width - left[1]
    body.append(make_box(left[1], engine, wide, 48, colours, accent=True))
    body.append(make_text(left[1] + wide / 2, engine + 31, "Engine(file).infer_images(…)", 19, colours.ink, bold=True))
    row, step = engine + 82, (left[3] + width - left[0]) / len(answers)
    body.append(make_arrow((left[1] + wide / 2, engine + 52), (left[1] + wide / 2, row - 6), colours))
    for index, answer in enumerate(answers):
        centre = left[0] + step * (index + 0.5)
        body.append(_digit(answer.pixels, centre - 28, row, 56, colours))
        body.append(make_text(centre, row + 82, answer.label, 21, colours.good, bold=True))
        body.append(make_text(centre, row + 102, f"{100 * answer.probability:.0f} %", 14, colours.quiet))
    return make_svg(left[3] + width + 4, row + 110, body, "From a checkpoint to predictions")


def draw_rooms(colours: Colours) -> str:
    """The package's rooms, the highest rank on top: each imports what lies below it."""
    width, height, gap = 640, 46, 8
    body = []
    for rank, rooms in enumerate(reversed(ROOMS)):
        each = (width - gap * (len(rooms) - 1)) / len(rooms)
        for index, (name, what) in enumerate(rooms):
            x, y = 4 + index * (each + gap), 4 + rank * (height + gap)
            body.append(
                make_box(x, y, each, height, colours, accent=name in ("export", "precision", "build", "runtime"))
            )
            if len(rooms) == 1:
                body.append(make_text(x + each / 2 - 12, y + 29, name, 18, colours.ink, bold=True, anchor="end"))
                body.append(make_text(x + each / 2, y + 29, what, 15, colours.quiet, anchor="start"))
            else:
                body.append(make_text(x + each / 2, y + 20, name, 18, colours.ink, bold=True))
                body.append(make_text(x + each / 2, y + 38, what, 14, colours.quiet))
    return make_svg(width + 8, len(ROOMS) * (height + gap) + 4, body, "The rooms of the package")


def _gate(x: float, y: float, colours: Colours) -> str:
    """A tick in a circle: what comes out was compared with what went in."""
    circle = (
        f'<circle cx="{x:g}" cy="{y:g}" r="12" fill="{colours.good_fill}" stroke="{colours.good}" stroke-width="1.6"/>'
    )
    tick = f'<path d="M{x - 5:g} {y + 0.5:g}l3.5 4 6.5 -8" fill="none" stroke="{colours.good}" stroke-width="2.2"/>'
    return circle + tick


def _digit(pixels: NDArray[np.uint8], x: float, y: float, size: float, colours: Colours) -> str:
    """Grey pixels as one path for each level, drawn as runs of squares on black."""
    level = np.rint(pixels / 255 * (LEVELS - 1)).astype(int)
    scale = size / len(level)
    paths = []
    for value in range(1, LEVELS):
        runs = []
        for row, line in enumerate(level == value):
            edges = np.flatnonzero(np.diff(np.concatenate(([0], line.astype(int), [0]))))
            runs += [f"M{start} {row}h{end - start}v1h-{end - start}z" for start, end in edges.reshape(-1, 2)]
        shade = round(255 * value / (LEVELS - 1))
        paths.append(f'<path fill="#{shade:02x}{shade:02x}{shade:02x}" d="{"".join(runs)}"/>')
    ground = f'<rect x="{x:g}" y="{y:g}" width="{size:g}" height="{size:g}" stroke="{colours.good}" stroke-width="4"/>'
    place = f'transform="translate({x:g} {y:g}) scale({scale:g})" shape-rendering="crispEdges"'
    return f"{ground}<g {place}>{''.join(paths)}</g>"


if __name__ == "__main__":
    sys.exit(main())
