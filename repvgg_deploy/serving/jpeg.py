"""An ensemble that takes JPEG files: a model of Triton's python backend that decodes them, and the two as one.

A JPEG is a thirtieth of the float tensor that it becomes, and a client needs neither Pillow nor the normalisation constants.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from ..errors import InputError
from .config import LABELS_FILE, add_batching, data_type
from .options import RepositoryOptions, Servable, ServedFile, require_name
from .schema import load_schema

SETTINGS_FILE = "preprocessing.json"
IMAGE = "image"
"""Name of the ensemble's input: one JPEG file a row."""


def make_jpeg_models(model: Servable, options: RepositoryOptions, config: Any) -> list[tuple[Any, tuple[ServedFile, ...]]]:
    """Configuration and version folder of `NAME_decode` and of the ensemble `NAME_jpeg`.

    Args:
        model: What is behind them.
        options: How the model is to be served.
        config: The model's own configuration.

    Raises:
        InputError: The model does not say how an image becomes its input, or takes no batches.
    """
    preprocessing = model.spec.preprocessing
    if preprocessing is None or not config.max_batch_size or model.spec.input.layout not in ("NCHW", "NHWC"):
        raise InputError(
            f"{model.name}: --ensemble jpeg needs a model that says how an image becomes its input, and that takes any batch",
            remedy="export it with repvgg-export and a dynamic batch, or leave --ensemble out",
        )
    row = [preprocessing.crop[0], preprocessing.crop[1], 3] if model.spec.input.layout == "NHWC" else [3, *preprocessing.crop]
    decoder = _decoder_config(model, options, config.max_batch_size, row)
    settings = {
        "mean": preprocessing.mean,
        "std": preprocessing.std,
        "resize_short": preprocessing.resize_short,
        "crop": preprocessing.crop,
        "interpolation": preprocessing.interpolation,
        "in_graph": preprocessing.in_graph,
    }
    code = resources.files("repvgg_deploy").joinpath("data/triton_jpeg.py.txt").read_bytes()
    files = (ServedFile("model.py", code), ServedFile(SETTINGS_FILE, json.dumps(settings, indent=2).encode() + b"\n"))
    return [(decoder, files), (_ensemble_config(model, decoder, config), ())]


def _decoder_config(model: Servable, options: RepositoryOptions, max_batch: int, row: list[int]) -> Any:
    config = load_schema().ModelConfig(name=require_name(f"{model.name}_decode"), backend="python", max_batch_size=max_batch)
    config.default_model_filename = "model.py"
    config.input.add(name=IMAGE, data_type="TYPE_STRING", dims=[1])
    config.output.add(name=model.spec.input.name, data_type=data_type(model.spec.input.dtype), dims=row)
    group = config.instance_group.add(count=options.instances)
    group.kind = type(group).KIND_CPU
    add_batching(config, options, ())
    # Nothing is gained by decoding together what can be decoded at once: requests wait for company once, in front of the model.
    config.dynamic_batching.max_queue_delay_microseconds = 0
    return config


def _ensemble_config(model: Servable, decoder: Any, config: Any) -> Any:
    ensemble = load_schema().ModelConfig(name=require_name(f"{model.name}_jpeg"), platform="ensemble", max_batch_size=config.max_batch_size)
    ensemble.input.add(name=IMAGE, data_type="TYPE_STRING", dims=[1])
    for output in config.output:
        ensemble.output.add(name=output.name, data_type=output.data_type, dims=output.dims, label_filename=output.label_filename and LABELS_FILE)
    decode = ensemble.ensemble_scheduling.step.add(model_name=decoder.name, model_version=-1)
    decode.input_map[IMAGE] = IMAGE
    decode.output_map[decoder.output[0].name] = "pixels"
    run = ensemble.ensemble_scheduling.step.add(model_name=model.name, model_version=-1)
    run.input_map[model.spec.input.name] = "pixels"
    for tensor in model.spec.outputs:
        run.output_map[tensor.name] = tensor.name
    return ensemble
