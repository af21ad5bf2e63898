"""SparseVLM: raters, score, clustering and counts against slow loops in float64, and the whole inside a running model."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TOKENS, batch, images, prompt, tiny_llava

import vtprune
from vtprune.merge import cluster_means, dpc_knn
from vtprune.pruner import BudgetError, Inputs, Needs, PrefillView, Rows
from vtprune.select import row_mean
from vtprune.strategies.sparsevlm import (
    PUBLISHED,
    SparseVLM,
    raters,
    scaled_counts,
)

quick = settings(max_examples=50, deadline=None, derandomize=True)


def make_view(layer, depth, entered, tokens=None, items=1, sizes=None, seed=0, rows=5, dtype=torch.float32):
    tokens = entered if tokens is None else tokens
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    logits = draw(items, 4, rows, tokens)
    valid = torch.ones(items, rows, dtype=torch.bool)
    if items > 1 and rows > 2:
        valid[1, :2] = False
        logits[1, :, :2] = -math.inf
    lse = torch.logaddexp(logits.logsumexp(-1), draw(items, 4, rows)).masked_fill(~valid[:, None], 0.0)
    return PrefillView(
        torch.arange(tokens).expand(items, -1),
        sizes or (entered,),
        {},
        layer=layer,
        depth=depth,
        rows=Rows(logits, lse, valid),
        hidden=draw(items, tokens, 8).to(dtype),
        inputs=Inputs(draw(items, entered, 8).to(dtype), draw(items, rows, 8).to(dtype)),
        computed=(entered,) * (layer - 1) + (tokens,),
    )


# ---------------------------------------------------------------------- the parts


def slow_raters(visual, text, valid):
    index = [r for r in range(len(valid)) if valid[r]]
    match = dict.fromkeys(index, 0.0)
    for v in visual.double():
        dots = {r: float(v @ text[r].double()) for r in index}
        peak = max(dots.values(), default=0.0)
        norm = sum(math.exp(d - peak) for d in dots.values())
        for r in index:
            match[r] += math.exp(dots[r] - peak) / norm / len(visual)
    mean = sum(match.values()) / max(len(index), 1)
    return {r for r in index if match[r] > mean * (1 + 1e-5)} or set(index)


@quick
@given(st.integers(0, 999), st.integers(1, 6), st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
def test_raters(seed, rows, dtype):
    view = make_view(3, 32, 12, items=2, seed=seed, rows=rows, dtype=dtype)
    chosen = raters(view.inputs, view.rows.valid)
    for b in range(2):
        expected = slow_raters(view.inputs.visual[b], view.inputs.text[b], view.rows.valid[b].tolist())
        assert set(chosen[b].nonzero().flatten().tolist()) == expected


def test_raters_do_not_see_padding_rows():
    view = make_view(3, 32, 12, items=2)
    before = raters(view.inputs, view.rows.valid)
    view.inputs.text[1, :2] = 50.0
    assert torch.equal(raters(view.inputs, view.rows.valid), before)
    assert not before[1, :2].any()


def test_equal_text_tokens_are_all_raters_and_no_text_has_none():
    inputs = Inputs(torch.randn(2, 9, 8), torch.randn(2, 1, 8).expand(-1, 7, -1))
    valid = torch.tensor([[True] * 7, [False] * 7])
    assert torch.equal(raters(inputs, valid), valid)
    single = torch.zeros(2, 7, dtype=torch.bool)
    single[:, 3] = True
    assert torch.equal(raters(inputs, single), single)


def test_score_is_the_mean_over_heads_and_raters():
    view = make_view(3, 32, 12, items=2)
    chosen = raters(view.inputs, view.rows.valid)
    score = row_mean(view.rows, chosen)
    logits, lse = view.rows.logits.double(), view.rows.lse.double()
    for b in range(2):
        picked = chosen[b].nonzero().flatten().tolist()
        assert 0 < len(picked) < 5
        for j in range(12):
            weights = [math.exp(logits[b, h, r, j] - lse[b, h, r]) for h in range(4) for r in picked]
            assert score[b, j].item() == pytest.approx(sum(weights) / len(weights), rel=1e-5)


def slow_dpc_knn(x, clusters):
    x = x.double()
    count, width = x.shape
    distance = [[math.dist(a, b) / width**0.5 for b in x.tolist()] for a in x.tolist()]
    density = [-sum(d * d for d in sorted(row)[:clusters]) / clusters for row in distance]  # of which exp is taken
    largest = max(map(max, distance))
    score = []
    for i in range(count):
        denser = [distance[i][j] for j in range(count) if density[j] > density[i] or (density[j] == density[i] and j < i)]
        gap = min(denser, default=largest)
        score.append(math.log(gap) + density[i] if gap else -math.inf)
    centres = sorted(range(count), key=lambda i: (-score[i], i))[:clusters]
    cluster = [min(range(clusters), key=lambda c: distance[centres[c]][i]) for i in range(count)]
    for c, i in enumerate(centres):
        cluster[i] = c
    return centres, cluster


@quick
@given(st.integers(0, 999), st.integers(1, 3), st.integers(1, 20), st.data())
def test_clustering(seed, items, count, data):
    clusters = data.draw(st.integers(1, count))
    x = torch.randn(items, count, 6, generator=torch.Generator().manual_seed(seed))
    centres, cluster = dpc_knn(x, clusters)
    means = cluster_means(x, cluster, clusters)
    for b in range(items):
        expected = slow_dpc_knn(x[b], clusters)
        assert (centres[b].tolist(), cluster[b].tolist()) == expected
        for c in range(clusters):
            members = [x[b, i].double() for i in range(count) if expected[1][i] == c]
            torch.testing.assert_close(means[b, c].double(), torch.stack(members).mean(0), rtol=1e-5, atol=1e-6)
        alone = dpc_knn(x[b : b + 1], clusters)
        assert torch.equal(alone[0][0], centres[b]) and torch.equal(alone[1][0], cluster[b])


def test_clustering_finds_blobs_and_survives_large_and_equal_vectors():
    generator = torch.Generator().manual_seed(0)
    blobs = torch.cat([torch.randn(6, 4, generator=generator) * 0.1 + 8.0 * i for i in range(3)])[None]
    centres, cluster = dpc_knn(blobs, 3)
    assert {i // 6 for i in centres[0].tolist()} == {0, 1, 2}
    assert all(len(set(cluster[0, 6 * i : 6 * i + 6].tolist())) == 1 for i in range(3))
    centres, cluster = dpc_knn(blobs * 1e3, 3)  # exp(density) is zero for all of them
    assert (centres[0].tolist(), cluster[0].tolist()) == slow_dpc_knn(blobs[0] * 1e3, 3)
    centres, cluster = dpc_knn(torch.ones(2, 7, 4), 3)
    assert centres.tolist() == [[0, 1, 2]] * 2 and cluster.tolist() == [[0, 1, 2, 0, 0, 0, 0]] * 2


def test_means_keep_the_dtype_and_do_not_overflow():
    x = torch.full((1, 4, 2), 6e4, dtype=torch.float16)
    means = cluster_means(x, torch.zeros(1, 4, dtype=torch.long), 1)
    assert means.dtype == torch.float16 and torch.equal(means, x[:, :1])


# ---------------------------------------------------------------------- counts


@pytest.mark.parametrize(
    ("depth", "layers"), [(4, [1, 2]), (8, [1, 2, 4]), (24, [2, 5, 12]), (28, [2, 6, 14]), (32, [3, 7, 16]), (40, [3, 8, 19])]
)
def test_layers_scale_with_the_decoder(depth, layers):
    assert SparseVLM().prefill_needs(depth) == dict.fromkeys(layers, Needs("text", hidden=True, inputs=True))


def cascade(strategy, depth, entered, sizes=None, items=1):
    """Tokens per layer over views made by hand, and the answers."""
    needs, counts, answers, tokens = strategy.prefill_needs(depth), [], [], entered
    for layer in range(depth):
        if layer in needs:
            keep = strategy.prefill(make_view(layer, depth, entered, tokens, items, sizes, seed=layer))
            answers.append(keep)
            tokens = tokens if keep is None else keep.indices.shape[1]
        counts.append(tokens)
    return counts, answers


@pytest.mark.parametrize("label", sorted(PUBLISHED))
def test_published_lists_with_clusters_on_top(label):
    counts, _ = cascade(SparseVLM(counts=PUBLISHED[label]), 32, 576)
    expected, tokens = [576] * 3, 576
    for kept, layers in zip(PUBLISHED[label], (4, 9, 16), strict=True):
        recycled = int((tokens - kept) * 0.3) + 1
        tokens = kept + int(recycled / 10) + 1
        expected += [tokens] * layers
    assert counts == expected
    plain, answers = cascade(SparseVLM(counts=PUBLISHED[label], recycle=False), 32, 576)
    assert plain == [576] * 3 + [n for n, layers in zip(PUBLISHED[label], (4, 9, 16), strict=True) for _ in range(layers)]
    assert all(answer.hidden is None and answer.into is None for answer in answers)


@quick
@given(st.sampled_from([4, 8, 24, 28, 32, 40]), st.integers(2, 3000), st.data())
def test_the_scaled_list_spends_the_budget(depth, tokens, data):
    cuts = tuple(SparseVLM().prefill_needs(depth))
    target = data.draw(st.integers(1, tokens - 1))
    least = cuts[0] * tokens + depth - cuts[0]
    if target * depth < least:
        with pytest.raises(BudgetError, match=f"at least {math.ceil(least / depth)} of {tokens}"):
            scaled_counts(cuts, target, tokens, depth)
        return
    counts = scaled_counts(cuts, target, tokens, depth)
    assert counts[: cuts[0]] == (tokens,) * cuts[0] and list(counts) == sorted(counts, reverse=True) and counts[-1] >= 1
    assert {i for i in range(1, depth) if counts[i] < counts[i - 1]} <= set(cuts)
    assert abs(sum(counts) - target * depth) <= depth / 2


def test_the_scaled_list_has_the_published_shape():
    counts = scaled_counts((3, 7, 16), 192, 576, 32)
    assert sum(counts) == 192 * 32
    assert counts[7] / counts[3] == pytest.approx(200 / 300, abs=0.01)
    assert counts[16] / counts[3] == pytest.approx(110 / 300, abs=0.01)
    assert counts[7] / scaled_counts((3, 7, 16), 72, 576, 32)[3] > 1  # and another list for another budget
    other = scaled_counts((3, 7, 16), 70, 576, 32)
    assert other[7] / other[3] == pytest.approx(30 / 66, abs=0.05)


@quick
@given(st.integers(2, 600), st.data())
def test_kept_and_clusters_make_the_target(tokens, data):
    strategy = SparseVLM(tau=data.draw(st.sampled_from([0.0, 0.3, 1.0])), theta=data.draw(st.sampled_from([0.0, 0.1, 1.0])))
    target = data.draw(st.integers(1, tokens - 1))
    kept = strategy._split(target, tokens)
    clusters = target - kept
    assert 1 <= kept <= target and clusters <= target // 2
    # fewer than the paper's number only where they are capped
    assert clusters == strategy._clusters(tokens - kept) or clusters == target // 2 < strategy._clusters(tokens - kept)


@quick
@given(
    st.sampled_from([4, 8, 32]),
    st.integers(1, 60),
    st.one_of(st.integers(1, 70), st.floats(0.05, 1.0)),
    st.booleans(),
    st.integers(1, 2),
)
def test_cascade_spends_exactly_what_the_schedule_says(depth, tokens, keep, recycle, items):
    strategy = SparseVLM(keep=keep, recycle=recycle)
    target = min(tokens, keep) if isinstance(keep, int) else max(1, round(keep * tokens))
    if target >= tokens:
        assert cascade(strategy, depth, tokens, items=items)[0] == [tokens] * depth
        assert not strategy.asks_to_prune((tokens,))
        return
    try:
        expected = scaled_counts(tuple(strategy.prefill_needs(depth)), target, tokens, depth)
    except BudgetError:
        with pytest.raises(BudgetError):
            cascade(strategy, depth, tokens, items=items)
        return
    counts, answers = cascade(strategy, depth, tokens, items=items)
    assert counts == list(expected) and counts[-1] < tokens
    for keep in filter(None, answers):
        for row in keep.indices.tolist():
            assert len(set(row)) == len(row)


# ---------------------------------------------------------------------- the answer


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_answer(dtype):
    view = make_view(3, 32, 60, items=2, dtype=dtype)
    keep = SparseVLM(counts=(20, 10, 5)).prefill(view)
    chosen = raters(view.inputs, view.rows.valid)
    score = row_mean(view.rows, chosen)
    assert keep.ordered and keep.indices.shape == (2, 22) and keep.hidden.shape == (2, 22, 8) and keep.hidden.dtype == dtype
    for b in range(2):
        ranked = sorted(range(60), key=lambda i: (-score[b, i].item(), i))
        pool = sorted(ranked[20:33])  # int(40 * 0.3) + 1 of the dropped
        centres, cluster = slow_dpc_knn(view.hidden[b][pool].float(), 2)
        slots = [pool[c] for c in centres]
        assert keep.indices[b].tolist() == sorted(ranked[:20]) + slots
        assert torch.equal(keep.hidden[b, :20], view.hidden[b][sorted(ranked[:20])])
        for c in range(2):
            members = [pool[i] for i in range(13) if cluster[i] == c]
            mean = view.hidden[b][members].double().mean(0)
            torch.testing.assert_close(keep.hidden[b, 20 + c].double(), mean, rtol=1e-2, atol=1e-2)
            for i in members:
                assert keep.into[b, i] == (-1 if i == slots[c] else slots[c])
        assert (keep.into[b] == -1).sum() == 60 - 11


def test_a_batch_equals_its_items():
    view = make_view(3, 32, 60, items=2)
    together = SparseVLM(counts=(20, 10, 5)).prefill(view)
    for b in range(2):
        real = view.rows.valid[b]
        rows = Rows(view.rows.logits[b : b + 1][:, :, real], view.rows.lse[b : b + 1][:, :, real], real[real][None])
        inputs = Inputs(view.inputs.visual[b : b + 1], view.inputs.text[b : b + 1][:, real])
        alone = dataclasses.replace(
            view, index=view.index[b : b + 1], hidden=view.hidden[b : b + 1], rows=rows, inputs=inputs, carry={}
        )
        keep = SparseVLM(counts=(20, 10, 5)).prefill(alone)
        assert torch.equal(keep.indices[0], together.indices[b]) and torch.equal(keep.into[0], together.into[b])
        torch.testing.assert_close(keep.hidden[0], together.hidden[b])


@pytest.mark.parametrize("what", ["nan", "zero", "flat", "no text"])
def test_scores_without_information_keep_the_first_tokens(what):
    view = make_view(3, 32, 30, items=2)
    view.rows.lse.zero_()
    view.rows.logits.fill_({"nan": math.nan, "zero": -math.inf, "flat": 0.0, "no text": -math.inf}[what])
    if what == "no text":
        view.rows.valid.fill_(False)
    keep = SparseVLM(counts=(9, 6, 3)).prefill(view)
    assert keep.indices[:, :9].tolist() == [list(range(9))] * 2 and keep.indices.shape == (2, 10)
    # 21 dropped, of which the best 7 follow by the same rule
    assert set(keep.indices[:, 9].tolist()) <= set(range(9, 16))
    assert keep.hidden.isfinite().all()


def test_equal_tokens_and_small_counts():
    view = make_view(3, 32, 30)
    view.hidden.fill_(2.0)
    keep = SparseVLM(counts=(9, 6, 3)).prefill(view)
    assert torch.equal(keep.hidden, torch.full((1, 10, 8), 2.0))
    assert SparseVLM(counts=(29, 6, 3)).prefill(view) is None  # the one that would go comes back as its own cluster
    assert not SparseVLM(counts=(29, 29, 29)).asks_to_prune((30,))
    assert SparseVLM(counts=(29, 29, 28)).asks_to_prune((30,))
    assert SparseVLM(counts=(1, 1, 1)).prefill(make_view(3, 32, 1)) is None
    keep = SparseVLM(counts=(1, 1, 1), recycle=False).prefill(view)
    assert keep.indices.shape == (1, 1)


def test_counts_of_several_images_add_up():
    counts, _ = cascade(SparseVLM(counts=(20, 10, 0.1), recycle=False), 32, 120, sizes=(60, 60))
    assert counts == [120] * 3 + [40] * 4 + [20] * 9 + [12] * 16
    counts, _ = cascade(SparseVLM(keep=20), 32, 120, sizes=(60, 60))
    assert sum(counts) == 40 * 32
    counts, _ = cascade(SparseVLM(keep=20), 32, 30, sizes=(60,))  # an encoder strategy left 30
    assert sum(counts) == 20 * 32


@pytest.mark.parametrize(
    "fields",
    [
        {"keep": 0},
        {"counts": (3, 2)},
        {"counts": (3, 2, 0)},
        {"layers": ()},
        {"layers": (2, 6, 32)},
        {"layers": (6, 2, 15)},
        {"layers": (1, 2, 3, 4)},
        {"tau": 1.1},
        {"theta": math.nan},
    ],
)
def test_fields_without_meaning_are_refused(fields):
    with pytest.raises(BudgetError):
        SparseVLM(**fields)


def test_a_decoder_without_room_is_refused():
    with pytest.raises(BudgetError, match="no layer after a cut"):
        SparseVLM(layers=(2, 6, 31)).prefill_needs(32)
    with pytest.raises(BudgetError, match="decoder of 1"):
        SparseVLM().prefill_needs(1)


# ---------------------------------------------------------------------- in a model


def generate(model, prompts, pixels):
    return model.generate(
        **batch(prompts),
        pixel_values=pixels,
        max_new_tokens=4,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_in_a_model_the_first_cut_follows_the_full_models_attention(attn):
    model, full = tiny_llava(attn, layers=8), tiny_llava("eager", layers=8)
    ids, pixels = prompt(2, "I", 5), images(1)
    with vtprune.pruning(model, SparseVLM(counts=(12, 8, 4))) as session:
        model(**batch([ids]), pixel_values=pixels)
    sample = session.report.samples[0]
    seen = {}

    def watch(module, args, kwargs):
        seen["embeds"] = kwargs["inputs_embeds"]

    handle = full.model.language_model.register_forward_pre_hook(watch, with_kwargs=True)
    attention = full(**batch([ids]), pixel_values=pixels, output_attentions=True).attentions[0][0]
    handle.remove()
    start, end = 3, 3 + TOKENS
    embeds = seen["embeds"][0].detach()
    picked = [end + r for r in slow_raters(embeds[start:end], embeds[end:], [True] * (len(ids) - end))]
    score = attention[:, picked, start:end].mean((0, 1))
    ranked = score.sort(descending=True)
    assert (ranked.values[:20] - ranked.values[1:21]).min() > 1e-6
    kept = ranked.indices[:12].tolist()
    assert set(kept) <= set(sample.layers[1].tolist())
    # 24 dropped, 8 of them clustered, 1 cluster
    extra = set(sample.layers[1].tolist()) - set(kept)
    assert len(extra) == 1 and extra <= set(ranked.indices[12:20].tolist())
    merged = {i for members in sample.merged.values() for i in members}
    assert merged and merged <= set(range(TOKENS))
    assert [len(layer) for layer in sample.layers] == [36] + [13] + [9] * 2 + [5] * 4


def test_in_a_model_the_budget_is_exact_and_a_batch_equals_its_samples():
    model = tiny_llava(layers=8)
    prompts = [prompt(2, "I", 5), prompt(4, "I", 3, "I", 6), prompt(1, "I")]
    pixels = images(4)
    with vtprune.pruning(model, SparseVLM(keep=14)) as session:
        together = generate(model, prompts, pixels)
    report, first = session.report, 0
    assert [s.equivalent_tokens for s in report.samples] == [14.0, 28.0, 14.0]
    for i, ids in enumerate(prompts):
        count = 2 if i == 1 else 1
        with vtprune.pruning(model, SparseVLM(keep=14)) as session:
            alone = generate(model, [ids], pixels[first : first + count])
        first += count
        assert alone.sequences[0, -4:].tolist() == together.sequences[i, -4:].tolist()
        for a, b in zip(session.report.samples[0].layers, report.samples[i].layers, strict=True):
            assert torch.equal(a, b)


def test_in_a_model_keep_all_is_bit_identical():
    model = tiny_llava(layers=8)
    prompts, pixels = [prompt(2, "I", 5), prompt(1, "I", 3)], images(2)
    plain = generate(model, prompts, pixels)
    with vtprune.pruning(model, SparseVLM(keep=1.0)):
        same = generate(model, prompts, pixels)
    assert torch.equal(torch.stack(plain.logits), torch.stack(same.logits))
