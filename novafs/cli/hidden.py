"""Passwords on the command line are taken off it: `ps` shows it to every user of the host for as long as a mount lives.

A command that is given the URL of L2 with a password in it starts itself anew, with the URL in its environment, which only its own user
and root can read. For the moment before that it can be seen; a password belongs into a file (docs/configuration.md).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Final

from novafs.configkeys import BY_NAME, redact

_KEY: Final = BY_NAME["l2.url"]


def hide_arguments() -> None:
    """Start anew without passwords in the arguments, where there are any; else return. Called first of all."""
    arguments = sys.argv[1:]
    kept, url = split(arguments)
    if url is None or sys.orig_argv[-len(arguments) :] != arguments:
        return
    command = [sys.executable, *sys.orig_argv[1 : -len(arguments)], *kept]
    os.execve(sys.executable, command, {**os.environ, _KEY.variable: url})  # noqa: S606  # no shell on purpose


def split(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """The arguments without those that give L2 a URL with a password, and the last such URL, None where there is none."""
    kept: list[str] = []
    found: str | None = None
    rest = iter(arguments)
    for word in rest:
        if word == "--":
            kept += [word, *rest]
            break
        option, value, joined = _option(word, rest)
        if value is None:
            kept.append(word)
            continue
        remaining, url = _without_url(option, value)
        found = url if url is not None else found
        if remaining is None and option.startswith("-") and not option.startswith("--") and option != "-o":
            kept.append(option[:-1])  # the flags beside the o
        if remaining is not None:
            kept += [option + joined + remaining] if joined is not None else [option, remaining]
    return kept, found


def _option(word: str, rest: Iterator[str]) -> tuple[str, str | None, str | None]:
    """Option, its value, and what joins them in one word ("" or "="; None: two words). Value None: no option that may give the URL."""
    if (short := re.match(r"-[A-Za-mnp-z]+o", word)) is not None:
        # Short options in one word: -fo OPTS, -vofoo=bar.
        value = word[short.end() :]
        return (short[0], value, "") if value else (short[0], next(rest, None), None)
    for option in (_KEY.flag_name, "--set", "-o"):
        if word == option:
            return option, next(rest, None), None
        joined = "" if option == "-o" else "="
        if word.startswith(option + joined):
            return option, word.removeprefix(option + joined), joined
    return word, None, None


def _without_url(option: str, value: str) -> tuple[str | None, str | None]:
    """What stays of an option's value, None for nothing, and the URL that was taken out of it."""
    if option not in (_KEY.flag_name, "--set"):
        words = re.split(r"(?<!\\),", value)
        urls = [url for word in words if (url := _url(word, f"{_KEY.option}=")) is not None]
        stay = [word for word in words if _url(word, f"{_KEY.option}=") is None]
        return ",".join(stay) if stay else None, urls[-1].replace("\\,", ",") if urls else None
    url = _url(value, f"{_KEY.name}=" if option == "--set" else "")
    return (value, None) if url is None else (None, url)


def _url(text: str, before: str) -> str | None:
    name, equals, value = text.strip().partition("=") if before else ("", "=", text.strip())
    url = value.strip() if f"{name.strip()}{equals}" == (before or "=") else ""  # spaces around the name are allowed
    return url if redact(url) != url else None
