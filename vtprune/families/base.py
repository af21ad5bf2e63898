"""What a model family declares: where its encoder, projector, decoder and visual tokens are, and their grid."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.places import View
from vtprune.pruner import Frames, UnsupportedError


def resolve(module: nn.Module, paths: tuple[str, ...]) -> nn.Module | None:
    """The first of the dotted `paths` that exists below `module`."""
    for path in paths:
        found = module
        for name in path.split("."):
            found = getattr(found, name, None)
            if found is None:
                break
        if found is not None:
            return found
    return None


@dataclass(frozen=True)
class Layout:
    """How an image's placeholder tokens stand for the encoder's patches.

    Parameters:
        placeholders: tokens that the image takes in the prompt.
        visual: LongTensor [N], which of them are visual, ascending; the others separate rows (newline embeddings) and are
            as little offered for pruning as text is. None: all are.
        patch: LongTensor [N], for each visual token the patch that it stands for, counted over all tiles; None where
            tokens are blends of patches (interpolated tiles).
        tiles: pictures that the encoder saw of it; patches: of each of them.
        grid: (rows, columns) of its visual tokens where they form one grid that is not square; of a video, one frame's.
        frames: of a video (merged in time or not), whose tokens come frame by frame; 1 for a picture.
        views: the grids that its visual tokens come in, where there are several; () for the one that `grid` says.
    """

    placeholders: int
    visual: Tensor | None = None
    patch: Tensor | None = None
    tiles: int = 1
    patches: int = 0
    grid: tuple[int, int] | None = None
    frames: int = 1
    views: tuple[View, ...] = ()

    @property
    def size(self) -> int:
        """N, the image's visual tokens."""
        return self.placeholders if self.visual is None else len(self.visual)

    def slots(self, device: torch.device) -> Tensor:
        """LongTensor [N], which of its placeholders the visual tokens are."""
        return torch.arange(self.placeholders, device=device) if self.visual is None else self.visual


def layouts_by_packing(pack: Callable[..., Any], arguments: dict[str, Any]) -> list[Layout]:
    """The layouts of tiled images, read off the model's own packing by having it pack patch numbers.

    Parameters:
        pack: the model's method; arguments: what it is about to pack, `image_features` [tiles, patches, D] per image.
    """
    numbered = []
    for features in arguments["image_features"]:
        tiles, patches = features.shape[:2]
        number = torch.arange(tiles * patches, dtype=torch.float32, device=features.device)
        numbered.append(number.view(tiles, patches, 1))
    newline = None if arguments.get("image_newline") is None else torch.tensor([-1.0], device=numbered[0].device)
    packed = pack(**{**arguments, "image_features": numbered, "image_newline": newline})[0]
    found = []
    for features, image in zip(numbered, packed, strict=True):
        tiles, patches = features.shape[:2]
        visual = (image[:, 0] >= 0).nonzero()[:, 0]
        patch = image[visual, 0]
        whole = bool((patch == patch.round()).all())
        views = _packed_views(image[:, 0] < 0, tiles, patches)
        found.append(Layout(len(image), visual, patch.long() if whole else None, tiles, patches, views=views))
    return found


def _packed_views(separators: Tensor, tiles: int, patches: int) -> tuple[View, ...]:
    """The picture as a whole, then its tiles as one grid, each row of which a separator ends; () where none tells the rows."""
    side = math.isqrt(patches)
    if side * side != patches:
        return ()
    if tiles == 1:
        return (View(side, side),)
    behind = separators[patches:]
    rows = int(behind.sum())
    columns = 0 if rows == 0 else len(behind) // rows - 1
    return (View(side, side), View(rows, columns)) if rows * (columns + 1) == len(behind) > 0 else ()


def plain_pixels(base: nn.Module, given: dict[str, Any], modality: str) -> list[Tensor]:
    """[F, 3, H, W] per video fed as [videos, frames, 3, H, W], or per picture as [pictures, (tiles,) 3, H, W]; of tiles the
    first, which is the whole picture."""
    if modality == "video":
        return list(given.get("pixel_values_videos", given.get("pixel_values")))  # its name before transformers 5.18
    pixels = next(given[name] for name in ("pixel_values", "pixel_values_images") if given.get(name) is not None)
    return [one[:1] if one.ndim == 4 else one[None] for one in pixels]


