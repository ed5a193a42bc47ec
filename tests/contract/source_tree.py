"""The package's source as syntax trees, for tests of what must stay true of the whole."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "repvgg_deploy"


@dataclass(frozen=True)
class Module:
    """One source file: its dotted name below the package (an `__init__` has its folder's name) and its tree."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def layer(self) -> str:
        """First part of the name: the stage, or the module at the root."""
        return self.name.partition(".")[0]


def modules() -> list[Module]:
    """All modules of the package, sorted by name."""
    result = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        result.append(Module(name, path, ast.parse(path.read_text(encoding="utf-8"), str(path))))
    return result


def references(module: Module, *, types: bool = True) -> Iterator[tuple[str, int]]:
    """Absolute name and line of all that a module imports, in functions, too; `types`: also under TYPE_CHECKING."""
    package = ["repvgg_deploy", *module.path.relative_to(PACKAGE).parts[:-1]]
    for node in _walk(module.tree, types=types):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield source, node.lineno
            for alias in node.names:
                yield f"{source}.{alias.name}", node.lineno


def _walk(tree: ast.AST, *, types: bool) -> Iterator[ast.AST]:
    queue: list[ast.AST] = [tree]
    while queue:
        node = queue.pop()
        yield node
        for child in ast.iter_child_nodes(node):
            guarded = (
                isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING"
            )
            if types or not guarded:
                queue.append(child)


def functions(module: Module) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function of a module with a name that says where it stands."""
    for node in ast.walk(module.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield f"{module.name}.{node.name} (line {node.lineno})", node
