"""The results file of `benchmarks/gpu.py`, written after every stage; the next run on the machine goes on with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from repvgg_deploy.errors import InputError
from repvgg_deploy.files.output import write_text

_SAME = ("gpu", "flavour", "driver")


class Record:
    """What was measured so far.

    Args:
        path: The JSON; what it holds of the same GPU, driver and TensorRT is kept.
        machine: Where this run takes place.
        anew: Leave out what the file holds.

    Raises:
        InputError: The file is of another machine, or no such file.
    """

    def __init__(self, path: Path, machine: dict[str, Any], *, anew: bool = False) -> None:
        self.path = path
        self.result: dict[str, Any] = {"machine": machine, "peak": {}, "plans": {}, "failures": {}, "broke_off": []}
        if path.exists() and not anew:
            self._go_on(_read(path))

    def _go_on(self, known: dict[str, Any]) -> None:
        old, new = known.get("machine", {}), self.result["machine"]
        differ = [name for name in _SAME if old.get(name) != new[name]]
        if old.get("versions", {}).get("tensorrt") != new["versions"]["tensorrt"]:
            differ.append("TensorRT")
        if differ:
            raise InputError(
                f"{self.path}: is of another {', '.join(differ)}",
                remedy="give another --out, or --anew to write over it",
            )
        for name in ("peak", "plans"):
            self.result[name] = known.get(name, {})
        self.result["broke_off"] = known.get("broke_off", [])

    def begin(self, name: str) -> None:
        """Writes that a stage has begun.

        A crash of TensorRT leaves no other trace, and would come again in every run before all that is left.
        """
        if name not in self.result["broke_off"]:
            self.result["broke_off"].append(name)
        self.save()

    def end(self, name: str) -> None:
        """A stage is over, well or not."""
        if name in self.result["broke_off"]:
            self.result["broke_off"].remove(name)

    def is_done(self, name: str) -> bool:
        """Whether a plan was measured to the end, by this run or one before."""
        return bool(self.result["plans"].get(name, {}).get("done"))

    def save(self) -> None:
        """Writes what there is."""
        text = json.dumps(self.result, indent=1, ensure_ascii=False, default=str) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, text, force=True)


def find_peak(folder: Path, gpu: str) -> dict[str, Any] | None:
    """The matrix peak that another run measured on the same kind of GPU.

    Where TensorRT 8.5 runs there may be no torch to measure it with.
    """
    for path in sorted(folder.glob("gpu-*.json")):
        try:
            known = _read(path)
        except InputError:
            continue
        if known.get("machine", {}).get("gpu") == gpu and known.get("peak", {}).get("fp16_tflops"):
            return {"fp16_tflops": known["peak"]["fp16_tflops"], "source": f"{known['peak']['source']}, in {path.name}"}
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be read as a result of this program: {error}", remedy="give another --out, or --anew"
        ) from error
    if not isinstance(known, dict):
        raise InputError(f"{path}: is not a result of this program", remedy="give another --out, or --anew")
    return known
