"""VisionZip on views made by hand: budgets, order, merging, and what it refuses."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vtprune.pruner import BudgetError, Encoder, EncodeView, Needs, Rows, budget_tokens
from vtprune.select import without
from vtprune.strategies.visionzip import VisionZip, assign, targets_at

quick = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
WIDTH = 5


def make_view(batch=2, tokens=20, seed=0, dtype=torch.float32, levels=None, layer=4) -> EncodeView:
    """A view of block `layer`; `levels` draws everything from that many values, so that ties are the rule."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        if levels is None:
            return torch.randn(shape, generator=generator)
        return torch.randint(0, levels, shape, generator=generator).float()

    logits = draw(batch, 3, 1, tokens)
    lse = torch.logaddexp(logits.logsumexp(-1), torch.zeros(batch, 3, 1))
    rows = Rows(logits, lse, torch.ones(batch, 1, dtype=torch.bool), keys=draw(batch, 3, tokens, 4).to(dtype))
    return EncodeView(
        index=torch.arange(tokens).repeat(batch, 1),
        sizes=(tokens,),
        carry={},
        layer=layer,
        depth=5,
        hidden=draw(batch, tokens, WIDTH).to(dtype),
        special=draw(batch, 1, WIDTH).to(dtype),
        rows=rows,
        grid=None,
    )


