"""What all commands share: exit codes, errors, signals, output; values of options.

A command declares its options and offers `execute(args) -> Output`, which imports what it needs only when it is called:
`--help` must be quick. `run` calls it, prints the output and gives the exit code: 0 done; 1 an error of ours, with
message and remedy; 2 usage (argparse); 130 interrupted; 143 and 129 terminated or hung up; 141 the reader of standard
output went away. Signals raise, so that every `finally` runs and no partial file is left.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import signal
import sys
import textwrap
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from .. import __version__
from ..errors import ArtifactError, RepVGGDeployError, clean_text, explain_missing, say_install
from .terminal import CLEAR, Tone, fit, paint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    _StreamHandler = logging.StreamHandler[TextIO]
else:
    _StreamHandler = logging.StreamHandler  # generic from Python 3.11 on

EXIT_DONE, EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 0, 1, 2, 130, 141


@dataclass(frozen=True, slots=True)
class Output:
    """What a command prints.

    Attributes:
        data: The one object of `--json`: JSON values and dataclasses.
        text: Standard output without `--json`.
        next_command: What the user may run next; printed on standard error, because it is no result.
        errors: What failed where the rest is worth printing; on standard error without `--json`, and the exit code is
            EXIT_ERROR.
    """

    data: Mapping[str, object]
    text: str
    next_command: str | None = None
    errors: tuple[RepVGGDeployError, ...] = ()


Body = Callable[[argparse.Namespace], Output]


@dataclass(frozen=True, slots=True)
class Command:
    """A command of `repvgg-trt`.

    Attributes:
        name: As it is typed.
        summary: Half a line for the list of commands.
        description: What it does, for its own `--help`.
        add_options: Adds its options to a parser.
        execute: Does the work.
        find_conflict: Says what is wrong with options that cannot hold together, or None.
        examples: Lines below the options in `--help`, the first is `examples:`.
    """

    name: str
    summary: str
    description: str
    add_options: Callable[[argparse.ArgumentParser], None]
    execute: Body
    find_conflict: Callable[[argparse.Namespace], str | None] | None = None
    examples: str | None = None


class HelpFormatter(argparse.HelpFormatter):
    """Prose is filled to the terminal's width, between words; examples, whose lines are commands, stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return "".join(indent + line for line in text.splitlines(keepends=True))
        return super()._fill_text(text, width, indent)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class Parser(argparse.ArgumentParser):
    """A parser that asks "did you mean …?" where a word is almost one that it knows."""

    _given: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; remembers the words, for one that is misspelt may be the one that is missing."""
        self._given = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Ends the program with usage, message and what was perhaps meant."""
        meant = [match for word, known in self._find_unknown(message) for match in get_close_matches(word, known, 1)]
        question = f"; did you mean {', '.join(meant)}?" if meant else ""
        said = clean_text(f"{self.prog}: error: {message}{question}", lines=True)
        self.print_usage(sys.stderr)
        self.exit(EXIT_USAGE, fit(said, sys.stderr) + "\n")

    def _find_unknown(self, message: str) -> Iterator[tuple[str, list[str]]]:
        choice = re.search(r"invalid choice: '?([^' ]+)'? \(choose from (.+)\)", message)
        if choice is not None:
            yield choice[1], re.findall(r"[\w.-]+", choice[2])
        elif message.startswith("unrecognized arguments:") or "required" in message:
            options = [name for action in self._actions for name in action.option_strings if len(name) > 2]
            for word in message.split()[2:] if message.startswith("unrecognized") else self._given:
                if word.startswith("-") and word.partition("=")[0] not in options:
                    yield word.partition("=")[0], options


def parent_parser() -> Parser:
    """A parent with `-v`, `--json` and `--version`; make a new one for each (sub)parser.

    Absent options are absent from the namespace, so that a subcommand does not reset what stood before its name.
    """
    parser = Parser(add_help=False)
    group = parser.add_argument_group("common options")
    verbose = "log progress on standard error; -vv also shows tracebacks"
    group.add_argument("-v", "--verbose", action="count", default=argparse.SUPPRESS, help=verbose)
    as_json = "print one JSON object instead of text"
    group.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=as_json)
    group.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return parser


class CompletionAction(argparse.Action):
    """Prints what a shell completes this program's words with, and ends the program."""

    def __call__(self, parser: argparse.ArgumentParser, *given: Any) -> NoReturn:
        """Prints it.

        Raises:
            SystemExit: Always; with 1 where shtab is not installed.
        """
        try:
            import shtab
        except ModuleNotFoundError:
            parser.exit(EXIT_ERROR, f"error: completion needs shtab\n  remedy: {say_install('completion')}\n")
        for action in _all_actions(parser):
            if action.type is Path or action.metavar in ("MODEL", "IMAGE", "ONNX", "PLAN"):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        print(shtab.complete(parser, shell=given[1]))
        parser.exit(EXIT_DONE)


def _all_actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from _all_actions(child)


