"""The exception tree of the project.

    RepVGGDeployError(message, *, remedy)      every error we raise on purpose
    ├── CheckpointError                        a checkpoint cannot be read, is incomplete, or is of another network
    ├── ExportError                            a model cannot be written as the ONNX that we promise
    │   ├── SimplifyError                      onnxsim failed or changed the model
    │   └── ContractError                      nodes are left that the graph contract does not allow
    ├── ParityError                            two models that must agree do not
    ├── CalibrationError                       quantization scales cannot be chosen
    ├── BuildError                             TensorRT refused to build a plan
    ├── PlanError                              a plan cannot be read
    │   └── PlanIncompatibleError              a plan was made for another GPU or TensorRT
    ├── ModelError                             an ONNX file is truncated, changed or not one of ours
    │   └── ForeignModelError                  repvgg-export did not write it, so that nothing is known of it
    ├── InputError (ValueError)                an argument, image or batch is not what is expected
    ├── ArtifactError (OSError)                an output cannot be written, or exists already
    ├── EngineBusyError                        more requests wait than may: back-pressure, try again later
    ├── DeadlineError (TimeoutError)           a request waited past its deadline and was not run
    ├── CudaError                              a CUDA call failed, or a GPU was asked for and is not there
    │   ├── CudaMemoryError                    GPU memory ran out: the Engine stays usable
    │   └── CudaContextError                   the GPU's state in this process is lost: only a new process helps
    └── MissingDependencyError (ImportError)   an optional package is not installed

A message says what, where, expected against found; the remedy is the command or change that fixes it.
"""

from __future__ import annotations

import importlib.util
import unicodedata

_TURNING = frozenset(map(chr, (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))))
"""They change the direction in which their neighbours are shown."""
_JOINERS = "\u200c\u200d"


def clean_text(text: str, *, lines: bool = False) -> str:
    """Text of a file as it may be printed, logged or written into labels: the one place that decides what that is.

    Controls (of terminals, too) and what turns the direction of writing become `?`, half a surrogate pair its number;
    what is not seen at all goes, but joiners between letters that are not ASCII, as Persian has them. Line ends and
    tabs become spaces, unless `lines` says that these are our own.
    """
    if text.isprintable():
        return text
    return "".join(_clean(text, index, lines) for index in range(len(text)))


def _clean(text: str, index: int, lines: bool) -> str:
    letter = text[index]
    if letter.isprintable() or (lines and letter in "\n\t"):
        return letter
    if letter in _JOINERS:
        around = text[index - 1 : index] + text[index + 1 : index + 2]
        return letter if len(around) == 2 and not any(map(str.isascii, around)) else ""
    category = unicodedata.category(letter)
    if letter in "\n\t\r\v\f\x85\u2028\u2029":
        return " "
    if category == "Cs":
        return f"\\u{ord(letter):04x}"
    if category == "Cf" and letter not in _TURNING:
        return ""
    return "?" if category in ("Cc", "Cf") else letter


class RepVGGDeployError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: What went wrong, where, what was expected and what was found.
        remedy: The command or change that fixes it; never empty.
    """

    def __init__(self, message: str, *, remedy: str) -> None:
        assert remedy.strip(), "every error needs a remedy"
        message, remedy = clean_text(message, lines=True), clean_text(remedy, lines=True)
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n  remedy: {self.remedy}"

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments are lost by the default protocol, and worker processes send errors home.
        return (_rebuild, (type(self), self.message, self.remedy))


def _rebuild(kind: type[RepVGGDeployError], message: str, remedy: str) -> RepVGGDeployError:
    return kind(message, remedy=remedy)


def say_install(extras: str) -> str:
    """The command that installs extras, such as `export,cpu`. The package is in no registry: it works from a clone."""
    return f"pip install '.[{extras}]' in the repository's folder"


class CheckpointError(RepVGGDeployError):
    """A checkpoint cannot be read, is incomplete, or is of another network."""


class ExportError(RepVGGDeployError):
    """A model cannot be written as the ONNX that we promise."""


class SimplifyError(ExportError):
    """onnxsim failed, or changed the model."""


class ContractError(ExportError):
    """The graph holds something that the graph contract does not allow."""


class ParityError(RepVGGDeployError):
    """Two models that must agree do not."""


class CalibrationError(RepVGGDeployError):
    """Quantization scales cannot be chosen."""


class BuildError(RepVGGDeployError):
    """TensorRT refused to build a plan."""


class PlanError(RepVGGDeployError):
    """A plan cannot be read."""


class PlanIncompatibleError(PlanError):
    """A plan was made for another GPU or another TensorRT."""


class ModelError(RepVGGDeployError):
    """An ONNX file is truncated, changed since its export, or not one of ours."""


class ForeignModelError(ModelError):
    """An ONNX file that repvgg-export did not write, so that nothing is known of it."""


class InputError(RepVGGDeployError, ValueError):
    """An argument, an image or a batch is not what is expected."""


class ArtifactError(RepVGGDeployError, OSError):
    """An output cannot be written, or exists already."""


class EngineBusyError(RepVGGDeployError):
    """More requests wait than may: try again later."""


class DeadlineError(RepVGGDeployError, TimeoutError):
    """A request waited past its deadline and was not run."""


class CudaError(RepVGGDeployError):
    """A CUDA call failed, or a GPU was asked for and is not there."""


class CudaMemoryError(CudaError):
    """GPU memory ran out. The Engine stays usable."""


class CudaContextError(CudaError):
    """The GPU's state in this process is lost: every further call fails until the process is restarted."""


class MissingDependencyError(RepVGGDeployError, ImportError):
    """An optional package is not installed."""


EXTRAS = {
    "torch": "export",
    "onnxscript": "export",
    "onnxsim": "export",
    "safetensors": "export",
    "onnx": "quantize",
    "onnxruntime": "cpu",
    "PIL": "cpu",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "rtx",
    "pycuda": "pycuda",
    "google": "serving",
    "tritonclient": "serving",
    "prometheus_client": "service",
    "matplotlib": "plot",
    "huggingface_hub": "hub",
}
"""The extra that brings each optional package. (Of `cpu`, a machine with an NVIDIA GPU takes `gpu` in its place.)"""


def explain_missing(error: ImportError, module: str = "") -> MissingDependencyError | None:
    """A failed import of an optional package as the error that says which extra brings it; None for other imports.

    Args:
        error: The failed import.
        module: Which module of ours asked for it: those of `export` need all of their extra.
    """
    package = (error.name or "").partition(".")[0]
    extra = EXTRAS.get(package)
    if extra is None:
        return None
    if extra == "quantize" and ".export." in module:
        extra = "export"
    # Only an ONNX Runtime that is not there is added: those of `cpu` and `gpu` share one folder.
    if extra in ("export", "quantize") and importlib.util.find_spec("onnxruntime") is None:
        extra += ",cpu"
    reason = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be imported: {error}"
    return MissingDependencyError(f"this needs {package}, which {reason}", remedy=say_install(extra))
