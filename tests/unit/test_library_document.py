"""Every block of Python in docs/library.md runs, in order, and each line with `# →` gives what stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "library.md"
SHOWN = re.compile(r"^(?P<indent>\s*)(?P<expression>\S.*?)\s+# → (?P<value>.+)$")


def program_of(text: str) -> tuple[str, int]:
    """The blocks as one program, at the lines where they stand, and how many values it checks."""
    lines, shown, inside = [], 0, False
    for line in text.splitlines():
        if line.startswith("```"):
            inside = line == "```python"
            lines.append("")
        elif not inside:
            lines.append("")
        elif found := SHOWN.match(line):
            shown += 1
            lines.append(f"{found['indent']}_check({found['expression']}, {found['value']!r})")
        else:
            lines.append(line)
    return "\n".join(lines), shown


def test_the_examples_of_the_document_run_and_give_what_they_show(tmp_path: Path) -> None:
    program, shown = program_of(DOCUMENT.read_text())
    assert shown > 30
    checks = "def _check(found, shown):\n    assert repr(found) == shown, (found, shown)\n"
    path = tmp_path / "library.md"  # tracebacks name the document's own lines
    path.write_text(program)
    runner = f"import pathlib\npath = {str(path)!r}\nexec({checks!r})\nexec(compile(pathlib.Path(path).read_text(), path, 'exec'))\n"
    done = subprocess.run([sys.executable, "-W", "error", "-c", runner], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_an_example_that_gives_something_else_fails() -> None:
    program, shown = program_of("```python\n1 + 1  # → 3\nx = 5\n```\n2 + 2  # → 5\n")
    assert shown == 1
    assert program.splitlines()[1] == "_check(1 + 1, '3')"


def test_each_field_has_a_row() -> None:
    from dataclasses import fields

    from novafs import CacheConfig

    table = DOCUMENT.read_text().partition("## Settings")[2].partition("```")[0]
    assert [field.name for field in fields(CacheConfig) if f"`{field.name}`" not in table and field.name != "preset"] == []
