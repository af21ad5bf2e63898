"""What one call of the base model was fed: pictures and videos, and where their tokens stand in the prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.engine.encoding import ImageTokens
from vtprune.engine.items import Item
from vtprune.families.base import Site
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
        site: the model's places.
        clock, mark: where time is counted.
    """

    input_ids: Tensor | None
    masks: dict[str, Tensor] = field(default_factory=dict)
    features: dict[str, list[Tensor]] = field(default_factory=dict)
    site: Site | None = None
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
        call = cls(ids, site=site)
        length = (ids if ids is not None else embeds).shape[1]
        for modality, names in PIXELS.items():
            token = site.placeholder(modality)
            came = encoded.get(modality) is not None or pixels_of(modality, given) is not None
            if token is None or not (came or length > 1):  # a decode step has no prompt to look at
                continue
            if ids is not None:
                mask = ids == token
            else:
                wanted = module.get_input_embeddings()(torch.tensor(token, device=embeds.device))
                mask = (embeds == wanted).all(-1)
            if not came:
                if bool(mask.any()):
                    raise UnsupportedError(
                        f"the prompt has {int(mask.sum())} {modality} placeholder tokens but no {modality} was given. Pass "
                        f"{' or '.join(names)} from the processor, or take the placeholder out of the prompt."
                    )
                continue
            call.masks[modality] = mask
            if encoded.get(modality) is not None:
                call.features[modality] = rows_of(encoded[modality].pooler_output)
        return call

    def in_order(self) -> tuple[Tensor | None, list[Tensor]]:
        """All placeholders bool [B, L], and the features in the order in which they stand in the prompt."""
        came = [modality for modality in self.masks if self.features.get(modality)]
        runs = self.site.family.runs
        if len(came) == 1 and not runs:
            return self.masks[came[0]], self.features[came[0]]
        if not came:
            return None, []
        placed = []
        for modality in came:
            slots = self.masks[modality].flatten().nonzero()[:, 0].tolist()
            at = 0
            for feature in self.features[modality]:
                if at >= len(slots):
                    raise UnsupportedError(f"the prompt has fewer {modality} placeholder tokens than features came.")
                count = ImageTokens.of(feature).layout.placeholders
                placed.append((slots[at], count, feature))
                at += count
        placed.sort(key=lambda one: one[0])
        mask = torch.stack([self.masks[modality] for modality in came]).any(0)
        if not runs:
            return mask, [feature for _, _, feature in placed]
        images: list[list[Tensor]] = []
        end = -1
        for start, count, feature in placed:
            # a row of the batch begins another image
            if start != end or start % mask.shape[1] == 0:
                images.append([])
            images[-1].append(feature)
            end = start + count
        return mask, [_one_image(self.site, tiles) for tiles in images]


def _one_image(site: Site, tiles: list[Tensor]) -> Tensor:
    """Tiles that came as pictures of their own, as one image with a record of its own; the first tile remembers it."""
    if len(tiles) == 1:
        return tiles[0]
    joined, first = torch.cat(tiles), ImageTokens.of(tiles[0])
    index = torch.arange(len(joined), device=joined.device)
    layout = site.joined([ImageTokens.of(tile).layout for tile in tiles])
    record = ImageTokens(Item(index, (len(joined),)), layout, first.encoding, first.owner)
    record.replays = first.replays
    joined._vtprune = record
    return joined


def rows_of(output: Tensor | list[Tensor] | tuple[Tensor, ...]) -> list[Tensor]:
    """Features per picture or video, of a model's `pooler_output`; the tensor objects that carry records, where they do."""
    known = getattr(output, "_vtprune_rows", None)
    return known if known is not None else list(output)
