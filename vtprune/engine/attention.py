"""Attention rows on demand: the model's own kernel runs as ever, and the few extra rows are computed beside it.

An attention module finds its kernel through its config's implementation name. `TapConfig` stands in for the config of
the modules that a strategy needs rows from and names an entry of transformers' AttentionInterface that calls the real
kernel, then computes `queries x visual keys` from the q and k it was handed: after rotary embedding, under any kernel,
with grouped heads, in fp32, never n x n. The shared config is not touched, so masks are built as ever.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from vtprune.engine.stream import causal_mask, take
from vtprune.families.base import Site
from vtprune.pruner import Needs, Rows, UnsupportedError

NAME = "vtprune_rows"
CHUNK = 128  # rows of an attention map that are held at once, where all of them are wanted


@dataclass
class Request:
    """Which rows of the running attention call are wanted.

    Parameters:
        needs: the strategy's declaration.
        rows: LongTensor [B, R] into the queries of this call, or None for a mean over those of the columns; a slice where they
            are the same of all items, and real.
        rows_valid: bool [B, R]; columns: LongTensor [B, N] into the keys, or a slice.
        keys_valid: bool [B, S] over the keys, or None if all are real.
        offset: keys that precede the first query for causal attention; None for bidirectional attention.
        seen: bool [B, R, S], which keys each query sees where it is neither; padding is left out of it already.
    """

    needs: Needs
    rows: Tensor | slice | None
    rows_valid: Tensor | None
    columns: Tensor | slice
    keys_valid: Tensor | None
    offset: int | None
    seen: Tensor | None = None


Listener = Iterable[tuple[Request, Callable[[Rows], None]]]


class TapConfig:
    """Stands in for `module.config`: the same in everything but the attention implementation it names."""

    def __init__(self, config, listener: Callable[[], Listener]):
        self.__dict__.update(_config=config, _listener=listener)

    def __getattr__(self, name: str):
        # also catches copies and pickles in the making, which have no _config yet
        if name == "_config":
            raise AttributeError(name)
        return NAME if name == "_attn_implementation" else getattr(self._config, name)

    def __setattr__(self, name: str, value) -> None:
        setattr(self._config, name, value)

    @property
    def kernel(self) -> str:
        return self._config._attn_implementation


def attach_tap(module: nn.Module, listener: Callable[[], Listener]) -> Callable[[], None]:
    """Have attention `module` compute the rows that `listener()` yields requests for; returns the undo.

    Raises:
        UnsupportedError: if the module does not choose its kernel by its config's implementation name.
    """
    config = getattr(module, "config", None)
    if not hasattr(config, "_attn_implementation"):
        raise UnsupportedError(
            f"{type(module).__name__} does not choose its attention kernel through transformers' AttentionInterface, so no "
            f"attention rows can be taken from it."
        )
    if NAME not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(NAME, tapped_attention)
    module.config = TapConfig(config, listener)
    return functools.partial(setattr, module, "config", config)


def real_kernel(module: nn.Module, name: str) -> Callable:
    """The function that `module` would have called under implementation `name`."""
    if name in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[name]
    # "eager" is no registry entry: each modeling file has its own
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if name != "eager" or eager is None:
        raise UnsupportedError(f"{type(module).__name__}: no attention function for implementation {name!r}.")
    return eager


def tapped_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **kwargs):
    """The entry behind `NAME`: the model's own kernel, then the rows."""
    tap: TapConfig = module.config
    output = real_kernel(module, tap.kernel)(module, query, key, value, attention_mask, **kwargs)
    # scores choose, which has no gradient; and a recomputation (gradient checkpointing) must save the same as the first run
    with torch.no_grad():
        for request, sink in tap._listener():
            scaling = kwargs.get("scaling")
            scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            sink(attention_rows(query, key, value, scaling, request, _softcap(kwargs.get("softcap"), tap.kernel)))
    return output


def _softcap(cap: float | None, kernel: str) -> float | None:
    """The bound on attention scores that `kernel` observes; sdpa knows none and older transformers pass it by."""
    return None if kernel == "sdpa" else cap


def attention_rows(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, request: Request, softcap: float | None = None
) -> Rows:
    """Rows of softmax(q k^T) for the requested queries over the requested keys.

    Parameters:
        query: [B, H, L, d]; key, value: [B, Hkv, S, d], after position embedding, cached keys first.
        softcap: bound that scores approach, or None.
    """
    if request.needs.queries == "patches":
        rows = _received(query, key, scaling, request, softcap)
    elif request.rows is None:
        rows = _rows(_mean(query, request), key, scaling, request, softcap)
    else:
        rows = _rows(_along(query, request.rows), key, scaling, request, softcap)
    if request.needs.values:
        rows.values = _along(value, request.columns)
        if request.rows is None:
            rows.query_values = _mean(value, request)
        elif isinstance(request.rows, slice):
            rows.query_values = _along(value, request.rows)
        else:
            # in self-attention the queries are the last keys
            at = request.rows + (key.shape[2] - query.shape[2])
            rows.query_values = _along(value, at)
    return rows


