"""The decoder that runs in Triton's Python gives what `preprocess` gives."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from repvgg_deploy.errors import InputError
from repvgg_deploy.files.onnx import read_metadata
from repvgg_deploy.images.decode import decode_image, letterbox_preprocessing, load_batch, normalize
from repvgg_deploy.images.pixels import place
from repvgg_deploy.serving.config import make_jpeg_code
from repvgg_deploy.serving.options import RepositoryOptions
from repvgg_deploy.serving.triton import write_triton
from repvgg_deploy.serving.validate import validate_repository
from repvgg_deploy.specs import codec
from repvgg_deploy.specs.values import Preprocessing
from tests.images.make_images import make_jpegs
from tests.runtime.make_model import ModelOptions, make_onnx, strip_metadata, write_bound
from tests.serving.make_repository import needs_schema, read_config

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


class Tensor:
    def __init__(self, name: str, array: np.ndarray[Any, Any]) -> None:
        self.name, self.array = name, array

    def as_numpy(self) -> np.ndarray[Any, Any]:
        return self.array


class Response:
    def __init__(self, output_tensors: list[Tensor] | None = None, error: Exception | None = None) -> None:
        self.output_tensors, self.error = output_tensors, error


@pytest.fixture
def template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The model's code, with a stand-in for the module that Triton gives it."""
    utils = types.ModuleType("triton_python_backend_utils")
    utils.Tensor, utils.InferenceResponse, utils.TritonError = Tensor, Response, Exception
    utils.get_input_tensor_by_name = lambda request, name: request[name]
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)
    path = tmp_path / "served.py"
    path.write_bytes(make_jpeg_code())
    spec = importlib.util.spec_from_file_location("served", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def jpeg(size: tuple[int, int], mode: str = "RGB", orientation: int | None = None) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1] // 4 + 1, size[0] // 4 + 1, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize(size).convert(mode)
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    stream = io.BytesIO()
    image.save(stream, "JPEG", exif=exif)
    return stream.getvalue()


def start(
    template: types.ModuleType, folder: Path, preprocessing: Preprocessing, outputs: Sequence[dict[str, str]] = ()
) -> Any:
    (folder / "1").mkdir()
    (folder / "1/preprocessing.json").write_text(json.dumps(codec.encode(preprocessing)))
    model = template.TritonPythonModel()
    config = {"input": [{"name": "image"}], "output": list(outputs or [{"name": "images"}])}
    model.initialize({"model_repository": str(folder), "model_version": "1", "model_config": json.dumps(config)})
    return model


def request(*files: bytes) -> dict[str, Tensor]:
    return {"image": Tensor("image", np.array(files, object).reshape(-1, 1))}


@pytest.mark.parametrize("orientation", [None, 3, 6])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    ("size", "short", "crop"), [((300, 200), 256, (224, 224)), ((97, 501), 64, (64, 96)), ((20, 20), 32, (32, 32))]
)
def test_decoder_gives_the_batch_of_preprocess(
    size: tuple[int, int],
    short: int,
    crop: tuple[int, int],
    mode: str,
    orientation: int | None,
    template: types.ModuleType,
    tmp_path: Path,
) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(jpeg(size, mode, orientation))
    for index, interpolation in enumerate(("bilinear", "bicubic")):
        for in_graph in (False, True):
            preprocessing = Preprocessing(MEAN, STD, short, crop, interpolation, in_graph)  # type: ignore[arg-type]
            folder = tmp_path / f"{index}{in_graph}"
            folder.mkdir()
            (response,) = start(template, folder, preprocessing).execute(
                [request(path.read_bytes(), path.read_bytes())]
            )
            expected = load_batch([path, path], preprocessing)
            assert response.error is None
            assert response.output_tensors[0].name == "images"
            assert response.output_tensors[0].array.dtype == expected.dtype
            np.testing.assert_array_equal(response.output_tensors[0].array, expected)


def test_decoder_of_a_detector_tells_where_each_image_lies(template: types.ModuleType, tmp_path: Path) -> None:
    preprocessing = letterbox_preprocessing(32, 48)
    names = [{"name": name} for name in ("images", "image_size", "to_image")]
    model = start(template, tmp_path, preprocessing, outputs=names)
    files = [jpeg((97, 50)), jpeg((40, 61), orientation=6)]
    (response,) = model.execute([request(*files)])
    images, sizes, affine = (tensor.array for tensor in response.output_tensors)
    for index, data in enumerate(files):
        np.testing.assert_array_equal(
            images[index], normalize(decode_image(data, preprocessing)[None], preprocessing)[0]
        )
    assert (sizes.dtype, sizes.tolist()) == (np.int32, [[50, 97], [40, 61]])
    box = np.array([10.0, 5, 20, 25], np.float32)
    for size, (scale_x, scale_y, shift_x, shift_y) in zip(sizes.tolist(), affine.tolist(), strict=True):
        moved = box * [scale_x, scale_y, scale_x, scale_y] + [shift_x, shift_y, shift_x, shift_y]
        expected = place(tuple(size), preprocessing).to_image(box)
        np.testing.assert_allclose(np.clip(moved, 0, [*size[::-1], *size[::-1]]), expected, atol=1e-3)


