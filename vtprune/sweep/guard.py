"""Runs a command and kills it, with all that it started, once standard input closes: run as a script, with `-I`.

A Ray worker that is killed cannot clean up after itself. It holds the other end of the pipe, so its death is seen here,
and no orphan goes on computing a trial that another worker has begun again. Ray may kill a dead worker's children, but
not theirs, so the one who watches is a child of this process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys


def main() -> int:
    if os.fork() == 0:
        _watch()
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    code = child.wait()
    if code < 0:
        # end the same way, so that the caller sees the signal
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def _watch() -> None:
    """Wait for the other end of standard input to close, then kill this process group, which the caller made for it."""
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
