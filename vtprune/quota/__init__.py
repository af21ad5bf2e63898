"""QuoTA (arXiv 2503.08689): a budget of visual tokens divided over a video's frames by their relevance to the question.

    sampling    which frames are looked at
    query       what the scorer is asked
    score       from its answers to scores
    planner     from scores to token counts and grids
    reduce      from features to that many tokens
    pack        from tokens to the decoder's sequence
    scorers     what looks at the frames: a vision-language model, CLIP or SigLIP, any callable

Pure functions but for `scorers`; nothing here decodes a video, and no model library is imported before a scorer is used.
"""

from vtprune.quota.pack import Packed, pack_frames
from vtprune.quota.planner import Plan, plan, redistribute
from vtprune.quota.query import decouple_prompt, frame_question, parse, phrases
from vtprune.quota.reduce import Reduced, reduce_frames, resize
from vtprune.quota.sampling import Sampled, sample
from vtprune.quota.score import by_slot, check_scores, last, relevance, yes_probability
from vtprune.quota.scorers import Backend, ClipBackend, Decoupler, FrameScorer, ScoreNote, VlmBackend

__all__ = [
    "Backend",
    "ClipBackend",
    "Decoupler",
    "FrameScorer",
    "Packed",
    "Plan",
    "Reduced",
    "Sampled",
    "ScoreNote",
    "VlmBackend",
    "by_slot",
    "check_scores",
    "decouple_prompt",
    "frame_question",
    "last",
    "pack_frames",
    "parse",
    "phrases",
    "plan",
    "redistribute",
    "reduce_frames",
    "relevance",
    "resize",
    "sample",
    "yes_probability",
]
