"""What the documents show is run, what they name exists."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from repvgg_deploy.cli import trt
from tests.contract.source_tree import ROOT, modules

GUIDES = [
    f"docs/{name}.md"
    for name in (
        "index", "export", "networks", "precision", "build", "run", "triton", "measure", "variants",
        "reparameterization",
    )
]  # fmt: skip
PROSE = [
    f"docs/{name}.md"
    for name in ("install", "serve", "commands", "figures", "compatibility", "troubleshooting", "architecture")
]
REFERENCE = [
    f"docs/api/{name}.md"
    for name in ("index", "engine", "options", "serving", "measure", "accuracy", "specs", "errors")
]
DOCUMENTS = [
    "README.md",
    "docs/schemas.md",
    *GUIDES,
    *PROSE,
    *REFERENCE,
    "engines/README.md",
    "CONTRIBUTING.md",
    "docker/README.md",
    "models/README.md",
    "benchmarks/README.md",
    "examples/service/README.md",
]
# A block with a language is run unless the line before it says why not, or names a package that is not installed.
BLOCK = re.compile(
    r"(?:^<!-- (?:not run: (?P<reason>[^>]+)|needs (?P<package>\w+)) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$",
    re.M | re.S,
)
PROGRAMS = {"repvgg-export": "repvgg_deploy.cli.export", "repvgg-trt": "repvgg_deploy.cli.trt"}
SHOWN_ONLY = {"toml", "json", "text"}


def blocks(document: str) -> list[re.Match[str]]:
    return list(BLOCK.finditer((ROOT / document).read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader has: the clone's folders that the snippets name, and the programs on PATH."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("models", "engines", "docs"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("checkpoints", "onnx", "plans", "__pycache__")
        )
    (folder / "bin").mkdir()
    # `python` is that of the environment, as a reader has it activated.
    for program, module in {**{name: f" -m {module}" for name, module in PROGRAMS.items()}, "python": ""}.items():
        path = folder / "bin" / program
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}"{module} "$@"\n', encoding="utf-8")
        path.chmod(0o755)
    return folder


def run(command: list[str], folder: Path, *, stdin: str = "") -> subprocess.CompletedProcess[str]:
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "error::DeprecationWarning:repvgg_deploy",
    }
    return subprocess.run(
        command, cwd=folder, env=environment, input=stdin, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def exported(folder: Path) -> Path:
    """The same folder with the file that the README's first command writes, for snippets that begin there."""
    pytest.importorskip("torch")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("PIL")
    result = run(["repvgg-export", "--ckpt", "models/sample/repvgg-sample.pth", "--out", "sample.onnx"], folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("document", ["README.md", "engines/README.md", "docs/schemas.md", *GUIDES, *REFERENCE])
def test_snippets_of_a_document_run_one_after_the_other(document: str, exported: Path) -> None:
    if document == "README.md":
        (exported / "sample.onnx").unlink()  # its own commands write it
    chosen = [
        (block["language"], block["code"])
        for block in blocks(document)
        if not block["reason"]
        and block["language"] not in SHOWN_ONLY
        and (block["package"] is None or importlib.util.find_spec(block["package"]))
    ]
    assert chosen and {language for language, _ in chosen} <= {"sh", "python"}
    result = run([sys.executable, "-m", "tests.contract.run_document"], exported, stdin=json.dumps(chosen))
    assert result.returncode == 0, f"{result.stdout}{result.stderr}"


def test_snippet_of_the_readme_recognises_the_digit(exported: Path) -> None:
    python = [block["code"] for block in blocks("README.md") if "classify" in block["code"]]
    label, score = run([sys.executable, "-c", python[0]], exported).stdout.split()
    assert label == "3"
    assert 0.5 < float(score) < 1


@functools.cache
def help_texts() -> dict[str, str]:
    commands = {"repvgg-export": [[]], "repvgg-trt": [[], *([command.name] for command in trt.COMMANDS)]}
    narrow = {**os.environ, "COLUMNS": "80"}
    result = {}
    for program, variants in commands.items():
        texts = [
            subprocess.run(
                [sys.executable, "-m", PROGRAMS[program], *v, "--help"],
                capture_output=True,
                text=True,
                check=True,
                cwd=ROOT,
                env=narrow,
            ).stdout
            for v in variants
        ]
        result[program] = "\n".join(texts)
    return result


# Options of other programs that the documents name.
FOREIGN = {"docs/run.md": {"--preload"}, "docs/troubleshooting.md": {"--gpus"}}


@pytest.mark.parametrize("document", ["README.md", *GUIDES, *PROSE])
def test_options_in_a_document_are_those_of_the_programs(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    code = "\n".join([*re.findall(r"`([^`\n]+)`", text), *(block["code"] for block in blocks(document))])
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", code))
    known = set(re.findall(r"--[a-z][a-z0-9-]+", "\n".join(help_texts().values())))
    assert len(known) > 50
    assert named - known == FOREIGN.get(document, set())


def test_help_fits_a_terminal_of_80_columns() -> None:
    assert [line for text in help_texts().values() for line in text.splitlines() if len(line) > 80] == []


def test_help_of_every_option_says_something() -> None:
    texts = help_texts()
    assert (
        sum(len(re.findall(r"^  (?:-\w, )?--[\w-]+", text, re.M)) for text in texts.values()) > 50
    )  # the pattern finds options at all
    for program, text in texts.items():
        for line in re.findall(r"^  (?:-\w, )?(--[\w-]+)(?: [A-Z|x]+)?$(?!\n\s{10,})", text, re.M):
            pytest.fail(f"{program}: {line} has no help text")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_of_a_document_lead_somewhere(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{document}: {target}"


def test_make_targets_in_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for document in DOCUMENTS:
        named = set(re.findall(r"`?make ([a-z]+)(?=`|\s{2,}#|$)", (ROOT / document).read_text(encoding="utf-8"), re.M))
        assert named <= targets, document


def test_numbers_of_the_table_of_variants_are_theirs() -> None:
    from repvgg_deploy.specs.variants import PUBLISHED, count_macs, count_parameters

    page = (ROOT / "docs" / "variants.md").read_text(encoding="utf-8")
    for name, spec in PUBLISHED.items():
        size = 320 if spec.auxiliary_heads else 224
        row = f"| {name} | {count_parameters(spec, 'deploy') / 1e6:.2f} | {count_macs(spec, size, size) / 1e9:.2f} |"
        assert row in page, name


def test_python_of_the_docs_is_valid() -> None:
    found = [
        (document, block["code"])
        for document in DOCUMENTS
        for block in blocks(document)
        if block["language"] == "python"
    ]
    assert len(found) > 5
    for document, code in found:
        compile(code, document, "exec")


def messages(document: str) -> list[str]:
    """The error messages of the document's tables: code in the column `message`, with … for what varies."""
    text = (ROOT / document).read_text(encoding="utf-8")
    tables = re.findall(r"^\| message \|.*\n\|[-| ]+\|\n((?:\|.*\n)+)", text, re.M)
    return [
        found
        for table in tables
        for row in table.splitlines()
        for found in re.findall(r"`([^`]+)`", row.split(" | ")[0])
    ]


@functools.cache
def texts_of_the_package() -> list[str]:
    """Every text of the source, with … where a value is put in."""
    found = []
    for module in modules():
        for node in ast.walk(module.tree):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            if any(isinstance(part, ast.Constant) and isinstance(part.value, str) for part in parts):
                found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts))
    return found


@pytest.mark.parametrize(("document", "least"), [("docs/troubleshooting.md", 20), ("docs/precision.md", 8)])
def test_error_messages_in_a_document_are_those_of_the_code(document: str, least: int) -> None:
    quoted = messages(document)
    assert len(quoted) >= least
    for message in quoted:
        assert len(message.replace("…", "")) >= 15, f"{message}: too short to tell one error from another"
        pattern = re.compile(".*?".join(re.escape(part) for part in message.split("…")), re.S)
        assert any(pattern.search(text) for text in texts_of_the_package()), f"{document}: no error says {message!r}"


def test_page_on_installing_lists_every_extra() -> None:
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", page, re.M) == list(extras)


def test_readme_is_one_page_and_begins_with_a_command() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.split()) <= 1500
    command = re.search(r"^```sh\n(.*)$", readme, re.M)
    assert command is not None and command[1].startswith("make demo")
    assert len(readme[: command.start(1)].split()) < 150


