"""Records `sample_logits.json`: the logits of the sample's training form in float64, rounded to six decimals.

Run it when the sample is retrained.

python tests/golden/record.py
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from repvgg_deploy.images.decode import load_batch
from repvgg_deploy.model.checkpoint.load import build_model, load_checkpoint

SAMPLE = Path(__file__).resolve().parents[2] / "models" / "sample"


def main() -> None:
    checkpoint = load_checkpoint(SAMPLE / "repvgg-sample.pth")
    model = build_model(checkpoint).double()
    assert checkpoint.preprocessing is not None
    images = sorted((SAMPLE / "images").glob("*.png"))
    with torch.no_grad():
        logits = model(torch.from_numpy(load_batch(images, checkpoint.preprocessing)).double())
    golden = {path.name: [round(float(value), 6) for value in row] for path, row in zip(images, logits, strict=True)}
    Path(__file__).with_name("sample_logits.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
