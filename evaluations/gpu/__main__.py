"""Measure on one GPU what `docs/performance.md` reports of it, in a few minutes, without weights or network.

    python -m evaluations.gpu --out results/gpu

Writes one JSON file per part as soon as that part is done; a part that fails leaves its traceback in its file, and the
others go on. Random weights of the real shapes, made on the device (15 GB). `--device cpu --tiny` tries the script itself.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


class Script:
    """Parts that write a file each, and the one model that they share in turn."""

    def __init__(self, out: Path, device: str, tiny: bool, repeats: int, layers: int | None):
        self.out, self.device, self.tiny, self.repeats, self.layers = out, device, tiny, repeats, layers
        self.begin = time.perf_counter()
        self.model, self.config = None, ""

    def run(self, name: str, part: Callable[[], Any]) -> bool:
        """Run a part and write what it gives to `name`.json; whether it went well."""
        begin, well = time.perf_counter(), True
        try:
            data = part()
        except Exception:  # noqa: BLE001 - it is written down, and the next part may be fine
            data, well = {"error": traceback.format_exc()}, False
            print(data["error"], flush=True)
        took = time.perf_counter() - begin
        path = self.out / f"{name}.json"
        path.write_text(json.dumps({"took_s": round(took, 1), **data}, indent=1) + "\n", encoding="utf-8")
        print(f"[{time.perf_counter() - self.begin:6.1f} s] {name}: {'done' if well else 'FAILED'} in {took:.1f} s", flush=True)
        return well

    def load(self, config: str):
        """A model of the shapes of `config`; the one before it goes."""
        from vtprune import embedded
        from vtprune.measure.bench import build

        if self.config != config:
            self.drop()
            name = "tiny-random" if self.tiny else config
            kind = torch.float32 if self.tiny else torch.bfloat16
            self.model, self.config = build(embedded.config(name), self.layers, kind, self.device, "sdpa"), config
        return self.model

    def drop(self) -> None:
        self.model, self.config = None, ""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


# ---------------------------------------------------------------------- parts


def environment(script: Script) -> dict[str, Any]:
    from vtprune.measure.bench import machine

    said = {}
    if shutil.which("nvidia-smi"):
        query = "name,driver_version,memory.total,clocks.max.sm,power.limit"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv"]
        said["nvidia-smi"] = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60).stdout
    optional = ("triton", "flash_attn", "kernels", "torchvision", "hypothesis", "pytest")
    return {
        "machine": machine(script.device),
        "packages": {name: importlib.util.find_spec(name) is not None for name in optional},
        "compiler": shutil.which("gcc") or shutil.which("cc"),
        **said,
    }


def _clocked(script: Script, run: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Median milliseconds of `run` by device events, and until the call returns."""
    for _ in range(2):
        run()
    script.wait()
    device, host = [], []
    for _ in range(repeats):
        begin = time.perf_counter()
        if script.device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            host.append(1e3 * (time.perf_counter() - begin))
            torch.cuda.synchronize()
            device.append(start.elapsed_time(end))
        else:
            run()
            host.append(1e3 * (time.perf_counter() - begin))
            device = host
    return {"ms": statistics.median(device), "low": min(device), "high": max(device), "host_ms": statistics.median(host)}


