"""A real tritonserver serves what is written. ONNX Runtime is behind its python backend; all else is Triton's own."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from repvgg_deploy import Engine
from repvgg_deploy.serving.options import RepositoryOptions
from repvgg_deploy.serving.triton import write_triton
from repvgg_deploy.serving.validate import validate_repository
from tests.kills import killed_before
from tests.runtime.make_model import ModelOptions, make_onnx, random_batch
from tests.serving import test_kills as kills
from tests.serving.broken_configs import BROKEN
from tests.serving.make_repository import edit_config, files_below, needs_schema, write_plan
from tests.serving.prepare_triton import FOLDER, CannotPrepareError, find_haproxy, prepare
from tests.serving.real_server import Load, RealServer, TritonGate, free_ports, infer, request, start
from tests.waiting import PATIENCE_SECONDS, wait_until

pytestmark = [needs_schema, pytest.mark.timeout(1200)]
IMAGE = random_batch(ModelOptions(), 1)
# A batch is computed in another order of additions than a single image; the logits are of the size of 1.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module", autouse=True)
def environment() -> None:
    try:
        prepare()
    except CannotPrepareError as error:
        pytest.skip(f"no tritonserver: {error}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="module")
def onnx(folder: Path) -> Path:
    return make_onnx(folder / "tiny.onnx")


@pytest.fixture(scope="module")
def gate(folder: Path) -> TritonGate:
    """Of the model `tiny` of `server`."""
    return TritonGate(folder / "gate")


@pytest.fixture(scope="module")
def server(folder: Path, onnx: Path, gate: TritonGate) -> Iterator[RealServer]:
    """A server with the model behind its ensemble, for tests that change nothing."""
    write_triton(
        [onnx], folder / "repo", RepositoryOptions(ensemble="jpeg", max_queue_delay_us=50_000, queue_timeout_us=0)
    )
    put_behind(gate, folder / "repo/tiny")
    with start(folder / "repo", ["tiny", "tiny_decode", "tiny_jpeg"]) as running:
        yield running


def write(repository: Path, *, seed: int = 0, **options: Any) -> TritonGate:
    """A model `tiny`, and what holds it up."""
    settings = RepositoryOptions(
        **{"name": "tiny", "queue_timeout_us": 0, **options}
    )  # 0: on however busy a machine, nothing is refused for its age
    write_triton([make_onnx(repository.parent / "source.onnx", seed=seed)], repository, settings, force=True)
    gate = TritonGate(repository.parent / "gate")
    put_behind(gate, repository / "tiny")
    return gate


def put_behind(gate: TritonGate, model: Path) -> None:
    edit_config(model, lambda config: setattr(config.parameters["test_gate"], "string_value", str(gate.path)))


def logits_of(seed: int, folder: Path) -> np.ndarray[Any, Any]:
    with Engine(make_onnx(folder / f"seed-{seed}.onnx", seed=seed)) as engine:
        return np.asarray(engine.infer(IMAGE))


# -- answers


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize("count", [1, 5, 32])
def test_answers_to_the_real_client_are_the_engines(
    protocol: str, count: int, server: RealServer, onnx: Path, tmp_path: Path
) -> None:
    batch = random_batch(ModelOptions(), count, seed=count)
    np.savez(tmp_path / "in.npz", batch=batch)
    address = f"127.0.0.1:{server.port + (protocol == 'grpc')}"
    program = [str(FOLDER / "venv/bin/python"), str(Path(__file__).with_name("triton_client.py.txt"))]
    subprocess.run(
        [*program, protocol, address, "tiny", str(tmp_path / "in.npz"), str(tmp_path / "out.npz")],
        check=True,
        timeout=PATIENCE_SECONDS,
    )
    with Engine(onnx) as engine, np.load(tmp_path / "out.npz") as out:
        np.testing.assert_allclose(out["logits"], engine.infer(batch), **TOLERANCE)


def test_answers_in_json_are_the_engines(server: RealServer, onnx: Path) -> None:
    body = {"inputs": [{"name": "images", "shape": IMAGE.shape, "datatype": "FP32", "data": IMAGE.ravel().tolist()}]}
    status, answer = server.post("/v2/models/tiny/infer", body)
    assert status == 200
    with Engine(onnx) as engine:
        np.testing.assert_allclose(np.reshape(answer["outputs"][0]["data"], (1, 7)), engine.infer(IMAGE), **TOLERANCE)


def test_classification_names_the_classes(server: RealServer, onnx: Path) -> None:
    body = {
        "inputs": [{"name": "images", "shape": IMAGE.shape, "datatype": "FP32", "data": IMAGE.ravel().tolist()}],
        "outputs": [{"name": "logits", "parameters": {"classification": 3}}],
    }
    status, answer = server.post("/v2/models/tiny/infer", body)
    assert status == 200, answer
    with Engine(onnx) as engine:
        order = np.argsort(-engine.infer(IMAGE)[0])[:3]
    found = [line.split(":") for line in answer["outputs"][0]["data"]]
    assert [(int(index), label) for _, index, label in found] == [(index, f"class {index}") for index in order]


def test_jpeg_files_are_answered_as_the_engine_answers_them(server: RealServer, onnx: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    data = (tmp_path / "photo.jpg").read_bytes()
    length = len(data).to_bytes(4, "little") + data
    tensor = {"name": "image", "shape": [1, 1], "datatype": "BYTES", "parameters": {"binary_data_size": len(length)}}
    head = json.dumps({"inputs": [tensor]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    status, body = request("POST", server.port, "/v2/models/tiny_jpeg/infer", head + length, headers)
    assert status == 200, body
    with Engine(onnx) as engine:
        np.testing.assert_allclose(
            np.reshape(json.loads(body)["outputs"][0]["data"], (1, 7)),
            engine.infer_images([tmp_path / "photo.jpg"]),
            **TOLERANCE,
        )
    status, body = request(
        "POST", server.port, "/v2/models/tiny_jpeg/infer", head + length[:4] + bytes(len(data)), headers
    )
    assert (status, b"not a usable JPEG" in body) == (500, True)


def test_provenance_can_be_asked_of_the_server(server: RealServer) -> None:
    config = json.loads(server.get("/v2/models/tiny/config")[1])
    assert len(config["parameters"]["repvgg_deploy.source_sha256"]["string_value"]) == 64


def test_single_requests_are_really_put_together(server: RealServer, onnx: Path, gate: TritonGate) -> None:
    names = ("nv_inference_count", "nv_inference_exec_count")
    before = [server.metric(name, "tiny") for name in names]
    images = [random_batch(ModelOptions(), 1, seed=seed) for seed in range(32)]
    with gate.hold(server.port, images[:1]) as first:
        gate.wait_for_batch()
        with gate.hold(server.port, images[1:]) as others:
            server.wait_for_queue("tiny", 31)
    answers = [one.result() for one in [*first, *others]]
    assert [status for status, _ in answers] == [200] * 32
    wait_until(lambda: server.metric("nv_inference_count", "tiny") == before[0] + 32, "the metrics")
    assert 1 <= server.metric("nv_inference_exec_count", "tiny") - before[1] <= 16
    with Engine(onnx) as engine:  # each got its own row
        np.testing.assert_allclose(
            np.concatenate([rows for _, rows in answers]), engine.infer(np.concatenate(images)), **TOLERANCE
        )


@pytest.mark.parametrize("kind", ["probabilities", "top5", "features", "module"])
@pytest.mark.parametrize("batch", ["batch", 2])
def test_every_kind_of_model_is_loaded_as_written(
    kind: str, batch: str | int, server: RealServer, folder: Path
) -> None:
    name = f"{kind}-{batch}"
    write_triton([make_onnx(folder / f"{name}.onnx", ModelOptions(kind=kind, batch=batch))], folder / "repo")
    assert server.load(name)[0] == 200, server.log.read_text()[-2000:]
    assert server.get(f"/v2/models/{name}/ready")[0] == 200


# -- what Triton refuses

STRICT = "--disable-auto-complete-config"  # make up nothing that a configuration lacks


# Not shown to the server: where a warm-up fails while it runs, Triton 2.51 answers 400 in some runs and does not answer
# in others.
REFUSED = [case for case in BROKEN if case.name not in ("warm-up above largest", "no input")]


@pytest.mark.parametrize("case", REFUSED, ids=[case.name for case in REFUSED])
def test_what_the_validator_finds_triton_refuses(case: Any, tmp_path: Path, onnx: Path) -> None:
    """In a server of its own each: one did not survive a long row of models that fail."""
    for name in ("good", "broken"):
        write_triton([onnx], tmp_path / "repo", RepositoryOptions(name=name))
    edit_config(tmp_path / "repo/broken", case.edit)
    assert {finding.model for finding in validate_repository(tmp_path / "repo")[1]} == {"broken"}
    with start(tmp_path / "repo", ["good"], STRICT) as server:
        status, answer = server.load("broken")
        assert status in (400, 500), answer  # 500: not even the configuration could be read
        assert infer(server.port, "good", IMAGE)[0] == 200


def test_what_a_killed_writer_left_beside_a_repository_is_no_model_and_a_hidden_folder_inside_is_one(
    tmp_path: Path, onnx: Path
) -> None:
    write_triton([onnx], tmp_path / "repo", RepositoryOptions(name="good"))
    for folder in (tmp_path, tmp_path / "repo"):
        (folder / ".repo.abcd1234.partial").mkdir()
        (folder / ".repository.lock").touch()
        errors = [one for one in validate_repository(tmp_path / "repo")[1] if one.severity == "error"]
        if folder == tmp_path:
            with start(tmp_path / "repo", ["*"]) as server:
                assert (infer(server.port, "good", IMAGE)[0], errors) == (200, [])
        else:
            with pytest.raises(AssertionError, match="failed to load all models"), start(tmp_path / "repo", ["*"]):
                pass
            assert [one.model for one in errors] == [".repo.abcd1234.partial"]


@pytest.mark.slow
@pytest.mark.parametrize("stands", [False, True], ids=["empty", "standing"])
@pytest.mark.parametrize("write", [kills.one, kills.one_again, kills.ensemble])
def test_server_starts_on_what_a_kill_at_any_event_leaves(
    write: Callable[[Path], None], stands: bool, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """`make long` kills before every event, else before every seventh. Plans need a GPU: their folders are alike."""
    start_state = tmp_path / "start"
    start_state.mkdir()
    if stands:
        kills.write_first(start_state, jpeg=write is not kills.one_again)
    step = 1 if "REPVGG_EVERY_KILL" in os.environ else 7
    seen: list[dict[str, bytes]] = []
    number, killed = 1 - step, True
    while killed:
        number += step
        folder = tmp_path / f"killed{number}"
        shutil.copytree(start_state, folder)
        killed = killed_before(number, folder, lambda: write(folder))  # noqa: B023 - it is called at once
        repository = folder / "repo"
        models = [path.name for path in repository.iterdir() if path.is_dir()] if repository.exists() else []
        files = files_below(repository)
        state = {name: data for name, data in files.items() if not name.startswith(".")}
        if not models or state in seen:  # nothing to serve, or a server has started on it
            continue
        seen.append(state)
        with start(repository, ["*"]) as server:
            for name in models:
                assert server.get(f"/v2/models/{name}/ready")[0] == 200, f"{name} after {number - 1} events"
    record_property("counted", f"{number // step} kills left {len(seen)} repositories, and a server started on each")
    assert seen


def test_configuration_of_a_plan_is_parsed(onnx: Path, tmp_path: Path) -> None:
    """All but the GPU and the backend is found good: what is refused is that there is none of them here."""
    write_triton([onnx], tmp_path / "repo", RepositoryOptions(name="good"))
    write_triton([write_plan(tmp_path / "b2.plan")], tmp_path / "repo", RepositoryOptions(cuda_graphs=True))
    with start(tmp_path / "repo", ["good"], STRICT) as server:
        status, answer = server.load("b2")
        assert (status, "GPU" in answer["error"] or "tensorrt" in answer["error"]) == (400, True), answer


# -- in production


def test_new_version_is_loaded_under_load_without_a_lost_request(tmp_path: Path) -> None:
    write(tmp_path / "repo", seed=0)
    old, new = logits_of(0, tmp_path), logits_of(1, tmp_path)
    with start(tmp_path / "repo", ["tiny"]) as server, Load(server.port, "tiny", IMAGE) as load:
        load.wait_for(50)
        write(tmp_path / "repo", seed=1)
        assert (tmp_path / "repo/tiny/2/model.onnx").exists()
        assert server.load("tiny")[0] == 200
        load.wait_for(50)
        last = infer(server.port, "tiny", IMAGE)[1]
    assert [status for status, _ in load.answers] == [200] * len(load.answers)
    kinds = [(np.allclose(rows, old, **TOLERANCE), np.allclose(rows, new, **TOLERANCE)) for _, rows in load.answers]
    assert set(kinds) == {(True, False), (False, True)}  # each is of one version, and both served
    np.testing.assert_allclose(last, new, **TOLERANCE)


def test_corrupt_new_version_leaves_the_old_one_serving(tmp_path: Path) -> None:
    write(tmp_path / "repo", seed=0)
    with start(tmp_path / "repo", ["tiny"]) as server, Load(server.port, "tiny", IMAGE) as load:
        load.wait_for(20)
        (tmp_path / "repo/tiny/2").mkdir()
        model = (tmp_path / "repo/tiny/1/model.onnx").read_bytes()
        (tmp_path / "repo/tiny/2/model.onnx").write_bytes(model[: len(model) // 2])
        assert any(
            finding.severity == "error" and "version 2" in finding.message
            for finding in validate_repository(tmp_path / "repo")[1]
        )
        status, answer = server.load("tiny")
        assert status == 400, answer
        load.wait_for(20)
        assert server.get("/v2/models/tiny/versions/1/ready")[0] == 200
    assert [status for status, _ in load.answers] == [200] * len(load.answers)


def test_full_queue_answers_503(tmp_path: Path) -> None:
    # Without a time limit: on a machine that is slow enough those that wait would be refused for it.
    gate = write(tmp_path / "repo", max_batch=1, max_queue=2, queue_timeout_us=0)
    with start(tmp_path / "repo", ["tiny"]) as server:
        with gate.hold(server.port, [IMAGE] * 16) as sent:
            # Two wait, one runs, and one more may be on its way from the queue: the others must not have to wait for
            # them.
            wait_until(lambda: sum(one.done() for one in sent) >= 12, "the refusals")
        answers = [one.result() for one in sent]
        statuses = [status for status, _ in answers]
        assert set(statuses) == {200, 503}
        assert statuses.count(200) >= 2  # those that wait, and one that runs if it was taken out of the queue in time
        assert all("maximum queue size" in text for status, text in answers if status == 503)
        assert infer(server.port, "tiny", IMAGE)[0] == 200  # and it goes on


def test_request_that_waits_too_long_is_refused(tmp_path: Path) -> None:
    gate = write(tmp_path / "repo", max_batch=1, queue_timeout_us=1000)
    with start(tmp_path / "repo", ["tiny"]) as server, gate.hold(server.port, [IMAGE] * 6) as sent:
        gate.wait_for_batch()
        server.wait_for_queue("tiny", 5)
        time.sleep(0.01)  # by now the last of them has waited too long
    answers = [one.result() for one in sent]
    assert {status for status, _ in answers} == {200, 503}
    assert all("timeout" in text.lower() for status, text in answers if status == 503)


def test_sigterm_answers_what_is_under_way(tmp_path: Path) -> None:
    gate = write(tmp_path / "repo", max_batch=1, max_queue=64)
    expected = logits_of(0, tmp_path)
    with start(tmp_path / "repo", ["tiny"]) as server, gate.hold(server.port, [IMAGE] * 16) as sent:
        # What waits in the kernel's queue of connections is under way for the client only, and is reset: so wait until
        # Triton has all of them.
        gate.wait_for_batch()
        server.wait_for_queue("tiny", 15)
        server.process.send_signal(signal.SIGTERM)
        wait_until(
            lambda: "Found 16 HTTP service connections" in server.log.read_text(errors="replace"), "the drain to begin"
        )
        assert not any(one.done() for one in sent)
        gate.open()
        assert server.process.wait(PATIENCE_SECONDS) == 0
        answers = [one.result() for one in sent]
    assert [status for status, _ in answers] == [200] * 16
    assert all(np.allclose(rows, expected, **TOLERANCE) for _, rows in answers)


# From SIGTERM on, Triton closes new connections without an answer, until the balancer's check finds it out: whoever
# sends it requests then loses some, and retries do not mend all of it. So a server is taken out of the balancer first,
# and stopped when nothing is under way there. Kept connections would hold up its drain until --exit-timeout-secs, hence
# http-server-close. A check that a busy machine answers late must not take the other server out, too, hence so much
# patience; in production a check fails sooner.
HAPROXY = """
global
  stats socket {socket} level admin
