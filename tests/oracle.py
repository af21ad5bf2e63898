"""The masking oracle: the full model in which a token that has left may no longer be attended to.

It runs the unwrapped model over the whole, unpadded sequence of one sample, without a cache. From the layer on that a
token left before, no other token attends to it (a 4-D mask per layer); positions are those that the pruned run gave.
What left where is read from the report, so the pruned run is held to its own word and nothing is implemented twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from models import IMAGE, vision_blocks

from vtprune.reporting import SampleReport


@dataclass
class Turn:
    """One prefill of a conversation: what it fed (prompt and the tokens generated after it), and its report."""

    prompt: list[int]
    generated: list[int]
    sample: SampleReport
    pixels: torch.Tensor | None


def _additive(allowed: torch.Tensor) -> torch.Tensor:
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)


def _mask(model, allowed: torch.Tensor, part: str) -> torch.Tensor:
    config = model.config.text_config if part == "text" else model.config.vision_config
    return _additive(allowed) if config._attn_implementation == "eager" else allowed


def _encoder_hooks(model, turns: list[Turn]):
    """Masks in the vision encoder, one row per image of the conversation."""
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


def oracle_logits(model, turns: list[Turn], compact: bool) -> torch.Tensor:
    """[sequence, vocabulary] logits of the full model under the masks that the pruned run implies."""
    ids = [t for turn in turns for t in turn.prompt + turn.generated]
    length, depth = len(ids), len(model.model.language_model.layers)
    alive = torch.ones(depth, length, dtype=torch.bool)  # computed on in its own prefill
    late = torch.ones(depth, length, dtype=torch.bool)  # still in the cache afterwards
    after = torch.zeros(length, dtype=torch.long)  # first query that reads the cache a key was left in
    start = 0
    for turn in turns:
        visual = torch.tensor([i for i, t in enumerate(turn.prompt) if t == IMAGE], dtype=torch.long) + start
        after[start:] = start + len(turn.prompt)
        for layer in range(depth):
            if len(visual):
                alive[layer, visual] = False
                alive[layer, visual[turn.sample.layers[layer]]] = True
                late[layer, visual] = False
                kept = turn.sample.cached[layer] if turn.sample.cached else turn.sample.layers[layer]
                late[layer, visual[kept]] = True
        start += len(turn.prompt) + len(turn.generated)

    causal = torch.ones(length, length, dtype=torch.bool).tril()
    queries = torch.arange(length)[:, None]
    rotary = model.model.language_model.rotary_emb
    handles = _encoder_hooks(model, turns)

    def hook(layer):
        def before(module, args, kwargs):
            readable = torch.where(queries >= after[None, :], late[layer][None, :], alive[layer][None, :])
            allowed = (causal & readable) | torch.eye(length, dtype=torch.bool)
            positions = torch.arange(length)
            if compact:
                gone = (~alive[layer]).long()
                positions = positions - (gone.cumsum(0) - gone)
            rope = rotary(args[0], position_ids=positions[None])
            mask = _mask(model, allowed[None, None], "text")
            return args, {**kwargs, "attention_mask": mask, "position_embeddings": rope}

        return before

    layers = model.model.language_model.layers
    handles += [layer.register_forward_pre_hook(hook(i), with_kwargs=True) for i, layer in enumerate(layers)]
    pixels = [turn.pixels for turn in turns if turn.pixels is not None]
    try:
        with torch.no_grad():
            out = model(input_ids=torch.tensor([ids]), pixel_values=torch.cat(pixels) if pixels else None, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return out.logits[0]