def greedy(script: Script) -> dict[str, Any]:
    """Times of the greedy selections, of their parts, and of the loop that they replace."""
    from vtprune import select

    rows: list[dict[str, Any]] = []
    width, repeats = (64, 2) if script.tiny else (4096, 15)

    def note(**what: Any) -> None:
        rows.append(what)

    for batch, tokens in ((1, 576), (1, 2880), (8, 576), (8, 2880)) if not script.tiny else ((1, 36),):
        generator = torch.Generator(script.device).manual_seed(0)
        x = torch.randn(batch, tokens, width, generator=generator, device=script.device).bfloat16()
        weight = torch.rand(batch, tokens, generator=generator, device=script.device)
        first = torch.zeros(batch, dtype=torch.long, device=script.device)
        counts = (8,) if script.tiny else (64, 128, 320)
        for k in counts:
            for name, run in (
                ("max_sum", lambda k=k, x=x, first=first: select.max_sum(x, first, k)),
                ("max_min", lambda k=k, x=x: select.max_min(x, k)),
                ("dpp", lambda k=k, x=x, weight=weight: select.dpp(x, weight, k)),
            ):
                note(what=name, batch=batch, tokens=tokens, k=k, **_clocked(script, run, repeats))
        unit = select._unit(x)
        note(what="part: unit rows", batch=batch, tokens=tokens, **_clocked(script, lambda x=x: select._unit(x), repeats))
        product = lambda unit=unit: torch.bmm(unit, unit.transpose(1, 2))
        note(what="part: table of cosines, fp64", batch=batch, tokens=tokens, **_clocked(script, product, repeats))
        if script.device == "cuda" and batch == 1:
            from vtprune import greedy as kernels

            table = product()
            for k in counts:
                for warps in (8, 16, 32):
                    run = lambda k=k, warps=warps, t=table, f=first: kernels.spread_out(t, f, k, True, warps)
                    note(what="part: picks, k_center", tokens=tokens, k=k, warps=warps, **_clocked(script, run, repeats))
                exact = weight.double()
                for warps, span in ((8, 32), (16, 16), (16, 32), (16, 64), (32, 16), (32, 32), (32, 64)):
                    run = lambda k=k, warps=warps, span=span, t=table, w=exact: kernels.determinant(
                        t.clone(), w, k, warps, span
                    )
                    where = {"tokens": tokens, "k": k, "warps": warps, "span": span}
                    note(what="part: picks and copy of the table, dpp", **where, **_clocked(script, run, repeats))
            original = select._greedy
            select._greedy = lambda device: None
            try:
                for k in (128, 320):
                    run = lambda k=k, x=x: select.max_min(x, k)
                    note(what="before: max_min, torch loop", batch=1, tokens=tokens, k=k, **_clocked(script, run, 3))
                    run = lambda k=k, x=x, weight=weight: select.dpp(x, weight, k)
                    note(what="before: dpp, torch loop", batch=1, tokens=tokens, k=k, **_clocked(script, run, 3))
            finally:
                select._greedy = original
    return {"rows": rows}


def bench(
    script: Script, config: str, names: Sequence[str], keeps: Sequence[int], batch: int, everything: bool, decode_steps: int
) -> dict[str, Any]:
    """What `vtprune bench --json` writes."""
    from dataclasses import asdict

    import vtprune
    from vtprune.measure import bench as benching
    from vtprune.measure.inputs import make_inputs
    from vtprune.measure.limits import reasons, weight_bytes

    model = script.load(config)
    inputs = make_inputs(model, batch, 60)
    keeps = [min(k, 20) for k in keeps[:1]] if script.tiny else keeps
    cases = benching.cases_for(names, keeps, vtprune.create, False)
    if everything:
        cases = [*benching.cases_for(names[:1], [], vtprune.create), *cases]
    warmup = 2
    rows = benching.measure(model, inputs, cases, script.repeats, warmup, decode_steps, bounds=True)
    floor = benching.launch_floor(model)
    said = benching.setting(config, model, [batch], 60, script.repeats, warmup, decode_steps)
    for row in rows:
        line = f"{row.label}: {row.error}"
        if row.error is None:
            share = "-" if row.bound_share is None else f"{row.bound_share:.0%}"
            line = (
                f"{row.label}: prefill {row.prefill.median:.1f} ms, {row.speedup:.2f}x, {row.flops_share or 0:.0%} of the "
                f"FLOPs bound, {share} of the measured, selection {row.selection.median:.2f} ms"
            )
        print("  ", line, flush=True)
    return {
        "command": shlex.join(["python", "-m", "evaluations.gpu", *sys.argv[1:]]),
        "setting": said,
        "launch_floor": asdict(floor),
        "reasons": reasons(rows, weight_bytes(model), floor),
        "rows": [asdict(row) for row in rows],
    }


def stalls(script: Script, config: str, names: Sequence[str], keep: int) -> dict[str, Any]:
    """Where the host waits for the device in one prefill, how many kernels it launches, and what costs most."""
    from vtprune.measure.bench import attempt
    from vtprune.measure.inputs import make_inputs

    model = script.load(config)
    inputs = make_inputs(model, 1, 60)
    rows, tables = [], {}
    for name in (None, *names):
        data, error = attempt(lambda name=name: _stalls(script, model, inputs, name, 20 if script.tiny else keep))
        row, tables[name or "unpruned"] = data or ({"error": error}, "")
        rows.append({"strategy": name or "unpruned", **row})
        print("  ", {k: v for k, v in rows[-1].items() if k != "where"}, flush=True)
    return {"keep": keep, "rows": rows, "tables": tables}


