from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn

from repvgg_deploy.errors import ParityError
from repvgg_deploy.images.decode import default_preprocessing
from repvgg_deploy.images.drawn import make_batches
from repvgg_deploy.model import parity
from repvgg_deploy.model.fold import reparameterize
from repvgg_deploy.model.network import RepVGG
from repvgg_deploy.model.parity import FormReport, _keep_stable, compare_forms, reference_of_deploy
from repvgg_deploy.model.tolerance import require_passed
from tests.model.random_blocks import randomise, small_variant

BATCHES = {batch.name: batch.array for batch in make_batches(default_preprocessing(64, 64), [(64, 64), (33, 47)])}


def build(**changes: object) -> RepVGG:
    torch.manual_seed(0)
    model = RepVGG(small_variant(**changes))  # type: ignore[arg-type]
    randomise(model)
    return model.eval()


def run(model: RepVGG, deploy: RepVGG) -> FormReport:
    return compare_forms(model, deploy, BATCHES, small=list(BATCHES))


def expect_failure(model: RepVGG, deploy: RepVGG, where: str) -> None:
    """The gate closes, and a comparison of the part that was changed is among those that failed."""
    report = run(model, deploy)
    assert any(not check.passed and re.search(where, check.name) for check in report.checks), where
    with pytest.raises(ParityError, match="comparisons failed"):
        require_passed(report.checks, "deploy form")


@pytest.mark.parametrize(
    "changes", [{}, {"se": "before_relu"}, {"se": "after_relu"}, {"kind": "qarepvgg_v2"}, {"kind": "plain"}]
)
def test_compare_forms_faithful_conversion_passes(changes: dict[str, object]) -> None:
    model = build(**changes)
    report = run(model, reparameterize(model))
    require_passed(report.checks, "deploy form")
    names = " ".join(check.name for check in report.checks)
    for what in (
        "convolution stage0, float64",
        "block stage4.0, float32",
        "network, float64, borders",
        "network, float32, large constant",
    ):
        assert what in names
    assert 0 < report.training_error < 1e-5
    assert set(report.references) == set(BATCHES)


def with_eps(model: RepVGG, eps: float, where: str) -> RepVGG:
    wrong = copy.deepcopy(model)
    for name, module in wrong.named_modules():
        if isinstance(module, nn.BatchNorm2d) and where in name:
            module.eps = eps
    return reparameterize(wrong)


@pytest.mark.parametrize("where", ["", "stage3.2.rbr_1x1"])
def test_compare_forms_wrong_eps_is_caught(where: str) -> None:
    model = build()
    # 1e-3 is TensorFlow's default; in one branch of one block it moves the kernel by less than a thousandth.
    expect_failure(model, with_eps(model, 1e-3, where), where.rpartition(".")[0] or "convolution stage0")


def test_compare_forms_dropped_se_is_caught() -> None:
    model = build(se="before_relu")
    deploy = reparameterize(model)
    deploy.blocks()["stage2.1"].se = nn.Identity()
    with pytest.raises((ParityError, RuntimeError)):
        require_passed(run(model, deploy).checks, "deploy form")


def test_compare_forms_shifted_group_index_is_caught() -> None:
    model = build()
    deploy = reparameterize(model)
    block = deploy.get_submodule("stage2.0.rbr_reparam")
    assert isinstance(block, nn.Conv2d) and block.groups == 2
    with torch.no_grad():
        block.weight.copy_(block.weight.roll(1, dims=1))
    expect_failure(model, deploy, "stage2.0")


def test_compare_forms_unreparameterized_block_is_caught() -> None:
    model = build()
    deploy = reparameterize(model)
    stage = deploy.get_submodule("stage3")
    assert isinstance(stage, nn.Sequential)
    stage[1] = model.blocks()["stage3.1"]
    with pytest.raises(ParityError, match=r"block stage3\.1: expected"):
        run(model, deploy)


