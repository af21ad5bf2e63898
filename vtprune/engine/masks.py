"""Who sees whom in each decoder layer, before and after tokens have left.

Knows no family. A layer's sliding window is read off the decoder's config, as transformers' own masks and caches read it.
Whatever else a model lets its tokens see (a picture's tokens each other, a whole prompt both ways) is read off the masks
that it hands to its language model: what these show beyond the causal window stays as it is between the tokens that are
left. So the masks of shortened layers follow the model and its version, not a second account of it.

Places. A window counts slots of the fed sequence, as the unpruned model does (not positions with three axes); compact
numbering takes what was dropped before a token out of the count, so that its window reaches as far as in a prompt that
never had those tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vtprune.engine.stream import Stream
from vtprune.pruner import UnsupportedError

# "linear_attention" has no mask; its layers say for themselves what they cannot do
SERVED = ("full_attention", "sliding_attention", "linear_attention")


@dataclass(frozen=True)
class Kinds:
    """What a decoder's config says of its layers' masks.

    Parameters:
        names: each layer's type, as its mask is named where a model makes several; None where all are of one.
        windows: each layer's sliding window, or None.
        causal: whether layers that are handed no mask attend causally; in both directions otherwise (under sdpa).
    """

    names: tuple[str | None, ...]
    windows: tuple[int | None, ...]
    causal: bool = True

    @classmethod
    def of(cls, config: Any, depth: int, prepared: bool = False) -> Kinds:
        """The kinds of `depth` layers.

        Parameters:
            prepared: whether the masks of a decoder that is set to attend in both directions are made by the model around it.
        Raises:
            UnsupportedError: for attention that cannot be cut (chunks; in both directions throughout).
        """
        names, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
        chunk = getattr(config, "attention_chunk_size", None)
        if names is None:
            names = ("chunked_attention" if chunk is not None and window is None else None,) * depth
        odd = sorted({name for name in names[:depth] if name is not None and name not in SERVED})
        if odd:
            raise UnsupportedError(
                f"the decoder ({getattr(config, 'model_type', 'unknown')}) has layers of {', '.join(odd)}: which tokens see "
                f"each other in them is not known here, so none can be dropped. Served are full attention and sliding windows."
            )
        causal = getattr(config, "use_bidirectional_attention", None) not in (True, "all")
        if not (causal or prepared) or not getattr(config, "is_causal", True):
            raise UnsupportedError(
                f"the decoder ({getattr(config, 'model_type', 'unknown')}) attends in both directions throughout, as encoders "
                f"of text do; pruning is for decoders that generate."
            )
        windows = tuple(window if name in (None, "sliding_attention") else None for name in names[:depth])
        return cls(tuple(names[:depth]), windows, causal)


@dataclass
class Held:
    """What a layer's cache holds before this pass.

    Parameters:
        past: P, its keys; valid: bool [B, P] or None if all are real; shift: as in `PrunedLayer`.
        slots: LongTensor [B, P], the fed slot of each; behind: LongTensor [B, P] or None, how far compact numbering lies
            behind it. Only of layers with a window.
    """

    past: int = 0
    valid: Tensor | None = None
    shift: Tensor | None = None
    slots: Tensor | None = None
    behind: Tensor | None = None


def readable(mask: Tensor) -> Tensor:
    """bool [B, L, S], what a 4-D mask of a model shows; additive or bool."""
    mask = mask[:, 0]
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


@dataclass
class Masks:
    """The masks of one pass.

    Parameters:
        kinds: of the decoder's layers.
        past: tokens fed before this pass, dropped ones included; length: fed in it.
        beyond: layer type -> bool [B or 1, L, past + L], what the model's mask shows its tokens beyond the causal window.
    """

    kinds: Kinds
    past: int = 0
    length: int = 0
    beyond: dict[str | None, Tensor] = field(default_factory=dict)

    def read(self, own: Any, valid: Tensor | None, kernel: str, device: torch.device) -> None:
        """Take note of the masks that the model made for its language model.

        Parameters:
            own: a 4-D mask, several by layer type, or None; valid: bool [B, L], the fed tokens that are real, or None.
        """
        if self.length == 1:
            return  # a single token sees nothing later, and no model shows it more than the others
        if own is None and not self.kinds.causal and kernel == "sdpa" and self.past == 0:
            later = torch.ones(1, self.length, self.length, dtype=torch.bool, device=device).triu(1)
            self.beyond = dict.fromkeys(self.kinds.names, later)
        if own is None:
            return
        given = own if isinstance(own, Mapping) else dict.fromkeys(self.kinds.names, own)
        for name, mask in given.items():
            if name not in self.kinds.names or not isinstance(mask, Tensor):
                continue
            shown = readable(mask)
            # keys that a sliding cache has released are not in it
            shown = functional.pad(shown, (self.past + self.length - shown.shape[-1], 0))
            query = torch.arange(self.length, device=mask.device)[:, None] + self.past
            more = shown & ~self._causal(name, query, torch.arange(shown.shape[-1], device=mask.device))
            if valid is not None:
                more = more & valid[:, :, None]  # what rows that only pad see matters to no one
            if bool(more.any()):
                self.beyond[name] = more

    def _window(self, name: str | None) -> int | None:
        return next(w for n, w in zip(self.kinds.names, self.kinds.windows, strict=True) if n == name)

    def _causal(self, name: str | None, query: Tensor, key: Tensor) -> Tensor:
        """bool, which keys the queries see by the rule of a type of layer alone, given places that broadcast."""
        seen, window = key <= query, self._window(name)
        return seen if window is None else seen & (key > query - window)

    def bites(self, layer: int) -> bool:
        """Whether `layer` has a window that not all tokens so far fit in."""
        window = self.kinds.windows[layer]
        return window is not None and self.past + self.length > window

    def plain(self, layer: int) -> bool:
        """Whether `layer` sees as causal attention does."""
        return not self.bites(layer) and self.kinds.names[layer] not in self.beyond

    def new_places(self, layer: int, stream: Stream, held: Held, compact: bool) -> tuple[Tensor | None, Tensor | None]:
        """`Held.slots` and `Held.behind` with the stream's tokens behind them, [B, P + n]; None where there is no window."""
        if self.kinds.windows[layer] is None:
            return None, None
        old, behind = held.slots, held.behind

        def slots() -> Tensor:
            new = stream.index + self.past
            return new if old is None else torch.cat([old, new], 1)

        def lag() -> Tensor | None:
            if not compact or (behind is None and held.shift is None and not stream.pruned):
                return None
            new = stream.gap() if stream.pruned else torch.zeros_like(stream.index)
            new = new if held.shift is None else new + held.shift[:, None]
            before = behind if behind is not None else new.new_zeros(new.shape[0], held.past)
            return torch.cat([before, new], 1)

        return (
            stream.memo(("slots", id(old)), slots, old),
            stream.memo(("behind", id(behind), id(held.shift), held.past), lag, behind, held.shift),
        )

    def seen(
        self, layer: int, stream: Stream, held: Held, keys_valid: Tensor | None, compact: bool, rows: Tensor | None = None
    ) -> Tensor | None:
        """bool [B, R, P + n], the keys that each query sees; None where that is what causal attention shows.

        Parameters:
            keys_valid: bool [B, P + n] or None if all are real.
            rows: LongTensor [B, R] into the stream, or None for all of it; then queries that only pad see themselves.
        """
        if self.plain(layer):
            return None
        slots, behind = self.new_places(layer, stream, held, compact)
        name, window, past = self.kinds.names[layer], self.kinds.windows[layer], held.past
        more = self.beyond.get(name)

        def make() -> Tensor:
            batch, n = stream.index.shape
            column = torch.arange(past + n, device=stream.index.device)
            own = rows if rows is not None else torch.arange(n, device=column.device).expand(batch, -1)
            seen = column <= (own + past)[:, :, None]  # tokens flow in the order of their columns
            if self.bites(layer):
                place = slots if behind is None else slots - behind
                seen = seen & (place[:, None, :] > place.gather(1, own + past)[:, :, None] - window)
            if more is not None:
                fed = stream.index.gather(1, own)
                # beyond its window alone may a token see earlier ones: full attention shows all of them anyway
                keys = slots if slots is not None else stream.index + self.past
                shown = more.expand(batch, -1, -1).gather(1, fed[:, :, None].expand(-1, -1, more.shape[-1]))
                shown = shown.gather(2, keys[:, None, :].expand(-1, own.shape[1], -1))
                seen = seen | functional.pad(shown, (past + n - keys.shape[1], 0))
            if keys_valid is not None:
                seen = seen & keys_valid[:, None, :]
                if rows is None:
                    seen = seen | (column == (own + past)[:, :, None])
            return seen

        key = ("seen", name, past, id(keys_valid), id(slots), id(behind), id(rows))
        return stream.memo(key, make, keys_valid, slots, behind, rows)

    def released(
        self, window: int | None, stream: Stream, held: Held, valid: Tensor | None, places: tuple[Tensor | None, Tensor | None]
    ) -> int:
        """How many leading keys no later query can see, of a layer whose cache keeps `window - 1` of them.

        Decode steps over rows of different length let go of them now and then only, as counting them has to wait for the
        device; what is held meanwhile is at most a sixteenth of the window more.

        Parameters:
            valid: bool [B, P + n] or None; places: of `new_places`.
        """
        if window is None:
            return 0
        slots, behind = places
        total, most = slots.shape[1], window - 1
        if total <= most or (valid is not None and self.length == 1 and total <= most + window // 16):
            return 0
        if valid is None:
            return total - most  # places are apart by one at least

        def make() -> int:
            place = slots if behind is None else slots - behind
            upcoming = place.new_full((place.shape[0],), self.past + self.length)
            if behind is not None:
                upcoming = upcoming - (0 if held.shift is None else held.shift) - (stream.gone.sum(1) if stream.pruned else 0)
            alive = valid & (place > upcoming[:, None] - window)
            return int(alive.any(0).long().argmax())  # decides a shape

        return stream.memo(("released", window, id(valid), id(slots), id(behind)), make, valid, slots, behind)
