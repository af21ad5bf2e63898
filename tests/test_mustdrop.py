"""MustDrop: its parts against slow loops, its stages on views made by hand, its budgets on a tiny model."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import TOKENS, batch, images, prompt, tiny_llava

import vtprune
from vtprune.ladder import stage_count
from vtprune.merge import merge_windows, window_similarity, windows
from vtprune.pruner import (
    BudgetError,
    DecodeView,
    Encoder,
    EncodeView,
    Model,
    Needs,
    PrefillView,
    Rows,
    UnsupportedError,
    budget_tokens,
)
from vtprune.select import chosen
from vtprune.strategies.mustdrop import MustDrop

quick = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def draw(shape: tuple[int, ...], seed: int, levels: int | None = None) -> torch.Tensor:
    """Random numbers; with `levels` of that many values, so that ties are the rule."""
    generator = torch.Generator().manual_seed(seed)
    if levels is None:
        return torch.randn(shape, generator=generator)
    return torch.randint(0, levels, shape, generator=generator).float()


# ---------------------------------------------------------------------- merging


def make_encode(hidden: torch.Tensor, grid, layer: int = 0, rows: Rows | None = None) -> EncodeView:
    index = torch.arange(hidden.shape[1]).repeat(hidden.shape[0], 1)
    special = torch.zeros(hidden.shape[0], 1, hidden.shape[2], dtype=hidden.dtype)
    sizes = (hidden.shape[1],)
    return EncodeView(index, sizes, {}, layer=layer, depth=5, hidden=hidden, special=special, rows=rows, grid=grid)


def slow_windows(grid: tuple[int, int], w: int) -> list[list[int]]:
    rows, columns = grid
    return [
        [(y + dy) * columns + x + dx for dy in range(w) for dx in range(w)]
        for y in range(0, rows, w)
        for x in range(0, columns, w)
    ]


def slow_similarity(hidden: torch.Tensor, members: list[int]) -> float:
    """Mean cosine over ordered pairs of different patches."""
    unit = [hidden[j].double() / hidden[j].double().norm().clamp(min=1e-12) for j in members]
    pairs = [float(unit[p] @ unit[q]) for p in range(len(unit)) for q in range(len(unit)) if p != q]
    return sum(pairs) / len(pairs)


@quick
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(2, 3),
    st.integers(0, 9),
    st.sampled_from(DTYPES),
    st.sampled_from([None, 2]),
    st.integers(0, 9),
)
def test_merging_follows_the_paper(items, down, across, w, seed, dtype, levels, most):
    grid = (down * w, across * w)
    tokens = grid[0] * grid[1]
    hidden = (draw((items, tokens, 4), seed, levels) + 0.7).to(dtype)
    members = windows(grid, w)
    assert members.tolist() == slow_windows(grid, w)
    similarity = window_similarity(hidden, members)
    answer = merge_windows(hidden, members, 0.6, most)
    assert answer.ordered
    for item in range(items):
        exact = [slow_similarity(hidden[item], m) for m in members.tolist()]
        torch.testing.assert_close(similarity[item], torch.tensor(exact), atol=2e-6, rtol=0)
        found = similarity[item].tolist()
        merged = [i for i in sorted(range(len(found)), key=lambda i: (-found[i], i)) if found[i] >= 0.6][:most]
        inside = {j: int(members[i, 0]) for i in merged for j in members[i].tolist()}
        order = [int(members[i, 0]) for i in merged] + [j for j in range(tokens) if j not in inside]
        assert answer.indices[item].tolist() == order
        assert answer.into[item].tolist() == [t if (t := inside.get(j, j)) != j else -1 for j in range(tokens)]
        expected = [hidden[item, members[i]].double().mean(0) for i in merged]
        expected += [hidden[item, j].double() for j in order[len(merged) :]]
        assert answer.hidden[item].dtype == dtype
        torch.testing.assert_close(answer.hidden[item], torch.stack(expected).to(dtype), atol=1e-6, rtol=1e-2)
        # the untouched ones are not so much as rounded
        assert torch.equal(answer.hidden[item][len(merged) :], hidden[item, order[len(merged) :]])


def test_each_image_merges_its_own_windows():
    # a deliberate difference from the published code, which merges as many as the least mergeable image of the batch
    hidden = torch.stack([torch.ones(36, 4), draw((36, 4), 0), torch.ones(36, 4)])
    hidden[2, 0] = -1.0
    together = MustDrop().encode(make_encode(hidden, (6, 6)))
    assert [len(row) for row in together.indices] == [4, 36, 12]
    for item in range(3):
        alone = MustDrop().encode(make_encode(hidden[item : item + 1], (6, 6)))
        assert torch.equal(alone.indices[0], together.indices[item]) and torch.equal(alone.hidden[0], together.hidden[item])


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_patches_merge_in_raster_order(dtype):
    answer = MustDrop().encode(make_encode(torch.ones(1, 36, 4, dtype=dtype), (6, 6)))
    assert answer.indices[0].tolist() == [0, 3, 18, 21]
    assert torch.equal(answer.hidden[0], torch.ones(4, 4, dtype=dtype))


@pytest.mark.parametrize("fill", [0.0, math.nan])
def test_patches_without_direction_do_not_merge(fill):
    answer = MustDrop().encode(make_encode(torch.full((1, 36, 4), fill), (6, 6)))
    assert answer.indices[0].tolist() == list(range(36))


@pytest.mark.parametrize(
    ("grid", "window", "side", "words"),
    [
        ((16, 16), 3, 2, "window=3 does not divide the grid of (16, 16); 2 x 2 windows were merged"),
        ((6, 9), 3, 3, None),
        ((4, 6), 3, 2, "2 x 2 windows"),
        ((5, 7), 3, 1, "no windows were merged"),
        ((6, 6), 4, 3, "3 x 3 windows"),
        ((6, 6), 1, 1, None),
        (None, 3, 1, "form no grid"),
        ((5, 5), 3, 1, "form no grid"),  # 36 patches
    ],
)
def test_grids(grid, window, side, words):
    tokens = math.prod(grid) if grid and grid != (5, 5) else 36
    view = make_encode(torch.ones(1, tokens, 4), grid)
    answer = MustDrop(window=window).encode(view)
    assert (tokens if answer is None else len(answer.indices[0])) == tokens // side**2
    assert len(view.notes) == (words is not None)
    assert words is None or words in view.notes[0]


@pytest.mark.parametrize("keep", [1, 3, 4, 5, 12, 13, 35, 0.5, 36, 100, 1.0])
def test_merging_stops_at_the_budget(keep):
    answer = MustDrop(keep=keep).encode(make_encode(torch.ones(1, 36, 4), (6, 6)))
    target = budget_tokens(keep, 36)
    left = 36 - 8 * min(4, (36 - target) // 8)
    assert (answer is None and target == 36) or len(answer.indices[0]) == left >= target


# ---------------------------------------------------------------------- the key set


@quick
@given(st.integers(1, 3), st.integers(1, 40), st.sampled_from([0.0, 0.08, 0.5, 1.0]), st.sampled_from([None, 2]))
def test_key_set(items, tokens, rate, levels):
    logits = draw((items, 2, 1, tokens), tokens, levels)
    rows = Rows(logits, logits.logsumexp(-1) + 0.5, torch.ones(items, 1, dtype=torch.bool))
    view = make_encode(torch.zeros(items, tokens, 4), None, layer=5, rows=rows)
    assert MustDrop(key_rate=rate).encode(view) is None
    for item in range(items):
        score = rows.attention()[item, :, 0].mean(0).tolist()
        best = sorted(range(tokens), key=lambda j: (-score[j], j))[: math.ceil(rate * tokens)]
        assert view.carry["key"][item].nonzero()[:, 0].tolist() == sorted(best)


def test_key_set_without_attention_is_the_first_patches():
    rows = Rows(torch.full((1, 2, 1, 30), math.nan), torch.zeros(1, 2, 1), torch.ones(1, 1, dtype=torch.bool))
    view = make_encode(torch.zeros(1, 30, 4), None, layer=5, rows=rows)
    MustDrop().encode(view)
    assert view.carry["key"][0].nonzero()[:, 0].tolist() == [0, 1, 2]


# ---------------------------------------------------------------------- the filter


def make_prefill(
    items=2, tokens=20, text=4, seed=0, levels=None, key=(), layer=3, depth=32, valid=None, computed=None
) -> PrefillView:
    logits = draw((items, 3, text, tokens), seed, levels)
    lse = torch.logaddexp(logits.logsumexp(-1), torch.full((items, 3, text), 2.0))
    valid = torch.ones(items, text, dtype=torch.bool) if valid is None else valid
    logits = logits.masked_fill(~valid[:, None, :, None], -math.inf)
    carry = {"key": torch.zeros(items, tokens, dtype=torch.bool).index_fill_(1, torch.tensor(key, dtype=torch.long), True)}
    return PrefillView(
        torch.arange(tokens).repeat(items, 1),
        (tokens,),
        carry,
        layer=layer,
        depth=depth,
        rows=Rows(logits, lse, valid),
        computed=(tokens,) * layer if computed is None else computed,
    )


def kept(strategy: MustDrop, view: PrefillView) -> list[list[int]]:
    answer = strategy.prefill(view)
    if answer is None:
        return view.index.tolist()
    assert not answer.ordered and answer.hidden is None and answer.into is None
    return [row.tolist() for row in answer.indices]


def slow_statistics(view: PrefillView, item: int) -> tuple[list[float], list[float]]:
    """Sum and maximum over valid text rows of the head mean, in float64."""
    weights = torch.exp(view.rows.logits[item].double() - view.rows.lse[item].double()[..., None])
    rows = [r for r in range(weights.shape[1]) if view.rows.valid[item, r]]
    mean = [[sum(float(w) for w in weights[:, r, j]) / weights.shape[0] for r in rows] for j in range(weights.shape[2])]
    return [sum(m) for m in mean], [max(m, default=0.0) for m in mean]


@quick
@given(
    st.integers(1, 3),
    st.integers(1, 25),
    st.integers(1, 5),
    st.integers(0, 9),
    st.sampled_from([(0.03, 0.02), (0.06, 0.05), (1.0, 0.0), (1.0, 1.1), (0.0, 1.0)]),
    st.booleans(),
)
def test_thresholds_follow_the_paper(items, tokens, text, seed, thresholds, protect):
    gamma, alpha = thresholds
    key = [0, tokens - 1] if protect else []
    view = make_prefill(items, tokens, text, seed, key=key)
    view.rows.valid[0, 1:] = False
    view.rows.logits[0, :, 1:] = -math.inf
    answer = kept(MustDrop(global_thr=gamma, individual_thr=alpha), view)
    for item in range(items):
        total, highest = slow_statistics(view, item)
        expected = [
            j for j in range(tokens) if not (total[j] < gamma * sum(total) - 1e-9 and highest[j] < alpha - 1e-9) or j in key
        ]
        assert answer[item] == expected


@pytest.mark.parametrize("fields", [{"global_thr": 1.0, "individual_thr": 0.0}, {"global_thr": 0.0, "individual_thr": 1.0}])
def test_a_threshold_of_zero_drops_nothing(fields):
    assert MustDrop(**fields).prefill(make_prefill()) is None
    assert not MustDrop(**fields, merge=False).asks_to_prune((20,))
    assert not MustDrop(**fields, sim_thr=1.01).asks_to_prune((20,))
    assert not MustDrop(**fields, window=1).asks_to_prune((20,))
    assert MustDrop(**fields).asks_to_prune((20,))


def test_a_token_at_a_threshold_stays():
    # one text token that looks at four visual tokens with exactly 1, 1, 0 and 0
    view = make_prefill(1, 4, 1)
    view.rows.logits[:] = torch.tensor([0.0, 0.0, -math.inf, -math.inf])
    view.rows.lse[:] = 0.0
    for gamma, alpha, expected in ((0.5, 2.0, [0, 1]), (0.75, 1.0, [0, 1]), (0.75, 2.0, []), (1e-6, 1e-6, [0, 1])):
        assert kept(MustDrop(global_thr=gamma, individual_thr=alpha), view) == [expected]


def test_everything_may_leave():
    assert kept(MustDrop(global_thr=1.0, individual_thr=1.1), make_prefill()) == [[], []]


@pytest.mark.parametrize("text", [0, 3])
@pytest.mark.parametrize("keep", [None, 5])
def test_no_text_after_the_image(text, keep):
    view = make_prefill(text=text, valid=torch.zeros(2, text, dtype=torch.bool), key=[7])
    answer = kept(MustDrop(keep=keep), view)
    assert "no text after its image" in view.notes[0]
    if keep is None:
        assert answer == [list(range(20))] * 2
    else:
        k = stage_count(5, view.computed, [3, 7, 11, 15], 32, 0.9, 1)
        assert k == 4 and answer == [[0, 1, 2, 7]] * 2


@pytest.mark.parametrize("fill", [math.nan, -math.inf])
def test_no_attention(fill):
    # all-zero or undefined attention: shares of nothing, so the test drops nothing; NaN tokens count as unattended
    view = make_prefill()
    view.rows.logits[:] = fill
    view.rows.lse[:] = 0.0
    assert MustDrop().prefill(view) is None and view.notes == []
    assert [len(row) for row in kept(MustDrop(keep=5), view)] == [4, 4]
    view = make_prefill()
    view.rows.logits[..., 4] = math.nan
    assert all(4 not in row for row in kept(MustDrop(global_thr=1e-6, individual_thr=1.0), view))


# ---------------------------------------------------------------------- budgets


@quick
@given(
    st.integers(1, 3),
    st.integers(2, 30),
    st.integers(0, 9),
    st.sampled_from([(0.0012, 0.001), (0.011, 0.01), (0.0, 0.5), (0.5, 0.0)]),
    st.sampled_from([None, 2]),
    st.data(),
)
def test_budget_keeps_the_best_by_the_papers_test(items, tokens, seed, thresholds, levels, data):
    gamma, alpha = thresholds
    keep = data.draw(st.integers(1, tokens - 1))
    key = data.draw(st.lists(st.integers(0, tokens - 1), max_size=2, unique=True))
    strategy = MustDrop(keep=keep, global_thr=gamma, individual_thr=alpha)
    view = make_prefill(items, tokens, 3, seed, levels, key=key)
    try:
        k = stage_count(keep, view.computed, [3, 7, 11, 15], 32, 0.9, max(1, len(key)))
    except BudgetError:
        with pytest.raises(BudgetError, match=r"lower key_rate"):
            strategy.prefill(view)
        return
    answer = kept(strategy, view)
    for item in range(items):
        assert answer[item] == sorted(set(answer[item])) and len(answer[item]) == k
        assert set(key) <= set(answer[item])
        total, highest = slow_statistics(view, item)
        # what is left out passes no test that what is kept fails, at any scale of the thresholds
        share, single = [t / sum(total) for t in total], highest
        if gamma and alpha:
            score = [max(x / gamma, y / alpha) for x, y in zip(share, single, strict=True)]
        else:
            score = single if gamma else share
        left = [score[j] for j in range(tokens) if j not in answer[item]]
        worst = min((score[j] for j in answer[item] if j not in key), default=math.inf)
        assert max(left, default=-math.inf) <= worst * (1 + 1e-4)


def test_ties_go_to_the_first():
    view = make_prefill(1, 20, 3, levels=1, key=[17])
    (answer,) = kept(MustDrop(keep=10), make_prefill(1, 20, 3, levels=1, key=[17]))
    assert answer == [*range(len(answer) - 1), 17]
    assert len(answer) == stage_count(10, view.computed, [3, 7, 11, 15], 32, 0.9, 1)


def spend(target: int, entering: int, cuts: list[int], depth: int, later: float, least: int) -> list[int]:
    """Tokens per layer under `stage_count`."""
    computed = [entering] * cuts[0]
    for at, cut in enumerate(cuts):
        end = [*cuts[1:], depth][at]
        k = stage_count(target, tuple(computed), cuts[at:], depth, later, least)
        assert least <= k <= computed[-1]
        computed += [k] * (end - cut)
    return computed


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.integers(2, 48), st.integers(2, 700), st.data())
def test_the_budget_is_spent_to_half_a_token(depth, entering, data):
    cuts = sorted(data.draw(st.sets(st.integers(1, depth - 1), min_size=1, max_size=5)))
    target = data.draw(st.integers(1, entering - 1))
    later = data.draw(st.sampled_from([1.0, 0.9, 0.5, 0.1, 0.001]))
    least = data.draw(st.integers(1, entering))
    cost = cuts[0] * entering + (depth - cuts[0]) * least
    if cost - target * depth > depth / 2:
        with pytest.raises(BudgetError, match=r"Raise keep to at least (\d+)") as error:
            spend(target, entering, cuts, depth, later, least)
        offered = int(str(error.value).split("at least ")[1].split(",")[0])
        assert offered > target and cost <= offered * depth
        if offered < entering:
            assert abs(sum(spend(offered, entering, cuts, depth, later, least)) / depth - offered) <= 0.5
        return
    computed = spend(target, entering, cuts, depth, later, least)
    assert len(computed) == depth and computed == sorted(computed, reverse=True)
    assert abs(sum(computed) / depth - target) <= 0.5


def test_stage_counts_of_llava():
    # 32 layers, 440 of 576 patches left after merging, 36 key tokens; the paper's 64 is 76 by what layers compute on
    computed = spend(76, 440, [3, 7, 11, 15], 32, 0.9, 36)
    assert [computed[layer] for layer in (2, 3, 7, 11, 15, 31)] == [440, 48, 41, 36, 36, 36]
    assert sum(computed) == 76 * 32
    # without a key set each cut leaves nine tenths of the one before
    computed = spend(192, 440, [3, 7, 11, 15], 32, 0.9, 1)
    assert [computed[layer] for layer in (2, 3, 7, 11, 15, 31)] == [440, 208, 187, 168, 151, 151]
    with pytest.raises(BudgetError, match=r"3 layers before the first cut alone cost 41.2, and 36 tokens"):
        spend(64, 440, [3, 7, 11, 15], 32, 0.9, 36)


@pytest.mark.parametrize("keep", [20, 21, 1.0])
def test_the_whole_image_is_left_alone(keep):
    strategy = MustDrop(keep=keep)
    assert strategy.prefill(make_prefill()) is None
    assert strategy.encode(make_encode(torch.ones(2, 20, 4), (4, 5))) is None
    assert not strategy.asks_to_prune((20,)) and not strategy.promises_to_prune((20,))


def test_without_the_encoder_stage_nothing_is_protected():
    view = make_prefill(1)
    view.carry.clear()
    assert kept(MustDrop(global_thr=1.0, individual_thr=1.1).only("prefill").part("prefill"), view) == [[]]


def test_counts_differ_with_the_key_sets_of_a_group():
    view = make_prefill(2, 20)
    view.carry["key"][1, :9] = True
    answer = kept(MustDrop(keep=10, later=0.1), view)
    assert set(range(9)) <= set(answer[1])
    alone = make_prefill(1, 20)
    assert kept(MustDrop(keep=10, later=0.1), alone) == [answer[0]]


# ---------------------------------------------------------------------- the cache


def test_decode_keeps_what_survived():
    survived = torch.tensor([[True, False, True, True], [False, False, False, True]])
    view = DecodeView(torch.arange(4).repeat(2, 1), (4,), {}, layer=5, depth=32, survived=survived)
    assert [row.tolist() for row in MustDrop().decode(view).indices] == [[0, 2, 3], [3]]
    assert chosen(torch.ones(2, 4, dtype=torch.bool)) is None
    assert [row.tolist() for row in chosen(torch.tensor([[False, False], [True, True]])).indices] == [[], [0, 1]]


# ---------------------------------------------------------------------- layers, fields, calibrations


@pytest.mark.parametrize(
    ("depth", "filters"),
    [(32, [2, 6, 10, 14]), (40, [2, 7, 12, 17]), (28, [1, 5, 8, 12]), (4, [0, 1]), (3, [0, 1]), (2, [0])],
)
def test_layers_scale_with_depth(depth, filters):
    strategy = MustDrop()
    assert strategy.filters(depth) == filters
    assert strategy.prefill_needs(depth) == {layer + 1: Needs("text") for layer in filters}
    assert strategy.decode_needs(depth) == {layer: Needs() for layer in range(filters[0], filters[-1] + 1)}


@given(st.integers(2, 100), st.sets(st.integers(0, 30), min_size=1))
def test_scaled_layers_are_valid(depth, layers):
    found = MustDrop(layers=sorted(layers)).filters(depth)
    assert found == sorted(set(found)) and found[0] >= 0 and found[-1] <= depth - 2


def test_one_decoder_layer_is_too_few():
    with pytest.raises(BudgetError, match="at least two decoder layers"):
        MustDrop().prefill_needs(1)


@pytest.mark.parametrize(
    ("encoder", "fields", "needs"),
    [
        ((23, 24), {}, {0: Needs(), 23: Needs("cls")}),
        ((24, 24), {}, {0: Needs(), 23: Needs("cls")}),
        ((23, 24), {"merge": False}, {23: Needs("cls")}),
        ((23, 24), {"merge_layer": 22}, {22: Needs(), 23: Needs("cls")}),
    ],
)
def test_encoder_needs(encoder, fields, needs):
    assert MustDrop(**fields).encode_needs(Encoder(*encoder, True)) == needs


@pytest.mark.parametrize(("encoder", "layer"), [((23, 24), 23), ((24, 24), 23), ((1, 1), 0)])
def test_a_merge_layer_outside_the_encoder(encoder, layer):
    with pytest.raises(BudgetError, match=f"merge_layer={layer}"):
        MustDrop(merge_layer=layer).encode_needs(Encoder(*encoder, True))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"keep": 0}, "keep=0"),
        ({"keep": math.nan}, "keep=nan"),
        ({"keep": "64"}, "keep='64'"),
        ({"global_thr": -0.1}, "global_thr=-0.1"),
        ({"global_thr": None}, "global_thr=None"),
        ({"individual_thr": math.nan}, "individual_thr=nan"),
        ({"individual_thr": math.inf}, "individual_thr=inf"),
        ({"window": 0}, "window=0"),
        ({"window": 2.5}, "window=2.5"),
        ({"window": True}, "window=True"),
        ({"sim_thr": -2}, "sim_thr=-2"),
        ({"key_rate": 1.5}, "key_rate=1.5"),
        ({"merge": 1}, "merge=1"),
        ({"merge_layer": -1}, "merge_layer=-1"),
        ({"later": 0}, "later=0"),
        ({"later": 1.1}, "later=1.1"),
        ({"layers": ()}, "layers="),
        ({"layers": 2}, "layers=2"),
        ({"layers": (6, 2)}, "layers="),
        ({"layers": (2, 2)}, "layers="),
        ({"layers": (2, 31)}, "layers="),
        ({"layers": (2, True)}, "layers="),
        ({"layers": "26"}, "layers="),
        ({"keep": 8, "global_thr": 0, "individual_thr": 0}, "both 0"),
        ({"fitted": "llava"}, "fitted='llava'"),
    ],
)
def test_bad_fields(fields, words):
    with pytest.raises(BudgetError, match=words):
        MustDrop(**fields)


def test_settings_are_json():
    strategy = MustDrop(keep=64, layers=[2, 6], fitted=Model("tiny", 4, "abc"))
    found = json.loads(json.dumps(strategy.settings()))
    assert found["fitted"] == "tiny" and found["layers"] == [2, 6] and found["name"] == "mustdrop" and found["keep"] == 64
    assert strategy.describe().startswith("mustdrop(keep=64, ") and MustDrop().settings()["fitted"] is None
    assert strategy.stages() == ("encode", "prefill", "decode") and strategy.requires == {"cls"}
    assert MustDrop().promises_to_prune((576,)) is False and MustDrop(keep=64).promises_to_prune((576,)) is True


def test_load(tmp_path):
    from vtprune import schedule

    model, data = Model("tiny", 4, "abc"), schedule.Data("questions", 8, "0" * 64)
    values = {"global_thr": 0.004, "individual_thr": 0.003, "keep": 0.2, "equivalent_tokens": 7.1}
    schedule.write(tmp_path / "fit.json", "mustdrop", model, data, values)
    strategy = MustDrop.load(tmp_path / "fit.json", window=2)
    assert strategy == MustDrop(global_thr=0.004, individual_thr=0.003, window=2, fitted=model)
    strategy.check_model(Model("the same elsewhere", 4, "abc"))
    for other in (Model("tiny", 4, "abd"), Model("tiny", 5, "abc")):
        with pytest.raises(UnsupportedError, match="calibrated on 'tiny'"):
            strategy.check_model(other)
    MustDrop().check_model(model)
    with pytest.raises(TypeError, match="global_thr"):
        MustDrop.load(tmp_path / "fit.json", global_thr=0.1)
    with pytest.raises(schedule.ScheduleError):
        MustDrop.load(tmp_path / "absent.json")


# ---------------------------------------------------------------------- on a model


@pytest.fixture(scope="module")
def llava():
    return tiny_llava(layers=8)


def inputs(*texts: int, seed: int = 0) -> dict:
    return {**batch([prompt(3, "I", n) for n in texts]), "pixel_values": images(len(texts), seed)}


@torch.no_grad()
def run(model, strategy, fed):
    with vtprune.pruning(model, strategy) as session:
        return model(**fed), session.report


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("keep", [12, 20, 35, 0.5])
def test_budget_on_a_model(attn, keep):
    model = tiny_llava(attn, layers=8)
    _, report = run(model, MustDrop(keep=keep, window=2, sim_thr=0.0), inputs(5, 9))
    target = budget_tokens(keep, TOKENS)
    for sample in report.samples:
        counts = [len(layer) for layer in sample.layers]
        assert counts == sorted(counts, reverse=True) and abs(sum(counts) / 8 - target) <= 0.5
        assert len(sample.kept) == counts[0] >= target
        # layers 0, 1, 2 and 3 of 8 filter: from the first on, caches hold the survivors alone
        assert [len(layer) for layer in sample.cached] == [counts[-1]] * 8
        assert all(sorted(c.tolist()) == sorted(sample.layers[-1].tolist()) for c in sample.cached)


@torch.no_grad()
@pytest.mark.parametrize("strategy", [MustDrop(keep=1.0), MustDrop(keep=36), MustDrop(1.0, sim_thr=-1)])
def test_nothing_changes_at_full_budget(llava, strategy):
    fed = inputs(5, 9)
    plain = llava(**fed).logits
    out, report = run(llava, strategy, fed)
    assert torch.equal(out.logits, plain) and report.equivalent_tokens == TOKENS


@torch.no_grad()
def test_thresholds_that_drop_nothing_change_nothing(llava):
    fed = inputs(5, 9)
    plain = llava(**fed).logits
    out, report = run(llava, MustDrop(global_thr=0.0, sim_thr=1.01), fed)
    assert torch.equal(out.logits, plain) and report.equivalent_tokens == TOKENS


@pytest.mark.parametrize("strategy", [MustDrop(keep=14, window=2, sim_thr=0.0), MustDrop(global_thr=0.03, individual_thr=0.02)])
def test_batch_equals_single_on_a_model(llava, strategy):
    fed = inputs(5, 9, 2)
    out, together = run(llava, strategy, fed)
    for row in range(3):
        real = fed["attention_mask"][row].bool()
        alone = {
            "input_ids": fed["input_ids"][row : row + 1, real],
            "attention_mask": fed["attention_mask"][row : row + 1, real],
            "pixel_values": fed["pixel_values"][row : row + 1],
        }
        own, report = run(llava, strategy, alone)
        for name in ("layers", "cached"):
            found, expected = (getattr(r.samples[i], name) for r, i in ((together, row), (report, 0)))
            assert [layer.tolist() for layer in found] == [layer.tolist() for layer in expected]
        assert [(b, i.tolist()) for b, i in together.samples[row].encoded] == [
            (b, i.tolist()) for b, i in report.samples[0].encoded
        ]
        assert together.samples[row].merged == report.samples[0].merged
        torch.testing.assert_close(own.logits[0, -1], out.logits[row, -1], atol=2e-4, rtol=0)


def test_a_prompt_that_ends_in_its_image(llava):
    fed = {**batch([prompt(3, "I")]), "pixel_values": images(1)}
    out, report = run(llava, MustDrop(merge=False), fed)
    assert report.equivalent_tokens == TOKENS and any("no text after its image" in note for note in report.notes)
    assert bool(torch.isfinite(out.logits).all())


def test_two_images_in_a_prompt(llava):
    fed = {**batch([prompt(2, "I", 3, "I", 4)]), "pixel_values": images(2)}
    _, report = run(llava, MustDrop(keep=12, merge=False, key_rate=0.05), fed)
    (sample,) = report.samples
    assert abs(sample.equivalent_tokens - 24) <= 0.5 and len(sample.kept) == 2 * TOKENS


def test_a_key_set_beyond_the_budget(llava):
    with pytest.raises(BudgetError, match=r"lower key_rate"):
        run(llava, MustDrop(keep=12, merge=False, key_rate=0.5), inputs(5))


def test_an_encoder_without_a_class_token():
    with pytest.raises(UnsupportedError, match="cls"), vtprune.pruning(tiny_llava(siglip=True), MustDrop(keep=12)):
        pass