def add_completion(parser: argparse.ArgumentParser) -> None:
    """`--print-completion SHELL` of a program."""
    text = 'print the completion of a shell: eval "$(%(prog)s --print-completion bash)"'
    parser.add_argument("--print-completion", action=CompletionAction, choices=("bash", "zsh", "tcsh"), help=text)


class Terminated(BaseException):
    """SIGTERM or SIGHUP arrived; like KeyboardInterrupt it passes every `except Exception`.

    Attributes:
        number: The signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def run(body: Body, args: argparse.Namespace) -> int:
    """Runs the body of a command: prints what it returns, and turns what it raises into a message and an exit code.

    Args:
        body: Does the work.
        args: The parsed arguments; `verbose` and `json` are read if there.

    Returns:
        The exit code.
    """
    verbose: int = getattr(args, "verbose", 0)
    as_json: bool = getattr(args, "json", False)
    _fill_closed_streams()
    try:
        if sys.stdout is None:
            raise ArtifactError("standard output: is closed", remedy="redirect it, if only to /dev/null")
        with _signals_raise(), _logging(verbose), warnings.catch_warnings():
            # What is wrong with an image is said by our own error, once.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            output = body(args)
            _print_output(output, as_json)
        return EXIT_ERROR if output.errors else EXIT_DONE
    except BrokenPipeError:
        _silence_stdout()
        return EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        _complain("interrupted", verbose)
        return EXIT_INTERRUPTED
    except Terminated as error:
        _complain(f"terminated by {signal.Signals(error.number).name}", verbose)
        return 128 + error.number
    except RepVGGDeployError as error:
        return _report(error.message, error.remedy, verbose, as_json)
    except MemoryError:
        remedy = "give a smaller batch or model, or run it where more memory is free"
        return _report("out of memory", remedy, verbose, as_json)
    except OSError as error:  # a name that is too long, a folder that may not be entered, a disk that fails
        if error.filename is None:
            return _report_unexpected(error, verbose, as_json)
        said = f"{os.fsdecode(error.filename)}: {error.strerror}"
        return _report(said, "check the path, and what you may do with it", verbose, as_json)
    except Exception as error:  # noqa: BLE001 - the border of the program: whatever was not foreseen becomes one line
        missing = explain_missing(error) if isinstance(error, ImportError) else None
        if missing is not None:
            return _report(missing.message, missing.remedy, verbose, as_json)
        return _report_unexpected(error, verbose, as_json)


def _report_unexpected(error: Exception, verbose: int, as_json: bool) -> int:
    message = f"unexpected {type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"
    return _report(message, "please report this; run it again with -vv for the traceback", verbose, as_json)


def _fill_closed_streams() -> None:
    """Opens the standard streams that are closed (`2>&-`) on nothing: else the next file would take their number.

    What a library writes to standard error would then land in a model. `sys.stdout` stays None where it was closed.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            os.set_inheritable(number, True)
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 (as long as the process)


def _report(message: str, remedy: str, verbose: int, as_json: bool) -> int:
    if as_json:
        with contextlib.suppress(BrokenPipeError, ArtifactError):
            _write_stdout(json.dumps({"error": message, "remedy": remedy}, indent=2))
    if not as_json or verbose > 1 or sys.stdout is None:
        _complain(f"error: {message}\n  remedy: {remedy}", verbose)
    return EXIT_ERROR


def _complain(text: str, verbose: int) -> None:
    with contextlib.suppress(OSError):  # standard error may be full or gone, and then nobody is left to tell
        if verbose > 1:
            traceback.print_exc(file=sys.stderr)
        text = clean_text(text, lines=True)
        tones: tuple[tuple[str, Tone], ...] = (("error:", "bad"), ("next:", "dim"))
        for word, tone in tones:
            if text.startswith(word):
                text = paint(word, tone) + text[len(word) :]
        print(fit(text, sys.stderr), file=sys.stderr, flush=True)


def _print_output(output: Output, as_json: bool) -> None:
    if as_json:
        from ..specs.codec import encode

        _write_stdout(json.dumps(encode(output.data), indent=2, allow_nan=False))
        return
    _write_stdout(fit(clean_text(output.text, lines=True), sys.stdout))
    for error in output.errors:
        _complain(f"error: {error}", 0)
    if output.next_command:
        _complain(f"next: {output.next_command}", 0)


def _write_stdout(text: str) -> None:
    if not text:
        return
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        # A file name or label that the terminal's encoding cannot show is no reason to fail.
        reconfigure(errors="backslashreplace")
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        _silence_stdout()
        raise ArtifactError(
            f"standard output: cannot be written: {error.strerror}", remedy="free some space, or redirect it elsewhere"
        ) from error


