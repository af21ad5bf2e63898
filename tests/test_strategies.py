"""Selection and budget maths, and every shipped strategy called directly on views made by hand."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from vtprune import (
    BudgetError,
    DecodeView,
    EncodeView,
    Evict,
    FastV,
    FlowCut,
    MustDrop,
    Pipeline,
    PrefillView,
    Random,
    SelectView,
    Uniform,
)
from vtprune.pruner import Encoder, Pruner, Rows, budget_tokens, check_budget, tokens_after_cut
from vtprune.registry import SHIPPED, available
from vtprune.select import spread, top, top_ragged

# deterministic: a failure found once is found by everybody, and a slow machine is no failure
quick = settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# few distinct values: ties are the rule
coarse = st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, math.inf, -math.inf, math.nan])


@st.composite
def score_tables(draw):
    batch, tokens = draw(st.integers(1, 4)), draw(st.integers(1, 24))
    rows = draw(st.lists(st.lists(coarse, min_size=tokens, max_size=tokens), min_size=batch, max_size=batch))
    return torch.tensor(rows, dtype=torch.float64).to(draw(st.sampled_from(DTYPES)))


def best(row: list[float], k: int) -> list[int]:
    """What `top` promises, in plain Python."""
    value = [-math.inf if math.isnan(x) else x for x in row]
    return sorted(sorted(range(len(row)), key=lambda i: (-value[i], i))[:k])


# ---------------------------------------------------------------------- select.py


@quick
@given(score_tables(), st.data())
def test_top(scores, data):
    k = data.draw(st.integers(1, scores.shape[1]))
    before = scores.clone()
    kept = top(scores, k)
    assert kept.dtype == torch.long and kept.shape == (scores.shape[0], k)
    assert kept.tolist() == [best(row, k) for row in scores.tolist()]
    assert torch.equal(torch.nan_to_num(scores, nan=7.0), torch.nan_to_num(before, nan=7.0))


@quick
@given(score_tables(), st.data())
def test_top_ragged(scores, data):
    counts = data.draw(st.lists(st.integers(1, scores.shape[1]), min_size=scores.shape[0], max_size=scores.shape[0]))
    kept = top_ragged(scores, counts)
    assert [row.tolist() for row in kept] == [best(row, k) for row, k in zip(scores.tolist(), counts, strict=True)]
    assert all(row.dtype == torch.long for row in kept)


def test_top_ragged_refuses_a_missing_count():
    with pytest.raises(ValueError):
        top_ragged(torch.zeros(2, 3), [1])


def test_top_orders_infinities_and_nan():
    scores = torch.tensor([[math.nan, -math.inf, 1.0, math.inf, 3e38]])
    assert top(scores, 1).tolist() == [[3]]
    assert top(scores, 2).tolist() == [[3, 4]]
    assert top(scores, 3).tolist() == [[2, 3, 4]]
    # NaN counts as the smallest value there is, so it ties with -inf, and the lower index wins
    assert top(scores, 4).tolist() == [[0, 2, 3, 4]]


@pytest.mark.parametrize("tokens", [5, 576, 2000])
def test_ties_go_to_the_lower_index(tokens):
    assert top(torch.ones(2, tokens), 3).tolist() == [[0, 1, 2]] * 2


def test_half_precision_scores_do_not_overflow_or_merge():
    # both neighbours are representable in fp16, whose largest value this is
    scores = torch.tensor([[65504.0, 65472.0, -65504.0, 0.0]], dtype=torch.float16)
    assert top(scores, 1).tolist() == [[0]]
    assert top(scores, 3).tolist() == [[0, 1, 3]]


@quick
@given(st.integers(1, 3000), st.data())
def test_spread(tokens, data):
    k = data.draw(st.integers(1, tokens))
    index = spread(tokens, k)
    assert index.dtype == torch.long
    assert index.tolist() == [(2 * i + 1) * tokens // (2 * k) for i in range(k)]
    assert len(set(index.tolist())) == k and index.tolist() == sorted(index.tolist())
    assert int(index[0]) >= 0 and int(index[-1]) < tokens
    gaps = index.diff()
    assert k == 1 or int(gaps.max() - gaps.min()) <= 1


# ---------------------------------------------------------------------- budgets


@quick
@given(st.integers(1, 5000), st.one_of(st.integers(1, 10000), st.floats(1e-6, 1.0)))
def test_budget_tokens(tokens, keep):
    k = budget_tokens(keep, tokens)
    assert isinstance(k, int) and 1 <= k <= tokens
    if isinstance(keep, int):
        assert k == min(keep, tokens)
    else:
        assert abs(k - keep * tokens) <= 0.5 or k == 1


def test_budget_edges():
    assert budget_tokens(1, 576) == 1
    assert budget_tokens(1.0, 576) == 576
    assert budget_tokens(1e-9, 576) == 1
    assert [budget_tokens(0.5, n) for n in (1, 3, 5, 7)] == [1, 2, 2, 4]  # half to even, at least one
    assert isinstance(check_budget(torch.tensor([3]).numpy()[0]), int)  # NumPy integers are integers


@quick
@given(st.integers(2, 40), st.integers(1, 39), st.integers(1, 800), st.data())
def test_tokens_after_cut_spends_the_budget(depth, layer, tokens, data):
    assume(layer < depth)
    target = data.draw(st.integers(1, tokens + 3))
    reachable = layer * tokens + (depth - layer)  # one token after the cut
    try:
        after = tokens_after_cut(target, tokens, layer, depth)
    except BudgetError as error:
        assert target * depth < reachable
        # the least budget that the message offers is reachable, and no smaller one is promised
        least = int(str(error).split("raise keep to at least ")[1].split(",")[0])
        assert tokens_after_cut(least, tokens, layer, depth) >= 1
        assert least > target
        return
    assert 1 <= after <= tokens
    if target >= tokens:
        assert after == tokens
        return
    mean = (layer * tokens + (depth - layer) * after) / depth
    assert abs(mean - target) <= 0.5 * (depth - layer) / depth + 1e-9


def test_tokens_after_cut_of_fastv():
    # 32 layers, K = 2, 576 tokens: 64 on average is what 29.9 after the cut make
    assert tokens_after_cut(64, 576, 2, 32) == 30
    with pytest.raises(BudgetError, match=r"layers before it alone cost 36.0"):
        tokens_after_cut(36, 576, 2, 32)


# ---------------------------------------------------------------------- views made by hand


def make_rows(batch: int, tokens: int, seed: int, flat: bool, heads: int = 4, width: int = 6) -> Rows:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.zeros(shape) if flat else torch.randn(shape, generator=generator)

    logits = draw(batch, heads, 1, tokens)
    others = draw(batch, heads, 1)
    return Rows(
        logits,
        torch.logaddexp(logits.logsumexp(-1), others),
        torch.ones(batch, 1, dtype=torch.bool),
        keys=draw(batch, heads, tokens, width),
        values=draw(batch, heads, tokens, width) + float(flat),
        query_values=draw(batch, heads, 1, width) + float(flat),
    )


def make_view(stage: str, batch: int, tokens: int, seed: int = 0, flat: bool = False, layer: int | None = None):
    index = torch.arange(tokens).expand(batch, -1).clone()
    rows = make_rows(batch, tokens, seed, flat)
    common = {"index": index, "sizes": (tokens,), "carry": {}}
    if stage == "encode":
        # the last cut is after block depth - 2
        hidden, special, layer = torch.zeros(batch, tokens, 8), torch.zeros(batch, 1, 8), 4 if layer is None else layer
        at = {"layer": layer, "depth": 6, "remaining": 4 - layer}
        return EncodeView(**common, **at, hidden=hidden, special=special, rows=rows)
    if stage == "select":
        ordinal = torch.zeros(batch, dtype=torch.long)
        features = torch.randn(batch, tokens, 8, generator=torch.Generator().manual_seed(seed))
        return SelectView(**common, features=features, ordinal=ordinal, text=[torch.zeros(3, 8)] * batch)
    if stage == "prefill":
        return PrefillView(**common, layer=2 if layer is None else layer, depth=8, rows=rows, computed=(tokens,) * 2)
    return DecodeView(**common, layer=3, depth=8, rows=rows, survived=torch.ones(batch, tokens, dtype=torch.bool))


def rows_of(rows: Rows, at: int) -> Rows:
    return Rows(**{f.name: None if (t := getattr(rows, f.name)) is None else t[at : at + 1] for f in dataclasses.fields(Rows)})


def single(view, at: int):
    """The view of one of a view's items alone."""
    changes = {"index": view.index[at : at + 1], "carry": {k: v[at : at + 1] for k, v in view.carry.items()}}
    if getattr(view, "rows", None) is not None:
        changes["rows"] = rows_of(view.rows, at)
    for name in ("features", "hidden", "ordinal", "text", "survived"):
        if getattr(view, name, None) is not None:
            changes[name] = getattr(view, name)[at : at + 1]
    return dataclasses.replace(view, **changes)


