#!/bin/sh
# Runs the tests under coverage, the daemon's processes included, and demands the share of lines that pyproject.toml names.
#
#   tools/test.sh "tests/unit tests/mount" "tests/unit" "tests/mount tests/e2e" [pytest arguments]
#
# The first argument is what to run; the second and the third together are a whole run. Of that the share is demanded, and where there are two
# processors and no arguments of pytest its two parts run beside each other: each of them waits half of its time. Called by `make test`.
set -eu
cd "$(dirname "$0")/.."
bin=$PWD/.venv/bin
# Servers and file-system tools that the tests start live in sbin, which is not in everybody's PATH; novafs is found there, too.
PATH=$bin:$PATH:/usr/local/sbin:/usr/sbin:/sbin
export PATH

chosen=$1
first=$2
second=$3
shift 3

"$bin/coverage" erase
status=0
# A test that hangs says where, and ends the run; so does a run that does not end after its last test.
pytest="timeout --foreground --kill-after=60 5400 .venv/bin/coverage run -m pytest -o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true"
if [ "$chosen" = "$first $second" ] && [ $# -eq 0 ] && [ "$(nproc)" -gt 1 ]; then
    # Caches are for the next run of the same tests: two runs at a time would write into each other's.
    printf '%s\n' "$pytest -p no:cacheprovider $first" "$pytest -p no:cacheprovider $second" | "$bin/python" tools/beside.py || status=$?
else
    # $pytest and $chosen are lists of words on purpose.
    # shellcheck disable=SC2086
    $pytest "$@" $chosen || status=$?
fi
[ $status -eq 0 ] || echo "test: pytest ended with status $status" >&2

"$bin/coverage" combine --quiet || status=1
if [ "$chosen" = "$first $second" ]; then
    "$bin/coverage" report || {
        echo "test: the coverage is too low, see the table above" >&2
        status=1
    }
fi
exit $status
