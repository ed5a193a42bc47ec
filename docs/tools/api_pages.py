"""The API reference from docstrings: `::: repvgg_deploy.NAME` in a page becomes signature, text and members."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).resolve().parents[2]
_DIRECTIVE = re.compile(r"^::: (?P<path>repvgg_deploy[\w.]*)$", re.M)
_WIDTH = 76
_READ: Any = {"warn_unknown_params": True, "returns_named_value": False, "returns_multiple_items": False}


@functools.cache
def _package() -> Any:
    """The package's source, read and not run."""
    return griffe.load(
        "repvgg_deploy", search_paths=[str(ROOT)], docstring_parser="google", docstring_options=_READ,
    )  # fmt: skip


def find_names(pages: dict[str, str]) -> dict[str, str]:
    """Page and anchor by the last part of the name, for each class and function that a page documents."""
    names: dict[str, str] = {}
    for page, text in pages.items():
        for found in _DIRECTIVE.finditer(text):
            item = _find(found["path"])
            shown = _members(item) if item.kind.value == "module" else [item]
            prefix = f"{found['path']}." if item.kind.value == "module" else found["path"].rpartition(".")[0] + "."
            names |= {each.name: f"{page}#{prefix}{each.name}" for each in shown}
    return names


def insert(text: str, page: str, names: dict[str, str]) -> str:
    """A page with its directives replaced; a module shows its public members and no heading of its own."""

    def replace(found: re.Match[str]) -> str:
        path = found["path"]
        item = _find(path)
        if item.kind.value == "module":
            lines = [line for each in _members(item) for line in _describe(each, f"{path}.{each.name}", 2)]
        else:
            lines = list(_describe(item, path, 3))
        return _link_types("\n".join(lines), page, names)

    return _DIRECTIVE.sub(replace, text)


def _find(path: str) -> Any:
    item = _package()[path.removeprefix("repvgg_deploy.")]
    return item.final_target if item.is_alias else item


def _members(item: Any) -> list[Any]:
    """Public and documented, in the order of the source; what a module imports is not its own."""
    return [
        each for name, each in item.members.items()
        if not name.startswith("_") and not each.is_alias and each.docstring is not None
    ]  # fmt: skip


def _describe(item: Any, path: str, level: int) -> Iterator[str]:
    """Markdown of a class, function or property."""
    kind = item.kind.value
    assert item.docstring is not None, f"{path} has no docstring"
    yield f"{'#' * level} `{item.name}` {{ #{path} }}\n"
    sections = item.docstring.parsed
    fields = [section for section in sections if section.kind.value == "attributes"]
    if kind == "attribute":  # a property: its type stands before its text
        text, *sections = sections
        yield f"`{_type(item.annotation)}`{{ .type }}: {_text(text.value)}\n"
    elif not fields or "dataclass" not in item.labels:
        yield f"```python\n{_signature(item)}\n```\n"
    for section in sections:
        yield from _section(section, item)
    if kind == "class":
        for each in _members(item):
            if each.kind.value == "function" or "property" in each.labels:
                yield from _describe(each, f"{path}.{each.name}", level + 1)


def _section(section: Any, item: Any) -> Iterator[str]:
    kind, value = section.kind.value, section.value
    if kind == "text":
        yield f"{_text(value)}\n"
    elif kind == "admonition":  # Source: …
        yield f"*{value.kind.capitalize()}:* {_text(value.contents)}\n"
    elif kind in ("parameters", "attributes"):
        yield {"parameters": "Takes:\n", "attributes": "Fields:\n" if "dataclass" in item.labels else "Attributes:\n"}[
            kind
        ]
        defaults = {each.name: each.default for each in getattr(item, "parameters", ())}
        for each in value:
            default = defaults.get(each.name) if kind == "attributes" else None
            annotation = each.annotation if kind == "attributes" else None
            shown = [
                f"`{_type(annotation)}`{{ .type }}" if annotation else "",
                f"default `{default}`" if default else "",
            ]
            extra = ", ".join(filter(None, shown))
            yield f"- `{each.name}`{f' ({extra})' if extra else ''}: {_item(each.description)}"
        yield ""
    elif kind in ("returns", "yields"):
        yield {"returns": "Returns:\n", "yields": "Yields:\n"}[kind]
        for each in value:
            yield f"- {f'`{_type(each.annotation)}`{{ .type }}: ' if each.annotation else ''}{_item(each.description)}"
        yield ""
    elif kind == "raises":
        yield "Raises:\n"
        for each in value:
            yield f"- `{each.annotation}`: {_item(each.description)}"
        yield ""
    elif kind == "examples":
        yield (
            "\n".join(f"```python\n{code}\n```" if what.value == "examples" else _text(code) for what, code in value)
            + "\n"
        )
    else:
        raise ValueError(f"{item.path}: a docstring section {kind!r} is not shown")


def _signature(item: Any) -> str:
    """Name and parameters; one a line where they do not fit into one."""
    parameters = [each for each in item.parameters if each.name not in ("self", "cls")]
    parts: list[str] = []
    star = False
    for each in parameters:
        kind = each.kind.value
        if kind == "keyword-only" and not star:
            parts.append("*")
        star = star or kind in ("keyword-only", "variadic positional")
        mark = {"variadic positional": "*", "variadic keyword": "**"}.get(kind, "")
        annotation = f": {_type(each.annotation)}" if each.annotation else ""
        default = f" = {each.default}" if each.default is not None and not mark else ""
        default = default if annotation else default.replace(" ", "")
        parts.append(f"{mark}{each.name}{annotation}{default}")
        if kind == "positional-only" and (
            parameters[-1] is each or parameters[parameters.index(each) + 1].kind != each.kind
        ):
            parts.append("/")
    returns = f" -> {_type(item.returns)}" if getattr(item, "returns", None) and item.kind.value == "function" else ""
    line = f"{item.name}({', '.join(parts)}){returns}"
    return (
        line if len(line) <= _WIDTH else f"{item.name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){returns}"
    )


def _type(annotation: Any) -> str:
    return re.sub(r"\b(?:collections\.abc|typing|pathlib|np|numpy)\.(?=\w)", "", str(annotation)).replace("'", "")


def _text(text: str) -> str:
    """Bare addresses become links."""
    return re.sub(r"(?<![<(\[`])https?://[^\s<>)`]*[^\s<>)`.,;:]", r"<\g<0>>", text)


def _item(text: str) -> str:
    return _text(text).replace("\n", "\n  ")


def _link_types(text: str, page: str, names: dict[str, str]) -> str:
    """Types link to the first class in them that is documented."""

    def link(found: re.Match[str]) -> str:
        for name in re.findall(r"\w+", found[1]):
            if name in names:
                return f"[`{found[1]}`]({os.path.relpath(names[name], os.path.dirname(page))})"
        return f"`{found[1]}`"

    return re.sub(r"`([^`\n]+)`\{ \.type \}", link, text)
