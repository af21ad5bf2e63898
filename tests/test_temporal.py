"""The video baselines' maths against plain loops."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune.pruner import BudgetError, UnsupportedError
from vtprune.temporal import dycoke_merge, evs, evs_count, uniform_frames

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@st.composite
def videos(draw, most_frames=9):
    """[B, T, N, D]: random, coarse (many ties), with all-zero tokens and still frames."""
    b, t, n, d = draw(st.integers(1, 3)), draw(st.integers(1, most_frames)), draw(st.integers(1, 6)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    if draw(st.booleans()):
        x = torch.randint(-1, 2, (b, t, n, d), generator=generator).float()
    else:
        x = torch.randn(b, t, n, d, generator=generator)
    for still in draw(st.sets(st.integers(1, t), max_size=3)):
        if still < t:
            x[:, still] = x[:, still - 1]
    return x.to(draw(st.sampled_from(DTYPES)))


def cosine(a, b):
    a, b = a.double().tolist(), b.double().tolist()
    norms = math.sqrt(math.fsum(v * v for v in a)) * math.sqrt(math.fsum(v * v for v in b))
    return round(math.fsum(v * w for v, w in zip(a, b, strict=True)) / norms, 8) if norms else 0.0


def slow_evs(video, k):
    t, n, _ = video.shape
    scores = [math.inf] * n
    for frame in range(1, t):
        scores += [round(1 - cosine(video[frame, i], video[frame - 1, i]), 8) for i in range(n)]
    return sorted(sorted(range(t * n), key=lambda i: (-scores[i], i))[:k])


def slow_dycoke(video, k, window=4):
    """Windows and pairs written out, for the paper's window of 4."""
    assert window == 4
    t, n, _ = video.shape
    stay = math.floor(round((1 - k) * n, 6))
    kept, of = {}, {}
    for frame in range(t):
        start = frame - frame % 4
        reference = {0: None, 1: start, 2: start, 3: start + 2}[frame % 4]
        of[frame] = reference
        if reference is None:
            kept[frame] = set(range(n))
        else:
            like = [cosine(video[frame, i], video[reference, i]) for i in range(n)]
            kept[frame] = set(sorted(range(n), key=lambda i: (like[i], i))[:stay])
    into = []
    for frame in range(t):
        for i in range(n):
            source = frame
            while i not in kept[source]:
                source = of[source]
            into.append(-1 if source == frame else source * n + i)
    return [f * n + i for f in range(t) for i in sorted(kept[f])], into


@settings(deadline=None, max_examples=80)
@given(videos(), st.data())
def test_evs_is_its_definition(x, data):
    b, t, n, _ = x.shape
    k = data.draw(st.integers(n, t * n))
    found = evs(x, k)
    assert found.shape == (b, k) and found.dtype == torch.long
    assert found.tolist() == [slow_evs(video, k) for video in x]
    assert torch.equal(found[:, :n], torch.arange(n).expand(b, n))  # the first frame is whole
    assert torch.equal(evs(x[0], k), found[0])


def test_evs_keeps_what_moves():
    x = torch.zeros(6, 16, 8)
    x[:] = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    x[3, 5] = -x[2, 5]
    x[4:, 5] = x[3, 5]
    found = evs(x.bfloat16(), 17)
    assert found.tolist() == [*range(16), 3 * 16 + 5]


def test_evs_without_change_goes_by_index():
    assert evs(torch.ones(4, 5, 3), 12).tolist() == list(range(12))
    assert evs(torch.zeros(4, 5, 3), 12).tolist() == list(range(12))
    assert evs(torch.ones(1, 5, 3), 1.0).tolist() == list(range(5))
    assert evs(torch.full((4, 5, 3), float("nan")), 12).tolist() == list(range(12))


