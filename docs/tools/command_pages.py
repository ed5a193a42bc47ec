"""A page for each command, made from its own argument parser: the same texts as `--help`, an anchor for each option."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

from repvgg_deploy.cli import export, trt


def make_pages() -> dict[str, str]:
    """Markdown by the page's path below the site."""
    return {_page(parser): "\n".join(_lines(parser)).rstrip() + "\n" for parser, _ in _parsers()}


def make_list() -> str:
    """A table of all commands, for the page that lists them."""
    rows = [f"| [`{parser.prog}`]({_page(parser)}) | {_sentence(summary)} |" for parser, summary in _parsers()]
    return "\n".join(["| command | what it does |", "|---|---|", *rows])


def find_pages() -> dict[str, str]:
    """The page of each command, by what is typed."""
    return {parser.prog: _page(parser) for parser, _ in _parsers()}


def _parsers() -> Iterator[tuple[argparse.ArgumentParser, str]]:
    """Each command's parser, and what it does in half a line."""
    yield export.build_parser(), "make a verified ONNX of a checkpoint, or say what the checkpoint is"
    parent = trt.build_parser()
    (commands,) = (action for action in parent._actions if isinstance(action, argparse._SubParsersAction))
    summaries = {choice.dest: choice.help or "" for choice in commands._choices_actions}
    for name, parser in commands.choices.items():
        yield parser, summaries[name]


def _page(parser: argparse.ArgumentParser) -> str:
    return f"commands/{parser.prog.removeprefix('repvgg-').replace(' ', '-')}.md"


def _lines(parser: argparse.ArgumentParser) -> Iterator[str]:
    yield f"# {parser.prog}\n"
    yield f"{_text(parser.description or '')}\n"
    given = [_value(parser, action) for action in parser._actions if not action.option_strings]
    needed = [
        f"{action.option_strings[0]} {_value(parser, action)}"
        for action in parser._actions
        if action.required and action.option_strings
    ]
    yield "```sh"
    yield " ".join([parser.prog, *needed, "[options]", *given])
    yield "```\n"
    examples = (parser.epilog or "").removeprefix("examples:").splitlines()
    if any(examples):
        yield "```sh"
        yield from (_example(line.strip()) for line in examples if line.strip())
        yield "```\n"
    shared: list[str] = []  # what all commands have comes last
    for group in parser._action_groups:
        title = {"positional arguments": "what it is given"}.get(group.title or "", group.title or "")
        is_shared = title == "common options"
        actions = [action for action in group._group_actions if not isinstance(action, argparse._HelpAction)]
        if actions:
            block = [f"## {_capital(title)}\n", *(line for action in actions for line in _option(parser, action))]
            shared += block if is_shared else []
            yield from () if is_shared else block
    yield from shared
    yield from (line for action in parser._actions[:1] for line in _option(parser, action))  # --help


def _option(parser: argparse.ArgumentParser, action: argparse.Action) -> Iterator[str]:
    """Heading with an anchor, and the help text."""
    value = _value(parser, action)
    name = max(action.option_strings, key=len) if action.option_strings else ""
    short = f" (`{action.option_strings[0]}`)" if len(action.option_strings) > 1 else ""
    shown = f"`{' '.join(filter(None, [name, value]))}`{{ .option }}"
    anchor = name.lstrip("-") if name else re.sub(r"\W+", "-", value.lower()).strip("-")
    if action.choices is not None and action.metavar is None:
        choices = ", ".join(f"`{choice}`" for choice in action.choices)
        shown = f"`{name}`{{ .option }} {choices}"
    yield f"### {shown}{short} {{ #{anchor} }}\n"
    yield f"{_text(parser._get_formatter()._expand_help(action)) if action.help else ''}\n"


def _value(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """What an option takes, as `--help` shows it: `N`, `SM [SM ...]`; empty for a switch."""
    formatter = parser._get_formatter()
    name = action.dest.upper() if action.option_strings else action.dest
    return "" if action.nargs == 0 else formatter._format_args(action, name)


def _text(text: str) -> str:
    """A help text as Markdown: a sentence, with options and file names as code."""
    text = " ".join(text.split())
    text = re.sub(r"(?<![\w`-])(--?[a-z][\w-]+(?: [A-Z][A-Z-]+\b)?)", r"`\1`", text)
    commands = "|".join(command.name for command in trt.COMMANDS)
    text = re.sub(rf"\b(repvgg-(?:export|trt(?: (?:{commands}))?))\b(?!`)", r"`\1`", text)
    text = text.replace("<", "&lt;").replace("*", r"\*")
    return _sentence(text)


def _sentence(text: str) -> str:
    return _capital(text) + ("" if text.endswith((".", "…")) else ".")


def _capital(text: str) -> str:
    first = text.partition(" ")[0]  # `auto: …`, `cpu, cuda or …` are values, and stay as they are typed
    return text[:1].upper() + text[1:] if first.isalpha() else text


def _example(line: str) -> str:
    """The remark after a command as a comment of the shell."""
    command, gap, remark = line.partition("  ")
    return f"{command}  # {remark.strip().strip('()')}" if gap and remark.strip() else command
