"""InternVL and Mistral 3."""

from __future__ import annotations

import torch
from models import IMAGE, TOKENS, images, tiny_other

from zoo import Kind


def tiles(model, which):
    """Two and three tiles of twice the plain picture's side, which merge to its tokens."""
    big = images(2 + which, seed=which).repeat_interleave(2, -1).repeat_interleave(2, -2)
    return {"pixel_values": big}, [IMAGE] * len(big) * TOKENS


def any_size(model, which):
    height, width = ((96, 128), (128, 112))[which]
    pixels = torch.zeros(1, 3, 128, 128)
    pixels[..., :height, :width] = torch.randn(3, height, width, generator=torch.Generator().manual_seed(which)) * 0.3
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])}, [IMAGE] * (height * width // 256)


KINDS = [
    Kind("internvl", lambda attn: tiny_other("internvl", attn), tiles),
    Kind("mistral3", lambda attn: tiny_other("mistral3", attn), any_size, patch_pixels=16),
]
