"""docker/prometheus/alerts.yml: promtool plays what makes each alert go off, and what does not."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("yaml", reason="PyYAML, of the extra dev, is not installed")

import yaml

from examples.service.settings import Settings
from repvgg_deploy.serving import config
from repvgg_deploy.serving.options import RepositoryOptions
from tests.docker.dashboard import METRIC, NAMES, metric_names
from tests.docker.prometheus import find_prometheus

ALERTS = Path(__file__).resolve().parents[2] / "docker/prometheus/alerts.yml"
GROUPS = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
RULES: dict[str, dict[str, Any]] = {rule["alert"]: rule for group in GROUPS for rule in group["rules"]}
SERVICE, TRITON = 'job="service",instance="a"', 'job="triton",instance="b"'
MODEL = f'{TRITON},model="b2"'
BUCKET = f"repvgg_batcher_queue_seconds_bucket{{{SERVICE}"
REQUESTS = f'repvgg_http_requests_total{{{SERVICE},route="/predict",status'
# One value a minute. What a server shows that is well, close below each limit.
CALM = {
    f"up{{{SERVICE}}}": "1x30",
    f"up{{{TRITON}}}": "1x30",
    f"repvgg_ready{{{SERVICE}}}": "1x10 0 1x19",
    f'{BUCKET},le="0.8192"}}': "0+985x30",
    f'{BUCKET},le="1.6384"}}': "0+992x30",
    f'{BUCKET},le="+Inf"}}': "0+992x30",
    f'{REQUESTS}="200"}}': "0+992x30",
    f'{REQUESTS}="400"}}': "0+500x30",
    f'{REQUESTS}="503"}}': "0+4x30",
    f'{REQUESTS}="504"}}': "0+4x30",
    f"repvgg_batcher_failures_total{{{SERVICE}}}": "7x30",
    f"repvgg_http_buffered_bytes{{{SERVICE}}}": "420000000x30",
    f'nv_inference_request_failure{{{MODEL},reason="OTHER"}}': "3x30",
    f'nv_inference_request_failure{{{MODEL},reason="REJECTED"}}': "3x30",
    f"nv_inference_request_success{{{MODEL}}}": "0+100x30",
    f"nv_inference_queue_duration_us{{{MODEL}}}": "0+49000000x30",
    f"nv_inference_pending_request_count{{{MODEL}}}": "230x30",
}
# What is different, the labels of the alert besides its severity, and what it says.
LOUD: dict[str, tuple[dict[str, str], str, str]] = {
    "ServerDown": ({f"up{{{TRITON}}}": "1x20 0x9"}, TRITON, "triton b does not answer Prometheus"),
    "ServerGone": ({f"up{{{SERVICE}}}": "1x20 stale"}, 'job="service"', "the last service has gone"),
    "ServiceNotReady": ({f"repvgg_ready{{{SERVICE}}}": "1x20 0x9"}, SERVICE, "a runs and is not ready"),
    "ServiceQueueSlow": (
        {f'{BUCKET},le="0.8192"}}': "0+900x30", f'{BUCKET},le="1.6384"}}': "0+992x30"},
        'job="service"',
        "1 % of requests wait 1.55s or longer in the queue",
    ),
    "ServiceRefuses": (
        {f'{REQUESTS}="503"}}': "0+34x30", f'{REQUESTS}="504"}}': "0+30x30", f'{REQUESTS}="200"}}': "0+1036x30"},
        'job="service"',
        "4% of requests are refused or too late",
    ),
    "ServiceFails": (
        {f"repvgg_batcher_failures_total{{{SERVICE}}}": "0+120x30"},
        'job="service"',
        "the model fails, 2 times a second",
    ),
    "ServiceBodiesFillMemory": (
        {f"repvgg_http_buffered_bytes{{{SERVICE}}}": f"{512 << 20}x30"},
        SERVICE,
        "bodies of requests take 512MiB on a",
    ),
    "TritonFails": (
        {f'nv_inference_request_failure{{{MODEL},reason="BACKEND"}}': "0+120x30"},
        'job="triton",model="b2"',
        "b2 fails, 2 times a second",
    ),
    "TritonQueueSlow": (
        {f"nv_inference_queue_duration_us{{{MODEL}}}": "0+60000000x30"},
        'job="triton",model="b2"',
        "requests wait 600k µs for b2, in the mean",
    ),
    "TritonRejects": (
        {f'nv_inference_request_failure{{{MODEL},reason="REJECTED"}}': "0+60x30"},
        'job="triton",model="b2"',
        "b2 refuses 1 requests a second that waited too long",
    ),
    "TritonQueueFull": (
        {f"nv_inference_pending_request_count{{{MODEL}}}": "256x30"},
        MODEL,
        "256 requests wait for b2 on b",
    ),
}


@pytest.mark.slow
def test_each_alert_goes_off_when_it_should_and_only_then(tmp_path: Path) -> None:
    promtool = find_prometheus("promtool")
    if promtool is None:
        pytest.skip("no promtool on PATH, and Debian's package cannot be had")
    assert set(LOUD) == set(RULES)
    tests = [play("all is well", {}, {})]
    for alert, (different, labels, summary) in LOUD.items():
        found = {**dict(re.findall(r'(\w+)="([^"]*)"', labels)), **RULES[alert]["labels"]}
        said = {"summary": summary, "description": RULES[alert]["annotations"]["description"]}
        tests.append(play(alert, different, {alert: [{"exp_labels": found, "exp_annotations": said}]}))
    path = tmp_path / "tests.json"  # which is YAML, too
    path.write_text(json.dumps({"rule_files": [str(ALERTS)], "tests": tests}), encoding="utf-8")
    done = subprocess.run([promtool, "test", "rules", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def play(name: str, different: dict[str, str], expected: dict[str, Any]) -> dict[str, Any]:
    """A test of promtool: half an hour, at whose end these alerts have gone off and no others."""
    series = [{"series": series, "values": values} for series, values in {**CALM, **different}.items()]
    checks = [{"eval_time": "29m", "alertname": alert, "exp_alerts": expected.get(alert, [])} for alert in RULES]
    return {"name": name, "interval": "1m", "input_series": series, "alert_rule_test": checks}


def test_numbers_of_the_alerts_are_those_of_the_settings() -> None:
    settings, options = Settings("x.onnx"), RepositoryOptions()
    assert number("ServiceQueueSlow", r"> (\d+)$") == settings.timeout_ms / 1e3 / 2
    assert number("ServiceBodiesFillMemory", r"\* (\d+)$") == settings.max_buffered_bytes
    assert number("TritonQueueSlow", r"> (\d+)$") == options.queue_timeout_us / 2
    assert number("TritonQueueFull", r"\* (\d+)$") == 8 * config._ONNX_MAX_BATCH
    assert RULES["ServiceNotReady"]["for"] == "2m"
    assert settings.grace_seconds + settings.drain_seconds + 5 < 120


def number(alert: str, pattern: str) -> float:
    found = re.search(pattern, RULES[alert]["expr"])
    assert found is not None
    return float(found[1])


def test_alerts_ask_for_what_the_dashboards_show() -> None:
    asked = {name for rule in RULES.values() for name in METRIC.findall(rule["expr"])}
    assert asked - {"up"} <= {name for dashboard in NAMES for name in metric_names(dashboard)}
    assert all(set(rule["annotations"]) == {"summary", "description"} for rule in RULES.values())
