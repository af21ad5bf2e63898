"""A cache layer that may hold fewer tokens than the user has fed it, and says so in the right places."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache

from torch import Tensor, nn
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from vtprune.pruner import UnsupportedError

OLD_NAME = "past_key_values"


def cache_name(module: nn.Module) -> str:
    """What this model, and its outputs, call the cache: "cache", or "past_key_values" before transformers 5.24."""
    return _name_in(type(module))


@cache
def _name_in(model: type[nn.Module]) -> str:
    return "cache" if "cache" in inspect.signature(model.forward).parameters else OLD_NAME


class PrunedLayer(DynamicLayer):
    """A `DynamicLayer` whose physical length differs from its logical one.

    `get_seq_length` is logical (what the user has fed: positions and the slicing of input ids follow it), and so is
    `get_mask_sizes`: the masks that the model makes are those of the whole conversation, of which each layer is handed what
    belongs to the keys that it has left. Rows of a batch may hold different counts: they are padded, and `valid` marks what
    is real.

    Attributes:
        logical: tokens fed so far, pruned ones included.
        valid: bool [B, physical], or None while every slot is real.
        shift: LongTensor [B], by how much compact numbering lies behind the logical one for tokens to come; or None.
        tail: trailing logical tokens that are all physically present, one slot each (what `crop` may remove).
        window: of a layer that keeps only what its sliding window needs, its size; else None.
        slots: LongTensor [B, physical], the place of each key among all tokens fed; behind: the same, how far compact
            numbering lies behind it. None where the layer's attention has no window, or nothing was dropped.
        record_past: keep what the window has passed over until `crop` is called, as transformers' sliding layers do.
        spare: tokens that may be removed without the window reaching into what was released; None if nothing was yet.
    """

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.window, self.is_sliding = window, window is not None
        self.record_past = False
        self.slots: Tensor | None = None
        self.behind: Tensor | None = None
        self.spare: int | None = None
        self.logical = 0
        self.valid: Tensor | None = None
        self.shift: Tensor | None = None
        self.tail = 0
        self._incoming: tuple | None = None

    @classmethod
    def taking_over(cls, layer: DynamicLayer, valid: Tensor | None, slots: Tensor | None = None) -> PrunedLayer:
        """A layer with `layer`'s tensors; `valid` [B, physical] marks the real ones, `slots` says which they are."""
        new = cls(layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None)
        new.record_past = getattr(layer, "record_past", False)
        if layer.is_initialized and layer.get_seq_length():
            new.lazy_initialization(layer.keys, layer.values)
            new.keys, new.values = layer.keys, layer.values
            new.logical = new.tail = layer.get_seq_length()
            if new.physical < new.logical:
                new.spare = max(new.physical - (new.window - 1), 0) if new.record_past else 0
            new.valid, new.slots = valid, slots
        return new

    @property
    def physical(self) -> int:
        return self.keys.shape[-2] if self.is_initialized and self.keys.numel() else 0

    def expect(
        self,
        logical: int,
        valid: Tensor | None,
        pruned: bool,
        slots: Tensor | None = None,
        behind: Tensor | None = None,
        release: int = 0,
    ) -> None:
        """Announce the next `update`.

        Parameters:
            logical: tokens that the user fed.
            valid: bool [B, keys after it], which of them are real; None if all are.
            pruned: whether some of the fed tokens are missing.
            slots, behind: of the same keys.
            release: leading keys that are let go of, as the window has passed over them.
        """
        self._incoming = (logical, valid, pruned, slots, behind, release)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if self._incoming is None:
            raise UnsupportedError(
                "this cache was filled by a pruned model and is being used by one that is not wrapped: per-layer lengths "
                "and positions would be wrong. Wrap the model again with the same strategy, or start a new cache."
            )
        (logical, self.valid, pruned, self.slots, self.behind, release), self._incoming = self._incoming, None
        self.logical += logical
        self.tail = 0 if pruned else self.tail + logical
        self.spare = None if self.spare is None else self.spare + logical
        keys, values = super().update(key_states, value_states)
        if release:
            self.keys, self.values, self.spare = keys[:, :, release:], values[:, :, release:], 0
        return keys, values

    def evict(self, slots: Tensor, valid: Tensor | None) -> None:
        """Keep the physical `slots` [B, P] (in order; `valid` marks the real ones) and release the rest."""
        index = slots[:, None, :, None]
        self.keys = self.keys.gather(2, index.expand(-1, self.keys.shape[1], -1, self.keys.shape[3]))
        self.values = self.values.gather(2, index.expand(-1, self.values.shape[1], -1, self.values.shape[3]))
        self._rows(lambda t: t.gather(1, slots), "slots", "behind")
        self.valid = valid
        self.tail = 0

    def get_seq_length(self) -> int:
        return self.logical

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.logical + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        # positive is transformers' older meaning: the length to keep
        remove = -tokens_to_remove if tokens_to_remove <= 0 else max(self.logical - tokens_to_remove, 0)
        if remove == 0:
            self._restrict()
            return
        if self.spare is not None and remove > self.spare:
            raise UnsupportedError(
                f"cannot remove the last {remove} tokens from this cache: its sliding window of {self.window} tokens has moved "
                f"past what would come into it again, and only the last {self.spare} can be taken back. Start a new cache."
            )
        if remove > self.tail:
            raise UnsupportedError(
                f"cannot remove the last {remove} tokens from a pruned cache: only the last {self.tail} came after the "
                f"pruned images, and what was dropped before cannot be restored. Start a new cache."
            )
        self.keys, self.values = self.keys[..., :-remove, :], self.values[..., :-remove, :]
        self._rows(lambda t: t[:, :-remove], "valid", "slots", "behind")
        self.logical -= remove
        self.tail -= remove
        self.spare = None if self.spare is None else self.spare - remove
        self._restrict()

    def _restrict(self) -> None:
        """After a roll-back, let go of what had been kept for it."""
        over = 0 if self.window is None or self.valid is not None else self.physical - (self.window - 1)
        if self.record_past and over > 0:
            self.keys, self.values, self.spare = self.keys[:, :, over:], self.values[:, :, over:], 0
            self._rows(lambda t: t[:, over:], "slots", "behind")

    def activate_past_recording(self) -> None:
        self.record_past = True

    def reset(self) -> None:
        super().reset()
        self.logical, self.tail, self.valid, self.shift, self._incoming = 0, 0, None, None, None
        self.slots = self.behind = self.spare = None

    def _rows(self, pick: Callable[[Tensor], Tensor], *names: str) -> None:
        """Apply `pick` to what is known of each key, or to all that is known of each row."""
        for name in names or ("valid", "shift", "slots", "behind"):
            known = getattr(self, name)
            setattr(self, name, None if known is None else pick(known))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._rows(lambda t: t[indices])


