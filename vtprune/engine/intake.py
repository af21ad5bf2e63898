"""What one call of the base model was fed: pictures and videos, and where their tokens stand in the prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.engine.encoding import ImageTokens
from vtprune.engine.items import Item
from vtprune.families.base import Layout, Site, Tiling
from vtprune.pruner import UnsupportedError

# modality -> the arguments that may hold its pixels; Video-LLaVA has a name of its own for pictures
PIXELS = {"image": ("pixel_values", "pixel_values_images"), "video": ("pixel_values_videos",)}


def pixels_of(modality: str, given: dict[str, Any]) -> Tensor | None:
    """The pixels of a modality among the arguments of a forward call, or None."""
    return next((given[name] for name in PIXELS[modality] if given.get(name) is not None), None)


@dataclass
class Call:
    """One forward call of the base model, from its pre-hook to its hook.

    Parameters:
        input_ids: as fed, or None for embeddings.
        masks: modality -> bool [B, L], its placeholders; only of modalities that came.
        features: modality -> projected features per picture or video, in prompt order; filled as they are encoded.
        site: the model's places; embeds: what was fed where no `input_ids` were; pixels: modality -> as fed.
        attention_mask: as fed.
        clock, mark: where time is counted.
    """

    site: Site
    input_ids: Tensor | None
    embeds: Tensor | None = None
    pixels: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    features: dict[str, list[Tensor]] = field(default_factory=dict)
    attention_mask: Any = None
    clock: Any = None
    mark: Any = None

    @classmethod
    def read(cls, site: Site, module: nn.Module, given: dict[str, Any]) -> Call:
        """What the arguments of the base model's forward hold.

        Raises:
            UnsupportedError: for placeholders without anything to put there.
        """
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        encoded = given.get("mm_encoder_outputs") or {}
        call = cls(site, ids, embeds, attention_mask=given.get("attention_mask"))
        length = (ids if ids is not None else embeds).shape[1]
        present = {m for m in PIXELS if encoded.get(m) is not None or pixels_of(m, given) is not None}
        taken = {site.placeholder(m) for m in present}
        for modality, names in PIXELS.items():
            token, came = site.placeholder(modality), modality in present
            if token is None or not (came or length > 1):  # a decode step has no prompt to look at
                continue
            if ids is not None:
                mask = ids == token
            else:
                wanted = module.get_input_embeddings()(torch.tensor(token, device=embeds.device))
                mask = (embeds == wanted).all(-1)
            if not came:
                if token not in taken and bool(mask.any()):  # one id may stand for pictures and videos
                    raise UnsupportedError(
                        f"the prompt has {int(mask.sum())} {modality} placeholder tokens but no {modality} was given. Pass "
                        f"{' or '.join(names)} from the processor, or take the placeholder out of the prompt."
                    )
                continue
            call.masks[modality] = mask
            if pixels_of(modality, given) is not None:
                call.pixels[modality] = pixels_of(modality, given)
            if encoded.get(modality) is not None:
                call.features[modality] = rows_of(encoded[modality].pooler_output)
        return call

    def in_order(self) -> tuple[Tensor | None, list[Tensor]]:
        """All placeholders bool [B, L], and the features in the order in which they stand in the prompt."""
        came = [modality for modality in self.masks if self.features.get(modality)]
        runs = self.site.family.runs is not None
        if len(came) == 1 and not runs:
            return self.masks[came[0]], self.features[came[0]]
        if not came:
            return None, []
        placed = []
        for modality in came:
            slots = self.masks[modality].flatten().nonzero()[:, 0].tolist()
            at = 0
            for feature in self.features[modality]:
                layout = ImageTokens.of(feature).layout
                # a sample's pictures may come in one row, which has none where the sample has none
                pictures = layout.tiles if runs and layout.frames == 1 else 1
                for picture in range(pictures):
                    if at >= len(slots):
                        raise UnsupportedError(f"the prompt has fewer {modality} placeholder tokens than features came.")
                    count = layout.placeholders // pictures
                    placed.append((slots[at], count, feature, picture))
                    at += count
        placed.sort(key=lambda one: one[0])
        mask = torch.stack([self.masks[modality] for modality in came]).any(0)
        if not runs:
            return mask, [feature for _, _, feature, _ in placed]
        return mask, self._images(placed, mask.shape[1])

    def _images(self, placed: list[tuple[int, int, Tensor, int]], length: int) -> list[Tensor]:
        """Pictures that are tiles of one image put together, as the family tells them from the prompt.

        Parameters:
            placed: (place in the flattened batch, tokens, features that hold it, which picture of them); length: of a row.
        """
        rows: dict[int, list[tuple[int, int, Tensor, int]]] = {}
        for one in placed:
            rows.setdefault(one[0] // length, []).append(one)
        images: list[Tensor] = []
        known: dict[tuple, Tensor] = {}  # beams hand on the very same features: their images are the same objects, too
        for row, pictures in rows.items():
            spans = [(start % length, start % length + count) for start, count, _, _ in pictures]
            tilings = self.site.family.runs(self.site.base, self._ids(row), spans)
            left = iter(pictures)
            for tiling in tilings:
                tiles = [next(left) for _ in range(tiling.tiles)]
                key = tuple((id(feature), picture) for _, _, feature, picture in tiles)
                if key not in known:
                    known[key] = _one_image(self.site, [(feature, count) for _, count, feature, _ in tiles], tiling, key)
                images.append(known[key])
        return images

    def _ids(self, row: int) -> list[int]:
        """A row's token ids; where embeddings were fed, negative numbers that are equal where these are."""
        if self.input_ids is not None:
            return self.input_ids[row].tolist()
        return (-1 - torch.unique(self.embeds[row].float(), dim=0, return_inverse=True)[1]).tolist()


