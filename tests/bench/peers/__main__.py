"""The command of the package: runs scenarios, adds to the results, and writes what docs/performance.md says of them.

python -m tests.bench.peers --juicefs PROGRAM [--only SCENARIO]… [--rounds N] [--seconds S] [--hour] [--directory DIR] [--no-report]
python -m tests.bench.peers --report        only from the results that are there
python -m tests.bench.peers --list
"""

from __future__ import annotations

import argparse
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import FrameType

from tests.bench.peers import boots, bulk, guests, reads, report, results, writes
from tests.bench.peers.results import Measured, Round
from tests.bench.peers.site import Site
from tests.support.guest import ROOT

RESULTS = ROOT / ".cache" / "bench" / "peers.json"
DOCUMENT = ROOT / "docs" / "performance.md"
MIXED_S = 60.0
HOUR_S = 3600.0

Scenario = Callable[[Site, int], Iterator[Round]]


def scenarios(load_s: float) -> dict[str, Scenario]:
    """All of them, in the order in which they run."""
    return {
        "random-1": partial(reads.random_reads, depth=1),
        "random-16": partial(reads.random_reads, depth=16),
        "image-1": partial(reads.random_reads, depth=1, holes=True),
        "image-16": partial(reads.random_reads, depth=16, holes=True),
        "sequential": reads.sequential_direct,
        "page-cache": reads.page_cache,
        "boot-warm": boots.warm,
        "boot-learned": boots.learned,
        "boot-unlearned": boots.unlearned,
        "whole": bulk.whole_image,
        "import": bulk.import_image,
        "fsync": writes.fsynced,
        "clones": guests.clones,
        "mixed": lambda site, rounds: guests.mixed(site, load_s),
    }


def run(names: Sequence[str], options: argparse.Namespace) -> None:
    """Each scenario, its results saved before the next begins."""
    chosen = scenarios(HOUR_S if options.hour else MIXED_S)
    with (
        tempfile.TemporaryDirectory(dir=options.directory, prefix="novafs-peers-") as directory,
        Site(Path(directory), options.juicefs, seconds=options.seconds) as site,
    ):
        for name in names:
            site.daemons = []
            began_s = time.monotonic()
            rounds: list[Round] = []
            for one in chosen[name](site, options.rounds):
                rounds.append(one)
                print(f"{name} {len(rounds)}: " + ", ".join(f"{key} {value:,.4g}" for key, value in one.items()), flush=True)
            daemons = [asdict(daemon) for daemon in site.daemons]
            everything = results.load(options.results)
            everything[name] = Measured(results.now(), results.machine(), rounds, daemons)
            results.save(options.results, everything)
            print(f"{name}: {time.monotonic() - began_s:.0f} s", flush=True)


def main() -> None:
    known = list(scenarios(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--juicefs", help="JuiceFS's program")
    parser.add_argument("--only", action="append", choices=known, metavar="SCENARIO", help="may be given more than once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3, help="of each turn of fio")
    parser.add_argument("--hour", action="store_true", help=f"the mixed load lasts an hour, not {MIXED_S:.0f} s")
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"), help="on a real disk: journals, caches and copies go there")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument("--no-report", action="store_true", help="leave docs/performance.md alone")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--list", action="store_true", help="the scenarios")
    options = parser.parse_args()
    if options.list:
        print("\n".join(known))
        return

    def stop(number: int, frame: FrameType | None) -> None:
        for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(other, signal.SIG_IGN)  # what follows cleans up, and is not to be cut short
        raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    if not options.report:
        run(options.only or known, options)
    if not options.no_report:
        report.write(results.load(options.results), options.document)


if __name__ == "__main__":
    main()
