"""Fixtures for all tests. Test files whose optional packages are missing are left out; the run's end says which."""

from __future__ import annotations

import ast
import functools
import gc
import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before NumPy and torch are loaded, and for the programs that tests start: the networks of the tests are small, and
# several threads spend their time waiting for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
OPTIONAL = (
    "torch",
    "onnx",
    "onnxsim",
    "onnxruntime",
    "safetensors",
    "PIL",
    "pycocotools",
    "sklearn",
    "matplotlib",
    "openvino",
    "fastapi",
    "uvicorn",
    "prometheus_client",
    "geventhttpclient",
    "aiohttp",
    "huggingface_hub",
)
MISSING = frozenset(name for name in OPTIONAL if importlib.util.find_spec(name) is None)
LEFT_OUT: list[str] = []

# A change must not be refused for what it did not do: no example is too slow because the machine was busy, and every
# run draws the same ones. `--hypothesis-profile search` draws others. (tests/gpu also runs where Hypothesis is not
# installed.)
if importlib.util.find_spec("hypothesis") is not None:
    from hypothesis import HealthCheck, settings

    settings.register_profile("search", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.register_profile("repeatable", settings.get_profile("search"), derandomize=True)
    settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def cache_of_this_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's own cache of plans."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPVGG_DEPLOY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def signals_as_from_a_terminal() -> None:
    """A shell's `&` and nohup make a program and its children deaf to signals: those of tests must arrive."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the really trained checkpoints and photos, which a clone of the project alone does not have."""
    folder = ROOT.parent / "shared" / "data"
    if not (folder / "repvgg-a0-imagenette.pth").exists():
        pytest.skip("the trained A0 checkpoint and the photos are not beside this clone (../shared/data)")
    return folder


@pytest.fixture(scope="session")
def sample_dir() -> Path:
    """The committed sample: checkpoint, variant, labelled images."""
    return ROOT / "models" / "sample"


@pytest.fixture(scope="session")
def exported_sample(tmp_path_factory: pytest.TempPathFactory, sample_dir: Path) -> Path:
    """The sample as an ONNX, with a few calibration images beside it; a test that changes it takes a copy."""
    from repvgg_deploy.export.export import ExportOptions, export_checkpoint
    from repvgg_deploy.export.synthesize import SynthesisOptions

    path = tmp_path_factory.mktemp("sample") / "sample.onnx"
    options = ExportOptions(calibration=SynthesisOptions(images=10, steps=4))
    export_checkpoint(sample_dir / "repvgg-sample.pth", path, options=options)
    return path


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup() -> Iterator[None]:
    """What a test draws from torch's own generator does not depend on the tests before it.

    A fixture that reaches for a missing optional package skips the test.
    """
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    try:
        return (yield)
    except ImportError as error:
        _skip_if_missing(error)
        raise


def pytest_collection_finish() -> None:
    """What is there when the tests begin stays to the end: the collections that tests of memory ask for skip it."""
    gc.collect()
    gc.freeze()


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leaves out a test file that imports, itself or through our modules, an optional package that is not installed."""
    if not MISSING or collection_path.suffix != ".py" or not collection_path.name.startswith("test_"):
        return None
    needed = MISSING & _imports(collection_path)
    if not needed:
        return None
    LEFT_OUT.append(f"{collection_path.relative_to(ROOT)}: needs {', '.join(sorted(needed))}")
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Skips a test that reaches for a missing optional package only while it runs."""
    try:
        return (yield)
    except ImportError as error:
        _skip_if_missing(error)
        raise


def _skip_if_missing(error: ImportError) -> None:
    if MISSING & _names_of(error):
        pytest.skip(f"needs {', '.join(sorted(MISSING & _names_of(error)))}, which is not installed")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says what was left out: a green run must not hide it."""
    if LEFT_OUT:
        terminalreporter.section(f"{len(LEFT_OUT)} files left out: optional packages are not installed")
        for line in sorted(LEFT_OUT):
            terminalreporter.line(line)


def _names_of(error: BaseException | None) -> set[str]:
    names: set[str] = set()
    while error is not None:
        names |= {(getattr(error, "name", None) or "").partition(".")[0]}
        error = error.__cause__ or error.__context__
    return names


@functools.cache
def _imports(path: Path) -> frozenset[str]:
    """Top-level packages that importing `path` imports; our own modules and test helpers are followed."""
    found: set[str] = set()
    seen: set[Path] = set()
    queue = [path]
    while queue:
        current = queue.pop()
        if current in seen or not current.exists():
            continue
        seen.add(current)
        for name in _module_imports(current):
            found.add(name.partition(".")[0])
            queue += _own_files(name)
    return frozenset(found)


def _own_files(name: str) -> list[Path]:
    base = ROOT.joinpath(*name.split("."))
    return (
        [base.with_suffix(".py"), base / "__init__.py"]
        if name.partition(".")[0] in ("repvgg_deploy", "tests", "benchmarks", "examples")
        else []
    )


def _module_imports(path: Path) -> set[str]:
    """Absolute names that importing the module imports: not those inside functions or under TYPE_CHECKING."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    names: set[str] = set()
    queue: list[ast.AST] = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while queue:
        node = queue.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or _is_type_checking(node):
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
                if node.level
                else node.module or ""
            )
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        queue += ast.iter_child_nodes(node)
    return names


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
