"""Twenty visitors at once: `python demo/load.py [--users 20] [--seconds 120]`; errors, cross-talk, memory, files left.

The demo runs in a process and a temporary folder of its own. Every visitor uploads a picture under its own name and asks
its own questions at its own budgets; the right answers are computed beforehand, without the demo.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from gradio_client import Client, handle_file

from vtprune import embedded
from vtprune.cli import running
from vtprune.cli.console import strategy
from vtprune.images import open_image

QUESTIONS = ("What word is written in the picture?", "How many objects are there?", "What color is the circle?")
BUDGETS = (48, 128)
STRATEGIES = ("flowcut", "random", "uniform")


def main() -> None:
    """Measure, print JSON, exit with 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--port", type=int, default=7917)
    given = parser.parse_args()
    right = answers()
    gc.collect()
    place = Path(tempfile.mkdtemp(prefix="vtprune-load-"))
    command = [sys.executable, str(Path(__file__).parent / "app.py"), "--port", str(given.port), "--idle-minutes", "10"]
    with open(place / "log", "wb") as log:
        server = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(place)}, stdout=log, stderr=log)
        try:
            result = measure(given, place, server.pid, right)
        finally:
            server.terminate()
            server.wait(60)
    result["server_log_errors"] = (place / "log").read_text(errors="replace").count("Traceback")
    result["session_folders_at_the_end"] = len(list(place.glob("vtprune-demo-*")))
    shutil.rmtree(place, ignore_errors=True)
    print(json.dumps(result, indent=1))
    wrong = ("errors", "cross_talk", "wrong", "session_folders_left", "session_folders_at_the_end", "server_log_errors")
    sys.exit(int(any(result[name] for name in wrong) or abs(result["memory_growth"]) > 0.05))


def answers() -> dict[tuple[str, str, str, int], str]:
    """What every visitor should be told, by picture, question, strategy and budget."""
    loaded, found = running.load(None, "cpu", "auto", "sdpa", False), {}
    for name, path in embedded.pictures().items():
        for question in QUESTIONS:
            inputs = running.prepare(loaded, [open_image(path)], question)
            for pruner in STRATEGIES:
                for keep in BUDGETS:
                    text, _ = running.answer(loaded, inputs, strategy(pruner, keep, {}), None, 64)
                    found[name, question, pruner, keep] = text
    return found


def measure(given, place: Path, pid: int, right: dict) -> dict:
    """Run all visitors; what they met, and the server's memory before and after."""
    address = f"http://127.0.0.1:{given.port}"
    wait_for(address, place)
    begin = resident(pid)
    # One visit of everyone before memory is noted, as the first fills what stays and does not grow: code that is loaded when
    # it is needed, the threads' two heaps, PyTorch's buffers. What grows by visitor or by run is in the figure.
    crowd(address, place, right, given.users, 1.0)
    gone(place)
    before, peak, over = resident(pid), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            peak[0] = max(peak[0], resident(pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    met = crowd(address, place, right, given.users, given.seconds)
    over.set()
    watcher.join()
    left = gone(place)
    after = resident(pid)
    return {
        "users": given.users,
        "seconds": given.seconds,
        "runs": met["runs"],
        "errors": met["errors"],
        "wrong": met["wrong"],
        "cross_talk": met["cross_talk"],
        "examples": met["examples"],
        "slowest_run_s": round(met["slowest"], 1),
        "memory_mb": {"loaded": begin, "before": before, "peak": peak[0], "after": after},
        "memory_growth": round(after / before - 1, 4),
        "session_folders_left": left,
    }


def gone(place: Path) -> int:
    """Wait for closed tabs to be noticed, which takes a heartbeat of 15 s; how many sessions' folders are left then."""
    for _ in range(40):
        time.sleep(1)
        if not list(place.glob("vtprune-demo-*")):
            break
    return len(list(place.glob("vtprune-demo-*")))


def crowd(address: str, place: Path, right: dict, users: int, seconds: float) -> dict:
    met = {"runs": 0, "errors": 0, "wrong": 0, "cross_talk": 0, "examples": [], "slowest": 0.0}
    lock, end = threading.Lock(), time.monotonic() + seconds
    names = list(embedded.pictures())
    threads = [
        threading.Thread(target=visit, args=(n, names[n % len(names)], address, place, right, end, met, lock))
        for n in range(users)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return met


def visit(n: int, picture: str, address: str, place: Path, right: dict, end: float, met: dict, lock) -> None:
    """One visitor: open the page, upload a picture, ask, scrub; over and over until the time is up."""
    chance, own = random.Random(n), f"visitor{n:02d}.png"
    mine = place / "uploads" / str(n) / own
    mine.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(embedded.pictures()[picture], mine)
    client = None
    try:
        client = connect(address)
        client.predict(api_name="/open")
        client.predict(handle_file(mine), api_name="/upload")
        first = True
        while first or time.monotonic() < end:
            first = False
            question, keep = chance.choice(QUESTIONS), chance.choice(BUDGETS)
            start = time.monotonic()
            out = client.predict(question, 3, 16, "kept tokens", *STRATEGIES, "none", keep, keep, keep, 1, api_name="/ask")
            took, text = time.monotonic() - start, json.dumps(out, default=str)
            said = [value for value in out if isinstance(value, str)]
            expected = Counter(right[picture, question, pruner, keep] for pruner in STRATEGIES)
            others = [name for name in (f"visitor{m:02d}.png" for m in range(100)) if name != own and name in text]
            client.predict(3, chance.randrange(18), "kept tokens", api_name="/scrub")
            with lock:
                met["runs"] += 1
                met["slowest"] = max(met["slowest"], took)
                met["cross_talk"] += bool(others) or own not in text
                right_ones = not (expected - Counter(said))
                met["wrong"] += not right_ones
                if (others or not right_ones) and len(met["examples"]) < 3:
                    met["examples"].append([own, question, keep, list(expected), [s for s in said if len(s) < 30]])
    except Exception as error:  # noqa: BLE001  (counted and reported, whatever it is)
        with lock:
            met["errors"] += 1
            if len(met["examples"]) < 3:
                met["examples"].append(f"{type(error).__name__}: {error}"[:300])
    finally:
        if client is not None:
            client.close()


def connect(address: str) -> Client:
    """A visitor's connection, patient as a browser is."""
    return Client(address, verbose=False, httpx_kwargs={"timeout": 120})


def wait_for(address: str, place: Path) -> None:
    """Until the model is loaded."""
    import httpx

    for _ in range(300):
        time.sleep(1)
        try:
            httpx.get(address, timeout=5).raise_for_status()
        except httpx.HTTPError:
            continue
        client = connect(address)
        client.predict(api_name="/open")
        client.predict(QUESTIONS[0], 2, 16, "kept tokens", "none", "flowcut", "none", "none", 1, 64, 1, 1, api_name="/ask")
        client.close()
        return
    raise TimeoutError((place / "log").read_text(errors="replace")[-2000:])


def resident(pid: int) -> float:
    """Megabytes of memory that a process holds (Linux)."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return round(int(line.split()[1]) / 1024, 1)


if __name__ == "__main__":
    main()
