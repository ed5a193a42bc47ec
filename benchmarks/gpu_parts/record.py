"""The results of `benchmarks/gpu.py`, written after every stage; the next run on the machine goes on with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from repvgg_deploy.errors import InputError
from repvgg_deploy.files.output import write_text

_SAME = ("gpu", "flavour")
_KEPT = ("peak", "plans", "failures", "broke_off", "seconds")


class Record:
    """What was measured so far.

    Args:
        path: The JSON; what it holds of the same GPU and TensorRT is kept, also of another driver.
        machine: Where this run takes place.
        copy: A second file that is written, too, and read where it holds more: the first may be of another checkout.
        anew: Leave out what the files hold.

    Raises:
        InputError: The file is of another machine, or no such file.
    """

    def __init__(self, path: Path, machine: dict[str, Any], *, copy: Path | None = None, anew: bool = False) -> None:
        self.path = path
        self._paths = [path] if copy is None else [path, copy]
        self.result: dict[str, Any] = {
            "machine": machine, "peak": {}, "plans": {}, "failures": {}, "broke_off": [], "seconds": {},
        }  # fmt: skip
        known = [] if anew else [(one, _read(one)) for one in self._paths if one.exists()]
        if known:
            self._go_on(*max(known, key=lambda found: len(found[1].get("seconds", ()))))  # the first of equal ones

    def _go_on(self, path: Path, known: dict[str, Any]) -> None:
        old, new = known.get("machine", {}), self.result["machine"]
        differ = [name for name in _SAME if old.get(name) != new[name]]
        if old.get("versions", {}).get("tensorrt") != new["versions"]["tensorrt"]:
            differ.append("TensorRT")
        if differ:
            raise InputError(
                f"{path}: is of another {', '.join(differ)}", remedy="give another --out, or --anew to write over it"
            )
        self.result.update({name: known[name] for name in _KEPT if name in known})

    def begin(self, name: str) -> None:
        """Writes that a stage has begun.

        A crash of TensorRT leaves no other trace, and would come again in every run before all that is left.
        """
        if name not in self.result["broke_off"]:
            self.result["broke_off"].append(name)
        self.save()

    def end(self, name: str, seconds: float, problem: str = "") -> None:
        """A stage is over: well, or for a reason that is kept until it is well."""
        self.result["seconds"][name] = seconds
        self.result["failures"].pop(name, None)
        if problem:
            self.result["failures"][name] = problem
        if name in self.result["broke_off"]:
            self.result["broke_off"].remove(name)

    def rank(self, name: str) -> int:
        """When a stage's turn comes: what is new, what failed before, what ended the program before."""
        return 2 if name in self.result["broke_off"] else int(name in self.result["failures"])

    def longest_seconds(self) -> float:
        """Of the stages so far, in this run or before; 0 where there was none."""
        return max(self.result["seconds"].values(), default=0.0)

    def add_plan(self, name: str, row: dict[str, Any]) -> None:
        """The row of a plan, to be filled; says with which driver it is."""
        self.result["plans"][name] = row
        row["driver"] = self.result["machine"]["driver"]

    def is_done(self, name: str) -> bool:
        """Whether a plan was measured to the end, by this run or one before."""
        return bool(self.result["plans"].get(name, {}).get("done"))

    def save(self) -> None:
        """Writes what there is."""
        text = json.dumps(self.result, indent=1, ensure_ascii=False, default=str) + "\n"
        for path in self._paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, text, force=True)


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
