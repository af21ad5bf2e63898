"""Text between two marks of a Markdown page, such as a table that a command writes."""

from __future__ import annotations

import re


def between(page: str, begin: str, end: str, text: str) -> str:
    """The page with `text` in place of what stands between its lines `begin` and `end`.

    Parameters:
        begin, end: HTML comments; the page's own `begin` may say more before it closes, such as which command writes there.
    Raises:
        ValueError: if the page does not have each of them once, in this order.
    """
    opened = list(re.finditer(re.escape(begin.removesuffix("-->").rstrip()) + r" (?:[^\n]*?)-->", page))
    if len(opened) != 1 or page.count(end) != 1 or page.index(end) < opened[0].end():
        raise ValueError(
            f"it needs the lines {begin} and {end}, each once and in this order; what is written goes between them."
        )
    return f"{page[: opened[0].end()]}\n{text.strip()}\n{page[page.index(end) :]}"