def test_file_that_is_no_jpeg_fails_by_itself(template: types.ModuleType, tmp_path: Path) -> None:
    model = start(template, tmp_path, Preprocessing(MEAN, STD, 32, (32, 32)))
    png = io.BytesIO()
    Image.new("RGB", (40, 40)).save(png, "PNG")
    good = jpeg((40, 40))
    answers = model.execute(
        [request(good), request(b""), request(png.getvalue()), request(good[:200]), request(good, good)]
    )
    assert [answer.error is None for answer in answers] == [True, False, False, False, True]
    assert all("not a usable JPEG" in str(answer.error) for answer in answers[1:4])


def test_picture_of_too_many_pixels_is_refused(
    template: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template, "MAX_PIXELS", 1000)
    model = start(template, tmp_path, Preprocessing(MEAN, STD, 32, (32, 32)))
    (answer,) = model.execute([request(jpeg((40, 40)))])
    assert "expected at most 1,000" in str(answer.error)


@needs_schema
@pytest.mark.parametrize(("uint8", "dims", "kind"), [(False, [3, 16, 16], 11), (True, [16, 16, 3], 2)])
def test_decoder_and_ensemble_stand_before_the_model(uint8: bool, dims: list[int], kind: int, tmp_path: Path) -> None:
    write_triton(
        [make_onnx(tmp_path / "m.onnx", ModelOptions(uint8=uint8))],
        tmp_path / "repo",
        RepositoryOptions(ensemble="jpeg", max_batch=8),
    )
    decoder, ensemble = read_config(tmp_path / "repo/m_decode"), read_config(tmp_path / "repo/m_jpeg")
    assert (decoder.backend, decoder.max_batch_size, decoder.output[0].name) == ("python", 8, "images")
    assert (list(decoder.output[0].dims), decoder.output[0].data_type) == (dims, kind)
    assert [step.model_name for step in ensemble.ensemble_scheduling.step] == ["m_decode", "m"]
    assert (ensemble.output[0].name, ensemble.output[0].label_filename, ensemble.max_batch_size) == (
        "logits",
        "labels.txt",
        8,
    )
    settings = json.loads((tmp_path / "repo/m_decode/1/preprocessing.json").read_text())
    assert (settings["crop"], settings["in_graph"]) == ([16, 16], uint8)
    assert list((tmp_path / "repo/m_jpeg/1").iterdir()) == []


@needs_schema
def test_ensemble_of_a_detector_hands_on_where_each_image_lies(tmp_path: Path) -> None:
    onnx = make_onnx(tmp_path / "m.onnx")
    metadata = read_metadata(onnx)
    spec = dataclasses.replace(metadata.spec, kind="module", labels=None)
    write_bound(onnx, strip_metadata(onnx.read_bytes()), dataclasses.replace(metadata, spec=spec))
    write_triton([onnx], tmp_path / "repo", RepositoryOptions(ensemble="jpeg"))
    decoder, ensemble = read_config(tmp_path / "repo/m_decode"), read_config(tmp_path / "repo/m_jpeg")
    told = [("image_size", "TYPE_INT32", [2]), ("to_image", "TYPE_FP32", [4])]
    for config in (decoder, ensemble):
        names = config.output[1:]
        kinds = [
            type(config).DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_number[o.data_type] for o in names
        ]
        assert [(o.name, kind.name, list(o.dims)) for o, kind in zip(names, kinds, strict=True)] == told
    step = ensemble.ensemble_scheduling.step[0]
    assert dict(step.output_map) == {spec.input.name: "pixels", "image_size": "image_size", "to_image": "to_image"}
    assert validate_repository(tmp_path / "repo") == (("m", "m_decode", "m_jpeg"), ())


@needs_schema
@pytest.mark.parametrize("options", [ModelOptions(preprocessing=False), ModelOptions(batch=2)])
def test_model_that_no_jpeg_can_be_made_for_is_refused(options: ModelOptions, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--ensemble jpeg needs"):
        write_triton([make_onnx(tmp_path / "m.onnx", options)], tmp_path / "repo", RepositoryOptions(ensemble="jpeg"))
    assert not (tmp_path / "repo").exists()


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of the damaged EXIF blocks, which the programs silence
@pytest.mark.parametrize("name", make_jpegs())
def test_triton_answers_what_the_engine_answers_and_refuses_what_it_refuses(
    name: str, template: types.ModuleType, tmp_path: Path
) -> None:
    data, preprocessing = make_jpegs()[name], Preprocessing(MEAN, STD, 32, (24, 28), "bicubic")
    (tmp_path / "photo.jpg").write_bytes(data)
    (response,) = start(template, tmp_path, preprocessing).execute([request(data)])
    if name.startswith("bad"):
        assert response.error is not None
        with pytest.raises(InputError):
            load_batch([tmp_path / "photo.jpg"], preprocessing)
    else:
        assert response.error is None
        expected = load_batch([tmp_path / "photo.jpg"], preprocessing)
        np.testing.assert_array_equal(response.output_tensors[0].array, expected)


def test_triton_stretches_covers_and_interpolates_as_the_engine(template: types.ModuleType, tmp_path: Path) -> None:
    data = make_jpegs()["plain"]
    (tmp_path / "photo.jpg").write_bytes(data)
    for index, changes in enumerate(({"fit": "stretch"}, {"fit": "cover"}, {"interpolation": "lanczos"})):
        preprocessing = Preprocessing(MEAN, STD, 30, (24, 28), box=(30, 40), **changes)  # type: ignore[arg-type]
        folder = tmp_path / str(index)
        folder.mkdir()
        (response,) = start(template, folder, preprocessing).execute([request(data)])
        expected = load_batch([tmp_path / "photo.jpg"], preprocessing)
        np.testing.assert_array_equal(response.output_tensors[0].array, expected)
