#!/bin/sh
# A volume, a disk image and a mount on this machine, for somebody who sees NovaFS for the first time. `make demo` calls it.
#
#   tools/demo.sh          builds, imports, mounts, reads, compares; leaves the volume mounted. Running it again is fine.
#   tools/demo.sh stop     unmounts
#   tools/demo.sh clean    unmounts and deletes the demo's directory
#
# Everything is below ./demo-data (DEMO_DIR=… puts it elsewhere), the mount's state and cache included.
set -eu
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH:/usr/sbin:/sbin
demo=${DEMO_DIR:-./demo-data}
volume=$demo/volume
images=$demo/images
source=$demo/source.raw
image_bytes_max=157286400 # how much of this machine's files goes into the image
NOVAFS_STATE_DIR=$(realpath -m "$demo")/state
export NOVAFS_STATE_DIR

bold="" plain=""
if [ -t 1 ]; then
    bold=$(printf '\033[1m') plain=$(printf '\033[0m')
fi

heading() {
    printf '\n%s%s%s\n' "$bold" "$*" "$plain"
}

# Says the command, then runs it.
run() {
    printf '$ %s\n' "$*"
    "$@"
}

fail() {
    echo "demo: $*" >&2
    exit 1
}

# By the kernel's table: asking the directory itself would fail, or wait, where its daemon is dead.
is_mounted() {
    grep -qsF " $(realpath -ms "$images" | sed 's/ /\\040/g') fuse.novafs " /proc/self/mounts
}

# A raw disk image with an ext4 file system in it that holds files of this machine: documentation, Python's library and whatever
# else is needed to reach the size. Written under another name and renamed, so an interrupted run leaves no half image.
build_image() {
    stdlib=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
    stage=$(mktemp -d "$demo/stage.XXXXXX")
    trap 'rm -rf "$stage" "$stage.list" "$source.new"' EXIT
    # The same files in the same order every time: sorted by directory, cut off at the size.
    for directory in /usr/share/doc "$stdlib" /usr/lib /usr/share; do
        find "$directory" -xdev -type f -readable ! -name '*
*' -printf '%s %p\n' 2>/dev/null | sort -k 2
    done | awk -v max="$image_bytes_max" '{
        size = $1; sub(/^[0-9]+ /, "")
        if (size < 16777216 && total + size <= max && !($0 in seen)) { seen[$0]; total += size; print }
    }' >"$stage.list"
    tar --create --file - --verbatim-files-from --files-from "$stage.list" 2>/dev/null |
        tar --extract --file - --directory "$stage" --no-same-owner
    truncate -s 512M "$source.new"
    mke2fs -q -F -t ext4 -L novafs-demo -d "$stage" "$source.new"
    mv "$source.new" "$source"
    rm -rf "$stage" "$stage.list"
    trap - EXIT
}

show_file() {
    printf '%s: %s of %s allocated\n' "$1" "$(du -h "$1" | cut -f 1)" "$(du -h --apparent-size "$1" | cut -f 1)"
}

stop() {
    if is_mounted; then
        novafs umount "$images"
    fi
}

case ${1:-start} in
    start) ;;
    stop)
        stop
        exit 0
        ;;
    clean)
        stop
        rm -rf "$demo"
        exit 0
        ;;
    *) fail "usage: tools/demo.sh [stop|clean]" ;;
esac

trap 'echo; echo "demo: interrupted; make demo starts again, make demo-clean deletes everything" >&2; exit 130' INT TERM
mkdir -p "$demo" "$images"

heading "1. A disk image: an ext4 file system made of files of this machine"
[ -e "$source" ] || build_image
show_file "$source"

heading "2. A volume: a local directory as the object store, nothing to configure"
if [ -e "$demo/volume/novafs.json" ]; then
    echo "It is there from an earlier run."
else
    run novafs init "$volume"
fi

heading "3. Import it: split into chunks, each stored once and compressed"
# --replace makes a second run of this demo a second import: every chunk is known already.
run novafs import --replace "$volume" "$source" web-01.raw
echo
echo "The same image under another name costs nothing more:"
run novafs import --replace "$volume" "$source" web-02.raw

heading "4. Mount it"
if is_mounted; then
    # A daemon that was killed leaves its mount behind, and every access to it fails.
    ls "$images" >/dev/null 2>&1 || stop
fi
if is_mounted; then
    echo "It is mounted from an earlier run: $images"
else
    # Less memory than the image needs, so that L2 has something to do; the default is 10 GiB or a quarter of the machine.
    run novafs mount --l1-capacity 100MiB "$volume" "$images"
fi
run ls -ls "$images"

heading "5. Read it through the mount, and compare it byte for byte"
run cmp "$source" "$images/web-01.raw"
echo "They are equal."
run cmp "$source" "$images/web-02.raw"
echo "Equal, too, and served from the same chunks."

heading "6. Read a part of it again, past the kernel's page cache: from L2 the first time, from memory then"
for _ in first second third; do
    run dd if="$images/web-01.raw" of=/dev/null bs=1M count=32 iflag=direct status=none
done

heading "7. What each tier served (novafs stats has more)"
novafs stats --json "$images" | python -c '
import json, sys
cache = json.load(sys.stdin)["cache"]
rows = [("L1", "memory", cache["l1"]["hits"], "at no cost")]
for tier, where in (("l2", "embedded Valkey"), ("l3", "local directory")):
    traffic = cache[tier + "_traffic"]
    rows.append((tier.upper(), where, traffic["hits"], format(traffic["read_bytes"] / 2**20, ".1f") + " MiB read"))
for tier, where, chunks, read in rows:
    print(f"{tier}  {where:<16} {chunks:>7,} chunks  {read}")
'

heading "The volume stays mounted"
cat <<TEXT
Look around:   ls -l $images
Unmount:       make demo-stop     (or: .venv/bin/novafs umount $images)
Delete it all: make demo-clean
TEXT