defaults
  mode http
  timeout connect {patience}s
  timeout client {patience}s
  timeout server {patience}s
  timeout check {patience}s
  option redispatch
  option http-server-close
frontend in
  bind 127.0.0.1:{port}
  default_backend triton
backend triton
  balance leastconn
  option httpchk GET /v2/health/ready
  default-server check inter 1s fall 100 rise 1
  server a 127.0.0.1:{a}
  server b 127.0.0.1:{b}
"""


def test_one_of_two_servers_is_stopped_behind_haproxy_and_nothing_is_lost(tmp_path: Path) -> None:
    found = find_haproxy()
    if found is None:
        pytest.skip("haproxy is not installed, and its package cannot be had here")
    write(tmp_path / "repo")
    port, control = free_ports(1), tmp_path / "control"
    with start(tmp_path / "repo", ["tiny"]) as first, start(tmp_path / "repo", ["tiny"]) as second:
        (tmp_path / "haproxy.cfg").write_text(
            HAPROXY.format(socket=control, port=port, a=first.port, b=second.port, patience=PATIENCE_SECONDS)
        )
        program, variables = found
        balancer = subprocess.Popen(
            [program, "-db", "-f", str(tmp_path / "haproxy.cfg")], env=variables, stderr=subprocess.DEVNULL
        )
        try:
            wait_until(lambda: _answers(port), "HAProxy")
            warmed = [server.metric("nv_inference_request_success", "tiny") for server in (first, second)]
            with Load(port, "tiny", IMAGE) as load:
                load.wait_for(100)
                served = [server.metric("nv_inference_request_success", "tiny") for server in (first, second)]
                tell(control, "set server triton/a state drain")
                wait_until(lambda: sessions(control, "a") == 0, "the first server to be idle")
                assert first.stop() == 0
                load.wait_for(100)
            assert [answer for answer in load.answers if answer[0] != 200] == []
            assert all(after > before for before, after in zip(warmed, served, strict=True))  # both had their part
        finally:
            balancer.send_signal(signal.SIGKILL)
            balancer.wait()


def tell(control: Path, command: str) -> str:
    """A command to HAProxy through its control socket."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(control))
        connection.sendall(f"{command}\n".encode())
        return b"".join(iter(lambda: connection.recv(4096), b"")).decode()


def sessions(control: Path, server: str) -> int:
    """How many requests are under way at a server."""
    header, *rows = csv.reader(tell(control, "show stat").removeprefix("# ").splitlines())
    return next(
        int(row["scur"])
        for row in (dict(zip(header, row, strict=False)) for row in rows if row)
        if row["svname"] == server
    )


def _answers(port: int) -> bool:
    try:
        return infer(port, "tiny", IMAGE)[0] == 200
    except OSError:
        return False
