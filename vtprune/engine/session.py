"""A strategy attached to a model: hooks with a symmetric attach and detach, and the state of the calls in flight.

Attached are: an instance override of `get_image_features`, hooks on the base model, the language model, its layers and
(for encoder-stage strategies) the vision blocks, and taps on the attention modules that rows are wanted from. The state
of a call is thread-local; what outlives a call sits in the cache or beside the image features. Nothing is global but
transformers' own registry of attention functions.
"""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from vtprune.engine.accounting import report_of
from vtprune.engine.attention import attach_tap
from vtprune.engine.decoding import Pass, Plan
from vtprune.engine.encoding import Encoding, Start, attach_layout, attach_records, new_clock
from vtprune.engine.identity import identify
from vtprune.engine.intake import PIXELS, Call, pixels_of, recognised
from vtprune.engine.packed import PackedEncoding
from vtprune.engine.stream import Stream
from vtprune.families import locate
from vtprune.measure.clock import NoClock
from vtprune.measure.flops import output_flops
from vtprune.pruner import BudgetError, Encoder, Pipeline, Pruner, ShrinkView, UnsupportedError, VtpruneError, budget_of
from vtprune.reporting import Report


class Session:
    """One strategy on one model.

    Parameters:
        model: any module that holds a model of a supported family.
        pruner: the strategy.
        positions: "original", "compact", or None for the strategy's own.
    Raises:
        UnsupportedError: if the model, or something the strategy needs of it, is not supported.
        BudgetError: if a field of the strategy does not fit the model's depth.
    """

    def __init__(self, model: nn.Module, pruner: Pruner, positions: str | None = None):
        if not isinstance(pruner, Pruner):
            raise TypeError(f"a strategy is a Pruner (see vtprune.available()), found {type(pruner).__name__}.")
        self.model, self.pruner = model, pruner
        self.site = locate(model)
        if positions is None:
            # where a family knows one numbering alone, no paper's choice can be had
            allowed = self.site.family.positions
            positions = pruner.positions if pruner.positions in allowed else allowed[0]
        if positions not in ("original", "compact"):
            raise BudgetError(f"positions={positions!r}: 'original' or 'compact'.")
        if positions not in self.site.family.positions:
            raise UnsupportedError(
                f"positions={positions!r} on {self.site.family.name}: a token's place in the picture is part of its position, "
                f"so survivors cannot be numbered anew. Leave positions to the default."
            )
        missing = pruner.requires - self.site.capabilities()
        if missing:
            raise UnsupportedError(
                f"{pruner.name} needs {', '.join(sorted(missing))} of the vision encoder, which {self.site.vision_type!r} "
                f"does not have. See vtprune.available() for strategies that do without."
            )
        pruner.check_model(identify(model))
        pruner.budgets()
        self.reads_frames = pruner.part("select") is not None and pruner.part("select").reads_frames
        depth = len(self.site.decoder_layers)
        part = {stage: pruner.part(stage) for stage in ("shrink", "encode", "prefill", "decode")}
        if part["shrink"]:
            self.site.check_resizable()
        self.encoder: Pruner | None = None
        tower = self.site.tower
        self.encode_needs, self.encode_depth = {}, 0
        if part["encode"]:
            sealed = self.site.family.sealed
            # of an encoder without blocks a strategy is only asked whether it would work inside it; any depth does
            blocks = len(self.site.encoder_layers) or 24
            self.encode_depth = blocks if sealed else self.site.feature_depth(None)
            # a class token that strategies cannot get at is none
            encoder = Encoder(self.encode_depth, blocks, not sealed and "cls" in self.site.capabilities())
            if tower is not None:
                encoder = replace(encoder, cell=tower.cell, windowed=tower.windowed, whole_cells=bool(tower.inner))
            self.encode_needs = dict(part["encode"].encode_needs(encoder))
            if sealed and self.encode_needs and not (tower is not None and part["encode"].cells):
                allows = "does not allow" if tower is None else "allows only where a strategy reckons with its cells of patches"
                raise UnsupportedError(
                    f"{part['encode'].name} works inside the vision encoder, which {self.site.family.name} {allows}: "
                    f"{sealed}. Use a strategy of another stage."
                )
            self._check_layers(self.encode_needs, 0, blocks, "encode")
            self._check_rows(part["encode"].name, encoder)
        if self.encode_needs:
            self.encoder = part["encode"]
        if (self.encode_needs and tower is None) or part["shrink"]:
            self.site.special_tokens()
        self.plan = Plan(
            pruner,
            positions,
            self.site,
            dict(part["prefill"].prefill_needs(depth)) if part["prefill"] else {},
            dict(part["decode"].decode_needs(depth)) if part["decode"] else {},
        )
        _ = self.plan.kinds  # refuses decoders whose masks are not known
        self._check_layers(self.plan.prefill, 1, depth, "prefill")
        if any(need.ahead and (need.values or need.queries is None) for need in self.plan.prefill.values()):
            raise VtpruneError(f"{part['prefill'].name}: Needs(ahead=True) gives rows and keys; it needs queries, not values.")
        self._check_layers(self.plan.decode, 0, depth, "decode")
        self._check_attention()
        self._local = threading.local()
        self._undo: list[Callable[[], None]] = []
        self._report: Report | None = None
        self._noted = False
        self._layouts: dict = {}

    @property
    def report(self) -> Report:
        """The report of the last call that had images.

        Raises:
            RuntimeError: if there was none yet.
        """
        if self._report is None:
            raise RuntimeError("no report yet: run generate() or forward() with at least one image first.")
        return self._report

    @property
    def attached(self) -> bool:
        return bool(self._undo)

    # ------------------------------------------------------------------ attach and detach

    def attach(self) -> None:
        """Install everything; on failure nothing is left installed."""
        if self._undo:
            return
        try:
            self._attach()
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Remove everything, in reverse; the model is what it was."""
        while self._undo:
            self._undo.pop()()

    def _attach(self) -> None:
        base, decoder = self.site.base, self.site.decoder
        self._hook(self.model.register_forward_pre_hook, self._before_model, with_kwargs=True)
        self._hook(self.model.register_forward_hook, self._after_model, always_call=True)
        head = self.site.head(self.model)
        if hasattr(head, "loss_function"):
            self._hook(head.register_forward_pre_hook, self._before_head, with_kwargs=True)
            self._override(head, "_loss_function", self._loss, head.loss_function)
            self._hook(head.register_forward_hook, self._after_head)
        if hasattr(head, "_get_candidate_generator"):
            self._override(head, "_get_candidate_generator", self._drafts)
        self._override(base, "get_image_features", self._encode)
        if self.site.family.videos is not None and self.site.family.video_features != "get_image_features":
            self._override(base, self.site.family.video_features, self._encode_video)
        if self.site.family.tiles is not None:
            self._override(base, "pack_image_features", self._pack)
        if self.reads_frames and self.site.family.pooling:
            pooling = getattr(base, self.site.family.pooling)
            owner, name = (pooling, "forward") if isinstance(pooling, nn.Module) else (base, self.site.family.pooling)
            self._override(owner, name, self._pool)
        self._hook(base.register_forward_pre_hook, self._before_base, with_kwargs=True)
        self._hook(base.register_forward_hook, self._after_base, always_call=True)
        self._hook(decoder.register_forward_pre_hook, self._before_decoder, with_kwargs=True)
        self._hook(decoder.register_forward_hook, self._after_decoder, always_call=True)
        tapped = {layer - 1 for layer, need in self.plan.prefill.items() if need.queries and not need.ahead}
        tapped |= {layer for layer, need in self.plan.decode.items() if need.queries}
        if self.site.family.injects:
            self._override(decoder, self.site.family.injects, self._inject)
        for at, layer in enumerate(self.site.decoder_layers):
            self._hook(layer.register_forward_pre_hook, functools.partial(self._before_layer, at), with_kwargs=True)
            if at in tapped:
                self._undo.append(attach_tap(layer.self_attn, functools.partial(self._decoder_requests, at)))
        for at, block in enumerate(self.site.video_layers):
            self._hook(block.register_forward_pre_hook, functools.partial(self._before_block, at), with_kwargs=True)
        if self.site.tower is not None:
            # right behind the blocks, whatever else the model does with patches before it joins them
            self._hook(self.site.encoder_layers[-1].register_forward_hook, self._before_joining)
            self._hook(self.site.projector.register_forward_hook, self._after_joining)
        for module in self.site.inner_joins:
            self._hook(module.register_forward_pre_hook, self._before_inner)
            self._hook(module.register_forward_hook, self._after_joining)
        for module in self.site.convolutions:
            self._hook(module.register_forward_hook, self._count_convolution)
        for at, block in enumerate(self.site.encoder_layers):
            if self.site.family.sealed and self.site.tower is None:
                self._hook(block.register_forward_pre_hook, self._count_block, with_kwargs=True)
                continue
            self._hook(block.register_forward_pre_hook, functools.partial(self._before_block, at), with_kwargs=True)
            need = self.encode_needs.get(at)
            if need is not None:
                # before transformers' own recording hooks, so that recorded features are the shortened ones
                self._hook(block.register_forward_hook, functools.partial(self._after_block, at), prepend=True)
                if need.queries is not None:
                    attention = getattr(block, self.site.family.attention)
                    self._undo.append(attach_tap(attention, functools.partial(self._encoder_requests, at)))

    # what is put on the model is bound methods and small objects, no closures: copies of the model take them along
    def _hook(self, register: Callable, hook: Callable, **options) -> None:
        self._undo.append(register(functools.partial(self._unless_aside, hook), **options).remove)

    def _unless_aside(self, hook: Callable, *args, **kwargs):
        return None if self._is_aside else hook(*args, **kwargs)

    @property
    def _is_aside(self) -> bool:
        return getattr(self._local, "aside", False)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Calls of the model made in this thread run as if it were not wrapped."""
        self._local.aside = True
        try:
            yield
        finally:
            self._local.aside = False

    def _override(self, base: nn.Module, name: str, replacement: Callable, original: Callable | None = None) -> None:
        """An instance attribute in front of the class's method, which generate() and forward() both look up there."""
        original, before = original or getattr(base, name), base.__dict__.get(name)
        setattr(base, name, _Override(self, original, replacement))
        self._undo.append(
            functools.partial(delattr, base, name) if before is None else functools.partial(setattr, base, name, before)
        )

    def __getstate__(self) -> dict:
        # a copy of the model has this strategy, and calls of its own
        return {**vars(self), "_local": None, "_report": None}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, _local=threading.local())

    def _pack(self, original: Callable, args: tuple, kwargs: dict):
        """The model's packing of tiles, watched while a wrapped encoder runs."""
        encoding = getattr(self._local, "encoding", None)
        if encoding is None:
            return original(*args, **kwargs)
        return encoding.pack(original, dict(inspect.signature(original).bind(*args, **kwargs).arguments))

    def _pool(self, original: Callable, args: tuple, kwargs: dict):
        """The model's pooling of a video's frames, watched for strategies that read frames."""
        encoding = getattr(self._local, "encoding", None)
        if encoding is not None:
            encoding.unpooled = next(iter([*args, *kwargs.values()]))
        return original(*args, **kwargs)

    def _arguments(self, module: str, args: tuple, kwargs: dict) -> dict:
        """All arguments of a forward call by name."""
        if not args:
            return dict(kwargs)
        bound = inspect.signature(getattr(self.site, module).forward).bind_partial(*args, **kwargs).arguments
        return {name: value for name, value in bound.items() if name != "kwargs"} | bound.get("kwargs", {})

    @staticmethod
    def _check_layers(needs, low: int, high: int, stage: str) -> None:
        outside = [layer for layer in needs if not low <= layer < high]
        if outside:
            raise BudgetError(f"the {stage} stage was asked to run at layers {outside}; this model has {low} .. {high - 1}.")

    def _check_rows(self, name: str, encoder: Encoder) -> None:
        """Refuse rows that blocks of this encoder do not have.

        Raises:
            VtpruneError: naming the strategy, whose declaration does not fit the encoder that it was shown.
        """
        for block, need in self.encode_needs.items():
            if need.queries == "cls" and not encoder.cls:
                raise VtpruneError(f"{name} asked for rows of the class token, and this vision encoder has none.")
            if need.queries is not None and block in encoder.windowed:
                raise VtpruneError(f"{name} asked for rows of block {block}, which attends within windows only.")

    def _check_attention(self) -> None:
        """Refuse what only layers with attention give, asked of others (linear attention).

        Raises:
            UnsupportedError: naming the layers that have it.
        """
        attends, family, plan = self.site.attends, self.site.family.name, self.plan
        if all(attends):
            return
        those = [layer for layer, attention in enumerate(attends) if attention]
        held = [layer for layer in plan.decode if not attends[layer]]
        if held:
            strategy = self.pruner.part("decode")
            others = [stage for stage in strategy.stages() if stage != "decode"]
            without = f"leave that stage out (only({', '.join(map(repr, others))})), or " if others else ""
            raise UnsupportedError(
                f"{strategy.name} evicts tokens from the cache of decoder layers {held}, but in {family} these are of linear "
                f"attention: they fold all tokens into one state, from which none can be taken. Layers with keys and values: "
                f"{those}. To do without, {without}use a strategy of another stage."
            )
        read = {layer: layer if need.ahead else layer - 1 for layer, need in plan.prefill.items() if need.queries is not None}
        blind = [layer for layer, rows in read.items() if not attends[rows]]
        if blind:
            strategy = self.pruner.part("prefill")
            ahead = any(plan.prefill[layer].ahead for layer in blind)
            cuts = [layer for layer in (those if ahead else [layer + 1 for layer in those]) if 0 < layer < len(attends)]
            raise UnsupportedError(
                f"{strategy.name} reads the attention of decoder layers {[read[layer] for layer in blind]}, but in {family} "
                f"these are of linear attention and have none. Have it cut before layers of {cuts} instead, where its settings "
                f"allow, or use a strategy that reads no attention."
            )

    # ------------------------------------------------------------------ the vision encoder

    def _encode(self, original: Callable, args: tuple, kwargs: dict):
        """`get_image_features` with pruning; the output keeps its type and full length, dropped rows are zero."""
        if getattr(self._local, "encoding", None) is not None:
            return original(*args, **kwargs)  # a video's frames, in models that encode them as pictures
        bound = inspect.signature(original).bind_partial(*args, **kwargs)
        given = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        call = getattr(self._local, "call", None)
        if call is not None and "video" in call.pixels and given.get("pixel_values") is call.pixels["video"]:
            return self._encode_video(original, args, kwargs)  # the model has one method for both
        pruner = self.encoder
        tower, depth = self.site.tower, self.encode_depth
        if pruner is not None and tower is None and self.site.feature_depth(given.get("vision_feature_layer")) != depth:
            raise UnsupportedError(
                f"vision_feature_layer={given['vision_feature_layer']} differs from the model's configuration, which the "
                f"strategy was prepared for. Set it in the config before wrapping."
            )
        clock = call.clock if call is not None else new_clock(self.site.base)
        start = None
        if self.pruner.part("shrink") is not None:
            with clock.span("selection"):
                given, start, notes = self._shrink(given)
            args, kwargs = (), {name: value for name, value in given.items() if name != "kwargs"}
        common = (pruner, self.encode_needs, depth)
        if tower is not None:
            layouts = self.site.family.layouts(self.site.base, given)
            encoding: Encoding = PackedEncoding(*common, self._encoder_kernel, clock, tower, layouts)
        else:
            encoding = Encoding(
                *common,
                self.site.special_tokens() if pruner is not None or start is not None else 0,
                self._encoder_kernel,
                self.site.grid,
                clock,
                start,
                None if self.site.family.tiles is None else self.site.family.tiles(self.site.base, given),
                self._layouts,
            )
        if start is not None:
            encoding.notes.extend(notes)
        return self._encoded("image", encoding, call, original, args, kwargs, given)

    def _encode_video(self, original: Callable, args: tuple, kwargs: dict):
        """`get_video_features`, counted and recorded; frames are pooled or merged, so no token leaves inside the encoder."""
        given = dict(inspect.signature(original).bind_partial(*args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        notes = []
        within = self.encoder or self.pruner.part("shrink")
        if within is not None:
            if not set(within.stages()) & {"select", "prefill", "decode"}:
                raise UnsupportedError(
                    f"{within.name} works inside the vision encoder, but a video's frames are pooled or merged after it, or go "
                    f"through another one, so its patches are not what the decoder sees. Use a strategy of another stage for "
                    f"videos."
                )
            if within.budgets() is not None:
                raise BudgetError(
                    f"{within.describe()}: a strategy inside the vision encoder sees no videos, so it cannot tell which image "
                    f"of the prompt a budget is for. Give one number for all of them."
                )
            notes.append(f"{within.name}: its part inside the vision encoder sees pictures only, no videos.")
        call = getattr(self._local, "call", None)
        clock = call.clock if call is not None else new_clock(self.site.base)
        if self.site.tower is not None:
            encoding: Encoding = PackedEncoding(None, {}, 0, self._encoder_kernel, clock, self.site.tower, [])
        else:
            encoding = Encoding(None, {}, 0, 0, self._encoder_kernel, self.site.grid, clock)
        encoding.notes.extend(notes)
        return self._encoded("video", encoding, call, original, args, kwargs, given)

    def _encoded(
        self, modality: str, encoding: Encoding, call: Call | None, original: Callable, args: tuple, kwargs: dict, given: dict
    ):
        """Run the encoder under the eyes of `encoding`, and put a record on the features of each picture or video."""
        family, clock, pixels = self.site.family, encoding.clock, pixels_of(modality, given)
        as_tuple = kwargs.pop("return_dict", True) is False
        self._local.encoding = encoding
        try:
            with clock.span("prefill" if call is None else "encode"):
                output = original(*args, **kwargs, return_dict=True)
        finally:
            self._local.encoding = None
        with clock.span("selection"):
            pooled = output.pooler_output
            if modality == "video":
                encoding.layouts = family.videos(self.site.base, given, pooled)
                pixels = given.get("pixel_values") if pixels is None else pixels  # its name before transformers 5.18
            elif family.layouts is not None:
                encoding.layouts = family.layouts(self.site.base, given)
            features = list(pooled)
            if modality == "image" and isinstance(pooled, torch.Tensor):
                features = [feature.flatten(0, -2) for feature in features]  # Aya Vision's are grids before transformers 5.17
            if modality == "image" and family.tile_tokens is not None:
                encoding.layouts = [family.sample_layout(self.site.base, feature) for feature in features]
            if family.tiles_apart or (modality == "video" and len(features) != len(encoding.layouts)):
                # each tile, or frame, came as a row of its own
                features = list(pooled.reshape(len(encoding.layouts), -1, pooled.shape[-1]))
            rows = attach_records(features, encoding, self)
            if not isinstance(pooled, torch.Tensor):
                output.pooler_output = rows
            else:
                if any(row is not feature for row, feature in zip(rows, features, strict=True)):
                    output.pooler_output = pooled = torch.stack(rows)  # one tensor for all has to stay one
                pooled._vtprune_rows = rows
            if self.reads_frames:
                layouts = [row._vtprune.layout for row in rows]
                if modality == "video":
                    for row, frames in zip(rows, self.site.frames(given, encoding.unpooled, features, layouts), strict=True):
                        row._vtprune.frames = frames
                else:
                    for row, picture in zip(rows, self.site.pictures(given, rows, layouts), strict=True):
                        row._vtprune.picture = picture
        self._hand_on(modality, call, pixels, rows)
        return output.to_tuple() if as_tuple else output

    def _hand_on(self, modality: str, call: Call | None, pixels: torch.Tensor | None, features: list[torch.Tensor]) -> None:
        """Give features to the call that they were computed in, or remember that they were computed ahead of one."""
        if call is None:
            known = [ref for ref in getattr(self._local, "fresh", ()) if ref() is not None]
            self._local.fresh = [*known, *(weakref.ref(f) for f in features)]
            self._local.ahead = {**getattr(self._local, "ahead", {}), modality: features}
            return
        call.features[modality] = features
        self._hand_on_decisions(modality, pixels, features)

    def _shrink(self, given: dict) -> tuple[dict, Start | None, list[str]]:
        """The arguments of `get_image_features` with the pictures scaled down as the strategy says."""
        pixels, strategy = pixels_of("image", given), self.pruner.part("shrink")
        patch = self.site.patch
        if strategy.budgets() not in (None, 1):
            raise BudgetError(f"{strategy.describe()}: pictures are scaled down to one size. Give one number for all of them.")
        full = (pixels.shape[-2] // patch, pixels.shape[-1] // patch)
        count = full[0] * full[1]
        index = torch.arange(count, device=pixels.device).expand(pixels.shape[0], -1)
        view = ShrinkView(index=index, sizes=(count,), carry={}, grid=full)
        grid = strategy.shrink(view)
        if grid is None or tuple(grid) == full:
            return given, None, view.notes
        if not (1 <= grid[0] <= full[0] and 1 <= grid[1] <= full[1]):
            raise VtpruneError(f"{strategy.name}.shrink returned the grid {grid}; the picture has {full}.")
        small = torch.nn.functional.interpolate(
            pixels.float(), size=(grid[0] * patch, grid[1] * patch), mode="bicubic", antialias=True, align_corners=False
        )
        name = next(name for name in PIXELS["image"] if given.get(name) is pixels)
        given = {**given, name: small.to(pixels.dtype), "interpolate_pos_encoding": True}
        return given, Start.of(full, grid, pixels.device), view.notes

    def _hand_on_decisions(self, modality: str, pixels: torch.Tensor | None, features: list[torch.Tensor]) -> None:
        """Runs without a cache that feed the very same pixels at each step (transformers < 5.18 does) decide once."""
        if pixels is None:
            return
        seen = self._local.__dict__.setdefault("pixels", {})
        last, before = seen.get(modality, (None, []))
        if last is not None and last() is pixels and len(before) == len(features):
            for replays, feature in zip(before, features, strict=True):
                feature._vtprune.replays = replays
        seen[modality] = (weakref.ref(pixels), [f._vtprune.replays for f in features])

    def _encoder_kernel(self) -> str:
        config = getattr(self.site.encoder_layers[0], self.site.family.attention).config
        return getattr(config, "kernel", config._attn_implementation)

    def _count_block(self, module, args, kwargs) -> None:
        encoding = getattr(self._local, "encoding", None)
        if encoding is not None:
            hidden = args[0] if args else kwargs["hidden_states"]
            # pictures in rows of their own, or one after the other in one sequence
            encoding.count([hidden.shape[1]] * hidden.shape[0] if hidden.ndim == 3 else [hidden.shape[0]])

    def _count_convolution(self, module, args, output) -> None:
        encoding = getattr(self._local, "encoding", None)
        if encoding is not None:
            encoding.flops += output_flops(module, output)

    def _before_block(self, block: int, module, args, kwargs):
        encoding = getattr(self._local, "encoding", None)
        return None if encoding is None else encoding.before_block(block, args, kwargs)

    def _after_block(self, block: int, module, args, output):
        encoding = getattr(self._local, "encoding", None)
        return None if encoding is None else encoding.after_block(block, output)

    def _before_joining(self, module, args, output) -> None:
        encoding = getattr(self._local, "encoding", None)
        if encoding is not None:
            encoding.join()

    def _before_inner(self, module, args) -> None:
        encoding = getattr(self._local, "encoding", None)
        if encoding is not None:
            encoding.check_cells()

    def _after_joining(self, module, args, output):
        encoding = getattr(self._local, "encoding", None)
        return None if encoding is None else encoding.spread(output)

    def _encoder_requests(self, block: int):
        encoding = getattr(self._local, "encoding", None)
        return () if encoding is None or self._is_aside else encoding.requests(block)

    # ------------------------------------------------------------------ the whole model

    def _before_model(self, module, args, kwargs) -> None:
        self._local.whole, self._local.done = True, None

    def _after_model(self, module, args, output) -> None:
        self._local.whole = False
        self._settle(output)

    # ------------------------------------------------------------------ assisted decoding

    def _drafts(self, original: Callable, args: tuple, kwargs: dict):
        """The source of drafts, unheard at first: assisted decoding feeds the first draft together with the prompt, of which
        strategies would take it for a part, and what of it is rejected could not be taken back.

        Raises:
            UnsupportedError: for sources that read hidden states.
        """
        source = original(*args, **kwargs)
        if getattr(source, "requires_model_outputs", False):
            raise UnsupportedError(
                f"{type(source).__name__}: its drafts are made from the model's hidden states, some of which have left a "
                f"pruned model. Use an assistant_model or prompt_lookup_num_tokens, or unwrap the model."
            )

        def unheard(input_ids: torch.Tensor, *more, **options) -> tuple[torch.Tensor, None]:
            del source.get_candidates
            source.get_candidates(input_ids, *more, **options)  # an assistant reads the prompt now
            return input_ids, None

        source.get_candidates = unheard
        return source

    # ------------------------------------------------------------------ the loss

    def _before_head(self, module, args, kwargs) -> None:
        self._local.labelled, self._local.left = kwargs.get("labels") is not None, None

    def _loss(self, original: Callable, args: tuple, kwargs: dict):
        """The model's own loss, over the kept sequence."""
        left: Stream | None = getattr(self._local, "left", None)
        self._local.labelled = False
        if left is None:
            return original(*args, **kwargs)
        if len(args) > 1:
            args = (args[0], left.followed(args[1]), *args[2:])
        elif kwargs.get("labels") is not None:
            kwargs = {**kwargs, "labels": left.followed(kwargs["labels"])}
        if kwargs.get("shift_labels") is not None:  # shifted by the user: one place ahead of labels
            ahead = torch.nn.functional.pad(kwargs["shift_labels"], (1, 0), value=-100)[:, :-1]
            kwargs = {
                **kwargs,
                "shift_labels": torch.nn.functional.pad(left.followed(ahead), (0, 1), value=-100)[:, 1:].contiguous(),
            }
        return original(*args, **kwargs)

    def _after_head(self, module, args, output) -> None:
        labelled, left, self._local.left = getattr(self._local, "labelled", False), getattr(self._local, "left", None), None
        if labelled and left is not None:
            raise UnsupportedError(
                f"{type(module).__name__} does not take its loss from its loss_function (or that was replaced after wrapping), "
                f"so labels cannot follow the tokens that were kept. Compute the loss from the returned logits, or unwrap the "
                f"model for training."
            )

    # ------------------------------------------------------------------ the base model

    def _before_base(self, module, args, kwargs) -> None:
        self._local.call = None
        given = self._arguments("base", args, kwargs)
        call = Call.read(self.site, module, given)
        ahead, self._local.ahead = getattr(self._local, "ahead", {}), {}
        for modality, rows in call.features.items():
            found = call.features[modality] = recognised(rows, ahead.get(modality, []))
            if found is not rows:
                given["mm_encoder_outputs"][modality].pooler_output._vtprune_rows = found  # for steps without a cache
        features = [feature for rows in call.features.values() for feature in rows]
        call.clock = clock = NoClock()
        if features:
            call.clock = clock = self._clock_of(features)
        elif call.masks:
            call.clock = clock = new_clock(self.site.base)
        self._local.call = call
        call.mark = clock.start("prefill")

    def _clock_of(self, features):
        """Where the time that went into these features was counted.

        Raises:
            UnsupportedError: for features that this session cannot answer for.
        """
        records = [getattr(f, "_vtprune", None) for f in features]
        unknown = None in records
        for at, record in enumerate(records):
            if record is not None and record.owner is not self:
                # another strategy's: whole features are as good as new, shortened ones hold someone else's choice
                if len(record.item.index) < record.size:
                    raise UnsupportedError(
                        "these image features were computed while another strategy was pruning the vision encoder. Compute "
                        "them again, with pixel_values or get_image_features of the model as it is wrapped now."
                    )
                del features[at]._vtprune
                records[at] = None
        fresh, self._local.fresh = getattr(self._local, "fresh", ()), ()
        if None not in records:
            return records[0].encoding.clock.fork()
        if unknown and any(ref() is not None for ref in fresh):
            raise UnsupportedError(
                "image features were cut up or copied on their way to the decoder (chunked prefill does that), so a token's "
                "number in its image is lost. Leave prefill_chunk_size unset, or unwrap the model."
            )
        family = self.site.family
        if family.tiles_apart:
            raise UnsupportedError(
                f"{family.name}'s features come tile by tile, and which tiles are one image cannot be told from them. Pass "
                f"pixels, or compute the features with get_image_features of the wrapped model right before the call."
            )
        for feature, record in zip(features, records, strict=True):
            if record is None and family.tile_tokens is not None:
                attach_layout(feature, family.sample_layout(self.site.base, feature), self)
        within = self.encoder or self.pruner.part("shrink")
        if within is not None:
            raise UnsupportedError(
                f"{within.name} works inside the vision encoder, but these image features were computed "
                f"elsewhere. Pass pixel_values, or compute them with get_image_features of the wrapped model."
            )
        return new_clock(self.site.base)

    def _after_base(self, module, args, output) -> None:
        # runs after an exception as well
        self._local.call = None
        if not getattr(self._local, "whole", False):
            self._settle(output)

    # ------------------------------------------------------------------ the language model

    def _before_decoder(self, module, args, kwargs):
        self._local.running = None
        call = getattr(self._local, "call", None)
        if call is not None and any(call.features.values()):
            running = Pass(
                self.plan, call.clock, call.input_ids, *call.in_order(), aside=self._aside, fed_mask=call.attention_mask
            )
        else:
            running = Pass(self.plan, NoClock(), fed_mask=... if call is None else call.attention_mask)
        self._local.running = running
        changed = running.begin(self._arguments("decoder", args, kwargs))
        return None if changed is None else ((), changed)

    def _inject(self, original: Callable, args: tuple, kwargs: dict) -> torch.Tensor:
        running = getattr(self._local, "running", None)
        if running is None:
            return original(*args, **kwargs)
        bound = inspect.signature(original).bind(*args, **kwargs)
        return running.inject(original, *bound.args)

    def _before_layer(self, layer: int, module, args, kwargs):
        running = getattr(self._local, "running", None)
        return None if running is None else running.before_layer(layer, args, kwargs)

    def _decoder_requests(self, layer: int):
        running = getattr(self._local, "running", None)
        return () if running is None or self._is_aside else running.requests(layer)

    def _after_decoder(self, module, args, output):
        running, self._local.running = getattr(self._local, "running", None), None
        if running is None or output is None:  # None: the call raised
            return None
        changed = running.finish(output)
        self._local.left = running.stream if running.active and running.stream.pruned else None
        if not running.items:
            return changed
        call = getattr(self._local, "call", None)
        if call is not None and call.mark is not None:
            call.clock.stop(call.mark)
        running.remember()
        self._local.done = running
        return changed

    def _settle(self, output) -> None:
        """Read the checks and write the report once all of the model has been launched, so that a GPU does not wait for it."""
        done, self._local.done = getattr(self._local, "done", None), None
        if done is None or output is None:  # None: the call raised
            return
        for doubts in [*dict.fromkeys(r.encoding.doubts for r in done.records if r.encoding is not None), done.doubts]:
            doubts.settle()
        report = report_of(done)
        report.notes = [*dict.fromkeys([*report.notes, *self._notes(report)])]
        self._report = report

    def _notes(self, report: Report) -> list[str]:
        notes = []
        parts = self.pruner.parts if isinstance(self.pruner, Pipeline) else [self.pruner]
        for part in parts:
            asked = [(n, budget_of(part.keep, image)) for s in report.samples for image, n in enumerate(s.images)]
            above = [(n, keep) for n, keep in asked if isinstance(keep, int) and keep > n]
            if above:
                size, keep = min(above)
                notes.append(f"{part.name}: keep={keep} exceeds an image's {size} visual tokens; all of them are kept.")
        if notes and not self._noted:
            self._noted = True
            warnings.warn("; ".join(notes), stacklevel=2)
        return notes


class _Override:
    """Stands in front of a method of one model instance, with its signature."""

    def __init__(self, session: Session, original: Callable, replacement: Callable):
        # annotations stay behind, as some cannot be pickled; the signature is found below __wrapped__
        functools.update_wrapper(self, original, ("__name__", "__doc__"), ())
        self._session, self._original, self._replacement = session, original, replacement

    def __call__(self, *args, **kwargs):
        if self._session._is_aside:
            return self._original(*args, **kwargs)
        return self._replacement(self._original, args, kwargs)
