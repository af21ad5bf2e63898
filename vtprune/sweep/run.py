"""Runs a sweep's trials on Ray and records each as it ends.

The driver alone writes results; a worker hands back what its lmms-eval run left. Whatever is killed, what stands on disk
is whole, and the same command goes on from it: a trial that is recorded is never run again.
"""

from __future__ import annotations

import collections
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vtprune.sweep import trial as running
from vtprune.sweep.config import Sweep, SweepError, Trial, plan
from vtprune.sweep.store import Attempt, Hardware, Labels, Record, Results, Settings
from vtprune.sweep.trial import Measured

# a crash may be the machine's fault once
ATTEMPTS = 2
# Ray's store for objects: results here are small, and it would take a third of the memory
OBJECT_STORE = 100 << 20
_WAIT = 0.5


@dataclass
class Outcome:
    """What a call of `run` did: trials by how they stand now, and the table's place."""

    planned: int
    ran: list[Record] = field(default_factory=list)
    found: list[Record] = field(default_factory=list)
    table: Path | None = None

    @property
    def failed(self) -> list[Record]:
        return [record for record in (*self.found, *self.ran) if record.status == "failed"]


def run(
    sweep: Sweep,
    folder: str | Path,
    address: str | None = None,
    retry_failed: bool = False,
    command: Sequence[str] | None = None,
    watch: Callable[[str, Trial | None, int], None] | None = None,
) -> Outcome:
    """Run what is missing of a sweep.

    Parameters:
        folder: for the results; trials that are there already are not run again.
        address: of a Ray cluster; None starts Ray on this machine, or uses the one that is running in this process.
        retry_failed: run trials again that are recorded as failed.
        command: what to start in place of `python -m lmms_eval`.
        watch: told ("start" | "retry" | "done" | "failed", the trial, how many are over) as it happens.
    Raises:
        SweepError: if results cannot be written or read, or Ray cannot run the trials at all.
    """
    trials = plan(sweep)
    results = Results(folder)
    results.plan()  # refuses a folder of another version before anything is written there
    with results.writing():
        results.write_plan(sweep, trials, sweep.concurrency)
        known = {t.digest: record for t in trials if (record := results.record(t.digest)) is not None}
        if retry_failed:
            known = {digest: record for digest, record in known.items() if record.status == "done"}
        outcome = Outcome(len(trials), found=list(known.values()))
        missing = [t for t in trials if t.digest not in known]
        try:
            if missing:
                # closed at once where a result cannot be written, so that nothing goes on running
                with closing(_run(missing, sweep, address, command, watch or (lambda *_: None), len(known))) as ended:
                    for record in ended:
                        results.save(record)
                        known[record.digest] = record
                        outcome.ran.append(record)
        finally:
            # also after control-C: what is over stands in the table
            table = results.folder / "results.parquet"
            if outcome.ran or not table.exists():
                results.write_table([known[t.digest] for t in trials if t.digest in known])
        outcome.table = table
    return outcome


