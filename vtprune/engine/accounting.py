"""What a pass leaves behind: the report of a prefill, its KV bytes and FLOPs."""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune.engine.cache import cache_bytes, full_keys
from vtprune.engine.decoding import Pass
from vtprune.measure.flops import stack_flops
from vtprune.pruner import NothingPrunedError
from vtprune.reporting import Report, SampleReport


def report_of(run: Pass) -> Report | None:
    """What this prefill kept, saved and cost; None for a pass without images.

    Raises:
        NothingPrunedError: if the budget asked for fewer tokens and none was dropped.
    """
    if not run.items:
        return None
    rows = _distinct_rows(run)
    grid, depth = run.plan.site.grid, run.plan.depth
    samples = []
    for row in rows:
        item, images = run.items[row], run.images[row]
        layers = [run.computed(row, layer) for layer in range(depth)]
        samples.append(
            SampleReport(
                visual_tokens=sum(item.sizes),
                kept=layers[0].sort().values,
                layers=layers,
                cached=[_cached(run, row, layer) for layer in range(depth)] if run.cache is not None else [],
                encoded=_encoded(run, images),
                merged=item.merged,
                foreign=sorted(item.foreign),
                images=list(item.sizes),
                grids=[grid(run.records[i].layout) for i in images],
                views=[run.plan.site.views(run.records[i].layout) for i in images],
                slots=_slots(run, images),
                separators=_separators(run, row),
                frames=[run.records[i].layout.frames for i in images],
                plans=[run.image_items[i].plan for i in images],
            )
        )
    notes = [*dict.fromkeys([n for r in run.records if r.encoding is not None for n in r.encoding.notes] + run.notes)]
    notes += _check_pruned(run, rows, samples)
    full_bytes = 0
    if run.cache is not None:
        logical = run.cache.get_seq_length()
        full_bytes = sum(
            2
            * layer.keys.shape[0]
            * layer.keys.shape[1]
            * full_keys(layer, logical)
            * layer.keys.shape[3]
            * layer.keys.element_size()
            for layer in run.cache.layers
            if getattr(layer, "keys", None) is not None
        )
    flops, flops_full = _flops(run)
    return Report(
        strategy=run.plan.pruner.describe(),
        positions=run.plan.positions,
        samples=samples,
        kv_bytes=cache_bytes(run.cache),
        kv_bytes_full=full_bytes,
        flops=flops,
        flops_full=flops_full,
        clock=run.clock,
        notes=notes,
    )


def _slots(run: Pass, images: list[int]) -> Tensor | None:
    """Which of a sample's image placeholders its visual tokens are, or None where all of them are visual."""
    layouts = [run.records[i].layout for i in images]
    if all(layout.visual is None for layout in layouts):
        return None
    slots, start = [], 0
    for layout in layouts:
        slots.append(layout.slots(run.stream.index.device) + start)
        start += layout.placeholders
    return torch.cat(slots)


def _separators(run: Pass, row: int) -> list[int]:
    """Which of a sample's image placeholders are separators that left."""
    return [] if run.bare is None else run.bare[0][row][run.placeholders[row]].nonzero()[:, 0].tolist()


def _distinct_rows(run: Pass) -> list[int]:
    """Rows without the copies that beams and returned sequences make: same feature objects, same prompt."""
    rows, last = [], None
    for row, images in enumerate(run.images):
        features = tuple(id(run.features[i]) for i in images)
        same = (
            features and features == last and (run.input_ids is None or torch.equal(run.input_ids[row], run.input_ids[row - 1]))
        )
        if not same:
            rows.append(row)
        last = features
    return rows


def _cached(run: Pass, row: int, layer: int) -> Tensor:
    """Numbers of the visual tokens that the layer's cache holds; a sliding window's has released the first ones."""
    stays = _stays(run, row, layer)
    if run.cut_off.get(layer, 0) <= 0:
        return stays
    counts, slots, numbers = run.streams[layer].visual_slots()
    here = slots[row, : counts[row]] + run.held[layer].past >= run.cut_off[layer]
    return stays[torch.isin(stays, numbers[row, : counts[row]][here])]


