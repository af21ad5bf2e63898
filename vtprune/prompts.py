"""The words behind a prompt's token ids. Knows tokenizers; no model, no strategy."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from torch import Tensor

# What chat templates add, which names nothing in a picture: "USER:" anywhere, a role alone on a line (ChatML), placeholders.
ROLES = r"(?i)\b(?:system|user|assistant|human)\s*:|^\s*(?:system|user|assistant|model)\s*$|<(?:image|video)>"


def words(
    tokenizer: Any, ids: Tensor, strip: str | re.Pattern[str] = ROLES, placeholders: Collection[int] | None = None
) -> str:
    """The text behind token ids, without special tokens and role words, on one line.

    Parameters:
        tokenizer: of the language model.
        ids: LongTensor [T].
        strip: what to cut out of the text (a pattern given as a string is multi-line).
        placeholders: ids that are taken out before decoding; None for the tokenizer's special tokens.
    """
    if placeholders is None:
        placeholders = getattr(tokenizer, "all_special_ids", ())
    gone = set(placeholders)
    text = tokenizer.decode([i for i in ids.tolist() if i not in gone], skip_special_tokens=True)
    pattern = re.compile(strip, re.MULTILINE) if isinstance(strip, str) else strip
    return " ".join(pattern.sub(" ", text).split())
