"""The status page in a real browser, on a mount under load: what it shows, at every width, light and dark, and what does not run in it."""

from __future__ import annotations

import struct
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.browser import Browser, browser
from tests.support.ceph import free_port
from tests.support.guest_load import guest_load, make_image
from tests.support.mounted import Mount, mounted

pytestmark = [pytest.mark.fuse, pytest.mark.browser]

HOSTILE = "<img src=x onerror=alert(1)>&quot;'`${alert(2)}`\u202egpj.raw"
NAMES = ["web-01.raw", "db/primary.raw", HOSTILE]
SHOWN = [name.replace("\u202e", "\\u202e") for name in NAMES]
"""What would turn the rest of the line around is shown as what it is."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Mount, str]]:
    """A mount with three images, and the address of its page."""
    port = free_port()
    with mounted(tmp_path_factory.mktemp("page"), "--metrics", str(port), "--l1-capacity", "8MiB", l2="embedded") as mount:
        (mount.path / "db").mkdir()
        for number, name in enumerate(NAMES):
            make_image(mount.path / name, 160, seed=number)
        yield mount, f"http://127.0.0.1:{port}/"


@pytest.fixture(scope="module")
def tab() -> Iterator[Browser]:
    with browser() as found:
        yield found


def test_the_page_shows_a_mount_under_load_at_every_width_and_in_both_colours(
    served: tuple[Mount, str], tab: Browser, tmp_path: Path
) -> None:
    mount, url = served
    with guest_load(*(mount.path / name for name in NAMES)):
        tab.look(width=1280)
        tab.open(url)
        assert tab.wait("document.getElementById('state').textContent") != ""
        tab.wait("document.getElementById('state').textContent == 'ready'")
        tab.wait(
            "document.querySelectorAll('.image .map').length == 3 && [...document.querySelectorAll('.map')].every(m => m.childElementCount)"
        )
        tab.wait("document.querySelectorAll('.image .map .l1').length && document.querySelectorAll('.image .map .l2').length")
        tab.wait(r"/^[1-9][\d,.]*K?\/s$/.test(document.querySelector('#tiles dd').textContent)")  # reads a second
        tab.wait("document.querySelectorAll('#read-line polyline').length")
        assert sorted(tab.evaluate("[...document.querySelectorAll('.image h3')].map(h => h.textContent)")) == sorted(SHOWN)
        assert "commit" in tab.evaluate("[...document.querySelectorAll('#events .tag')].map(t => t.textContent)")
        assert tab.evaluate("document.querySelectorAll('#tiers tbody tr').length") == 3
        assert "request write" in tab.evaluate("document.getElementById('latency').textContent")
        for width in (360, 768, 1280):
            for dark in (False, True):
                tab.look(width=width, dark=dark)
                assert tab.evaluate("document.documentElement.scrollWidth") <= width, f"it is wider than a screen of {width}"
                ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
                assert (brightness(ground) < 0.1) == dark
                assert picture_size(tab.screenshot(tmp_path / f"{width}-{'dark' if dark else 'light'}.png"))[0] == width
                assert weak_contrast(tab) == []
    assert tab.trouble == []
    assert {address.split("?")[0] for address in tab.requested if not address.startswith("data:")} == {
        url,
        f"{url}status.json",
        f"{url}residency.json",
        f"{url}readyz",
    }


def test_a_map_has_a_table_for_those_who_do_not_see_it_and_answers_keys(served: tuple[Mount, str], tab: Browser) -> None:
    mount, url = served
    with (mount.path / "web-01.raw").open("rb") as file:
        file.read(1 << 20)
        tab.open(url)
        tab.wait("document.querySelector('.image .map rect')")
        tab.evaluate("document.querySelector('.image details').open = true")
        tab.wait("document.querySelectorAll('.image table tbody tr').length == 16")
        assert "in L1" in tab.evaluate("document.querySelector('.map').getAttribute('aria-label')")
        tab.evaluate("document.querySelector('.map').dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'}))")
        assert tab.evaluate("document.querySelector('.spot').textContent").startswith("0 B to ")


def test_names_of_images_are_text_and_nothing_from_elsewhere_runs(served: tuple[Mount, str], tab: Browser) -> None:
    mount, url = served
    with (mount.path / HOSTILE).open("rb"):
        tab.open(url)
        tab.wait("document.querySelectorAll('.image h3').length == 1")
        assert tab.evaluate("document.querySelector('.image h3').textContent") == SHOWN[2]
        assert tab.evaluate("document.images.length") == 0
        assert tab.trouble == []
        tab.evaluate(
            "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.ran = 1\"><div style=\"color: red\">x</div>')"
        )
        tab.evaluate("(() => { const s = document.createElement('script'); s.textContent = 'window.ran = 2'; document.body.append(s); })()")
        assert tab.evaluate("window.ran === undefined")
    tab.trouble.clear()  # of what the policy has refused just now


def test_the_page_says_when_the_daemon_has_gone(tmp_path: Path, tab: Browser) -> None:
    port = free_port()
    with mounted(tmp_path, "--metrics", str(port)) as mount:
        tab.open(f"http://127.0.0.1:{port}/")
        tab.wait("document.getElementById('state').textContent == 'ready'")
        subprocess.run(["fusermount3", "-u", str(mount.path)], check=True)
        mount.wait()
        tab.wait("document.getElementById('state').textContent == 'no answer'")
        assert not tab.evaluate("document.getElementById('notice').hidden")
    tab.trouble.clear()  # of the requests that failed


# --- what is measured -----------------------------------------------------------------------------------------------


def brightness(colour: str) -> float:
    """Relative luminance of "rgb(…)", as WCAG defines it."""
    parts = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def weak_contrast(tab: Browser) -> list[str]:
    """Texts whose contrast with what is behind them is below WCAG's 4.5 : 1."""
    found = tab.evaluate(
        """(() => {
            const seen = new Map();
            for (const e of document.querySelectorAll('body *')) {
                if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) || !e.offsetParent) continue;
                let behind = e;
                while (behind && getComputedStyle(behind).backgroundColor === 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
                const pair = [getComputedStyle(e).color, getComputedStyle(behind || document.body).backgroundColor].join('|');
                if (!seen.has(pair)) seen.set(pair, e.tagName + ': ' + e.textContent.trim().slice(0, 40));
            }
            return [...seen];
        })()"""
    )
    weak = []
    for pair, what in found:
        light, dark = sorted((brightness(colour) for colour in pair.split("|")), reverse=True)
        if (light + 0.05) / (dark + 0.05) < 4.5:
            weak.append(f"{what} ({pair})")
    return weak


def picture_size(png: bytes) -> tuple[int, int]:
    """Width and height of a PNG that is whole and not of one colour."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    data, at = b"", 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        if png[at + 4 : at + 8] == b"IDAT":
            data += png[at + 8 : at + 8 + length]
        at += length + 12
    assert len(set(zlib.decompress(data)[::997])) > 5
    return width, height
