"""What a scorer is asked: the objects that a question is about, or the question itself. Text only, no model."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence

from vtprune.pruner import UnsupportedError

YES, NO = "A", "B"

_DECOUPLE = """\
A question about a video follows. You cannot see the video. Work out which things have to be found in its frames before the \
question can be answered, in three steps.

Step 1: does it help to look for particular things that have a body, such as people, animals, objects or written signs? Write \
yes or no and nothing else. After a no, stop.
Step 2: write everything that should be looked for as a Python list of strings.
Step 3: copy the list without what a camera cannot see by itself: feelings, ideas, places in the frame, moments, the video. \
Write null if nothing is left.

Question: How many boats pass under the bridge?
(A) 1 (B) 2 (C) 4 (D) 7
Step 1: yes
Step 2: ["boat", "bridge", "number of boats"]
Step 3: ["boat", "bridge"]

Question: Which colour is the bag that stands to the left of the bench at the start?
(A) Green (B) Brown (C) White (D) Grey
Step 1: yes
Step 2: ["bag", "bench", "left side", "colour", "start of the video"]
Step 3: ["bag", "bench"]

Question: What would be a fitting title for this lecture?
(A) Rivers of Europe (B) How Banks Work (C) The Roman Army (D) Baking Bread
Step 1: no

Question: {question}
"""


def decouple_prompt(question: str) -> str:
    """A text-only prompt that makes a language model list the objects to look for; `parse` reads the reply.

    Same three steps as QuoTA's object prompt (arXiv 2503.08689), in words of our own.

    Parameters:
        question: with its options, if it has any.
    """
    return _DECOUPLE.replace("{question}", _asked(question))


def parse(reply: str) -> list[str]:
    """The objects of a reply to `decouple_prompt`, in lower case; empty for every reply that does not keep to the form.

    Needs "step 1: yes" and, on one line, "step 3: " with a flat list of strings. Nothing in the reply is executed.
    """
    reply = reply.lower()
    found = re.search(r"step 3: (\[[^\]\n]*\])", reply)
    if "step 1: yes" not in reply or found is None:
        return []
    try:
        objects = ast.literal_eval(found[1])
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return []  # the model wrote something else than a list of literals
    if not all(isinstance(name, str) for name in objects):
        return []
    return _distinct(objects)


def phrases(question: str, objects: Sequence[str] | None = None) -> list[str]:
    """What an image-text scorer compares frames with: the objects, or the whole question if there are none.

    Raises:
        UnsupportedError: for objects that are no strings, or neither question nor objects.
    """
    return check_objects(objects) or [_asked(question)]


def frame_question(question: str, objects: Sequence[str] | None = None) -> str:
    """What a model that sees one frame is asked; it answers with `YES` or `NO`.

    Parameters:
        question: the user's, with its options; used if there are no objects.
        objects: what to look for, from `parse` or the user.
    Raises:
        UnsupportedError: for objects that are no strings, or neither question nor objects.
    """
    objects = check_objects(objects)
    if objects:
        asked = f"Can any of the following be seen in this picture: {', '.join(objects)}?"
    else:
        asked = f"{_asked(question)}\n\nDoes this picture show enough to answer the question above?"
    return f"{asked}\n{YES}. Yes\n{NO}. No\nReply with the letter alone."


def check_objects(objects: Sequence[str] | None) -> list[str]:
    """A user's list of objects, stripped, each once, the order kept; empty for None.

    Raises:
        UnsupportedError: for anything but a list or tuple of strings (a single string is most likely a mistake).
    """
    if objects is None:
        return []
    if not isinstance(objects, list | tuple) or not all(isinstance(name, str) for name in objects):
        raise UnsupportedError(f"objects={objects!r}: give a list of strings, such as ['red car', 'dog'].")
    return _distinct(objects)


def _distinct(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(name for name in (" ".join(name.split()) for name in names) if name))


def _asked(question: str) -> str:
    question = question.strip()
    if not question:
        raise UnsupportedError("the question is empty: relevance needs a question or a list of objects.")
    return question
