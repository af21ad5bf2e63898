"""Bases of strategies with values that a search fitted to one model; they refuse any other."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vtprune.pruner import BudgetError, Model, Pruner, UnsupportedError

if TYPE_CHECKING:
    from vtprune.schedule import Stored


def read(path: str | PathLike[str], kind: str) -> Stored:
    """As `vtprune.schedule.read`, imported when it is needed."""
    from vtprune import schedule

    return schedule.read(path, kind)


class Fitted(Pruner):
    """A strategy whose field `fitted` is the model that its values were found on, None for values chosen by hand.

    `keep` may be None.

    Class attributes:
        searched: fields whose values a search finds.
        origin: what was found and how, the start of a sentence that goes on with "on" and the model.
    """

    searched: ClassVar[tuple[str, ...]] = ()
    origin: ClassVar[str] = "the schedule was searched"

    fitted: Model | None

    def __post_init__(self) -> None:
        if self.keep is not None:
            super().__post_init__()
        if self.fitted is not None and not isinstance(self.fitted, Model):
            raise BudgetError(f"fitted={self.fitted!r}: give a vtprune.pruner.Model, or None; load(path) sets it.")

    @classmethod
    def load(cls, path: str | PathLike[str], **fields: Any) -> Self:
        """The strategy with what `vtprune search` found and wrote to a file; `fields` are its other fields."""
        found = read(path, cls.name)
        return cls(**{name: found.values[name] for name in cls.searched}, fitted=found.model, **fields)

    def check_model(self, model: Model) -> None:
        found = self.fitted
        if found is None:
            return
        again = f"Fit one to this model with `vtprune search {self.name}`."
        if found.depth != model.depth:
            raise UnsupportedError(
                f"{self.name}: {self.origin} on {found.name!r} with {found.depth} decoder layers, {model.name!r} has "
                f"{model.depth}. {again}"
            )
        if found.fingerprint != model.fingerprint:
            raise UnsupportedError(
                f"{self.name}: {self.origin} on {found.name!r} (fingerprint {found.fingerprint}), this is {model.name!r} "
                f"({model.fingerprint}), other weights. {again}"
            )

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "fitted": self.fitted and self.fitted.name}


class Scheduled(Fitted):
    """A strategy whose counts per decoder layer follow a searched schedule, made from a file or from fields."""

    schedule: str | None
    query_scope: str
    max_cuts: int | None
    min_layer: int | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.query_scope not in ("text", "last"):
            raise BudgetError(
                f"query_scope={self.query_scope!r}: give 'text' (all text after the image) or 'last' (the last token)."
            )
        if self.max_cuts is not None:
            none = ", or None for a cut wherever the schedule falls"
            self.check_fields(integer=True, max_cuts="[1, inf)", why=none)
        before = ", as the first layer has no attention before it to rank by"
        self.check_fields(integer=True, min_layer="[1, inf)", why=before)

    @classmethod
    def load(cls, path: str | PathLike[str], **fields: Any) -> Self:
        """The strategy with a schedule from `vtprune search`."""
        return cls(schedule=str(path), **fields)

    def read_schedule(self) -> dict[str, Any]:
        """The values in the file `schedule`, none without one; its model is the one that this is fitted to."""
        if self.schedule is None:
            return {}
        self.schedule = str(self.schedule)
        found = read(self.schedule, self.name)
        self.fitted = found.model
        return found.values

    def take(self, values: dict[str, Any], **defaults: Any) -> None:
        """Give the fields that were left at None what `values`, else `defaults`, has."""
        for name, default in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, values.get(name, default))
