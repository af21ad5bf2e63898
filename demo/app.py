"""Start the demo from this file: `python demo/app.py`, or a Hugging Face Space that has this folder as its root."""

from __future__ import annotations

from pathlib import Path

import typer

from vtprune.cli.demoing import demo, load

if __name__ == "__main__":
    # these files, not those of an installed package
    load(Path(__file__).resolve().parent)
    typer.run(demo)
