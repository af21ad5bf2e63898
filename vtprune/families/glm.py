"""GLM-V: pictures of any size, patches merged two by two by a convolution, positions with three axes."""

from __future__ import annotations

from vtprune.families.base import Family
from vtprune.families.qwen import frame_pixels, merged_layouts, video_layouts

GLM_V = Family(
    name="GLM-V",
    base_classes=("Glm4vModel", "Glm4vMoeModel", "Glm46VModel", "GlmOcrModel"),
    encoder_layers=("visual.blocks",),
    projector=("visual.merger",),
    special_tokens=(),
    layouts=merged_layouts,
    videos=video_layouts,
    pixels=frame_pixels,
    sealed="a convolution behind its vision blocks merges patches two by two, so they cannot leave one by one",
    positions=("original",),
    # a video's frames stand in the prompt as pictures do, between the tokens that begin and end a video
    video_token="image_token_id",
)
