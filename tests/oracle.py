"""The masking oracle: the full model in which a token that has left may no longer be attended to.

It runs the unwrapped model over the whole, unpadded sequence of one sample, without a cache. From the layer on that a
token left before, no other token attends to it (a 4-D mask per layer); positions are those that the pruned run gave.
All else about who attends to whom is read off the masks that the model itself hands to its layers: pictures whose tokens
attend to each other in both directions, sliding windows. What left where is read from the report, so the pruned run is
held to its own word and nothing is implemented twice.

Strategies that merge tokens or rearrange them: what the encoder then made of a picture, and the merged vectors where they
were made inside the decoder, are taken from the pruned run (golden vectors check those); the order is read from the
report, and everything else is held to the masks as ever.

Layers of linear attention know no masks. Where a model has such, tokens that have left are taken out of what a layer runs on:
the full model on the shorter sequence, at the same positions.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from models import IMAGE, VIDEO, vision_blocks
from transformers import AttentionInterface

from vtprune.families import locate
from vtprune.pruner import EncodeView
from vtprune.reporting import SampleReport


@dataclass
class Turn:
    """One prefill of a conversation: what it fed (prompt and the tokens generated after it), and its report."""

    prompt: list[int]
    generated: list[int]
    sample: SampleReport
    pixels: torch.Tensor | None
    extra: dict[str, torch.Tensor] = field(default_factory=dict)  # what else the model takes beside pixel_values
    whole: bool = False  # nothing left inside the encoder
    visual: tuple[int, ...] = (IMAGE,)  # placeholder token ids
    features: list[torch.Tensor] | None = None  # per image at full length, where the encoder merged
    merged: dict[int, tuple[set[int], torch.Tensor]] = field(default_factory=dict)  # layer: (tokens, its whole input)


def _additive(allowed: torch.Tensor) -> torch.Tensor:
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)


def _mask(model, allowed: torch.Tensor, part: str) -> torch.Tensor:
    config = model.config.text_config if part == "text" else model.config.vision_config
    return _additive(allowed) if config._attn_implementation == "eager" else allowed


class _Undo:
    def __init__(self, remove):
        self.remove = remove


def _window_index(visual, grids: torch.Tensor) -> torch.Tensor:
    if hasattr(visual, "get_window_index"):
        return torch.as_tensor(visual.get_window_index(grids)[0])
    from transformers.vision_utils import get_vision_window_index

    return get_vision_window_index(grids, visual.spatial_merge_size, visual.window_size, visual.patch_size)[0]


def _packed_masks(model, turns: list[Turn]):
    """Masks in a vision tower that runs all pictures as one sequence: a kernel in place of its own reads them. Videos, which
    are encoded after the pictures, have none."""
    visual, cell = model.model.visual, model.model.visual.spatial_merge_size**2
    samples = [turn.sample for turn in turns]
    order = None
    if hasattr(visual, "fullatt_block_indexes"):
        order = _window_index(visual, torch.cat([turn.extra["image_grid_thw"] for turn in turns]))
    masks, cursor = {}, {}
    for block, layer in enumerate(visual.blocks):
        alive = []
        for sample in samples:
            left = torch.ones(sample.visual_tokens, dtype=torch.bool)
            for at, index in sample.encoded:
                if at < block:
                    left = torch.zeros_like(left).index_fill(0, index, True)
            parts = left.split(sample.images)
            assert all(part.all() for part, frames in zip(parts, sample.frames, strict=True) if frames > 1)
            alive += [part for part, frames in zip(parts, sample.frames, strict=True) if frames == 1]
        cells = torch.cat(alive)
        masks[layer.attn] = (cells if order is None else cells[order]).repeat_interleave(cell)
        cursor[layer.attn] = 0

    def kernel(module, query, key, value, attention_mask, scaling=None, **kwargs):
        n, at = query.shape[2], cursor[module]
        cursor[module] += n
        allowed = masks[module][at : at + n] | torch.eye(n, dtype=torch.bool) if at < len(masks[module]) else None
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("oracle", kernel)
    before, visual.config._attn_implementation = visual.config._attn_implementation, "oracle"
    return [_Undo(lambda: setattr(visual.config, "_attn_implementation", before))]


def _own_mask(given: torch.Tensor | None, length: int) -> torch.Tensor:
    """bool [L, L], which key each query of one sample sees in the mask that the full model hands to a layer."""
    if given is None:
        return torch.ones(length, length, dtype=torch.bool).tril()
    assert given.shape == (1, 1, length, length)
    return given[0, 0] if given.dtype == torch.bool else given[0, 0] > torch.finfo(given.dtype).min / 2


def _window(model, layer: int) -> int | None:
    config = model.config.text_config
    kinds = getattr(config, "layer_types", None)
    return None if kinds is not None and kinds[layer] != "sliding_attention" else getattr(config, "sliding_window", None)


def _closer(own: torch.Tensor, window: int | None, gone: torch.Tensor) -> torch.Tensor:
    """`own` [L, L] of a layer whose `window` counts places in the numbering without `gone` (bool [L]).

    Tokens that left no longer take up places, so that earlier ones come into the window. Whatever else the model's mask
    shows (a picture's later tokens) it shows still.
    """
    if window is None:
        return own
    place = torch.arange(len(own))
    causal = place[None, :] <= place[:, None]
    compact = place - (gone.long().cumsum(0) - gone.long())
    was, now = (causal & (at[None, :] > at[:, None] - window) for at in (place, compact))
    return (own & ~was) | now


def _rotary(module, hidden: torch.Tensor, positions: torch.Tensor, layer) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions as `layer` rotates them; some families rotate each type of layer in its own way."""
    if "layer_type" in inspect.signature(module.forward).parameters:
        return module(hidden, positions, layer.self_attn.layer_type)
    return module(hidden, position_ids=positions)


def _encoder_hooks(model, turns: list[Turn]):
    """Masks in the vision encoder, one row per image of the conversation."""
    if hasattr(model.model, "visual"):
        return _packed_masks(model, turns)
    blocks = vision_blocks(model)
    special = 0 if "siglip" in model.config.vision_config.model_type else 1
    per_block = []
    for block in range(len(blocks)):
        rows = []
        for turn in turns:
            offset = 0
            for size in turn.sample.images:
                alive = torch.ones(special + size, dtype=torch.bool)
                for at, index in turn.sample.encoded:
                    if at < block:
                        mine = index[(index >= offset) & (index < offset + size)] - offset
                        alive = torch.zeros(special + size, dtype=torch.bool)
                        alive[:special] = True
                        alive[special + mine] = True
                rows.append(alive)
                offset += size
        per_block.append(torch.stack(rows))

    def hook(block):
        def before(module, args, kwargs):
            n = per_block[block].shape[1]
            allowed = per_block[block][:, None, None, :] | torch.eye(n, dtype=torch.bool)
            return (args[0], _mask(model, allowed, "vision"), *args[2:]), kwargs

        return before

    return [block.register_forward_pre_hook(hook(i), with_kwargs=True) for i, block in enumerate(blocks)]


def _places(turn: Turn, visual: torch.Tensor) -> list[dict[int, int]]:
    """Per layer, the place in the sequence of each token it computed on: survivors flow in the report's order."""
    where = {n: int(at) for n, at in enumerate(visual)}
    places = []
    for layer in turn.sample.layers:
        numbers = layer.tolist()
        taken = sorted(where[n] for n in numbers)
        where = dict(zip(numbers, taken, strict=True))
        places.append(where)
    return places


def token_types(ids: torch.Tensor) -> torch.Tensor:
    """Text 0, image 1, video 2, as Qwen's processor marks them."""
    return (ids == IMAGE).long() + 2 * (ids == VIDEO).long()


@contextmanager
def _features_of(model, turns: list[Turn]):
    """Have the model use the features that a pruned run made, where turns carry them."""
    given = [feature for turn in turns for feature in (turn.features or [])]
    if not given:
        yield
        return
    base = model.model
    original = base.get_image_features

    def get_image_features(*args, **kwargs):
        output = original(*args, **kwargs)
        assert len(output.pooler_output) == len(given)
        # one tensor for all has to stay one
        output.pooler_output = torch.stack(given) if isinstance(output.pooler_output, torch.Tensor) else given
        return output

    base.get_image_features = get_image_features
    try:
        yield
    finally:
        del base.get_image_features


def _removing_hooks(model, alive, origin, moves, injected):
    """Each layer runs on the tokens that are left; what the last one made goes back to the full length."""
    decoder = locate(model).decoder
    length = alive.shape[1]
    flowing = torch.arange(length)

    def spread(hidden):
        full = hidden.new_zeros(1, length, hidden.shape[-1])
        full[:, flowing] = hidden
        return full

    def hook(layer):
        def before(module, args, kwargs):
            nonlocal flowing
            found = spread(args[0])
            full = found.clone()
            for source, target in moves[layer]:
                full[0, target] = found[0, source]
            for at, vector in injected[layer]:
                full[0, at] = vector
            flowing = alive[layer].nonzero()[:, 0]
            rope = tuple(part[..., origin[layer][flowing], :] for part in kwargs["position_embeddings"])
            causal = torch.ones(1, 1, len(flowing), len(flowing), dtype=torch.bool).tril()
            mask = _mask(model, causal, "text") if hasattr(module, "self_attn") else None
            return (full[:, flowing], *args[1:]), {**kwargs, "attention_mask": mask, "position_embeddings": rope}

        return before

    def after(module, args, output):
        output.last_hidden_state = spread(output.last_hidden_state)

    handles = [one.register_forward_pre_hook(hook(at), with_kwargs=True) for at, one in enumerate(decoder.layers)]
    return [*handles, decoder.register_forward_hook(after)]


@contextmanager
def _features_follow(model, origin):
    """What the decoder adds to visual tokens after its first layers goes along with tokens that were moved."""
    decoder, name = locate(model).decoder, locate(model).family.injects
    if not name:
        yield
        return
    original, layer = getattr(decoder, name), 0

    def add(hidden, placeholders, features):
        nonlocal layer
        row = placeholders[0].long().cumsum(0) - 1
        features = features[row[origin[layer][placeholders[0]]]]
        layer += 1
        return original(hidden, placeholders, features)

    setattr(decoder, name, add)
    try:
        yield
    finally:
        delattr(decoder, name)


def oracle_logits(model, turns: list[Turn], compact: bool, types: Callable | None = None, grad: bool = False) -> torch.Tensor:
    """[sequence, vocabulary] logits of the full model under the masks that the pruned run implies.

    Parameters:
        types: token ids [1, L] -> further inputs of the model that tell modalities apart, as its processor makes them.
        grad: whether a loss of them can be traced back.
    """
    ids = [t for turn in turns for t in turn.prompt + turn.generated]
    decoder = locate(model).decoder
    length, depth = len(ids), len(decoder.layers)
    alive = torch.ones(depth, length, dtype=torch.bool)  # computed on in its own prefill
    late = torch.ones(depth, length, dtype=torch.bool)  # still in the cache afterwards
    after = torch.zeros(length, dtype=torch.long)  # first query that reads the cache a key was left in
    origin = torch.arange(length).repeat(depth, 1)  # the place that what a layer finds at a place had at first
    moves: list[list[tuple[int, int]]] = [[] for _ in range(depth)]
    injected: list[list[tuple[int, torch.Tensor]]] = [[] for _ in range(depth)]
    start = 0
    for turn in turns:
        visual = torch.tensor([i for i, t in enumerate(turn.prompt) if t in turn.visual], dtype=torch.long) + start
        if turn.sample.slots is not None and len(visual):
            visual = visual[turn.sample.slots]
        after[start:] = start + len(turn.prompt)
        before = {n: int(at) for n, at in enumerate(visual)}
        bare = start + torch.tensor([i for i, t in enumerate(turn.prompt) if t in turn.visual], dtype=torch.long)
        alive[:, bare[turn.sample.separators]] = late[:, bare[turn.sample.separators]] = False
        for layer, where in enumerate(_places(turn, visual) if len(visual) else []):
            alive[layer, visual] = False
            late[layer, visual] = False
            for n, at in where.items():
                alive[layer, at], origin[layer, at] = True, visual[n]
                if before[n] != at:
                    moves[layer].append((before[n], at))
            for n in (turn.sample.cached[layer] if turn.sample.cached else turn.sample.layers[layer]).tolist():
                late[layer, where[n]] = True
            if layer in turn.merged:
                tokens, hidden = turn.merged[layer]
                flowing = [at for at in range(start, start + len(turn.prompt)) if alive[layer, at]]
                rank = {at: i for i, at in enumerate(flowing)}
                injected[layer] += [(where[n], hidden[rank[where[n]]]) for n in tokens if n in where]
            before = where
        start += len(turn.prompt) + len(turn.generated)

    queries = torch.arange(length)[:, None]
    rotary = decoder.rotary_emb
    masked = not any(turn.features or turn.whole for turn in turns)
    handles = _encoder_hooks(model, turns) if masked else []

    def hook(layer):
        def before(module, args, kwargs):
            hidden = args[0].clone()
            if moves[layer]:
                sources, targets = map(list, zip(*moves[layer], strict=True))
                hidden[0, targets] = args[0][0, sources]
            for at, vector in injected[layer]:
                hidden[0, at] = vector
            readable = torch.where(queries >= after[None, :], late[layer][None, :], alive[layer][None, :])
            own = _own_mask(kwargs.get("attention_mask"), length)
            if compact:
                own = _closer(own, _window(model, layer), ~alive[layer])
            allowed = (own & readable) | torch.eye(length, dtype=torch.bool)
            # the full model's own positions, which moved tokens take along
            rope = tuple(part[..., origin[layer], :] for part in kwargs["position_embeddings"])
            if compact:
                gone = (~alive[layer]).long()
                rope = _rotary(rotary, hidden, (torch.arange(length) - (gone.cumsum(0) - gone))[None], module)
            mask = _mask(model, allowed[None, None], "text")
            return (hidden, *args[1:]), {**kwargs, "attention_mask": mask, "position_embeddings": rope}

        return before

    layers = decoder.layers
    if all(hasattr(layer, "self_attn") for layer in layers):
        handles += [layer.register_forward_pre_hook(hook(i), with_kwargs=True) for i, layer in enumerate(layers)]
    else:
        assert torch.equal(late, alive), "nothing can be evicted from a state"
        handles += _removing_hooks(model, alive, origin, moves, injected)
    pixels = [turn.pixels for turn in turns if turn.pixels is not None]
    try:
        with torch.set_grad_enabled(grad), _features_of(model, turns), _features_follow(model, origin):
            names = dict.fromkeys(name for turn in turns for name in turn.extra)
            extra = {name: torch.cat([turn.extra[name] for turn in turns if name in turn.extra]) for name in names}
            if pixels:
                extra["pixel_values"] = torch.cat(pixels)
            if types is not None:
                extra |= types(torch.tensor([ids]))
            elif "image_grid_thw" in extra or "video_grid_thw" in extra:
                extra["mm_token_type_ids"] = token_types(torch.tensor([ids]))
            out = model(input_ids=torch.tensor([ids]), **extra, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return out.logits[0]


def _splits_cells(view: EncodeView, keep) -> bool:
    """Whether patches of a cell are kept apart, so that what they are joined to is no token of the full model."""
    if view.cell == 1:
        return False
    marks = torch.zeros(*view.index.shape[:1], int(view.index.max()) + 1, dtype=torch.long)
    for row, kept in enumerate(keep.indices):
        marks[row, view.index[row, kept]] = 1
    return not bool(torch.isin(marks.unflatten(1, (-1, view.cell)).sum(-1), torch.tensor([0, view.cell])).all())


class Watch:
    """Takes down, during a pruned run, what strategies that merge leave to the oracle.

    Parameters:
        model: wrapped already, so that layer inputs are seen as vtprune hands them on; pruner: the strategy on it.
    """

    def __init__(self, model, pruner):
        self.remade = False  # whether the encoder made something of the picture that masks cannot tell
        self.features: list[torch.Tensor] = []
        self.hidden: dict[int, torch.Tensor] = {}
        self.targets: dict[int, set[int]] = {}
        self._model, self._undo = model, []
        base = model.model
        self.sealed, self.packed = bool(locate(model).family.sealed), locate(model).tower is not None
        self._wrapped = base.get_image_features

        @functools.wraps(self._wrapped)  # generate() reads its signature
        def get_image_features(*args, **kwargs):
            output = self._wrapped(*args, **kwargs)
            self.features += [feature.detach().clone() for feature in output.pooler_output]
            return output

        base.get_image_features = get_image_features
        self._undo.append(lambda: setattr(base, "get_image_features", self._wrapped))
        for at, layer in enumerate(locate(model).decoder.layers):
            self._undo.append(layer.register_forward_pre_hook(self._take(at)).remove)
        for stage in ("shrink", "encode", "select", "prefill"):
            strategy = pruner.part(stage)
            if strategy is not None:
                setattr(strategy, stage, self._ask(getattr(strategy, stage)))
                self._undo.append(functools.partial(delattr, strategy, stage))

    def close(self) -> None:
        for undo in reversed(self._undo):
            undo()

    def _take(self, layer: int):
        def before(module, args):
            self.hidden.setdefault(layer, args[0].detach().clone())

        return before

    def _ask(self, stage):
        def asked(view):
            keep = stage(view)
            inside = isinstance(view, EncodeView) and keep is not None
            if isinstance(keep, tuple) or (inside and (keep.hidden is not None or _splits_cells(view, keep))):
                self.remade = True
            elif keep is not None and keep.hidden is not None:
                layer = getattr(view, "layer", 0)
                for row, into in enumerate(keep.into):
                    # what enters the decoder is numbered per image here: take all of it
                    hit = into[into >= 0].unique() if layer else slice(None)
                    numbers = view.index[row, hit] if layer else range(10**4)
                    self.targets.setdefault(layer, set()).update(map(int, numbers))
            return keep

        return asked

    def turn(self, prompt: list[int], generated: list[int], sample: SampleReport, pixels, row: int, first: int) -> Turn:
        """The turn of sample `row`, whose first image is the run's image `first`."""
        turn = Turn(prompt, generated, sample, pixels)
        pictures = sample.frames.count(1)
        # nothing leaves inside a sealed encoder, or from videos; masks per tile would need the packing undone
        turn.whole = (self.sealed and not sample.encoded) or not pictures
        beside_videos = pictures < len(sample.images) and not self.packed
        if not turn.whole and (self.remade or sample.slots is not None or beside_videos):
            turn.features = self.features[first : first + pictures]
        for layer, tokens in self.targets.items():
            if sample.images:
                flowing = len(prompt) - sample.visual_tokens + len(sample.layers[layer])
                turn.merged[layer] = tokens, self.hidden[layer][row, -flowing:]
        return turn
