# Runs as root in the guest of test_service.py, from its second disk. The third holds what NovaFS imports, the fourth the wheel and a volume.
# Each line that begins with GUEST is a finding; the test judges them.
set -u
say() { printf '\nGUEST %s\n' "$*"; }
one_line() { tr '\n' ' '; }
began=$(cut -d . -f 1 /proc/uptime)
took() { say "took $1 $(($(cut -d . -f 1 /proc/uptime) - began)) s"; }
# until_true COMMAND: waits for it to succeed, for a minute and a half.
until_true() {
    tries=0
    until "$@" >/dev/null 2>&1; do
        tries=$((tries + 1))
        [ $tries -lt 450 ] || return 1
        sleep 0.2
    done
}
unit=novafs@web.service
property() { systemctl show --value -p "$1" $unit; }
same() { cmp /run/payload/data.raw /images/web/data.raw && echo same; }
processes() { grep -l -a -e '^/opt/novafs' -e '[v]alkey-server' /proc/[0-9]*/cmdline 2>/dev/null | wc -l; }
# The kernel and systemd (SIGRTMIN+21, see systemd(1)) leave the console to this script.
dmesg -n 1
kill -55 1

# --- installation, as docs/operations.md describes it; the dependencies come from a disk, since the guest has no network
mkdir -p /mnt /run/payload /etc/novafs
mount -o ro /dev/vdc /mnt
mount -o ro /dev/vdd /run/payload
cp -r /run/payload/volume /srv/volume
python3 -m venv --without-pip /opt/novafs
echo /mnt/site >"$(echo /opt/novafs/lib/python3*/site-packages)/site.pth"
/opt/novafs/bin/python -m pip --disable-pip-version-check install -q --no-compile --no-index --no-deps --root-user-action=ignore \
    /run/payload/*.whl
# What pip, left alone, would have compiled by now.
cp -r /run/payload/compiled/. /opt/novafs/lib/python3*/site-packages/
took wheel
PATH=/opt/novafs/bin:$PATH
say install-units "$(novafs install-units | one_line)"
systemd-analyze verify --man=no novafs@web.service novafs-gc@web.service novafs-gc@web.timer novafs-scrub@web.service novafs-scrub@web.timer >/tmp/out 2>&1
say verify "status $? $(one_line </tmp/out)"
say security "$(systemd-analyze security --no-pager novafs@web.service novafs-gc@web.service novafs-scrub@web.service |
    sed -n 's/.*Overall exposure level.*: \([0-9.]*\) .*/\1/p' | one_line)"
cat >/etc/novafs/web.toml <<'END'
volume = "file:///srv/volume"
mount_options = "allow_other"
metrics = "off"

[l1]
capacity = "32MiB"
END
took units

# --- the unit
systemctl start $unit
say start "status $? $(findmnt -n -o FSTYPE,SOURCE /images/web) $(same)"
took start
say status "$(systemctl status --no-pager -n 0 $unit | sed -n 's/^ *Status: //p')"
say l2 "$(cat /proc/[0-9]*/comm | grep -c '^valkey') server"
say capabilities "$(sed -n 's/^CapEff:\t*//p' "/proc/$(property MainPID)/status")"
cp /run/payload/data.raw /images/web/copy.raw

sed -i 's/32MiB/48MiB/; s/^mount_options.*/mount_options = "ro"/' /etc/novafs/web.toml
systemctl reload $unit
say reload "status $?"
sed -i 's/"ro"/""/' /etc/novafs/web.toml
took reload

main=$(property MainPID)
kill -9 "$main"
restarted() { [ "$(property MainPID)" != "$main" ] && [ "$(property ActiveState)" = active ]; }
until_true restarted
say killed "restarts $(property NRestarts) $(same)"
took killed

echo written >/images/web/written.raw
systemctl stop $unit
say stop "status $? $(property Result), mounts $(findmnt -n /images/web | wc -l), processes $(processes)"
took stop

sed -i 's/^capacity/capacty/' /etc/novafs/web.toml
systemctl start $unit
say wrong-file "status $? main $(property ExecMainStatus) $(property ActiveState) restarts $(property NRestarts)"
sed -i 's/^capacty/capacity/' /etc/novafs/web.toml
took wrong-file

# --- the mount helper
mount -t novafs web /images/web -o nofail,alow_other >/tmp/out 2>&1
say wrong-option "status $? $(one_line </tmp/out)"
took wrong-option

# --- fstab: systemd calls `mount web /images/web -t novafs -o …` at the first access
echo 'web /images/web novafs _netdev,nofail,x-systemd.automount,ro,noatime,l1_capacity=24MiB 0 0' >>/etc/fstab
systemctl daemon-reload
systemctl start images-web.automount
say automount-before "$(findmnt -n -o FSTYPE /images/web | one_line)"
say automount "$(cat /images/web/written.raw) $(findmnt -n -t fuse.novafs -o SOURCE,OPTIONS /images/web) $(same)"
touch /images/web/new 2>/dev/null || say read-only
umount /images/web
say umount "status $? $(findmnt -n -o FSTYPE /images/web), processes $(processes)"
systemctl stop images-web.automount
took automount

journalctl --no-pager -o cat -u $unit -u images-web.mount | sed 's/^/LOG /'
journalctl --no-pager -o cat -u $unit -p 3 | sed 's/^/ERROR /'
journalctl --no-pager -o cat -b | grep -i traceback | sed 's/^/TRACEBACK /'
say end
systemctl poweroff
