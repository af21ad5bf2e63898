"""Which model this is: a fingerprint of architecture and weights that does not depend on dtype, kernel or folder."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import nn

from vtprune.families import locate
from vtprune.pruner import Model

_SIZES = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def identify(model: nn.Module) -> Model:
    """The model's name, decoder depth and fingerprint.

    The fingerprint covers the sizes of both halves and the decoder's first and last norm weights, rounded to bfloat16:
    norms are never quantised, and that rounding is what every loading dtype has in common. It is empty for a model whose
    weights are not at hand.

    Raises:
        UnsupportedError: if it is no model of a supported family.
    """
    site = locate(model)
    config = site.base.config
    sizes = [[getattr(part, name, None) for name in _SIZES] for part in (config.text_config, config.vision_config)]
    label = getattr(config, "_name_or_path", "") or type(model).__name__
    digest = hashlib.sha256(json.dumps(sizes).encode())
    for layer in (site.decoder_layers[0], site.decoder_layers[-1]):
        for name, weight in layer.named_parameters():
            if "norm" in name:
                if weight.is_meta:  # no weights here, or offloaded to a disk: nothing can have been fitted to it
                    return Model(label, len(site.decoder_layers), "")
                rounded = weight.detach().to("cpu", torch.bfloat16).contiguous()
                digest.update(rounded.view(torch.int16).numpy().tobytes())
    return Model(label, len(site.decoder_layers), digest.hexdigest()[:16])
