"""The words after -o."""

from __future__ import annotations

import grp
import os
import pwd

import pytest

from novafs.errors import ConfigError
from novafs.mountoptions import MountOptions, parse_mount_options


def test_nothing_said_means_the_defaults() -> None:
    assert parse_mount_options([]) == (MountOptions(), {}, False)
    assert parse_mount_options(["", ",,"]) == (MountOptions(), {}, False)


def test_options_settings_and_nonempty_are_told_apart() -> None:
    parsed = parse_mount_options(
        ["allow_other,ro,uid=7", "gid=8,umask=022,fsname=a b,debug,nonempty,busy_timeout=2m", "l1_capacity=8G,store_requests_max=4"]
    )
    assert parsed.options == MountOptions(
        allow_other=True, read_only=True, uid=7, gid=8, umask=0o022, fsname="a b", debug=True, busy_timeout_s=120
    )
    assert parsed.settings == {"l1.capacity": "8G", "store.requests_max": "4"}
    assert parsed.nonempty


def test_the_last_word_counts() -> None:
    parsed = parse_mount_options(["ro,uid=1,l1_capacity=1G", "rw,uid=2,l1_capacity=2G"])
    assert (parsed.options.read_only, parsed.options.uid, parsed.settings) == (False, 2, {"l1.capacity": "2G"})


def test_a_comma_in_a_value_is_escaped() -> None:
    assert parse_mount_options([r"fsname=a\,b,ro"]).options == MountOptions(fsname="a,b", read_only=True)


def test_users_and_groups_may_be_given_by_name() -> None:
    user, group = pwd.getpwuid(os.getuid()), grp.getgrgid(os.getgid())
    options = parse_mount_options([f"uid={user.pw_name},gid={group.gr_name}"]).options
    assert (options.uid, options.gid) == (user.pw_uid, group.gr_gid)


def test_words_of_mount_and_systemd_are_accepted_and_mean_nothing() -> None:
    words = (
        "defaults,_netdev,noauto,nofail,user,nouser,noatime,relatime,nosuid,nodev,noexec,x-systemd.automount,X-mount.mkdir=0755,comment=x"
    )
    assert parse_mount_options([words]) == (MountOptions(), {}, False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alow_other", "-o alow_other: unknown mount option; did you mean 'allow_other'?"),
        ("l1_capacty=1G", "-o l1_capacty: unknown mount option; did you mean 'l1_capacity'?"),
        ("zzzzzz", "-o zzzzzz: unknown mount option"),
        ("=x", "-o : unknown mount option"),
        ("volume=file:///x", "-o volume: unknown mount option"),
        ("ro=1", "-o ro: takes no value, found '1'"),
        ("uid", "-o uid: needs a value, as in uid=…"),
        ("l1_capacity=", "-o l1_capacity: needs a value, as in l1_capacity=…"),
        ("uid=nobody-of-that-name", "-o uid: found 'nobody-of-that-name'; allowed: a number from 0 to 4294967294 or the name of a user"),
        ("uid=4294967295", "-o uid: found '4294967295'"),
        ("gid=-1", "-o gid: found '-1'; allowed: a number from 0 to 4294967294 or the name of a group"),
        (
            "busy_timeout=soon",
            "-o busy_timeout: 'soon' is no duration; allowed: a duration such as 30ms, 1.5s or 24h, from 0 s to 1 h 0 min",
        ),
        ("umask=9", "-o umask: found '9'; allowed: an octal number from 0 to 777"),
        ("umask=1777", "-o umask: found '1777'"),
        ("fsname=a\nb", "-o fsname: found 'a\\nb'; allowed: printable text"),
    ],
)
def test_a_word_that_is_none_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_mount_options([text])
    assert str(caught.value).startswith(message)
