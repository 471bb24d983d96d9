"""What a shell offers when TAB is pressed: the verbs and options of the parser, and the keys of a configuration."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import argcomplete
from argcomplete.completers import FilesCompleter
from argcomplete.shell_integration import shellcode

from qwen_image_finetune.config.words import known_keys


def script(shell: str) -> str:
    """What a shell has to run for `qif`; bash, zsh or fish."""
    return shellcode(["qif"], shell=shell)


def suggest(parser: argparse.ArgumentParser) -> None:
    """Answer the shell and end the process (argcomplete's protocol, in environment variables)."""
    for action in _actions(parser):
        if action.dest == "overrides":
            action.completer = _keys
        elif action.dest == "config":
            action.completer = FilesCompleter(("yaml", "yml"))
    argcomplete.autocomplete(parser, always_complete_options="long")


def _actions(parser: argparse.ArgumentParser) -> Iterator[Any]:
    for action in parser._actions:  # argparse has no public way to its arguments
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from _actions(verb)


def _keys(prefix: str, **_: Any) -> list[str]:
    """`section.key=` for every key that begins as what was typed."""
    return [f"{key}=" for key in sorted(known_keys()) if key.startswith(prefix)]
