"""One run of everything that a GPU alone can show: `python -m evaluations.gpu --out DIR` (evaluations/gpu/__main__.py)."""