def answer(strategy: Pruner, stage: str, view) -> list[list[int]] | None:
    keep = getattr(strategy, stage)(view)
    return None if keep is None else [row[:n].tolist() for row, n in zip(keep.indices, counts_of(keep), strict=True)]


def counts_of(keep) -> list[int]:
    return keep.counts or [len(row) for row in keep.indices]


def after_cut(keep: int | float, tokens: int, view) -> int:
    return tokens_after_cut(budget_tokens(keep, tokens), tokens, view.layer, view.depth)


# name: (stage, strategy for a budget, count that must be left)
CASES = {
    "flowcut": ("encode", lambda keep: FlowCut(keep=keep), lambda keep, view: budget_tokens(keep, view.tokens)),
    "flowcut-decoder": (
        "prefill",
        lambda keep: FlowCut(keep=1.0, decoder_keep=keep),
        lambda keep, view: budget_tokens(keep, view.tokens),
    ),
    "fastv": ("prefill", lambda keep: FastV(keep=keep), lambda keep, view: after_cut(keep, view.tokens, view)),
    "fastv-after": ("prefill", lambda keep: FastV(after=keep), lambda keep, view: budget_tokens(keep, view.tokens)),
    "evict": ("decode", lambda keep: Evict(keep=keep), lambda keep, view: budget_tokens(keep, view.tokens)),
    "random": ("select", lambda keep: Random(keep=keep), lambda keep, view: budget_tokens(keep, view.tokens)),
    "uniform": ("select", lambda keep: Uniform(keep=keep), lambda keep, view: budget_tokens(keep, view.tokens)),
}
each_case = pytest.mark.parametrize("case", sorted(CASES))


