"""The reader of documents itself: a session that is not run, or an output that matches anything, would prove nothing."""

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
