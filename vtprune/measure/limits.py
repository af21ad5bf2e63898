"""Where pruning cannot help, in a sentence each, with a benchmark's own numbers. Knows rows and byte counts alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from vtprune.families import locate

if TYPE_CHECKING:
    from vtprune.measure.bench import Row, Spread


def weight_bytes(model: nn.Module) -> int:
    """Bytes of weights that one decode step reads: the decoder's layers and the LM head, of the embeddings one row."""
    site = locate(model)
    layers = sum(p.numel() * p.element_size() for p in site.decoder.parameters())
    table = site.decoder.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    # tied embeddings are read whole, by the head
    return layers + (0 if head is table else head.numel() * head.element_size() - table.numel() * table.element_size())


def reasons(rows: Sequence[Row], weights: int, floor: Spread | None = None) -> list[str]:
    """What holds the speed-up of a batch's rows back; the first of them is the unpruned model.

    Parameters:
        weights: from `weight_bytes`; floor: of `launch_floor`, on an accelerator.
    """
    bare = rows[0]
    pruned = [row for row in rows[1:] if row.error is None and row.equivalent_tokens is not None]
    if bare.error is not None or not pruned:
        return []
    said = []
    before = bare.encoder.median + bare.projector.median
    share = before / bare.prefill.median
    said.append(
        f"encoder and projector take {before:.1f} of {bare.prefill.median:.1f} ms of the unpruned prefill ({share:.0%}): a "
        f"decoder that cost nothing would make prefill {1 / share:.2f}x as fast, and nothing that prunes behind the encoder "
        f"can do more."
    )
    least = min(pruned, key=lambda row: row.equivalent_tokens)
    if bare.kv_bytes and least.kv_bytes:
        reads, fewer = weights + bare.kv_bytes, weights + least.kv_bytes
        line = (
            f"a decode step of batch {bare.batch} reads {_size(weights)} of weights and {_size(bare.kv_bytes)} of keys and "
            f"values; {least.label} leaves {_size(least.kv_bytes)} of the latter, so it can be at most {reads / fewer:.2f}x "
            f"as fast"
        )
        if bare.decode is not None and least.decode is not None:
            line += f" (measured: {bare.decode.median:.1f} and {least.decode.median:.1f} ms)"
        said.append(line + (": decode is bound by the weights." if reads / fewer < 1.1 else "."))
    if bare.ttft is not None and bare.decode is not None:
        first = bare.ttft.median / (bare.ttft.median + 100 * bare.decode.median)
        said.append(
            f"of an answer of 100 tokens the unpruned prefill is {first:.0%}: with a prefill that cost nothing the whole would "
            f"be {1 / (1 - first):.2f}x as fast."
        )
    if floor is not None:
        left = least.decoder.median
        said.append(
            f"a forward over one token takes {floor.median:.1f} ms here (launches, and one read of the weights), the decoder "
            f"of {least.label} {left:.1f} ms: {min(1.0, floor.median / left):.0%} of that is there for any number of tokens."
        )
    return said


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
