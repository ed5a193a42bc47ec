"""Wrappers, averaged weights, refusals, embedded metadata; what `load.py` promises; what a description says."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import pickle
import shlex
import subprocess
import sys
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from repvgg_deploy.errors import CheckpointError, InputError
from repvgg_deploy.model.checkpoint.load import build_model, describe_checkpoint, load_checkpoint, write_deploy
from repvgg_deploy.model.network import RepVGG
from repvgg_deploy.specs import codec
from repvgg_deploy.specs.values import Preprocessing
from repvgg_deploy.specs.variants import count_parameters, get_variant
from tests.model.generated import SMALL, SMALL_PLUS, Case, images, load, outputs, random_model, rename, write_case

ROOT = Path(__file__).resolve().parents[3]


def state_of(model: nn.Module) -> OrderedDict[str, torch.Tensor]:
    return OrderedDict((name, tensor.clone()) for name, tensor in model.state_dict().items())


def save(content: object, folder: Path, name: str = "m.pth") -> Path:
    torch.save(content, folder / name)
    return folder / name


class _Node(dict):  # type: ignore[type-arg]
    """As a yacs configuration node: a dict of a class of its own."""


_RAW = random_model(SMALL)
_AVERAGED = random_model(SMALL, seed=1)


def _optimizer() -> object:
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize(
    ("wrap", "expects_averaged"),
    [
        (lambda raw, ema: raw, False),
        (lambda raw, ema: {"state_dict": raw, "epoch": 3, "best_acc1": torch.tensor(71.5)}, False),
        (
            lambda raw, ema: {
                "model": raw,
                "optimizer": _optimizer(),
                "config": _Node(LR=0.1),
                "args": argparse.Namespace(arch="A0"),
            },
            False,
        ),
        (lambda raw, ema: {"model": raw, "ema": ema, "config": _Node(LR=0.1)}, True),
        (lambda raw, ema: {"state_dict": raw, "state_dict_ema": ema}, True),
        (
            lambda raw, ema: {"model": raw, "model_ema": {f"module.{name}": tensor for name, tensor in ema.items()}},
            True,
        ),
        (lambda raw, ema: {"model_ema": {"module": ema}, "model": {"state_dict": raw}}, True),
        (lambda raw, ema: {"model": {"module": {"state_dict": raw}}}, False),
        (lambda raw, ema: {"network_weights": raw, "epoch": 1}, False),
    ],
    ids=["bare", "state_dict", "main.py", "main.py ema", "timm", "ema prefix", "ema nested", "nested", "unknown key"],
)
@pytest.mark.parametrize("modern", [True, False], ids=["zip", "legacy"])
def test_wrapper_is_opened_and_averaged_weights_are_preferred(wrap, expects_averaged, modern, tmp_path):
    path = tmp_path / "m.pth.tar"
    torch.save(wrap(state_of(_RAW), state_of(_AVERAGED)), path, _use_new_zipfile_serialization=modern)
    checkpoint = load(path)
    assert any("EMA" in note for note in checkpoint.notes) == expects_averaged
    assert torch.equal(outputs(build_model(checkpoint)), outputs(_AVERAGED if expects_averaged else _RAW))


def test_pickled_module_is_read_without_its_class(tmp_path):
    checkpoint = load(save({"model": nn.DataParallel(_RAW), "epoch": 1}, tmp_path))
    assert any("pickled module" in note for note in checkpoint.notes)
    assert torch.equal(outputs(build_model(checkpoint)), outputs(_RAW))


def test_incomplete_averaged_weights_are_not_used_and_that_is_said(tmp_path):
    averaged = {name: tensor for name, tensor in state_of(_AVERAGED).items() if "stage2" not in name}
    checkpoint = load(save({"model": state_of(_RAW), "ema": averaged}, tmp_path))
    assert any("were not used" in note and "no tensor of block stage2.0" in note for note in checkpoint.notes)
    assert torch.equal(outputs(build_model(checkpoint)), outputs(_RAW))


def test_checkpoint_says_where_it_comes_from(tmp_path):
    path = save(state_of(_RAW), tmp_path)
    checkpoint = load_checkpoint(str(path))
    assert checkpoint.path == path
    assert checkpoint.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert list(checkpoint.state) == list(_RAW.state_dict())
    assert {tensor.dtype for name, tensor in checkpoint.state.items() if not name.endswith("tracked")} == {
        torch.float32
    }


def test_model_holds_the_checkpoint_tensors_and_no_copies(tmp_path):
    checkpoint = load(save(state_of(_RAW), tmp_path))
    model = build_model(checkpoint)
    assert not model.training
    assert all(tensor.data_ptr() == checkpoint.state[name].data_ptr() for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_output_stride_reaches_the_model(tmp_path):
    model = build_model(load(save(state_of(_RAW), tmp_path)), output_stride=8)
    assert model.stage_outputs(images())["stage4"].shape[2:] == (8, 8)


def test_missing_step_counters_are_filled(tmp_path):
    state = {name: tensor for name, tensor in state_of(_RAW).items() if not name.endswith("num_batches_tracked")}
    assert torch.equal(outputs(build_model(load(save(state, tmp_path)))), outputs(_RAW))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precision_becomes_float32_with_a_note(dtype, tmp_path):
    state = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state_of(_RAW).items()
    }
    checkpoint = load_checkpoint(save(state, tmp_path))
    assert any(str(dtype).removeprefix("torch.") in note for note in checkpoint.notes)
    assert all(
        torch.equal(checkpoint.state[name], tensor.to(torch.float32))
        for name, tensor in state.items()
        if tensor.is_floating_point()
    )


def test_channels_last_weights_are_read(tmp_path):
    state = {
        name: tensor.to(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
        for name, tensor in state_of(_RAW).items()
    }
    checkpoint = load(save(state, tmp_path))
    assert all(tensor.is_contiguous() for tensor in checkpoint.state.values())
    assert torch.equal(outputs(build_model(checkpoint)), outputs(_RAW))


def test_deploy_checkpoint_called_train_is_noted(tmp_path):
    path = save(state_of(random_model(SMALL, "deploy")), tmp_path, "RepVGG-A0-train.pth")
    assert any("already reparameterized" in note for note in load_checkpoint(path).notes)


def _spoiled(**changes: object) -> OrderedDict[str, torch.Tensor]:
    state = state_of(_RAW)
    for name, value in changes.items():
        key = name.replace("__", ".")
        if value is None:
            del state[key]
        else:
            assert isinstance(value, torch.Tensor)
            state[key] = value
    return state


def _with(name: str, value: float) -> torch.Tensor:
    tensor = _RAW.state_dict()[name].clone()
    tensor.view(-1)[1:3] = value
    return tensor


_KERNEL = "stage2.1.rbr_dense.conv.weight"


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (
            _spoiled(**{"stage3.1.rbr_1x1.bn.bias": None}),
            r"1 of \d+ tensors are missing, first stage3\.1\.rbr_1x1\.bn\.bias",
        ),
        (_spoiled(**{_KERNEL: None}), rf"1 of 8 3×3 kernels are missing, first {_KERNEL}"),
        (_spoiled(**{"stage3.2.rbr_identity.weight": None}), r"missing, first stage3\.2\.rbr_identity\.weight"),
        (
            {name: tensor for name, tensor in state_of(_RAW).items() if not name.startswith("stage3.1.")},
            r"no tensor of block stage3\.1",
        ),
        (
            {name: tensor for name, tensor in state_of(_RAW).items() if not name.startswith("stage4.")},
            r"no tensor of block stage4\.0",
        ),
        (
            {name: tensor for name, tensor in state_of(_RAW).items() if not name.startswith("stage0.")},
            r"kernels are missing, first stage0\.",
        ),
        (_spoiled(linear__weight=None), r"linear\.weight is missing"),
        (_spoiled(stage0__rbr_1x1__bn__bias=None), r"missing, first stage0\.rbr_1x1\.bn\.bias"),
        (
            _spoiled(decoder__weight=torch.ones(3)),
            r"1 tensors that a RepVGG of this form does not have: decoder\.weight",
        ),
        (_spoiled(**{"stage2.0.attention.weight": torch.ones(3)}), r"does not have: stage2\.0\.attention\.weight"),
        (
            _spoiled(**{"stage3.0.rbr_1x1.bn.weight": torch.ones(23)}),
            r"stage3\.0\.rbr_1x1\.bn\.weight has the shape \[23\], expected \[24\]",
        ),
        (_spoiled(**{_KERNEL: torch.ones(16, 5, 3, 3)}), r"\[16, 5, 3, 3\], expected .* a divisor of the 16 channels"),
        (_spoiled(**{_KERNEL: torch.ones(16, 16, 5, 5)}), r"\[16, 16, 5, 5\], expected"),
        (_spoiled(linear__weight=torch.ones(7)), r"linear\.weight has the shape \[7\], expected 2 dimensions"),
        (_spoiled(linear__weight=torch.ones(7, 33)), r"linear\.weight has the shape \[7, 33\], expected \[7, 32\]"),
        (
            _spoiled(**{_KERNEL: _with(_KERNEL, float("nan"))}),
            rf"{_KERNEL} has 2 values of \d+ that are NaN or infinite",
        ),
        (_spoiled(linear__bias=_with("linear.bias", float("-inf"))), r"linear\.bias has 2 values of 7 that are NaN"),
        (
            _spoiled(**{"stage1.0.rbr_dense.bn.running_var": _with("stage1.0.rbr_dense.bn.running_var", -0.5)}),
            r"negative variance \(-0\.5\)",
        ),
        (_spoiled(**{_KERNEL: torch.ones(16, 16, 3, 3, dtype=torch.int8)}), r"dtype int8, expected float32"),
        (_spoiled(**{_KERNEL: torch.ones(16, 16, 3, 3, dtype=torch.complex64)}), r"dtype complex64, expected float32"),
        (_spoiled(**{_KERNEL: torch.ones(1, 1, 1, 1).expand(16, 16, 3, 3)}), r"share memory"),
        ({"a": 1, "b": "text"}, r"holds no tensors: it is a dict with a, b"),
        ([1, 2], r"holds no tensors: it is a list"),
        (None, r"holds no tensors: it is a NoneType"),
        ({"weight": torch.ones(3)}, r"is no RepVGG but another network"),
    ],
)
def test_wrong_tensors_are_refused_naming_the_first(state, expected, tmp_path):
    path = save(state, tmp_path)
    with pytest.raises(CheckpointError, match=expected) as caught:
        load_checkpoint(path)
    assert caught.value.message.startswith(f"{path}: ")


def test_half_converted_checkpoint_is_refused_naming_blocks_of_each_form(tmp_path):
    state, deploy = state_of(_RAW), state_of(random_model(SMALL, "deploy"))
    state = OrderedDict((name, tensor) for name, tensor in state.items() if not name.startswith("stage2.1."))
    state.update({name: tensor for name, tensor in deploy.items() if name.startswith("stage2.1.")})
    with pytest.raises(
        CheckpointError, match=r"half converted: stage2\.1 in deploy form.*stage0, stage1\.0.*in training form"
    ):
        load_checkpoint(save(state, tmp_path))


def test_official_file_with_both_forms_in_a_block_is_refused(tmp_path):
    state = state_of(_RAW) | state_of(random_model(SMALL, "deploy"))
    with pytest.raises(CheckpointError, match="half converted"):
        load_checkpoint(save(state, tmp_path))


def test_arch_that_agrees_is_taken_with_its_strides_and_name(tmp_path):
    arch = replace(SMALL, name="mine", strides=(1, 2, 2, 1, 2), num_classes=1000)
    checkpoint = load_checkpoint(save(state_of(random_model(replace(arch, num_classes=7))), tmp_path), arch=arch)
    assert (checkpoint.spec.name, checkpoint.spec.strides, checkpoint.spec.num_classes) == ("mine", (1, 2, 2, 1, 2), 7)


def test_stride_of_one_is_seen_in_an_identity_branch(tmp_path):
    spec = replace(SMALL, widths=(8, 8, 8, 16, 16), strides=(2, 1, 1, 2, 1))
    checkpoint = load_checkpoint(save(state_of(random_model(spec)), tmp_path))
    assert checkpoint.spec.strides == (2, 1, 1, 2, 1)
    assert any("strides" in note for note in checkpoint.notes)


def test_arch_whose_strides_contradict_an_identity_branch_is_refused(tmp_path):
    spec = replace(SMALL, widths=(8, 8, 8, 16, 16), strides=(2, 1, 2, 2, 2))
    path = save(state_of(random_model(spec)), tmp_path)
    with pytest.raises(CheckpointError, match=r"stage1\.0\.rbr_identity\.\w+ is not expected"):
        load_checkpoint(path, arch=replace(spec, strides=(2, 2, 2, 2, 2)))


@pytest.fixture(scope="module")
def a0_file(tmp_path_factory):
    return save(random_model(get_variant("A0", num_classes=3)).state_dict(), tmp_path_factory.mktemp("a0"))


@pytest.mark.parametrize(
    ("arch", "tensor"),
    [
        ("A1", r"stage0\.rbr_dense\.conv\.weight is expected with the shape \[64, 3, 3, 3\], found \[48, 3, 3, 3\]"),
        ("B1g4", r"stage0\.rbr_dense"),
        ("D2se", r"stage0\.rbr_dense"),
    ],
)
def test_wrong_arch_names_the_first_tensor_and_the_variant_that_fits(arch, tensor, a0_file):
    with pytest.raises(CheckpointError, match=tensor) as caught:
        load_checkpoint(a0_file, arch=get_variant(arch))
    assert "the tensors fit A0" in caught.value.message
    assert "--arch A0" in caught.value.remedy


@pytest.mark.parametrize("arch", [None, SMALL])
@pytest.mark.parametrize("channels", [1, 4])
def test_stem_that_does_not_read_rgb_is_refused(channels, arch, tmp_path):
    # 3 is divisible by 1: as three groups of one channel a grayscale network would be exported for RGB, and every gate
    # would pass.
    state = dict(state_of(random_model(SMALL)))
    for name in [name for name in state if name.startswith("stage0.") and name.endswith("conv.weight")]:
        state[name] = state[name][:, [0] * channels].clone()
    with pytest.raises(
        CheckpointError,
        match=rf"stage0\.rbr_dense\.conv\.weight has the shape \[8, {channels}, 3, 3\]: it reads {channels}",
    ) as caught:
        load_checkpoint(save(state, tmp_path), arch=arch)
    assert "export_module" in caught.value.remedy


def test_wrong_arch_of_a_custom_variant_describes_it(tmp_path):
    with pytest.raises(
        CheckpointError,
        match=r"a custom variant \(depths \[1, 2, 3, 1\], widths \[8, 8, 16, 24, 32\], groups up to 2\)",
    ):
        load_checkpoint(save(state_of(_RAW), tmp_path), arch=get_variant("A0"))


_PREPROCESSING = Preprocessing((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), 64, (64, 64))


def _embedded(**changes: object) -> dict[str, object]:
    spec = replace(SMALL, name="sample", strides=(1, 2, 2, 1, 2), bn_eps=1e-3)
    own = {
        "variant": codec.encode(spec),
        "labels": [f"class {i}" for i in range(7)],
        "preprocessing": codec.encode(_PREPROCESSING),
    } | changes
    return {"state_dict": state_of(random_model(spec)), "repvgg_deploy": own}


def test_metadata_of_our_training_script_is_honoured(tmp_path):
    content = _embedded()
    checkpoint = load_checkpoint(save(content, tmp_path))
    assert checkpoint.spec == replace(SMALL, name="sample", strides=(1, 2, 2, 1, 2), bn_eps=1e-3)
    assert checkpoint.labels == tuple(f"class {i}" for i in range(7))
    assert checkpoint.preprocessing == _PREPROCESSING
    assert torch.equal(outputs(build_model(checkpoint)), outputs(random_model(checkpoint.spec)))


def _deep() -> object:
    value: object = 1
    for _ in range(50):
        value = [value]
    return value


def _laughs() -> object:
    value: object = "ha"
    for _ in range(7):
        value = [value] * 100
    return value


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"variant": codec.encode(get_variant("A0"))}, r"states an architecture that its tensors contradict"),
        ({"variant": codec.encode(replace(SMALL, num_classes=8))}, r"states 8 classes"),
        ({"variant": codec.encode(replace(SMALL, block="plain"))}, r"blocks of kind plain"),
        ({"variant": {"name": "x"}}, r"wrong: Embedded\.variant\.depths"),
        ({"labels": ["one"]}, r"names 1 classes, its classifier has 7"),
        ({"labels": 5}, r"wrong: Embedded\.labels"),
        ({"surprise": 1}, r"wrong: Embedded\.surprise"),
        (
            {"preprocessing": {"mean": [0, 0, 0], "std": [0, 1, 1], "resize_short": 1, "crop": [1, 1]}},
            r"standard deviation must be positive",
        ),
        ({"labels": _deep()}, r"nested or shared beyond reason"),
        ({"labels": _laughs()}, r"nested or shared beyond reason"),
    ],
)
def test_metadata_that_is_wrong_is_refused(changes, expected, tmp_path):
    with pytest.raises(CheckpointError, match=expected):
        load_checkpoint(save(_embedded(**changes), tmp_path))


def test_metadata_and_arch_with_other_strides_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"states the strides \[1, 2, 2, 1, 2\]"):
        load_checkpoint(save(_embedded(), tmp_path), arch=SMALL)


class _Runs:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (eval, (f"open({str(self.marker)!r}, 'w').close()",))


def test_refused_checkpoint_that_would_run_code_says_so_beside_what_is_missing(tmp_path):
    state: dict[str, object] = {**state_of(_RAW), "stage0.rbr_dense.conv.weight": _Runs(tmp_path / "ran")}
    message = r"first stage0\.rbr_dense\.conv\.weight; WARNING: .* would reach for builtins\.eval; nothing was called"
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(save(state, tmp_path))
    assert caught.value.remedy.startswith("do not open it elsewhere") and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("modern", [True, False], ids=["zip", "legacy"])
def test_pickle_that_would_run_code_gives_its_tensors_and_runs_nothing(modern, tmp_path):
    path, marker = tmp_path / "m.pth", tmp_path / "ran"
    torch.save({"config": _Runs(marker), "model": state_of(_RAW)}, path, _use_new_zipfile_serialization=modern)
    checkpoint = load(path)
    assert any("WARNING" in note and "builtins.eval" in note for note in checkpoint.notes)
    assert torch.equal(outputs(build_model(checkpoint)), outputs(_RAW))
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # the payload was a live one


def test_state_dict_written_by_pickle_dump_is_refused_naming_the_way(tmp_path):
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(state_of(_RAW)))
    with pytest.raises(CheckpointError, match=r"written by pickle\.dump.*torch\.save"):
        load_checkpoint(tmp_path / "m.pkl")


def test_checkpoint_shows_itself_without_its_weights(tmp_path):
    assert len(repr(load_checkpoint(save(state_of(_RAW), tmp_path)))) < 1000


def test_pickle_that_would_run_code_without_tensors_is_refused(tmp_path):
    marker = tmp_path / "ran"
    (tmp_path / "m.pth").write_bytes(pickle.dumps({"config": _Runs(marker)}))
    with pytest.raises(CheckpointError, match=r"builtins\.eval.*nothing was called"):
        load_checkpoint(tmp_path / "m.pth")
    assert not marker.exists()


def test_module_that_contains_itself_many_times_is_refused(tmp_path):
    root = nn.Module()
    node = root
    for _ in range(40):
        child = nn.Module()
        for name in "abcdefgh":
            node.add_module(name, child)
        node = child
    node.register_buffer("x", torch.ones(1))
    with pytest.raises(CheckpointError, match="nested or shared beyond reason"):
        load_checkpoint(save(root, tmp_path))


def test_write_deploy_writes_the_same_bytes_twice(tmp_path):
    model = random_model(SMALL, "deploy")
    for name in ("a.pth", "b.pth"):
        write_deploy(model, tmp_path / name)
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()
    assert torch.equal(torch.load(tmp_path / "a.pth")["state_dict"]["linear.weight"], model.linear.weight)


def test_write_deploy_of_other_strides_states_them_beside_the_tensors(tmp_path):
    spec = replace(SMALL, strides=(2, 1, 2, 2, 1))
    write_deploy(random_model(spec, "deploy"), tmp_path / "out.pth")
    assert load_checkpoint(tmp_path / "out.pth").spec == spec


def test_write_deploy_of_a_training_form_is_refused(tmp_path):
    with pytest.raises(InputError, match="training form"):
        write_deploy(_RAW, tmp_path / "out.pth")
    assert not list(tmp_path.iterdir())


def test_write_deploy_stores_no_more_than_the_weights(tmp_path):
    model = random_model(SMALL, "deploy")
    big = torch.zeros(1 << 20)
    model.linear.bias = nn.Parameter(big[:7])
    write_deploy(model, tmp_path / "out.pth")
    assert (tmp_path / "out.pth").stat().st_size < 1 << 20


def test_load_deploy_save_again_gives_the_same_bytes(tmp_path):
    write_deploy(random_model(SMALL_PLUS, "deploy"), tmp_path / "a.pth")
    write_deploy(build_model(load(tmp_path / "a.pth")), tmp_path / "b.pth")
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()


def test_really_trained_checkpoint_equals_what_torch_loads(shared_data):
    path = shared_data / "repvgg-a0-imagenette.pth"
    checkpoint = load(path)
    reference = RepVGG(get_variant("A0", num_classes=10)).eval()
    reference.load_state_dict(torch.load(path, weights_only=True))
    assert (checkpoint.spec.name, checkpoint.family, checkpoint.form) == ("A0", "official", "training")
    assert torch.equal(outputs(build_model(checkpoint)), outputs(reference))


def test_really_trained_custom_checkpoint_is_found_with_its_groups(shared_data):
    checkpoint = load_checkpoint(shared_data / "repvgg-a0g4-imagenette-early.pth")
    assert checkpoint.spec.name == "custom"
    assert [index for index, groups in enumerate(checkpoint.spec.groups) if groups == 4] == list(range(2, 21, 2))


_MEASURE = """
import sys, torch, repvgg_deploy.model.network
from repvgg_deploy.model.checkpoint.load import build_model, load_checkpoint

