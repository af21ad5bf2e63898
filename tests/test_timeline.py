"""The timeline shows what each frame of a video scored and got, frame by frame."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from test_videos import FRAMES, PROMPTS, STRATEGIES, fed, inputs_of, model_of

import vtprune
from vtprune.pruner import FramePlan
from vtprune.reporting import SampleReport
from vtprune.video import Frame
from vtprune.viz import KEPT, MERGED, Entry, VizError
from vtprune.viz_timeline import BAR, NARROW, NUMBER, WIDE, clock, shares, strips, timeline

RED = (250, 10, 10)


def frames(count: int, size: tuple[int, int] = (64, 64)) -> list[Image.Image]:
    return [Image.new("RGB", size, RED) for _ in range(count)]


def sample(kept, count: int, each: int = 4, **more) -> SampleReport:
    kept = torch.tensor(kept)
    more = {"images": [count * each], "grids": [None], "frames": [count], "plans": [None], **more}
    return SampleReport(sum(more["images"]), kept, more.pop("layers", [kept] * 3), **more)


def planned(tokens, scores=None, grids=None, **more) -> SampleReport:
    """Of which tokens a plan's are says nothing about the numbers that they have taken."""
    return sample(list(range(sum(tokens))), len(tokens), plans=[FramePlan(tuple(tokens), scores, grids)], **more)


