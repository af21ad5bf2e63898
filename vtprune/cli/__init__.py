"""The command line: `vtprune ask | compare | list | bench`. Imports torch only once a command needs it."""

from __future__ import annotations

from vtprune.cli.app import app, main

__all__ = ["app", "main"]
