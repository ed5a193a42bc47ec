"""docker/kubernetes/: valid by the schemas of Kubernetes and KServe, and with the numbers of the service's settings."""

from __future__ import annotations

import copy
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("kubernetes_validate", reason="kubernetes-validate, of the extra dev, is not installed")

import kubernetes_validate
import yaml

from examples.service import __main__ as program
from examples.service.decoders import DecodeLimits
from examples.service.settings import Settings
from tests.contract.source_tree import ROOT
from tests.docker.dashboard import metric_names
from tests.docker.dockerfiles import defaults, parse
from tests.docker.kserve_api import KUBERNETES, KServe, find_kserve
from tests.docker.prometheus import find_prometheus
from tests.examples.running_service import serve
from tests.waiting import PATIENCE_SECONDS, wait_until

FOLDER = ROOT / "docker/kubernetes"
MARGIN_SECONDS = 5
OLDEST = "1.34"  # whose pods can sleep before they end; the others' fields are older


def read(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")))


SERVICE = {document["kind"]: document for document in read("service.yaml")}
(KSERVE_SERVICE,), (KSERVE_TRITON,) = read("kserve-service.yaml"), read("kserve-triton.yaml")
POD = SERVICE["Deployment"]["spec"]["template"]["spec"]
PREDICTOR = KSERVE_SERVICE["spec"]["predictor"]
both = pytest.mark.parametrize("pod", [POD, PREDICTOR], ids=["deployment", "kserve"])


def test_files_are_those_that_are_tested() -> None:
    names = {"service.yaml", "prometheus-adapter.yaml", "kserve-service.yaml", "kserve-triton.yaml"}
    assert {path.name for path in FOLDER.iterdir()} == names


@pytest.mark.parametrize("version", [OLDEST, KUBERNETES])
def test_every_resource_is_one_of_kubernetes(version: str) -> None:
    for document in read("service.yaml"):
        kubernetes_validate.validate(document, version, strict=True)
    wrong = copy.deepcopy(SERVICE["Deployment"])
    wrong["spec"]["template"]["spec"]["containers"][0]["livenessProbe"]["httpGet"]["prot"] = 1
    with pytest.raises(kubernetes_validate.ValidationError, match="prot"):
        kubernetes_validate.validate(wrong, version, strict=True)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_inference_service_is_one_of_kserve() -> None:
    wheel = find_kserve()
    if wheel is None:
        pytest.skip("the package kserve, which holds the fields of its resources, cannot be had")
    kserve = KServe(wheel)
    assert [kserve.problems(document) for document in (KSERVE_SERVICE, KSERVE_TRITON)] == [[], []]
    wrong = copy.deepcopy(KSERVE_TRITON)
    wrong["spec"]["predictor"]["minReplica"] = 2
    wrong["spec"]["predictor"]["model"]["modelFormat"]["version"] = 2
    wrong["spec"]["predictor"]["model"]["lifecycle"]["preStop"]["sleep"] = 10
    assert sorted(problem.partition(": ")[0] for problem in kserve.problems(wrong)) == [
        ".spec.predictor.minReplica",
        ".spec.predictor.model.lifecycle",
        ".spec.predictor.model.modelFormat.version",
    ]


def settings_of(container: dict[str, Any]) -> Settings:
    """What the service reads there; no name that it does not know."""
    given = {entry["name"]: entry.get("value") for entry in container["env"]}
    known = {f"REPVGG_{name.upper()}": field.type for name, field in Settings.__dataclass_fields__.items()}
    assert set(given) <= set(known)
    convert = {"int": int, "float": float, "str": str}
    values = {
        name.removeprefix("REPVGG_").lower(): convert[str(known[name])](text) for name, text in given.items() if text
    }
    return Settings("x", **values)


@both
def test_pod_has_time_to_answer_what_is_under_way(pod: dict[str, Any]) -> None:
    settings = settings_of(pod["containers"][0])
    assert pod["terminationGracePeriodSeconds"] == settings.grace_seconds + settings.drain_seconds + MARGIN_SECONDS
    assert program._LATE_SECONDS < MARGIN_SECONDS
    # A balancer that probes by itself has noticed before the grace is over.
    probe = pod["containers"][0]["readinessProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] < settings.grace_seconds


@both
def test_probes_ask_routes_of_the_service_at_its_port(pod: dict[str, Any]) -> None:
    (container,), (port,) = pod["containers"], pod["containers"][0]["ports"]
    listen = next(i.value for i in parse("runtime") if "REPVGG_LISTEN" in i.value)
    assert f"REPVGG_LISTEN=0.0.0.0:{port['containerPort']}" in listen
    app = (ROOT / "examples/service/app.py").read_text(encoding="utf-8")
    asked = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {probe["port"] for probe in asked.values()} == {port["name"]}
    assert {name: probe["path"] for name, probe in asked.items()} == {
        "startup": "/v2/health/ready", "readiness": "/v2/health/ready", "liveness": "/v2/health/live",
    }  # fmt: skip
    assert all(f'"{probe["path"]}"' in app for probe in asked.values())
    # As long as Compose lets the first start take: it builds the plan.
    probe = container["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] == 30 * 60
    assert "start_period: 30m" in (ROOT / "docker/compose.yaml").read_text(encoding="utf-8")


@both
def test_pod_is_confined_and_gets_no_variables_that_look_like_settings(pod: dict[str, Any]) -> None:
    assert pod["enableServiceLinks"] is False
    assert pod["automountServiceAccountToken"] is False
    user = next(i.value for i in parse("runtime") if i.name == "USER").partition(":")[0]
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == int(user)
    confined = pod["containers"][0]["securityContext"]
    assert confined["readOnlyRootFilesystem"] and confined["capabilities"] == {"drop": ["ALL"]}
    assert not confined["allowPrivilegeEscalation"]


@both
def test_pod_has_the_folders_of_its_image_and_memory_for_what_it_lets_in(pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    image = " ".join(i.value for i in parse("runtime"))
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounts) == {"/models", "/engines", "/tmp"}
    assert "REPVGG_MODEL=/models" in image and "REPVGG_ENGINES=/engines/" in image and "HOME=/tmp" in image
    volumes = {volume["name"]: volume.get("persistentVolumeClaim", {}).get("claimName") for volume in pod["volumes"]}
    claims = {document["metadata"]["name"] for document in read("service.yaml") if "Claim" in document["kind"]}
    assert {volumes[name] for name in mounts.values()} - {None} == claims
    # Bodies, what each decoder may take before it is ended, and as much again for the rest.
    settings = settings_of(container)
    decoder = DecodeLimits(settings.decode_seconds, settings.max_pixels, settings.max_body_bytes)
    needed = settings.max_buffered_bytes + settings.decoders * decoder.memory_bytes
    assert gibibytes(container["resources"]["requests"]["memory"]) * 2**30 > 2 * needed
    assert container["resources"]["limits"]["cpu"].isdecimal()  # REPVGG_THREADS takes whole ones


def gibibytes(text: str) -> int:
    assert text.endswith("Gi")
    return int(text.removesuffix("Gi"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_service_with_the_settings_of_the_deployment_passes_its_probes_and_ends(
    exported_sample: Path, sample_dir: Path
) -> None:
    """What kubelet does: it asks the probes, and sends SIGTERM when the pod is to end."""
    (container,) = POD["containers"]
    given = {entry["name"].removeprefix("REPVGG_").lower(): entry.get("value") for entry in container["env"]}
    assert [name for name, value in given.items() if value is None] == ["threads"]  # of limits.cpu
    probes = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    photo = (sample_dir / "images/digit-3.png").read_bytes()
    given |= {
        "threads": container["resources"]["limits"]["cpu"],
        "grace_seconds": "600",
    }  # which ends when it is told to
    with serve(exported_sample, held=True, **given) as service:
        assert {name: service.ask("GET", path).status for name, path in probes.items()} == dict.fromkeys(probes, 200)
        service.terminate()
        wait_until(lambda: service.ask("GET", probes["readiness"]).status == 503, "readiness to go off")
        assert service.ask("GET", probes["liveness"]).status == 200  # else it would be killed before its end
        assert service.ask("POST", "/predict", photo).status == 200
        service.end_grace()
        assert service.process.wait(PATIENCE_SECONDS) == 0


def test_selectors_and_references_lead_to_the_deployment() -> None:
    deployment, service, scaler = (SERVICE[kind] for kind in ("Deployment", "Service", "HorizontalPodAutoscaler"))
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    budget = SERVICE["PodDisruptionBudget"]["spec"]["selector"]
    assert (
        labels == service["spec"]["selector"] == budget["matchLabels"] == deployment["spec"]["selector"]["matchLabels"]
    )
    assert service["spec"]["ports"][0]["targetPort"] == POD["containers"][0]["ports"][0]["name"]
    wanted = {"apiVersion": deployment["apiVersion"], "kind": "Deployment", "name": deployment["metadata"]["name"]}
    assert scaler["spec"]["scaleTargetRef"] == wanted
    assert "replicas" not in deployment["spec"]  # each `kubectl apply` would set it back


def test_autoscaler_asks_for_the_queue_and_wants_one_full_batch_in_it() -> None:
    (metric,) = SERVICE["HorizontalPodAutoscaler"]["spec"]["metrics"]
    settings = settings_of(POD["containers"][0])
    assert metric["pods"]["metric"]["name"] in metric_names("service")
    assert int(metric["pods"]["target"]["averageValue"]) == settings.max_batch
    assert settings.max_batch * 4 < (settings.max_queue or 8 * settings.max_batch)


def test_both_ways_to_run_the_service_are_the_same() -> None:
    theirs, ours = copy.deepcopy(PREDICTOR["containers"][0]), copy.deepcopy(POD["containers"][0])
    assert theirs["env"].pop(0) == {"name": "REPVGG_NAME", "value": KSERVE_SERVICE["metadata"]["name"]}
    assert (theirs.pop("name"), theirs.pop("ports")[0]["name"]) == ("kserve-container", "http1")
    for container in (theirs, ours):
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            del container[probe]["httpGet"]["port"]
    assert theirs == {name: value for name, value in ours.items() if name not in ("name", "ports")}
    annotations = SERVICE["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    assert PREDICTOR["annotations"] == annotations
    scaler = SERVICE["HorizontalPodAutoscaler"]["spec"]
    assert [PREDICTOR["minReplicas"], PREDICTOR["maxReplicas"]] == [scaler["minReplicas"], scaler["maxReplicas"]]


def test_triton_is_the_release_of_the_image_and_ends_after_its_requests() -> None:
    predictor = KSERVE_TRITON["spec"]["predictor"]
    model = predictor["model"]
    assert model["runtimeVersion"] == f"{defaults('triton')['TRITON_RELEASE']}-py3"
    pause = model["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert predictor["terminationGracePeriodSeconds"] == pause + 30 + MARGIN_SECONDS
    assert "--exit-timeout-secs=30" in (ROOT / "docker/triton.Dockerfile").read_text(encoding="utf-8")
    assert model["readinessProbe"]["periodSeconds"] * model["readinessProbe"]["failureThreshold"] < pause
    assert predictor["enableServiceLinks"] is False


def test_adapter_has_the_queue_that_the_autoscaler_asks_for_and_tritons() -> None:
    (adapter,) = read("prometheus-adapter.yaml")
    service, triton = (rule["seriesQuery"].partition("{")[0] for rule in adapter["rules"]["custom"])
    assert service == SERVICE["HorizontalPodAutoscaler"]["spec"]["metrics"][0]["pods"]["metric"]["name"]
    assert triton in metric_names("repvgg")


@pytest.mark.slow
def test_adapter_gives_the_mean_of_each_pods_queue(tmp_path: Path) -> None:
    promtool = find_prometheus("promtool")
    if promtool is None:
        pytest.skip("no promtool on PATH, and Debian's package cannot be had")
    (adapter,) = read("prometheus-adapter.yaml")
    service = "repvgg_batcher_waiting_images"
    query = adapter["rules"]["custom"][0]["metricsQuery"]
    for word, text in (("Series", service), ("LabelMatchers", 'namespace="a",pod=~"p|q"'), ("GroupBy", "pod")):
        query = query.replace(f"<<.{word}>>", text)
    samples = [{"labels": f'{{pod="{pod}"}}', "value": value} for pod, value in (("p", 30), ("q", 8))]
    series = [
        {"series": f'{service}{{namespace="a",pod="{pod}"}}', "values": values}
        for pod, values in (("p", "0 0 0 30 60 0 30"), ("q", "8x6"))
    ]
    test = {
        "interval": "20s",
        "input_series": series,
        "promql_expr_test": [{"expr": query, "eval_time": "2m", "exp_samples": samples}],
    }
    (tmp_path / "tests.json").write_text(json.dumps({"tests": [test]}), encoding="utf-8")
    done = subprocess.run(
        [promtool, "test", "rules", tmp_path / "tests.json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
