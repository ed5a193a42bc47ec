"""Exported ONNX → typed ONNX: where images come from, the gate, saved calibrations, what is written and what is not."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from repvgg_deploy.errors import ArtifactError, CalibrationError, InputError, ModelError, ParityError
from repvgg_deploy.files.onnx import read_metadata
from repvgg_deploy.files.output import sha256_file
from repvgg_deploy.precision import int8 as int8_steps
from repvgg_deploy.precision import quantization, typed_model
from repvgg_deploy.precision.equalize import EqualizeOptions
from repvgg_deploy.precision.gate import agreement_check, allowed_to_differ, blame_int8
from repvgg_deploy.precision.int8 import FAST, MAX_CALIBRATION, Int8Options
from repvgg_deploy.precision.metrics import Judge, Verification
from repvgg_deploy.precision.network import Network, read_network
from repvgg_deploy.precision.options import QuantizeOptions
from repvgg_deploy.precision.quantization import QuantizeResult, default_typed_output, quantize
from repvgg_deploy.precision.round import RoundOptions
from repvgg_deploy.precision.scales import ScaleFile, ScaleOptions, read_scales
from repvgg_deploy.precision.search import SearchOptions
from repvgg_deploy.precision.typed_model import load_parent
from repvgg_deploy.specs import codec
from repvgg_deploy.specs.values import CalibrationProvenance
from tests.precision.make_chain import KINDS, ChainOptions, make_batches, make_model, save
from tests.precision.test_closed_form import statistics_for, with_statistics
from tests.runtime.make_model import write_bound

QUICK = dataclasses.replace(FAST, target="trt10")
BOTH = ("fp16", "int8")


def write_pixels(path: Path, count: int = 64, *, seed: int = 1) -> Path:
    np.savez(path, images=np.concatenate(make_batches(ChainOptions(uint8=True), count, seed=seed)))
    return path


def write_beside(model: Path, count: int = 40, **changes: object) -> Path:
    images = np.concatenate(make_batches(ChainOptions(uint8=True), count))
    provenance = CalibrationProvenance(
        1, sha256_file(model), "a" * 64, "bn_statistics", images=count, seed=0, steps=9, loss=0.1, versions={}
    )
    path = model.with_name(model.name.replace(".onnx", ".calib.npz"))
    np.savez(path, images=images, provenance=np.array(codec.dumps(dataclasses.replace(provenance, **changes))))
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(tmp_path / "m.onnx", make_model(KINDS["plain"]))


@pytest.fixture
def pixels(tmp_path: Path) -> Path:
    return write_pixels(tmp_path / "pixels.npz")


def int8(
    model: Path, calibration: Path | str | None, steps: Int8Options = QUICK, out: Path | None = None, **options: object
) -> QuantizeResult:
    return quantize(model, out, QuantizeOptions("int8", calibration, int8=steps, **options))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", BOTH)
def test_quantize_every_kind_of_graph_is_verified_and_written(
    tmp_path: Path, pixels: Path, kind: str, precision: str
) -> None:
    source = save(tmp_path / f"{kind}.onnx", make_model(KINDS[kind]))
    # The last stage of this backbone has outlying channels, and no factor may touch an output of the graph.
    result = quantize(source, None, QuantizeOptions(precision, pixels, int8=QUICK, min_sqnr_db=18))
    out = tmp_path / f"{kind}-{precision}.onnx"
    assert result.output.target == out and result.output.status == "written"
    onnx.checker.check_model(onnx.load(out), full_check=True)
    metadata = read_metadata(out)
    assert [entry.stage for entry in metadata.history] == ["export", precision]
    assert metadata.certificate == result.metadata.certificate and metadata.certificate.passed
    found = result.verification
    assert found.images == (12 if precision == "int8" else 64)
    assert found.held_out == (precision == "int8")
    assert found.sqnr_db > (55 if precision == "fp16" else 18 if kind == "features" else 22)
    assert found.outputs[-1].name == ("stage2" if kind == "features" else "logits")
    assert (found.agreement is None) == (kind == "features")
    assert ("no classifier" in result.ungated) == (kind == "features" and precision == "fp16")
    assert result.bytes_after == out.stat().st_size < result.bytes_before == source.stat().st_size
    assert (result.images.calibration, result.images.held_out, result.images.synthetic) == (
        (52, 12, False) if precision == "int8" else (64, 0, False)
    )
    assert len(metadata.certificate.checks) == 1 + {"int8": 1, "fp16": 2 - (kind == "features")}[precision]


def test_int8_outputs_of_a_backbone_must_reach_the_least_sqnr(tmp_path: Path, pixels: Path) -> None:
    source = save(tmp_path / "m.onnx", make_model(KINDS["features"]))
    with pytest.raises(
        ParityError, match=r"held-out images, at least 60 dB expected: stage2 \d+\.\d dB .* by stage2\.conv .*; stage1 "
    ) as caught:
        quantize(source, None, QuantizeOptions("int8", pixels, int8=QUICK, min_sqnr_db=60))
    assert "--min-sqnr" in caught.value.remedy and not (tmp_path / "m-int8.onnx").exists()
    with pytest.raises(InputError, match="0 to 200 dB"):
        QuantizeOptions("int8", min_sqnr_db=-1)


def test_fp16_without_images_is_judged_by_its_error_on_drawn_images(model: Path) -> None:
    result = quantize(model, None, QuantizeOptions("fp16"))
    assert result.images is None and "drawn" in result.ungated
    assert result.verification.sqnr_db > 55 and not result.verification.held_out
    assert result.metadata.certificate.checks[-1].name.endswith("rms error of the outputs")


def test_int8_without_calibration_takes_the_file_beside_the_onnx(model: Path) -> None:
    write_beside(model)
    result = int8(model, None)
    assert (result.images.name, result.images.synthetic) == (str(model.with_name("m.calib.npz")), True)
    assert (result.images.calibration, result.images.held_out) == (32, 8)
    options = read_metadata(result.output.target).history[-1].options
    assert (options["calibration"], options["verified"], options["images"]) == ("synthetic", 8, 32)


@pytest.mark.parametrize("batch", [4, 16])
@pytest.mark.parametrize("uint8", [False, True])
def test_int8_with_a_fixed_batch_holds_out_whole_batches(tmp_path: Path, batch: int, uint8: bool) -> None:
    graph = make_model(KINDS["uint8_top5" if uint8 else "plain"])
    for value in (*graph.graph.input, *graph.graph.output):
        value.type.tensor_type.shape.dim[0].ClearField("dim_param")
        value.type.tensor_type.shape.dim[0].dim_value = batch
    source = save(tmp_path / "m.onnx", graph)
    write_beside(source, 50)
    result = int8(source, None)
    assert result.images.held_out % batch == 0 and result.images.calibration % batch == 0
    assert result.images.calibration + result.images.held_out == 48
    assert quantize(source, None, QuantizeOptions("fp16")).verification.images == 16


def test_int8_without_any_images_says_how_to_make_them(model: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"m\.calib\.npz is not there") as caught:
        int8(model, None)
    assert all(text in caught.value.remedy for text in ("--synthetic-calibration", "--calib DIR", "--calib statistics"))
    assert names(tmp_path) == ["m.onnx"]


def test_int8_with_the_file_of_another_onnx_beside_it_is_refused(model: Path) -> None:
    write_beside(model, onnx_sha256="b" * 64)
    with pytest.raises(CalibrationError, match="made for another ONNX"):
        int8(model, None)
    assert int8(model, model.with_name("m.calib.npz")).images.synthetic is False  # named, it is taken


def test_more_images_than_wanted_are_held_out(model: Path, tmp_path: Path) -> None:
    pixels = write_pixels(tmp_path / "many.npz", 128)
    found = int8(model, pixels, images=40).images
    assert (found.calibration, found.held_out) == (40, 20)
    other = int8(model, pixels, images=40, seed=1, out=tmp_path / "other.onnx")
    assert (
        other.metadata.history[-1].options["data_sha256"]
        != read_metadata(tmp_path / "m-int8.onnx").history[-1].options["data_sha256"]
    )


@pytest.mark.parametrize(("count", "seen"), [(1, 1), (7, 7), (8, None)])
def test_int8_of_very_few_images_is_refused(model: Path, tmp_path: Path, count: int, seen: int | None) -> None:
    pixels = write_pixels(tmp_path / "few.npz", count)
    if seen is None:
        assert int8(model, pixels).images.held_out == 1
        return
    with pytest.raises(CalibrationError, match=f"expected at least 8 images .* found {seen}"):
        int8(model, pixels)
    assert not default_typed_output(model, "int8").exists()


def test_gate_that_fails_names_the_layers_and_writes_nothing(model: Path, pixels: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ParityError, match=r"INT8 agrees with FP32 on 83\.33 % of 12 held-out images, at least 97 % expected"
    ) as caught:
        int8(model, pixels, MAX_CALIBRATION, save_scales=tmp_path / "s.json")
    assert (
        caught.value.message.count(".conv (") == 3
        and "--max-drop" in caught.value.remedy
        and "--min-agreement" in caught.value.remedy
    )
    assert names(tmp_path) == ["m.onnx", "pixels.npz"]
    assert int8(model, pixels, MAX_CALIBRATION, min_agreement=0.8).verification.differing == 2


def test_blame_falls_on_the_layer_whose_scale_is_spoilt(model: Path, pixels: Path) -> None:
    scales = int8(model, pixels).int8.scales
    network, batches = load_parent(model).network, make_batches(count=32)
    for layer in ("stage2", "stage3"):
        spoilt = dataclasses.replace(scales, scales={**scales.scales, layer: scales.scales[layer] * 20})
        readers = {"stage2": "stage3.conv", "stage3": "stage4.conv"}
        assert blame_int8(network, spoilt, (), batches)[0].name == readers[layer]
        assert readers[layer] not in [cost.name for cost in blame_int8(network, spoilt, (readers[layer],), batches)]


@pytest.mark.parametrize(
    ("images", "share", "allowed"),
    [(12, 0.97, 1), (33, 0.97, 1), (100, 0.97, 3), (200, 0.97, 6), (12, 1.0, 0), (10, 0.0, 10)],
)
def test_of_few_images_one_may_differ(images: int, share: float, allowed: int) -> None:
    assert allowed_to_differ(images, share) == allowed
    for differing in (allowed, allowed + 1):
        check = agreement_check(Verification(images, True, 1 - differing / images, 0.0, 30.0), "int8", share)
        assert check.passed == (differing == allowed)


def test_fp16_that_differs_is_refused_and_says_where_they_part(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def spoil(source: Path, *rest: object) -> object:
        typed, report = real(source, *rest)
        weight = next(tensor for tensor in typed.model.graph.initializer if tensor.name == "stage2.weight")
        weight.CopyFrom(onnx.numpy_helper.from_array(np.round(onnx.numpy_helper.to_array(weight), 1), weight.name))
        return typed, report

    real = quantization.to_fp16
    monkeypatch.setattr(quantization, "to_fp16", spoil)
    with pytest.raises(ParityError, match=r"at least 40 expected, same best class on .* they part at stage2\.conv"):
        quantize(model, None, QuantizeOptions("fp16"))
    assert names(tmp_path) == ["m.onnx"]


def test_typed_graph_that_gives_nan_is_refused(model: Path) -> None:
    network, broken = load_parent(model).network, onnx.load(model)
    bias = next(tensor for tensor in broken.graph.initializer if tensor.name == "linear.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full_like(onnx.numpy_helper.to_array(bias), np.nan), bias.name))
    with pytest.raises(ParityError, match="NaN or infinite values"):
        Judge(network, make_batches(count=16)).compare(broken)


def test_statistics_of_an_export_without_them_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no BatchNorm statistics"):
        int8(model, "statistics")
    assert names(tmp_path) == ["m.onnx"]


@pytest.mark.parametrize("precision", BOTH)
def test_output_that_exists_is_up_to_date_or_refused(model: Path, pixels: Path, tmp_path: Path, precision: str) -> None:
    options = QuantizeOptions(precision, pixels, int8=QUICK)
    first = quantize(model, None, options)
    assert quantize(str(model), first.output.target, options).output.status == "up to date"
    first.output.target.write_bytes(b"something else")
    with pytest.raises(ArtifactError, match="exists and differs"):
        quantize(model, None, options)
    assert first.output.target.read_bytes() == b"something else"
    assert quantize(model, None, options, force=True).output.status == "written"
    assert names(tmp_path) == [f"m-{precision}.onnx", "m.onnx", "pixels.npz"]


@pytest.mark.parametrize("steps", ["search", "exponent", "plain"])
def test_saved_calibration_gives_the_same_graph(model: Path, pixels: Path, tmp_path: Path, steps: str) -> None:
    search = Int8Options(
        search=SearchOptions((0.5, 1.0), images=16, positions=256),
        rounding=RoundOptions(clips=(1.0,), samples=512, sweeps=0),
    )
    exponent = dataclasses.replace(QUICK, equalize=EqualizeOptions(0.8), scales=ScaleOptions("percentile", 99.9))
    chosen = {"search": search, "exponent": exponent, "plain": dataclasses.replace(QUICK, equalize=None)}[steps]
    saved = tmp_path / "s.json"
    first = int8(model, pixels, chosen, out=tmp_path / "a.onnx", save_scales=saved, min_agreement=0.0)
    assert first.scales_output.status == "written"
    assert read_scales(saved) == first.int8.scales
    stages: list[str] = []
    again = dataclasses.replace(search if steps == "search" else QUICK, rounding=chosen.rounding)
    options = QuantizeOptions("int8", pixels, int8=again, scales=saved, min_agreement=0.0)
    second = quantize(model, tmp_path / "b.onnx", options, progress=lambda stage, done, total: stages.append(stage))
    assert "equalize" not in stages and "ranges" not in stages and "round" in stages
    graphs = [onnx.load(result.output.target).graph for result in (first, second)]
    assert graphs[0] == graphs[1]
    assert second.metadata.history[-1].options["scales"] == chosen.scales.method
    assert (
        second.metadata.history[-1].options["equalize"]
        == {"search": "measured", "exponent": "saved", "plain": None}[steps]
        or steps == "plain"
    )
    if steps == "search":
        assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_saved_calibration_of_others_is_refused(model: Path, pixels: Path, tmp_path: Path) -> None:
    saved = tmp_path / "s.json"
    int8(model, pixels, save_scales=saved)
    with pytest.raises(CalibrationError, match="of another images"):
        int8(model, write_pixels(tmp_path / "o.npz", seed=5), scales=saved)
    other = save(tmp_path / "n.onnx", make_model(KINDS["plain"], seed=3))
    with pytest.raises(CalibrationError, match="of another graph"):
        int8(other, pixels, scales=saved)
    for text, message in (
        ("{}", "expected a value"),
        ("\udcff", "not UTF-8"),
        (codec.dumps(read_metadata(model)), "expected one of"),
    ):
        saved.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(InputError, match=f"not a calibration that --save-scales wrote: .*{message}"):
            int8(model, pixels, scales=saved)
    with pytest.raises(InputError, match="no such file"):
        int8(model, pixels, scales=tmp_path / "nowhere.json")
    assert not default_typed_output(other, "int8").exists()


def test_saved_calibration_and_graph_are_written_both_or_none(model: Path, pixels: Path, tmp_path: Path) -> None:
    saved, out = tmp_path / "s.json", default_typed_output(model, "int8")
    saved.write_text("else")
    with pytest.raises(ArtifactError, match=r"s\.json: exists and differs"):
        int8(model, pixels, save_scales=saved)
    assert not out.exists() and saved.read_text() == "else"
    saved.unlink()
    out.write_text("else")
    with pytest.raises(ArtifactError, match="exists and differs"):
        int8(model, pixels, save_scales=saved)
    assert names(tmp_path) == ["m-int8.onnx", "m.onnx", "pixels.npz"]


def test_largest_drop_keeps_layers_and_says_so(model: Path, pixels: Path) -> None:
    steps = dataclasses.replace(MAX_CALIBRATION, target="trt10", max_drop=0.0)
    result = int8(model, pixels, steps)
    report = result.int8
    assert report.kept and report.int8_share < 1 and report.costs
    assert report.held_out.expected_drop == result.verification.expected_drop <= 0.01
    assert read_metadata(result.output.target).history[-1].options["kept"] == ", ".join(report.kept)


@pytest.mark.parametrize("io", ["fp32", "fp16"])
@pytest.mark.parametrize("precision", BOTH)
def test_half_inputs_are_verified_as_they_are(model: Path, pixels: Path, precision: str, io: str) -> None:
    options = QuantizeOptions(precision, pixels, int8=dataclasses.replace(QUICK, io=io))
    options = dataclasses.replace(options, fp16=dataclasses.replace(options.fp16, io=io))
    result = quantize(model, None, options)
    assert result.metadata.spec.input.dtype == {"fp32": "float32", "fp16": "float16"}[io]
    assert result.verification.sqnr_db > 30


@pytest.mark.parametrize("precision", BOTH)
@pytest.mark.parametrize("typed", BOTH)
def test_typed_input_is_refused(model: Path, pixels: Path, tmp_path: Path, precision: str, typed: str) -> None:
    done = quantize(model, None, QuantizeOptions(typed, pixels, int8=QUICK)).output.target
    before = names(tmp_path)
    with pytest.raises(CalibrationError, match="already"):
        quantize(done, None, QuantizeOptions(precision, pixels))
    assert names(tmp_path) == before


def test_files_that_are_not_ours_are_refused(tmp_path: Path, pixels: Path) -> None:
    foreign = tmp_path / "foreign.onnx"
    onnx.save(make_model(), foreign)
    for path in (foreign, pixels, tmp_path / "nowhere.onnx", tmp_path):
        with pytest.raises(ModelError):
            int8(path, pixels)


def test_outputs_that_would_replace_an_input_are_refused(model: Path, pixels: Path, tmp_path: Path) -> None:
    for out, options in (
        (model, {}),
        (pixels, {}),
        (tmp_path / "o", {"save_scales": tmp_path / "o"}),
        (tmp_path / "o", {"save_scales": model}),
    ):
        with pytest.raises(InputError, match="would replace"):
            int8(model, pixels, out=out, **options)
    with pytest.raises(ArtifactError, match="does not exist"):
        int8(model, pixels, out=tmp_path / "nowhere" / "o.onnx")


@pytest.mark.parametrize("stage", ["read images", "ranges", "round", "verify", "write"])
def test_interrupted_quantization_leaves_nothing(model: Path, pixels: Path, tmp_path: Path, stage: str) -> None:
    def interrupt(name: str, done: int, total: int) -> None:
        if name == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(
            model,
            None,
            QuantizeOptions("int8", pixels, int8=QUICK, save_scales=tmp_path / "s.json"),
            progress=interrupt,
        )
    assert names(tmp_path) == ["m.onnx", "pixels.npz"]


CONTRADICTIONS = {
    "precision": ("int4", {}),
    "agreement": ("int8", {"min_agreement": 1.1}),
    "agreement nan": ("int8", {"min_agreement": float("nan")}),
    "images": ("int8", {"images": 0}),
    "fp16 statistics": ("fp16", {"calibration": "statistics"}),
    "fp16 scales": ("fp16", {"save_scales": Path("s")}),
    "statistics scales": ("int8", {"calibration": "statistics", "scales": Path("s")}),
    "statistics drop": ("int8", {"calibration": "statistics", "int8": Int8Options(max_drop=0.3)}),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_options_that_cannot_hold_are_refused(name: str) -> None:
    precision, options = CONTRADICTIONS[name]
    with pytest.raises(InputError):
        QuantizeOptions(precision, **options)


def test_scale_file_is_text_of_one_line(model: Path, pixels: Path, tmp_path: Path) -> None:
    int8(model, pixels, save_scales=tmp_path / "s.json")
    text = (tmp_path / "s.json").read_text()
    assert text.endswith("}\n") and text.count("\n") == 1
    assert isinstance(codec.loads(ScaleFile, text), ScaleFile)


@pytest.fixture(scope="module")
def opened() -> list[str]:
    """The files that are opened from now on. An audit hook stays for good, so there is one, and it only takes notes."""
    names: list[str] = []
    sys.addaudithook(lambda event, args: names.append(str(args[0])) if event == "open" else None)
    return names


@pytest.mark.parametrize("calibration", ["images", None, "statistics", "fp16"])
def test_parent_and_its_chain_are_read_once(tmp_path: Path, opened: list[str], calibration, monkeypatch) -> None:
    graph = make_model(KINDS["plain"])
    metadata = with_statistics(graph, statistics_for(graph)).metadata
    source = write_bound(tmp_path / "m.onnx", graph.SerializeToString(deterministic=True), metadata)
    write_beside(source)
    if calibration == "images":
        calibration = write_pixels(tmp_path / "pixels.npz")
    chains: list[onnx.ModelProto] = []

    def read(model: onnx.ModelProto) -> Network:
        chains.append(model)
        return read_network(model)

    for module in (typed_model, int8_steps):
        monkeypatch.setattr(module, "read_network", read)
    opened.clear()
    if calibration == "fp16":
        quantize(source, None, QuantizeOptions("fp16"))
    else:
        int8(source, calibration, min_agreement=0.0)
    assert opened.count(str(source)) == 1
    assert len(chains) == 1


def test_quantize_needs_no_torch() -> None:
    code = "import sys; import repvgg_deploy.precision.quantization; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2]).returncode == 0
