"""The judge of the crash tests on a mount finds what it is there to find."""

from __future__ import annotations

import pytest

from tests.support.history import BLOCK, ImageHistory, Lost


def written(name: str = "a.raw") -> tuple[ImageHistory, list[bytes]]:
    """Three writes, the first one fsynced; the image after each of them."""
    history = ImageHistory(name)
    images = [history.write(0, 4)]
    history.promise(history.steps)
    images.append(history.write(1, 1).join([images[-1][:BLOCK], images[-1][2 * BLOCK :]]))
    images.append(images[-1][: 3 * BLOCK] + history.write(3, 1))
    return history, images


def test_every_point_in_time_since_the_promise_is_allowed() -> None:
    for number in range(3):
        history, images = written()
        assert history.check(images[number]) == 2 - number
        assert history.expected(0, 4) == images[number]


def test_zeros_an_old_a_moved_a_foreign_and_a_torn_block_are_found() -> None:
    history, images = written()
    last = images[-1]
    foreign = written("b.raw")[1][-1]
    cases = {
        "zeros": bytes(BLOCK) + last[BLOCK:],
        "version 1 of block 0": last[: 2 * BLOCK] + last[:BLOCK] + last[3 * BLOCK :],
        "never written": foreign[:BLOCK] + last[BLOCK:],
        "a part of": last[:100] + bytes(BLOCK - 100) + last[BLOCK:],
        "has 3 blocks": last[: 3 * BLOCK],
    }
    for message, content in cases.items():
        with pytest.raises(Lost, match=message):
            history.check(content)
    history.promise(history.steps)
    with pytest.raises(Lost, match="block 1 holds version 2"):
        history.check(images[0])
    history.check(last)


def test_a_later_write_without_an_earlier_one_is_no_point_in_time() -> None:
    history, images = written()
    mixed = images[0][: 3 * BLOCK] + images[2][3 * BLOCK :]
    with pytest.raises(Lost, match="no point in time"):
        history.check(mixed)


def test_a_truncate_that_comes_back_is_found() -> None:
    history, images = written()
    history.resize(1)
    history.resize(4)
    history.promise(history.steps)
    with pytest.raises(Lost, match="block 1 holds version"):
        history.check(images[-1])
    history.check(images[-1][:BLOCK] + bytes(3 * BLOCK))


def test_without_the_host_what_is_in_the_store_counts() -> None:
    history, images = written()
    history.promise(history.steps)
    with pytest.raises(Lost):
        history.check(images[1])
    history, images = written()
    history.promise(4, stored=True)
    history.promise(history.steps)
    assert history.check(images[1], host_lost=True) == 1


def test_a_write_that_failed_is_as_good_as_none() -> None:
    history, images = written()
    mark = history.steps
    history.write(2, 4)
    history.withdraw(mark)
    history.promise(history.steps)
    assert history.expected(0, 9) == images[-1]
    history.check(images[-1])
