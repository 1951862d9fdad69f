"""Clients of the metrics port that connect and say nothing must not take a thread and a descriptor each from the daemon, for ever."""

from __future__ import annotations

import socket
import threading
import urllib.request

import pytest
import trio

from novafs import metrics


def test_half_open_clients_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "IDLE_S", 1.0)

    async def main() -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        before = threading.active_count()
        async with metrics.metrics_server(f"127.0.0.1:{port}", lambda: {"images_open": 3}):
            clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(60)]
            await trio.sleep(0.5)
            assert threading.active_count() - before < 20
            await trio.sleep(2)
            text = await trio.to_thread.run_sync(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=3).read())
            assert b"novafs_images_open 3.0" in text
            for client in clients:
                client.close()

    trio.run(main)
