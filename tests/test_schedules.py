"""Token schedules over the decoder: the integer maths, G-Search and P-Sigmoid, and both inside a running model."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import batch, images, prompt, tiny_llava

import vtprune
from vtprune import schedule
from vtprune.ladder import cut_layers, spend, whole
from vtprune.pruner import BudgetError, Model, Needs, PrefillView, Rows, UnsupportedError
from vtprune.select import row_mean
from vtprune.strategies.gsearch import GSearch
from vtprune.strategies.psigmoid import PSigmoid, midpoint, sigmoid_counts, sigmoid_curve, sigmoid_cuts

quick = settings(max_examples=50, deadline=None, derandomize=True)
depths = st.sampled_from([4, 8, 24, 28, 32, 40])


def falling(values) -> tuple[float, ...]:
    return tuple(sorted(values, reverse=True))


@st.composite
def rate_curves(draw, least: float = 0.0):
    depth = draw(depths)
    share = st.one_of(st.floats(least, 1.0), st.sampled_from([0.25, 0.5, 1.0]))
    return (1.0, 1.0, *falling(draw(st.lists(share, min_size=depth - 2, max_size=depth - 2))))


# ---------------------------------------------------------------------- ladder.py


@quick
@given(st.lists(st.integers(0, 6), min_size=3, max_size=9), st.integers(1, 4), st.integers(0, 2))
def test_the_staircase_is_the_nearest(values, cuts, first):
    curve = falling(value / 6 for value in values)
    found = cut_layers(curve, cuts, first)

    def error(starts):
        stairs = [curve[a:b] for a, b in itertools.pairwise([*starts, len(curve)])]
        return sum((value - sum(stair) / len(stair)) ** 2 for stair in stairs for value in stair)

    assert found[0] == first and list(found) == sorted(set(found)) and len(found) <= cuts
    others = range(first + 1, len(curve))
    least = min(error((first, *more)) for n in range(cuts) for more in itertools.combinations(others, n))
    assert error(found) == pytest.approx(least, abs=1e-12)


def test_a_curve_of_few_stairs_is_its_own_staircase():
    curve = (1.0, 1.0, 0.5, 0.5, 0.5, 0.2, 0.2)
    assert cut_layers(curve, None, 2) == cut_layers(curve, 6, 2) == cut_layers(curve, 2, 2) == (2, 5)
    assert cut_layers(curve, 1, 2) == (2,)
    assert cut_layers((1.0,) * 4, 3, 4) == ()


@quick
@given(st.lists(st.tuples(st.floats(1, 12), st.integers(1, 5)), min_size=1, max_size=3), st.integers(-4, 4))
def test_whole_numbers_against_trying_all(stairs, shift):
    values, lengths = falling(value for value, _ in stairs), [length for _, length in stairs]
    total = round(sum(v * n for v, n in zip(values, lengths, strict=True))) + shift

    def measure(counts):
        change = sum(n * (c - v) ** 2 for c, v, n in zip(counts, values, lengths, strict=True))
        return abs(sum(c * n for c, n in zip(counts, lengths, strict=True)) - total), change

    counts = whole(values, lengths, total, 12)
    assert list(counts) == sorted(counts, reverse=True) and counts[-1] >= 1 and counts[0] <= 12
    choices = itertools.combinations_with_replacement(range(12, 0, -1), len(values))
    near = [c for c in choices if all(math.floor(v) - 4 <= n <= math.floor(v) + 5 for n, v in zip(c, values, strict=True))]
    best = min(map(measure, near))
    assert measure(counts)[0] == best[0]
    # near the values it is the least change, too
    near = [c for c in near if all(abs(n - v) < 1 for n, v in zip(c, values, strict=True))]
    if near and min(map(measure, near))[0] == best[0]:
        assert measure(counts)[1] <= min(map(measure, near))[1] + 1e-9


@quick
@given(st.integers(2, 40), st.integers(2, 2000), st.data())
def test_spend(depth, tokens, data):
    first = data.draw(st.integers(1, depth - 1))
    cuts = (first, *sorted(data.draw(st.sets(st.integers(first, depth - 1), max_size=5)) - {first}))
    total = data.draw(st.integers(1, tokens * depth))
    slope = data.draw(st.floats(0.0, 2.0))
    least = first * tokens + depth - first

    def run():
        return spend(lambda x: [x * math.exp(-slope * i) for i in range(depth)], cuts, total, tokens, depth, 0.0, 1e40)

    if total < least:
        with pytest.raises(BudgetError) as caught:
            run()
        need = int(str(caught.value).split("Raise keep to at least ")[1].split(" ")[0])
        assert need * depth >= least > (need - 1) * depth
        return
    counts = run()
    assert len(counts) == depth and counts[:first] == (tokens,) * first
    assert list(counts) == sorted(counts, reverse=True) and counts[-1] >= 1
    assert {i for i in range(1, depth) if counts[i] != counts[i - 1]} <= set(cuts)
    assert abs(sum(counts) - total) <= depth / 2
    assert len(cuts) < depth - first or sum(counts) == total


# ---------------------------------------------------------------------- views made by hand


def make_view(layer, depth, entered, tokens, items=1, sizes=None, seed=0, rows=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(items, 4, rows, tokens, generator=generator).to(dtype)
    valid = torch.ones(items, rows, dtype=torch.bool)
    if items > 1:
        valid[1, :1] = False
        logits[1, :, :1] = -math.inf
    lse = torch.logaddexp(logits.float().logsumexp(-1), torch.zeros(())).masked_fill(~valid[:, None], 0.0)
    index = torch.arange(tokens).expand(items, -1)
    computed = (entered,) * (layer - 1) + (tokens,)
    return PrefillView(
        index, sizes or (entered,), {}, layer=layer, depth=depth, rows=Rows(logits, lse, valid), computed=computed
    )


def cascade(strategy, depth, entered, sizes=None, items=1) -> list[int]:
    """Tokens that each layer computes on."""
    needs, counts, tokens = strategy.prefill_needs(depth), [], entered
    for layer in range(depth):
        if layer in needs:
            keep = strategy.prefill(make_view(layer, depth, entered, tokens, items, sizes, seed=layer))
            if keep is not None:
                assert keep.indices.shape[0] == items and keep.indices.shape[1] < tokens
                for row in keep.indices.tolist():
                    assert row == sorted(set(row)) and row[0] >= 0 and row[-1] < tokens
                tokens = keep.indices.shape[1]
        counts.append(tokens)
    return counts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_score_is_the_mean_over_heads_and_real_rows(dtype):
    view = make_view(2, 8, 9, 9, items=2, dtype=dtype)
    score = row_mean(view.rows)
    logits, lse, valid = view.rows.logits.double(), view.rows.lse.double(), view.rows.valid
    assert score.dtype == torch.float32
    for b in range(2):
        real = [r for r in range(3) if valid[b, r]]
        for j in range(9):
            weights = [math.exp(logits[b, h, r, j] - lse[b, h, r]) for h in range(4) for r in real]
            assert score[b, j].item() == pytest.approx(sum(weights) / len(weights), rel=1e-5)


@pytest.mark.parametrize("make", [lambda: GSearch(rates=(1, 1, 0.5, 0.5)), lambda: PSigmoid(keep=0.75)])
@pytest.mark.parametrize("what", ["flat", "zero", "nan", "no text", "no rows"])
def test_scores_without_information_keep_the_first_tokens(make, what):
    view = make_view(2, 4, 12, 12, items=2)
    view.rows.logits.fill_({"flat": 0.0, "nan": math.nan}.get(what, -math.inf))
    view.rows.lse.zero_()
    if what == "no text":
        view.rows.valid.fill_(False)
    if what == "no rows":
        view.rows = Rows(torch.zeros(2, 4, 0, 12), torch.zeros(2, 4, 0), torch.zeros(2, 0, dtype=torch.bool))
    kept = make().prefill(view).indices
    assert kept.tolist() == [list(range(kept.shape[1]))] * 2 and kept.shape[1] < 12


def test_a_token_that_the_text_stares_at_stays():
    view = make_view(2, 4, 12, 12)
    view.rows.logits[0, 1, 2, 7] = 40.0
    view.rows.lse = view.rows.logits.logsumexp(-1)
    assert 7 in GSearch(rates=(1, 1, 0.1, 0.1)).prefill(view).indices[0].tolist()


# ---------------------------------------------------------------------- G-Search


@quick
@given(rate_curves(), st.integers(1, 700), st.sampled_from([None, 1, 3, 6]))
def test_gsearch_as_searched(rates, tokens, cuts):
    strategy = GSearch(rates=rates, max_cuts=cuts)
    exact = [max(1, round(rate * tokens)) for rate in rates]
    counts = cascade(strategy, len(rates), tokens)
    falls = [i for i in range(1, len(rates)) if max(rates[i], 1e-9) < rates[i - 1]]
    if cuts is None or len(falls) <= cuts:
        assert counts == exact and list(strategy.prefill_needs(len(rates))) == falls
    else:
        assert len(strategy.prefill_needs(len(rates))) <= cuts
        assert abs(sum(counts) - sum(exact)) <= len(rates) / 2  # half a token of the mean
    assert strategy.asks_to_prune((tokens,)) == (exact[-1] < tokens)
    assert not strategy.asks_to_prune((tokens,)) or cuts is not None or counts[-1] < tokens


@quick
@given(rate_curves(), st.integers(2, 700), st.sampled_from([None, 2, 6]), st.data())
def test_gsearch_scaled_to_a_budget(rates, tokens, cuts, data):
    depth = len(rates)
    target = data.draw(st.integers(1, tokens))
    strategy = GSearch(rates=rates, keep=target, max_cuts=cuts)
    if target == tokens:
        assert cascade(strategy, depth, tokens) == [tokens] * depth and not strategy.asks_to_prune((tokens,))
        return
    if target * depth < 2 * tokens + depth - 2:
        with pytest.raises(BudgetError, match="first cut before layer 2"):
            cascade(strategy, depth, tokens)
        return
    counts = cascade(strategy, depth, tokens)
    assert abs(sum(counts) - target * depth) <= depth / 2 and counts[-1] < tokens and counts[:2] == [tokens] * 2
    assert sum(a != b for a, b in itertools.pairwise(counts)) <= (cuts or depth)


def test_gsearch_scales_by_one_factor_and_clips_at_all():
    rates = (1.0, 1.0, 0.8, 0.4, 0.2, 0.1, 0.05, 0.05)
    assert cascade(GSearch(rates=rates, max_cuts=None), 8, 200) == [200, 200, 160, 80, 40, 20, 10, 10]
    counts = cascade(GSearch(rates=rates, keep=0.6, max_cuts=None), 8, 200)
    assert sum(counts) == 120 * 8 and counts[2] == 200  # .8 is scaled beyond all
    factor = counts[3] / 80
    assert factor > 1.25 and counts[4] == pytest.approx(40 * factor, abs=1) and counts[5] == pytest.approx(20 * factor, abs=1)
    down = cascade(GSearch(rates=rates, keep=70, max_cuts=None), 8, 200)
    assert sum(down) == 70 * 8 and down[2] / down[3] == pytest.approx(2, abs=0.1)


def test_gsearch_rates_are_of_what_entered_and_budgets_of_all_images():
    rates = (1.0, 1.0, 0.5, 0.25)
    assert cascade(GSearch(rates=rates), 4, 30, sizes=(60,)) == [30, 30, 15, 8]
    assert sum(cascade(GSearch(rates=rates, keep=45), 4, 120, sizes=(60, 60), items=3)) == 90 * 4
    assert sum(cascade(GSearch(rates=rates, keep=20), 4, 30, sizes=(60,))) == 20 * 4


def test_gsearch_clamp_and_query_scope():
    strategy = GSearch(rates=(0.9, 0.5, 0.5, 0.25), query_scope="last")
    assert cascade(strategy, 4, 40) == [40, 40, 20, 10]
    assert strategy.prefill_needs(4) == {2: Needs("last"), 3: Needs("last")}
    assert cascade(GSearch(rates=(0.9, 0.5, 0.5, 0.25), min_layer=1), 4, 40) == [40, 20, 20, 10]
    assert GSearch(rates=(1.0,) * 4).prefill_needs(4) == {} and not GSearch(rates=(1.0,) * 4).asks_to_prune((9,))


def test_gsearch_without_rates_exists_but_does_not_run():
    for use in (lambda s: s.prefill_needs(8), lambda s: s.asks_to_prune((9,)), lambda s: GSearch(keep=3).asks_to_prune((9,))):
        with pytest.raises(BudgetError, match=r"give schedule=PATH or rates=.*vtprune search gsearch"):
            use(GSearch())
    assert GSearch().settings()["rates"] is None


@pytest.mark.parametrize(
    "fields",
    [
        {"rates": ()},
        {"rates": (1.0, 0.5, 0.6)},
        {"rates": (1.0, -0.1)},
        {"rates": (1.1, 1.0)},
        {"rates": (1.0, math.nan)},
        {"query_scope": "all"},
        {"max_cuts": 0},
        {"min_layer": 0},
        {"keep": 0},
    ],
)
def test_gsearch_fields_without_meaning_are_refused(fields):
    with pytest.raises(BudgetError):
        GSearch(**fields)


def test_gsearch_refuses_another_depth():
    strategy = GSearch(rates=(1.0, 1.0, 0.5, 0.5))
    with pytest.raises(BudgetError, match="4 entries, this decoder 8 layers"):
        strategy.prefill_needs(8)
    with pytest.raises(UnsupportedError, match="4 entries"):
        strategy.check_model(Model("m", 8, "f"))
    with pytest.raises(BudgetError, match=r"min_layer=4: give an int in \[1, 3\] for this decoder"):
        GSearch(rates=(1.0,) * 4, min_layer=4).prefill_needs(4)


# ---------------------------------------------------------------------- P-Sigmoid


@pytest.mark.parametrize(
    ("share", "alphas"),
    [
        (0.5, (15.5, 15.5, 15.5, 15.5, 15.5)),
        (0.25, (2.49, 7.19, 7.49, 7.5, 7.5)),
        (0.125, (-6.97, 2.31, 3.34, 3.48, 3.5)),
    ],
)
def test_midpoint(share, alphas):
    for steepness, alpha in zip((0.1, 0.3, 0.6, 1.0, 3.0), alphas, strict=True):
        # from the closed form of the continuous curve, half a layer to the left
        assert midpoint(steepness, share, 32, 0) == pytest.approx(alpha, abs=0.011)
        assert sum(sigmoid_curve(steepness, midpoint(steepness, share, 32, 0), 32)) == pytest.approx(32 * share)


def test_sigmoid_curve_does_not_overflow():
    assert sigmoid_curve(100.0, 16.0, 40)[0] == 1.0 and sigmoid_curve(100.0, 16.0, 40)[39] == 0.0
    assert sigmoid_curve(100.0, 16.0, 40)[16] == 0.5 and sigmoid_curve(0.5, 3.0, 8)[5] == pytest.approx(1 / (1 + math.e))


@quick
@given(depths, st.integers(2, 3000), st.floats(math.log(0.05), math.log(5)), st.sampled_from([None, 1, 3, 6]), st.data())
def test_psigmoid_spends_the_budget(depth, tokens, log_k, cuts, data):
    target, steepness = data.draw(st.integers(1, tokens)), math.exp(log_k)
    strategy = PSigmoid(keep=target, steepness=steepness, max_cuts=cuts)
    least = 2 * tokens + depth - 2

    def counts_of(strategy):
        if cuts is None or tokens > 60:  # views of many tokens are slow
            return list(sigmoid_counts(steepness, strategy._cuts(target / tokens, depth), target, tokens, depth))
        return cascade(strategy, depth, tokens)

    if target == tokens:
        assert cascade(strategy, depth, tokens) == [tokens] * depth and not strategy.asks_to_prune((tokens,))
        return
    if target * depth < least:
        with pytest.raises(BudgetError, match=f"at least {math.ceil(least / depth)} of {tokens}"):
            counts_of(strategy)
        return
    counts = counts_of(strategy)
    assert counts[:2] == [tokens] * 2 and counts[-1] >= 1 and counts[-1] < tokens
    assert counts == sorted(counts, reverse=True)
    changes = sum(a != b for a, b in itertools.pairwise(counts))
    assert changes <= (cuts or depth) and abs(sum(counts) - target * depth) <= depth / 2
    if cuts is None:
        assert sum(counts) == target * depth


def test_psigmoid_follows_its_curve():
    cuts = sigmoid_cuts(0.5, 0.25, 32, 2, None)
    counts = sigmoid_counts(0.5, cuts, 144, 576, 32)
    curve = sigmoid_curve(0.5, midpoint(0.5, 0.25, 32, 2), 32)
    assert cuts == tuple(range(2, 32))
    # clipping the tail at one token shifts the midpoint by a little
    assert max(abs(count - max(1, 576 * rate)) for count, rate in zip(counts[2:], curve[2:], strict=True)) < 2
    few = sigmoid_counts(0.5, sigmoid_cuts(0.5, 0.25, 32, 2, 6), 144, 576, 32)
    assert sum(few) == sum(counts) == 144 * 32
    assert max(abs(a - b) for a, b in zip(few, counts, strict=True)) < 100


def test_psigmoid_steeper_is_more_of_a_step():
    soft = cascade(PSigmoid(keep=20, steepness=0.1, max_cuts=None), 8, 40)
    step = cascade(PSigmoid(keep=20, steepness=50.0, max_cuts=None), 8, 40)
    assert sum(soft) == sum(step) == 160
    assert step[:3] == [40] * 3 and step[4:] == [1] * 4
    assert soft[2] < 25 and soft[-1] > 5


def test_psigmoid_asks_for_rows_where_it_cuts_alone():
    assert list(PSigmoid(keep=144).prefill_needs(32)) == list(range(2, 32))
    at = PSigmoid(keep=0.25).prefill_at(32, (64,), 64)
    assert 1 < len(at) <= 6 and min(at) == 2
    assert at == PSigmoid(keep=16).prefill_at(32, (64,), 64) != PSigmoid(keep=16).prefill_at(32, (64,), 24)
    assert PSigmoid(keep=16).prefill_at(32, (64,), 16) == ()
    assert cascade(PSigmoid(keep=0.25), 32, 64) == cascade(PSigmoid(keep=16), 32, 64)
    # composed, the share of what entered is another one, and the budget still holds
    assert sum(cascade(PSigmoid(keep=0.25), 32, 40, sizes=(64,))) == 16 * 32
    assert sum(cascade(PSigmoid(keep=20), 8, 120, sizes=(60, 60), items=2)) == 40 * 8


@pytest.mark.parametrize(
    "fields",
    [{"keep": 0}, {"steepness": 0.0}, {"steepness": math.nan}, {"steepness": 101}, {"max_cuts": 0}, {"query_scope": ""}],
)
def test_psigmoid_fields_without_meaning_are_refused(fields):
    with pytest.raises(BudgetError):
        PSigmoid(**fields)
    with pytest.raises(BudgetError, match="min_layer=2"):
        PSigmoid().prefill_needs(2)


# ---------------------------------------------------------------------- files

FITTED = Model("some/model", 4, "abc")
DATA = schedule.Data("questions", 64, "0" * 64)


@pytest.fixture
def files(tmp_path):
    schedule.write(tmp_path / "g.json", "gsearch", FITTED, DATA, {"rates": [1.0, 1.0, 0.5, 0.25], "min_layer": 2})
    schedule.write(tmp_path / "p.json", "psigmoid", FITTED, DATA, {"steepness": 1.25, "keep": 0.6, "min_layer": 1})
    return tmp_path


def test_gsearch_from_a_file(files):
    strategy = GSearch.load(files / "g.json", max_cuts=None)
    assert strategy.rates == (1.0, 1.0, 0.5, 0.25) and strategy.fitted == FITTED
    assert strategy == GSearch(schedule=str(files / "g.json"), max_cuts=None)
    assert json.loads(json.dumps(strategy.settings()))["rates"] == [1.0, 1.0, 0.5, 0.25]
    assert strategy.settings()["fitted"] == "some/model"
    with pytest.raises(BudgetError, match="give one of them"):
        GSearch(schedule=str(files / "g.json"), rates=(1.0, 1.0, 0.5, 0.5))


def test_psigmoid_from_a_file_where_fields_win(files):
    strategy = PSigmoid.load(files / "p.json")
    assert (strategy.steepness, strategy.keep, strategy.fitted) == (1.25, 0.6, FITTED)
    assert PSigmoid.load(files / "p.json", keep=9, steepness=2).settings() == {
        **{"name": "psigmoid", "keep": 9, "steepness": 2.0, "schedule": str(files / "p.json"), "query_scope": "text"},
        **{"max_cuts": 6, "min_layer": 1, "fitted": "some/model"},
    }
    assert (PSigmoid().keep, PSigmoid().steepness, PSigmoid().min_layer) == (0.5, 0.5, 2)


def test_the_first_layer_that_may_cut_is_the_files_unless_given(files):
    searched = PSigmoid.load(files / "p.json", max_cuts=None)
    assert searched.min_layer == 1 and min(searched.prefill_needs(4)) == 1
    assert PSigmoid.load(files / "p.json", min_layer=3).min_layer == 3
    schedule.write(files / "g.json", "gsearch", FITTED, DATA, {"rates": [1.0, 0.75, 0.5, 0.25], "min_layer": 1})
    assert cascade(GSearch.load(files / "g.json"), 4, 40) == [40, 30, 20, 10]
    assert cascade(GSearch.load(files / "g.json", min_layer=2), 4, 40) == [40, 40, 20, 10]
    assert cascade(GSearch(rates=(1.0, 0.75, 0.5, 0.25)), 4, 40) == [40, 40, 20, 10]  # without a file: 2


@pytest.mark.parametrize("rates", [[1.0, 1.0, 0.5, 0.0], [1, 1, 0, 0], [0.0] * 4])
def test_a_rate_of_nothing_in_a_file_leaves_one_token(files, rates):
    schedule.write(files / "g.json", "gsearch", FITTED, DATA, {"rates": rates, "min_layer": 2})
    wanted = [40, 40, max(1, round(rates[2] * 40)), 1]
    strategy = GSearch.load(files / "g.json")
    assert strategy.asks_to_prune((40,)) and not strategy.asks_to_prune((1,))
    assert cascade(strategy, 4, 40) == cascade(GSearch(rates=tuple(rates)), 4, 40) == wanted
    assert sum(cascade(GSearch.load(files / "g.json", keep=30), 4, 40)) == 30 * 4


def test_another_kind_or_no_file_is_refused(files):
    for use in (lambda: GSearch.load(files / "p.json"), lambda: PSigmoid.load(files / "none.json")):
        with pytest.raises(schedule.ScheduleError):
            use()


@pytest.mark.parametrize("kind", ["g", "p"])
def test_a_schedule_is_for_one_model(files, kind):
    strategy = (GSearch if kind == "g" else PSigmoid).load(files / f"{kind}.json")
    strategy.check_model(Model("a copy elsewhere", 4, "abc"))
    with pytest.raises(UnsupportedError, match=r"some/model.*4 decoder layers, 'other' has 8"):
        strategy.check_model(Model("other", 8, "abc"))
    with pytest.raises(UnsupportedError, match=r"fingerprint abc.*'other' \(xyz\)"):
        strategy.check_model(Model("other", 4, "xyz"))


# ---------------------------------------------------------------------- in a model


def generate(model, prompts, pixels):
    return model.generate(**batch(prompts), pixel_values=pixels, max_new_tokens=4, do_sample=False)


RATES = (1.0, 1.0, 0.8, 0.7, 0.5, 0.3, 0.1, 0.1)
STRATEGIES = {
    "gsearch": lambda: GSearch(rates=RATES),
    "gsearch-keep": lambda: GSearch(rates=RATES, keep=15, max_cuts=3, query_scope="last"),
    "psigmoid": lambda: PSigmoid(keep=15),
    "psigmoid-share": lambda: PSigmoid(keep=15 / 36, max_cuts=3, query_scope="last"),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_in_a_model_the_budget_is_exact_and_a_batch_equals_its_samples(name):
    model, make = tiny_llava(layers=8), STRATEGIES[name]
    prompts, pixels = [prompt(2, "I", 5), prompt(4, "I", 3, "I", 6), prompt(1, "I")], images(4)
    with vtprune.pruning(model, make()) as session:
        together = generate(model, prompts, pixels)
    report, first = session.report, 0
    for sample, images_ in zip(report.samples, (1, 2, 1), strict=True):
        lengths = [len(layer) for layer in sample.layers]
        if name == "gsearch":
            assert lengths == [round(rate * 36 * images_) for rate in RATES]
        else:
            assert abs(sum(lengths) - 15 * images_ * 8) <= (0 if name == "psigmoid" else 2)
    for i, ids in enumerate(prompts):
        count = 2 if i == 1 else 1
        with vtprune.pruning(model, make()) as session:
            alone = generate(model, [ids], pixels[first : first + count])
        first += count
        assert alone[0, -4:].tolist() == together[i, -4:].tolist()
        for a, b in zip(session.report.samples[0].layers, report.samples[i].layers, strict=True):
            assert torch.equal(a, b)


def test_in_a_model_last_token_scope_with_one_cut_is_fastv():
    model, prompts, pixels = tiny_llava(layers=8), [prompt(2, "I", 5)], images(1)
    kept = []
    for strategy in (vtprune.FastV(after=9), GSearch(rates=(1, 1, *[0.25] * 6), query_scope="last")):
        with vtprune.pruning(model, strategy) as session:
            generate(model, prompts, pixels)
        kept.append([layer.tolist() for layer in session.report.samples[0].layers])
    assert kept[0] == kept[1] and len(kept[0][2]) == 9


def test_in_a_model_a_schedule_of_another_model_is_refused(files):
    with pytest.raises(UnsupportedError, match="vtprune search gsearch"):
        vtprune.wrap(tiny_llava(), GSearch.load(files / "g.json"))
    with pytest.raises(BudgetError, match="give schedule=PATH"):
        model = tiny_llava()
        with vtprune.pruning(model, GSearch()):
            generate(model, [prompt(2, "I", 5)], images(1))