def test_every_shipped_strategy_is_covered():
    """Here, or in a file of its own."""
    own = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")}
    # test_schedules.py, test_videos.py
    elsewhere = {"gsearch", "psigmoid", "evs", "framedrop", "dycoke", "quota"}
    assert {name.split("-")[0] for name in CASES} | elsewhere | (own & set(SHIPPED)) == set(SHIPPED)


@each_case
@quick
@given(
    st.integers(1, 3),
    st.integers(1, 30),
    st.one_of(st.integers(1, 40), st.floats(0.01, 1.0)),
    st.integers(0, 5),
    st.booleans(),
)
def test_strategy_keeps_exactly_its_budget(case, batch, tokens, keep, seed, flat):
    stage, make, expected = CASES[case]
    strategy, view = make(keep), make_view(stage, batch, tokens, seed, flat)
    try:
        k = expected(keep, view)
    except BudgetError:
        with pytest.raises(BudgetError):
            getattr(strategy, stage)(view)
        return
    before = copy.deepcopy(strategy)
    kept = answer(strategy, stage, view)
    if kept is None:  # the stage's way to say that all stay
        assert k == tokens
        kept = [list(range(tokens))] * batch
    assert len(kept) == batch
    for row in kept:
        assert row == sorted(set(row)) and len(row) == k
        assert row[0] >= 0 and row[-1] < tokens
    # no state is left behind, neither in a field nor beside the fields
    assert strategy == before and vars(strategy) == vars(before)
    # and the same question gets the same answer, from it and from a fresh one
    for other in (strategy, make(keep)):
        again = answer(other, stage, make_view(stage, batch, tokens, seed, flat))
        assert (again or [list(range(tokens))] * batch) == kept
    for at in range(batch):
        alone = answer(strategy, stage, single(make_view(stage, batch, tokens, seed, flat), at))
        assert (alone or [list(range(tokens))]) == [kept[at]]