def reference(view: EncodeView, item: int, dominant: int, contextual: int):
    """The paper in plain loops: (dominant patches, targets, {member: target}, vectors) in float64; `dominant` counts CLS."""
    attention = view.rows.attention()[item, :, 0].double().sum(0).tolist()
    hidden = view.hidden[item].double()
    keys = view.rows.keys[item].double().mean(0)
    patches = sorted(sorted(range(len(attention)), key=lambda j: (-attention[j], j))[: dominant - 1])
    rest = [j for j in range(len(attention)) if j not in patches]
    step = max(1, len(rest) // contextual) if contextual else 1
    targets = rest[::step][:contextual]
    goes = {}
    for j in rest:
        if j not in targets and targets:
            cosine = [float(keys[j] @ keys[t] / (keys[j].norm() * keys[t].norm()).clamp(min=1e-12)) for t in targets]
            # equal to five digits is equal, and the first wins
            goes[j] = targets[max(range(len(targets)), key=lambda i: (round(cosine[i], 5), -i))]
    vectors = [view.special[item, 0].double(), *(hidden[j] for j in patches)]
    for t in targets:
        members = [hidden[j] for j in goes if goes[j] == t]
        vectors.append(hidden[t] + (torch.stack(members).mean(0) if members else 0))
    return patches, targets, goes, torch.stack(vectors)


@quick
@given(
    st.integers(1, 3),
    st.integers(2, 40),
    st.data(),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from([None, 2]),
)
def test_follows_the_paper(batch, tokens, data, dtype, levels):
    keep = data.draw(st.integers(1, tokens - 1))
    contextual = data.draw(st.one_of(st.none(), st.integers(0, keep - 1)))
    strategy = VisionZip(keep=keep, contextual=contextual)
    m = min(round(keep * 10 / 64), keep - 1) if contextual is None else contextual
    view = make_view(batch, tokens, data.draw(st.integers(0, 9)), dtype, levels)
    answer = strategy.encode(view)
    assert answer.ordered and answer.indices.shape == (batch, keep) and answer.indices.dtype == torch.long
    assert answer.hidden.shape == (batch, keep, WIDTH) and answer.hidden.dtype == dtype
    assert bool(torch.isfinite(answer.hidden).all())
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for item in range(batch):
        patches, targets, goes, vectors = reference(view, item, keep - m, m)
        kept = answer.indices[item].tolist()
        assert kept[1:] == [*patches, *targets]
        assert len(set(kept)) == keep and min(kept) >= 0 and max(kept) < tokens
        assert answer.foreign[item].tolist() == kept[:1]
        assert {j: t for j, t in enumerate(answer.into[item].tolist()) if t >= 0} == goes
        torch.testing.assert_close(answer.hidden[item].double(), vectors, atol=tolerance, rtol=tolerance)


def test_batch_equals_single():
    view = make_view(3, 30, seed=5)
    together = VisionZip(keep=16).encode(view)
    for item in range(3):
        one = slice(item, item + 1)
        rows = Rows(view.rows.logits[one], view.rows.lse[one], view.rows.valid[one], keys=view.rows.keys[one])
        alone = EncodeView(
            view.index[one], (30,), {}, layer=4, depth=5, hidden=view.hidden[one], special=view.special[one], rows=rows
        )
        answer = VisionZip(keep=16).encode(alone)
        for name in ("indices", "into", "foreign"):
            assert torch.equal(getattr(answer, name), getattr(together, name)[one]), name
        torch.testing.assert_close(answer.hidden, together.hidden[one], atol=1e-6, rtol=0)


def test_class_token_takes_the_number_of_the_least_attended():
    view = make_view(1, 12, seed=3)
    answer = VisionZip(keep=6, contextual=1).encode(view)
    slot, attention = int(answer.indices[0, 0]), view.rows.attention()[0, :, 0].sum(0)
    dropped = sorted(set(range(12)) - set(answer.indices[0, 1:].tolist()))
    assert slot == min(dropped, key=lambda j: float(attention[j]))
    assert torch.equal(answer.hidden[0, 0], view.special[0, 0])
    # it is a patch like any other, so it went to a target
    assert int(answer.into[0, slot]) == int(answer.indices[0, -1])


def test_without_the_class_token_its_place_goes_to_a_patch():
    view = make_view(2, 20, seed=4)
    full, bare = VisionZip(keep=8, contextual=2).encode(view), VisionZip(keep=8, contextual=2, cls_token=False).encode(view)
    assert bare.foreign is None and bare.indices.shape == (2, 8)
    for item in range(2):
        attention = view.rows.attention()[item, :, 0].sum(0)
        assert bare.indices[item, :6].tolist() == sorted(attention.topk(6).indices.tolist())
        assert set(full.indices[item, 1:6].tolist()) < set(bare.indices[item, :6].tolist())
    torch.testing.assert_close(bare.hidden[:, :6], view.hidden.gather(1, bare.indices[:, :6, None].expand(-1, -1, WIDTH)))


@pytest.mark.parametrize("keep", [12, 13, 1.0])
def test_the_whole_image_is_left_alone(keep):
    assert VisionZip(keep=keep).encode(make_view(2, 12)) is None


def test_one_token_is_the_class_token():
    view = make_view(2, 9)
    answer = VisionZip(keep=1).encode(view)
    assert torch.equal(answer.hidden, view.special) and torch.equal(answer.indices, answer.foreign)
    assert bool((answer.into == -1).all())
    alone = VisionZip(keep=1, cls_token=False).encode(view)
    assert torch.equal(alone.indices[:, 0], view.rows.attention()[:, :, 0].sum(1).argmax(-1))


def test_an_image_of_one_patch_keeps_it():
    assert VisionZip(keep=1).encode(make_view(2, 1)) is None


@pytest.mark.parametrize("fill", [math.nan, 0.0])
@pytest.mark.parametrize("what", ["attention", "keys", "both"])
def test_nan_and_zero_are_defined(fill, what):
    view = make_view(2, 20)
    if what != "keys":
        view.rows.logits[:] = fill if math.isnan(fill) else -math.inf
        view.rows.lse[:] = 0.0
    if what != "attention":
        view.rows.keys[:] = fill
    answer = VisionZip(keep=8, contextual=3).encode(view)
    assert bool(torch.isfinite(answer.hidden).all())
    for row in answer.indices.tolist():
        assert len(set(row)) == 8 and min(row) >= 0 and max(row) < 20
        if what != "keys":
            assert row[1:5] == [0, 1, 2, 3]
    if what != "attention":
        # no key is closer to one target than to another: the first takes all
        assert set(answer.into.unique().tolist()) <= {-1, *answer.indices[:, 5].tolist()}


def test_does_not_write_into_what_it_sees():
    view, untouched = make_view(2, 20), make_view(2, 20)
    VisionZip(keep=8).encode(view)
    assert torch.equal(view.hidden, untouched.hidden) and torch.equal(view.special, untouched.special)
    assert torch.equal(view.rows.logits, untouched.rows.logits) and torch.equal(view.rows.keys, untouched.rows.keys)
    assert torch.equal(view.index, untouched.index) and view.carry == {}


@pytest.mark.parametrize(
    ("keep", "contextual", "expected"),
    [
        (64, None, (54, 10)),
        (128, None, (108, 20)),
        (192, None, (162, 30)),
        (1, None, (1, 0)),
        (2, None, (2, 0)),
        (4, None, (3, 1)),
        (9, 8, (1, 8)),
        (9, 0, (9, 0)),
        (9, 0.99, (1, 8)),
        (1, 0.9, (1, 0)),
        (10, 0.5, (5, 5)),
        (0.5, 3, (7, 3)),
    ],
)
def test_split(keep, contextual, expected):
    strategy = VisionZip(keep=keep, contextual=contextual)
    assert strategy.split(budget_tokens(keep, 20 if isinstance(keep, float) else 576)) == expected


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"keep": 0}, "keep=0"),
        ({"keep": math.nan}, "keep=nan"),
        ({"keep": None}, "keep=None"),
        ({"contextual": -1}, "contextual=-1"),
        ({"contextual": 1.0}, "contextual=1.0"),
        ({"contextual": math.nan}, "contextual=nan"),
        ({"contextual": True}, "contextual=True"),
        ({"contextual": "10"}, "contextual='10'"),
        ({"keep": 8, "contextual": 8}, "contextual=8 of 8"),
        ({"cls_token": 1}, "cls_token=1"),
    ],
)
def test_bad_fields(fields, words):
    with pytest.raises(BudgetError, match=words):
        VisionZip(**fields)