def _one_image(site: Site, tiles: list[tuple[Tensor, int]], tiling: Tiling, key: tuple) -> Tensor:
    """Tiles that came as pictures of their own, as one image with a record of its own; the first tile remembers it.

    Parameters:
        tiles: (the features that hold it, its tokens) of each; key: names of them.
    """
    first = tiles[0][0]
    before = ImageTokens.of(first)
    if len(tiles) == 1 and before.layout.placeholders == tiles[0][1]:
        return first
    size = sum(count for _, count in tiles)
    index = torch.arange(size, device=first.device)
    layout = Layout(size)
    if len(tiles) > 1:
        grid = site.grid(tiles[0][1])
        alike = grid is not None and len({count for _, count in tiles}) == 1
        layout = Layout(size, tiles=len(tiles), views=tiling.views(grid) if alike else ())
    record = ImageTokens(Item(index, (size,)), layout, before.encoding, before.owner)
    record.replays = before.replays
    record.parts = key
    joined = first.new_empty(0)  # its vectors are in the prompt by now: only the record is wanted
    joined._vtprune = record
    return joined


def rows_of(output: Tensor | list[Tensor] | tuple[Tensor, ...]) -> list[Tensor]:
    """Features per picture or video, of a model's `pooler_output`; the tensor objects that carry records, where they do."""
    known = getattr(output, "_vtprune_rows", None)
    return known if known is not None else list(output)


def recognised(rows: list[Tensor], known: list[Tensor]) -> list[Tensor]:
    """Features that lost their records as the model's rows were stacked anew (for beams, say), as the ones they are copies of.

    Parameters:
        rows: as fed; known: those that were computed last, ahead of the call.
    Returns:
        `rows` where they carry records, or hold something else.
    """
    if not known or not rows or any(hasattr(row, "_vtprune") for row in rows):
        return rows
    flat = torch.cat([row.flatten(0, -2) for row in rows])
    found, at = [], 0
    while at < len(flat):
        here = next((one for one in known if len(one) and torch.equal(flat[at : at + len(one)], one)), None)
        if here is None:
            return rows
        found.append(here)
        at += len(here)
    return found
