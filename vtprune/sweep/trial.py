"""One trial: an lmms-eval run in a process of its own, and what it left, checked.

Imports neither Ray nor torch: this is what a Ray worker runs, and the model lives in the process that it starts.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

import vtprune

MEASURED = "VTPRUNE_MEASURED"
MAX_BYTES = 1 << 30
# of what a failed run said last
LINES, CHARACTERS = 15, 3000
_GUARD = Path(__file__).with_name("guard.py")
_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
# an absolute path up to its last name, but no URL and no org/name
_FOLDERS = re.compile(r"(?<![\w.:/~-])(?:~|[A-Za-z]:)?/(?:[^\s/:'\"<>|,]+/)+")
# of a cluster's driver, for its workers; never what may hold a secret
_PASSED = ("HF_", "TRANSFORMERS_", "LMMS_EVAL_", "TOKENIZERS_", "VTPRUNE_")
_SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD")


class MeasuredTask(BaseModel):
    """Means over a task's samples, as the plugin measured them; None for what a run does not have.

    Parameters:
        visual_tokens, entered, equivalent_tokens: of a sample, before pruning, entering the decoder, mean over layers.
        prefill_ms, prefill_ms_median, ttft_ms, tpot_ms, selection_ms: milliseconds.
        kv_bytes, kv_bytes_full, peak_bytes: bytes; flops, flops_full: of the prefill, with and without pruning.
    """

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    samples: int | None = None
    visual_tokens: float | None = None
    entered: float | None = None
    equivalent_tokens: float | None = None
    prefill_ms: float | None = None
    prefill_ms_median: float | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    selection_ms: float | None = None
    kv_bytes: float | None = None
    kv_bytes_full: float | None = None
    flops: float | None = None
    flops_full: float | None = None
    peak_bytes: float | None = None


class Measured(BaseModel):
    """What vtprune's plugin writes beside lmms-eval's own files, without its list of samples."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    vtprune: str
    model: str
    pruner: str | None = None
    settings: dict[str, Any] = {}
    attn: str
    dtype: str
    device: str
    batch_size: int
    tasks: dict[str, MeasuredTask]


# exit code of what the plugin and lmms-eval's command line refuse
_USAGE = 2


class Failure(Exception):
    """Why an attempt left no result.

    Parameters:
        final: another attempt would end the same way.
    """

    def __init__(self, why: str, final: bool = False):
        super().__init__(why)
        self.final = final


def model_args(settings: Mapping[str, Any]) -> str:
    """A trial's settings as lmms-eval's `--model_args`."""
    pairs = {key: settings[key] for key in ("pretrained", "pruner", "keep", "positions") if settings[key] is not None}
    pairs |= settings["args"] | settings["fields"]
    pairs |= {key: settings[key] for key in ("attn", "dtype", "device")}
    return ",".join(f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in pairs.items())


def arguments(settings: Mapping[str, Any], include_path: str | None) -> list[str]:
    """lmms-eval's command line for a trial, without where it writes."""
    words = ["--model", "vtprune", "--model_args", model_args(settings), "--tasks", ",".join(settings["tasks"])]
    words += ["--batch_size", str(settings["batch_size"]), "--seed", str(settings["seed"])]
    if settings["limit"] is not None:
        words += ["--limit", str(settings["limit"])]
    if include_path is not None:
        words += ["--include_path", include_path]
    return words


def passed_on() -> dict[str, str]:
    """What workers on other machines should know of this one's environment, HF_HUB_OFFLINE among it."""
    return {
        key: value
        for key, value in os.environ.items()
        if key.startswith(_PASSED) and not any(word in key.upper() for word in _SECRET)
    }


