"""What looks at frames and says how relevant each is to a question; transformers and open_clip are imported when needed.

base        FrameScorer: from what a model was fed to scores; backends as callables
vlm         a vision-language model that is shown each frame
clip        similarity with texts in CLIP's or SigLIP's space
decouple    from a question to the objects that it is about
"""

from vtprune.quota.scorers.base import Backend, CallableBackend, FrameScorer, ScoreNote
from vtprune.quota.scorers.clip import GENERIC, ClipBackend
from vtprune.quota.scorers.decouple import Decoupler
from vtprune.quota.scorers.vlm import VlmBackend

__all__ = ["GENERIC", "Backend", "CallableBackend", "ClipBackend", "Decoupler", "FrameScorer", "ScoreNote", "VlmBackend"]
