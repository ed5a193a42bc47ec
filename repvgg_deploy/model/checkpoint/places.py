"""Where a checkpoint may stand beside one file: shards with an index, folders of distributed training, addresses.

What is not read is named as what it is, with the line that makes a checkpoint of it.
Source: https://github.com/huggingface/transformers (`….index.json`, `weight_map`),
torch/distributed/checkpoint/filesystem.py (https://github.com/pytorch/pytorch), DeepSpeed's `zero_to_fp32.py`
(https://github.com/deepspeedai/DeepSpeed), joblib/numpy_pickle.py (https://github.com/joblib/joblib).
"""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from urllib.parse import unquote

from ...errors import CheckpointError
from .lazy import printable

_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}(?P<suffix>\.(?:safetensors|bin|pth|pt))\Z")
_SCHEMES = r"[a-z][a-z\d+.-]+(?=:/)|file|hf|hf-hub|hf_hub|local-dir|mlflow|timm|wandb"  # one letter is a drive
_ADDRESS = re.compile(rf"(?P<scheme>{_SCHEMES}):(?P<rest>.+)", re.IGNORECASE)
_SUFFIXES = (".pth", ".pt", ".tar", ".safetensors", ".pdparams", ".bin", ".ckpt", ".index.json")
_MAX_INDEX = 4 << 20  # JSON takes up to twenty times its size in memory
_DCP = "a checkpoint of torch.distributed.checkpoint (DCP)"


def find_index(path: Path) -> Path | None:
    """The index of a sharded checkpoint, given itself or one of its shards; None for any other file."""
    if path.name.endswith(".index.json"):
        return path
    match = _SHARD.match(path.name)
    if match is None:
        return None
    index = path.with_name(f"{match['stem']}{match['suffix']}.index.json")
    if os.path.exists(path) and not os.path.exists(index):
        raise CheckpointError(
            f"{path}: is one shard of several, and their index {index.name} is not beside it",
            remedy=f"put {index.name} and every shard into one folder",
        )
    return index if os.path.exists(index) else None


def read_index(index: Path) -> list[str]:
    """The names of the shards, in order.

    Raises:
        CheckpointError: It is missing or no index.
    """
    refuse_no_file(index)
    problem = "it is too large"
    shards: list[str] = []
    try:
        if index.stat().st_size <= _MAX_INDEX:
            named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            problem = "its weight_map does not name files beside it"
            shards = sorted({name for name in named if isinstance(name, str) and Path(name).name == name})
            if shards and len(shards) == len(set(named)):
                return shards
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = printable(str(error))
    raise CheckpointError(
        f"{index}: is no index of a sharded checkpoint ({problem})",
        remedy="give the index as it was saved, with its weight_map, or a checkpoint file",
    )


def refuse_no_file(path: Path) -> None:
    """Refuses what is no file that can be read at any place, saying what it is.

    Raises:
        CheckpointError: It is missing, an address, a folder, a device or pipe, or empty.
    """
    if not os.path.exists(path):  # which raises nothing where a name is too long, or a folder may not be entered
        if (address := _ADDRESS.match(str(path))) is not None:
            raise _name_address(address["scheme"], address["rest"])
        raise CheckpointError(f"{path}: there is no such file", remedy="check the path given as --ckpt")
    if path.is_dir():
        raise _name_folder(path)
    if not path.is_file():
        remedy = "write it to a file first: a checkpoint is read out of order"
        raise CheckpointError(f"{path}: is a device or pipe, expected a file", remedy=remedy)
    if path.stat().st_size == 0:
        remedy = "save or copy it again: an interrupted copy leaves such a file"
        raise CheckpointError(f"{path}: is empty (0 bytes)", remedy=remedy)


def _name_address(scheme: str, rest: str) -> CheckpointError:
    """What an address is; pathlib made one slash of two."""
    whole = f"{scheme}:/{rest}" if rest.startswith("/") else f"{scheme}:{rest}"
    how = f"curl -LO {shlex.quote(whole)}" if scheme.lower().startswith("ftp") else "with its own program"
    remedy = f"download it first ({how}), then give the file"
    if scheme.lower() in ("hf", "timm"):
        remedy = "give hf-hub:ORG/NAME, such as hf-hub:timm/repvgg_a0.rvgg_in1k"
    if scheme.lower() in ("file", "local-dir"):
        local = re.sub(r"^/localhost(?=/)", "", unquote(rest))
        remedy = f"give its path alone: {shlex.quote(local)}"
    return CheckpointError(f"{whole}: is an address ({scheme}), expected a file", remedy=remedy)


def _name_folder(path: Path) -> CheckpointError:
    names = sorted(child.name for child in path.iterdir())
    if ".metadata" in names:
        return CheckpointError(f"{path}: is {_DCP}", remedy=_convert_dcp(path))
    if "zero_to_fp32.py" in names or any(name.startswith("global_step") for name in names):
        return CheckpointError(
            f"{path}: is a folder of DeepSpeed, which keeps the weights in the files of its ranks",
            remedy=f"cd {shlex.quote(str(path))} && python zero_to_fp32.py . model.pth, then give that model.pth",
        )
    if "data.pkl" in names:
        return CheckpointError(
            f"{path}: is an unpacked torch checkpoint",
            remedy="zip it again without compression (zip -0), or give the file",
        )
    inside = [name for name in names if name.endswith(_SUFFIXES)]
    inside.sort(key=lambda name: not name.endswith(".index.json"))
    remedy = f"give a file in it, such as {path / (inside[0] if inside else 'model.pth')}"
    return CheckpointError(f"{path}: is a folder, expected a checkpoint file", remedy=remedy)


def _convert_dcp(folder: Path) -> str:
    call = f"dcp_to_torch_save({str(folder)!r}, 'model.pth')"
    return f"from torch.distributed.checkpoint.format_utils import dcp_to_torch_save; {call}"


def refuse_distributed(path: Path) -> None:
    """Refuses one shard of a distributed checkpoint.

    Raises:
        CheckpointError: It is one.
    """
    if path.suffix == ".distcp":
        raise CheckpointError(f"is one shard of {_DCP}", remedy=_convert_dcp(path.parent))


def refuse_joblib(path: Path, head: bytes) -> None:
    """Refuses what joblib.dump wrote: arrays between the opcodes of a pickle, or that compressed.

    Raises:
        CheckpointError: It is such a file.
    """
    packed = len(head) > 2 and head[0] == 0x78 and (head[0] << 8 | head[1]) % 31 == 0
    if packed or (head[:1] == b"\x80" and b"joblib.numpy_pickle" in head) or path.suffix == ".joblib":
        what = "a zlib stream, such as joblib.dump(…, compress=…) writes" if packed else "a dump of joblib"
        raise CheckpointError(
            f"is {what}",
            remedy="where you trust its source: torch.save({k: torch.as_tensor(v) for k, v in "
            "joblib.load('FILE').items()}, 'model.pth')",
        )
