"""docker/compose.yaml as Docker Compose itself reads it, and what Prometheus and Grafana are given."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from repvgg_deploy.runtime.statistics import Recorder
from tests.docker.compose_network import SERVERS
from tests.docker.dashboard import FOLDER as DASHBOARDS
from tests.docker.dashboard import GPU_METRICS, NAMES, expressions, metric_names, panels, read_dashboard
from tests.docker.prometheus import find_prometheus

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docker"


def read_compose(*files: str, **environment: str) -> dict[str, Any]:
    """What Compose makes of the files: validated, defaults and variables filled in."""
    program = shutil.which("docker-compose", path=str(Path(sys.executable).parent)) or shutil.which("docker-compose")
    if program is None:
        pytest.skip("docker-compose is not installed: the extra dev brings it on Linux x86-64")
    names = [word for file in files or ("compose.yaml",) for word in ("-f", str(FOLDER / file))]
    command = [program, *names, "--profile", "*", "config", "--format", "json"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={"PATH": "/usr/bin:/bin", "HOME": "/", **environment},
    )
    assert done.returncode == 0, done.stderr
    assert "variable is not set" not in done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = read_compose()["services"]
    return found


def test_compose_starts_triton_prometheus_and_grafana_and_the_service_when_it_is_asked_for(
    services: dict[str, Any],
) -> None:
    assert {name: service.get("profiles") for name, service in services.items()} == {
        "triton": None, "prometheus": None, "grafana": None, "service": ["service"],
    }  # fmt: skip


def test_images_from_elsewhere_are_pinned(services: dict[str, Any]) -> None:
    images = {name: service["image"] for name, service in services.items() if "build" not in service}
    assert set(images) == {"prometheus", "grafana"}
    assert all(re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", image) for image in images.values())


@pytest.mark.parametrize("name", ["triton", "service"])
def test_server_has_the_gpus_the_folders_and_time_to_end(name: str, services: dict[str, Any]) -> None:
    triton = services[name]
    assert triton["deploy"]["resources"]["reservations"]["devices"] == [
        {"capabilities": ["gpu"], "driver": "nvidia", "count": -1}
    ]
    volumes = {volume["target"]: volume for volume in triton["volumes"]}
    assert volumes["/models"]["source"] == str(ROOT / "models/onnx")
    assert volumes["/models"]["read_only"] is True
    assert volumes["/models"]["bind"]["create_host_path"] is False  # Docker would make it, as root's and empty
    assert volumes["/engines"]["source"] == str(ROOT / "engines")
    assert not volumes["/engines"].get("read_only")
    assert triton["user"] == "1000:1000"
    assert triton["init"] is True
    # Longer than Triton's --exit-timeout-secs, and than the service's REPVGG_GRACE_SECONDS and REPVGG_DRAIN_SECONDS.
    assert int(triton["stop_grace_period"].removesuffix("s")) > 30
    assert "--exit-timeout-secs=30" in (FOLDER / "triton.Dockerfile").read_text(encoding="utf-8")


def test_folder_of_the_engines_is_in_a_fresh_clone() -> None:
    """Else Docker makes it, as root's, and the container's user cannot write to it."""
    assert (ROOT / "engines" / "README.md").exists()


def test_every_service_is_restarted_confined_and_published_for_this_machine_only(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service["restart"] == "unless-stopped", name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert {port["host_ip"] for port in service["ports"]} == {"127.0.0.1"}, name
        assert not service.get("privileged"), name


def test_every_service_has_a_healthcheck(services: dict[str, Any]) -> None:
    assert all("test" in services[name]["healthcheck"] for name in ("prometheus", "grafana", "service"))
    assert "HEALTHCHECK" in (ROOT / services["triton"]["build"]["dockerfile"]).read_text(encoding="utf-8")


def test_without_a_gpu_the_onnx_is_served_and_no_gpu_is_asked_for() -> None:
    triton = read_compose("compose.yaml", "compose.cpu.yaml")["services"]["triton"]
    assert "deploy" not in triton
    assert triton["environment"]["REPVGG_SERVE"] == "onnx"
    assert triton["environment"]["REPVGG_TRITON"] == "--ensemble jpeg"


def test_variables_of_the_user_reach_the_services() -> None:
    given = {
        "MODELS": "/srv/models", "ENGINES": "/srv/engines", "USER_ID": "1234", "GROUP_ID": "55", "ADDRESS": "0.0.0.0",
        "TRITON_OPTIONS": "", "BUILD_OPTIONS": "--max-batch 64", "TRITON_RELEASE": "24.12",
        "TENSORRT_VERSION": "10.7.0", "CUDA_MAJOR": "12",
    }  # fmt: skip
    triton = read_compose(**given)["services"]["triton"]
    assert [volume["source"] for volume in triton["volumes"]] == ["/srv/models", "/srv/engines"]
    assert triton["user"] == "1234:55"
    assert {port["host_ip"] for port in triton["ports"]} == {"0.0.0.0"}
    assert triton["environment"] == {"REPVGG_BUILD": "--max-batch 64", "REPVGG_TRITON": ""}
    assert triton["build"]["args"] == {"TRITON_RELEASE": "24.12", "TENSORRT_VERSION": "10.7.0", "CUDA_MAJOR": "12"}


def test_settings_of_the_services_are_those_of_first_start(services: dict[str, Any]) -> None:
    known = {
        *re.findall(r"REPVGG_[A-Z]+", (FOLDER / "first_start.py").read_text(encoding="utf-8")),
        "REPVGG_LISTEN",
    }  # the service's own
    used = {
        name
        for service in ("triton", "service")
        for name in services[service]["environment"]
        if name.startswith("REPVGG_")
    }
    for path in FOLDER.glob("*.Dockerfile"):
        used |= set(re.findall(r"REPVGG_[A-Z]+", path.read_text(encoding="utf-8")))
    assert used
    assert used <= known


def test_prometheus_asks_services_of_the_compose_file_at_their_own_port(services: dict[str, Any]) -> None:
    text = (FOLDER / "prometheus/prometheus.yml").read_text(encoding="utf-8")
    targets = re.findall(r'names: \["(\w+)"\]\n +type: A\n +port: (\d+)\n', text)
    assert targets == [("triton", "8002"), ("service", "8000")]
    assert {name for name, _ in targets} <= set(services)
    assert "EXPOSE 8000 8001 8002" in (FOLDER / "triton.Dockerfile").read_text(encoding="utf-8")
    assert "REPVGG_LISTEN=0.0.0.0:8000" in (FOLDER / "runtime.Dockerfile").read_text(encoding="utf-8")
    mounted = [
        volume["target"]
        for volume in services["prometheus"]["volumes"]
        if volume["source"] == str(FOLDER / "prometheus/prometheus.yml")
    ]
    assert [f"--config.file={path}" in services["prometheus"]["command"] for path in mounted] == [True]
    files = {Path(volume["source"]).name: Path(volume["target"]).parent for volume in services["prometheus"]["volumes"]}
    assert files["alerts.yml"] == files["prometheus.yml"] and "rule_files: [alerts.yml]" in text


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_service_that_does_not_run_is_no_target_and_none_that_is_down(tmp_path: Path) -> None:
    """A real Prometheus with the configuration as it is, and a DNS that knows what runs, as Docker's does."""
    program = find_prometheus()
    if program is None:
        pytest.skip("no Prometheus on PATH, and Debian's package cannot be had")
    apart = ["unshare", "--user", "--map-root-user", "--mount", "--net"]
    if (
        not (shutil.which("unshare") and shutil.which("ip"))
        or subprocess.run([*apart, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("no namespaces of one's own can be had here")
    command = [
        *apart,
        sys.executable,
        str(ROOT / "tests/docker/compose_network.py"),
        program,
        str(FOLDER / "prometheus/prometheus.yml"),
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    before, running, after = json.loads(done.stdout)
    assert before == after == {"targets": {}, "servers": ["0", "0"]}
    assert running == {
        "targets": {"service service:8000": "up"},
        "servers": ["0", "1"],
    }  # Triton was not started, which its dashboard says


def test_panels_that_show_whether_a_server_runs_are_those_that_are_tried() -> None:
    assert tuple(expressions(name)["Server A"] for name in NAMES) == SERVERS


def test_grafana_finds_the_source_and_the_dashboard_that_are_mounted(services: dict[str, Any]) -> None:
    grafana = services["grafana"]
    mounts = {Path(volume["source"]).relative_to(FOLDER).as_posix(): volume["target"] for volume in grafana["volumes"]}
    assert mounts["grafana/provisioning"] == "/etc/grafana/provisioning"
    provider = (FOLDER / "grafana/provisioning/dashboards/dashboards.yaml").read_text(encoding="utf-8")
    assert f"path: {mounts['grafana/dashboards']}\n" in provider
    assert (
        grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
        == f"{mounts['grafana/dashboards']}/repvgg.json"
    )
    source = (FOLDER / "grafana/provisioning/datasources/prometheus.yaml").read_text(encoding="utf-8")
    assert "url: http://prometheus:9090\n" in source
    uid = re.search(r"uid: (\w+)", source)
    assert uid is not None
    for name in NAMES:
        used = {panel["datasource"]["uid"] for panel in panels(name)} | {
            t["datasource"]["uid"] for panel in panels(name) for t in panel["targets"]
        }
        assert used == {uid[1]}


def test_nobody_can_log_in_to_grafana(services: dict[str, Any]) -> None:
    environment = services["grafana"]["environment"]
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert (environment["GF_AUTH_DISABLE_LOGIN_FORM"], environment["GF_AUTH_BASIC_ENABLED"]) == ("true", "false")
    assert not [name for name in environment if "PASSWORD" in name]


# -- the dashboards


def test_dashboards_are_all_known_and_each_has_its_own_name() -> None:
    assert sorted(path.stem for path in DASHBOARDS.iterdir()) == sorted(NAMES)
    assert len({read_dashboard(name)[key] for name in NAMES for key in ("uid", "title")}) == 2 * len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_panels_fill_rows_without_overlapping(name: str) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels(name):
        box = panel["gridPos"]
        cells = {(x, y) for x in range(box["x"], box["x"] + box["w"]) for y in range(box["y"], box["y"] + box["h"])}
        assert not cells & taken, panel["title"]
        assert box["x"] + box["w"] <= 24
        taken |= cells
    assert len(taken) == 24 * (1 + max(y for _, y in taken))
    assert (
        len({panel["id"] for panel in panels(name)})
        == len(panels(name))
        == len({panel["title"] for panel in panels(name)})
    )


@pytest.mark.parametrize("name", NAMES)
def test_each_target_has_its_own_letter_and_each_panel_a_unit(name: str) -> None:
    for panel in panels(name):
        letters = [target["refId"] for target in panel["targets"]]
        assert letters == sorted(set(letters)), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
    assert len(expressions(name)) > 15


def test_panels_show_what_an_operator_asks_for() -> None:
    wanted = {
        "nv_inference_request_success", "nv_inference_request_failure", "nv_inference_count", "nv_inference_exec_count",
        "nv_inference_pending_request_count", "nv_inference_request_summary_us", "nv_inference_queue_duration_us",
        "nv_inference_compute_infer_duration_us", "nv_gpu_utilization", "nv_gpu_memory_used_bytes", "up",
    }  # fmt: skip
    assert wanted | GPU_METRICS <= metric_names("repvgg")


def test_triton_is_started_with_the_summaries_that_the_dashboard_shows() -> None:
    assert "--metrics-config=summary_latencies=true" in (FOLDER / "triton.Dockerfile").read_text(encoding="utf-8")


def test_every_metric_of_the_service_dashboard_is_one_of_the_service() -> None:
    prometheus_client = pytest.importorskip(
        "prometheus_client", reason="prometheus-client, of the extra service, is not installed"
    )
    if not (ROOT / "examples/service/metrics.py").exists():
        pytest.skip("examples/service is not there")
    metrics = importlib.import_module("examples.service.metrics")
    statistics = Recorder().snapshot()
    registry = metrics.make_registry(lambda: statistics, lambda: statistics, {"version": "1"})
    metrics.RequestMetrics(registry)
    text = prometheus_client.generate_latest(registry).decode()
    kinds = dict(line.split()[2:4] for line in text.splitlines() if line.startswith("# TYPE "))
    real = {
        f"{name}{suffix}"
        for name, kind in kinds.items()
        for suffix in (["_bucket", "_sum", "_count"] if kind == "histogram" else [""])
    }
    assert metric_names("service") <= real
