"""What the Grafana dashboards ask Prometheus."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "docker/grafana/dashboards"
NAMES = ("repvgg", "service")
# Only a server with a GPU has these. Source:
# https://github.com/triton-inference-server/server/blob/main/docs/user_guide/metrics.md
GPU_METRICS = {
    "nv_gpu_utilization",
    "nv_gpu_memory_used_bytes",
    "nv_gpu_memory_total_bytes",
    "nv_gpu_power_usage",
    "nv_gpu_power_limit",
}
METRIC = re.compile(r"\b(?:nv_\w+|repvgg_\w+|process_\w+|up)\b(?!\")")


def read_dashboard(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return found


def panels(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_dashboard(name)["panels"]
    return found


def expressions(name: str) -> dict[str, str]:
    """By panel (a second target has its letter behind the title), with Grafana's variables as it fills them in."""
    found = {
        f"{panel['title']} {target['refId']}": target["expr"] for panel in panels(name) for target in panel["targets"]
    }
    return {
        title: expression.replace("$model", ".*").replace("$__rate_interval", "20s")
        for title, expression in found.items()
    }


def metric_names(name: str) -> set[str]:
    """The metrics that are asked for, also by variables."""
    variables = [variable["definition"] for variable in read_dashboard(name)["templating"]["list"]]
    return set(METRIC.findall(" ".join([*expressions(name).values(), *variables])))
