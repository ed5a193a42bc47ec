"""Exit codes, messages, signals and output that both programs share."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from repvgg_deploy.cli import common, terminal
from repvgg_deploy.cli.common import Output, parent_parser, run
from repvgg_deploy.cli.terminal import Progress, fold_lines, format_groups, format_pairs, format_table
from repvgg_deploy.errors import InputError, MissingDependencyError
from tests.waiting import PATIENCE_SECONDS

ROOT = Path(__file__).parents[2]
DONE = Output({"answer": 42}, "the answer is 42", "ask again")


def parse(*arguments: str) -> argparse.Namespace:
    return argparse.ArgumentParser(parents=[parent_parser()]).parse_args(arguments)


def raising(error: BaseException):
    def body(args: argparse.Namespace) -> Output:
        raise error

    return body


def test_run_of_finished_body_prints_text_and_next_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda args: DONE, parse()) == 0
    printed = capsys.readouterr()
    assert printed.out == "the answer is 42\n"
    assert printed.err == "next: ask again\n"


def test_run_with_json_prints_one_object_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda args: DONE, parse("--json")) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"answer": 42}
    assert printed.err == ""


def test_run_of_partly_failed_body_prints_both_and_exits_1(capsys: pytest.CaptureFixture[str]) -> None:
    partly = Output({"answer": 42}, "half", None, (InputError("b.jpg: bad", remedy="leave it out"),))
    assert run(lambda args: partly, parse()) == 1
    printed = capsys.readouterr()
    assert printed.out == "half\n"
    assert printed.err == "error: b.jpg: bad\n  remedy: leave it out\n"
    assert run(lambda args: partly, parse("--json")) == 1
    assert json.loads(capsys.readouterr().out) == {"answer": 42}


def test_run_of_our_error_prints_message_and_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(raising(InputError("it is bad", remedy="make it good")), parse()) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "error: it is bad\n  remedy: make it good\n"


def test_run_of_our_error_with_json_prints_it_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(raising(MissingDependencyError("no torch", remedy="install it")), parse("--json")) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"error": "no torch", "remedy": "install it"}
    assert printed.err == ""


@pytest.mark.parametrize(
    "error",
    [InputError("it is bad", remedy="make it good"), ZeroDivisionError("division by zero"), KeyboardInterrupt()],
)
def test_run_with_vv_shows_the_traceback(capsys: pytest.CaptureFixture[str], error: BaseException) -> None:
    run(raising(error), parse("-v"))
    assert "Traceback" not in capsys.readouterr().err
    run(raising(error), parse("-vv"))
    assert capsys.readouterr().err.count("Traceback") == 1


@pytest.mark.parametrize(
    ("error", "message", "remedy"),
    [
        (
            ZeroDivisionError("division\nby zero"),
            "unexpected ZeroDivisionError: division by zero",
            "please report this; run it again with -vv",
        ),
        (AssertionError(), "unexpected AssertionError: no message", "please report this; run it again with -vv"),
        (MemoryError(), "out of memory", "give a smaller batch"),
    ],
)
def test_run_of_unexpected_error_is_one_line(
    capsys: pytest.CaptureFixture[str], error: BaseException, message: str, remedy: str
) -> None:
    assert run(raising(error), parse()) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"error: {message}"
    assert lines[1].startswith(f"  remedy: {remedy}")
    assert len(lines) == 2


def test_run_of_interrupted_body_exits_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(raising(KeyboardInterrupt()), parse()) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("arguments", "levels"), [([], ["WARNING"]), (["-v"], ["INFO", "WARNING"]), (["-vv"], ["DEBUG", "INFO", "WARNING"])]
)
def test_run_logs_what_verbosity_asks_for(
    capsys: pytest.CaptureFixture[str], arguments: list[str], levels: list[str]
) -> None:
    logger = logging.getLogger("repvgg_deploy.some_stage")

    def body(args: argparse.Namespace) -> Output:
        logger.debug("d")
        logger.info("i")
        logger.warning("w")
        return Output({}, "")

    handlers = list(logging.getLogger("repvgg_deploy").handlers)
    run(body, parse(*arguments))
    assert [line.split(maxsplit=1)[0].rstrip(":") for line in capsys.readouterr().err.splitlines()] == levels
    assert logging.getLogger("repvgg_deploy").handlers == handlers


def test_run_leaves_signal_handlers_as_they_were() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]
    run(lambda args: DONE, parse())
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)] == before


def test_run_works_outside_the_main_thread() -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(run(lambda args: Output({}, ""), parse())))
    thread.start()
    thread.join()
    assert codes == [0]


def test_run_prints_names_that_the_terminal_cannot_show(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert run(lambda args: Output({}, "büro\udcff"), parse()) == 0
    stream.flush()
    assert stream.buffer.getvalue() == b"b\\xfcro\\udcff\n"


def test_options_before_and_after_a_subcommand_both_count() -> None:
    parser = argparse.ArgumentParser(parents=[parent_parser()])
    parser.add_subparsers().add_parser("go", parents=[parent_parser()])
    assert vars(parser.parse_args(["-v", "--json", "go"])) == {"verbose": 1, "json": True}
    assert vars(parser.parse_args(["go", "-vv", "--json"])) == {"verbose": 2, "json": True}
    assert vars(parser.parse_args(["go"])) == {}


PROGRAM = """
import argparse, sys, time
from pathlib import Path
from repvgg_deploy.files.output import atomic_output
from repvgg_deploy.cli import common
from repvgg_deploy.cli.common import Output, run

