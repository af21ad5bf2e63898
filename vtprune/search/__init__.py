"""Fitting a schedule to one model on calibration questions; every trial is compared with the full model.

calibration  questions from a folder, the full model's answers, and how a pruned model does on them
judge        outcomes, and when one is as good as the full model's
journal      the state file that lets a search go on after a kill
gsearch, psigmoid, mustdrop  the searches; none knows a model, each is given a function that tries one setting
"""
