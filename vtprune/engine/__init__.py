"""How a strategy's choices are carried through a running model. Knows no paper."""
