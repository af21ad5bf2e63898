"""What a server was asked to do: a strategy and a budget, checked before any weight is loaded. Needs no vLLM."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vtprune.pruner import (
    Budget,
    BudgetError,
    Encoder,
    Pipeline,
    Pruner,
    UnsupportedError,
    VtpruneError,
    budget_tokens,
    check_budget,
)
from vtprune.registry import create

KEY = "vtprune"
SERVED = ("encode", "select")

WHY_NOT = {
    "shrink": "vLLM's processor has sized the picture before a strategy is asked",
    "prefill": "vLLM's decoder runs one sequence length for all layers and its paged cache cannot lose tokens between them",
    "decode": "vLLM's paged cache cannot lose tokens",
}


@dataclass(frozen=True)
class Settings:
    """A strategy by name, its budget and other fields, as given to the server.

    Parameters:
        pruner: a name of `vtprune list`, or several joined by "+".
        keep: visual tokens per image (int) or share of them (float).
        only: the stages of the strategy to run, or None for all.
        fields: the strategy's other hyper-parameters.
    Raises:
        BudgetError, UnknownStrategyError, TypeError: as `vtprune.create` does.
        UnsupportedError: for a strategy that vLLM cannot carry, with the reason.
    """

    pruner: str
    keep: Budget
    only: tuple[str, ...] | None = None
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", check_budget(self.keep))
        check_strategy(self.strategy())

    @classmethod
    def read(cls, given: Any) -> Settings | None:
        """The value of "vtprune" in `--hf-overrides` or `--mm-processor-kwargs`; None where it is absent or null.

        Raises:
            UnsupportedError: if it is no object with a pruner and a budget; else as the class does.
        """
        if given is None:
            return None
        example = '{"vtprune": {"pruner": "flowcut", "keep": 64}}'
        if not isinstance(given, Mapping):
            raise UnsupportedError(f"vtprune={given!r} ({type(given).__name__}): give an object, such as {example}.")
        rest = dict(given)
        pruner, keep, only = rest.pop("pruner", None), rest.pop("keep", None), rest.pop("only", None)
        if not isinstance(pruner, str):
            raise UnsupportedError(f"vtprune: pruner={pruner!r}: name a strategy of `vtprune list`, as in {example}.")
        if keep is None:
            raise BudgetError(
                f"vtprune: no keep for {pruner!r}. vLLM lays out the prompt before it has seen a picture, so the number of "
                f"tokens must be known: give keep, as in {example}."
            )
        if only is not None and not (isinstance(only, list | tuple) and only and all(isinstance(s, str) for s in only)):
            raise UnsupportedError(f'vtprune: only={only!r}: give a list of stages, such as ["encode", "select"].')
        return cls(pruner, keep, None if only is None else tuple(only), rest)

    def strategy(self, keep: Budget | None = None) -> Pruner:
        """The strategy, with its own budget or another."""
        pruner = create(self.pruner, **{"keep": self.keep if keep is None else keep, **self.fields})
        if self.only is None:
            return pruner
        if isinstance(pruner, Pipeline):
            raise UnsupportedError("vtprune: `only` goes with a single strategy, not with a composition.")
        return pruner.only(*self.only)

    def tokens(self, size: int, keep: Budget | None = None) -> int:
        """Tokens left of an image's `size` visual tokens, with the server's budget or a request's."""
        return budget_tokens(self.keep if keep is None else keep, size)

    def requested(self, given: Any) -> Budget | None:
        """The budget that a request's `mm_processor_kwargs` asks for, or None for the server's.

        Parameters:
            given: the value of "vtprune" there, `{"keep": ...}`; the server's own other settings may be repeated.
        Raises:
            BudgetError: for a keep without meaning. UnsupportedError: for anything else in it.
        """
        if given is None:
            return None
        if not isinstance(given, Mapping):
            raise UnsupportedError(f'vtprune={given!r}: a request may ask for {{"keep": int or float}}.')
        mine = self.describe()
        other = {k: v for k, v in given.items() if k != "keep" and (k not in mine or mine[k] != v)}
        if other:
            raise UnsupportedError(
                f"vtprune: {', '.join(sorted(map(str, other)))} cannot be chosen by a request; this server prunes with "
                f"{self.pruner!r}. A request may ask for a keep of its own."
            )
        return check_budget(given["keep"]) if "keep" in given else None

    def describe(self) -> dict[str, Any]:
        """The settings as they were given, JSON-ready."""
        only = {} if self.only is None else {"only": list(self.only)}
        return {"pruner": self.pruner, "keep": self.keep, **only, **self.fields}

    def cache_key(self, keep: Budget | None = None) -> str:
        """What vLLM's multimodal cache has to know of strategy and budget."""
        return json.dumps(self.describe() | ({} if keep is None else {"keep": keep}), sort_keys=True)

    def for_tokens(self, tokens: int, size: int) -> Pruner:
        """The strategy that leaves `tokens` of `size`."""
        return _strategy(self.cache_key(), None if tokens == self.tokens(size) else tokens)


