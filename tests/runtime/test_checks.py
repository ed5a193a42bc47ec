"""Every wrong batch gets one message that says what was expected, what was found and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from repvgg_deploy.errors import InputError
from repvgg_deploy.runtime.checks import BatchCheck
from tests.runtime.make_model import ModelOptions, make_metadata, random_batch

FLOAT = ModelOptions()
BYTES = ModelOptions(uint8=True)
ANY_SIZE = ModelOptions(size=("height", "width"))
GOOD = random_batch(FLOAT, 2)
GOOD_BYTES = random_batch(BYTES, 2)


def masked(values: np.ndarray) -> Any:
    return np.ma.masked_array(values, mask=values > 0)


def with_value(*values: float) -> np.ndarray:
    batch = GOOD.copy()
    batch[1, 2, 3, 4 : 4 + len(values)] = values
    changed: np.ndarray = batch
    return changed


CASES: dict[str, tuple[ModelOptions, object, str, str]] = {
    "list": (FLOAT, GOOD.tolist(), "expected a NumPy array, found list", "np.stack"),
    "none": (FLOAT, None, "found NoneType", "np.asarray"),
    "torch tensor": (FLOAT, torch.zeros(2, 3, 16, 16), "found torch.Tensor", ".cpu().numpy()"),
    "pillow image": (FLOAT, Image.new("RGB", (16, 16)), "found PIL.Image.Image", "infer_images"),
    "text path": (FLOAT, "cat.jpg", "found str", "infer_images"),
    "path": (FLOAT, Path("cat.jpg"), "found pathlib", "infer_images"),
    "masked": (FLOAT, masked(GOOD), "masked array", "filled"),
    "single image": (FLOAT, GOOD[0], "batch dimension is missing", "batch[np.newaxis]"),
    "single image, any size": (ANY_SIZE, GOOD[0], "batch dimension is missing", "batch[np.newaxis]"),
    "rank 5": (FLOAT, GOOD[None], "its rank is 5, not 4", "4 dimensions"),
    "rank 0": (FLOAT, np.zeros((), np.float32), "its rank is 0, not 4", "4 dimensions"),
    "grey": (FLOAT, GOOD[:, :1], "it has 1 channels", "repeat a grey one"),
    "alpha": (BYTES, np.zeros((2, 16, 16, 4), np.uint8), "it has 4 channels", "drop an alpha channel"),
    "size": (FLOAT, GOOD[..., :7], "the size differs", "16×16"),
    "nhwc to nchw": (FLOAT, GOOD.transpose(0, 2, 3, 1), "the layout is not NCHW", "batch.transpose(0, 3, 1, 2)"),
    "nhwc to nchw, any size": (
        ANY_SIZE,
        GOOD.transpose(0, 2, 3, 1),
        "the layout is not NCHW",
        "batch.transpose(0, 3, 1, 2)",
    ),
    "nchw to nhwc": (BYTES, GOOD_BYTES.transpose(0, 3, 1, 2), "the layout is not NHWC", "batch.transpose(0, 2, 3, 1)"),
    "bytes to float32": (
        FLOAT,
        GOOD_BYTES,
        "found uint8 (2, 16, 16, 3)",
        "normalize(images, engine.spec.preprocessing), or export the model with --input uint8",
    ),
    "floats to uint8": (BYTES, GOOD_BYTES.astype(np.float32), "the dtype differs", "RGB 0-255 of dtype uint8"),
    "float64": (FLOAT, GOOD.astype(np.float64), "found float64", "batch.astype(np.float32)"),
    "float16": (FLOAT, GOOD.astype(np.float16), "found float16", "batch.astype(np.float32)"),
    "int64": (FLOAT, GOOD.astype(np.int64), "found int64", "batch.astype(np.float32)"),
    "big-endian": (FLOAT, GOOD.astype(">f4"), "found big-endian float32", "batch.astype(np.float32)"),
    "bool": (FLOAT, GOOD > 0, "found bool", "real numbers"),
    "complex": (FLOAT, GOOD.astype(np.complex64), "found complex64", "real numbers"),
    "object": (FLOAT, GOOD.astype(object), "found object", "real numbers"),
    "empty batch": (FLOAT, GOOD[:0], "it is empty", "at least one image"),
    "empty bytes": (BYTES, GOOD_BYTES[:0], "it is empty", "at least one image"),
    "no pixels": (ANY_SIZE, np.zeros((1, 3, 0, 4), np.float32), "it is empty", "without pixels"),
    "nan": (
        FLOAT,
        with_value(np.nan),
        "found 1 of 1536 NaN or infinite, the first at (1, 2, 3, 4): nan",
        "image 1 of the batch",
    ),
    "infinity": (FLOAT, with_value(np.inf), "the first at (1, 2, 3, 4): inf", "image 1 of the batch"),
    "both infinities": (FLOAT, with_value(np.inf, -np.inf), "found 2 of 1536 NaN or infinite", "image 1 of the batch"),
    "minus infinity": (FLOAT, with_value(-np.inf), "the first at (1, 2, 3, 4): -inf", "image 1 of the batch"),
}


@pytest.mark.parametrize("case", CASES)
def test_check_of_wrong_batch_names_problem_and_remedy(case: str) -> None:
    options, batch, message, remedy = CASES[case]
    with pytest.raises(InputError) as caught:
        BatchCheck(make_metadata(options).spec).check(batch)
    assert message in caught.value.message
    assert remedy in caught.value.remedy


def test_check_names_every_step_at_once() -> None:
    with pytest.raises(InputError) as caught:
        BatchCheck(make_metadata(FLOAT).spec).check(GOOD[0].transpose(1, 2, 0).astype(np.float64))
    assert "expected float32 (N, 3, 16, 16), NCHW, found float64 (16, 16, 3)" in caught.value.message
    steps = caught.value.remedy.split("; then ")
    assert [step.split(":")[0] for step in steps] == ["add it", "transpose it", "convert it"]


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a,
        lambda a: a[:1],
        np.asfortranarray,
        lambda a: a[::-1],
        lambda a: a * np.float32(1e38),
        lambda a: np.concatenate([a] * 9),
    ],
)
def test_check_of_good_batch_returns_it_without_copying(change: Callable[[np.ndarray], np.ndarray]) -> None:
    batch = change(GOOD / np.abs(GOOD).max())
    assert np.shares_memory(BatchCheck(make_metadata(FLOAT).spec).check(batch), batch)


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (7, 33)])
def test_check_of_any_size_model_accepts_any_size(size: tuple[int, int]) -> None:
    batch = np.zeros((2, 3, *size), np.float32)
    assert BatchCheck(make_metadata(ANY_SIZE).spec).check(batch) is batch
