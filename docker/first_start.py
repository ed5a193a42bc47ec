"""What a container does first: it builds a plan for its GPU, or finds the one of an earlier start, and becomes COMMAND.

    python first_start.py [--triton] COMMAND [ARGUMENT …]

With --triton it also writes the model repository. In COMMAND, {model} is the plan (of the first model) and {repository}
the model repository. The command also finds the plan in REPVGG_MODEL, and sees none of the other settings. The settings
are variables of the environment:

    REPVGG_MODEL     an .onnx, a folder of them, or a .plan that is to run as it is (default: /models)
    REPVGG_ENGINES   where plans and repositories are kept, in a folder for each GPU type and TensorRT version
                     (default: /engines/plans)
    REPVGG_SERVE     plan; or onnx: build nothing and serve the .onnx as it is, also without a GPU (default: plan)
    REPVGG_BUILD     options of `repvgg-trt build`, as in a shell: "--max-batch 64 --opt-batch 16"
    REPVGG_TRITON    options of `repvgg-trt triton`: "--ensemble jpeg --instances 2"

`repvgg-trt build` decides whether the plan that is there is the one that is wanted: same ONNX, options, TensorRT and
GPU. Containers that start at the same time on one folder wait for each other. What an earlier start wrote into the
model repository and this one did not is removed, unless another container serves from it. Exit codes are those of
repvgg-trt; a failure leaves nothing half done, and the command is not run.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import io
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from repvgg_deploy.cli.trt import main as repvgg_trt

WRITER = "first_start"  # the mark of the models that it wrote into a repository, and may remove again
SETTINGS = ("REPVGG_MODEL", "REPVGG_ENGINES", "REPVGG_SERVE", "REPVGG_BUILD", "REPVGG_TRITON")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="first_start.py", description="builds or finds the plan of this GPU, then becomes COMMAND", add_help=False
    )
    parser.add_argument("--triton", action="store_true", help="write the model repository, too")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND")
    args = parser.parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        parser.error("COMMAND is needed")
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        # A process that is the container's first gets no signal that it has no handler for.
        signal.signal(number, stop)
    models = find_models(Path(os.environ.get("REPVGG_MODEL", "/models")))
    place = choose_place(Path(os.environ.get("REPVGG_ENGINES", "/engines/plans")), models)
    builds = not serves_onnx() and models[0].suffix != ".plan"
    with only_one(place) if builds or args.triton else contextlib.nullcontext():  # else nothing is written
        ready = [prepare_model(model, place) for model in models]
        repository = place / "model_repository"
        if args.triton:
            take_out_the_rest(repository, {name for model in ready for name in write_model(model, repository)})
    become(fill(command, ready[0], repository), ready[0])


def stop(number: int, _: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def fail(message: str, remedy: str) -> NoReturn:
    say(f"error: {message}\n  remedy: {remedy}")
    sys.exit(1)


def say(text: str) -> None:
    print(f"first start: {text}", file=sys.stderr, flush=True)


def find_models(given: Path) -> list[Path]:
    """One file, or all .onnx of a folder by name."""
    if given.is_dir():
        found = sorted(path for path in given.iterdir() if path.suffix == ".onnx" and path.is_file())
        if not found:
            fail(
                f"{given}: holds no .onnx",
                "mount the folder that repvgg-export wrote to at /models, or set REPVGG_MODEL",
            )
        return found
    if not given.is_file():
        fail(f"{given}: no such file or folder", "mount it, and set REPVGG_MODEL to its path in the container")
    return [given]


def serves_onnx() -> bool:
    choice = os.environ.get("REPVGG_SERVE", "plan")
    if choice not in ("plan", "onnx"):
        fail(f"REPVGG_SERVE is {choice!r}", "set it to plan or onnx")
    return choice == "onnx"


def options_of(variable: str) -> list[str]:
    try:
        return shlex.split(os.environ.get(variable, ""))
    except ValueError as error:
        fail(f"{variable} cannot be read: {error}", "quote it as in a shell")


def choose_place(engines: Path, models: list[Path]) -> Path:
    """The folder of this GPU type and TensorRT, so that machines of several kinds may share a volume."""
    if serves_onnx():
        return engines / "onnx"
    if models[0].suffix == ".plan":
        return engines / "given"
    from repvgg_deploy.build.library import look_for_gpu, open_library
    from repvgg_deploy.errors import RepVGGDeployError

    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--backend", default="auto")
    backend = parser.parse_known_args(options_of("REPVGG_BUILD"))[0].backend
    try:
        library = open_library(backend)
    except RepVGGDeployError as error:
        fail(error.message, error.remedy)
    search = look_for_gpu()
    if search.gpu is None and not library.is_rtx:
        fail(
            f"no GPU can be used here: {search.reason}",
            "start the container with --gpus all (NVIDIA Container Toolkit), or set REPVGG_SERVE=onnx",
        )
    gpu = f"{search.gpu.name} sm{search.gpu.compute_capability}" if search.gpu is not None else "no GPU"
    return engines / re.sub(r"[^a-z0-9.]+", "-", f"{gpu} {library.name}".lower()).strip("-")


@contextlib.contextmanager
def only_one(place: Path) -> Iterator[None]:
    """Holds the lock of a folder: the next container finds what this one made. The lock ends with the process."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        handle = os.open(place / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        owner = f"give the folder to the container's user (chown {os.getuid()}:{os.getgid()})"
        remedy = f'{owner}, or run it with --user "$(id -u):$(id -g)"'
        fail(f"{place}: cannot be written to as user {os.getuid()}: {error.strerror}", remedy)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another container prepares {place}: waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def prepare_model(model: Path, place: Path) -> Path:
    """The file that is served: the .onnx itself, a given plan that runs here, or the plan that was built or found."""
    if serves_onnx():
        return model
    if model.suffix == ".plan":
        do("check", str(model))
        return model
    plan = place / f"{model.stem}.plan"
    # --force replaces a plan of another ONNX or of other options. The same plan is never built again.
    do("build", str(model), "--out", str(plan), "--force", *options_of("REPVGG_BUILD"))
    return plan