@dataclass(frozen=True)
class Family:
    """A model family, declared.

    Parameters:
        name: for messages and tables.
        base_classes: names of the base model classes (the ones with `get_image_features`, without LM head).
        encoder_layers: dotted paths below the base model, first match wins.
        video_layers: the same for videos, where they go through an encoder of their own.
        projector: dotted paths of the projector.
        decoder: dotted paths of the language model; its blocks are `decoder_layers` below it.
        rotary: name of the decoder's rotary embedding module.
        special_tokens: vision model type -> tokens before the patches in its sequence (1 for a class token).
        resizable: vision model types whose position table can be interpolated to a smaller picture.
        tiles: (base model, arguments of `get_image_features`) -> tiles per image, for families that cut pictures into
            tiles and pack them with a `pack_image_features` method.
        layouts: (base model, arguments of `get_image_features`) -> the images' layouts, for families whose encoder itself
            decides how many tokens a picture makes.
        videos: (base model, arguments of `get_video_features`, its features) -> the videos' layouts, for families that
            take videos.
        pooling: name of the base model's method or module that pools a video's frames, fed [frames, patches, C]; "" where a
            video's features are not pooled after the vision tower.
        projects_pooled: whether the projector comes after that pooling.
        pixels: (base model, arguments of `get_video_features` or `get_image_features`, "video" or "image") -> the frames of
            each video [F, 3, H, W], or each picture as one frame.
        newline: name of the base model's separator of rows, or "".
        runs: tiles come as pictures of their own and those that follow each other in the prompt without a token between
            them are one image.
        whole: which of an image's several tiles shows all of it: "first", "last", or "" if none does.
        sealed: why no token can leave inside the vision encoder, or "" if it can.
        positions: what positions the decoder's embedding allows.
        norm, query, key: names of the norm, query and key projections within a decoder block and its `self_attn`.
    """

    name: str
    base_classes: tuple[str, ...]
    encoder_layers: tuple[str, ...] = ("vision_tower.encoder.layers", "vision_tower.vision_model.encoder.layers")
    video_layers: tuple[str, ...] = ()
    projector: tuple[str, ...] = ("multi_modal_projector",)
    decoder: tuple[str, ...] = ("language_model",)
    decoder_layers: str = "layers"
    rotary: str = "rotary_emb"
    special_tokens: tuple[tuple[str, int], ...] = (("clip_vision_model", 1), ("siglip_vision_model", 0))
    resizable: tuple[str, ...] = ("clip_vision_model", "siglip_vision_model")
    tiles: Callable[[nn.Module, dict[str, Any]], list[int]] | None = None
    layouts: Callable[[nn.Module, dict[str, Any]], list[Layout]] | None = None
    videos: Callable[[nn.Module, dict[str, Any], Any], list[Layout]] | None = None
    pooling: str = ""
    projects_pooled: bool = False
    pixels: Callable[[nn.Module, dict[str, Any], str], list[Tensor]] = plain_pixels
    newline: str = ""
    runs: bool = False
    whole: str = ""
    sealed: str = ""
    positions: tuple[str, ...] = ("original", "compact")
    norm: str = "input_layernorm"
    query: str = "q_proj"
    key: str = "k_proj"


