"""`repvgg-trt doctor`: what this machine has, what works on it, and what installs the rest."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .common import Command, Output, show_bytes
from .terminal import format_pairs

if TYPE_CHECKING:
    from ..measure.environment import EnvironmentReport


def add_options(parser: argparse.ArgumentParser) -> None:
    """There are none of its own."""


def execute(args: argparse.Namespace) -> Output:
    """Looks at the machine; what is missing or wrong is the answer, and no error of the command."""
    from dataclasses import asdict

    from ..measure.environment import examine

    report = examine()
    return Output(data=asdict(report), text=_as_text(report))


def _as_text(report: EnvironmentReport) -> str:
    gpus = [
        f"{gpu.name}, compute capability {gpu.compute_capability}, {show_bytes(gpu.memory_bytes)}, driver "
        f"{gpu.driver_version or 'of unknown version'}, CUDA {gpu.cuda_version}"
        for gpu in report.gpus
    ]
    pairs = [
        ("repvgg-deploy", report.version),
        ("Python", report.python),
        ("system", report.system),
        ("processor", report.processor),
        ("it has", ", ".join(report.features) or "nothing that makes INT8 or bfloat16 fast, or does not say"),
        ("GPU", "\n".join(gpus) or f"none: {report.no_gpu}"),
        ("ONNX Runtime", ", ".join(report.providers) or "not installed"),
        ("cache", report.cache),
    ]
    packages = [f"{name} {version}" for name, version in report.packages.items()]
    works = [f"  yes  {ability.name}" for ability in report.abilities if not ability.missing]
    fails = [
        f"  no   {ability.name}: {ability.missing}\n       {ability.remedy}"
        for ability in report.abilities
        if ability.missing
    ]
    problems = [f"wrong: {problem}" for problem in report.problems]
    lines = [format_pairs(pairs), "", "packages: " + ", ".join(packages), "", "what works here", *works, *fails]
    return "\n".join([*lines, *([""] if problems else []), *problems])


COMMAND = Command(
    "doctor",
    "say what this machine has and what works on it",
    "Lists Python, packages, processor features, GPUs and drivers, and which commands work here; for what does not, "
    "what helps. With --json it is what a report of a problem should hold.",
    add_options,
    execute,
)
