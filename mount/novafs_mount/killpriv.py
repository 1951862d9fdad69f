"""The FUSE handshake with one flag more than libfuse knows: FUSE_HANDLE_KILLPRIV_V2.

Without it the kernel asks for `security.capability` before each WRITE (it might have to be removed), a request of its own for every
one of a guest. A file system that negotiates the flag (Linux 5.11, include/uapi/linux/fuse.h) promises to clear set-user-id,
set-group-id and capabilities itself where a write, a truncate or a change of owner has to; ours keeps none of these on an image, so there
is nothing to clear (`NovaOperations.setattr`, `Xattributes`). libfuse passes on only flags that it knows, 3.14 not yet this one: so the
kernel's INIT and libfuse's answer to it go through a socket pair here, in place of the connection, and the flag is added to the answer.

Always holds: the kernel gets libfuse's answer, with the flag added only where the kernel offers it and nothing else changed; and then the
descriptor is the connection again, whatever went wrong. Where anything is not as expected, nothing is done at all.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import struct
from contextlib import ExitStack
from typing import Final

import trio

log = logging.getLogger(__name__)

FUSE_INIT: Final = 26
HANDLE_KILLPRIV_V2: Final = 1 << 28
READ_BYTES: Final = (1 << 20) + 4096
"""The kernel refuses to hand requests to a buffer that could not hold the largest."""
ANSWER_S: Final = 10.0
_IN: Final = struct.Struct("=IIQ24xIIII")
"""struct fuse_in_header (length, opcode, unique, 24 bytes more) and of fuse_init_in: major, minor, max_readahead, flags."""
_OUT: Final = struct.Struct("=IiQIIII")
"""struct fuse_out_header (length, error, unique) and of fuse_init_out: the same four."""


def with_flag(request: bytes, answer: bytes) -> bytes:
    """The answer to INIT, with the flag where the kernel offers it and the answer is that of a handshake that worked."""
    if len(request) < _IN.size or len(answer) < _OUT.size:
        return answer
    _, opcode, asked, major, _, _, offered = _IN.unpack_from(request)
    length, error, unique, answered_major, minor, readahead, flags = _OUT.unpack_from(answer)
    if opcode != FUSE_INIT or error or asked != unique or major != answered_major or not offered & HANDLE_KILLPRIV_V2:
        return answer
    head = _OUT.pack(length, error, unique, answered_major, minor, readahead, flags | HANDLE_KILLPRIV_V2)
    return head + answer[_OUT.size :]


class Handshake:
    """Between the kernel and libfuse, once. Made before the session's loop begins; `run` beside it."""

    def __init__(self, fd: int) -> None:
        """fd: of the session, with the kernel's INIT to be read from it. Raises OSError, and has then changed nothing, or the session has
        ended."""
        self._fd = fd
        with ExitStack() as undo:
            # All that can be refused comes before INIT is read: it is there to be read once.
            self._kernel = os.dup(fd)
            undo.callback(os.close, self._kernel)
            self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.enter_context(self._ours)
            with theirs:
                self._request = os.read(fd, READ_BYTES)
                undo.pop_all()
                os.dup2(theirs.fileno(), fd, inheritable=False)
        self._ours.setblocking(False)
        self._ours.send(self._request)

    async def run(self) -> None:
        """Pass the answer on and give the session its connection back."""
        try:
            with trio.move_on_after(ANSWER_S):
                await trio.lowlevel.wait_readable(self._ours)
            self._pass_on()
        finally:
            os.dup2(self._kernel, self._fd, inheritable=False)
            os.close(self._kernel)
            self._ours.close()
            # The loop waits already, but its descriptor was another one then: this has trio look at it anew.
            with trio.CancelScope(shield=True):
                await trio.lowlevel.wait_writable(self._fd)

    def _pass_on(self) -> None:
        try:
            answer = self._ours.recv(READ_BYTES)
        except BlockingIOError:
            log.error("libfuse did not answer the kernel within %g s", ANSWER_S)
            return
        try:
            os.write(self._kernel, with_flag(self._request, answer))
        except OSError as error:  # unmounted meanwhile: the session's loop finds out by itself
            log.debug("the kernel did not take the answer to INIT: %s", error)


def handshake(fd: int | None) -> Handshake | None:
    """Begin it for the session of a mount, before its loop; None where that is not possible, and libfuse does it alone."""
    if fd is None:
        return None
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if not poll.poll(0):
        return None
    try:
        return Handshake(fd)
    except OSError as error:  # no descriptors left, or unmounted already
        log.debug("the handshake is left to libfuse: %s", error)
        return None
