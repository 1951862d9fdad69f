"""A real Prometheus on a free port of 127.0.0.1, that scrapes one address each second."""

from __future__ import annotations

import json
import math
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.ceph import free_port

READY_S = 30


class Prometheus:
    """A running one."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def get(self, path: str, **parameters: str) -> Any:
        """`data` of an answer of the HTTP API."""
        query = f"?{urllib.parse.urlencode(parameters)}" if parameters else ""
        try:
            with urllib.request.urlopen(f"{self._url}/api/v1/{path}{query}", timeout=10) as answer:
                found = json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path} {parameters}: {error.read().decode()}") from error
        assert found["status"] == "success", found
        return found["data"]

    def values(self, query: str) -> list[float]:
        """What an instant query finds, without what is no number."""
        found = self.get("query", query=query)
        samples = found["result"] if found["resultType"] == "vector" else [{"value": found["result"]}]
        return [value for sample in samples if not math.isnan(value := float(sample["value"][1]))]


@contextmanager
def prometheus(directory: Path, *, scrape: str, rules: Path) -> Iterator[Prometheus]:
    """One whose job is called novafs. scrape: address and port."""
    port = free_port()
    configuration = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(rules)],
        "scrape_configs": [{"job_name": "novafs", "static_configs": [{"targets": [scrape]}]}],
    }
    file = directory / "prometheus.yml"
    file.write_text(json.dumps(configuration))  # JSON is YAML
    with (directory / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={file}",
                f"--storage.tsdb.path={directory / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{port}",
                "--log.level=warn",
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        deadline_s = time.monotonic() + READY_S
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline_s, (directory / "prometheus.log").read_text()
                time.sleep(0.05)
        yield Prometheus(port)
    finally:
        process.terminate()
        process.wait(30)