def _stalls(script: Script, model, inputs: dict[str, Any], name: str | None, keep: int) -> tuple[dict[str, Any], str]:
    import vtprune

    with contextlib.ExitStack() as stack:
        if name is not None:
            stack.enter_context(vtprune.pruning(model, name, keep=keep))
        stack.enter_context(torch.inference_mode())

        def run() -> Any:
            return model(**inputs, use_cache=True, logits_to_keep=1)

        for _ in range(2):
            run()
        script.wait()
        found: Counter[str] = Counter()
        if script.device == "cuda":
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    run()
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            for one in caught:
                if "synchroniz" in str(one.message):
                    path = Path(one.filename)
                    found[f"{path.parent.parent.name}/{path.parent.name}/{path.name}:{one.lineno}"] += 1
        script.wait()
        begin = time.perf_counter()
        run()
        host = 1e3 * (time.perf_counter() - begin)
        script.wait()
        whole = 1e3 * (time.perf_counter() - begin)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if script.device == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profiler:
            run()
            script.wait()
        averages = profiler.key_averages()
        launches = {e.key: e.count for e in averages if "Launch" in e.key}
        by = "self_device_time_total" if script.device == "cuda" else "self_cpu_time_total"
        ours = sum(n for place, n in found.items() if "vtprune/" in place)
        row = {
            "host_ms": host,
            "wall_ms": whole,
            "synchronisations": sum(found.values()),
            "of_vtprune": ours,
            "where": dict(found),
            "launches": launches,
        }
        return row, averages.table(sort_by=by, row_limit=25, max_name_column_width=60)


def tests(script: Script) -> dict[str, Any]:
    """The tests that need a GPU."""
    script.drop()
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", "-rs", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-W", "ignore", "--durations=12", "tests/test_greedy.py", "tests/test_cuda.py"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    said, status = script.out / "tests.txt", None
    with said.open("w", encoding="utf-8") as stream, contextlib.suppress(subprocess.TimeoutExpired):
        status = subprocess.run(
            command, check=False, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, timeout=190
        ).returncode
    output = said.read_text(encoding="utf-8")
    print(output[-3000:], flush=True)
    return {"command": command, "status": status, "output": output[-12000:]}


ALL = ("flowcut", "visionzip", "random", "divprune", "todre", "cdpruner", "fastv")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m evaluations.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON files")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script itself")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--layers", type=int, help="cut the decoder to this many, for a profile on a CPU")
    parser.add_argument("--parts", default="", help="comma-separated; default: all")
    parser.add_argument("--seconds", type=float, default=480, help="start no further part after this")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    script = Script(options.out, options.device, options.tiny, options.repeats, options.layers)
    parts: dict[str, Callable[[], Any]] = {
        "machine": lambda: environment(script),
        "greedy": lambda: greedy(script),
        "llava-next-7b-batch-1": lambda: bench(script, "llava-next-7b", ALL, (160, 320, 640), 1, True, 4),
        "llava-next-7b-stalls": lambda: stalls(
            script, "llava-next-7b", ("random", "divprune", "visionzip", "flowcut", "fastv"), 320
        ),
        "llava-next-7b-batch-8": lambda: bench(script, "llava-next-7b", ALL, (160, 320), 8, False, 0),
        "llava-1.5-7b-batch-1": lambda: bench(script, "llava-1.5-7b", ALL, (64, 128, 192), 1, True, 4),
        "tests": lambda: tests(script),
    }
    wanted = [name for name in options.parts.split(",") if name] or list(parts)
    parts["llava-1.5-7b-stalls"] = lambda: stalls(script, "llava-1.5-7b", ("flowcut", "divprune"), 64)
    for name in wanted:
        if time.perf_counter() - script.begin > options.seconds:
            print(f"{name}: left out, {options.seconds:.0f} s have passed", flush=True)
            continue
        script.run(name, parts[name])


if __name__ == "__main__":
    main()
