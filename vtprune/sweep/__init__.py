"""Sweeps: models x strategies x budgets x tasks as lmms-eval runs, what they leave on disk, and the report about it.

`config` reads a sweep's yaml, `trial` is one lmms-eval run in its own process, `run` gives them to Ray, `store` is the
results folder, `report` the numbers, `pages` and `plots` what is made of them. Only `run` imports Ray.
"""
