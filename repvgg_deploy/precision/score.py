"""The user's own measure (mAP, mIoU, …) of a typed graph beside FP32, on the user's own data.

Whoever writes one gets a function that runs the graph, as `Engine.infer` does, and gives back one number.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from ..errors import InputError, RepVGGDeployError
from .metrics import accept_floats
from .run_onnx import has_fixed_batch, open_session, run_session

Run: TypeAlias = Callable[[NDArray[Any]], Any]
"""Runs a graph on N images as it takes them, N ≥ 1. Gives its outputs, float32 where they are floating-point: an array
(N, …) where there is one, else a dict of them by name."""
Metric: TypeAlias = Callable[[Run], float]
"""Measures what a graph gives, on data of its own: one finite number, larger is better. It is called once with FP32 and
once with every graph that is judged, and should give the same number for the same graph."""


@dataclass(frozen=True, slots=True)
class Score:
    """What the user's own measure says of a typed graph.

    Attributes:
        metric: The function, `module:function`.
        fp32: What it gives the FP32 graph.
        found: What it gives the typed graph; larger is better.
        least: What that had to be.
    """

    metric: str
    fp32: float
    found: float
    least: float

    @property
    def passed(self) -> bool:
        """Whether the typed graph is good enough."""
        return self.found >= self.least


@dataclass(frozen=True, slots=True, eq=False)
class Demand:
    """What the user's own measure gives FP32, and what it must give a typed graph."""

    metric: Metric
    fp32: float
    least: float

    def judge(self, typed: onnx.ModelProto) -> Score:
        """Measures a typed graph.

        Raises:
            InputError: The function fails, or gives no number.
        """
        found = _measure(self.metric, typed, "the typed graph")
        return Score(metric_name(self.metric), self.fp32, found, self.least)


def demand_score(
    metric: Metric, reference: onnx.ModelProto, *, least: float | None, most_lost: float | None, share: float
) -> Demand:
    """Measures FP32, and says what is demanded of what is made of it.

    Args:
        metric: The user's function.
        reference: The FP32 graph.
        least: The least score.
        most_lost: What it may fall by. The stricter holds where both are given.
        share: Of FP32's score: what must remain where neither is.

    Raises:
        InputError: The function fails or gives no number; FP32 itself is below the least, or a share says nothing.
    """
    fp32, name = _measure(metric, reference, "the FP32 graph"), metric_name(metric)
    bounds = [] if least is None else [least]
    bounds += [] if most_lost is None else [fp32 - most_lost]
    if not bounds and fp32 <= 0:
        raise InputError(
            f"{name} gives the FP32 graph {fp32:g}, so that a share of it is no bound",
            remedy="say what the score must be (--min-metric), or what it may fall by (--max-drop)",
        )
    wanted = max(bounds) if bounds else share * fp32
    if fp32 < wanted:
        raise InputError(
            f"{name} gives the FP32 graph itself {fp32:g}, and at least {wanted:g} is demanded (--min-metric)",
            remedy="demand less; or, if smaller is better there, let the function return the number times -1",
        )
    return Demand(metric, fp32, wanted)


def load_metric(text: str) -> Metric:
    """The function that `module:function` names; modules of the working directory are found, too.

    Raises:
        InputError: There is none, or its module cannot be imported.
    """
    module, _, name = text.partition(":")
    if not module or not name or "/" in module or module.endswith(".py"):
        raise InputError(
            f"--metric: expected module:function, found {text!r}",
            remedy="give such as measure:score for the function score of measure.py, tools.measure:score for that of "
            "tools/measure.py",
        )
    here = os.getcwd()
    sys.path.insert(0, here)  # as for a script that is started there
    try:
        loaded: Any = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        missing = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
        why = f"there is no module {module}" if missing else f"importing it failed: {_describe(error)}"
        raise InputError(
            f"--metric {text}: {why}",
            remedy=f"start this in the folder that holds {module.split('.')[0]}, or install it",
        ) from error
    finally:
        sys.path.remove(here)
        sys.path.append(here)  # for what it imports later; nothing of ours is hidden by it
    found = loaded
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise InputError(
            f"--metric {text}: {getattr(loaded, '__file__', None) or module} has no function {name}",
            remedy="check the name",
        )
    metric: Metric = found
    return metric


def metric_name(metric: Metric) -> str:
    """`module:function`, or the type of an object that is no function."""
    name = getattr(metric, "__qualname__", type(metric).__qualname__)
    return f"{getattr(metric, '__module__', type(metric).__module__)}:{name}"


def _measure(metric: Metric, model: onnx.ModelProto, what: str) -> float:
    name = metric_name(metric)
    run = _open(model)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what it prints is no result of ours
            found: Any = metric(run)
    except (Exception, SystemExit) as error:
        raise InputError(
            f"the measure {name} failed on {what}: {_describe(error)}",
            remedy="it is called with a function that runs the graph, run(batch), and returns one number; "
            "-vv shows where it failed",
        ) from error
    try:
        number = math.nan if isinstance(found, str | bytes | bool) else float(found)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        shown = repr(found)
        raise InputError(
            f"{name} gave {what} {shown if len(shown) < 60 else type(found).__name__}, expected one finite number",
            remedy="return a float, larger is better",
        )
    return number


def _describe(error: BaseException) -> str:
    if isinstance(error, RepVGGDeployError):
        return error.message
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"


def _open(model: onnx.ModelProto) -> Run:
    """What runs a graph for a `Metric`; fewer images than a fixed batch are padded, more are split."""
    model = accept_floats(model)
    session, source = open_session(model), model.graph.input[0]
    names = [value.name for value in model.graph.output]
    size = source.type.tensor_type.shape.dim[0].dim_value if has_fixed_batch(model) else None

    def run(batch: NDArray[Any]) -> Any:
        images = np.asarray(batch)
        if images.ndim == 0 or not len(images):
            raise InputError(f"run(batch): expected images, found shape {images.shape}", remedy="give one at least")
        step = size or len(images)
        parts = []
        for start in range(0, len(images), step):
            part = images[start : start + step]
            padded = part if len(part) == step else np.resize(part, (step, *part.shape[1:]))
            parts.append([value[: len(part)] for value in run_session(session, names, {source.name: padded})])
        found = [np.concatenate(values) for values in zip(*parts, strict=True)]
        found = [value.astype(np.float32) if value.dtype == np.float16 else value for value in found]
        return found[0] if len(found) == 1 else dict(zip(names, found, strict=True))

    return run
