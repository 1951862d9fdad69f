"""`python -m novafs.cli`: the same as the `novafs` command."""

import sys

from novafs.cli import main

sys.exit(main())
