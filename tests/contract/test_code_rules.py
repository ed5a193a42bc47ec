"""Rules that no linter knows: errors carry a remedy, library code raises only ours and never prints, sizes hold."""

from __future__ import annotations

import ast
import builtins
import inspect

import pytest

from repvgg_deploy import errors
from tests.contract.source_tree import Module, functions, modules

MODULES = modules()
OURS = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
BUILTIN = {
    name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, BaseException)
}
# Raised on purpose: our own bugs, Python's own protocols (attributes, iteration, interruption), the exit of a program.
ALLOWED_BUILTIN = {"AssertionError", "AttributeError", "StopIteration", "KeyboardInterrupt", "SystemExit"}
by_module = pytest.mark.parametrize("module", MODULES, ids=lambda m: m.name or "__init__")


def raised(module: Module) -> list[tuple[str, ast.Call | None, int]]:
    """Name, call and line of every `raise X(…)` or `raise X`."""
    result: list[tuple[str, ast.Call | None, int]] = []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            call = node.exc if isinstance(node.exc, ast.Call) else None
            target = call.func if call else node.exc
            result.append((getattr(target, "id", getattr(target, "attr", "")), call, node.lineno))
    return result


def created(module: Module) -> list[ast.Call]:
    """Every call that makes one of our errors, raised at once or not."""
    return [
        n
        for n in ast.walk(module.tree)
        if isinstance(n, ast.Call) and getattr(n.func, "id", getattr(n.func, "attr", "")) in OURS
    ]


@by_module
def test_errors_are_made_with_a_remedy(module: Module) -> None:
    wrong = [
        f"line {call.lineno}"
        for call in created(module)
        if not any(keyword.arg in ("remedy", None) for keyword in call.keywords)
    ]
    assert wrong == []


@by_module
def test_errors_that_are_constants_have_text_in_message_and_remedy(module: Module) -> None:
    texts = [
        value
        for call in created(module)
        for value in [*call.args, *(k.value for k in call.keywords)]
        if isinstance(value, ast.Constant)
    ]
    assert all(isinstance(text.value, str) and len(text.value) > 3 for text in texts)


@by_module
def test_library_raises_only_errors_of_its_own(module: Module) -> None:
    wrong = [f"line {line}: raise {name}" for name, _, line in raised(module) if name in BUILTIN - ALLOWED_BUILTIN]
    assert wrong == []


@by_module
def test_library_never_prints_and_catches_by_name(module: Module) -> None:
    calls = [n for n in ast.walk(module.tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "print"]
    assert module.layer == "cli" or calls == []
    bare = [n.lineno for n in ast.walk(module.tree) if isinstance(n, ast.ExceptHandler) and n.type is None]
    assert bare == []


@by_module
def test_library_holds_no_finalisers_and_no_global_statements(module: Module) -> None:
    assert [name for name, node in functions(module) if node.name == "__del__"] == []
    assert [n.lineno for n in ast.walk(module.tree) if isinstance(n, ast.Global)] == []


@by_module
def test_functions_are_small_and_take_few_arguments(module: Module) -> None:
    wrong = []
    for name, node in functions(module):
        own = [
            argument.arg
            for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            if argument.arg not in ("self", "cls")
        ]
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        # repvgg_deploy.__init__ and specs apart, five parameters are the limit; what is longer is a dataclass.
        if length > 60 or len(own) > 5:
            wrong.append(f"{name}: {length} lines, {len(own)} parameters")
    assert wrong == []


@by_module
def test_modules_have_room_for_one_idea(module: Module) -> None:
    """Up to 400 lines, and 500 where one idea needs them; and no lines longer than 120 columns, which ruff holds."""
    assert len(module.path.read_text(encoding="utf-8").splitlines()) <= 500


def test_every_error_class_stands_in_the_tree_of_the_docstring() -> None:
    tree = inspect.getdoc(errors) or ""
    for name in OURS:
        assert name in tree, f"{name} is not drawn in the docstring of errors.py"


def test_every_error_class_has_one_base_and_a_docstring() -> None:
    for name in OURS:
        kind = getattr(errors, name)
        assert issubclass(kind, errors.RepVGGDeployError)
        assert kind.__doc__