def attempt(job: Mapping[str, Any]) -> dict[str, Any]:
    """Run a trial once. Never raises for what the run did wrong.

    Parameters:
        job: settings, include_path, command (what to start; None for lmms-eval), timeout in seconds, environment, folder
            (to start it in, where there is one of that name).
    Returns:
        `error` None and everything measured, or `error` in words with the last `lines` that the run said, and whether it
        is `final`: refused rather than crashed.
    """
    begin = time.monotonic()
    outcome: dict[str, Any] = {"error": None, "lines": [], "final": False}
    work = None
    try:
        work = Path(tempfile.mkdtemp(prefix="vtprune-trial-"))
        _start(job, work)
        outcome |= collect(work, job["settings"])
    except Failure as failure:
        outcome |= {"error": str(failure), "lines": _last_lines(work), "final": failure.final}
    except OSError as error:
        # a full disk, a command that is not there
        outcome["error"] = f"{type(error).__name__}: {error.strerror or error}"
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
    outcome["wall_s"] = round(time.monotonic() - begin, 3)
    outcome |= {"hardware": hardware(job["settings"]), "versions": versions(), "commit": commit()}
    return outcome


def _start(job: Mapping[str, Any], work: Path) -> None:
    """Start the command in a process group of its own, wait for it, leave nothing of it behind.

    Raises:
        Failure: unless it ends well and in time.
    """
    settings = job["settings"]
    command = [*(job["command"] or (sys.executable, "-m", "lmms_eval")), *arguments(settings, job["include_path"])]
    command += ["--output_path", str(work / "out"), "--log_samples"]
    threads = str(settings["cpus"])
    environment = {**os.environ, **job["environment"], MEASURED: str(work / "measured.json")}
    environment |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
    if not settings["gpus"]:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    folder = job["folder"] if Path(job["folder"]).is_dir() else None
    with (work / "stdout").open("wb") as out, (work / "stderr").open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, "-I", str(_GUARD), *command],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=err,
            env=environment,
            cwd=folder,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=job["timeout"])
        except subprocess.TimeoutExpired:
            raise Failure(f"timed out after {job['timeout']:g} s") from None
        finally:
            _end(process)
    if code < 0:
        name = signal.Signals(-code).name
        often = ", as the system does where memory runs out" if name == "SIGKILL" else ""
        raise Failure(f"killed by {name}{often}")
    if code:
        raise Failure(f"lmms-eval ended with exit code {code}{_said(work)}", final=code == _USAGE)


def _end(process: subprocess.Popen) -> None:
    """Kill what is left of a process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def collect(work: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a run left: accuracies, samples and measurements.

    Raises:
        Failure: if something is missing or is not what it should be.
    """
    found = sorted(work.glob("out/**/*_results.json"))
    if len(found) != 1:
        # lmms-eval ends with exit code 0 after errors of its own
        raise Failure(f"lmms-eval ended without results{_said(work)}")
    results = _json(found[0], "lmms-eval's results")
    tasks = {task: _accuracy(results, task) for task in _leaves(results, settings["tasks"])}
    for task, values in tasks.items():
        stored = sorted(work.glob(f"out/**/*_samples_{task}.jsonl"))
        values["samples"] = _samples(stored[0], values["metrics"]) if stored else {}
    path = work / "measured.json"
    if not path.is_file():
        raise Failure("vtprune's plugin left no measurements; is it the vtprune that lmms-eval finds?")
    content = _json(path, "the plugin's measurements")
    if not isinstance(content, dict) or content.get("schema") != 1:
        version = content.get("schema") if isinstance(content, dict) else None
        raise Failure(f"the plugin's measurements have the schema {version!r}, this vtprune reads 1")
    try:
        measured = Measured.model_validate(content)
    except ValidationError as error:
        mistake = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, mistake["loc"]))
        raise Failure(f"the plugin's measurements are damaged: {place}: {mistake['msg']}") from error
    return {"tasks": tasks, "measured": measured.model_dump()}


def _leaves(results: Mapping[str, Any], asked: Sequence[str]) -> list[str]:
    """The tasks to report: those asked for, a group without figures of its own by its parts."""
    found: list[str] = []
    for task in asked:
        entry = results.get("results", {}).get(task)
        if isinstance(entry, dict) and _metrics(entry):
            found.append(task)
            continue
        parts = results.get("group_subtasks", {}).get(task) or []
        if not parts:
            raise Failure(f"lmms-eval's results have no figure for task {task!r}")
        found += _leaves(results, parts)
    return found


