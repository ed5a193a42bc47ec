"""Statistics as Prometheus reads them; the example service's tests show them over HTTP."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest

from repvgg_deploy import Engine
from repvgg_deploy.errors import MissingDependencyError
from repvgg_deploy.runtime.statistics import Statistics
from repvgg_deploy.serving.prometheus import make_collector
from tests.runtime.make_model import ModelOptions, make_onnx, random_batch


def test_numbers_are_the_engines_and_are_asked_for_at_each_scrape_only(tmp_path) -> None:
    client = pytest.importorskip(
        "prometheus_client", reason="prometheus-client, of the extra service, is not installed"
    )
    asked = 0
    registry = client.CollectorRegistry()
    with Engine(make_onnx(tmp_path / "tiny.onnx")) as engine:

        def read() -> Statistics:
            nonlocal asked
            asked += 1
            return engine.statistics()

        registry.register(make_collector("x", read))
        assert asked == 0
        for count in (1, 3):
            engine.infer(random_batch(ModelOptions(), count))
        assert registry.get_sample_value("x_requests_total") == 2
        assert registry.get_sample_value("x_images_total") == 4
        assert registry.get_sample_value("x_batch_images_bucket", {"le": "2"}) == 1
        assert registry.get_sample_value("x_batch_images_sum") == 4
        assert (
            registry.get_sample_value("x_run_seconds_count")
            == registry.get_sample_value("x_run_seconds_bucket", {"le": "+Inf"})
            == 2
        )
        total = registry.get_sample_value("x_run_seconds_sum")
        assert total is not None and np.isclose(total, engine.statistics().run_ms.total_ms / 1e3)
        assert asked > 0


def test_every_text_is_a_sentence(tmp_path) -> None:
    client = pytest.importorskip(
        "prometheus_client", reason="prometheus-client, of the extra service, is not installed"
    )
    registry = client.CollectorRegistry()
    with Engine(make_onnx(tmp_path / "tiny.onnx")) as engine:
        registry.register(make_collector("x", engine.statistics))
        families = list(registry.collect())
    assert len(families) == 10
    for family in families:
        assert re.fullmatch(r"[A-Z][a-z][^:]+", family.documentation), family
        assert not any(sample.name.endswith("_created") for sample in family.samples)


def test_missing_client_is_said_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client.registry", None)
    with pytest.raises(MissingDependencyError, match="prometheus-client is not installed") as missing:
        make_collector("x", lambda: pytest.fail("nothing is to be read"))
    assert "'.[service]'" in missing.value.remedy
