"""The reader of documents itself: a session that is not run, or an output that matches anything, would prove nothing.

And what documents say about the code and its tests: each promise has a test, each kind of finding a row.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.documents import Command, commands_of, matches, run_commands

DOCUMENT = """\
Text.

```console
$ echo one
one
$ echo two; \\
> echo three
two
three
```

<!-- not executed: it would recurse -->
```console
$ make test
```

```sh
rm -rf everything
```
"""


def written(directory: Path, text: str) -> Path:
    path = directory / "document.md"
    path.write_text(text)
    return path


def test_sessions_are_found_and_the_rest_is_left_alone(tmp_path: Path) -> None:
    assert commands_of(written(tmp_path, DOCUMENT)) == [
        Command("echo one", ("one",), 4),
        Command("echo two; \\\necho three", ("two", "three"), 6),
    ]


@pytest.mark.parametrize("text", ["```console\n$ true\n", "```console\nno command\n```\n"])
def test_a_broken_block_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match="line 1"):
        commands_of(written(tmp_path, text))


def test_commands_share_one_shell_and_its_directory(tmp_path: Path) -> None:
    commands = [Command("value=7; touch here", (), 1), Command("echo $value; ls", (), 2)]
    assert run_commands(commands, tmp_path, {}, {}, timeout_s=30) == ["", "7\nhere\n"]


def test_the_command_that_failed_is_named(tmp_path: Path) -> None:
    commands = [Command("true", (), 3), Command("echo why; false", (), 5), Command("true", (), 7)]
    with pytest.raises(AssertionError, match=r"line 5: 'echo why; false' ended with status 1:\nwhy"):
        run_commands(commands, tmp_path, {}, {}, timeout_s=30)


def test_an_address_is_replaced_on_the_way_in_and_on_the_way_out(tmp_path: Path) -> None:
    commands = [Command("echo s3.example.com | sed s/real/REAL/", (), 1), Command("echo s3.example.com", (), 2)]
    outputs = run_commands(commands, tmp_path, {}, {"s3.example.com": "real:1234"}, timeout_s=30)
    assert outputs == ["REAL:1234\n", "s3.example.com\n"]


@pytest.mark.parametrize(
    ("expected", "printed"),
    [
        ([], "anything\n"),
        (["read 12 MiB in 0.3 s, 40 MiB/s"], "read 980 KiB in 14 ms, 1.2 GiB/s\n"),
        (["id   0123456789abcdef0", ""], "id fedcba9876543210f\n"),
        (["first", "…", "last"], "first\nx\ny\nlast\n"),
        (["first", "…", "last"], "first\nlast\n"),
        (["took … in all"], "took longer than before in all\n"),
        (["web.raw  512M  2026-11-22 14:03"], "web.raw 1.5G 2027-01-02 09:59\n"),
    ],
)
def test_output_of_the_same_shape_matches(expected: list[str], printed: str) -> None:
    assert matches(expected, printed)


@pytest.mark.parametrize(
    ("expected", "printed"),
    [
        (["one"], "two\n"),
        (["one"], "one\ntwo\n"),
        (["one", "two"], "one\n"),
        (["12 chunks"], "no chunks\n"),
        (["first", "…", "last"], "first\n"),
        (["one"], ""),
    ],
)
def test_output_of_another_shape_does_not_match(expected: list[str], printed: str) -> None:
    assert not matches(expected, printed)


# -- promises and tables ------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]


def promises() -> list[str]:
    """The numbers in `docs/semantics.md`."""
    return re.findall(r"^- (S\d+)\. \S", (ROOT / "docs/semantics.md").read_text(), re.MULTILINE)


def quoted(source: str) -> Iterator[tuple[str, str]]:
    """(number, test) of each promise that a test, or a machine of Hypothesis, says it shows: in its docstring or a comment of its own."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            shown = node.name.startswith("test_") or node.name.endswith("Machine")
            for line in lines[node.lineno - 1 : node.end_lineno] if shown else []:
                if match := re.search(r"\bsemantics: (S\d+(?:, S\d+)*)", line):
                    for number in match[1].split(", "):
                        yield number, node.name


def test_each_promise_is_shown_by_a_test_and_each_test_shows_one_that_is_made() -> None:
    found: dict[str, set[str]] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        for number, name in quoted(path.read_text()):
            found.setdefault(number, set()).add(name)
    made = promises()
    assert len(made) == len(set(made)) >= 21
    assert set(made) - set(found) == set(), "promised, and shown by no test"
    assert {number: found[number] for number in set(found) - set(made)} == {}, "shown, and promised nowhere"


def test_a_promise_outside_of_a_test_is_not_taken_for_one() -> None:
    source = """
# semantics: S1
def helper():
    'semantics: S2'
def test_it():
    'semantics: S3, S4. Both.'
class ThingMachine:
    'semantics: S5'
"""
    assert set(quoted(source)) == {("S3", "test_it"), ("S4", "test_it"), ("S5", "ThingMachine")}


def kinds_of_findings() -> set[str]:
    """The first argument of every finding that a check can make."""
    found: set[str] = set()
    for path in [*(ROOT / "novafs").glob("fsck*.py"), ROOT / "novafs/retention.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if name not in ("_add", "_problem", "Finding", "Problem") or not node.args:
                continue
            kind = node.args[0]
            if isinstance(kind, ast.Constant):
                found.add(kind.value)
            elif ast.unparse(kind) not in ("kind", "problem.kind"):  # handed on
                raise AssertionError(f"{path.name}: {ast.unparse(node)} makes a finding whose kind can not be told from here")
    return found


def test_each_kind_of_finding_has_a_row_and_each_row_a_kind() -> None:
    text = (ROOT / "docs/crash-safety.md").read_text()
    table = text.partition("## What `novafs fsck` finds\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([a-z]+)` \| (?:problem|note)", table, re.MULTILINE)
    assert len(rows) == len(set(rows)) > 10
    assert set(rows) == kinds_of_findings()


def test_names_in_crash_safety_and_concurrency_exist() -> None:
    """`Class.method` and `module.function` of the pages that a reviewer checks a change against."""
    sources = {path: path.read_text() for path in (ROOT / "novafs").rglob("*.py")}
    defined: set[str] = set()
    for source in sources.values():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                defined.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                defined.add(node.attr)
    for name in ("crash-safety.md", "concurrency.md"):
        for quoted_name in re.findall(r"`([A-Z]\w+\.\w+)`", (ROOT / "docs" / name).read_text()):
            first, last = quoted_name.split(".")
            assert first in defined and last in defined, f"docs/{name}: {quoted_name} is no more"
