"""The help of `bst`: the list of commands, the commands of a group, and the nearest command to a mistyped one."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Iterable, Mapping
from itertools import groupby

from bst_base.errors import UserError, nearest

Command = tuple[str, str]
"""The module of a command, and one line of help."""

WIDTH = 120


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of a command's description, and adds the default to options whose help lacks it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help, action.default
        unsaid = (None, False, "", [], (), argparse.SUPPRESS)
        if text is None or "default" in text or not action.option_strings or default in unsaid:
            return text
        said = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)
        return f"{text} (default: {said.replace('%', '%%')})"


def needed_by(action: argparse.Action) -> str | None:
    """Return the option that this one requires (its help begins with "with --OTHER: "); None if it requires none."""
    found = re.match(r"with (--[\w-]+): ", action.help or "")
    return found[1] if found else None


def refuse_alone(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Raise UserError for an option that was given without the option it requires: it would be ignored."""
    options = {name: action for action in parser._actions for name in action.option_strings}
    for action in parser._actions:
        other = needed_by(action)
        if other and _given(action, args) and not _given(options[other], args):
            raise UserError(f"{action.option_strings[-1]} means nothing without {other}: give both, or neither")


def _given(action: argparse.Action, args: argparse.Namespace) -> bool:
    return getattr(args, action.dest) != action.default


def overview(sections: Mapping[str, Mapping[str, Command]], groups: Mapping[str, str]) -> str:
    """Return the help of all commands by section; a group of commands has one line with its commands' names."""
    lines = [
        "usage: bst COMMAND ...",
        "       bst COMMAND --help     what a command does, and its options",
        "       bst GROUP              the commands of a group",
        "       bst --version",
    ]
    for title, commands in sections.items():
        lines += ["", title]
        for first, members in groupby(commands, key=lambda name: name.partition(" ")[0]):
            names = list(members)
            if first in groups:
                names = [name.partition(" ")[2] for name in names]
                lines += _line(first, f"{groups[first]}: {', '.join(names)}")
            else:
                lines += _line(first, commands[first][1])
    return "\n".join(lines)


def listing(commands: Mapping[str, Command], group: str, about: str) -> str:
    """Return the help of a group, one line per command; `about`: describes the group."""
    members = {name.partition(" ")[2]: text for name, (_, text) in commands.items() if name.startswith(f"{group} ")}
    head = [
        f"usage: bst {group} COMMAND ...",
        f"       bst {group} COMMAND --help     what a command does, and its options",
        "",
        about,
    ]
    return "\n".join([*head, *(line for name, text in members.items() for line in _line(name, text))])


def nearest_command(typed: list[str], commands: Iterable[str], groups: Iterable[str]) -> str | None:
    """Return the command or group most similar to the first words of a command line, or None."""
    names = [*commands, *groups]
    last_words = {name.rpartition(" ")[2]: name for name in reversed(names)}
    for words in (typed[:2], typed[:1]):
        name = nearest(" ".join(words), names, cutoff=0.8)
        if name:
            return name
    last_word = nearest(typed[0], last_words, cutoff=0.75)  # `bst prepare` is `bst data prepare`
    return last_words[last_word] if last_word else None


def _line(name: str, text: str) -> list[str]:
    return textwrap.wrap(f"{name:<11} {text}", WIDTH, initial_indent="  ", subsequent_indent=" " * 14)
