"""vLLM's CLIP tower, block by block: patches leave in between, and the few attention rows that a strategy reads are made."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.attention import MMEncoderAttention
from vllm.model_executor.models.clip import CLIPEncoderLayer, CLIPVisionTransformer

from vtprune.engine.attention import Request, attention_rows
from vtprune.engine.items import Item
from vtprune.pruner import Encoder, Pruner, Rows
from vtprune.vllm.choosing import encode


def add_blocks(tower: CLIPVisionTransformer, wanted: int, prefix: str, quant_config) -> None:
    """Give the tower the blocks after the feature block that a strategy watches; vLLM leaves them out."""
    layers: nn.ModuleList = tower.encoder.layers
    for at in range(len(layers), wanted):
        layers.append(
            CLIPEncoderLayer(tower.config, quant_config, prefix=f"{prefix}.encoder.layers.{at}", attn_cls=MMEncoderAttention)
        )


def run(tower: CLIPVisionTransformer, pruner: Pruner | None, encoder: Encoder, pixels: Tensor) -> tuple[Tensor, list[Item]]:
    """[B, K, C] patches of the feature block, padded on the right, and what is left of each picture.

    Parameters:
        pruner: None keeps everything; pixels: [B, 3, H, W].
    """
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    blocks = [functools.partial(block, layer) for layer in tower.encoder.layers]
    return encode(pruner, encoder, blocks, hidden)


def block(
    layer: CLIPEncoderLayer, hidden: Tensor, mask: Tensor | None, wanted: list[tuple[Request, Callable[[Rows], None]]]
) -> Tensor:
    """One of vLLM's blocks with its own weights and kernel, and attention rows made beside it from its queries and keys.

    Parameters:
        mask: bool [B, 1, S, S] where pictures differ in length, which vLLM's kernel does not take.
    """
    attention = layer.self_attn
    fused, _ = attention.qkv_proj(layer.layer_norm1(hidden))
    q, k, v = fused.chunk(3, dim=-1)
    if not wanted and mask is None:
        mixed = attention.attn(q, k, v)
    else:
        heads = [t.unflatten(-1, (attention.num_heads_per_partition, attention.head_dim)).transpose(1, 2) for t in (q, k, v)]
        if mask is None:
            mixed = attention.attn(q, k, v)
        else:
            mixed = nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask, scale=attention.scale)
            mixed = mixed.transpose(1, 2).flatten(2)
        for request, sink in wanted:
            sink(all_heads(attention_rows(*heads, attention.scale, request), attention.tp_size))
    mixed, _ = attention.out_proj(mixed)
    hidden = hidden + mixed
    return hidden + layer.mlp(layer.layer_norm2(hidden))


def all_heads(rows: Rows, ranks: int) -> Rows:
    """Rows of all heads where tensor parallelism has spread them over `ranks`, so that every rank chooses the same."""
    if ranks == 1:
        return rows

    def gather(t: Tensor | None) -> Tensor | None:
        return None if t is None else tensor_model_parallel_all_gather(t.contiguous(), dim=1)

    return Rows(
        gather(rows.logits), gather(rows.lse), rows.valid, gather(rows.keys), gather(rows.values), gather(rows.query_values)
    )
