"""Peaks: the table of GPUs, and what is measured of a CPU."""

from __future__ import annotations

import itertools
import logging
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest

from repvgg_deploy.errors import InputError
from repvgg_deploy.files.plan_place import _NAMES
from repvgg_deploy.measure import peaks
from repvgg_deploy.measure.peaks import (
    GpuPeaks,
    combine,
    cpu_name,
    find_gpu_peaks,
    load_gpus,
    look_up_gpu,
    make_product,
    measure_cpu,
)
from repvgg_deploy.measure.roofline import Ceiling


@pytest.mark.parametrize("gpu", load_gpus(), ids=lambda gpu: gpu.names[0])
def test_every_gpu_has_a_source_and_dense_numbers(gpu: GpuPeaks) -> None:
    assert "NVIDIA" in gpu.source
    assert any(word in gpu.source for word in ("data sheet", "whitepaper", "technical brief"))
    base = gpu.names[0] if gpu.names[0].startswith("RTX") else gpu.names[0].split()[0]
    assert any(base in known for names in _NAMES.values() for known in names), (
        "a GPU that files.plan_place does not know"
    )
    # Tensor cores: INT8 is twice FP16; on GeForce, where FP16 with float32 sums is halved, four times.
    if gpu.int8 is not None and gpu.fp16 is not None:
        assert gpu.int8 / gpu.fp16 == pytest.approx(4 if gpu.names[0].startswith("RTX") else 2, rel=0.03)
    if gpu.tf32 is not None and gpu.fp16 is not None:
        assert gpu.fp16 / gpu.tf32 == pytest.approx(2, rel=0.03)


def test_names_are_found_as_people_and_drivers_write_them() -> None:
    names = {
        "t4": "T4", "Tesla T4": "T4", "NVIDIA A10": "A10", "a100": "A100",
        "NVIDIA A100-SXM4-40GB": "A100 40GB", "NVIDIA A100 80GB PCIe": "A100 PCIe",
        "NVIDIA H100 80GB HBM3": "H100", "NVIDIA H100 PCIe": "H100 PCIe",
        "NVIDIA GeForce RTX 4090": "RTX 4090", "rtx3090": "RTX 3090",
        "Tesla V100-PCIE-16GB": "V100 PCIe", "NVIDIA L40S": "L40S",
    }  # fmt: skip
    for text, name in names.items():
        assert find_gpu_peaks(text).names[0] == name, text
    every = [name for gpu in load_gpus() for name in gpu.names]
    assert len(every) == len({name.lower() for name in every})
    assert look_up_gpu("NVIDIA A10G") is None  # no source agrees with another
    assert look_up_gpu("Orin") is None  # the driver's name of several boards
    with pytest.raises(InputError, match="'gtx 480' are not known"):
        find_gpu_peaks("gtx 480")


def test_ceiling_of_a_gpu_leaves_out_what_it_has_no_unit_for() -> None:
    assert set(find_gpu_peaks("v100").ceiling().operations_per_second) == {"fp32", "fp16"}
    a10 = find_gpu_peaks("a10")
    assert a10.ceiling().operations_per_second["fp32"] == 31.2e12
    assert a10.ceiling(tf32=True).operations_per_second["fp32"] == 62.5e12
    assert find_gpu_peaks("t4").ceiling(tf32=True).operations_per_second["fp32"] == 8.1e12


@pytest.mark.parametrize("integer", [False, True])
def test_product_that_is_timed_is_a_product(integer: bool) -> None:
    random = np.random.default_rng(0)
    if integer:
        left, right = random.integers(0, 255, (5, 5), np.uint8), random.integers(-127, 127, (5, 5), np.int8)
    else:
        left, right = (random.standard_normal((5, 5)).astype(np.float32) for _ in range(2))
    data = make_product(right, integer=integer)
    onnx.checker.check_model(data)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    expected = left.astype(np.int32) @ right.astype(np.int32) if integer else left @ right
    np.testing.assert_allclose(session.run(None, {"left": left})[0], expected, rtol=1e-5)


def test_cpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real products and copies, if small ones, on a clock that goes on by a millisecond with each look."""
    monkeypatch.setattr(peaks, "_SIZE", 64)
    monkeypatch.setattr(peaks, "_COPY_BYTES", 1 << 20)
    looks = itertools.count()
    monkeypatch.setattr(peaks, "time", SimpleNamespace(perf_counter=lambda: next(looks) / 1000))
    found = measure_cpu(threads=1, seconds=0.01)
    assert found is not None and found.measured
    product, copy = pytest.approx(2 * 64**3 / 1e-3), pytest.approx(2 * (1 << 20) / 1e-3)
    assert found.operations_per_second == {"fp32": product, "fp16": product, "int8": product}
    assert found.bytes_per_second == copy
    assert "core" in cpu_name() and found.device == cpu_name()


def test_cpu_without_onnx_runtime_is_not_measured_and_says_so(monkeypatch, caplog) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with caplog.at_level(logging.WARNING):
        assert measure_cpu(seconds=0.01) is None
    assert "takes ONNX Runtime" in caplog.text


def test_higher_of_two_measurements_counts() -> None:
    one, two = (
        Ceiling("cpu", {"fp32": fp32, "int8": int8}, moved, "made", measured=True)
        for fp32, int8, moved in ((1e9, 4e9, 5e9), (2e9, 3e9, 6e9))
    )
    both = combine(one, two)
    assert both is not None and (both.operations_per_second, both.bytes_per_second) == ({"fp32": 2e9, "int8": 4e9}, 6e9)
    assert combine(one, None) is one and combine(None, two) is two and combine(None, None) is None
