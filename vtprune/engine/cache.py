"""A cache layer that may hold fewer tokens than the user has fed it, and says so in the right places."""

from __future__ import annotations

import inspect
from functools import cache

from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, LinearAttentionCacheLayerMixin

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

    `get_seq_length` is logical (what the user has fed: positions and the slicing of input ids follow it);
    `get_mask_sizes` is physical (what attention sees). Rows of a batch may hold different counts: they are padded, and
    `valid` marks what is real.

    Attributes:
        logical: tokens fed so far, pruned ones included.
        valid: bool [B, physical], or None while every slot is real.
        shift: LongTensor [B], by how much compact numbering lies behind the logical one for tokens to come; or None.
        tail: trailing logical tokens that are all physically present, one slot each (what `crop` may remove).
    """

    def __init__(self) -> None:
        super().__init__()
        self.logical = 0
        self.valid: Tensor | None = None
        self.shift: Tensor | None = None
        self.tail = 0
        self._incoming: tuple[int, Tensor | None, bool] | None = None

    @classmethod
    def taking_over(cls, layer: DynamicLayer, valid: Tensor | None) -> PrunedLayer:
        """A layer with `layer`'s tensors; `valid` marks its real slots."""
        new = cls()
        if layer.is_initialized and layer.get_seq_length():
            new.lazy_initialization(layer.keys, layer.values)
            new.keys, new.values = layer.keys, layer.values
            new.logical = new.tail = layer.get_seq_length()
            new.valid = None if valid is None or bool(valid.all()) else valid
        return new

    @property
    def physical(self) -> int:
        return self.keys.shape[-2] if self.is_initialized and self.keys.numel() else 0

    def expect(self, logical: int, valid: Tensor | None, pruned: bool) -> None:
        """Announce the next `update`.

        Parameters:
            logical: tokens that the user fed.
            valid: bool [B, physical + new], which slots are real after it; None if all are.
            pruned: whether some of the fed tokens are missing.
        """
        self._incoming = (logical, valid, pruned)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if self._incoming is None:
            raise UnsupportedError(
                "this cache was filled by a pruned model and is being used by one that is not wrapped: per-layer lengths "
                "and positions would be wrong. Wrap the model again with the same strategy, or start a new cache."
            )
        (logical, self.valid, pruned), self._incoming = self._incoming, None
        self.logical += logical
        self.tail = 0 if pruned else self.tail + logical
        return super().update(key_states, value_states)

    def evict(self, slots: Tensor, valid: Tensor | None) -> None:
        """Keep the physical `slots` [B, P] (in order; `valid` marks the real ones) and release the rest."""
        index = slots[:, None, :, None]
        self.keys = self.keys.gather(2, index.expand(-1, self.keys.shape[1], -1, self.keys.shape[3]))
        self.values = self.values.gather(2, index.expand(-1, self.values.shape[1], -1, self.values.shape[3]))
        self.valid = valid
        self.tail = 0

    def get_seq_length(self) -> int:
        return self.logical

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.physical + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        # positive is transformers' older meaning: the length to keep
        remove = -tokens_to_remove if tokens_to_remove <= 0 else max(self.logical - tokens_to_remove, 0)
        if remove == 0:
            return
        if remove > self.tail:
            raise UnsupportedError(
                f"cannot remove the last {remove} tokens from a pruned cache: only the last {self.tail} came after the "
                f"pruned images, and what was dropped before cannot be restored. Start a new cache."
            )
        self.keys, self.values = self.keys[..., :-remove, :], self.values[..., :-remove, :]
        self.valid = None if self.valid is None else self.valid[:, :-remove]
        self.logical -= remove
        self.tail -= remove

    def reset(self) -> None:
        super().reset()
        self.logical, self.tail, self.valid, self.shift, self._incoming = 0, 0, None, None, None

    def _rows(self, pick) -> None:
        self.valid = None if self.valid is None else pick(self.valid)
        self.shift = None if self.shift is None else pick(self.shift)

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
    fine = (DynamicLayer, PrunedLayer)
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


def pruned_layer(cache: Cache, layer: int, past_valid: Tensor | None) -> PrunedLayer:
    """Layer `layer` of `cache` as a `PrunedLayer`, swapped in place if it was not one yet."""
    current = cache.layers[layer]
    if not isinstance(current, PrunedLayer):
        current = cache.layers[layer] = PrunedLayer.taking_over(current, past_valid)
    return current


def cache_bytes(cache: Cache | None) -> int:
    """Bytes of all keys and values held."""
    if cache is None:
        return 0
    layers = [layer for layer in cache.layers if not holds_state(layer)]
    tensors = [t for layer in layers for t in (layer.keys, layer.values) if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)