@each_case
def test_strategy_does_not_write_into_what_it_sees(case):
    stage, make, _ = CASES[case]
    view, untouched = make_view(stage, 2, 12), make_view(stage, 2, 12)
    getattr(make(9), stage)(view)
    assert torch.equal(view.index, untouched.index)
    if getattr(view, "rows", None) is not None:
        for f in dataclasses.fields(Rows):
            assert torch.equal(getattr(view.rows, f.name), getattr(untouched.rows, f.name)), f.name
    if stage == "select":
        assert torch.equal(view.features, untouched.features)


@pytest.mark.parametrize("case", [name for name in sorted(CASES) if CASES[name][0] != "select"])
def test_equal_scores_keep_the_first_tokens(case):
    stage, make, expected = CASES[case]
    view = make_view(stage, 2, 16, flat=True)
    kept = answer(make(9), stage, view)
    assert kept == [list(range(expected(9, view)))] * 2


@each_case
@pytest.mark.parametrize("keep", [1, 7, 0.01, 1.0])
def test_an_image_of_one_token_keeps_it(case, keep):
    stage, make, _ = CASES[case]
    assert answer(make(keep), stage, make_view(stage, 1, 1)) in (None, [[0]])


def test_rows_know_that_other_keys_took_their_share():
    rows = make_rows(2, 9, 0, flat=False)
    total = rows.attention().sum(-1)
    assert bool((total < 1).all()) and bool((total > 0).all())


# ---------------------------------------------------------------------- each strategy's own rule


def test_fastv_and_evict_follow_the_mean_attention():
    for stage, strategy in (("prefill", FastV(after=3)), ("decode", Evict(keep=3))):
        view = make_view(stage, 2, 10, seed=4)
        weights = view.rows.attention().mean((1, 2))
        assert answer(strategy, stage, view) == [best(row, 3) for row in weights.tolist()]
        # one head that stares at a token decides, as its weight there is near 1
        view.rows.logits[:, 0, 0, 7] = 40.0
        view.rows.lse = view.rows.logits.logsumexp(-1)
        assert all(7 in row for row in answer(strategy, stage, view))


def test_fastv_never_keeps_what_the_last_token_cannot_see():
    view = make_view("prefill", 1, 6, seed=1)
    view.rows.logits[..., :3] = -math.inf
    assert answer(FastV(after=3), "prefill", view) == [[3, 4, 5]]


def test_flowcut_carries_its_score_to_the_next_block():
    strategy, first = FlowCut(keep=4), make_view("encode", 2, 12, seed=0, layer=1)
    assert strategy.encode(first) is None  # depth 6: cuts after blocks 0, 2 and 4
    second = make_view("encode", 2, 12, seed=1, layer=3)
    second.carry = dict(first.carry)
    assert strategy.encode(second) is None
    fresh = make_view("encode", 2, 12, seed=1, layer=3)
    strategy.encode(fresh)
    torch.testing.assert_close(second.carry["flow"], 0.5 * first.carry["flow"] + 0.5 * fresh.carry["flow"])


def test_flowcut_adaptive_cut_differs_between_images_and_never_undershoots():
    strategy, view = FlowCut(keep=4), make_view("encode", 3, 40, layer=2)
    # the first image's CLS stares at one patch, the second's is flat, the third's in between
    view.rows.logits[0, :, :, 5] = 30.0
    view.rows.logits[1] = 0.0
    view.rows.lse = view.rows.logits.logsumexp(-1)
    counts = [len(row) for row in answer(strategy, "encode", view)]
    assert counts[0] < counts[2] < counts[1] == 40
    assert counts[0] == 40 - round((40 - 4) / math.sqrt(2))
    assert 5 in answer(strategy, "encode", view)[0]


def test_flowcut_stops_scoring_once_the_budget_is_met():
    view = make_view("encode", 2, 9, layer=0)
    assert FlowCut(keep=9).encode(view) is None
    assert view.carry == {}


@pytest.mark.parametrize("depth", range(2, 27))
def test_flowcut_asks_for_rows_up_to_the_last_cut_alone(depth):
    assert sorted(FlowCut().encode_needs(Encoder(depth, depth + 1, True))) == list(range(depth - 1))
    assert sorted(FlowCut().encode_needs(Encoder(depth, depth + 1, False))) == list(range(depth))
    windowed = frozenset(range(0, depth, 2))
    assert sorted(FlowCut().encode_needs(Encoder(depth, depth, False, 4, windowed))) == list(range(1, depth, 2))