def write_model(model: Path, repository: Path) -> list[str]:
    """Writes the model into the repository; returns the names under which Triton serves it."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        arguments = ("--out", str(repository), "--force", "--written-by", WRITER, "--json")
        code = run("triton", str(model), *arguments, *options_of("REPVGG_TRITON"))
    answer = json.loads(printed.getvalue() or "{}")
    if "error" in answer:
        say(f"error: {answer['error']}\n  remedy: {answer['remedy']}")
    end_if_failed(code, "triton")
    for one in answer["models"]:
        print(f"{one['status']:<10} {one['name']}, version {one['version']}")
    return [one["name"] for one in answer["models"]]


def take_out_the_rest(repository: Path, wanted: set[str]) -> None:
    """Removes what an earlier start wrote and this one did not, unless another container serves from the repository.

    From here on, this container counts as one that serves from it.
    """
    from repvgg_deploy.errors import RepVGGDeployError
    from repvgg_deploy.serving.repository import find_stale, remove_models

    handle = os.open(repository.parent / ".serving", os.O_RDWR | os.O_CREAT, 0o666)
    os.set_inheritable(handle, True)  # the command holds the lock for as long as it runs
    stale = find_stale(repository, WRITER, wanted)
    for name, reason in stale.kept.items():
        say(f"{name} is no longer wanted, and stays: {reason}")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for name in stale.removable:
            say(f"{name} is no longer wanted: taken out of {repository}")
        remove_models(repository, stale.removable)
    except BlockingIOError:
        for name in stale.removable:
            say(f"{name} is no longer wanted, and stays: another container serves from {repository}")
    except RepVGGDeployError as error:
        fail(error.message, error.remedy)
    fcntl.flock(handle, fcntl.LOCK_SH)


def do(*arguments: str) -> None:
    end_if_failed(run(*arguments), arguments[0])


def run(*arguments: str) -> int:
    say(f"repvgg-trt {shlex.join(arguments)}")
    return repvgg_trt(list(arguments))


def end_if_failed(code: int, command: str) -> None:
    if code:
        say(f"repvgg-trt {command} failed with exit code {code}: nothing is started")
        sys.exit(code)


def fill(command: list[str], model: Path, repository: Path) -> list[str]:
    return [word.replace("{model}", str(model)).replace("{repository}", str(repository)) for word in command]


def become(command: list[str], model: Path) -> NoReturn:
    """Replaces this process, so that signals reach the command itself."""
    say(shlex.join(command))
    sys.stdout.flush()
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    try:
        os.execvpe(command[0], command, {**environment, "REPVGG_MODEL": str(model)})
    except OSError as error:
        say(f"error: {command[0]}: {error.strerror}")
        sys.exit(127 if isinstance(error, FileNotFoundError) else 126)


if __name__ == "__main__":
    main(sys.argv[1:])
