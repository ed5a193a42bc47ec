"""Puts load on the service: throughput, latency, and whether every request got the right answer.

    python -m examples.service.load_test --images models/sample/images --clients 32 --seconds 10
    python -m examples.service.load_test --tensor --images models/sample/images --engine sample.onnx
    python -m examples.service.load_test --images models/sample/images --stop PID

Each client sends one request after the other on one connection. Before the load, each image is sent once by itself:
under load its best class must be the same. `--engine` measures `Engine.infer` on full batches before and after, to
compare with. `--stop` sends SIGTERM to the service halfway: from then on a refused connection is no loss, but a request
that was sent and not answered is. Exit code 1 if anything was lost or wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from repvgg_deploy import Engine, RepVGGDeployError
from repvgg_deploy.errors import InputError
from repvgg_deploy.images.listing import list_images
from repvgg_deploy.runtime.options import EngineOptions
from repvgg_deploy.serving.kserve import HEADER


@dataclass(frozen=True, slots=True)
class Work:
    """One request: its path, body and headers, and the best class of its image."""

    path: str
    body: bytes
    headers: dict[str, str]
    best: int | None = None


@dataclass(slots=True)
class Tally:
    """What the clients have counted."""

    statuses: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    wrong: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    refused_connections: int = 0
    stopped: bool = False
    rate: float = 0.0  # answers with 200 a second

    @property
    def answered(self) -> int:
        """Answers with any status."""
        return sum(self.statuses.values())


def best_class(work: Work, body: bytes, json_bytes: str | None) -> int:
    """The best class of an answer to `work`."""
    if work.path == "/predict":
        return int(json.loads(body)["predictions"][0]["class"])
    assert json_bytes is not None
    logits = np.frombuffer(body[int(json_bytes) :], np.float32)
    return int(logits.argmax())


async def make_works(session: aiohttp.ClientSession, options: argparse.Namespace) -> list[Work]:
    """A request for each image, with the best class that the idle service gives."""
    works = []
    for path in list_images(options.images):
        if options.tensor:
            work = Work(f"/v2/models/{options.name}/infer", *tensor_request(path, options.spec))
        else:
            work = Work("/predict", read_image(path), {"Content-Type": "application/octet-stream"})
        async with session.post(work.path, data=work.body, headers=work.headers) as response:
            body = await response.read()
            if response.status != 200:
                raise SystemExit(f"{path}: {response.status}: {body.decode(errors='replace')}")
            works.append(Work(work.path, work.body, work.headers, best_class(work, body, response.headers.get(HEADER))))
    return works


def read_image(path: Path) -> bytes:
    """A file as it is.

    Raises:
        InputError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read: {error.strerror}", remedy="name image files, or a folder of them"
        ) from error


