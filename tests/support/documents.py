"""Commands in documents, found, run and compared with the output that the document shows.

A fenced block with the language ``console`` is a session: lines that begin with ``$ `` are commands (a trailing backslash or an
open here-document continues them on lines that begin with ``> ``), the lines after a command are what it printed. All sessions of
one document run in one shell, in order, in an empty directory. A block that cannot run in a test says why in a comment on the line
before it, ``<!-- not executed: reason -->``; a block in another language is not a session.

Comparison is by shape: numbers with or without a unit and hexadecimal names may differ, runs of blanks are alike, a line ``…``
stands for any lines and a ``…`` inside a line for any text. So a document's output stays what the thing prints, and need not be
what it printed here.
"""

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SEPARATOR = "\x1e"  # ASCII's record separator: no command of ours prints it
ELLIPSIS = "…"
_NUMBER = r"\d[\d.,]*(?:\s?(?:(?:[KMGTPkmgtp]i?)?B|[KMGT]|us|ms|s|min|h)\b|)"
_VARIABLE = re.compile(rf"(?P<ellipsis>{ELLIPSIS})|(?P<hex>\b(?=[0-9a-f]*\d)[0-9a-f]{{8,}}\b)|(?P<number>{_NUMBER})|(?P<blank>\s+)")


@dataclass(frozen=True)
class Command:
    """One command of a document with the lines that the document shows as its output. line: where it stands, from 1."""

    text: str
    expected: tuple[str, ...]
    line: int


def commands_of(path: Path) -> list[Command]:
    """All commands of the document's executed sessions. Raises ValueError for a block that is not closed or has no command."""
    commands: list[Command] = []
    lines = path.read_text().splitlines()
    index = 0
    while index < len(lines):
        opening = re.match(r"(\s*)(`{3,})(\w*)\s*$", lines[index])
        if not opening:
            index += 1
            continue
        start, indent, fence = index, opening[1], opening[2]
        index += 1
        while index < len(lines) and lines[index].strip() != fence:
            index += 1
        if index == len(lines):
            raise ValueError(f"{path}: the block at line {start + 1} is not closed")
        if opening[3] == "console" and "<!-- not executed: " not in lines[start - 1]:
            body = [line.removeprefix(indent) for line in lines[start + 1 : index]]
            commands += _session(body, start + 2, path)
        index += 1
    return commands


def _session(body: Sequence[str], first_line: int, path: Path) -> list[Command]:
    commands: list[Command] = []
    for offset, line in enumerate(body):
        if line.startswith("$ "):
            commands.append(Command(line[2:], (), first_line + offset))
        elif not commands:
            raise ValueError(f"{path}: the block at line {first_line - 1} does not begin with a command")
        elif (line == ">" or line.startswith("> ")) and not commands[-1].expected:
            last = commands.pop()
            commands.append(Command(f"{last.text}\n{line[2:]}", (), last.line))
        else:
            last = commands.pop()
            commands.append(Command(last.text, (*last.expected, line), last.line))
    return commands


def run_commands(
    commands: Sequence[Command], directory: Path, environment: Mapping[str, str], replacements: Mapping[str, str], *, timeout_s: float
) -> list[str]:
    """Runs the commands in one shell and returns what each printed. `replacements` puts a test's servers in the place of a
    document's (``s3.example.com`` becomes a real address), in commands, and back in what they print.

    Raises AssertionError naming the first command that failed.
    """
    script = ["set -euo pipefail", "exec 2>&1"]
    for number, command in enumerate(commands):
        text = command.text
        for ours, theirs in replacements.items():
            text = text.replace(ours, theirs)
        script += [f"printf '{SEPARATOR}{number}\\n'", text]
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=directory,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    text = done.stdout
    for ours, theirs in replacements.items():
        text = text.replace(theirs, ours)
    outputs = [part.partition("\n")[2] for part in text.split(SEPARATOR)[1:]]
    if done.returncode != 0:
        failed = commands[len(outputs) - 1]
        raise AssertionError(f"line {failed.line}: {failed.text!r} ended with status {done.returncode}:\n{outputs[-1]}")
    return outputs


def matches(expected: Sequence[str], printed: str) -> bool:
    """Whether the lines that a document shows have the shape of what was printed. No expected lines match anything."""
    shown = list(expected)
    while shown and not shown[-1].strip():
        shown.pop()
    if not shown:
        return True
    parts = [r"(?:.*\n)*?" if line.strip() == ELLIPSIS else _pattern(line) + r"[^\S\n]*\n" for line in shown]
    lines = printed.rstrip().splitlines()
    return re.fullmatch("".join(parts), "".join(f"{line}\n" for line in lines)) is not None


def _pattern(line: str) -> str:
    result, end = "", 0
    for found in _VARIABLE.finditer(line):
        result += re.escape(line[end : found.start()])
        result += {"ellipsis": ".*", "hex": "[0-9a-f]+", "number": _NUMBER, "blank": r"[^\S\n]+"}[found.lastgroup or ""]
        end = found.end()
    return result + re.escape(line[end:])