def cells(page: Image.Image, count: int, columns: int | None = None) -> list[np.ndarray]:
    """The cells of a bare page, as int arrays."""
    columns = columns or count
    pixels, gap = np.asarray(page).astype(int), 6
    width = (page.width - gap * (columns - 1)) // columns
    height = (page.height + 14) // -(-count // columns) - 14
    return [
        pixels[
            (n // columns) * (height + 14) : (n // columns) * (height + 14) + height,
            (n % columns) * (width + gap) : (n % columns) * (width + gap) + width,
        ]
        for n in range(count)
    ]


def picture(cell: np.ndarray) -> np.ndarray:
    return cell[NUMBER + BAR + 4 : -18]


def bar(cell: np.ndarray, colour) -> int:
    """Height of the bar of this colour."""
    return int((cell[NUMBER : NUMBER + BAR] == colour).all(-1).any(1).sum())


def red(cell: np.ndarray) -> float:
    """Share of the frame that is bright."""
    shown = picture(cell)
    return float((shown[..., 0] - shown[..., 1] > 100).mean())


def test_kept_tokens_are_counted_per_frame_and_lit():
    """Frame 0 keeps all four, frame 1 its upper left one, frame 2 none."""
    report = sample([0, 1, 2, 3, 4], 3)
    assert shares(report).plan.tokens == (4, 1, 0)
    first, second, third = cells(timeline(report, frames(3), bare=True), 3)
    assert [bar(c, KEPT) for c in (first, second, third)] == [BAR, BAR // 4, 0]
    assert red(first) == 1 and 0.15 < red(second) < 0.25 and red(third) == 0
    shown = picture(second)
    assert tuple(shown[len(shown) // 4, len(shown) // 4]) == RED
    assert not any((c[NUMBER : NUMBER + BAR] == MERGED).all(-1).any() for c in (first, second, third))


def test_a_plan_gives_bars_and_grids():
    report = planned((6, 0, 3), (0.8, 0.1, 0.4), ((2, 3), (0, 0), (3, 1)))
    one, none, three = cells(timeline(report, frames(3), bare=True), 3)
    assert [bar(c, MERGED) for c in (one, none, three)] == [BAR, BAR // 8, BAR // 2]
    assert [bar(c, KEPT) for c in (one, none, three)] == [BAR, 0, BAR // 2]
    assert red(one) > 0.8 and red(none) == 0

    def lines(cell, axis) -> int:
        """Lines across the frame: rows or columns that are not red in the middle of it."""
        shown = picture(cell)[4:-4, 4:-4]
        off = (shown[..., 0] - shown[..., 1] < 180).all(axis)
        return int((np.diff(off.astype(int)) == 1).sum())

    assert (lines(one, 1), lines(one, 0)) == (1, 2)
    assert (lines(three, 1), lines(three, 0)) == (2, 0)


def test_what_a_later_stage_left_is_shown():
    """A strategy inside the decoder lets all enter; the picture is of the last stage, and says so."""
    kept = torch.arange(8)
    report = sample(kept.tolist(), 2, layers=[kept, kept, torch.tensor([1])])
    found = shares(report)
    assert found.plan.tokens == (1, 0) and found.where == "from decoder layer 2"


def test_many_frames_wrap_and_are_thinned():
    few, many = planned([1] * 20), planned([1] * 100)
    assert timeline(few, frames(20), bare=True).width < 9 * (WIDE + 6)
    page = timeline(many, frames(100), bare=True)
    assert page.width == 16 * (NARROW + 6) - 6 and 16 * 4 >= 64
    plain, said = timeline(planned([1] * 64), frames(64)), timeline(many, frames(100))
    assert plain.size == said.size
    legend = (slice(0, 70), slice(None))
    assert (np.asarray(said)[legend] < 200).any(-1).sum() > (np.asarray(plain)[legend] < 200).any(-1).sum() * 1.1
    assert timeline(many, frames(100), most=5, columns=5, bare=True).width == 5 * (WIDE + 6) - 6


def test_pairs_of_frames_show_their_first():
    """A model that merges two frames: one cell each, of frames of any shape, also of an odd number."""
    report = sample([0, 1, 2, 6], 3, each=3)
    given = [Image.new("RGB", (60, 30), RED if i % 2 == 0 else (10, 10, 250)) for i in range(6)]
    for shown in (given, given[:5]):
        found = cells(timeline(report, shown, bare=True), 3)
        assert [red(c) > 0.9 for c in found] == [True, False, True]
        assert picture(found[0]).shape[1] == 2 * picture(found[0]).shape[0]


def test_the_reports_own_grid_is_taken():
    """2 x 3 tokens a frame: no square, so only the report can tell."""
    lit = cells(timeline(sample([0], 2, each=6, grids=[(2, 3)]), frames(2, (60, 40)), bare=True), 2)[0]
    assert picture(lit).shape[:2] == (112, 168) and 0.1 < red(lit) < 0.17
    unknown = cells(timeline(sample([0], 2, each=6), frames(2, (60, 40)), bare=True), 2)[0]
    assert red(unknown) == 1  # where in the frame is not known: nothing is dimmed


def test_times_are_labels():
    assert [clock(t) for t in (0, 7.46, 59.96, 3727.5)] == ["0:00.0", "0:07.5", "1:00.0", "1:02:07.5"]
    timed = [Frame(i * 0.5, image, i) for i, image in enumerate(frames(2))]
    report = planned((1, 1))
    assert timeline(report, timed).size == timeline(report, frames(2)).size
    assert np.asarray(timeline(report, timed)).tobytes() != np.asarray(timeline(report, frames(2))).tobytes()


def test_the_second_video_counts_its_own_tokens():
    both = {"images": [8, 3, 8], "frames": [2, 1, 2], "grids": [None] * 3, "plans": [None] * 3}
    report = sample([0, 9, 16, 17], 2, **both)
    assert shares(report, 0).plan.tokens == (1, 0)
    assert shares(report, 1).plan.tokens == (0, 2)
    assert shares(report, 1).kept.tolist() == [5, 6]


def test_pictures_that_stand_for_frames_are_one_strip():
    plans = [FramePlan((n,), (s,), None) for n, s in ((2, 0.5), (0, 0.1))]
    report = sample([0, 1], 1, images=[4, 4], frames=[1, 1], grids=[(2, 2)] * 2, plans=plans)
    assert shares(report).plan == FramePlan((2, 0), (0.5, 0.1), None)
    assert timeline(report, frames(2)).width > 2 * WIDE


def test_errors():
    with pytest.raises(VizError, match=r"report\.overlay"):
        timeline(sample([0], 1), frames(1))
    report = planned((1, 1, 1))
    for count in (0, 2, 4, 7):
        with pytest.raises(VizError, match=f"3 frames.*{count} given"):
            timeline(report, frames(count))
    with pytest.raises(VizError, match="1 video"):
        timeline(report, frames(3), video=1)
    with pytest.raises(VizError, match="fit"):
        timeline(report, frames(3), fit="tile")
    with pytest.raises(VizError, match="at least 1"):
        timeline(report, frames(3), most=0)
    with pytest.raises(VizError, match="divide"):
        shares(sample([0], 3, images=[10]))
    with pytest.raises(VizError, match="at least one"):
        strips([])


def test_strips_hold_those_that_did_not_run():
    strip = timeline(planned((1, 1, 1)), frames(3), bare=True)
    page = strips([Entry("a" * 40, "b " * 400, "c " * 400, strip), Entry("d", "why " * 200, "")], "question " * 80)
    assert strip.width < page.width < strip.width + 40
    assert strip.height < page.height < strip.height + 250


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", ["onevision", "qwen2.5"])
def test_every_strategy_on_a_real_report(family, strategy):
    ids, given = inputs_of(family, PROMPTS[:1])
    with torch.no_grad(), vtprune.pruning(model_of(family), STRATEGIES[strategy]()) as session:
        model_of(family)(**fed(family, ids, given))
    report, planned = session.report, strategy.startswith("quota")
    found = shares(report.samples[0])
    assert found.own == planned and len(found.plan.tokens) == FRAMES
    if "+" not in strategy:
        last = report.samples[0].cached[-1] if strategy == "evict" else report.samples[0].layers[-1]
        assert sum(found.plan.tokens) == len(last)
    for count in (FRAMES, 2 * FRAMES) if family == "qwen2.5" else (FRAMES,):
        assert report.timeline(frames(count, (40, 60))).width > 4 * 100