def test_compare_forms_an_epsilon_of_each_layer_is_compared_as_it_is() -> None:
    model = build()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for index, norm in enumerate(norms):
        norm.eps = (1e-5, 1e-3, 0.1)[index % 3]
    report = run(model, reparameterize(model))
    require_passed(report.checks, "deploy form")
    assert 0 < report.training_error < 1e-5


@pytest.mark.parametrize("name", ["stage0", "stage4.0"])
def test_compare_forms_one_changed_weight_is_caught(name: str) -> None:
    model = build()
    deploy = reparameterize(model)
    block = deploy.get_submodule(f"{name}.rbr_reparam")
    assert isinstance(block, nn.Conv2d)
    with torch.no_grad():
        block.weight[0, 0, 1, 1] += 1e-3 * block.weight.abs().max()
    expect_failure(model, deploy, name)


def test_compare_forms_changed_classifier_is_caught() -> None:
    model = build()
    deploy = reparameterize(model)
    with torch.no_grad():
        deploy.linear.weight *= 1.0001  # type: ignore[operator]
    expect_failure(model, deploy, "network, float32")


def test_compare_forms_nan_in_the_network_is_refused() -> None:
    model = build()
    deploy = reparameterize(model)
    with torch.no_grad():
        deploy.linear.bias[0] = float("nan")  # type: ignore[index]
    with pytest.raises(ParityError, match="NaN or infinity"):
        run(model, deploy)


def test_compare_forms_dead_network_is_refused() -> None:
    model = build()
    with torch.no_grad():
        model.linear.weight.zero_()  # type: ignore[operator]
    with pytest.raises(ParityError, match="does not depend on its input"):
        run(model, reparameterize(model))


def test_keep_stable_leaves_out_a_stress_batch_and_refuses_images() -> None:
    good, bad = np.ones((1, 2), np.float32), np.full((1, 2), 1.01, np.float32)
    truth = {"image-like 8×8": np.ones((1, 2)), "large constant 8×8": np.ones((1, 2))}
    references = {
        "image-like 8×8": {"logits": good},
        "large constant 8×8": {"logits": bad},
        "large constant 64×64": {"logits": good},
    }
    kept, error = _keep_stable(references, truth)
    assert list(kept) == ["image-like 8×8"]
    assert error == 0.0
    with pytest.raises(ParityError, match="numerically unstable"):
        _keep_stable({**references, "image-like 8×8": {"logits": bad}}, truth)


def require_same_rows(found: np.ndarray, expected: torch.Tensor) -> None:
    """Images that run together have other sums than alone: float32 errors, of the size of the largest value.

    Rows of another batch differ by as much as the values themselves.
    """
    rows = expected.detach().numpy()
    np.testing.assert_allclose(found, rows, rtol=0, atol=1e-4 * np.abs(rows).max())


def test_reference_of_deploy_gives_references_and_no_checks() -> None:
    model = build()
    deploy = reparameterize(model)
    report = reference_of_deploy(deploy, BATCHES, small=list(BATCHES))
    assert report.checks == ()
    with torch.no_grad():
        for name, array in BATCHES.items():
            require_same_rows(report.references[name]["logits"], deploy(torch.from_numpy(array)))


def test_compare_forms_runs_images_of_one_size_together_and_gives_each_batch_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build()
    deploy = reparameterize(model)
    ran: list[tuple[int, ...]] = []
    model.stage0.register_forward_hook(lambda module, inputs, output: ran.append(tuple(inputs[0].shape)))
    report = run(model, deploy)
    assert sorted(ran) == [(4, 3, 33, 47), (4, 3, 64, 64)]
    for name, array in BATCHES.items():
        alone = model.stage_outputs(torch.from_numpy(array))
        for stage, found in report.references[name].items():
            expected = alone[stage] if stage != "logits" else model.classify(alone["stage4"])
            require_same_rows(found, expected)
    ran.clear()
    monkeypatch.setattr(parity, "_MOST_PIXELS", 4 * 33 * 47)
    run(model, deploy)
    assert sorted(ran) == [(1, 3, 64, 64), (1, 3, 64, 64), (2, 3, 64, 64), (4, 3, 33, 47)]