def _silence_stdout() -> None:
    # What is still buffered would fail again, with a traceback, when the interpreter flushes at exit.
    with contextlib.suppress(OSError, ValueError):
        handle = os.open(os.devnull, os.O_WRONLY)
        os.dup2(handle, sys.stdout.fileno())
        os.close(handle)


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM and SIGHUP raise Terminated inside; one that is ignored (nohup) or handled already is left alone."""

    def handle(number: int, _: FrameType | None) -> None:
        raise Terminated(number)

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


class _LogHandler(_StreamHandler):
    """Cleans what is logged, and clears the bar that may be drawn in this line; its next drawing brings it back."""

    def format(self, record: logging.LogRecord) -> str:
        text = clean_text(super().format(record), lines=True)
        if not self.stream.isatty():
            return text
        head, colon, rest = text.partition(":")
        painted = f"{paint(head, 'warn')}{colon}{rest}" if record.levelno >= logging.WARNING else text
        return CLEAR + fit(painted, self.stream)


@contextlib.contextmanager
def _logging(verbose: int) -> Iterator[None]:
    """Our log records go to standard error inside the block: warnings, with -v progress, with -vv everything."""
    logger = logging.getLogger("repvgg_deploy")
    handler = _LogHandler()
    name = "%(levelname)s %(name)s" if verbose > 1 else "%(levelname)s"
    handler.setFormatter(logging.Formatter(f"{name}: %(message)s"))
    before = logger.level
    logger.setLevel({0: logging.WARNING, 1: logging.INFO}.get(verbose, logging.DEBUG))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def show_bytes(count: int) -> str:
    """`25.5 MB`, `3.1 kB`."""
    return f"{count / 1e6:.1f} MB" if count >= 1_000_000 else f"{count / 1e3:.1f} kB"


def show_seconds(stages: Iterable[tuple[str, float]]) -> str:
    """`12.5: parse 0.5, build 12.0`: the sum, and each stage by name."""
    known = list(stages)
    return (
        f"{sum(seconds for _, seconds in known):.1f}: {', '.join(f'{name} {seconds:.1f}' for name, seconds in known)}"
    )


def save_plot(path: Path | None, draw: Callable[[], Figure], *, force: bool) -> tuple[ArtifactError, ...]:
    """Draws and writes the picture of `--plot`, if asked for.

    Returns:
        Why it could not be written, if so: that is no reason to lose the figures.
    """
    if path is not None:
        from ..evaluate.figures import save_figure

        try:
            save_figure(draw(), path, force=force)
        except ArtifactError as error:
            return (error,)
    return ()


# fmt: off
def add_device_options(group: argparse.ArgumentParser) -> None:
    """Where a model runs, for commands that run one."""
    group.add_argument("--device", metavar="DEVICE",
                       help="cpu, cuda or cuda:1; a GPU never falls back to the CPU (default: cuda for a plan, else "
                            "cpu)")
    group.add_argument("--threads", type=parse_whole, metavar="N", help="CPU threads (default: one a core)")
    group.add_argument("--backend", choices=("onnxruntime", "openvino", "fastest"),
                       help="what runs an ONNX model; openvino is the fastest for INT8 on a CPU, fastest chooses it "
                            "where it is installed (default: onnxruntime)")
    group.add_argument("--bfloat16", action="store_true",
                       help="with --backend openvino on a CPU with AMX or AVX512-BF16: compute in bfloat16 what is not "
                            "INT8, faster and less exact")
# fmt: on


def parse_whole(text: str, *, least: int = 1, most: int | None = None) -> int:
    """Reads a whole number of at least `least`; below 2^31 where `most` is not given."""
    digits = text.strip()
    limit = (1 << 31) - 1 if most is None else most
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= 10 and least <= int(digits) <= limit):
        wanted = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise argparse.ArgumentTypeError(f"expected a whole number {wanted}, found {text!r}")
    return int(digits)


def parse_counts(text: str) -> tuple[int, ...]:
    """Reads `1,8,32`: numbers of at least 1, each once, in order."""
    return tuple(sorted({parse_whole(part, most=(1 << 20) - 1) for part in text.split(",")}))


def parse_number(text: str, *, least: float, most: float, what: str) -> float:
    """Reads a number from `least` to `most`; `what` says so in the message."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"expected {what}, found {text!r}")
    return value


def parse_names(text: str, *, known: tuple[str, ...]) -> tuple[str, ...]:
    """Reads names apart by commas, each once, in the order given."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if not set(names) <= set(known):
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, apart by commas, found {text!r}")
    return names


def parse_size(text: str) -> tuple[int, int]:
    """Reads `224` or `512x1024` as height and width in pixels."""
    match = re.fullmatch(r"([0-9]{1,5})(?:[xX×]([0-9]{1,5}))?", text.strip())
    size = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if 0 in size:
        raise argparse.ArgumentTypeError(
            f"expected an image size such as 224 or 512x1024 (height x width, from 1 to 99999), found {text!r}"
        )
    return size


def parse_triple(text: str) -> tuple[float, float, float]:
    """Reads `123.675,116.28,103.53`, a number for each of RGB."""
    try:
        first, second, third = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected three numbers separated by commas, found {text!r}") from None
    return first, second, third
