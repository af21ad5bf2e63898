"""The picks made on a GPU are those made on the CPU. Without a GPU the kernels run in triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vtprune import select

SHAPES = [(1, 5, 4, 5), (2, 37, 16, 20), (3, 64, 8, 64), (2, 150, 96, 70), (1, 576, 128, 128)]


def awkward(batch: int, tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    """[B, N, D] bf16 with duplicates, copies that differ by a factor, zero rows, and entries that are no numbers."""
    generator = torch.Generator().manual_seed(seed + tokens)
    x = torch.randn(batch, tokens, width, generator=generator).bfloat16()
    x[:, tokens // 2], x[:, tokens - 1], x[:, tokens // 3] = x[:, 2], x[:, 2], 2 * x[:, 2]
    x[:, 1] = 0
    if tokens > 30:
        x[:, 20], x[:, 21, 0], x[:, 22, 0] = 0, float("nan"), float("inf")
        x[:, 25:29] = x[:, 24:25]
    return x


def choices(x: torch.Tensor, k: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.rand(x.shape[:2], generator=generator).round(decimals=1).to(x.device)
    first = torch.arange(len(x), device=x.device)
    return {
        "max_sum": select.max_sum(x, first, k),
        "k_center": select.k_center(x, first, k),
        "max_min": select.max_min(x, k),
        "dpp": select.dpp(x, weight, k),
        "loneliest": select.loneliest(x)[:, None],
    }


def compare(device: str, shapes=SHAPES) -> None:
    for batch, tokens, width, k in shapes:
        for x in (
            awkward(batch, tokens, width),
            torch.ones(batch, tokens, width),
            torch.zeros(batch, tokens, width),
            torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(tokens)).half(),
        ):
            expected, found = choices(x, k), choices(x.to(device), k)
            for name, picks in expected.items():
                assert torch.equal(found[name].cpu(), picks), (name, batch, tokens, k)


@pytest.mark.cuda
def test_a_gpu_picks_what_the_cpu_picks():
    compare("cuda", [*SHAPES, (2, 2880, 4096, 320), (8, 576, 4096, 192)])


@pytest.mark.cuda
def test_a_batch_on_a_gpu_in_parts(monkeypatch):
    monkeypatch.setattr(select, "_TABLES", 8 * 150 * 150 * 2)
    compare("cuda", [(5, 150, 32, 40)])


@pytest.mark.cuda
def test_a_gpu_without_the_kernels(monkeypatch):
    monkeypatch.setattr(select, "_greedy", lambda device: None)
    compare("cuda", SHAPES[:3])


def test_kernels_in_the_interpreter():
    pytest.importorskip("triton", "3.9", reason="older interpreters fail under numpy 2.4")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, __file__], check=False, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]


def _interpreted() -> None:
    """Where triton interprets, tables on the CPU go through the kernels as well."""
    from vtprune import greedy

    torch.set_num_threads(1)
    shapes = SHAPES[:4]
    expected = [choices(awkward(*shape[:3]), shape[3]) for shape in shapes]
    select._kernels = lambda x: greedy
    for shape, right in zip(shapes, expected, strict=True):
        found = choices(awkward(*shape[:3]), shape[3])
        for name, picks in right.items():
            assert torch.equal(found[name], picks), (name, shape)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    _interpreted()
