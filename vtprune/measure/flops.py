"""FLOPs and KV bytes from a model's own modules: no table of model sizes to go stale.

Convention: two FLOPs per multiply-add; linear layers and the two attention products are counted, the causal half is not
subtracted; embeddings, norms, activations and the LM head are left out. Report ratios, and name the convention.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


def linear_flops_per_token(module: nn.Module) -> int:
    """2 * (weights of all linear layers below `module`), also of layers whose weights are packed by quantisation."""
    return sum(
        2 * m.in_features * m.out_features for m in module.modules() if hasattr(m, "in_features") and hasattr(m, "out_features")
    )


def output_flops(module: nn.Module, output: Tensor) -> int:
    """FLOPs of a convolution or linear layer that made `output`: every value of it is a sum over one filter."""
    return 2 * output.numel() * module.weight[0].numel()


def attention_width(layer: nn.Module) -> int:
    """Query width (heads * head size) of a transformer layer, read from its query (or fused) projection."""
    for name, m in layer.named_modules():
        if name.split(".")[-1] in ("o_proj", "out_proj", "proj") and hasattr(m, "in_features"):
            return m.in_features
    return 0


def layer_costs(layers: Iterable[nn.Module]) -> list[tuple[int, int]]:
    """(linear FLOPs per token, attention width) of each transformer layer."""
    return [(linear_flops_per_token(layer), attention_width(layer)) for layer in layers]


def stack_flops(costs: Iterable[tuple[int, int]], lengths: Iterable[Iterable[tuple[int, int]]]) -> int:
    """FLOPs of a stack of transformer layers.

    Parameters:
        costs: from `layer_costs`.
        lengths: for each layer a list over samples of (tokens it ran on, keys they attended to).
    """
    return sum(
        n * per_token + 4 * n * keys * width
        for (per_token, width), pairs in zip(costs, lengths, strict=True)
        for n, keys in pairs
    )
