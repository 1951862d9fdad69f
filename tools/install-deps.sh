#!/bin/sh
# Installs the Debian or Ubuntu packages that are missing, and nothing else.
#
#   tools/install-deps.sh demo     what building and running NovaFS needs
#   tools/install-deps.sh test     that, and the real servers and tools which the tests use
#
# What is there is found by looking for the thing itself (a command, a header), not for a package, so tools that came another way
# count. Where nothing is missing no package manager is started, so it is cheap to call before everything else. Uses sudo when it
# is not root. PYTHON=… names another interpreter than python3.
set -eu
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
python=${PYTHON:-python3}

fail() {
    echo "install-deps: $*" >&2
    exit 1
}

usage="usage: tools/install-deps.sh demo|test"
[ $# -eq 1 ] || fail "$usage"
case $1 in
    demo | test) wanted=$1 ;;
    *) fail "$usage" ;;
esac

have() {
    command -v "$1" >/dev/null 2>&1
}

as_root_quietly() {
    if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo "$@"; fi >/dev/null 2>&1 || true
}

# need PACKAGE COMMAND…: the package is missing unless the command succeeds.
missing=""
need() {
    package=$1
    shift
    "$@" >/dev/null 2>&1 || missing="$missing $package"
}

python_is_new_enough() {
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'
}

python_has_headers() {
    "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))'
}

is_ubuntu() {
    grep -qs '^ID=ubuntu$' /etc/os-release
}

have_chromium() {
    have chromium || have chromium-browser || have google-chrome
}

system_python_has_headers() {
    python=/usr/bin/python3 python_has_headers
}

look() {
    missing=""
    need python3-venv "$python" -c 'import venv, ensurepip'
    need python3-dev python_has_headers # pyfuse3 comes from PyPI as source, built against libfuse3
    need gcc have gcc
    need libc6-dev test -e /usr/include/stdlib.h
    need pkg-config have pkg-config
    need libfuse3-dev pkg-config --exists fuse3
    need fuse3 have fusermount3
    need e2fsprogs have mke2fs
    need qemu-utils have qemu-img
    if [ "$wanted" = test ]; then
        need redis-server have redis-server
        need ceph-mon have ceph-mon
        need ceph-osd have ceph-osd
        need radosgw have radosgw
        need ceph-common have ceph-authtool
        need qemu-system-x86 have qemu-system-x86_64
        need fio have fio
        need debootstrap have debootstrap
        need openssl have openssl
        need groff-base have groff
        need python3-dev system_python_has_headers # of the guest that NovaFS is installed in: tests/support/guest_python.py
        need prometheus have promtool
        # Ubuntu has it as a snap only, which runs neither as root nor in a container: its tests are skipped there.
        is_ubuntu || need chromium have_chromium
        need procps have ps
    fi
}

# An interpreter that was named, or that is there but too old, is the user's to replace: apt would not change which one is found.
check_python() {
    if have "$python"; then
        python_is_new_enough || fail "NovaFS needs Python 3.11 or newer; $(command -v "$python") is $("$python" -V 2>&1). \
Use Debian 12 or Ubuntu 24.04 (or newer), or name another interpreter: make PYTHON=/path/to/python3.12 …"
    elif [ "$python" != python3 ]; then
        fail "PYTHON=$python: there is no such command"
    fi
}

check_python
look
if [ -n "$missing" ]; then
    have apt-get || fail "these are missing, named as on Debian:$missing. There is no apt-get here: install them by hand, then try again"
    as_root=""
    if [ "$(id -u)" -ne 0 ]; then
        have sudo || fail "these packages are missing:$missing. Run as root: apt-get install$missing"
        as_root=sudo
    fi
    redis_was_there=$(have redis-server && echo yes || echo no)
    prometheus_was_there=$(have prometheus && echo yes || echo no)
    echo "==> Installing Debian packages:$missing"
    # DEBIAN_FRONTEND reaches apt through env, because sudo drops it from the environment. NEEDRESTART_SUSPEND: Ubuntu asks otherwise.
    apt="$as_root env DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 RUNLEVEL=1 apt-get -q -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3"
    log=$(mktemp)
    trap 'rm -f "$log"' EXIT
    # $apt and $missing are lists of words on purpose.
    # shellcheck disable=SC2086
    for step in "update" "install -y --no-install-recommends$missing"; do
        if ! $apt $step >"$log" 2>&1 </dev/null; then
            tail -n 25 "$log" >&2
            fail "'apt-get $step' failed, see above"
        fi
    done
    # Debian starts a server as it installs it. The tests start their own ones on ports of their own.
    if [ "$redis_was_there" = no ] && [ -d /run/systemd/system ] && have redis-server; then
        $as_root systemctl disable --now --quiet redis-server.service 2>/dev/null || true
    fi
    if [ "$prometheus_was_there" = no ] && [ -d /run/systemd/system ] && have prometheus; then
        $as_root systemctl disable --now --quiet prometheus.service 2>/dev/null || true
    fi
    check_python
    look
    [ -z "$missing" ] || fail "apt-get installed everything, and still these are not found:$missing. Is another $python first in PATH?"
fi

# As udev sets it up, where udev runs: the module loaded, the device open to every user (who may still mount only what is his).
if [ ! -c /dev/fuse ] && have modprobe; then
    as_root_quietly modprobe fuse
fi
if [ -c /dev/fuse ] && { [ ! -r /dev/fuse ] || [ ! -w /dev/fuse ]; }; then
    echo "==> Opening /dev/fuse to all users (chmod 0666)"
    as_root_quietly chmod 0666 /dev/fuse
fi
if [ ! -r /dev/fuse ] || [ ! -w /dev/fuse ]; then
    echo "install-deps: no access to /dev/fuse: modprobe fuse, or give the container the device (--device /dev/fuse --cap-add SYS_ADMIN)" >&2
    [ "$wanted" = test ] || exit 1 # most tests run without it, and the others say why they do not
fi
