"""Which weights of a file are taken: found by content; an average before the raw ones; else refused until chosen."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from repvgg_deploy.errors import CheckpointError
from repvgg_deploy.model.checkpoint.load import build_model, describe_checkpoint, load_checkpoint
from tests.model.generated import SMALL, load, outputs, random_model, rename

State = dict[str, Tensor]
RAW, AVERAGED = random_model(SMALL), random_model(SMALL, seed=1)


def state(model: nn.Module, prefix: str = "") -> State:
    return {prefix + name: tensor.clone() for name, tensor in model.state_dict().items()}


def timm(model: nn.Module) -> State:
    return rename(model.state_dict(), "timm")


def parameters_only(model: nn.Module) -> State:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def save(content: object, folder: Path) -> Path:
    torch.save(content, folder / "c.pth")
    return folder / "c.pth"


def averaged_parameters() -> nn.Module:
    """The raw model with averaged parameters: its BatchNorm statistics are its own."""
    model = random_model(SMALL)
    model.load_state_dict(parameters_only(AVERAGED), strict=False)
    return model


COMPLETE: dict[str, tuple[Callable[[], object], str]] = {
    "model + ema_state_dict": (lambda: {"model": state(RAW), "ema_state_dict": state(AVERAGED)}, "model"),
    "swa_state_dict": (lambda: {"state_dict": state(RAW), "swa_state_dict": state(AVERAGED)}, "state_dict"),
    "net + ema_net": (lambda: {"net": state(RAW), "ema_net": state(AVERAGED)}, "net"),
    "weights + best_ema": (lambda: {"weights": state(RAW), "best_ema": {"weights": state(AVERAGED)}}, "weights"),
    "modelEMA": (lambda: {"model": state(RAW), "modelEMA": state(AVERAGED)}, "model"),
    "averaged_model": (lambda: {"model": state(RAW), "averaged_model": state(AVERAGED, "module.")}, "model"),
    "nested": (lambda: {"a": {"b": {"raw": state(RAW), "ema": state(AVERAGED)}}}, "a.b.raw"),
    "in a list": (lambda: {"models": [{"net": state(RAW)}, {"net_ema": state(AVERAGED)}]}, "models.0.net"),
    "swa of torch": (
        lambda: {"model": state(RAW), "swa": AveragedModel(AVERAGED).state_dict()},
        "model",
    ),
    "pickled module": (lambda: {"state_dict": state(RAW), "ema": AVERAGED}, "state_dict"),
    "ema-pytorch": (
        lambda: state(RAW, "online_model.") | state(AVERAGED, "ema_model.") | {"initted": torch.ones(1)},
        "online_model",
    ),
    "beside the root": (lambda: state(RAW) | state(AVERAGED, "ema."), "."),
    "other family": (
        lambda: {"state_dict": timm(RAW), "state_dict_ema": timm(AVERAGED)},
        "state_dict",
    ),
}  # fmt: skip


@pytest.mark.parametrize("make", [make for make, _ in COMPLETE.values()], ids=list(COMPLETE))
def test_average_is_taken_and_what_else_was_there_is_said(make, tmp_path):
    key = next(key for other, key in COMPLETE.values() if other is make)
    path = save(make(), tmp_path)
    checkpoint = load(path)
    assert torch.equal(outputs(build_model(checkpoint)), outputs(AVERAGED))
    assert any("averaged weights" in note for note in checkpoint.notes)
    assert any("not used" in note and f"--weights {key}" in note for note in checkpoint.notes)
    assert checkpoint.others == (key,)
    other = load(path, weights=key)
    assert torch.equal(outputs(build_model(other)), outputs(RAW))
    assert other.weights == key and other.others == (checkpoint.weights,)


def _mmcv(model: nn.Module) -> State:
    return {f"ema_{name.replace('.', '_')}": tensor for name, tensor in parameters_only(model).items()}


def _lit_ema(model: nn.Module) -> State:
    own = {f"model_ema.{name.replace('.', '')}": tensor for name, tensor in parameters_only(model).items()}
    return own | {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(3)}


PARTIAL: dict[str, Callable[[], object]] = {
    "mmcv's buffers": lambda: state(RAW) | _mmcv(AVERAGED),
    "LitEma": lambda: {"state_dict": state(RAW, "model.") | _lit_ema(AVERAGED)},
    "LitEma elsewhere": lambda: {"state_dict": state(RAW), "ema": _lit_ema(AVERAGED)},
    "shadow": lambda: {"model": state(RAW), "ema": {"decay": 0.99, "shadow": parameters_only(AVERAGED), "backup": {}}},
    "shadow_params": lambda: {
        "model": state(RAW),
        "ema": {"num_updates": 3, "shadow_params": list(parameters_only(AVERAGED).values()), "collected_params": None},
    },
    "collected_params": lambda: {
        "model": state(RAW),
        "ema": {
            "shadow_params": list(parameters_only(AVERAGED).values()),
            "collected_params": list(parameters_only(RAW).values()),
        },
    },
}


@pytest.mark.parametrize("make", PARTIAL.values(), ids=list(PARTIAL))
def test_average_of_parameters_takes_the_statistics_of_the_raw_model(make, tmp_path):
    checkpoint = load(save(make(), tmp_path))
    assert torch.equal(outputs(build_model(checkpoint)), outputs(averaged_parameters()))
    assert any("holds parameters only" in note for note in checkpoint.notes)
    raw = load(checkpoint.path, weights=checkpoint.others[0])
    assert torch.equal(outputs(build_model(raw)), outputs(RAW))


@pytest.mark.parametrize("lead", ["ema_", "model_ema."])
def test_average_without_dots_that_holds_statistics_is_taken_with_them(lead: str, tmp_path: Path) -> None:
    between = "_" if lead == "ema_" else ""
    own = {lead + name.replace(".", between): tensor for name, tensor in AVERAGED.state_dict().items()}
    prefix = "" if lead == "ema_" else "model."
    checkpoint = load(save({"state_dict": state(RAW, prefix) | own}, tmp_path))
    assert torch.equal(outputs(build_model(checkpoint)), outputs(AVERAGED))
    assert any("BatchNorm statistics of its own" in note for note in checkpoint.notes)


def test_name_with_a_control_character_is_shown_without_it(tmp_path: Path) -> None:
    named = state(RAW) | {"stage0.rbr_1x1.bn.num_batches_trac\x01ed": torch.tensor(1)}
    with pytest.raises(CheckpointError, match=r"num_batches_trac\?ed") as caught:
        load_checkpoint(save(named, tmp_path), strides=(2, 2, 2, 2, 2), arch=RAW.spec)
    assert caught.value.message.isprintable()


def test_classifier_without_a_bias_gets_zeros_and_it_is_said(tmp_path: Path) -> None:
    bare = state(RAW)
    del bare["linear.bias"]
    checkpoint = load(save(bare, tmp_path))
    assert any("the classifier has no bias" in note for note in checkpoint.notes)
    expected = RAW.state_dict() | {"linear.bias": torch.zeros_like(RAW.state_dict()["linear.bias"])}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in checkpoint.state.items())


REFUSED: dict[str, tuple[Callable[[], object], list[str]]] = {
    "teacher and student": (lambda: {"teacher": state(RAW), "student": state(AVERAGED)}, ["teacher", "student"]),
    "ema teacher": (lambda: {"student": state(RAW), "ema_teacher": state(AVERAGED)}, ["student", "ema_teacher"]),
    "epochs": (lambda: {"epoch_1": state(RAW), "epoch_2": state(AVERAGED)}, ["epoch_1", "epoch_2"]),
    "epochs by number": (lambda: {1: state(RAW), 2: state(AVERAGED)}, ["1", "2"]),
    "list": (lambda: [state(RAW), state(AVERAGED)], ["0", "1"]),
    "last and best": (lambda: {"state_dict": state(RAW), "best_state_dict": state(AVERAGED)}, ["state_dict"]),
    "two plain keys": (lambda: {"model": state(RAW), "state_dict": state(AVERAGED)}, ["model", "state_dict"]),
    "two averages": (lambda: {"ema": state(RAW), "swa": state(AVERAGED)}, ["ema", "swa"]),
    "prefixes": (lambda: state(RAW, "teacher.") | state(AVERAGED, "student."), ["teacher", "student"]),
    "mmcv, perhaps swapped": (
        lambda: {"meta": {"epoch": 3}, "state_dict": state(RAW) | _mmcv(AVERAGED)},
        ["state_dict", "state_dict.ema"],
    ),
}


@pytest.mark.parametrize("make", [make for make, _ in REFUSED.values()], ids=list(REFUSED))
def test_several_sets_of_which_none_is_the_average_of_another_are_refused_until_chosen(make, tmp_path):
    keys = next(keys for other, keys in REFUSED.values() if other is make)
    path = save(make(), tmp_path)
    with pytest.raises(CheckpointError, match=r"holds 2 complete sets of weights") as caught:
        load_checkpoint(path)
    assert all(f"--weights {key}" in caught.value.remedy for key in keys)
    chosen = [load(path, weights=match) for match in re.findall(r"--weights (\S+)", caught.value.remedy)]
    assert len(chosen) == 2
    assert not torch.equal(chosen[0].state["linear.weight"], chosen[1].state["linear.weight"])


def test_mmengine_swaps_the_two_on_saving_and_that_is_known(tmp_path):
    content = {"meta": {}, "state_dict": state(AVERAGED), "ema_state_dict": state(RAW, "module."), "message_hub": {}}
    checkpoint = load(save(content, tmp_path))
    assert torch.equal(outputs(build_model(checkpoint)), outputs(AVERAGED))
    assert checkpoint.weights == "state_dict" and checkpoint.others == ("ema_state_dict",)


def test_one_state_dict_kept_twice_is_no_choice(tmp_path):
    for content in ({"model": state(RAW), "state_dict": state(RAW)}, {"a": RAW.state_dict(), "b": RAW.state_dict()}):
        checkpoint = load(save(content, tmp_path))
        assert torch.equal(outputs(build_model(checkpoint)), outputs(RAW))


def test_what_is_no_state_dict_beside_the_weights_is_no_choice(tmp_path):
    optimizer = torch.optim.AdamW(RAW.parameters())
    gradients = {name: torch.ones_like(tensor) for name, tensor in parameters_only(RAW).items()}
    content = {
        "model": state(RAW),
        "optimizer": optimizer.state_dict(),
        "gradients": gradients,
        "losses": [0.5] * 700_000,
        "fisher": list(gradients.values()),
    }
    checkpoint = load(save(content, tmp_path))
    assert checkpoint.weights == "model" and checkpoint.others == ()
    assert torch.equal(outputs(build_model(checkpoint)), outputs(RAW))


def test_weights_that_are_not_there_name_those_that_are(tmp_path):
    path = save({"model": state(RAW), "ema": state(AVERAGED)}, tmp_path)
    with pytest.raises(CheckpointError, match=r"no models under 'best'; complete are: model, ema"):
        load_checkpoint(path, weights="best")


def test_incomplete_weights_that_are_asked_for_say_what_is_missing(tmp_path):
    broken = {name: tensor for name, tensor in state(AVERAGED).items() if "stage2" not in name}
    path = save({"model": state(RAW), "other": broken}, tmp_path)
    with pytest.raises(CheckpointError, match=r"no tensor of block stage2\.0"):
        load_checkpoint(path, weights="other")


def test_arch_chooses_between_models_of_two_architectures(tmp_path):
    big = random_model(replace(SMALL, widths=(8, 8, 16, 24, 48)))
    path = save({"teacher": state(big), "student": state(RAW)}, tmp_path)
    checkpoint = load_checkpoint(path, arch=SMALL)
    assert checkpoint.weights == "student"
    assert torch.equal(outputs(build_model(checkpoint)), outputs(RAW))


def test_state_dict_in_parts_is_taken_as_one(tmp_path):
    whole = state(RAW)
    parts: dict[str, Any] = {"backbone": {}, "head": {}}
    for name, tensor in whole.items():
        parts["head" if name.startswith("linear") else "backbone"][name] = tensor
    checkpoint = load(save({"state": parts, "epoch": 3}, tmp_path))
    assert torch.equal(outputs(build_model(checkpoint)), outputs(RAW))


def test_list_of_pairs_and_keys_of_bytes_are_read(tmp_path):
    for content in (
        list(state(RAW).items()),
        {name.encode(): tensor for name, tensor in state(RAW).items()},
        [state(RAW)],
    ):
        assert torch.equal(outputs(build_model(load(save(content, tmp_path)))), outputs(RAW))


def test_description_says_which_weights_and_which_others(tmp_path):
    path = save({"model": state(RAW), "model_ema": state(AVERAGED)}, tmp_path)
    found = describe_checkpoint(path)
    assert (found.weights, found.others) == ("model_ema", ("model",))
    assert found.command is not None and "--weights model_ema" in found.command


WRAPPERS: dict[str, Callable[[str], str]] = {
    "compiled block": lambda name: name.replace("stage1.0.", "stage1.0._orig_mod."),
    "compiled stages": lambda name: re.sub(r"^(stage\d)\.", r"\1._orig_mod.", name),
    "checkpointed": lambda name: re.sub(r"\.(\d)\.rbr", r".\1._checkpoint_wrapped_module.rbr", name),
    "fsdp": lambda name: "_fsdp_wrapped_module." + re.sub(r"\.(\d)\.", r".\1._fsdp_wrapped_module.", name),
    "both": lambda name: "_orig_mod.module." + re.sub(r"^(stage[1-4])\.", r"\1.module._orig_mod.", name),
    "convolutions": lambda name: name.replace("rbr_dense.", "rbr_dense.module."),
    "classifier": lambda name: name.replace("linear.", "linear._orig_mod."),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=list(WRAPPERS))
@pytest.mark.parametrize("family", ["official", "timm"])
def test_wrappers_anywhere_in_a_name_are_removed(wrap, family, tmp_path):
    renamed = {wrap(name): tensor for name, tensor in state(RAW).items()}
    if family == "timm":
        renamed = {re.sub(r"^(\w+\.)?stage0", r"\1stem", name): t for name, t in renamed.items()}
        renamed = {wrap(name): tensor for name, tensor in rename(RAW.state_dict(), "timm").items()}
    assert torch.equal(outputs(build_model(load(save(renamed, tmp_path)))), outputs(RAW))