def test_a_share_that_contextual_exceeds_is_refused_when_the_image_is_known():
    with pytest.raises(BudgetError, match="contextual=5 of 2 tokens"):
        VisionZip(keep=0.1, contextual=5).encode(make_view(1, 20))


def test_needs_and_settings():
    strategy = VisionZip()
    assert strategy.encode_needs(Encoder(23, 24, True)) == {22: Needs("cls", keys=True)}
    assert strategy.encode_needs(Encoder(23, 24, False)) == {22: Needs("patches", keys=True)}
    assert strategy.stages() == ("encode",) and strategy.requires == frozenset() and strategy.positions == "compact"
    assert json.loads(json.dumps(strategy.settings())) == {
        "name": "visionzip",
        "keep": 64,
        "contextual": None,
        "cls_token": True,
    }
    assert strategy.asks_to_prune((576,)) and not strategy.asks_to_prune((64,))


# ---------------------------------------------------------------------- the parts


@quick
@given(st.integers(1, 60), st.integers(0, 70))
def test_targets_at(rest, count):
    step = max(1, rest // count) if count else 1
    assert targets_at(rest, count).tolist() == (list(range(rest))[::step][:count] if count else [])


@quick
@given(st.integers(1, 4), st.integers(1, 20), st.data())
def test_without(batch, tokens, data):
    k = data.draw(st.integers(0, tokens))
    chosen = torch.stack([torch.randperm(tokens, generator=torch.Generator().manual_seed(i))[:k] for i in range(batch)])
    rest = without(chosen, tokens)
    assert rest.tolist() == [[j for j in range(tokens) if j not in row] for row in chosen.tolist()]


def test_assign_prefers_direction_to_length_and_the_first_of_equals():
    targets = torch.tensor([[[1.0, 0.0], [10.0, 10.0], [0.0, 2.0], [0.0, 1.0]]])
    keys = torch.tensor([[[9.0, 1.0], [0.1, 0.1], [0.0, 5.0], [0.0, 0.0], [-1.0, -1.0]]])
    assert assign(keys, targets).tolist() == [[0, 1, 2, 0, 0]]
    assert assign(keys.half(), targets.half()).tolist() == [[0, 1, 2, 0, 0]]