def read_peak():  # not ru_maxrss: a child begins with that of the tests' own process, and would never exceed it
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

before = read_peak()
model = build_model(load_checkpoint(sys.argv[1]))
print(read_peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is on Linux only")
def test_loading_holds_the_weights_once(tmp_path):
    spec = replace(get_variant("A1"), num_classes=10)
    path = write_case(Case("official", spec, "training"), random_model(spec), tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    grown = int(done.stdout) * 1024
    # Once the file's pages, and 24 MB for the interpreter and the modules that load late; a second copy would be
    # another 52 MB.
    assert grown < path.stat().st_size + (24 << 20)


def test_file_object_is_not_needed_after_loading(tmp_path):
    path = save(state_of(_RAW), tmp_path)
    checkpoint = load(path)
    path.unlink()
    assert torch.equal(outputs(build_model(checkpoint)), outputs(_RAW))


def test_timm_state_under_a_bytes_buffer_name_is_not_confused(tmp_path):
    buffer = io.BytesIO()
    torch.save({"state_dict": rename(_RAW.state_dict(), "timm")}, buffer)
    (tmp_path / "no suffix").write_bytes(buffer.getvalue())
    assert load_checkpoint(tmp_path / "no suffix").family == "timm"


def test_description_of_a_published_variant_is_complete(tmp_path):
    spec = get_variant("A0", num_classes=10)
    path = tmp_path / "best model.pth.tar"
    torch.save({"state_dict": random_model(spec).state_dict(), "epoch": 3}, path)
    found = describe_checkpoint(path)
    assert found.loadable
    assert (found.variant, found.family, found.form, found.classes, found.wrapper) == (
        "A0",
        "official",
        "training",
        10,
        "state_dict",
    )
    assert (found.container, found.bytes) == ("torch zip", path.stat().st_size)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.parameters == count_parameters(spec, "training")
    assert found.spec == spec
    assert found.problem is None
    assert found.command is not None
    assert shlex.split(found.command) == [
        "repvgg-export",
        "--ckpt",
        str(path),
        "--out",
        str(tmp_path / "best model.onnx"),
    ]


def test_description_of_a_custom_variant_says_its_shape(tmp_path):
    spec = replace(SMALL, se="after_relu", se_reduction=4)
    found = describe_checkpoint(write_case(Case("repvggplus", spec, "deploy"), random_model(spec, "deploy"), tmp_path))
    assert (
        found.variant
        == "a custom variant (depths [1, 2, 3, 1], widths [8, 8, 16, 24, 32], groups up to 2, SE after relu 1/4)"
    )
    assert found.form == "deploy"
    assert any("strides" in note for note in found.notes)


@pytest.mark.parametrize(
    ("content", "container", "problem"),
    [
        (b"<!doctype html><html></html>", None, "is an HTML or XML page"),
        (
            {"fc.weight": torch.ones(3, 3), "layer1.0.conv1.weight": torch.ones(3, 3, 3, 3)},
            "torch zip",
            "is no RepVGG but a ResNet",
        ),
        ({"stage0.rbr_dense.conv.weight": torch.ones(8, 3, 3, 3)}, "torch zip", "is incomplete"),
        ({"epoch": 3}, "torch zip", "holds no tensors"),
    ],
)
def test_description_of_something_else_says_what_it_is_and_what_to_do(content, container, problem, tmp_path):
    path = tmp_path / "x.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    found = describe_checkpoint(path)
    assert not found.loadable
    assert found.container == container
    assert found.problem is not None
    assert found.problem.startswith(problem)
    assert str(path) not in found.problem
    assert found.remedy
    assert found.command is None
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_description_of_nothing_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        describe_checkpoint(tmp_path / "x.pth")


def test_description_of_the_really_trained_model(shared_data):
    found = describe_checkpoint(shared_data / "repvgg-a0-imagenette.pth")
    assert (found.variant, found.classes, found.form) == ("A0", 10, "training")


_DESCRIBE = """
import sys
sys.modules["torch"] = None  # as if it were not installed
from repvgg_deploy.cli.export import main
sys.exit(main(["--ckpt", sys.argv[1], "--describe", "--json"]))
"""


@pytest.mark.parametrize("suffix", ["pth", "legacy", "safetensors"])
def test_describe_runs_without_torch_and_says_what_it_could_not_look_at(tmp_path, suffix):
    path = tmp_path / f"model.{suffix}"
    if suffix == "safetensors":
        save_file = pytest.importorskip("safetensors.torch").save_file
        save_file({name: tensor.contiguous() for name, tensor in state_of(_RAW).items()}, path)
    else:
        torch.save(state_of(_RAW), path, _use_new_zipfile_serialization=suffix != "legacy")
    done = subprocess.run(
        [sys.executable, "-c", _DESCRIBE, str(path)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    found, known = json.loads(done.stdout), json.loads(codec.dumps(describe_checkpoint(path)))
    *notes, last = found.pop("notes")
    assert "PyTorch is not installed" in last and "pip install '.[export]'" in last
    assert notes == known.pop("notes")
    assert {name: found[name] for name in known} == known
