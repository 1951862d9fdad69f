"""What counting costs a hot 4 KiB read: `Image.read_nowait` as it is, beside the same without its instrumentation, interleaved.

    python -m tests.bench.instrumentation [--rounds 30] [--reads 20000] [--json]

Without: the same source with the lines taken out that count and time. The median over the rounds of the difference is the figure.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import statistics
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import trio

from novafs import imagereader
from novafs.catalogtree import ROOT_ID
from novafs.image import Image
from tests.support.engine import fresh_volume

COUNTING = ("perf_counter()", "traffic")
CHUNKS = 64

Read = Callable[[Image, int, int], bytes | None]


def bare() -> Read:
    """`ImageReader.read_nowait` without its counting."""
    source = textwrap.dedent(inspect.getsource(imagereader.ImageReader.read_nowait))
    lines = source.splitlines()
    kept = [line for line in lines if not any(word in line for word in COUNTING)]
    assert len(kept) == len(lines) - 5, "the lines that count have changed: tell this bench"
    space = dict(vars(imagereader))
    exec("from __future__ import annotations\n" + "\n".join(kept), space)
    found: Read = space["read_nowait"]
    return found


def measure(read: Read, image: Image, reads: int) -> float:
    """Microseconds a read of 4 KiB, all of them in L1, a few chunks in turn as a guest reads."""
    offsets = [(index * 5 % CHUNKS) * 65536 + index % 16 * 4096 for index in range(512)]
    began_s = time.perf_counter()
    for _ in range(reads // len(offsets)):
        for offset in offsets:
            read(image, offset, 4096)
    return (time.perf_counter() - began_s) / (reads // len(offsets) * len(offsets)) * 1e6


def run(rounds: int, reads: int) -> dict[str, float]:
    """Medians in microseconds."""

    async def main() -> dict[str, float]:
        with tempfile.TemporaryDirectory() as name:
            async with fresh_volume(Path(name)) as volume:
                entry = await volume.create(ROOT_ID, "a.raw")
                image = await volume.open_image(entry.node_id)
                await image.write(0, os.urandom(CHUNKS * 65536))
                await image.commit()
                await image.read(0, CHUNKS * 65536)
                without, with_ = bare(), imagereader.ImageReader.read_nowait
                measure(with_, image, reads)
                pairs = []
                for number in range(rounds):
                    await trio.lowlevel.checkpoint()
                    order = [without, with_] if number % 2 else [with_, without]
                    times = {read: measure(read, image, reads) for read in order}
                    pairs.append((times[without], times[with_]))
                await volume.close_image(image)
        return {
            "without_us": statistics.median(before for before, _ in pairs),
            "with_us": statistics.median(after for _, after in pairs),
            "cost_us": statistics.median(after - before for before, after in pairs),
        }

    return trio.run(main)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--reads", type=int, default=20_000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = run(arguments.rounds, arguments.reads)
    if arguments.json:
        print(json.dumps(found))
    else:
        print("a hot 4 KiB read: {without_us:.2f} µs bare, {with_us:.2f} µs as it is: counting costs {cost_us:.2f} µs".format(**found))


if __name__ == "__main__":
    main()