def check_cache(cache: Cache, depth: int) -> None:
    """Raise UnsupportedError unless each layer of `cache` can be swapped for a `PrunedLayer`; fill a lazy one."""
    lazy = cache.layer_class_to_replicate
    if lazy is DynamicLayer and not getattr(cache, "offloading", False):
        while len(cache.layers) < depth:
            cache.layers.append(DynamicLayer())
    fine = (DynamicLayer, DynamicSlidingWindowLayer, PrunedLayer)
    kinds = sorted({type(layer).__name__ for layer in cache.layers if type(layer) not in fine and not holds_state(layer)})
    if kinds or len(cache.layers) < depth or getattr(cache, "offloading", False):
        what = f"offloaded {type(cache).__name__}" if getattr(cache, "offloading", False) else type(cache).__name__
        raise UnsupportedError(
            f"a {what} ({', '.join(kinds) or 'its layers'}) cannot hold a different number of tokens per layer and sample. "
            f"Pass a transformers.DynamicCache, or leave past_key_values and cache_implementation unset."
        )


def holds_state(layer: object) -> bool:
    """Whether this layer of a cache keeps one state for all tokens (linear attention), and no token of its own."""
    return isinstance(layer, LinearAttentionCacheLayerMixin) and not isinstance(layer, CacheLayerMixin)


def is_pruned(cache: Cache | None, layer: int | None = None) -> bool:
    """Whether `layer` of `cache` keeps its own books, or any does; after a pruned prefill all do that hold tokens."""
    if cache is None:
        return False
    layers = cache.layers if layer is None else cache.layers[layer : layer + 1]
    return any(isinstance(one, PrunedLayer) for one in layers)


def held_keys(layer: object) -> int:
    """How many keys a layer of a cache holds per row."""
    keys = getattr(layer, "keys", None)
    return keys.shape[-2] if isinstance(keys, Tensor) and keys.numel() else 0


def full_keys(layer: object, logical: int) -> int:
    """How many keys a layer would hold per row after `logical` tokens, were none of them dropped."""
    window = getattr(layer, "window", None) or getattr(layer, "sliding_window", None)
    return logical if window is None else min(logical, window - 1)


def pruned_layer(cache: Cache, layer: int, valid: Tensor | None, slots: Tensor | None = None) -> PrunedLayer:
    """Layer `layer` of `cache` as a `PrunedLayer`, swapped in place if it was not one yet."""
    current = cache.layers[layer]
    if not isinstance(current, PrunedLayer):
        current = cache.layers[layer] = PrunedLayer.taking_over(current, valid, slots)
    return current


def cache_bytes(cache: Cache | None) -> int:
    """Bytes of all keys and values held."""
    if cache is None:
        return 0
    layers = [layer for layer in cache.layers if not holds_state(layer)]
    tensors = [t for layer in layers for t in (layer.keys, layer.values) if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)
