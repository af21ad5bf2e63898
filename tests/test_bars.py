"""The bars of docs/performance.md are read from files, and what was not measured is said not to be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evaluations import bars
from evaluations.gpu import pages as gpu_pages


def row(label: str, **more):
    spread = {"median": 10.0, "low": 9.0, "high": 11.0}
    base = {"label": label, "batch": 1, "error": None, "flops_bound": 2.0, "speedup": 1.9, "prefill": spread, "decoder": spread}
    return {**base, "selection": {"median": 0.5, "low": 0, "high": 0}, "selection_share": 0.02, **more}


def write(folder: Path, name: str, rows: list, layers: int = 4) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps({"rows": rows, "setting": {"decoder_layers": layers}}))


def lines(folder: Path) -> dict[str, list[str]]:
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in bars.table(folder).splitlines()[2:]]
    return {line[0]: line[2:4] for line in cells}


def test_what_was_not_measured_is_said_not_to_be(tmp_path):
    assert {tuple(line) for line in lines(tmp_path).values()} == {("not yet measured", "")}


def test_bars_are_held_against_the_files(tmp_path):
    bare = row("unpruned", speedup=1.0, prefill={"median": 30.0}, decoder={"median": 20.0})
    write(
        tmp_path,
        bars.CPU[0],
        [
            bare,
            row("random keep=64", bound_share=0.97, equivalent_tokens=64, peak_bytes=80),
            row("random keep=128", bound_share=0.94, equivalent_tokens=128, peak_bytes=100),
            row("flowcut keep=64", bound_share=1.05, equivalent_tokens=64),
            row("fastv keep=64", bound_share=0.5, speedup=0.9, equivalent_tokens=64),
            row("divprune keep=64", error="out of memory"),
        ],
    )
    write(tmp_path, bars.CPU[2], [bare, row("divprune keep=160", selection_share=0.2, bound_share=0.99)])
    write(tmp_path, bars.CPU[1], [row("unpruned", speedup=1.0), row("flowcut keep=all", speedup=0.995, flops_bound=1.0),
                                  row("flowcut keep=64", speedup=4.0)], 32)  # fmt: skip
    kernels = [{"what": "max_min", "batch": 1, "k": 128, "ms": 2.5}, {"what": "part: x", "batch": 1, "k": 320, "ms": 9.0}]
    write(tmp_path, f"{bars.GPU}/greedy.json", kernels)
    found = lines(tmp_path)
    assert found["encoder and select stage, keep 64, 128, 192 of 576"] == ["94.0 %", "**missed**"]
    assert found["FlowCut where its image lets it shorten the encoder"] == ["105.0 %", "reached"]
    assert found["no row slower than unpruned, 576 tokens"] == ["0.90x", "**missed**"]
    assert found["peak memory of prefill against the next larger keep"] == ["80.0 %", "reached"]
    # a fifth of 10 + 20 ms, of the 10 + 160 ms that all layers take
    assert found["greedy strategies, 2,880 tokens"] == ["3.5 %", "reached"]
    assert found["all 32 layers, keep = all"] == ["0.5 %", "reached"]
    assert found["all 32 layers, keep 64, encoder included"] == ["4.00x", "reached"]
    assert found["GPU: greedy selection, k <= 128"] == ["2.50 ms", "reached"]
    assert found["GPU: greedy selection, k = 320"] == ["not yet measured", ""]


def test_a_gpu_run_goes_into_the_page(tmp_path, capsys):
    page = tmp_path / "page.md"
    marks = ["<!-- gpu-greedy:begin -->", "not yet measured", "<!-- gpu-greedy:end -->"]
    page.write_text("\n".join([*marks, "<!-- gpu-stalls:begin -->", "<!-- gpu-stalls:end -->", ""]))
    folder = tmp_path / "run"
    folder.mkdir()
    greedy = [{"what": "dpp", "batch": 1, "tokens": 576, "k": 64, "ms": 1.25, "host_ms": 0.4}]
    greedy.append({"what": "part: picks", "tokens": 576, "k": 64, "warps": 8, "ms": 0.5})
    (folder / "greedy.json").write_text(json.dumps({"rows": greedy}))
    stall = {"strategy": "random", "host_ms": 20.0, "wall_ms": 25.0, "synchronisations": 4, "of_vtprune": 1}
    stall |= {"where": {"vtprune/engine/decoding.py:1": 1}, "launches": {"cudaLaunchKernel": 700}}
    rows = [stall, {"strategy": "fastv", "error": "x"}]
    (folder / "llava-next-7b-stalls.json").write_text(json.dumps({"rows": rows, "tables": {}}))
    (folder / "llava-next-7b-batch-1.json").write_text(json.dumps({"error": "Traceback"}))
    gpu_pages.main(folder, page)
    text = page.read_text()
    assert "| dpp | 1 | 576 | 64 | 1.2 ms | 0.4 ms |" in text and "not yet measured" not in text
    assert "| random | 4 | 1 | 700 | 20.0 ms | 25.0 ms |" in text and "| fastv | - |" in text
    assert "failed, see its file" in capsys.readouterr().out


def test_the_page_has_every_mark():
    text = (Path(bars.__file__).parents[1] / "docs" / "performance.md").read_text()
    for mark in ["bars", "gpu-greedy", "gpu-stalls", "cpu-profile", *(f"gpu-{name}" for name in gpu_pages.BENCHES)]:
        assert text.count(f"<!-- {mark}:begin") == text.count(f"<!-- {mark}:end -->") == 1, mark
    for bar in bars.BARS:
        assert Path(bar.file).name in text or bar.file.startswith(bars.GPU), bar.file


@pytest.mark.parametrize("part", ["machine", "greedy", "llava-1.5-7b-batch-1", "llava-1.5-7b-stalls"])
def test_the_script_runs_without_a_gpu(tmp_path, monkeypatch, part):
    from evaluations.gpu.__main__ import main

    monkeypatch.setattr(
        "sys.argv", ["gpu", "--out", str(tmp_path), "--device", "cpu", "--tiny", "--repeats", "1", "--parts", part]
    )
    main()
    data = json.loads((tmp_path / f"{part}.json").read_text())
    assert "error" not in data, data["error"]
    assert len(data) > 1 and data["took_s"] >= 0