def _run(
    trials: Sequence[Trial],
    sweep: Sweep,
    address: str | None,
    command: Sequence[str] | None,
    watch: Callable[[str, Trial | None, int], None],
    over: int,
) -> Iterator[Record]:
    """Yield the record of each trial as it ends; on the way out nothing of ours is left running."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.exceptions import RayError

    started_here = _start_ray(ray, address, sweep)
    waiting = collections.deque(trials)
    errors: dict[str, list[Attempt]] = {t.digest: [] for t in trials}
    begun: dict[str, str] = {}
    running_now: dict[Any, Trial] = {}
    attempt = ray.remote(running.attempt).options(num_cpus=sweep.cpus, num_gpus=sweep.gpus, max_retries=0)
    most = sweep.concurrency or len(trials)
    environment = running.passed_on()
    try:
        while waiting or running_now:
            while waiting and len(running_now) < most:
                one = waiting.popleft()
                job = {
                    "settings": one.settings,
                    "include_path": None if one.include_path is None else str(Path(one.include_path).resolve()),
                    "command": None if command is None else list(command),
                    "timeout": sweep.timeout,
                    "environment": environment,
                    "folder": os.getcwd(),
                }
                begun.setdefault(one.digest, datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"))
                running_now[attempt.remote(job)] = one
                watch("retry" if errors[one.digest] else "start", one, over)
            ready, _ = ray.wait(list(running_now), timeout=_WAIT)
            for reference in ready:
                one = running_now.pop(reference)
                try:
                    found = ray.get(reference)
                except RayError as error:
                    what = f"the Ray worker was lost ({type(error).__name__}), killed by the system or with its machine"
                    found = {"error": what, "lines": [], "wall_s": 0.0, "final": False}
                if found["error"] is not None:
                    kept = Attempt(error=found["error"], lines=found["lines"], wall_s=found["wall_s"])
                    errors[one.digest].append(kept)
                    if len(errors[one.digest]) < ATTEMPTS and not found["final"]:
                        waiting.append(one)
                        continue
                over += 1
                record = _record(one, found, errors[one.digest], begun[one.digest], command)
                watch(record.status, one, over)
                yield record
    except ConnectionError as error:
        raise SweepError("Ray is gone; what is over is recorded, and the same command goes on from there.") from error
    finally:
        for reference in running_now:
            ray.cancel(reference, force=True)
        if started_here:
            # workers die with it, and with each its lmms-eval (see guard.py)
            ray.shutdown()


def _start_ray(ray, address: str | None, sweep: Sweep) -> bool:
    """Have Ray running with room for a trial; whether it was started here.

    Raises:
        SweepError: if there is no such cluster, or no machine of it is large enough for one trial.
    """
    started = not ray.is_initialized()
    if started:
        try:
            if address is not None:
                ray.init(address=address, log_to_driver=False, logging_level="ERROR")
            else:
                start_local(max(os.cpu_count() or 1, sweep.cpus * (sweep.concurrency or 1)))
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            where = "on this machine" if address is None else f"at {address}"
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise SweepError(f"cannot reach Ray {where}: {running.without_paths(reason)}") from error
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(m.get("CPU", 0) >= sweep.cpus and m.get("GPU", 0) >= sweep.gpus for m in machines):
        most = max((m.get("GPU", 0) for m in machines), default=0), max((m.get("CPU", 0) for m in machines), default=0)
        if started:
            ray.shutdown()
        raise SweepError(
            f"a trial takes {sweep.gpus:g} GPUs and {sweep.cpus} CPUs, and no machine here has them (most: {most[0]:g} and "
            f"{most[1]:g}). Give smaller `gpus` and `cpus`, or --address of a larger cluster."
        )
    return started


def start_local(cpus: int) -> None:
    """Start Ray on this machine alone, quiet and small.

    Raises:
        RuntimeError: if it does not come up, tried thrice: where cores are busy, Ray takes its own helpers for dead after 15 s.
    """
    # before the import: no usage reports, no lines of workers in the user's terminal
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    import psutil
    import ray

    for left in (2, 1, 0):
        before = set(psutil.Process().children())
        try:
            ray.init(
                # a new one, whatever else runs on this machine
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                object_store_memory=OBJECT_STORE,
                # not on the network
                _node_ip_address="127.0.0.1",
            )
            return
        except Exception as error:  # Ray raises bare ones
            ray.shutdown()
            # what did start of a Ray that did not come up, it leaves behind
            for process in set(psutil.Process().children()) - before:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            if not left:
                raise RuntimeError(str(error)) from error


def _record(one: Trial, found: Mapping[str, Any], errors: list[Attempt], begun: str, command: Sequence[str] | None) -> Record:
    done = found["error"] is None
    include = None if one.include_path is None else Path(one.include_path).name
    words = ["lmms-eval" if command is None else Path(command[0]).name, *running.arguments(one.settings, include)]
    return Record(
        digest=one.digest,
        status="done" if done else "failed",
        labels=Labels(**one.labels),
        settings=Settings(**one.settings),
        command=shlex.join(words),
        attempts=len(errors) + done,
        errors=errors,
        started=begun,
        wall_s=found["wall_s"],
        tasks=found["tasks"] if done else {},
        measured=Measured(**found["measured"]) if done else None,
        versions=found.get("versions", {}),
        hardware=Hardware(**found["hardware"]) if "hardware" in found else None,
        commit=found.get("commit"),
    )
