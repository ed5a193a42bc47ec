"""Batch scoring on a cluster: a class for `map_batches` of Ray Data, which opens one Engine in each actor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import InputError
from ..images.ahead import decode_pictures
from ..runtime.engine import Engine
from ..runtime.options import BackendName, DeviceChoice, EngineOptions
from .scoring import Scorer, ScoringOptions
from .tables import to_arrow

_SOURCES = ("bytes", "image", "path")


class ImageScorer:
    """Scores the images of a Ray dataset; each actor opens one Engine and keeps it.

        images = ray.data.read_binary_files("photos", include_paths=True)
        scores = images.map_batches(ImageScorer, fn_constructor_args=["a0.onnx"], batch_size=64, concurrency=2)
        scores.write_parquet("scores")

    Images come in a column `bytes` (`ray.data.read_binary_files`), `image` (`ray.data.read_images`: uint8 (H, W, 3),
    RGB) or `path` (files that every worker can read); the first of these that is there counts. A column `path` names
    the rows. Every other column of the dataset is dropped.

    Args:
        model: An ONNX or a plan, where every worker finds it.
        options: What is computed of each image.
        device: As of `Engine`.
        backend: As of `Engine`.
        engine: Threads and memory. Where an actor is given one core, `EngineOptions(intra_op_threads=1)`.

    Raises:
        InputError: The model gives no classes, or no vectors with `ScoringOptions(features=True)`.
        ModelError: The file is missing or not one of ours.
    """

    def __init__(
        self,
        model: str,
        options: ScoringOptions | None = None,
        *,
        device: DeviceChoice = None,
        backend: BackendName | None = None,
        engine: EngineOptions | None = None,
    ) -> None:
        self._engine = Engine(model, device=device, backend=backend, options=engine)
        self._scorer = Scorer(self._engine, options or ScoringOptions())

    def __call__(self, batch: Mapping[str, Any]) -> Any:
        """A batch of columns → a pyarrow.Table with the columns of `Scorer`; what cannot be read has its reason in it.

        Raises:
            InputError: There is no column with images.
        """
        source = next((name for name in _SOURCES if name in batch), None)
        if source is None:
            raise InputError(
                f"expected a column {', '.join(_SOURCES)}, found {', '.join(batch)}",
                remedy="read the images with ray.data.read_binary_files(folder, include_paths=True)",
            )
        pictures = [np.asarray(item) if source == "image" else item for item in batch[source]]
        rows = self._scorer.make_rows(decode_pictures(pictures, self._scorer.preprocessing))
        if "path" in batch:
            rows = [(str(path), *row[1:]) for path, row in zip(batch["path"], rows, strict=True)]
        return to_arrow(self._scorer.columns, rows)