def _along(t: Tensor, at: Tensor | slice) -> Tensor:
    """[B, H, N, d] fp32: those of `t` [B, H, S, d] that are wanted; the same of all items cost no gather."""
    if isinstance(at, slice):
        return t[:, :, at].float()
    return t.gather(2, at[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3])).float()


def _real(request: Request) -> Tensor | None:
    """bool [B, N], which of the columns do not only pad the batch; None if none does."""
    if request.keys_valid is None:
        return None
    return (
        request.keys_valid[:, request.columns]
        if isinstance(request.columns, slice)
        else (request.keys_valid.gather(1, request.columns))
    )


def _mean(t: Tensor, request: Request) -> Tensor:
    """[B, Hkv, 1, d] fp32: the mean of `t` [B, Hkv, S, d] over the requested columns, of which padding is none."""
    wanted, real = _along(t, request.columns), _real(request)
    if real is None:
        return wanted.mean(2, keepdim=True)
    real = real[:, None, :, None]
    return (wanted * real).sum(2, keepdim=True) / real.sum(2, keepdim=True)


def _received(query: Tensor, key: Tensor, scaling: float, request: Request, softcap: float | None) -> Rows:
    """One row per head: what each column gets of the others' attention, averaged; a few rows of the map at a time."""
    queries, real, total = _along(query, request.columns), _real(request), 0
    if real is None:
        real = torch.ones(queries.shape[0], queries.shape[2], dtype=torch.bool, device=query.device)
    for at in range(0, queries.shape[2], CHUNK):
        mine = slice(at, at + CHUNK)
        part = replace(request, rows=None, rows_valid=real[:, mine])
        total = total + _rows(queries[:, :, mine], key, scaling, part, softcap).attention().sum(2, keepdim=True)
    mean = total / real.sum(1)[:, None, None, None]
    one = torch.ones(len(real), 1, dtype=torch.bool, device=real.device)
    rows = Rows(mean.log(), torch.zeros_like(mean[..., 0]), one)
    if request.needs.keys:
        rows.keys = _along(key, request.columns)
    return rows


