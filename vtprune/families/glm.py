"""GLM-V: Qwen-VL's kind of vision tower, whose patches a convolution behind its blocks merges two by two."""

from __future__ import annotations

from dataclasses import replace

from vtprune.families.qwen import QWEN_VL

GLM_V = replace(
    QWEN_VL,
    name="GLM-V",
    base_classes=("Glm4vModel", "Glm4vMoeModel", "Glm46VModel", "GlmOcrModel"),
    sealed="a convolution behind its vision blocks merges patches two by two, so they cannot leave one by one",
    # a video's frames stand in the prompt as pictures do, between the tokens that begin and end a video
    video_token="image_token_id",
)
