"""The state of a search on disk: every trial's result, written after each, so that a killed search can go on.

A search is deterministic given its settings and results. To resume is to run it again: results in the journal are
looked up, the first one missing is where it was killed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vtprune.schedule import ScheduleError, read_json, write_text
from vtprune.search.judge import SearchError

FORMAT, VERSION = "vtprune-search-state", 1
MAX_BYTES = 1 << 27


class Journal:
    """Results by key, on disk.

    Parameters:
        path: of the state file; it is tried at once, so that a place that cannot be written is known before the search.
        settings: everything that results depend on, JSON-ready.
        fresh: forget a state that is there.
    Raises:
        SearchError: if the state there belongs to other settings, or is damaged. ScheduleError: if it cannot be written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], fresh: bool = False):
        self.path = path
        self.settings = json.loads(json.dumps(settings))
        self.results: dict[str, Any] = {}
        if path.exists() and not fresh:
            self.results = self._read()
        self.resumed = len(self.results)
        self._write()
        if not self.results:
            self.remove()  # nothing to go on with yet

    def memory(
        self, measure: Callable[[Any], Any], dump: Callable[[Any], Any], load: Callable[[Any], Any]
    ) -> Callable[[Any], Any]:
        """`measure` of one JSON-ready argument, looked up where it is known.

        Parameters:
            dump, load: a result as JSON and back; `load` raises ValueError for what is no result.
        """

        def remembered(argument: Any) -> Any:
            key = json.dumps(argument)
            if key not in self.results:
                result = measure(argument)
                self.results[key] = dump(result)
                self._write()
                return result
            try:
                return load(self.results[key])
            except (ValueError, TypeError, LookupError) as error:
                raise SearchError(f"{str(self.path)!r} is damaged ({error}). Delete it, or start over with --fresh.") from error

        return remembered

    def remove(self) -> None:
        """The search is over, its result stands elsewhere."""
        self.path.unlink(missing_ok=True)

    def _write(self) -> None:
        content = {"format": FORMAT, "version": VERSION, "settings": self.settings, "results": self.results}
        write_text(self.path, json.dumps(content) + "\n")

    def _read(self) -> dict[str, Any]:
        start_over = "or start over with --fresh"
        try:
            content = read_json(self.path, MAX_BYTES, "a search's state")
        except ScheduleError as error:
            raise SearchError(f"the state of an earlier search is unusable: {error} Delete it, {start_over}.") from error
        found = content if isinstance(content, dict) else {}
        settings, results = found.get("settings"), found.get("results")
        known = found.get("format") == FORMAT and found.get("version") == VERSION
        if not known or not isinstance(settings, dict) or not isinstance(results, dict):
            raise SearchError(f"{str(self.path)!r} is no state of a search by this vtprune. Delete it, {start_over}.")
        other = sorted(name for name in {*settings, *self.settings} if settings.get(name, "") != self.settings.get(name, ""))
        if results and other:
            was = ", ".join(f"{name} was {settings.get(name)!r}, is {self.settings.get(name)!r}" for name in other)
            raise SearchError(
                f"{str(self.path)!r} holds an unfinished search with other settings: {was}. Give the same ones to go on, "
                f"another --out, {start_over}."
            )
        return results