def tensor_request(path: Path, spec: dict[str, Any]) -> tuple[bytes, dict[str, str]]:
    """A binary tensor of the model's size; random, because its content does not matter, but the same for each image."""
    shape = [1, *(size if size > 0 else 224 for size in spec["shape"][1:])]
    seed = int.from_bytes(read_image(path)[-8:], "little")
    random = np.random.default_rng(seed)
    is_uint8 = spec["datatype"] == "UINT8"
    batch = random.integers(0, 256, shape, np.uint8) if is_uint8 else random.standard_normal(shape, np.float32)
    about = {"name": spec["name"], "datatype": spec["datatype"], "shape": shape}
    tensor = {**about, "parameters": {"binary_data_size": batch.nbytes}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return head + batch.tobytes(), {HEADER: str(len(head)), "Content-Type": "application/octet-stream"}


async def run_client(session: aiohttp.ClientSession, works: list[Work], first: int, end: float, tally: Tally) -> None:
    """One client: request after request, until the time is over or the service no longer listens."""
    for index in count(first):
        started = time.perf_counter()
        if started >= end:
            return
        work = works[index % len(works)]
        try:
            async with session.post(work.path, data=work.body, headers=work.headers) as response:
                body = await response.read()
                tally.statuses[response.status] += 1
                if response.status == 200:
                    tally.seconds.append(time.perf_counter() - started)
                    tally.wrong += best_class(work, body, response.headers.get(HEADER)) != work.best
                elif response.status == 503:
                    wanted = float(response.headers.get("Retry-After", "1"))
                    await asyncio.sleep(min(wanted, max(0.0, end - time.perf_counter())))
        except aiohttp.ClientConnectorError as error:  # no connection, so nothing was sent
            if tally.stopped:
                tally.refused_connections += 1
                return
            tally.lost[type(error).__name__] += 1
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            tally.lost[type(error).__name__] += 1


async def stop_halfway(session: aiohttp.ClientSession, options: argparse.Namespace, tally: Tally) -> None:
    """Sends SIGTERM if asked to, and says when readiness went off and when the service was gone."""
    if options.stop is None:
        return
    await asyncio.sleep(options.seconds / 2)
    tally.stopped = True
    print(f"SIGTERM to {options.stop}, {tally.answered} requests were answered so far")
    os.kill(options.stop, signal.SIGTERM)
    started, ready, answered = time.perf_counter(), True, tally.answered
    while time.perf_counter() - started < 120:
        try:
            async with session.get("/v2/health/ready") as response:
                if ready and response.status != 200:
                    print(f"  readiness off after {1e3 * (time.perf_counter() - started):.0f} ms: {response.status}")
                    ready = False
        except aiohttp.ClientConnectorError:
            print(
                f"  no connection any more after {time.perf_counter() - started:.1f} s; "
                f"{tally.answered - answered} requests were answered since"
            )
            return
        await asyncio.sleep(0.01)


async def run_load(options: argparse.Namespace) -> Tally:
    """Runs all clients; the sum of what they counted."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        options.url, connector=connector, timeout=aiohttp.ClientTimeout(60), auto_decompress=False
    ) as session:
        async with session.get(f"/v2/models/{options.name}") as response:
            if response.status != 200:
                raise SystemExit(f"{options.url}: {await response.text()}")
            options.spec = (await response.json())["inputs"][0]
        works = await make_works(session, options)
        before = await read_answered(session, works[0])
        tally, started = Tally(), time.perf_counter()
        clients = [
            run_client(session, works, index, started + options.seconds, tally) for index in range(options.clients)
        ]
        await asyncio.gather(stop_halfway(session, options, tally), *clients)
        elapsed = time.perf_counter() - started
        tally.rate = tally.statuses[200] / elapsed
        print_tally(tally, options, elapsed)
        if options.stop is None:
            after = await read_answered(session, works[0])
            print(f"  the service counted   {after - before}, the clients {tally.answered}")
            if after - before != tally.answered:
                tally.lost["miscounted"] += 1
    return tally


async def read_answered(session: aiohttp.ClientSession, work: Work) -> int:
    """How many inference requests the service says that it answered."""
    route = "/predict" if work.path == "/predict" else "/v2/models/{name}/infer"
    async with session.get("/metrics") as response:
        lines = (await response.text()).splitlines()
    return round(
        sum(
            float(line.rsplit(" ", 1)[1])
            for line in lines
            if line.startswith(f'repvgg_http_requests_total{{route="{route}"')
        )
    )


def print_tally(tally: Tally, options: argparse.Namespace, elapsed: float) -> None:
    """Prints the figures."""
    kind = "tensors" if options.tensor else "images"
    print(f"{options.clients} clients sent single {kind} for {elapsed:.1f} s")
    print(f"  answered with 200     {tally.statuses[200]}   {tally.rate:.0f} a second")
    if tally.seconds:
        p50, p95, p99 = (1e3 * float(np.percentile(tally.seconds, percent)) for percent in (50, 95, 99))
        print(
            f"  latency               p50 {p50:.1f} ms   p95 {p95:.1f} ms   p99 {p99:.1f} ms   longest "
            f"{1e3 * max(tally.seconds):.1f} ms"
        )
    others = {status: number for status, number in sorted(tally.statuses.items()) if status != 200}
    print(
        f"  with another status   {', '.join(f'{number} with {status}' for status, number in others.items()) or 'none'}"
    )
    print(f"  wrong answers         {tally.wrong}")
    print(f"  lost                  {', '.join(f'{number} {kind}' for kind, number in tally.lost.items()) or 'none'}")
    if options.stop is not None:
        print(f"  refused connections   {tally.refused_connections} clients found nobody listening, after SIGTERM")


def measure_engine(path: Path, threads: int, batch_size: int = 32) -> float:
    """Images a second of `Engine.infer` on full batches, in this process."""
    with Engine(path, options=EngineOptions(intra_op_threads=threads or None)) as engine:
        shape = [batch_size, *(size if isinstance(size, int) else 224 for size in engine.spec.input.shape[1:])]
        batch = np.zeros(shape, engine.spec.input.dtype)
        engine.infer(batch)
        started, images = time.perf_counter(), 0
        while time.perf_counter() - started < 3:
            engine.infer(batch)
            images += batch_size
        rate = images / (time.perf_counter() - started)
        print(f"Engine.infer alone, batches of {batch_size}: {rate:.0f} images a second")
        return rate


def main() -> int:
    """Runs the load and the comparison; returns the exit code."""
    parser = argparse.ArgumentParser(description="Loads the service: throughput, latency, nothing lost.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the service (%(default)s)")
    parser.add_argument("--name", default="sample", help="of the model there (%(default)s)")
    parser.add_argument("--images", type=Path, nargs="+", required=True, help="image files, or folders of them")
    parser.add_argument(
        "--tensor", action="store_true", help="send a binary tensor for each image in place of the file"
    )
    parser.add_argument("--clients", type=int, default=32, help="how many send at once (%(default)s)")
    parser.add_argument("--seconds", type=float, default=10, help="how long (%(default)s)")
    parser.add_argument("--stop", type=int, metavar="PID", help="send SIGTERM to this process halfway")
    parser.add_argument("--engine", type=Path, metavar="MODEL", help="measure Engine.infer with this model, too")
    parser.add_argument("--threads", type=int, default=0, help="that Engine.infer computes with (all cores)")
    options = parser.parse_args()
    if not options.url.startswith(("http://", "https://")):
        parser.error(f"argument --url: expected one such as http://127.0.0.1:8000, found {options.url!r}")
    try:
        before = measure_engine(options.engine, options.threads) if options.engine else 0.0
        tally = asyncio.run(run_load(options))
        if options.engine:  # once more: other programs may have slowed one of the two
            alone = (before + measure_engine(options.engine, options.threads)) / 2
            print(f"The service gave {100 * tally.rate / alone:.0f} % of that, with its clients on the same machine")
    except RepVGGDeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except aiohttp.ClientConnectorError as error:
        print(f"error: nobody answers at {options.url}: {error}", file=sys.stderr)
        return 1
    return 1 if tally.lost or tally.wrong or not tally.statuses[200] else 0


if __name__ == "__main__":
    sys.exit(main())
