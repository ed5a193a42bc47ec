"""Files of class names: one a line, with their numbers before or behind them, JSON, or a Python dict.

What is not one of these is refused by its name: a label that is off by one is worse than none.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError, clean_text
from .formats import read_text

_REMEDY = "give a UTF-8 text file with one label a line, in the classifier's order"
_WRAPPERS = ("id2label", "label2id", "class_to_idx", "idx_to_class", "names", "labels", "classes", "categories")
_NUMBER_FIRST = re.compile(r"(\d{1,9})(?:[.)]\s+|\s*[:=,;]\s*|\s+)(\S.*)")
_NUMBER_LAST = re.compile(r"(\S.*?)(?:\s*[:=,;]\s*|\s+)(\d{1,9})")
_MOST_VALUES = 1 << 20
_JOINERS = "\u200c\u200d"  # between letters of some scripts, and of emoji
_HEADER = frozenset({"id", "index", "idx", "number", "class", "label", "name"}) | {
    f"{what}_{which}" for what in ("class", "label") for which in ("id", "index", "name")
}


def read_labels(path: Path) -> tuple[str, ...]:
    """Class names in the classifier's order.

    Args:
        path: A text file in UTF-8: a name a line, where a blank line is a class without a name; `0 name` or `name: 0`
            on every line; JSON or a Python literal: a list of names, or a dict from numbers to names or from names to
            numbers (`class_index.json`, `id2label`, `class_to_idx`).

    Raises:
        InputError: It cannot be read, is of another format, its numbers do not count from 0, or a name holds control
            characters.
    """
    text = read_text(path, "labels", _REMEDY)
    return require_printable(_parse(text, str(path)), str(path))


def require_printable(labels: Sequence[str], where: str) -> tuple[str, ...]:
    """The labels, if none would do something to a terminal.

    Raises:
        InputError: One holds control characters.
    """
    for index, label in enumerate(labels):
        bad = next((c for c in label if c not in _JOINERS and clean_text(c) != c), None)
        if bad is not None:
            raise InputError(
                f"{where}: the label of class {index} holds a control character, U+{ord(bad):04X}: {ascii(label)[:80]}",
                remedy="remove it: labels are printed as they are",
            )
    return tuple(labels)


def _parse(text: str, where: str) -> list[str]:
    stripped = text.strip()
    first = stripped.partition("\n")[0].rstrip()
    if stripped[:1] in ("[", "{"):
        found = _read_literal(stripped, where)
        if found is not None:
            return found
        alone = "\n" in stripped and first[-1:] == {"[": "]", "{": "}"}[first[0]]  # a name such as [background]
        if not alone:
            raise _refuse(where, "begins as JSON or a Python dict does, and is neither, or is cut off")
    for looks, what in (
        (first == "---" or first.endswith(":"), "YAML"),
        (first.endswith(("{", "[", "(")), "program text or a protobuf text"),
        (re.match(r"\w+ *= *[\[{(]", first) is not None, "program text"),
    ):
        if looks:
            raise _refuse(where, f"looks like {what}")
    # Only at line ends, and tabs become spaces: other separators are control characters, and are seen as such.
    lines = [re.sub(r"[ \t]+", " ", line).strip(" ") for line in re.split(r"\r\n|\n|\r", text.rstrip("\r\n \t"))]
    return _take_numbers(lines, where) or lines


def _refuse(where: str, why: str) -> InputError:
    return InputError(f"{where}: {why}", remedy=_REMEDY)


def _read_literal(text: str, where: str) -> list[str] | None:
    """The names in JSON or a Python literal; None where the text is neither."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise _refuse(where, "has a key twice")
        return dict(pairs)

    if sum(map(text.count, "[{(,")) > _MOST_VALUES:
        raise _refuse(where, f"holds more than {_MOST_VALUES:,} values")
    readers: tuple[Callable[[str], Any], ...] = (lambda t: json.loads(t, object_pairs_hook=once), ast.literal_eval)
    for read in readers:
        try:
            return _read_value(read(text), where)
        except InputError:
            raise
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return None


