#!/bin/sh
# Runs the tests under coverage, the daemon's processes included, and demands the share of lines that pyproject.toml names.
#
#   tools/test.sh "tests/unit tests/mount" "tests/unit tests/mount tests/e2e" [pytest arguments]
#
# The first argument is what to run, the second what a whole run is: the share is demanded of a whole run only. Called by `make test`.
set -eu
cd "$(dirname "$0")/.."
bin=$PWD/.venv/bin
# Servers and file-system tools that the tests start live in sbin, which is not in everybody's PATH; novafs is found there, too.
PATH=$bin:$PATH:/usr/local/sbin:/usr/sbin:/sbin
export PATH

chosen=$1
whole=$2
shift 2

"$bin/coverage" erase
status=0
# A test that hangs says where, and ends the run; so does a run that does not end after its last test. $chosen is a list of words on purpose.
# shellcheck disable=SC2086
timeout --foreground --kill-after=60 5400 "$bin/coverage" run -m pytest -o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true "$@" $chosen || status=$?
[ $status -eq 0 ] || echo "test: pytest ended with status $status" >&2

"$bin/coverage" combine --quiet || status=1
if [ "$chosen" = "$whole" ]; then
    "$bin/coverage" report || {
        echo "test: the coverage is too low, see the table above" >&2
        status=1
    }
fi
exit $status