def _rows(q: Tensor, key: Tensor, scaling: float, request: Request, softcap: float | None) -> Rows:
    """`attention_rows` for queries [B, H, R, d] that are gathered already, in fp32."""
    batch, heads, count, width = q.shape
    rows_valid = request.rows_valid
    if rows_valid is None:
        rows_valid = torch.ones(batch, count, dtype=torch.bool, device=q.device)
    # query heads of one group share a key head: fold them into the row dimension instead of repeating the keys
    q = q.reshape(batch, key.shape[1], heads // key.shape[1] * count, width)
    logits = torch.matmul(q, key.float().transpose(-1, -2)).mul_(scaling)
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    logits = logits.view(batch, heads, count, key.shape[2])

    seen = request.keys_valid[:, None, None, :] if request.keys_valid is not None else None
    if request.seen is not None:
        seen = request.seen[:, None]
    elif request.offset is not None:
        last = (request.rows + request.offset)[:, None, :, None]
        causal = torch.arange(key.shape[2], device=key.device) <= last
        seen = causal if seen is None else causal & seen
    if seen is not None:
        logits = logits.masked_fill(~seen, float("-inf"))
    if request.rows_valid is not None:
        logits = logits.masked_fill(~rows_valid[:, None, :, None], float("-inf"))
    lse = logits.logsumexp(-1)
    if request.rows_valid is not None:
        # a row that sees nothing, as it only pads the batch, attends to nothing: exp(-inf - 0), not NaN
        lse = lse.masked_fill(lse == float("-inf"), 0.0)
    if isinstance(request.columns, slice):
        wanted = logits[..., request.columns]
    else:
        wanted = logits.gather(3, request.columns[:, None, None, :].expand(-1, heads, count, -1))
    rows = Rows(wanted, lse, rows_valid)
    if request.needs.keys:
        rows.keys = _along(key, request.columns)
    return rows


def _rotation(attention: nn.Module) -> Callable | None:
    """The function with which `attention` rotates queries and keys, or None if it is not one of the known ones."""
    module = sys.modules[type(attention).__module__]
    with_axes = getattr(module, "apply_multimodal_rotary_pos_emb", None)
    if with_axes is None:
        return getattr(module, "apply_rotary_pos_emb", None)
    # Qwen-VL before transformers 5.18 joins its axes here, later in the rotary embedding
    return functools.partial(with_axes, mrope_section=attention.config.rope_parameters["mrope_section"])


def _has_positions(attention: nn.Module) -> bool:
    """Whether this layer rotates queries and keys; some models have layers without positions among the others."""
    if _is_one(attention, "Cohere2Attention"):
        return attention.sliding_window is not None
    return bool(getattr(attention, "use_rope", True))


def _is_one(module: nn.Module, name: str) -> bool:
    return any(cls.__name__ == name for cls in type(module).__mro__)


@torch.no_grad()
def rows_ahead(site: Site, layer: int, hidden: Tensor, rotary: tuple[Tensor, Tensor], past: Tensor | None, request: Request):
    """The rows that decoder layer `layer` would have on its input `hidden`: queries of the wanted rows only, keys of all.

    Parameters:
        hidden: [B, n, D]; rotary: cos and sin [B or 1, n, d] of its positions; past: cached keys [B, Hkv, S, d] or None.
    Raises:
        UnsupportedError: if the layer's attention is not made of the declared parts.
    """
    block = site.decoder_layers[layer]
    attention, family = block.self_attn, site.family
    parts = [getattr(block, family.norm, None), getattr(attention, family.query, None), getattr(attention, family.key, None)]
    rotate = _rotation(attention)
    if None in parts or rotate is None:
        raise UnsupportedError(
            f"{type(attention).__name__}: the queries and keys of a layer about to run cannot be computed apart from it "
            f"(no {family.norm}, {family.query}, {family.key} or rotary function as declared for {family.name})."
        )
    norm, to_query, to_key = parts
    normed = norm(hidden)

    def heads(x: Tensor, name: str, parts: int = 1) -> Tensor:
        x = x.unflatten(-1, (-1, parts * attention.head_dim))[..., : attention.head_dim]
        extra = getattr(attention, name, None)
        return (x if extra is None else extra(x)).transpose(1, 2)

    q = heads(to_query(take(normed, request.rows)), "q_norm", 1 + family.query_gate)
    k = heads(to_key(normed), "k_norm")
    cos, sin = rotary
    if _has_positions(attention):
        q = rotate(q, q, take(cos, request.rows), take(sin, request.rows))[0]
        k = rotate(k, k, cos, sin)[1]
    k = k if past is None else torch.cat([past, k], 2)
    # Gemma 3 still names a bound, and observes none
    cap = attention.attn_logit_softcapping if _is_one(attention, "Gemma2Attention") else None
    softcap = _softcap(cap, getattr(attention.config, "kernel", attention.config._attn_implementation))
    return _rows(q.float(), k, getattr(attention, "scaling", attention.head_dim**-0.5), request, softcap)


def kernel_mask(
    kernel: str,
    queries: int,
    past: int,
    keys_valid: Tensor | None,
    index: Tensor,
    dtype: torch.dtype,
    seen: Tensor | None = None,
    causal: bool = True,
) -> Tensor | None:
    """The mask of a layer in the form that `kernel` takes; None wherever the kernel needs none.

    Parameters:
        queries, past: new and cached keys.
        keys_valid: bool [B, past + queries], or None if all are real.
        index: any tensor [B, ...] on the right device.
        seen: bool [B, queries, past + queries], where attention is not plainly causal.
        causal: whether the layer attends causally where it is handed no mask.
    Raises:
        UnsupportedError: for a kernel whose mask form is not known here, or that takes none such as `seen`.
    """
    if "flash" in kernel:
        if seen is not None:
            raise UnsupportedError(
                f"attention kernel {kernel!r}: in layers with a sliding window shorter than the prompt, or whose visual tokens "
                f"attend to each other in both directions, it cannot be told of dropped tokens. Load the model with "
                f"attn_implementation='sdpa'."
            )
        return keys_valid  # causal by itself, aligned to the last key
    if kernel not in ("sdpa", "eager"):
        raise UnsupportedError(
            f"attention kernel {kernel!r}: tokens can be dropped under 'sdpa', 'eager' and the flash kernels. "
            f"Load the model with attn_implementation='sdpa'."
        )
    if seen is not None:
        allowed = seen[:, None]
    # one query sees everything; sdpa is causal by itself when queries and keys are equally many
    elif keys_valid is None and (queries == 1 or (past == 0 and kernel == "sdpa" and causal)):
        return None
    else:
        allowed = causal_mask(queries, past, keys_valid, index.device).expand(index.shape[0], -1, -1, -1)
    if kernel == "sdpa":
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, torch.finfo(dtype).min)


def padding_mask(kernel: str, valid: Tensor, dtype: torch.dtype) -> Tensor:
    """Bidirectional attention over padded rows: `valid` bool [B, S] in the form that `kernel` takes."""
    if "flash" in kernel:
        return valid
    allowed = valid[:, None, None, :].expand(-1, 1, valid.shape[1], -1)
    if kernel == "sdpa":
        return allowed
    if kernel == "eager":
        return torch.zeros(allowed.shape, dtype=dtype, device=valid.device).masked_fill_(~allowed, torch.finfo(dtype).min)
    raise UnsupportedError(
        f"attention kernel {kernel!r} in the vision encoder: images that keep different numbers of patches can share a batch "
        f"under 'sdpa', 'eager' and the flash kernels. Load the model with attn_implementation='sdpa'."
    )
