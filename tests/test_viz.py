"""The pictures show what the report says, patch by patch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from vtprune.reporting import SampleReport
from vtprune.viz import KEPT, MARGIN, MERGED, Entry, VizError, _panel, contact_sheet, final_picture, overlay, stages


def sample(kept, layers=None, **more) -> SampleReport:
    kept = torch.tensor(kept)
    more = {"images": [16], "grids": [(4, 4)], **more}
    return SampleReport(sum(more["images"]), kept, [torch.tensor(x) for x in layers] if layers else [kept] * 3, **more)


@pytest.fixture
def red():
    return Image.new("RGB", (64, 64), (250, 10, 10))


def brightness(panel, cell, patch):
    """Mean red minus green inside a patch, away from its outline: high where kept, 0 where dimmed."""
    row, column = divmod(patch, 4)
    inner = np.asarray(panel)[row * cell + 4 : (row + 1) * cell - 4, column * cell + 4 : (column + 1) * cell - 4].astype(int)
    return (inner[..., 0] - inner[..., 1]).mean()


def colours(picture) -> set[tuple[int, ...]]:
    return set(map(tuple, np.asarray(picture).reshape(-1, 3).tolist()))


def test_kept_patches_are_bright_and_outlined_the_others_grey(red):
    panel = final_picture(sample([0, 5, 15]), red)
    cell = panel.width // 4
    assert [brightness(panel, cell, p) > 100 for p in range(16)] == [p in (0, 5, 15) for p in range(16)]
    assert panel.getpixel((cell, cell)) == KEPT  # the corner of patch 5
    assert KEPT not in colours(panel.crop((2 * cell, 0, 4 * cell, cell)))


def test_nothing_dropped_is_the_bare_picture(red):
    panel = final_picture(sample(list(range(16))), red)
    assert panel.getextrema() == ((250, 250), (10, 10), (10, 10))


def test_merged_groups_have_the_other_colour(red):
    panel = _panel(red, (4, 4), np.array([5]), {5: [6, 10]})
    assert MERGED in colours(panel.crop((32, 16, 48, 32)))  # patch 6, dropped but merged into 5


def test_every_stage_that_changes_something_has_a_panel():
    report = sample(
        list(range(8)),
        [list(range(8)), list(range(8)), list(range(4)), list(range(4))],
        encoded=[(1, torch.arange(12)), (3, torch.arange(8))],
        cached=[torch.arange(2)] * 4,
    )
    assert [(s.title, len(s.kept)) for s in stages(report)] == [
        ("after encoder block 1", 12),
        ("entering the decoder", 8),
        ("from decoder layer 2", 4),
        ("in the cache", 2),
    ]
    assert [s.title for s in stages(sample([1, 2]))] == ["entering the decoder"]


def test_overlay_grows_with_stages_and_images(red):
    one = overlay(sample([0, 1]), red)
    two = overlay(sample([0, 1], [[0, 1], [0], [0]]), red)
    assert two.width > 1.9 * (one.width - 2 * MARGIN)
    both = overlay(sample([0, 17], images=[16, 16], grids=[(4, 4), (4, 4)]), [red, red])
    assert both.height > 1.8 * (one.height - 2 * MARGIN)


def test_second_image_counts_its_own_tokens():
    left, right = Image.new("RGB", (32, 32), (250, 10, 10)), Image.new("RGB", (32, 32), (250, 10, 10))
    page = np.asarray(overlay(sample([16], images=[16, 16], grids=[(4, 4), (4, 4)]), [left, right])).astype(int)
    bright = (page[..., 0] - page[..., 1] > 100).nonzero()[0]
    assert bright.min() > page.shape[0] // 2


@pytest.mark.parametrize("size", [(200, 100), (100, 200), (1, 1), (7, 3)])
def test_crop_shows_the_centre_and_stretch_everything(size):
    width, height = size
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[height // 4 : -(height // 4) or None, width // 4 : -(width // 4) or None] = 200
    picture, report = Image.fromarray(pixels), sample(list(range(16)))
    crop, stretch = final_picture(report, picture), final_picture(report, picture, fit="stretch")
    assert crop.size == stretch.size
    if max(size) == 200:
        assert np.asarray(crop).mean() > np.asarray(stretch).mean() + 20


def test_errors(red):
    with pytest.raises(VizError, match="no grid"):
        overlay(sample([0], grids=[None]), red)
    with pytest.raises(VizError, match="1 image"):
        overlay(sample([0]), [red, red])
    with pytest.raises(VizError, match="fit"):
        overlay(sample([0]), red, fit="tile")
    with pytest.raises(VizError, match="at least one"):
        contact_sheet([])


def test_contact_sheet_takes_long_and_missing_things(red):
    panel = final_picture(sample([0, 1]), red)
    entries = [
        Entry("a" * 200, "b " * 200, "word " * 200, panel),
        Entry("none", "", "", None),
        Entry("c", "d", "x" * 900, panel),
    ]
    page = contact_sheet(entries, "question " * 80, columns=2)
    assert page.width < 3 * panel.width
    assert page.height < 4 * panel.height
    assert contact_sheet(entries[:1]).width < 2 * panel.width
