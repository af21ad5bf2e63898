"""lmms-eval's `--model_args` as a checked object: what is the model's, and what is the strategy's."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vtprune import embedded
from vtprune.cli.console import UserError, assignments
from vtprune.pruner import Pruner, VtpruneError, check_budget
from vtprune.registry import UnknownStrategyError, create

TINY, TINY_VIDEO = "tiny", "tiny-video"
# what the processors of Qwen-VL and others limit their pictures by
PIXELS = ("min_pixels", "max_pixels")
_ALIASES = {"num_frames": "max_frames", "max_frames_num": "max_frames", "max_num_frames": "max_frames"}
_ALIASES |= {"attn_implementation": "attn", "strategy": "pruner"}
_NONE = ("", "none", "None")


@dataclass(frozen=True)
class Arguments:
    """What `--model_args` said, with lmms-eval's own `--batch_size` and `--device`.

    Parameters:
        pretrained: Hugging Face id or folder, or "tiny-video"; None for the embedded tiny model.
        pruner: a strategy, several joined by "+", or None; keep: its budget, None for its own default.
        positions: "original", "compact", or None for the strategy's own.
        fields: of the strategy.
        attn, dtype, device: as on vtprune's command line; batch_size: requests per generate call.
        min_pixels, max_pixels: handed to the processor where it takes them.
        max_frames: of a video, evenly spaced; max_length: most tokens of prompt and answer together.
        trust_remote_code: run code that the model's repository brings.
    """

    pretrained: str | None = None
    pruner: str | None = None
    keep: int | float | None = None
    positions: str | None = None
    attn: str = "sdpa"
    dtype: str = "auto"
    device: str = "auto"
    batch_size: int = 1
    min_pixels: int | None = None
    max_pixels: int | None = None
    max_frames: int = 32
    max_length: int | None = None
    trust_remote_code: bool = False
    fields: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Arguments:
        """From names and values, text among them still to be read as numbers.

        Raises:
            UserError: a value that means nothing, or a name that is neither ours nor could be a strategy's.
            BudgetError: a `keep` that is no budget.
        """
        ours = {f.name for f in dataclasses.fields(cls)} - {"fields"}
        taken: dict[str, Any] = {}
        fields: dict[str, Any] = {}
        for name, value in given.items():
            known = _ALIASES.get(name, name)
            place = taken if known in ours else fields
            if known in place:
                raise UserError(f"{name} is given twice in model_args.")
            place[known] = _read(name, value)
        if taken.get("pretrained") in (*_NONE, TINY, None):
            taken["pretrained"] = None
        if taken.get("pruner") in (*_NONE, None):
            taken["pruner"] = None
        made = cls(**taken, fields=MappingProxyType(fields))
        made._check()
        return made

    def _check(self) -> None:
        for name in ("batch_size", "max_frames", *PIXELS, "max_length"):
            value = getattr(self, name)
            optional = name in (*PIXELS, "max_length")
            if not (optional and value is None) and (type(value) is not int or value < 1):
                raise UserError(f"model_args {name}={value!r}: give a whole number of at least 1.")
        if not isinstance(self.trust_remote_code, bool):
            raise UserError(f"model_args trust_remote_code={self.trust_remote_code!r}: true or false.")
        for name in ("pretrained", "pruner", "positions", "attn", "dtype", "device"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise UserError(f"model_args {name}={value!r}: give a name.")
        if self.keep is not None:
            check_budget(self.keep)
        if self.pruner is None:
            spare = [*self.fields, *(name for name in ("keep", "positions") if getattr(self, name) is not None)]
            if spare:
                own = sorted({f.name for f in dataclasses.fields(self)} - {"fields"})
                near = difflib.get_close_matches(spare[0], own, n=2, cutoff=0.6)
                hint = f" Did you mean {' or '.join(map(repr, near))}?" if near and spare[0] not in own else ""
                raise UserError(
                    f"model_args {spare[0]!r} is no argument of a model without a strategy (pruner=).{hint} "
                    f"Arguments: {', '.join(own)}."
                )

    @property
    def name(self) -> str:
        """What to call the model."""
        return self.pretrained or TINY

    @property
    def source(self) -> str | None:
        """Where to load it from: None for the embedded tiny model."""
        return str(embedded.tiny_video()) if self.pretrained == TINY_VIDEO else self.pretrained

    def strategy(self, schedules: Mapping[str, Path]) -> Pruner | None:
        """The strategy with its fields, or None.

        Parameters:
            schedules: files for strategies that follow one, by name, used where the fields give neither schedule nor rates.
        Raises:
            UserError: an unknown field (the strategy's are named), a value of the wrong type, two parts claiming one stage.
            UnknownStrategyError, BudgetError.
        """
        if self.pruner is None:
            return None
        fields = dict(self.fields) | ({} if self.keep is None else {"keep": self.keep})
        named = {key.replace("__", ".").rpartition(".")[2] for key in fields}
        for part in (part.strip() for part in self.pruner.split("+")):
            if part in schedules and not named & {"schedule", "rates"}:
                fields[f"{part}.schedule"] = str(schedules[part])
        try:
            return create(self.pruner, **fields)
        except (VtpruneError, UnknownStrategyError):
            raise
        except (TypeError, ValueError) as error:
            raise UserError(f"model_args pruner={self.pruner}: {error}") from error


def _read(name: str, value: Any) -> Any:
    """lmms-eval reads plain numbers and truth values; lists and none are left as text."""
    if not isinstance(value, str):
        return value
    if name == "batch_size" and value.isdecimal():
        return int(value)
    return assignments([f"{name}={value}"])[name] if value[:1] in "[({" or value.lower() in ("none", "null") else value
