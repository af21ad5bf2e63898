"""What a model family declares: where its encoder, projector, decoder and visual tokens are, and their grid."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
            found = getattr(found, "_orig_mod", found)  # below torch.compile
        if found is not None:
            return found
    return None


@dataclass(frozen=True)
class Tiling:
    """Pictures that follow each other in the prompt and are tiles of one image.

    Parameters:
        tiles: how many there are.
        whole: which of them shows the image as a whole, or None if none does; the others cut it up, in raster order.
        across: how many of those are side by side, or 0 if the prompt does not say; largest: as in `View`.
    """

    tiles: int
    whole: int | None = None
    across: int = 0
    largest: bool = False

    def views(self, grid: tuple[int, int]) -> tuple[View, ...]:
        """The image's grids, each tile's tokens being a `grid` (rows, columns)."""
        parts = [at for at in range(self.tiles) if at != self.whole]
        whole, cut = View(*grid), {"tiles": len(parts), "across": self.across, "largest": self.largest}
        number = {at: n for n, at in enumerate(parts)}
        return tuple(whole if at == self.whole else View(*grid, tile=number[at], **cut) for at in range(self.tiles))


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
class Tower:
    """A vision tower that runs all pictures as one packed sequence, and joins neighbouring patches behind its last block.

    Its blocks are told by `cu_seqlens` which patches attend to each other, and take `position_embeddings`.

    Parameters:
        cell: patches that are joined to one visual token; they follow each other in the sequence.
        windowed: blocks that attend within windows of a picture only.
        order: layouts -> LongTensor, for each place in the sequence the cell that is there, numbered over all pictures in
            raster order; None where that is the order.
        inner: dotted paths below the base model of lists of modules that join the patches of inner blocks in the same way.
    """

    cell: int
    windowed: frozenset[int] = frozenset()
    order: Callable[[list[Layout]], Tensor] | None = None
    inner: tuple[str, ...] = ()


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
        video_features: name of the base model's method that videos go through, where it is not `get_video_features`.
        runs: (base model, a prompt's token ids, (start, end) of each picture's placeholders in it, in order) -> the images
            that they are tiles of, for families whose tiles come as pictures of their own (`families/tiles.py` has the
            usual ones). Fed embeddings instead, equal tokens have equal, negative ids.
        tile_tokens: base model -> tokens of a picture, for families of `runs` whose features come a sample at a time.
        tiles_apart: features come a tile, or frame, at a time; `layouts` and `videos` say which are one image.
        convolutional: dotted paths of an encoder without such blocks as patches flow through; its FLOPs are those of its
            convolutions and linear layers.
        sealed: why no token can leave inside the vision encoder, or "" if it can.
        packed: base model -> its `Tower`, where patches can leave a sealed encoder after all, as long as what is left can
            be joined; needs `layouts`, and the `projector` has to give a row for each that was joined.
        attention: name of the attention module within an encoder block.
        positions: what positions the decoder's embedding allows.
        prepares_masks: whether the model makes its decoder's masks itself, though the decoder is set to attend in both
            directions.
        video_token: the configuration's name for the id of a video's placeholders; those of pictures may stand for both.
        injects: name of the decoder's method that adds features of the encoder's inner blocks to the visual tokens between
            decoder layers, called with hidden states [B, L, D], placeholders bool [B, L] and features [placeholders, D].
        norm, query, key: names of the norm, query and key projections within a decoder block and its `self_attn`.
        query_gate: whether the query projection makes a gate of each head too, behind its query.
        example: configuration values of a published model, for classes whose default configuration cannot be built.
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
    video_features: str = "get_video_features"
    runs: Callable[[nn.Module, list[int], list[tuple[int, int]]], list[Tiling]] | None = None
    tile_tokens: Callable[[nn.Module], int] | None = None
    tiles_apart: bool = False
    convolutional: tuple[str, ...] = ()
    sealed: str = ""
    packed: Callable[[nn.Module], Tower] | None = None
    attention: str = "self_attn"
    positions: tuple[str, ...] = ("original", "compact")
    prepares_masks: bool = False
    video_token: str = "video_token_id"
    injects: str = ""
    norm: str = "input_layernorm"
    query: str = "q_proj"
    key: str = "k_proj"
    query_gate: bool = False
    example: Mapping[str, Any] | None = field(default=None, hash=False)

    def sample_layout(self, base: nn.Module, features: Tensor) -> Layout:
        """The layout of a sample's pictures in one row, for families with `tile_tokens`."""
        return Layout(len(features), tiles=len(features) // self.tile_tokens(base))


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
    def attends(self) -> list[bool]:
        """Which decoder layers attend to the tokens before; the others (linear attention) carry a state in their place."""
        return [hasattr(layer, "self_attn") for layer in self.decoder_layers]

    @cached_property
    def encoder_layers(self) -> list[nn.Module]:
        # none are declared where an encoder has none that patches flow through one by one
        return list(self._must(self.family.encoder_layers, "vision encoder blocks")) if self.family.encoder_layers else []

    @cached_property
    def convolutions(self) -> list[nn.Module]:
        """Convolutions and linear layers of an encoder that has no such blocks."""
        paths = self.family.convolutional
        encoder = self._must(paths, "vision encoder") if paths else nn.Identity()
        return [module for module in encoder.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]

    @cached_property
    def video_layers(self) -> list[nn.Module]:
        """The blocks that only videos go through; none where they share the pictures' encoder."""
        paths = self.family.video_layers
        return list(self._must(paths, "video encoder blocks")) if paths else []

    @cached_property
    def projector(self) -> nn.Module:
        return self._must(self.family.projector, "projector")

    @cached_property
    def tower(self) -> Tower | None:
        """What is known of a packed vision tower, or None for others."""
        return None if self.family.packed is None else self.family.packed(self.base)

    @cached_property
    def inner_joins(self) -> list[nn.Module]:
        """What joins patches between the blocks of a packed vision tower."""
        paths = () if self.tower is None else self.tower.inner
        return [module for path in paths for module in self._must((path,), "modules that join patches of inner blocks")]

    @cached_property
    def rotary(self) -> nn.Module:
        return getattr(self.decoder, self.family.rotary)

    @cached_property
    def _rotates_by_type(self) -> bool:
        return "layer_type" in inspect.signature(self.rotary.forward).parameters

    def rotations(self, hidden: Tensor, positions: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """cos and sin of `positions` as decoder `layer` rotates by them; some decoders have a rotation per type of layer."""
        if self._rotates_by_type:
            return self.rotary(hidden, positions, self.rotation_type(layer))
        return self.rotary(hidden, position_ids=positions)

    def rotation_type(self, layer: int) -> str | None:
        """What the rotation of `layer` goes by, None where all are alike."""
        return self.decoder.config.layer_types[layer] if self._rotates_by_type else None

    @property
    def vision_type(self) -> str:
        return self.base.config.vision_config.model_type

    @property
    def image_token_id(self) -> int:
        return self.base.config.image_token_id

    def placeholder(self, modality: str) -> int | None:
        """The token id that holds the place of an "image" or "video", or None if the model takes none."""
        name = self.family.video_token if modality == "video" else f"{modality}_token_id"
        return getattr(self.base.config, name, None)

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

    def head(self, model: nn.Module) -> nn.Module | None:
        """The module of `model` that holds the base model and its LM head, or None if `model` is the base alone."""
        for module in model.modules():
            children = [getattr(child, "_orig_mod", child) for child in module.children()]
            if not hasattr(module, "_orig_mod") and any(child is self.base for child in children):
                return module
        return None

    def checkpoints(self) -> bool:
        """Whether decoder layers will run again in the backward pass (gradient checkpointing).

        Raises:
            UnsupportedError: where their hooks would run again with them.
        """
        layer = self.decoder_layers[0]
        if not (layer.training and getattr(layer, "gradient_checkpointing", False)):
            return False
        if type(layer).__call__ is not nn.Module.__call__:
            raise UnsupportedError(
                f"gradient checkpointing of {type(layer).__name__} in this transformers version runs a layer's hooks again in "
                f"the backward pass, where nothing would be pruned. Use transformers >= 5.24, call "
                f"model.gradient_checkpointing_disable(), or model.eval() if you are not training."
            )
        return torch.is_grad_enabled()

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
        # models without the setting feed the projector from the last block
        layer = getattr(self.base.config, "vision_feature_layer", -1) if layer is None else layer
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
        shown_alone = self.family.runs is None
        pixels = self.family.pixels(self.base, given, "image") if shown_alone else [None] * len(features)
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
