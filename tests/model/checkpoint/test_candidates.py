"""Weights that a file keeps as parts are whole, and give what their module computes."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from repvgg_deploy.errors import CheckpointError
from repvgg_deploy.model.checkpoint.candidates import fold_parts
from repvgg_deploy.model.checkpoint.lazy import FLOAT32, LazyTensor
from repvgg_deploy.model.checkpoint.load import build_model, load_checkpoint
from tests.model.checkpoint.own_modules import OwnRepVGG, randomise
from tests.model.generated import load, outputs


def _prune(conv: nn.Conv2d) -> None:
    prune.l1_unstructured(conv, "weight", 0.5)


def _prune_channels(conv: nn.Conv2d) -> None:
    prune.ln_structured(conv, "weight", 0.5, n=2, dim=0)


def _old_weight_norm(conv: nn.Conv2d) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.nn.utils.weight_norm(conv)
    conv.weight_g.data *= 1.5  # type: ignore[operator, assignment]


def _weight_norm(conv: nn.Conv2d) -> None:
    parametrizations.weight_norm(conv)
    conv.parametrizations.weight.original0.data *= 1.5  # type: ignore[union-attr]


def _old_spectral_norm(conv: nn.Conv2d) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.nn.utils.spectral_norm(conv)
    conv(torch.randn(1, conv.in_channels, 8, 8))


def _spectral_norm(conv: nn.Conv2d) -> None:
    parametrizations.spectral_norm(conv)
    conv(torch.randn(1, conv.in_channels, 8, 8))


@pytest.mark.parametrize("pickled", [False, True], ids=["state dict", "module"])
@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (_prune, "pruned"),
        (_prune_channels, "pruned"),
        (_old_weight_norm, "weight-normed"),
        (_weight_norm, "weight-normed"),
        (_old_spectral_norm, "spectrally normed"),
        (_spectral_norm, "spectrally normed"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_in_parts_are_folded(change, kind, pickled, tmp_path):
    model = randomise(OwnRepVGG())
    for name in ("stage0.rbr_dense.conv", "stage2.1.rbr_1x1.conv", "stage4.0.rbr_dense.conv"):
        change(model.get_submodule(name))
    wanted = outputs(model.eval())
    if pickled and change in (_weight_norm, _spectral_norm):
        pytest.skip("torch refuses to pickle its parametrized modules")
    torch.save(model if pickled else model.state_dict(), tmp_path / "m.pth")
    checkpoint = load(tmp_path / "m.pth")
    assert any(f"3 {kind} weights were folded" in note for note in checkpoint.notes)
    # The folding is rounded once, in another order of operations.
    assert torch.allclose(outputs(build_model(checkpoint)), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("stage0.rbr_dense.conv.weight", {"_mask": (8, 3, 3, 2)}),
        ("stage0.rbr_dense.conv.weight", {"_mask": (50, 1, 1, 1, 1)}),  # whose product is fifty times as large
        ("stage0.rbr_dense.bn.weight", {"_u": (8,), "_v": (1,)}),
        ("stage0.rbr_dense.conv.weight", {"_u": (8,), "_v": (26,)}),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(name, parts, tmp_path):
    state = randomise(OwnRepVGG()).state_dict()
    state[f"{name}_orig"] = state.pop(name)
    state |= {f"{name}{ending}": torch.ones(shape) for ending, shape in parts.items()}
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match="parts of a weight do not fit together"):
        load_checkpoint(tmp_path / "m.pth")


def test_looking_for_parts_goes_through_the_names_once():
    class Counted(dict[str, LazyTensor]):
        def __iter__(self):
            walks.append(self)
            return super().__iter__()

    walks: list[object] = []
    tensor = LazyTensor(FLOAT32, (3,), object(), 12, lambda: torch.ones(3))
    names = [f"{i}.weight{end}" for i in range(50) for end in ("_orig", "_mask", "_g", "_v")]
    folded, notes = fold_parts(Counted(dict.fromkeys(names, tensor)))
    assert (len(folded), len(notes)) == (50, 2) and len(walks) <= 1


def test_part_without_its_other_part_stays_as_it_is():
    tensor = LazyTensor(FLOAT32, (3,), object(), 12, lambda: torch.ones(3))
    assert fold_parts({"a.weight_orig": tensor, "b.weight_mask": tensor}) == (
        {"a.weight_orig": tensor, "b.weight_mask": tensor},
        (),
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("linear.", "linear.1."),
        ("linear.", "classifier."),
        ("linear.", "head.fc.2."),
        ("linear.", "module.fc._orig_mod."),
    ],
)
def test_classifier_under_another_name_is_taken_where_exactly_one_fits(old, new, tmp_path):
    model = randomise(OwnRepVGG())
    torch.save({name.replace(old, new): tensor for name, tensor in model.state_dict().items()}, tmp_path / "m.pth")
    checkpoint = load(tmp_path / "m.pth")
    assert any("the classifier is" in note for note in checkpoint.notes)
    assert torch.allclose(outputs(build_model(checkpoint)), outputs(model), rtol=1e-4)


def test_classifier_that_is_a_convolution_is_the_same_matrix(tmp_path):
    model = randomise(OwnRepVGG())
    state = model.state_dict()
    state["fc.weight"] = state.pop("linear.weight")[:, :, None, None]
    state["fc.bias"] = state.pop("linear.bias")
    torch.save(state, tmp_path / "m.pth")
    assert torch.allclose(outputs(build_model(load(tmp_path / "m.pth"))), outputs(model), rtol=1e-4)


def test_two_classifiers_that_fit_are_refused_naming_both(tmp_path):
    state = randomise(OwnRepVGG()).state_dict()
    state |= {"coarse.weight": torch.ones(3, 32), "coarse.bias": torch.ones(3)}
    state |= {"fine.weight": state.pop("linear.weight"), "fine.bias": state.pop("linear.bias")}
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match="has 2 classifiers that fit its last layer, expected one: coarse, fine"):
        load_checkpoint(tmp_path / "m.pth")


def test_classifier_of_two_layers_is_refused(tmp_path):
    state = randomise(OwnRepVGG()).state_dict()
    head = {"head.2.weight": torch.ones(5, 16), "head.2.bias": torch.ones(5)}
    head |= {"head.0.weight": torch.ones(16, 32), "head.0.bias": torch.ones(16)}
    torch.save({k: v for k, v in state.items() if "linear" not in k} | head, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=r"does not have: head\.2\.weight, head\.2\.bias"):
        load_checkpoint(tmp_path / "m.pth")


def test_backbone_without_classifier_loads_and_says_so(tmp_path):
    state = {name: tensor for name, tensor in randomise(OwnRepVGG()).state_dict().items() if "linear" not in name}
    torch.save(state, tmp_path / "m.pth")
    checkpoint = load(tmp_path / "m.pth")
    assert checkpoint.headless and any("no classifier" in note for note in checkpoint.notes)
