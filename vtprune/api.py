"""wrap, unwrap, pruning, report: the four things a user does to a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from vtprune.engine.session import Session
from vtprune.families import locate
from vtprune.pruner import Pruner, UnsupportedError
from vtprune.registry import create
from vtprune.reporting import Report

Model = TypeVar("Model", bound=nn.Module)

# where a wrapped base model keeps its session: with the model, so that both are freed together
_SESSION = "_vtprune_session"


def wrap(model: Model, strategy: str | Pruner, *, positions: str | None = None, **fields: Any) -> Model:
    """Prune `model`'s visual tokens from now on, in place; wrapping again replaces the strategy.

    Parameters:
        model: a loaded Hugging Face vision-language model of a supported family.
        strategy: a name (`"flowcut"`, `"flowcut+evict"`) with its fields as keywords, or a `Pruner`.
        positions: "original" or "compact"; None for what the strategy's paper did.
        fields: hyper-parameters when `strategy` is a name, e.g. `keep=64`.
    Returns:
        The same model.
    Raises:
        UnsupportedError, BudgetError, UnknownStrategyError, TypeError: nothing has been changed then.
    """
    session = Session(model, _pruner(strategy, fields), positions)
    _replace(session.site.base, session)
    return model


def unwrap(model: Model) -> Model:
    """Take pruning off `model`; it is exactly what it was.

    Raises:
        UnsupportedError: if it is not wrapped.
    """
    _replace(_session(model).site.base, None)
    return model


def report(model: nn.Module) -> Report:
    """The report of the last call of a wrapped model that had images.

    Raises:
        UnsupportedError: if the model is not wrapped. RuntimeError: if there was no such call yet.
    """
    return _session(model).report


@contextmanager
def pruning(model: nn.Module, strategy: str | Pruner, *, positions: str | None = None, **fields: Any) -> Iterator[Session]:
    """`wrap` for the length of a `with` block; afterwards the model is as before it, wrapped or not.

    Yields:
        The session, whose `report` is that of the last call.
    """
    previous = getattr(locate(model).base, _SESSION, None)
    wrap(model, strategy, positions=positions, **fields)
    session = _session(model)
    try:
        yield session
    finally:
        # unless the model was wrapped anew inside the block, which then holds on
        if session.attached:
            _replace(session.site.base, previous)


def _pruner(strategy: str | Pruner, fields: dict[str, Any]) -> Pruner:
    if isinstance(strategy, str):
        return create(strategy, **fields)
    if fields:
        raise TypeError(f"fields {sorted(fields)} go with a strategy's name; this strategy is already built.")
    return strategy


def _session(model: nn.Module) -> Session:
    session = getattr(locate(model).base, _SESSION, None)
    if session is None:
        raise UnsupportedError(f"this {type(model).__name__} is not wrapped; call vtprune.wrap(model, ...) first.")
    return session


def _replace(base: nn.Module, session: Session | None) -> None:
    """Take the present session off `base` and put `session` on, or nothing."""
    previous = base.__dict__.pop(_SESSION, None)
    if previous is not None:
        previous.detach()
    if session is not None:
        session.attach()
        setattr(base, _SESSION, session)
