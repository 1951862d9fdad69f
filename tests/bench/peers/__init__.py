"""NovaFS beside a file system that does nothing and beside JuiceFS: the same work, in turns, in one run, as ratios.

    python -m tests.bench.peers --juicefs PROGRAM [--only SCENARIO]… [--rounds N] [--list]

A figure of one machine and one minute says little about another's; a ratio of two figures that were measured a second apart says more, and
the median of several rounds says how far to trust it. So each scenario brings up everybody who takes part, and then lets them take turns.

    site        the store behind its relay, Redis, the image, and the volumes in which it is
    nullfs      the file system that does nothing: what pyfuse3 and the kernel take by themselves
    reads, boots, bulk, writes, guests      the scenarios
    results     what was measured, as JSON; a scenario that is measured again replaces what is there
    rows        which ratios of it are wanted, and how large
    report      the table and the plots in docs/performance.md
"""