def wait(args):
    with atomic_output(Path(sys.argv[2])) as output:
        output.partial.write_bytes(b"half")
        print("ready", file=sys.stderr, flush=True)
        while True:  # not one long sleep: a signal that comes just before it would be heard only after it
            time.sleep(0.05)

def talk(args):
    return Output({}, "a long line " * 100_000)

sys.exit(run({"wait": wait, "talk": talk}[sys.argv[1]], argparse.Namespace(json=len(sys.argv) > 3)))
"""


def start(*arguments: str, stdout: int = subprocess.PIPE, ignore_hangup: bool = False) -> subprocess.Popen[str]:
    # As from a terminal, also where the tests themselves run in the background or under nohup, which children inherit.
    hangup = "signal.SIG_IGN" if ignore_hangup else "signal.SIG_DFL"
    signals = (
        f"import signal; signal.signal(signal.SIGHUP, {hangup}); signal.signal(signal.SIGINT, "
        f"signal.default_int_handler)"
    )
    command = [sys.executable, "-c", f"{signals}\n{PROGRAM}", *arguments]
    return subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "terminated by SIGTERM"),
        (signal.SIGHUP, 129, "terminated by SIGHUP"),
    ],
)
def test_program_that_gets_a_signal_leaves_no_file(tmp_path: Path, number: int, code: int, message: str) -> None:
    with start("wait", str(tmp_path / "out.onnx")) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "ready\n"
        assert (
            len(list(tmp_path.iterdir())) == 1
        )  # the partial file is there, and would be left by a program that just dies
        process.send_signal(number)
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == code
    assert errors == f"{message}\n"
    assert list(tmp_path.iterdir()) == []


def test_program_under_nohup_survives_the_hangup(tmp_path: Path) -> None:
    with start("wait", str(tmp_path / "out.onnx"), ignore_hangup=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        process.terminate()
        process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 143


def test_program_whose_reader_goes_away_is_quiet() -> None:
    with start("talk") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        errors = process.stderr.read()
        process.wait(PATIENCE_SECONDS)
    assert process.returncode == 141
    assert errors == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_program_whose_output_does_not_fit_says_so() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        with start("talk", stdout=full) as process:
            _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    finally:
        os.close(full)
    assert process.returncode == 1
    assert errors.startswith("error: standard output: cannot be written: No space left on device\n  remedy: ")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_draws_and_clears() -> None:
    stream = Terminal()
    with Progress(4, "images", stream=stream) as bar:
        bar.advance(2, label="more images")
    drawn = stream.getvalue().split("\r\x1b[K")
    assert drawn[1].startswith("images [....................] 0/4")
    assert drawn[2].startswith("more images [##########..........] 2/4")
    assert drawn[3] == ""


def test_progress_has_a_bar_for_each_stage() -> None:
    stream = Terminal()
    with Progress(stream=stream) as bar:
        for stage, total in (("ranges", 4), ("round", 2), ("round", 2)):
            for done in range(total + 1):
                bar.show(stage, done, total)
    bars = re.findall(r"\[K(\w+) \[[#.]+\] (\d)/(\d)", stream.getvalue())
    assert [stage for stage, _, _ in dict.fromkeys(bars)] == ["ranges", "round"]
    assert bars.count(("round", "0", "2")) == 2  # begun again
    assert stream.getvalue().endswith("\r\x1b[K")


def test_progress_elsewhere_draws_nothing() -> None:
    stream = io.StringIO()
    with Progress(0, "images", stream=stream) as bar:
        bar.advance(5)
    assert stream.getvalue() == ""


class LostTerminal(Terminal):
    tried = 0

    def write(self, text: str) -> int:
        self.tried += 1
        raise OSError("gone")


def test_progress_on_a_lost_terminal_does_not_stop_the_work() -> None:
    terminal, done = LostTerminal(), 0
    with Progress(2, "images", stream=terminal) as bar:
        for _ in range(2):
            bar.advance()
            done += 1
    assert done == 2 and terminal.tried > 0


def test_progress_never_reaches_the_last_column(monkeypatch: pytest.MonkeyPatch) -> None:
    # A drawing that is longer than the line leaves its beginning behind when the next one clears the line.
    monkeypatch.setattr(terminal, "terminal_columns", lambda _: 60)
    stream = Terminal()
    with Progress(6, "verify the deploy form against the training form", stream=stream) as bar:
        bar.advance(label="short")
    drawn = stream.getvalue().split("\r\x1b[K")
    assert max(map(len, drawn)) == 59 and drawn[1].startswith("verify the deploy form") and "… [" in drawn[1]
    assert drawn[2].startswith("short [")


@pytest.mark.parametrize("terminal", [True, False])
def test_warning_while_a_bar_is_drawn_stands_in_a_line_of_its_own(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)

    def body(_: argparse.Namespace) -> Output:
        with Progress(2, "images", stream=stream):
            logging.getLogger("repvgg_deploy.some").warning("mind")
        return Output({}, "")

    assert run(body, parse()) == 0
    painted = "0/2 0 s\r\x1b[K\x1b[33mWARNING\x1b[0m: mind\n\r\x1b[K"
    assert stream.getvalue().endswith(painted if terminal else "WARNING: mind\n")
    assert terminal or stream.getvalue() == "WARNING: mind\n"


def test_progress_elsewhere_says_a_line_every_ten_seconds_after_half_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now, stream = [100.0], io.StringIO()
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    with Progress(5000, "images", stream=stream) as bar:
        for _ in range(45):
            now[0] += 1.0
            bar.advance(100)
    assert stream.getvalue().splitlines() == [
        "images: 3,000 of 5,000, 100/s, 20 s left",
        "images: 4,000 of 5,000, 100/s, 10 s left",
    ]


def test_progress_on_a_terminal_shows_rate_and_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now, stream = [100.0], Terminal()
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    with Progress(1000, "images", stream=stream) as bar:
        now[0] += 50
        bar.advance(100)
    assert "100/1000 2/s, 7:30 min left" in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.2, "0 s"), (59.4, "59 s"), (61, "1:01 min"), (3599, "59:59 min"), (7860, "2:11 h")]
)
def test_time_is_shown_in_the_unit_that_suits_it(seconds: float, shown: str) -> None:
    assert terminal.show_time(seconds) == shown


@pytest.mark.parametrize("variable", ["NO_COLOR", "TERM"])
def test_colour_is_for_terminals_that_want_it(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    painted = terminal.paint("yes", "good")
    assert terminal.colour(painted, Terminal()) == "\x1b[32myes\x1b[0m"
    assert terminal.colour(painted, io.StringIO()) == "yes"
    monkeypatch.setenv(variable, "1" if variable == "NO_COLOR" else "dumb")
    assert terminal.colour(painted, Terminal()) == "yes"


def test_painted_cells_stand_in_line_and_lose_their_colour_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    table = format_table([["a", "b"], [terminal.paint("good", "good"), "1"]], "<>")
    assert terminal.plain(table) == "  a     b\n  good  1"
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.setenv("TERM", "xterm")
        assert run(lambda _: Output({}, table), parse()) == 0
        assert ("\x1b[32m" in stream.getvalue()) == stream.isatty()


def test_error_on_a_terminal_is_red_and_folded_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: argparse.Namespace) -> Output:
        raise InputError("a message " * 20, remedy="a remedy " * 20)

    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert run(fail, parse()) == 1
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("\x1b[31merror:\x1b[0m a message")
    assert max(len(re.sub(r"\x1b\[\d+m", "", line)) for line in lines) <= 80
    assert all(line.endswith(("message", "a", "remedy", "remedy:")) for line in lines)


def test_text_is_folded_for_a_terminal_and_left_alone_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    long = "seconds  " + "word " * 20
    for stream, lines in ((Terminal(), 2), (io.StringIO(), 1)):
        monkeypatch.setattr(sys, "stdout", stream)
        assert run(lambda _: Output({}, long.rstrip()), parse()) == 0
        assert len(stream.getvalue().splitlines()) == lines, stream.getvalue()


def test_fold_breaks_between_words_below_the_value() -> None:
    text = format_pairs([("asked for", "one two three four"), ("device", "T4")])
    assert fold_lines(text, 22) == "asked for  one two\n           three four\ndevice     T4"


def test_fold_of_a_continued_value_keeps_its_place() -> None:
    assert fold_lines("    one two three", 12) == "    one two\n    three"


def test_fold_of_an_indented_name_and_value_stands_below_the_value() -> None:
    assert fold_lines("  no   one two three four", 17) == "  no   one two\n       three four"


def test_fold_of_a_row_whose_last_cell_is_long_stands_below_that_cell() -> None:
    assert fold_lines("  cat  2  a tench, a church", 20) == "  cat  2  a tench, a\n          church"


def test_groups_have_their_name_above_their_rows() -> None:
    rows = [["model", "batch", "ms"], ["a", "1", "2.0"], ["a", "8", "16.0"], ["b", "1", "3.0"]]
    lines = ["    batch    ms", "  a", "        1   2.0", "        8  16.0", "  b", "        1   3.0"]
    assert format_groups(rows, ">>").split("\n") == lines


def test_fold_leaves_tables_long_words_and_short_lines_as_they_are() -> None:
    table = format_table([["layer", "SQNR dB", "MACs"], ["stage1.0.conv", "40.0", "4.8%"]], "<>>")
    assert fold_lines(table, 20) == table
    assert fold_lines("0123456789" * 3, 20) == "0123456789" * 3
    assert fold_lines("  two words\n\nmore", 20) == "  two words\n\nmore"


def test_fold_of_a_long_line_without_a_gap_ends() -> None:
    # With a pattern that backtracks, this does not.
    assert fold_lines("a b " * 2000, 80).count("\n") > 90


class Lost(io.StringIO):
    """A standard output that takes nothing any more."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self._error = error

    def write(self, text: str) -> int:
        raise self._error


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [(BrokenPipeError(), 141, ""), (OSError(28, "No space left on device"), 1, "standard output: cannot be written")],
)
def test_run_whose_output_is_lost_ends_with_a_code_and_no_traceback(
    error: OSError, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", Lost(error))
    assert run(lambda _: Output(data={}, text="done"), argparse.Namespace()) == code
    heard = capsys.readouterr().err
    assert said in heard and "Traceback" not in heard


def test_run_that_a_signal_ends_says_which(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(raising(common.Terminated(signal.SIGTERM)), argparse.Namespace()) == 143
    assert "terminated by SIGTERM" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["many", "nan", "-1", "11"])
def test_number_outside_its_bounds_is_named(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="a share"):
        common.parse_number(text, least=0, most=10, what="a share from 0 to 10")


def test_help_keeps_the_lines_of_examples_and_folds_all_else() -> None:
    from repvgg_deploy.cli.trt import build_parser

    (commands,) = [action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    for name, parser in commands.choices.items():
        text = parser.format_help()
        assert f"usage: repvgg-trt {name}" in text, name
        assert (parser.epilog or "") in text, name


_PRINTS = """
import argparse, os, sys
from repvgg_deploy.cli.common import Output, run

def body(args):
    with open(sys.argv[1], "wb") as file:
        file.write(b"data")
        file.flush()
        for number in (1, 2):
            os.write(number, b"noise of a library")  # an error where the number is free
    return Output({}, "the answer", "ask again")

sys.exit(run(body, argparse.Namespace()))
"""


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
@pytest.mark.parametrize(
    ("closed", "code", "said"),
    [(">&-", 1, "standard output: is closed"), ("2>&-", 0, ""), ("<&-", 0, "next: ask again"), ("2>/dev/full", 0, "")],
)
def test_closed_or_full_stream_harms_no_file_and_is_no_crash(tmp_path: Path, closed: str, code: int, said: str) -> None:
    if "/dev/full" in closed and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    script, target = tmp_path / "prints.py", tmp_path / "model"
    script.write_text(_PRINTS.replace("for number in (1, 2):", "for number in (1,):") if "full" in closed else _PRINTS)
    command = f"exec {sys.executable} {script} {target} {closed}"
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == code
    assert said in done.stderr and "Traceback" not in done.stderr
    assert not target.exists() if code else target.read_bytes() == b"data"
    assert (done.stdout.endswith("the answer\n")) == (code == 0)


def test_missing_package_becomes_the_extra_that_brings_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(raising(ModuleNotFoundError("No module named 'onnx'", name="onnx")), parse()) == 1
    assert "pip install '.[quantize" in capsys.readouterr().err
    assert run(raising(ModuleNotFoundError("No module named 'xyz'", name="xyz")), parse()) == 1
    assert "unexpected ModuleNotFoundError" in capsys.readouterr().err
