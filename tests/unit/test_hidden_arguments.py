"""Which arguments are taken off the command line because a password is in them."""

import pytest

from novafs.cli.hidden import split

URL = "redis://:swordfish@host:1/0"


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        (["mount", "web", "/m", "--l2-url", URL, "-v"], ["mount", "web", "/m", "-v"]),
        (["mount", "web", "/m", f"--l2-url={URL}"], ["mount", "web", "/m"]),
        (["info", "web", "--set", f"l2.url={URL}", "--set", "l1.codec=zstd"], ["info", "web", "--set", "l1.codec=zstd"]),
        (["info", "web", f"--set=l2.url={URL}"], ["info", "web"]),
        (["mount", "web", "/m", "-o", f"ro,l2_url={URL},uid=5"], ["mount", "web", "/m", "-o", "ro,uid=5"]),
        (["mount", "web", "/m", f"-ol2_url={URL}"], ["mount", "web", "/m"]),
        (["mount", "web", "/m", "-fo", f"ro,l2_url={URL}"], ["mount", "web", "/m", "-fo", "ro"]),
        (["mount", "web", "/m", "-fo", f"l2_url={URL}"], ["mount", "web", "/m", "-f"]),
        (["mount", "web", "/m", f"-vfol2_url={URL}"], ["mount", "web", "/m", "-vf"]),
        (["info", "web", "--set", f" l2.url = {URL}"], ["info", "web"]),
        (["--l2-url", "redis://:first@host", "--l2-url", URL], []),
    ],
)
def test_a_url_with_a_password_is_taken_off(arguments: list[str], kept: list[str]) -> None:
    assert split(arguments) == (kept, URL)


def test_a_comma_of_a_sentinels_url_is_unescaped() -> None:
    kept, url = split(["-o", r"ro,l2_url=redis+sentinel://:swordfish@a\,b/main"])
    assert (kept, url) == (["-o", "ro"], "redis+sentinel://:swordfish@a,b/main")


@pytest.mark.parametrize(
    "arguments",
    [
        ["mount", "web", "/m", "--l2-url", "redis://host:1/0", "-o", "ro,l2_url=none"],
        ["mount", "web", "/m", "--l2-url"],
        ["info", "--set", "l2.codec=zstd", "-o"],
        ["ls", "web", "--", "--l2-url", URL],
        ["mount", "s3://bucket/x", "/m"],
    ],
)
def test_everything_else_stays(arguments: list[str]) -> None:
    assert split(arguments) == (arguments, None)
