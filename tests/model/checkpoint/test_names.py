"""Every family in both forms is recognised, and computes what its source computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from repvgg_deploy.errors import CheckpointError, InputError
from repvgg_deploy.model.checkpoint.load import build_model, load_checkpoint, write_deploy
from repvgg_deploy.model.checkpoint.names import translate
from repvgg_deploy.model.checkpoint.structure import expected_shapes, infer_structure
from repvgg_deploy.model.fold import reparameterize
from repvgg_deploy.model.network import RepVGG
from repvgg_deploy.specs.values import VariantSpec
from repvgg_deploy.specs.variants import PUBLISHED, architecture_of, get_variant
from tests.model.checkpoint.own_modules import randomise
from tests.model.generated import (
    CASES,
    SMALL,
    SMALL_PLUS,
    SMALL_SE,
    SQUARE,
    Case,
    family_state,
    load,
    outputs,
    random_model,
    rename,
    write_case,
    write_paddle,
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_family_in_its_own_names_and_container_computes_the_same(case, tmp_path):
    model = random_model(case.spec, case.form)
    checkpoint = load(write_case(case, model, tmp_path))
    assert checkpoint.family == (case.read_as or case.family)
    assert checkpoint.form == case.form
    assert architecture_of(checkpoint.spec) == architecture_of(case.spec)
    assert checkpoint.spec.num_classes == case.spec.num_classes
    assert checkpoint.spec.block == (case.spec.block if case.form == "training" else "repvgg")
    # The same float32 weights in the same modules: the same arithmetic, bit for bit.
    assert torch.equal(outputs(build_model(checkpoint)), outputs(model))


@pytest.mark.parametrize("form", ["training", "deploy"])
def test_published_variant_at_full_size_is_named(form, tmp_path):
    spec = get_variant("A0")
    model = random_model(spec, form)
    checkpoint = load_checkpoint(write_case(Case("official", spec, form), model, tmp_path))
    assert checkpoint.spec == spec
    assert checkpoint.notes == ()
    assert list(checkpoint.state) == list(model.state_dict())
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in checkpoint.state.items())


_FAMILY_OF = {"RepVGGplus-L2pse": ["repvggplus"]}


@pytest.mark.parametrize("form", ["training", "deploy"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_variant_is_inferred_from_its_names_and_shapes(name, form):
    spec = PUBLISHED[name]
    with torch.device("meta"):
        state = RepVGG(spec, form).state_dict()
    for family in _FAMILY_OF.get(name, ["official", "timm", "mmpretrain"]):
        theirs = rename(state, family, half=spec.depths[2] // 2)
        (translation,) = translate(theirs)
        assert translation.family == family
        assert translation.extra == ()
        shapes = {official: tuple(theirs[name].shape) for official, name in translation.names.items()}
        assert shapes == expected_shapes(spec, form)
        found = infer_structure(shapes, split=translation.split)
        assert found.form == form
        assert found.notes == ()
        assert found.spec == (spec if form == "training" else replace(spec, auxiliary_heads=False))


@pytest.mark.parametrize("form", ["training", "deploy"])
@pytest.mark.parametrize("block", ["repvgg", "plain", "qarepvgg_v1", "qarepvgg_v2"])
@pytest.mark.parametrize("given", [SMALL, SMALL_SE, SMALL_PLUS], ids=["small", "se", "plus"])
def test_expected_shapes_are_those_of_the_network_in_its_order(given, block, form):
    spec = replace(given, block=block)
    if form == "training" and spec.se != "none" and block.startswith("qarepvgg"):
        with pytest.raises(CheckpointError, match="no convolution can absorb"):
            expected_shapes(spec, form)
        with pytest.raises(InputError, match="no convolution can absorb"):
            RepVGG(spec, form)
        return
    with torch.device("meta"):
        state = RepVGG(spec, form).state_dict()
    assert list(expected_shapes(spec, form).items()) == [(name, tuple(value.shape)) for name, value in state.items()]


def test_paddle_square_classifier_is_transposed_because_the_family_says_so(tmp_path):
    model = random_model(SQUARE)
    checkpoint = load_checkpoint(write_case(Case("paddleclas", SQUARE, "training", ".pdparams"), model, tmp_path))
    weight = checkpoint.state["linear.weight"]
    assert weight.shape == (32, 32)
    assert torch.equal(weight, model.linear.weight)
    assert not torch.equal(weight, model.linear.weight.t())


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("named", [False, True])
def test_paddle_at_every_protocol_and_with_named_arrays_loads(protocol, named, tmp_path):
    model = random_model(SMALL)
    write_paddle(rename(model.state_dict(), "paddleclas"), tmp_path / "m.pdparams", protocol=protocol, named=named)
    checkpoint = load(tmp_path / "m.pdparams")
    assert checkpoint.family == "paddleclas"
    assert torch.equal(outputs(build_model(checkpoint)), outputs(model))
    assert int(checkpoint.state["stage0.rbr_dense.bn.num_batches_tracked"]) == 0


def test_paddle_folded_kernels_beside_the_branches_are_set_aside(tmp_path):
    model = random_model(SMALL)
    state = rename(model.state_dict(), "paddleclas")
    stale = rename(random_model(SMALL, "deploy", seed=9).state_dict(), "paddleclas")
    state.update({name: tensor for name, tensor in stale.items() if ".rbr_reparam." in name})
    write_paddle(state, tmp_path / "m.pdparams")
    checkpoint = load(tmp_path / "m.pdparams")
    assert checkpoint.form == "training"
    assert any("16 folded tensors" in note for note in checkpoint.notes)
    assert torch.equal(outputs(build_model(checkpoint)), outputs(model))


def test_repvggplus_without_auxiliary_heads_loads_with_a_note(tmp_path):
    model = random_model(SMALL_PLUS)
    state = {
        name: tensor
        for name, tensor in family_state(Case("repvggplus", SMALL_PLUS, "training"), model).items()
        if "_aux" not in name
    }
    torch.save(state, tmp_path / "m.pth")
    checkpoint = load(tmp_path / "m.pth")
    assert not checkpoint.spec.auxiliary_heads
    assert any("auxiliary heads" in note for note in checkpoint.notes)
    assert torch.equal(outputs(build_model(checkpoint)), outputs(model))


def test_repvggplus_with_auxiliary_heads_keeps_them(tmp_path):
    model = random_model(SMALL_PLUS)
    checkpoint = load(write_case(Case("repvggplus", SMALL_PLUS, "training"), model, tmp_path))
    assert checkpoint.spec.auxiliary_heads
    batch = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours, theirs = build_model(checkpoint).forward_with_auxiliary(batch), model.forward_with_auxiliary(batch)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_repvggplus_with_some_auxiliary_heads_is_refused(tmp_path):
    state = family_state(Case("repvggplus", SMALL_PLUS, "training"), random_model(SMALL_PLUS))
    torch.save(
        {name: tensor for name, tensor in state.items() if not name.startswith("stage2_aux")}, tmp_path / "m.pth"
    )
    with pytest.raises(CheckpointError, match="auxiliary heads stage2_aux are missing"):
        load_checkpoint(tmp_path / "m.pth")


def test_repvggplus_deploy_with_auxiliary_heads_left_in_drops_them(tmp_path):
    model = random_model(SMALL_PLUS, "deploy")
    state = rename(model.state_dict(), "repvggplus", half=2)
    training = rename(random_model(SMALL_PLUS).state_dict(), "repvggplus", half=2)
    state.update({name: tensor for name, tensor in training.items() if "_aux" in name})
    torch.save(state, tmp_path / "m.pth")
    checkpoint = load(tmp_path / "m.pth")
    assert any("dropped" in note for note in checkpoint.notes)
    assert torch.equal(outputs(build_model(checkpoint)), outputs(model))


def test_qarepvgg_v2_identity_needs_no_tensors(tmp_path):
    spec = replace(SMALL, block="qarepvgg_v2")
    checkpoint = load_checkpoint(write_case(Case("qarepvgg_v2", spec, "training"), random_model(spec), tmp_path))
    assert not any("rbr_identity" in name for name in checkpoint.state)
    assert checkpoint.spec.layers()[-2].has_identity


class QABlock(nn.Module):
    """A block of QARepVGG: which branches are normalised, and whether the sum is."""

    def __init__(self, ins: int, outs: int, stride: int, kinds: str) -> None:
        super().__init__()
        dense, pointwise, identity, last = tuple(kinds)
        options: dict[str, Any] = {"stride": stride, "bias": False}
        self.rbr_dense = self._branch(nn.Conv2d(ins, outs, 3, padding=1, **options), dense)
        self.rbr_1x1 = self._branch(nn.Conv2d(ins, outs, 1, **options), pointwise)
        kept = ins == outs and stride == 1
        self.rbr_identity = (nn.BatchNorm2d(ins) if identity == "b" else nn.Identity()) if kept else None
        self.bn = nn.BatchNorm2d(outs) if last == "b" else nn.Identity()
        self.nonlinearity = nn.ReLU()

    @staticmethod
    def _branch(conv: nn.Conv2d, kind: str) -> nn.Module:
        if kind == "-":
            return conv
        branch = nn.Sequential()
        branch.add_module("conv", conv)
        branch.add_module("bn", nn.BatchNorm2d(conv.out_channels, affine=kind == "b"))
        return branch

    def forward(self, x: Tensor) -> Tensor:
        y = self.rbr_dense(x) + self.rbr_1x1(x)
        y = y if self.rbr_identity is None else y + self.rbr_identity(x)
        result: Tensor = self.nonlinearity(self.bn(y))
        return result


class QANet(nn.Module):
    """Five blocks and a second one in stage 2."""

    def __init__(self, kinds: str) -> None:
        super().__init__()
        self.stage0 = QABlock(3, 8, 2, kinds)
        self.stage1 = nn.Sequential(QABlock(8, 8, 2, kinds))
        self.stage2 = nn.Sequential(QABlock(8, 16, 2, kinds), QABlock(16, 16, 1, kinds))
        self.stage3 = nn.Sequential(QABlock(16, 16, 2, kinds))
        self.stage4 = nn.Sequential(QABlock(16, 32, 2, kinds))
        self.gap, self.linear = nn.AdaptiveAvgPool2d(1), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        for name in ("stage0", "stage1", "stage2", "stage3", "stage4"):
            x = self.get_submodule(name)(x)
        result: Tensor = self.linear(self.gap(x).flatten(1))
        return result


# 3×3, 1×1, identity, sum: b with BatchNorm, a with one without scale and shift, - without.
_QA = {"plain": "---b", "V2": "b--b", "V3": "-b-b", "V4": "--bb", "V5": "bb-b", "V6": "bb--", "V10": "b---",
       "V14": "-b--", "V15": "ba--", "M3": "b-b-", "V1": "bbbb", "V11": "bbb-"}  # fmt: skip


@pytest.mark.parametrize("pickled", [False, True], ids=["state dict", "module"])
@pytest.mark.parametrize("kinds", _QA.values(), ids=list(_QA))
def test_every_block_of_qarepvgg_computes_what_it_computes_or_is_named(kinds, pickled, tmp_path):
    model = randomise(QANet(kinds))
    torch.save(model if pickled else model.state_dict(), tmp_path / "m.pth")
    if kinds in ("bb-b", "bb--") and not pickled:
        with pytest.raises(CheckpointError, match=r"adds its input as it is \(V5, V6\)"):
            load(tmp_path / "m.pth")
        return
    checkpoint = load(tmp_path / "m.pth")
    assert checkpoint.has_statistics == (kinds in ("b--b", "bbbb", "bbb-"))
    built, wanted = build_model(checkpoint), outputs(model)
    for network in (built, reparameterize(built)):
        assert torch.allclose(outputs(network), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_blocks_that_got_a_batchnorm_again_are_plain_ones(tmp_path):
    # As the original's tools/insert_bn.py writes them.
    model = random_model(replace(SMALL, block="plain"))
    state = {name.replace("rbr_dense.", "rbr_reparam."): tensor for name, tensor in model.state_dict().items()}
    torch.save(state, tmp_path / "m.pth")
    checkpoint = load(tmp_path / "m.pth")
    assert checkpoint.spec.block == "plain" and checkpoint.form == "training"
    assert torch.equal(outputs(build_model(checkpoint)), outputs(model))


def test_mmpretrain_deploy_form_with_se_says_that_it_keeps_it(tmp_path):
    model = random_model(SMALL_SE, "deploy")
    checkpoint = load(write_case(Case("mmpretrain", SMALL_SE, "deploy"), model, tmp_path))
    assert any("SE blocks are kept" in note for note in checkpoint.notes)


def _add_last_bn(state: dict[str, torch.Tensor], spec: VariantSpec) -> None:
    for layer in spec.layers():
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            state[f"{layer.name}.bn.{leaf}"] = torch.ones(layer.out_channels)


@pytest.mark.parametrize("form", ["training", "deploy"])
def test_qarepvgg_with_se_is_refused_with_the_reason(form, tmp_path):
    state = {name: tensor.clone() for name, tensor in random_model(SMALL_SE, form).state_dict().items()}
    _add_last_bn(state, SMALL_SE)
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match="last BatchNorm follows the SE block"):
        load_checkpoint(tmp_path / "m.pth")


def test_qarepvgg_with_se_asked_for_by_arch_is_refused_in_deploy_form(tmp_path):
    torch.save(random_model(SMALL_SE, "deploy").state_dict(), tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match="QARepVGG with SE"):
        load_checkpoint(tmp_path / "m.pth", arch=replace(SMALL_SE, block="qarepvgg_v2"))


def test_qarepvgg_folded_without_dropping_its_last_bn_is_half_converted(tmp_path):
    state = {name: tensor.clone() for name, tensor in random_model(SMALL, "deploy").state_dict().items()}
    _add_last_bn(state, SMALL)
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=r"half converted.*last BatchNorm"):
        load_checkpoint(tmp_path / "m.pth")


def test_repopt_hyper_search_mode_is_refused_with_the_reason(tmp_path):
    state = rename(random_model(replace(SMALL, block="plain")).state_dict(), "repopt")
    state.update({f"{layer.name}.scale_conv.weight": torch.ones(layer.out_channels) for layer in SMALL.layers()})
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match="csla or hyper-search"):
        load_checkpoint(tmp_path / "m.pth")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["conv1.weight", "layer1.0.conv1.weight", "fc.weight"], "a ResNet"),
        (["cls_token", "blocks.0.attn.qkv.weight"], "a vision transformer"),
        (["features.0.weight", "classifier.6.weight"], "a plain VGG"),
        (["backbone.ERBlock_2.0.rbr_dense.conv.weight"], "a bigger network with RepVGG blocks"),
        (["a.weight", "b.weight"], "another network"),
    ],
)
def test_another_network_is_named(names, expected):
    with pytest.raises(CheckpointError, match=expected) as caught:
        translate(dict.fromkeys(names, (1,)))
    assert "stage0.rbr_dense.conv.weight" in caught.value.message


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "module.model.", "model._orig_mod.module.", "net.encoder."]
)
@pytest.mark.parametrize("family", ["official", "timm"])
def test_prefix_on_every_name_is_removed(prefix, family, tmp_path):
    model = random_model(SMALL)
    torch.save(
        {prefix + name: tensor for name, tensor in rename(model.state_dict(), family).items()}, tmp_path / "m.pth"
    )
    checkpoint = load(tmp_path / "m.pth")
    assert any(repr(prefix) in note for note in checkpoint.notes)
    assert torch.equal(outputs(build_model(checkpoint)), outputs(model))


@pytest.mark.parametrize(
    ("backbone", "head"), [("module.backbone.", "module."), ("encoder.", ""), ("a.b.backbone.", "a.")]
)
def test_classifier_beside_its_backbone_is_found(backbone, head, tmp_path):
    model = random_model(SMALL)
    state = {
        (head if name.startswith("linear") else backbone) + name: tensor for name, tensor in model.state_dict().items()
    }
    torch.save(state, tmp_path / "m.pth")
    assert torch.equal(outputs(build_model(load(tmp_path / "m.pth"))), outputs(model))


def test_averaged_copy_under_a_prefix_is_preferred(tmp_path):
    raw, averaged = random_model(SMALL), random_model(SMALL, seed=1)
    state = {f"model.{name}": tensor for name, tensor in raw.state_dict().items()}
    state |= {f"model_ema.module.{name}": tensor for name, tensor in averaged.state_dict().items()} | {
        "model_ema.n_averaged": torch.tensor(3)
    }
    torch.save(state, tmp_path / "m.pth")
    checkpoint = load(tmp_path / "m.pth")
    assert any("EMA" in note for note in checkpoint.notes)
    assert torch.equal(outputs(build_model(checkpoint)), outputs(averaged))


def test_counters_of_a_profiler_beside_the_weights_are_noted_not_refused(tmp_path):
    model = random_model(SMALL)
    state = dict(model.state_dict()) | {"total_ops": torch.zeros(1), "stage0.total_params": torch.zeros(1)}
    torch.save(state, tmp_path / "m.pth")
    checkpoint = load_checkpoint(tmp_path / "m.pth")
    assert any("total_ops" in note for note in checkpoint.notes)


@pytest.mark.parametrize("spec", [SMALL, SMALL_SE, SMALL_PLUS], ids=lambda spec: spec.name)
def test_saved_deploy_checkpoint_has_the_official_names_and_loads_again(spec, tmp_path):
    model = random_model(spec, "deploy")
    write_deploy(model, tmp_path / "deploy.pth")
    family = "repvggplus" if spec is SMALL_PLUS else "official"
    assert list(torch.load(tmp_path / "deploy.pth")["state_dict"]) == list(
        rename(model.state_dict(), family, half=spec.depths[2] // 2)
    )
    checkpoint = load_checkpoint(tmp_path / "deploy.pth")
    assert checkpoint.family == family
    assert torch.equal(outputs(build_model(checkpoint)), outputs(model))


def test_qarepvgg_block_without_its_kernel_is_named_as_incomplete(tmp_path):
    state = random_model(VariantSpec("x", (1, 1, 2, 1), (4, 4, 4, 8, 8), (1,) * 6, num_classes=3)).state_dict()
    bare = {name: tensor for name, tensor in state.items() if ".rbr_identity." not in name}
    for leaf in ("weight", "bias"):  # as in a QARepVGG whose BatchNorms have no scale and shift
        bare = {name: tensor for name, tensor in bare.items() if not name.endswith(f".rbr_1x1.bn.{leaf}")}
    del bare["stage3.1.rbr_dense.conv.weight"]
    torch.save(bare, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=r"1 of 6 3×3 kernels are missing, first stage3\.1\.rbr_dense"):
        load_checkpoint(tmp_path / "m.pth")