def test_flowcut_survives_a_semantic_softmax_that_cls_takes_whole():
    view = make_view("encode", 1, 6, layer=4)
    view.rows.query_values *= 1e4
    kept = answer(FlowCut(keep=3), "encode", view)
    assert len(kept[0]) == 3
    assert bool(torch.isfinite(view.carry["flow"]).all())


def test_random_depends_on_seed_size_and_place_alone():
    def draw(seed: int, tokens: int, ordinals: list[int]) -> list[list[int]]:
        view = make_view("select", len(ordinals), tokens, seed=tokens)
        view.ordinal = torch.tensor(ordinals)
        return answer(Random(keep=8, seed=seed), "select", view)

    torch.manual_seed(1)
    first = draw(0, 60, [0, 1, 0])
    assert first[0] == first[2] != first[1]
    state = torch.random.get_rng_state()
    assert draw(0, 60, [1]) == [first[1]]
    # the user's own random stream is left alone
    assert torch.equal(state, torch.random.get_rng_state())
    assert draw(1, 60, [0]) != [first[0]]
    # every token is drawn sooner or later
    assert set().union(*(draw(seed, 20, [0])[0] for seed in range(30))) == set(range(20))


def test_uniform_is_spread():
    assert answer(Uniform(keep=4), "select", make_view("select", 2, 16)) == [[2, 6, 10, 14]] * 2


# ---------------------------------------------------------------------- the interface


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_describe_and_settings_name_every_field(name):
    strategy = available()[name]()
    assert list(strategy.settings()) == ["name", *(field.name for field in dataclasses.fields(strategy))]
    assert json.loads(json.dumps(strategy.settings()))["name"] == name
    assert strategy.describe().startswith(f"{name}(") and "keep=" in strategy.describe()
    assert type(strategy).paper and type(strategy).positions in ("original", "compact")


@pytest.mark.parametrize(
    ("strategy", "stages"),
    [
        (FlowCut(), ("encode",)),
        (FlowCut(decoder_keep=8), ("encode", "prefill")),
        (FastV(), ("prefill",)),
        (Evict(), ("decode",)),
        (Random(), ("select",)),
        (Uniform(), ("select",)),
        (FlowCut() + Uniform() + FastV() + Evict(), ("encode", "select", "prefill", "decode")),
    ],
)
def test_stages(strategy, stages):
    assert strategy.stages() == stages
    for stage in ("encode", "select", "prefill", "decode"):
        part = strategy.part(stage)
        assert (part is not None) == (stage in stages)


def test_pipeline_flattens_and_takes_compact_from_any_part():
    nested = Evict() + (FastV() + FlowCut(newlines="none"))
    assert isinstance(nested, Pipeline) and [p.name for p in nested.parts] == ["evict", "fastv", "flowcut"]
    assert nested.positions == "compact" and (Evict() + FastV()).positions == "original"
    assert (MustDrop().only("encode") + FastV()).requires == {"cls"} and nested.requires == frozenset()
    assert not nested.separators and not FlowCut(newlines="none").only("encode").separators and FlowCut().separators


@pytest.mark.parametrize(
    ("strategy", "sizes", "asks"),
    [
        (Uniform(keep=9), (9,), False),
        (Uniform(keep=9), (9, 10), True),
        (Uniform(keep=1.0), (9,), False),
        (Uniform(keep=0.99), (9,), False),  # rounds to all nine
        (FastV(keep=1, after=9), (9,), False),
        (FastV(keep=1.0, after=8), (9,), True),
        (FlowCut(keep=1.0, decoder_keep=8), (9,), True),
        (FlowCut(keep=8, decoder_keep=1.0), (9,), True),
        (Uniform(keep=1.0) + Evict(keep=3), (9,), True),
        (Uniform(keep=1.0) + Evict(keep=1.0), (9,), False),
    ],
)
def test_asks_to_prune(strategy, sizes, asks):
    assert strategy.asks_to_prune(sizes) is asks
