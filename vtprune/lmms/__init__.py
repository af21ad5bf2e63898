"""vtprune as a model of lmms-eval (`lmms-eval --model vtprune`), found by the entry point in `lmms_eval.models`.

Knows lmms-eval's interface and vtprune's public one; nothing of lmms-eval is patched or copied.
"""

from __future__ import annotations


def manifest():
    """What lmms-eval asks the entry point for: where the simple and the chat model are."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("vtprune", "vtprune.lmms.model.Simple", "vtprune.lmms.model.Chat")