def test_pictures_of_the_readme_are_there_for_light_and_dark() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pictures = re.findall(r'(?:src|srcset)="([^"]+)"', readme)
    assert sorted(Path(picture).name for picture in pictures) == ["flow-dark.svg", "flow-light.svg"]
    assert all((ROOT / picture).exists() for picture in pictures)
    assert re.search(r'alt="[^"]{40,}"', readme)


def test_figures_of_the_readme_are_those_that_were_measured() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = {
        name: json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("int8", "runtime", "export")
    }
    agreement = {row["key"]: row.get("agreement") for row in found["int8"]["models"]["A0"]["rows"]}
    assert f"| {agreement['max']:.1f} % (max calibration) | {agreement['ours trt10']:.1f} % |" in readme
    speed = next(iter(found["runtime"]["processors"].values()))["speed"]
    (eight,) = (each["images_per_second"] for each in speed if each["batch"] == 8)
    assert f"| {eight['ONNX Runtime']:.0f} (FP32, ONNX Runtime) |" in readme
    assert f"| {eight['Engine, INT8']:.0f} (INT8, `Engine`) |" in readme
    for row in found["export"]["medians"].values():
        assert f"{row['seconds']:.1f} s, {row['peak_mb']:.0f} MB" in readme
    for program in re.findall(r"`python (benchmarks/\w+\.py)`", readme):
        assert (ROOT / program).exists()


@pytest.mark.parametrize("address", [None, "https://example.org/project"])
def test_description_for_a_package_index_has_no_link_that_leads_nowhere(address: str | None) -> None:
    spec = importlib.util.spec_from_file_location("setup_of_the_project", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    pytest.importorskip("setuptools")
    spec.loader.exec_module(module)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    text = module.describe(readme, address)
    targets = re.findall(r'\]\(([^)]+)\)|(?:src|srcset|href)="([^"]+)"', text)
    assert targets and all("".join(target).startswith("https://") for target in targets)
    assert "<!--" not in text and "<picture>" not in text
    assert ("docs/images/flow-light.svg" in text) == (address is not None)
    for _, code in re.findall(r"^```(\w+)\n(.*?)^```$", readme, re.M | re.S):
        assert code in text
