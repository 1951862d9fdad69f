#!/bin/sh
# Builds the guest that the end-to-end tests boot: a small Debian (or, on Ubuntu, Ubuntu) root file system in a raw ext4 image,
# with the kernel and the initial RAM disk beside it, so that QEMU needs no boot loader.
#
#   tools/guest-image.sh DIRECTORY        writes DIRECTORY/disk.raw, DIRECTORY/vmlinuz and DIRECTORY/initrd
#   tools/guest-image.sh --key            prints the key under which the result may be cached
#
# The guest comes from the very mirror that this machine's own apt uses (GUEST_MIRROR=URL overrides it). What it does after
# booting is not in the image: it runs the shell script that it finds as raw bytes on its second disk (/dev/vdb), if there is one.
# Needs root (sudo is used when it is there), debootstrap and e2fsprogs. The directory appears at once and whole, or not at all.
set -eu
PATH=$PATH:/usr/sbin:/sbin
export LC_ALL=C

size=1G # apparent size; the file is sparse and about a third of it is allocated

fail() {
    echo "guest-image: $*" >&2
    exit 1
}

# The names of this machine's release: `debian bookworm` or `ubuntu noble`. The guest is of the same release, because the mirror
# and the keyring of that one are known to be here.
release() {
    [ -r /etc/os-release ] || fail "/etc/os-release is missing: Debian 12 or newer, or Ubuntu 24.04 or newer, is needed"
    # shellcheck source=/dev/null
    (. /etc/os-release && echo "${ID:-unknown} ${VERSION_CODENAME:-unknown}")
}

# The first http(s) or file mirror in apt's own sources that has the suite $1, in either format of the lists.
mirror_of() {
    {
        find /etc/apt/sources.list.d -name '*.sources' -type f -exec cat {} + -exec printf '\n\n' \; 2>/dev/null | awk -v suite="$1" '
            function flush() {
                n = split(suites, s, " "); m = split(uris, u, " ")
                if (types ~ /(^| )deb( |$)/ && enabled != "no")
                    for (i = 1; i <= n; i++) if (s[i] == suite) for (j = 1; j <= m; j++) print u[j]
                types = suites = uris = enabled = ""
            }
            /^#/ { next }
            /^[ \t]*$/ { flush(); next }
            { key = tolower($1); $1 = "" }
            key == "types:" { types = $0 }
            key == "uris:" { uris = $0 }
            key == "suites:" { suites = $0 }
            key == "enabled:" { enabled = tolower($2) }
            END { flush() }'
        find /etc/apt -maxdepth 2 -name '*.list' -type f -exec cat {} + 2>/dev/null | awk -v suite="$1" '
            $1 == "deb" { sub(/\[[^]]*\]/, ""); if ($3 == suite) print $2 }'
    } | grep -E '^(https?|file)://' | head -n 1
}

os_release=$(release)
distribution=${os_release% *}
suite=${os_release#* }
case $distribution in
    debian) kernel=linux-image-cloud-$(dpkg --print-architecture) ;;
    ubuntu) kernel=linux-image-virtual ;;
    *) fail "this is '$distribution': the guest is built on Debian and Ubuntu only" ;;
esac

if [ "${1:-}" = --key ]; then
    echo "$distribution-$suite-$(sha256sum "$0" | cut -c 1-12)"
    exit 0
fi
[ $# -eq 1 ] || fail "usage: $0 DIRECTORY | --key"
target=$1

if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || fail "building a root file system needs root, and sudo is missing: run as root"
    sudo GUEST_MIRROR="${GUEST_MIRROR:-}" "$0" "$target"
    exec sudo chown -R "$(id -u):$(id -g)" "$target"
fi

for tool in debootstrap mke2fs; do
    command -v "$tool" >/dev/null || fail "$tool is missing: run tools/install-deps.sh test"
done
mirror=${GUEST_MIRROR:-$(mirror_of "$suite")}
[ -n "$mirror" ] || fail "no mirror for '$suite' in /etc/apt: set GUEST_MIRROR to the URL of one"

mkdir -p "$(dirname "$target")"
work=$(mktemp -d "$target.XXXXXX")
# An interrupted debootstrap leaves its /proc and /sys mounted in the tree that is about to be deleted.
trap 'umount -l "$work/root/proc" "$work/root/sys" 2>/dev/null || true; rm -rf --one-file-system "$work"' EXIT
trap 'exit 130' INT TERM HUP
root=$work/root

echo "guest-image: installing $distribution $suite with $kernel (a minute or two)"
# python3 and fuse3 are for the test that installs NovaFS in the guest (tests/e2e/test_service.py).
debootstrap --variant=minbase --include="$kernel,initramfs-tools,systemd-sysv,udev,e2fsprogs,python3,fuse3" "$suite" "$root" "$mirror" \
    >"$work/log" 2>&1 || {
    tail -n 20 "$work/log" "$root/debootstrap/debootstrap.log" >&2 || true
    fail "debootstrap of $suite failed"
}

# A few modules instead of all of them: an emulated processor unpacks a small RAM disk much sooner.
echo 'MODULES=list' >"$root/etc/initramfs-tools/conf.d/novafs"
printf '%s\n' virtio_pci virtio_blk ext4 >>"$root/etc/initramfs-tools/modules"
chroot "$root" update-initramfs -u -k all >>"$work/log" 2>&1 || {
    tail -n 20 "$work/log" >&2
    fail "update-initramfs failed in the guest"
}

echo novafs-guest >"$root/etc/hostname"
echo '/dev/vda / ext4 defaults 0 1' >"$root/etc/fstab"
: >"$root/etc/machine-id"
chroot "$root" passwd --delete root >/dev/null
cat >"$root/etc/systemd/system/guest-script.service" <<'UNIT'
[Unit]
Description=Run the script on the second disk
ConditionPathExists=/dev/vdb

[Service]
Type=oneshot
ExecStart=/bin/sh -c 'exec /bin/sh /dev/vdb >/dev/ttyS0 2>&1'

[Install]
WantedBy=multi-user.target
UNIT
# Nothing that a test waits for needs these, and each costs seconds under emulation. A login prompt on the serial console would also hang
# up on the script.
rm -f "$root"/etc/systemd/system/timers.target.wants/* "$root"/lib/systemd/system/timers.target.wants/*
systemctl="chroot $root systemctl --quiet"
for unit in getty@tty1 getty-static serial-getty@ttyS0 systemd-update-utmp systemd-update-utmp-runlevel e2scrub_reap; do
    $systemctl mask "$unit.service" >>"$work/log" 2>&1
done
$systemctl enable guest-script.service >>"$work/log" 2>&1
rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/* "$root"/var/log/*.log

mkdir "$work/result"
cp "$root"/boot/vmlinuz-* "$work/result/vmlinuz"
cp "$root"/boot/initrd.img-* "$work/result/initrd"
truncate -s "$size" "$work/result/disk.raw"
mke2fs -q -F -t ext4 -L novafs-guest -E root_owner=0:0,lazy_itable_init=0 -d "$root" "$work/result/disk.raw"
chmod 0644 "$work/result"/*
rm -rf "$target"
mv "$work/result" "$target"
echo "guest-image: $target is ready ($(du -h "$target/disk.raw" | cut -f 1) allocated)"