@dataclass
class Site:
    """A family's places in one model."""

    family: Family
    base: nn.Module

    @cached_property
    def decoder(self) -> nn.Module:
        return self._must(self.family.decoder, "language model")

    @cached_property
    def decoder_layers(self) -> list[nn.Module]:
        # configs may use fewer layers than the module list holds; transformers slices the same way
        return list(getattr(self.decoder, self.family.decoder_layers))[: self.decoder.config.num_hidden_layers]

    @cached_property
    def encoder_layers(self) -> list[nn.Module]:
        return list(self._must(self.family.encoder_layers, "vision encoder blocks"))

    @cached_property
    def video_layers(self) -> list[nn.Module]:
        """The blocks that only videos go through; none where they share the pictures' encoder."""
        paths = self.family.video_layers
        return list(self._must(paths, "video encoder blocks")) if paths else []

    @cached_property
    def projector(self) -> nn.Module:
        return self._must(self.family.projector, "projector")

    @cached_property
    def rotary(self) -> nn.Module:
        return getattr(self.decoder, self.family.rotary)

    @property
    def vision_type(self) -> str:
        return self.base.config.vision_config.model_type

    @property
    def image_token_id(self) -> int:
        return self.base.config.image_token_id

    def placeholder(self, modality: str) -> int | None:
        """The token id that holds the place of an "image" or "video", or None if the model takes none."""
        return getattr(self.base.config, f"{modality}_token_id", None)

    @property
    def patch(self) -> int:
        """Pixels along a patch."""
        return self.base.config.vision_config.patch_size

    def check_resizable(self) -> None:
        """Refuse an encoder that cannot take a smaller picture.

        Raises:
            UnsupportedError: naming those that can.
        """
        if self.family.tiles is not None or self.family.sealed:
            raise UnsupportedError(
                f"{self.family.name} fixes how many tokens a picture makes (tiles, or patches that are joined), so it cannot "
                f"be given a smaller picture here. Resize the picture yourself, or use a strategy of another stage."
            )
        if self.vision_type not in self.family.resizable:
            raise UnsupportedError(
                f"a {self.vision_type!r} vision tower cannot be given a smaller picture here (known: "
                f"{', '.join(self.family.resizable)}). Use a strategy of another stage."
            )

    def special_tokens(self) -> int:
        """Tokens before the patches in the vision sequence.

        Raises:
            UnsupportedError: for a vision tower whose layout is not declared.
        """
        known = dict(self.family.special_tokens)
        if self.vision_type not in known:
            raise UnsupportedError(
                f"{self.family.name} with a {self.vision_type!r} vision tower: its token layout is not declared (known: "
                f"{', '.join(known)}). Strategies that work inside the encoder need it; add it to the family's "
                f"special_tokens, or use a strategy of another stage."
            )
        return known[self.vision_type]

    def capabilities(self) -> frozenset[str]:
        """What strategies may require: "cls" if the encoder has a class token."""
        return frozenset({"cls"}) if dict(self.family.special_tokens).get(self.vision_type, 0) else frozenset()

    def feature_depth(self, layer: int | list[int] | None) -> int:
        """Number of encoder blocks that feed the projector, for a `vision_feature_layer`.

        Raises:
            UnsupportedError: for several feature layers; tokens that leave between them would misalign.
        """
        layer = self.base.config.vision_feature_layer if layer is None else layer
        if isinstance(layer, (list, tuple)):
            if len(layer) != 1:
                raise UnsupportedError(
                    f"{self.family.name} with vision_feature_layer={list(layer)}: features of several encoder blocks are "
                    f"joined per token, so no token may leave between them. Use a strategy of another stage."
                )
            layer = layer[0]
        # hidden_states[0] is the embedding, hidden_states[j] the output of block j - 1
        return layer if layer >= 0 else len(self.encoder_layers) + 1 + layer

    def grid(self, tokens: int | Layout) -> tuple[int, int] | None:
        """(rows, columns) of an image of so many visual tokens or of this layout (of a video, one frame), or None if it is no
        one grid."""
        if isinstance(tokens, Layout):
            if tokens.frames > 1 or tokens.tiles > 1 or tokens.grid is not None:
                return tokens.grid
            tokens = tokens.size
        side = math.isqrt(tokens)
        return (side, side) if side * side == tokens else None

    def views(self, layout: Layout) -> tuple[View, ...]:
        """The grids that a picture's visual tokens come in; () if they form none, or for a video."""
        if layout.views or layout.frames > 1:
            return layout.views
        grid = self.grid(layout)
        return () if grid is None else (View(*grid),)

    def joined(self, tiles: list[Layout]) -> Layout:
        """The layout of an image whose tiles came as pictures of their own."""
        size, count = sum(tile.placeholders for tile in tiles), len(tiles)
        grids = [self.grid(tile) for tile in tiles]
        if None in grids or len(set(grids)) > 1 or any(tile.visual is not None for tile in tiles):
            return Layout(size, tiles=count)
        at = {"first": 0, "last": count - 1}.get(self.family.whole) if count > 1 else None
        cut = count - (at is not None)
        order = [None if i == at else i - (at == 0) for i in range(count)]
        return Layout(size, tiles=count, views=tuple(View(*grids[0], tile, 1 if tile is None else cut) for tile in order))

    def frames(
        self, given: dict[str, Any], pooled: Tensor | None, features: list[Tensor], layouts: list[Layout]
    ) -> list[Frames]:
        """Videos as they are before the model pools them.

        Parameters:
            given: arguments of `get_video_features`; features: what it returned per video.
            pooled: [frames of all videos, patches, C] what went into the pooling; None in families that do not pool.
        """
        family, base = self.family, self.base
        project = self.projector if family.projects_pooled else None
        newline = getattr(base, family.newline) if family.newline else None
        found, start = [], 0
        for feature, layout, pixels in zip(features, layouts, family.pixels(base, given, "video"), strict=True):
            if pooled is None:
                whole, grid = feature[layout.slots(feature.device)].unflatten(0, (layout.frames, -1)), layout.grid
            else:
                whole, start = pooled[start : start + layout.frames], start + layout.frames
                side = math.isqrt(whole.shape[1])
                grid = (side, side)
            found.append(Frames(whole, grid, project, pixels, newline))
        return found

    def pictures(self, given: dict[str, Any], features: list[Tensor], layouts: list[Layout]) -> list[Frames | None]:
        """Pictures as videos of one frame, for prompts with several; None for those whose tokens form no one grid."""
        found: list[Frames | None] = []
        pixels = self.family.pixels(self.base, given, "image") if not self.family.runs else [None] * len(features)
        for feature, layout, shown in zip(features, layouts, pixels, strict=True):
            grid = self.grid(layout) if layout.tiles == 1 and layout.visual is None else None
            found.append(None if grid is None else Frames(feature[None], grid, None, shown))
        return found

    def layouts(self, image_sizes: Tensor) -> list[Layout]:
        """The layouts of pictures of these sizes [n, 2] (height, width), for families that cut them into tiles."""
        vision = self.base.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        tiles = self.family.tiles(self.base, {"image_sizes": image_sizes})
        arguments = {
            "image_features": [torch.zeros(n, patches, 1) for n in tiles],
            "image_sizes": image_sizes,
            "image_newline": torch.zeros(1),
            "vision_feature_select_strategy": self.base.config.vision_feature_select_strategy,
        }
        known = inspect.signature(self.base.pack_image_features).parameters
        return layouts_by_packing(self.base.pack_image_features, {k: v for k, v in arguments.items() if k in known})

    def _must(self, paths: tuple[str, ...], what: str) -> nn.Module:
        found = resolve(self.base, paths)
        if found is None:
            raise UnsupportedError(
                f"{type(self.base).__name__} looks like {self.family.name} but has no {what} at {' or '.join(paths)}."
            )
        return found