def _stays(run: Pass, row: int, layer: int) -> Tensor:
    """Numbers of the visual tokens that no strategy took from the layer or its cache."""
    lost = run.evicted.get(layer)
    if lost is None:
        return run.computed(row, layer)
    counts, slots, numbers = run.streams[layer].visual_slots()
    stays = ~lost[row, slots[row, : counts[row]]]
    return numbers[row, : counts[row]][stays]


def _encoded(run: Pass, images: list[int]) -> list[tuple[int, Tensor]]:
    """Survivors after each encoder cut, over all images of a sample."""
    blocks = sorted({block for i in images for block, _ in run.records[i].item.cuts})
    result, offsets, total = [], [], 0
    for i in images:
        offsets.append(total)
        total += run.records[i].size
    for block in blocks:
        parts = []
        for i, offset in zip(images, offsets, strict=True):
            done = [index() for at, index in run.records[i].item.cuts if at <= block]
            size = run.records[i].size
            parts.append((done[-1] if done else torch.arange(size, device=run.stream.index.device)) + offset)
        result.append((block, torch.cat(parts)))
    return result


def _check_pruned(run: Pass, rows: list[int], samples: list[SampleReport]) -> list[str]:
    """A note where thresholds dropped nothing.

    Raises:
        NothingPrunedError: where a budget did.
    """
    pruner, notes = run.plan.pruner, []
    for row, sample in zip(rows, samples, strict=True):
        sizes = tuple(sample.images)
        if not sizes or not pruner.asks_to_prune(sizes):
            continue
        left = [len(_stays(run, row, layer)) for layer in range(run.plan.depth)] if run.cache is not None else []
        if min([*map(len, sample.layers), *left]) < sample.visual_tokens:
            continue
        if not pruner.promises_to_prune(sizes):
            notes = [f"{pruner.name}: of at least one sample nothing was dropped, as its settings let everything pass."]
            continue
        hint = (
            ""
            if run.cache is not None or not run.plan.decode
            else " Without a cache (use_cache=False) the decode stage has nothing to cut."
        )
        raise NothingPrunedError(
            f"{pruner.describe()} was asked to prune {sample.visual_tokens} visual tokens and dropped none." + hint
        )
    return notes


def _flops(run: Pass) -> tuple[int, int]:
    past = run.cache.get_seq_length() - run.stream.length if run.cache is not None else 0
    encoder, projector, decoder = run.plan.costs
    fed = _fed_tokens(run)
    per_layer = []
    for stream in run.streams:
        n = stream.index.shape[1]
        counts = [n] * len(fed) if stream.valid is None else stream.memo("counts", lambda s=stream: s.valid.sum(1).tolist())
        per_layer.append([(c, past + c) for c in counts])
    flops = stack_flops(decoder, per_layer)
    full = stack_flops(decoder, [[(n, past + n) for n in fed]] * len(decoder))
    for encoding in {id(r.encoding): r.encoding for r in run.records if r.encoding is not None}.values():
        flops, full = flops + encoding.flops, full + encoding.flops
        if not encoding.lengths:
            continue  # the user's tower answered without running its blocks
        flops += stack_flops(encoder, [[(n, n) for n in lengths] for lengths in encoding.lengths])
        full += stack_flops(encoder, [[(n, n) for n in lengths] for lengths in encoding.unpruned()])
    unique = {id(r): r for r in run.records}.values()
    flops += projector * sum(len(r.item.index) for r in unique)
    full += projector * sum(r.size for r in unique)
    return flops, full


def _fed_tokens(run: Pass) -> list[int]:
    """Real tokens that the user fed, per row."""
    kept = [
        run.streams[0].index.shape[1] if run.streams[0].valid is None else int(run.streams[0].valid[row].sum())
        for row in range(len(run.items))
    ]
    lost = [sum(item.sizes) - len(run.computed(row, 0)) for row, item in enumerate(run.items)]
    if run.bare is not None:
        lost = [n + more for n, more in zip(lost, run.bare[1], strict=True)]
    return [k + n for k, n in zip(kept, lost, strict=True)]