def _metrics(entry: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
    """(value, standard error) by metric; the filter is named only where it is not the usual one."""
    found = {}
    for key, value in entry.items():
        metric, comma, kind = key.partition(",")
        if comma and not re.search(r"_stderr(_clt|_clustered)?$", metric) and _number(value) is not None:
            errors = (entry.get(f"{metric}_stderr{more},{kind}") for more in ("", "_clustered", "_clt"))
            stderr = next((e for e in map(_number, errors) if e is not None), None)
            found[metric if kind == "none" else f"{metric},{kind}"] = (_number(value), stderr)
    return found


def _accuracy(results: Mapping[str, Any], task: str) -> dict[str, Any]:
    entry = results["results"][task]
    better = results.get("higher_is_better", {}).get(task) or {}
    count = entry.get("samples") or (results.get("n-samples", {}).get(task) or {}).get("effective")
    metrics = {
        metric: {"value": value, "stderr": stderr, "higher_is_better": better.get(metric.partition(",")[0]) is not False}
        for metric, (value, stderr) in _metrics(entry).items()
    }
    return {"n": int(count) if _number(count) is not None else None, "metrics": metrics}


def _samples(path: Path, metrics: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Per metric each question's score by its number, where lmms-eval gives plain ones."""
    found: dict[str, dict[str, float]] = {metric: {} for metric in metrics}
    count = 0
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                sample = json.loads(line)
                count += 1
                for metric, scores in found.items():
                    score = _number(sample.get(metric))
                    if score is not None:
                        scores[str(sample["doc_id"])] = score
    except (ValueError, KeyError, AttributeError) as error:
        raise Failure(f"lmms-eval's samples are damaged: {path.name.partition('_samples_')[2]}") from error
    return {metric: scores for metric, scores in found.items() if count and len(scores) == count}


def _number(value: Any) -> float | None:
    if isinstance(value, bool | int | float) and math.isfinite(value):
        return float(value)
    return None


def _json(path: Path, what: str) -> Any:
    if path.stat().st_size > MAX_BYTES:
        raise Failure(f"{what} take more than {MAX_BYTES} bytes")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise Failure(f"{what} are damaged") from error


def _said(work: Path) -> str:
    """The line about what went wrong: lmms-eval's, among others on standard output, or the plugin's own."""
    out, err = (_COLOURS.sub("", _tail(work / name, 1 << 16)) for name in ("stdout", "stderr"))
    found = re.findall(r"Error during evaluation: (.*?)(?:\. Please set `--verbosity=DEBUG`.*)?$", out, re.MULTILINE)
    found = found or re.findall(r"^error: (.*)$", err, re.MULTILINE)
    return f": {without_paths(found[-1])}" if found else ""


def _last_lines(work: Path | None) -> list[str]:
    """The end of standard error, or of standard output if nothing stands there."""
    for name in ("stderr", "stdout"):
        text = "" if work is None else _tail(work / name, 1 << 14)
        lines = [line.rstrip() for line in without_paths(text).splitlines() if line.strip()]
        if lines:
            return "\n".join(lines[-LINES:])[-CHARACTERS:].splitlines()
    return []


def _tail(path: Path, size: int) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        # progress bars write over their own line
        return re.sub(r"[^\n]*\r(?!\n)", "", file.read().decode("utf-8", errors="replace"))


def without_paths(text: str) -> str:
    """`text` without colours and without the folders of this machine."""
    return _FOLDERS.sub("…/", _COLOURS.sub("", text))


def hardware(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a trial ran on: the GPU's name, or the processor's with its cores and the threads that were allowed."""
    gpu = _gpu_name() if settings["gpus"] and not settings["device"].startswith("cpu") else None
    return {"device": gpu or _cpu_name(), "gpus": settings["gpus"], "cores": os.cpu_count() or 1, "threads": settings["cpus"]}


def _gpu_name() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    chosen = ["-i", visible] if re.fullmatch(r"[\w,/-]+", visible) else []
    try:
        words = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", *chosen]
        said = subprocess.run(words, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    names = [line.strip() for line in said.splitlines() if line.strip()]
    return ", ".join(dict.fromkeys(names)) or None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of everything that a result may hang on."""
    found = {"vtprune": vtprune.__version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "lmms_eval"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str | None:
    """The checkout's commit that vtprune runs from, with a mark where files differ from it; None outside of one."""
    root = Path(vtprune.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        words = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(words, capture_output=True, text=True, timeout=30, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
