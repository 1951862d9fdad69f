"""What the daemon tells systemd: datagrams to the socket that `NOTIFY_SOCKET` names (sd_notify(3)).

The protocol is one datagram of `NAME=VALUE` lines; systemd's documentation asks projects to write these lines themselves rather
than to link libsystemd for them. What always holds:

- Without systemd every call does nothing. A service manager that has gone, or does not read, never holds the daemon up and never
  fails it: sending does not block.
- The variables are taken out of the environment, so that no child (an embedded Valkey speaks the protocol, too) answers for us.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import MutableMapping
from typing import Final

log = logging.getLogger(__name__)

_OF_THE_MOMENT: Final = ("WATCHDOG", "EXTEND_TIMEOUT_USEC")
"""A sign of life that comes late is none."""
_VARIABLES: Final = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


class Notifier:
    """The way to the service manager, if there is one.

    watchdog_s: systemd ends a daemon from which no `watchdog` came for so long; None: it does not watch.
    """

    def __init__(self, address: str = "", *, watchdog_s: float | None = None) -> None:
        """address: a path, "@name" for a socket in the abstract name space, or "" for nobody."""
        self.watchdog_s = watchdog_s
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket: socket.socket | None = None
        self._status = ""
        self._unsent: list[str] = []
        if address.startswith(("/", "@")):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        elif address:
            log.warning("NOTIFY_SOCKET=%s: is no Unix socket's address; systemd is told nothing", address)

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str] = os.environ) -> Notifier:
        """As the service manager asks for it, taking its variables away."""
        address, watchdog_us, watchdog_pid = (environ.pop(name, "") for name in _VARIABLES)
        watched = watchdog_us.isascii() and watchdog_us.isdigit() and int(watchdog_us) > 0 and watchdog_pid in ("", str(os.getpid()))
        return cls(address, watchdog_s=int(watchdog_us) / 1e6 if watched and address else None)

    @property
    def active(self) -> bool:
        """Whether there is somebody to tell."""
        return self._socket is not None

    def ready(self) -> None:
        """The service works from now on."""
        self._send("READY=1")

    def reloading(self) -> None:
        """The configuration is being read again; `ready` says when that is over."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> None:
        """The service ends."""
        self._send("STOPPING=1")

    def status(self, text: str) -> None:
        """The line that `systemctl status` shows. Sent when it differs from the last."""
        text = " ".join(text.split())
        if text != self._status:
            self._status = text
            self._send(f"STATUS={text}")

    def watchdog(self) -> None:
        """The service is alive."""
        self._send("WATCHDOG=1")

    def extend(self, seconds: float) -> None:
        """Starting or stopping goes on: give it so much time from now, beyond the unit's own limit."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def close(self) -> None:
        """Tell nothing any more."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, text: str) -> None:
        if self._socket is None:
            return
        # The last word on each name, in the order in which they were said.
        lines: dict[str, str] = {}
        for line in [*self._unsent, *text.split("\n")]:
            name = line.partition("=")[0]
            lines.pop(name, None)
            lines[name] = line
        try:
            self._socket.sendto("\n".join(lines.values()).encode("utf-8", "replace"), self._address)
            self._unsent.clear()
        except BlockingIOError:
            # A manager that is busy must not miss that the mount answers, or ends: it goes along with what is sent next.
            self._unsent = [line for name, line in lines.items() if name not in _OF_THE_MOMENT]
            log.debug("systemd does not read at the moment: %s is told later", text)
        except OSError as error:
            log.debug("systemd could not be told %s: %s", text, error.strerror)