def test_evs_is_blind_to_length():
    x = torch.randn(5, 7, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for scale in (1e-200, 1e-20, 1e20, 1e200):
        assert torch.equal(evs(x * scale, 0.5), evs(x, 0.5))


def test_evs_in_a_batch_is_evs_alone():
    x = torch.randn(4, 6, 30, 65, generator=torch.Generator().manual_seed(2))
    x[:, 2:] = x[:, 1:2] + 1e-7 * x[:, 2:]  # nearly equal: ties on paper
    together = evs(x, 0.4)
    assert all(torch.equal(evs(video, 0.4), found) for video, found in zip(x, together, strict=True))


@pytest.mark.parametrize("keep", [0, 4, 0.1, True, float("nan"), -1, 1.5])
def test_evs_refuses(keep):
    with pytest.raises(BudgetError, match="keep="):
        evs(torch.randn(8, 5, 3), keep)
    with pytest.raises(BudgetError, match="at least 5"):
        evs(torch.randn(8, 5, 3), 4)


def test_evs_count():
    # the count that serving code prepares its placeholders with
    assert evs_count(10, 16, 0.75) == 40
    assert evs_count(10, 16, 0.0) == 160
    assert evs_count(10, 16, 0.99) == 16
    assert evs_count(3, 7, 0.5) == 10
    for rate in (1.0, -0.1, float("nan")):
        with pytest.raises(BudgetError, match="rate"):
            evs_count(10, 16, rate)


@given(st.integers(1, 40), st.integers(1, 30), st.data())
@settings(deadline=None)
def test_uniform_frames(frames, tokens, data):
    k = data.draw(st.integers(1, frames * tokens))
    found = uniform_frames(frames, tokens, k).tolist()
    assert len(found) == k == len(set(found)) and found == sorted(found)
    assert found[0] >= 0 and found[-1] < frames * tokens
    counts = [sum(i // tokens == t for i in found) for t in range(frames)]
    used = [t for t, n in enumerate(counts) if n]
    assert sorted(counts[t] for t in used)[1:] == [tokens] * (len(used) - 1)  # at most one is partial
    gaps = [b - a for a, b in pairwise(used)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_uniform_frames_by_hand():
    assert uniform_frames(8, 2, 8).tolist() == [2, 3, 6, 7, 10, 11, 14, 15]
    assert uniform_frames(4, 4, 6).tolist() == [4, 5, 6, 7, 13, 15]
    assert uniform_frames(4, 4, 1).tolist() == [10]
    for k in (0, 17, 1.0, True):
        with pytest.raises(BudgetError, match="k="):
            uniform_frames(4, 4, k)


@settings(deadline=None, max_examples=80)
@given(videos(), st.sampled_from([0.0, 0.3, 0.5, 0.7, 0.9, 1.0]))
def test_dycoke_is_its_definition(x, k):
    found = dycoke_merge(x, k)
    for video, kept, into in zip(x, found.kept, found.into, strict=True):
        slow_kept, slow_into = slow_dycoke(video, k)
        assert kept.tolist() == slow_kept
        assert into.tolist() == slow_into
    alone = dycoke_merge(x[0], k)
    assert torch.equal(alone.kept, found.kept[0]) and torch.equal(alone.into, found.into[0])


@settings(deadline=None, max_examples=60)
@given(videos(), st.floats(0, 1), st.integers(1, 9))
def test_dycoke_in_any_window(x, k, window):
    _, t, n, _ = x.shape
    kept, into = dycoke_merge(x, k, window)
    # what stays and what was merged make up the video, and every target stays
    for stays, targets in zip(kept.tolist(), into.tolist(), strict=True):
        assert stays == sorted(set(stays))
        assert [i for i, target in enumerate(targets) if target < 0] == stays
        for i, target in enumerate(targets):
            if target >= 0:
                assert target in stays and target % n == i % n and target < i
                assert target // n // window == i // n // window
    assert all(set(range(f * n, f * n + n)) <= set(kept[0].tolist()) for f in range(0, t, window))


def test_dycoke_keeps_the_published_share():
    x = torch.randn(2, 32, 196, 24, generator=torch.Generator().manual_seed(3))
    kept, _ = dycoke_merge(x, 0.7)
    assert kept.shape == (2, 8 * (196 + 3 * 58))  # 47.5 % up to rounding
    # exact tenths: (1 - 0.9) * 10 is 0.9999... in floats and still means one token
    assert dycoke_merge(torch.randn(4, 10, 8), 0.9).kept.shape == (13,)


def test_dycoke_without_change():
    kept, into = dycoke_merge(torch.ones(4, 4, 3), 0.5)
    assert kept.tolist() == [0, 1, 2, 3, 4, 5, 8, 9, 12, 13]
    assert into.tolist() == [-1] * 6 + [2, 3, -1, -1, 2, 3, -1, -1, 2, 3]
    kept, into = dycoke_merge(torch.ones(1, 4, 3))
    assert kept.tolist() == [0, 1, 2, 3] and into.tolist() == [-1] * 4


def test_dycoke_chains_to_what_stays():
    # frame 3 is like 2 and 2 is like 0: the first frame stands for all of them
    x = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(4)).repeat(4, 1, 1)
    assert dycoke_merge(x, 1.0).into.view(4, 6)[3].tolist() == list(range(6))


@pytest.mark.parametrize("k", [-0.1, 1.1, float("nan"), True, "a"])
def test_dycoke_refuses(k):
    with pytest.raises(BudgetError, match="k="):
        dycoke_merge(torch.randn(4, 3, 2), k)


def test_bad_features_and_windows():
    for window in (0, 1.5, True):
        with pytest.raises(BudgetError, match="window"):
            dycoke_merge(torch.randn(4, 3, 2), 0.5, window)
    for x in (torch.randn(4, 3), torch.zeros(4, 3, 2, dtype=torch.long), torch.zeros(0, 3, 2)):
        for call in (lambda x: evs(x, 1), dycoke_merge):
            with pytest.raises(UnsupportedError, match="features"):
                call(x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_host_sync_and_the_same_on_a_gpu():
    x = torch.randn(2, 9, 50, 64, generator=torch.Generator().manual_seed(5)).bfloat16()
    on_gpu = x.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found, merged = evs(on_gpu, 200), dycoke_merge(on_gpu)
        uniform = uniform_frames(9, 50, 77, on_gpu.device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.cpu(), evs(x, 200))
    assert torch.equal(merged.kept.cpu(), dycoke_merge(x).kept) and torch.equal(merged.into.cpu(), dycoke_merge(x).into)
    assert torch.equal(uniform.cpu(), uniform_frames(9, 50, 77))
