"""A Dockerfile's instructions, and what of them can be done without Docker, in a folder that stands for `/`."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docker"
NAMES = ("export", "runtime", "triton")
# What stands at the root of an image, as far as the Dockerfiles name it; such a path is moved into the folder that
# stands for the image.
TOP = "engines|models|opt|src|usr/lib|wheels"
_PATH = re.compile(rf"(?<![\w.}})/-])/(?={TOP})")


@dataclass(frozen=True)
class Instruction:
    """One instruction: name, arguments (lines joined), line (from 1), number of its stage (before any: −1)."""

    name: str
    value: str
    line: int
    stage: int

    @property
    def words(self) -> list[str]:
        """Of the JSON form: `["python", "x.py"]`."""
        words: list[str] = json.loads(self.value)
        return words


def parse(name: str) -> list[Instruction]:
    """The instructions of docker/NAME.Dockerfile without comments."""
    content = io.BytesIO((FOLDER / f"{name}.Dockerfile").read_bytes())
    result, stage = [], -1
    for item in DockerfileParser(fileobj=content).structure:
        if item["instruction"] == "COMMENT":
            continue
        stage += item["instruction"] == "FROM"
        result.append(Instruction(item["instruction"], item["value"], item["startline"] + 1, stage))
    return result


def defaults(name: str) -> dict[str, str]:
    """The build arguments with their defaults; an argument that is declared twice has one default."""
    found: dict[str, str] = {}
    for instruction in parse(name):
        if instruction.name == "ARG":
            key, equals, value = instruction.value.partition("=")
            if equals:
                assert found.get(key, value) == value, f"{name}: {key} has two defaults"
                found[key] = value.strip('"')
    return found


class Image:
    """One Dockerfile, carried out in a folder: COPY copies, RUN runs in a shell in a clean Python environment.

    Args:
        name: Of the Dockerfile.
        folder: Becomes the image's root.
        environment: Whether to make the clean environment.
        arguments: Build arguments.
    """

    def __init__(self, name: str, folder: Path, *, environment: bool = True, **arguments: str) -> None:
        self.instructions, self.folder, self.arguments = parse(name), folder, arguments
        self.base = folder / "usr/local"
        if environment:
            venv.create(self.base, with_pip=True)
        kept = {
            key: value for key, value in os.environ.items() if not key.startswith(("REPVGG_", "VIRTUAL_ENV", "PYTHON"))
        }
        self.environment = {
            **kept,
            "PATH": f"{self.base / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin",
            "HOME": str(folder),
        }
        self.variables: dict[str, str] = {}
        self.work = folder
        self.ran: list[int] = []

    def build(self) -> None:
        """All instructions in turn; `ran` holds the lines of those RUN that were run."""
        for instruction in self.instructions:
            if instruction.name == "RUN":
                self.run(instruction.value)
                self.ran.append(instruction.line)
                continue
            step = getattr(self, f"_{instruction.name.lower()}", None)
            if step is not None:
                step(instruction.value)

    def start(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """The ENTRYPOINT with a command, or with CMD; the image's own paths in what is given are moved, too."""
        entry, usual = (
            next((i.words for i in reversed(self.instructions) if i.name == name), []) for name in ("ENTRYPOINT", "CMD")
        )
        words = [self._move(word) for word in (*entry, *(command or usual))]
        moved = {key: self._move(value) for key, value in environment.items()}
        words[0] = shutil.which(words[0], path=self.environment["PATH"]) or words[0]
        return subprocess.run(
            words,
            env={**self.environment, **moved},
            cwd=self.work,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    def _move(self, text: str) -> str:
        return _PATH.sub(f"{self.folder}/", text)

    def _expand(self, text: str) -> str:
        values = {**self.environment, **self.variables}
        return re.sub(r"\$\{?(\w+)\}?", lambda found: values.get(found[1], ""), text)

    def _arg(self, value: str) -> None:
        key, _, default = value.partition("=")
        self.variables[key] = self.arguments.get(key, self.variables.get(key) or self._expand(default.strip('"')))

    def _env(self, value: str) -> None:
        for pair in shlex.split(value):
            key, _, text = pair.partition("=")
            self.environment[key] = self._move(self._expand(text))

    def _workdir(self, value: str) -> None:
        self.work = self.folder / value.lstrip("/")
        self.work.mkdir(parents=True, exist_ok=True)

    def _copy(self, value: str) -> None:
        if value.startswith("--from="):  # the stages share one root
            _, source, target = value.split()
            assert source == target
            assert Path(self._move(source)).exists(), value
            return
        *sources, target = value.split()
        into = Path(self._move(target)) if target.startswith("/") else self.work / target
        for original in map(ROOT.joinpath, sources):
            if original.is_dir():
                shutil.copytree(original, into, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                place = into / original.name if target.endswith("/") else into
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(original, place)

    def run(self, value: str) -> None:
        """A RUN line.

        Raises:
            RunError: It failed.
        """
        owner = f"-o {os.getuid()} -g {os.getgid()}"  # only root may give files away
        command = self._move(value).replace("-o 1000 -g 1000", owner)
        environment: Mapping[str, str] = {**self.environment, **self.variables}
        done = subprocess.run(
            ["sh", "-c", command],
            env=environment,
            cwd=self.work,
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
        )
        if done.returncode:
            raise RunError(f"{value}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


class RunError(Exception):
    """A RUN line failed."""


def python_version() -> str:
    return f"{sys.version_info[0]}.{sys.version_info[1]}"