def _read_value(value: Any, where: str) -> list[str]:
    if isinstance(value, (list, tuple)):
        names = [_name_of(item) for item in value]
        if value and None not in names:
            return [str(name) for name in names]
        if value and all(isinstance(item, dict) and {"id", "name"} <= set(item) for item in value):
            return _in_order([(item["id"], item["name"]) for item in value], where)
    if isinstance(value, Mapping) and value:
        wrapped = next((key for key in _WRAPPERS if isinstance(value.get(key), (dict, list))), None)
        if wrapped is not None:
            return _read_value(value[wrapped], where)
        names = [_name_of(item) for item in value.values()]
        if all(_is_number(key) for key in value) and None not in names:
            return _in_order(list(zip(value, names, strict=True)), where)
        if all(_is_number(item) and not isinstance(item, str) for item in value.values()):
            return _in_order([(number, name) for name, number in value.items()], where)
    raise _refuse(where, "holds JSON or a Python literal that is no list of names and no dict of names and numbers")


def _name_of(item: Any) -> str | None:
    """A name, or the last of `[WordNet id, name]` as Keras has them."""
    if isinstance(item, (list, tuple)) and len(item) == 2 and all(isinstance(part, str) for part in item):
        return str(item[1])
    return item if isinstance(item, str) else None


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        return value.isascii() and value.isdecimal() and len(value) < 10
    return isinstance(value, int) and not isinstance(value, bool)


def _in_order(pairs: Sequence[tuple[Any, Any]], where: str) -> list[str]:
    """Names by their numbers, which must count from 0.

    Raises:
        InputError: They do not.
    """
    by_number = {int(number): name for number, name in pairs if _is_number(number)}
    if sorted(by_number) != list(range(len(pairs))):
        low, high = min(by_number, default=0), max(by_number, default=0)
        raise _refuse(where, f"numbers {len(pairs)} classes from {low} to {high}, expected 0 to {len(pairs) - 1}")
    return [str(by_number[number]) for number in range(len(pairs))]


def _take_numbers(lines: Sequence[str], where: str) -> list[str] | None:
    """The names of lines that all bear the number of their class; None where they do not.

    Numbers from 0 count classes, unless they are what tells the names apart (`digit 0`, `2 stars`). Those that begin
    at 0 or 1 and do not count from 0 are refused: as parts of the names they would hide that a label is off by one.
    Others are parts of the names (`Audi 100`).
    """
    has_header = len(lines) > 1 and set(re.split(r"[\s,;:]+", lines[0].casefold())) <= _HEADER
    found, contradicts = [], []
    for pattern, number, name in ((_NUMBER_FIRST, 1, 2), (_NUMBER_LAST, 2, 1)):
        matches = [pattern.fullmatch(line) for line in lines[has_header:]]
        pairs = [(int(match[number]), _unquote(match[name])) for match in matches if match is not None]
        if len(pairs) < len(matches) or len({text for _, text in pairs}) < len(pairs):
            continue
        numbers = [index for index, _ in pairs]
        if sorted(numbers) == list(range(len(pairs))):
            found.append(_in_order(pairs, where))
        elif min(numbers) <= 1:  # beside numbers from 0 only those that ask for another order matter
            contradicts.append(sorted(numbers) == list(range(1, len(pairs) + 1)) != numbers)
    if any(contradicts) or (contradicts and not found):
        raise InputError(
            f"{where}: each line bears a number, and they do not count the classes from 0",
            remedy="number the classes from 0, or give the names alone; names that hold numbers may stand in a JSON "
            'list: ["1 star", "2 stars"]',
        )
    if len(found) == 2 and found[0] != found[1]:
        raise _refuse(where, "has two numbers on each line, and either could be that of the class")
    return found[0] if found else None


def _unquote(text: str) -> str:
    text = text.strip()
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text