@functools.lru_cache(maxsize=256)
def _strategy(described: str, keep: int | None) -> Pruner:
    return Settings.read(json.loads(described)).strategy(keep)


def parts(pruner: Pruner) -> list[Pruner]:
    """The strategies of a composition, or the one."""
    return pruner.parts if isinstance(pruner, Pipeline) else [pruner]


def check_strategy(pruner: Pruner) -> None:
    """Refuse what vLLM cannot carry.

    Raises:
        UnsupportedError: with the reason and what to do.
    """
    for part in parts(pruner):
        name = part.name
        for stage in part.stages():
            if stage not in SERVED:
                served = [s for s in part.stages() if s in SERVED]
                way = f' Its other stages can: add "only": {json.dumps(served)}, or switch that one off in its own settings.'
                raise UnsupportedError(
                    f"vtprune: {name!r} acts in the {stage!r} stage, which cannot be served: {WHY_NOT[stage]}."
                    f"{way if served else ''} Strategies of the stages encode and select can be served (`vtprune list`)."
                )
        # `only` wraps a strategy and keeps its class attributes behind
        inner = getattr(part, "pruner", part)
        if inner.modality == "video":
            raise UnsupportedError(f"vtprune: {name!r} prunes videos alone, and vtprune serves pictures.")
        if inner.reads:
            raise UnsupportedError(
                f"vtprune: {name!r} reads {' and '.join(inner.reads)}, which vLLM does not have where pictures are encoded: "
                f"their features are cached and shared by requests with other text. Use a strategy that reads pictures alone."
            )
        if part.keep is None:
            raise BudgetError(f"vtprune: {name!r} has no budget, and vLLM must know the number of tokens first. Give keep.")


def check_encoder(pruner: Pruner, encoder: Encoder, why_not: str = "") -> int:
    """Blocks of the vision encoder that have to run one by one for `pruner`; 0 if the encoder is left alone.

    Parameters:
        encoder: the tower; why_not: why nothing of it can be watched or leave in it, or "".
    Raises:
        UnsupportedError: if the strategy wants what is not to be had.
    """
    if pruner.requires - ({"cls"} if encoder.cls else set()):
        raise UnsupportedError(f"vtprune: {pruner.name!r} needs a class token, and this model's vision encoder has none.")
    owner = pruner.part("encode")
    needs = {} if owner is None else owner.encode_needs(encoder)
    if not needs:
        return 0
    if why_not:
        alone = ' Or leave that stage out: add "only": ["select"].' if "select" in owner.stages() else ""
        raise UnsupportedError(
            f"vtprune: {owner.name!r} works inside the vision encoder, which cannot be served here: {why_not}. Use a strategy "
            f"of the select stage, such as divprune.{alone}"
        )
    return max(encoder.depth, *(block + 1 for block in needs))


def check_count(found: int, promised: int, name: str) -> None:
    """Refuse to go on where a strategy left another number of tokens than the prompt was laid out for."""
    if found != promised:
        raise VtpruneError(
            f"{name} left {found} visual tokens of a picture, and the prompt has room for {promised}. A strategy that is "
            f"served must keep its budget exactly."
        )
