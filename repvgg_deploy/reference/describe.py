"""What a file is, in words: for `repvgg-export --describe`. Also says what a file is that cannot be loaded."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from ..files.output import default_output, sha256_file
from ..specs.values import Form, VariantSpec
from ..specs.variants import count_parameters
from .checkpoint import load_file
from .completeness import describe_custom
from .readers import check_file, open_binary, read_file


@dataclass(frozen=True, slots=True)
class Description:
    """What a file is.

    Attributes:
        file: The path as given.
        bytes: Its size.
        sha256: Of its bytes.
        container: Such as `torch zip`; None where it is none that we read.
        wrapper: Path of keys to the state dict; empty where the file is one; None where none was found.
        family: Which implementation's names it has.
        form: Training or deploy.
        variant: Published name, or a custom variant in words.
        classes: Rows of the classifier.
        parameters: Learned parameters in this form, auxiliary heads aside.
        spec: The architecture.
        labels: Names of the classes, where the file has them.
        notes: What was found, chosen or assumed.
        problem: Why it cannot be exported; None where it can.
        remedy: What to do about it.
        command: The command that exports it; None where it cannot be exported.
    """

    file: str
    bytes: int
    sha256: str
    container: str | None = None
    wrapper: str | None = None
    family: str | None = None
    form: Form | None = None
    variant: str | None = None
    classes: int | None = None
    parameters: int | None = None
    spec: VariantSpec | None = None
    labels: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    problem: str | None = None
    remedy: str | None = None
    command: str | None = None

    @property
    def loadable(self) -> bool:
        """Whether it can be exported."""
        return self.problem is None


def describe_checkpoint(path: Path | str) -> Description:
    """Says what a file is, whether or not it is a RepVGG checkpoint.

    Raises:
        CheckpointError: There is no such file, it is a folder, empty, or cannot be opened.
    """
    target = Path(path)
    check_file(target)
    open_binary(target).close()
    try:
        loaded = load_file(target)
    except CheckpointError as error:
        problem = error.message.removeprefix(f"{target}: ")
        return Description(str(path), target.stat().st_size, sha256_file(target), _container(target), problem=problem, remedy=error.remedy)
    checkpoint = loaded.checkpoint
    spec = checkpoint.spec
    return Description(
        file=str(path),
        bytes=target.stat().st_size,
        sha256=checkpoint.sha256,
        container=loaded.container,
        wrapper=loaded.wrapper,
        family=checkpoint.family,
        form=checkpoint.form,
        variant=describe_custom(spec) if spec.name == "custom" else spec.name,
        classes=spec.num_classes,
        parameters=count_parameters(spec, checkpoint.form),
        spec=spec,
        labels=checkpoint.labels,
        notes=checkpoint.notes,
        command=export_command(target),
    )


def export_command(path: Path) -> str:
    """The command that exports a checkpoint to an ONNX beside it."""
    return shlex.join(["repvgg-export", "--ckpt", str(path), "--out", str(default_output(path))])


def _container(path: Path) -> str | None:
    try:
        return read_file(path).container
    except CheckpointError:
        return None
