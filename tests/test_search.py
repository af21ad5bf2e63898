"""Calibration sets, the proxy against real generation, the searches on made-up models, resuming, the commands."""

from __future__ import annotations

import itertools
import json
import math
import os
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import GRID, IMAGE, preencoding, prompt, tiny_llava
from PIL import Image
from typer.testing import CliRunner

import vtprune
from vtprune import schedule
from vtprune.cli import searching
from vtprune.measure.bench import Everything
from vtprune.pruner import UnsupportedError
from vtprune.search import calibration as calibrating
from vtprune.search import gsearch, judge, mustdrop, psigmoid
from vtprune.search.calibration import Calibration, CalibrationError
from vtprune.search.journal import Journal
from vtprune.search.judge import Outcome, Rule, SearchError

# ---------------------------------------------------------------- calibration sets


def picture(path, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (8 * GRID, 8 * GRID, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def make_set(folder, lines, pictures=("a.png", "b.png")):
    folder.mkdir(exist_ok=True)
    for at, name in enumerate(pictures):
        picture(folder / name, at)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "questions.jsonl").write_text(text)
    return folder


GOOD = {"image": "a.png", "question": "What is it?", "answer": "a cat"}


def test_a_set_is_read_from_its_folder_or_file(tmp_path):
    lines = [GOOD, "", {"image": ["b.png", "a.png"], "question": "Both?", "type": "left alone"}]
    folder = make_set(tmp_path / "set", lines)
    found = Calibration.load(folder)
    assert found == Calibration.load(folder / "questions.jsonl").__class__(
        "set", found.questions, Calibration.load(folder / "questions.jsonl").sha256
    )
    assert found.data == schedule.Data("set", 2, found.sha256)
    first, second = found.questions
    assert (first.text, first.answer, first.line) == ("What is it?", "a cat", 1)
    assert [p.name for p in second.images] == ["b.png", "a.png"]
    assert (second.answer, second.line) == (None, 3)
    assert len(Calibration.load(folder, 1).questions) == 1


def test_the_hash_is_of_what_is_asked_not_of_where(tmp_path):
    one, other = make_set(tmp_path / "one", [GOOD]), make_set(tmp_path / "other", [{**GOOD, "id": 3}, GOOD])
    sha = Calibration.load(one).sha256
    assert Calibration.load(other, 1).sha256 == sha
    assert Calibration.load(other).sha256 != sha
    picture(one / "a.png", 77)
    assert Calibration.load(one).sha256 != sha


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("3", "an object"),
        ({"image": "a.png"}, '"question"'),
        ({"image": "a.png", "question": "  "}, '"question"'),
        ({"image": "a.png", "question": 3}, '"question"'),
        ({**GOOD, "answer": 3}, '"answer"'),
        ({"question": "What?"}, '"image"'),
        ({**GOOD, "image": []}, '"image"'),
        ({**GOOD, "image": ["a.png", 3]}, '"image"'),
        ({**GOOD, "image": "missing.png"}, "no picture 'missing.png'"),
        ({**GOOD, "image": "."}, "no picture"),
        ({**GOOD, "image": "../outside.png"}, "outside of the set's folder"),
        ({**GOOD, "image": "sub/../../outside.png"}, "outside of the set's folder"),
        ({**GOOD, "image": "ABSOLUTE"}, "outside of the set's folder"),
        ({**GOOD, "image": "link.png"}, "outside of the set's folder"),
        ({**GOOD, "image": "a\0.png"}, "means nothing here"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(tmp_path, line, says):
    picture(tmp_path / "outside.png")
    folder = tmp_path / "set"
    if isinstance(line, dict) and line.get("image") == "ABSOLUTE":
        line = {**line, "image": str(folder / "a.png")}
    make_set(folder, [GOOD, line])
    os.symlink(tmp_path / "outside.png", folder / "link.png")
    with pytest.raises(CalibrationError, match=r"line 2") as caught:
        Calibration.load(folder)
    assert says in str(caught.value)


def test_a_link_inside_the_folder_is_followed(tmp_path):
    folder = make_set(tmp_path / "set", [{**GOOD, "image": "link.png"}])
    os.symlink(folder / "b.png", folder / "link.png")
    assert Calibration.load(folder).questions[0].images[0].name == "b.png"


def test_files_that_are_no_sets(tmp_path, monkeypatch):
    with pytest.raises(CalibrationError, match=r"questions\.jsonl"):
        Calibration.load(tmp_path)
    with pytest.raises(CalibrationError, match="no file"):
        Calibration.load(tmp_path / "missing.jsonl")
    empty = make_set(tmp_path / "set", ["", "  "])
    with pytest.raises(CalibrationError, match="no questions"):
        Calibration.load(empty)
    (empty / "questions.jsonl").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(CalibrationError, match="UTF-8"):
        Calibration.load(empty)
    monkeypatch.setattr(calibrating, "MAX_BYTES", 10)
    with pytest.raises(CalibrationError, match="more than"):
        Calibration.load(make_set(tmp_path / "large", [GOOD]))


# ---------------------------------------------------------------- the rule


def outcome(logprobs, right=None, same=None):
    n = len(logprobs)
    return Outcome(tuple(logprobs), tuple(same or [True] * n), tuple([True] * n if right is None else right))


def test_the_rule_compares_probabilities_and_answers_with_the_full_model():
    full = outcome([math.log(0.8)] * 100, [True] * 90 + [False] * 10)
    near = outcome([math.log(0.8 * 0.995)] * 100, full.right)
    verdict = Rule(0.01).judge(near, full)
    assert verdict.accepted
    assert verdict.ratio == pytest.approx(0.995)
    assert verdict.slack == pytest.approx(0.005)
    assert not Rule(0.001).judge(near, full).accepted
    flipped = outcome(full.logprobs, [True] * 89 + [False] * 11)
    assert not Rule(0.01).judge(flipped, full).accepted  # one of 90 is 1.1 %
    assert Rule(0.02).judge(flipped, full).accepted
    assert Rule(0.0).judge(full, full).accepted
    assert judge.log_gain(near, full) == pytest.approx(math.log(0.995))


def test_confidence_moves_the_bar_the_right_way():
    rng = np.random.default_rng(0)
    full = outcome([0.0] * 60)
    noisy = outcome(np.log(np.where(rng.random(60) < 0.1, 0.8, 1.0)))  # about 2 % lost, unevenly
    loss = 1 - Rule().judge(noisy, full).ratio
    lenient, mean, strict = (Rule(loss * 0.9, c) for c in (0.05, 0.5, 0.95))
    assert lenient.judge(noisy, full).accepted
    assert not mean.judge(noisy, full).accepted
    assert Rule(loss * 1.1, 0.5).judge(noisy, full).accepted
    assert not Rule(loss * 1.1, 0.95).judge(noisy, full).accepted
    assert strict.judge(noisy, full).bound < mean.judge(noisy, full).bound < lenient.judge(noisy, full).bound
    assert strict.judge(noisy, full) == strict.judge(noisy, full)


@pytest.mark.parametrize("fields", [{"tolerance": -0.1}, {"tolerance": 1.0}, {"tolerance": math.nan}, {"confidence": 0.0}])
def test_rules_without_meaning(fields):
    with pytest.raises(SearchError, match=next(iter(fields))):
        Rule(**fields)


def test_outcomes_survive_json_and_nothing_else_does():
    one = outcome([-0.1, -2.0], [True, False], [False, True])
    assert Outcome.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    for bad in (None, {}, {"logprobs": [1], "same": [], "right": [1]}, {"logprobs": [math.inf], "same": [1], "right": [1]}):
        with pytest.raises(ValueError, match="outcome"):
            Outcome.from_dict(bad)


# ---------------------------------------------------------------- G-Search on a made-up model


class Needy:
    """A model that needs `essential[i]` of 32 units in layer i, and fails one question in ten below that."""

    def __init__(self, essential, stop_at=None):
        self.essential, self.asked, self.stop_at = essential, [], stop_at
        self.full = outcome([0.0] * 20)

    def __call__(self, rates):
        if self.stop_at is not None and len(self.asked) == self.stop_at:
            raise KeyboardInterrupt
        self.asked.append(rates)
        short = sum(max(0.0, need - 32 * rate) for need, rate in zip(self.essential, rates, strict=True))
        return outcome([-short / 100] * 20, [short == 0] * 2 + [True] * 18)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 32), min_size=3, max_size=9).map(lambda x: sorted(x, reverse=True)))
def test_bisection_finds_what_each_layer_needs(essential):
    model = Needy(essential)
    found = gsearch.search(model, model.full, len(essential), gsearch.Settings(trials=5))
    least = [min(32, n) for n in essential]
    assert [32 * r for r in found.rates[2:]] == least[2:]
    assert found.rates[:2] == (1.0, 1.0)
    assert len(model.asked) == len(set(model.asked)) == len(found.trace) <= 5 * (len(essential) - 2)
    for rates in model.asked:
        assert all(a >= b for a, b in itertools.pairwise(rates))


def test_bayesian_optimisation_finds_nearly_the_same_and_never_more():
    essential = [32, 32, 20, 11, 11, 4]
    model = Needy(essential)
    found = gsearch.search(model, model.full, 6, gsearch.Settings(method="bo", trials=10))
    for rate, need in zip(found.rates[2:], essential[2:], strict=True):
        assert need <= 32 * rate <= need + 2
    assert len(model.asked) == len(set(model.asked)) <= 40
    assert found.verdict.accepted


def test_losses_of_layers_do_not_add_up():
    """Each cut costs half a percent; ten of them would cost five, and only two are within one percent of the full model."""

    def evaluate(rates):
        cuts = sum(a > b for a, b in zip((1.0, *rates), rates, strict=False))
        return outcome([math.log(1 - 0.005 * cuts)] * 50)

    found = gsearch.search(evaluate, outcome([0.0] * 50), 12, gsearch.Settings(Rule(0.0101), grid=4))
    assert evaluate(found.rates).logprobs[0] >= math.log(0.9899)
    assert found.verdict.ratio >= 0.9899


def test_every_other_layer_copies_and_the_first_layers_stay():
    model = Needy([32, 32, 24, 16, 16, 8, 8])
    found = gsearch.search(model, model.full, 7, gsearch.Settings(every=2, min_layer=3))
    assert [32 * r for r in found.rates] == [32, 32, 32, 16, 16, 8, 8]


def test_a_model_that_needs_everything_keeps_everything():
    model = Needy([32] * 5)
    found = gsearch.search(model, model.full, 5)
    assert found.rates == (1.0,) * 5
    assert found.verdict is None
    assert found.mean_keep == 1.0


def test_settings_without_meaning():
    for fields in ({"method": "grid"}, {"trials": 0}, {"grid": 1}, {"min_layer": 0}, {"every": 0}):
        with pytest.raises(SearchError, match=next(iter(fields))):
            gsearch.Settings(**fields)
    with pytest.raises(SearchError, match="2 layers"):
        gsearch.search(Needy([1, 1]), outcome([0.0]), 2)


def test_bo_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SearchError, match=r"vtprune\[search\]"):
        gsearch.optuna()


# ---------------------------------------------------------------- resuming


@pytest.mark.parametrize("method", ["bisect", "bo"])
def test_a_killed_search_goes_on_to_the_same_result(tmp_path, method):
    essential, how = [32, 32, 20, 11, 4], gsearch.Settings(method=method, trials=5)
    whole = Needy(essential)
    wanted = gsearch.search(whole, whole.full, 5, how)
    path = tmp_path / "state.json"
    asked = []
    for stop in (0, 1, 4, 3, None):
        model = Needy(essential, stop)
        journal = Journal(path, {"a": 1})
        assert journal.resumed == len(asked)
        assert path.exists() == bool(asked)
        evaluate = journal.memory(model, Outcome.to_dict, Outcome.from_dict)
        try:
            found = gsearch.search(evaluate, model.full, 5, how)
        except KeyboardInterrupt:
            assert stop is not None
        asked += model.asked
        assert len(json.loads(path.read_text())["results"] if asked else []) == len(asked)
    assert found == wanted
    assert asked == whole.asked  # nothing twice, nothing left out
    journal.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_resume_with_other_settings_is_refused(tmp_path):
    path = tmp_path / "out.json.state"
    Journal(path, {"tolerance": 0.01, "seed": 1}).memory(lambda x: x, int, int)(3)
    with pytest.raises(SearchError, match=r"tolerance was 0.01, is 0.02") as caught:
        Journal(path, {"tolerance": 0.02, "seed": 1})
    assert "--fresh" in str(caught.value)
    assert "seed" not in str(caught.value)
    with pytest.raises(SearchError, match="method was None, is 'bo'"):
        Journal(path, {"tolerance": 0.01, "seed": 1, "method": "bo"})
    assert Journal(path, {"tolerance": 0.01, "seed": 1}).resumed == 1
    assert Journal(path, {"tolerance": 0.02}, fresh=True).resumed == 0
    assert not path.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "vtprune-search-state", "version": 1}', '{"x": NaN}'])
def test_a_damaged_state_is_refused(tmp_path, text):
    path = tmp_path / "state.json"
    path.write_text(text)
    with pytest.raises(SearchError, match="--fresh"):
        Journal(path, {})
    assert path.read_text() == text


def test_a_damaged_result_is_refused(tmp_path):
    journal = Journal(tmp_path / "state.json", {})
    journal.memory(lambda x: x, lambda x: "rubbish", int)(3)
    with pytest.raises(SearchError, match="damaged"):
        Journal(tmp_path / "state.json", {}).memory(lambda x: x, int, int)(3)


# ---------------------------------------------------------------- P-Sigmoid and MustDrop on made-up models


def test_psigmoid_finds_the_best_steepness():
    asked = []

    def evaluate(k):
        asked.append(k)
        return outcome([-0.1 - (math.log(k) - math.log(0.8)) ** 2] * 4)

    found = psigmoid.search(evaluate, outcome([-0.1] * 4), trials=15)
    assert 0.7 < found.steepness < 0.92
    assert found.gain == max(t["gain"] for t in found.trace)
    assert len(asked) == len(found.trace) == 15
    assert all(0.049 < k < 5.01 for k in asked)
    assert found.outcome == evaluate(found.steepness)
    again = psigmoid.search(evaluate, outcome([-0.1] * 4), trials=15)
    assert again == found


def test_psigmoid_starts_at_the_curve_nearest_to_a_schedule():
    for k, middle in ((0.2, 12.0), (0.7, 9.5), (2.0, 4.0)):
        rates = [1 / (1 + math.exp(k * (i - middle))) for i in range(24)]
        assert psigmoid.fit(rates) == pytest.approx(k, rel=0.06)
    asked = []
    psigmoid.search(lambda k: asked.append(k) or outcome([0.0]), outcome([0.0]), trials=2, start=0.7)
    assert asked[0] == pytest.approx(0.7)
    assert psigmoid.search(lambda k: outcome([0.0]), outcome([0.0]), trials=1, start=99.0).steepness == pytest.approx(5.0)


def test_psigmoid_refuses_budgets_that_no_curve_reaches():
    psigmoid.check(0.26, 8, 2)
    psigmoid.check(0.126, 8, 1)
    psigmoid.check(3, 8, 2)  # not known before there is a picture
    with pytest.raises(SearchError, match=r"over 8 layers is a mean share of 0\.25 .*min_layer"):
        psigmoid.check(0.25, 8, 2)
    with pytest.raises(SearchError, match=r"Give more than that\.$"):
        psigmoid.check(0.125, 8, 1)
    with pytest.raises(SearchError, match="no layer is left"):
        psigmoid.check(0.5, 2, 2)


def falling(floor, ceiling):
    """Tokens left at a threshold: a smooth fall around 1e-3."""
    return lambda g, i: floor + (ceiling - floor) / (1 + (g / 1e-3) ** 1.5)


@pytest.mark.parametrize("target", [64, 100.5, 300])
def test_mustdrop_meets_the_target(target):
    found = mustdrop.search(falling(40, 420), target, ratio=0.5)
    assert found.tokens == pytest.approx(target, rel=0.01)
    assert found.individual_thr == 0.5 * found.global_thr
    assert falling(40, 420)(found.global_thr, 0) == found.tokens
    assert len(found.trace) <= 20


def test_mustdrop_says_what_keeps_it_from_the_target():
    with pytest.raises(SearchError, match=r"420.*sim_thr"):
        mustdrop.search(falling(40, 420), 500)
    with pytest.raises(SearchError, match=r"80.*key_rate"):
        mustdrop.search(falling(80, 420), 64)
    with pytest.raises(SearchError, match=r"within"):
        mustdrop.search(lambda g, i: 100.0 if g < 1e-3 else 50.0, 64)
    for fields in ({"ratio": 0.0}, {"within": 0.0}, {"trials": 2}, {"ratio": math.nan}):
        with pytest.raises(SearchError):
            mustdrop.search(falling(40, 420), 64, **fields)


# ---------------------------------------------------------------- the proxy on a tiny random model


class Words:
    """A processor for the tiny random models: a word is its length, a picture its pixels."""

    image_token = "<image>"

    def __call__(self, images, text, return_tensors):
        assert text.count(self.image_token) == len(images)
        before, *rest = text.split(self.image_token)
        ids = prompt(len(before.split()), *(part for words in rest for part in ("I", len(words.split()))))
        ids += [3 + len(text) % 90]  # so that questions of as many words differ
        pixels = torch.stack([torch.tensor(np.asarray(i), dtype=torch.float32).permute(2, 0, 1) / 64 - 2 for i in images])
        return {"input_ids": torch.tensor([ids]), "pixel_values": pixels}

    def decode(self, tokens, skip_special_tokens):
        return " ".join(map(str, tokens))


@pytest.fixture(scope="module")
def proxy_of(tmp_path_factory):
    lines = [
        {"image": "a.png", "question": "one"},
        {"image": "b.png", "question": "one two three four"},
        {"image": "a.png", "question": "one two three", "answer": "never said"},
        {"image": ["b.png", "a.png"], "question": "one two"},
        {"image": "a.png", "question": "one two three four five"},
    ]
    found = Calibration.load(make_set(tmp_path_factory.mktemp("sets") / "set", lines))

    def make(model=None, **options):
        return found.encode(model or tiny_llava(), Words(), **{"batch": 2, "max_new_tokens": 4, **options})

    return make


def test_the_full_models_answers_are_what_generate_says(proxy_of):
    proxy = proxy_of()
    for row, question in enumerate(proxy.questions):
        images = [Image.open(path) for path in question.images]
        text = "USER: " + "<image>\n" * len(images) + f"{question.text} ASSISTANT:"
        inputs = Words()(images, text, "pt")
        out = proxy.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert proxy.answers[row] == out[0, inputs["input_ids"].shape[1] :].tolist()
    assert proxy.full.right == (True, True, False, True, True)


def test_the_proxy_of_the_full_model_is_the_full_model(proxy_of):
    proxy = proxy_of()
    again = proxy.measure(Everything())
    assert again.same == (True,) * 5
    assert again.right == proxy.full.right
    assert again.logprobs == pytest.approx(proxy.full.logprobs, abs=1e-4)


STRATEGIES = [
    pytest.param(lambda: vtprune.FastV(after=6, layer=2), id="prefill"),
    pytest.param(lambda: vtprune.Uniform(keep=5), id="select"),
    pytest.param(lambda: vtprune.FlowCut(keep=6), id="encode"),
    pytest.param(lambda: vtprune.FastV(after=8, layer=1) + vtprune.Evict(keep=2), id="decode"),
]


@pytest.mark.parametrize("make", STRATEGIES)
def test_the_proxy_agrees_with_answers_generated_under_pruning(proxy_of, make):
    proxy = proxy_of()
    measured = proxy.measure(make())
    said, accuracy = proxy.generate(make())
    assert [a == b for a, b in zip(said, proxy.said, strict=True)] == list(measured.same)
    assert accuracy == pytest.approx(measured.accuracy)
    assert measured.logprobs != pytest.approx(proxy.full.logprobs, abs=1e-3)


@pytest.mark.parametrize("make", STRATEGIES)
def test_the_proxy_does_not_depend_on_batches_nor_on_shared_features(proxy_of, make):
    wanted = proxy_of(batch=1)
    wanted.by_features = False  # pixels with every forward
    values = wanted.measure(make()).logprobs
    assert proxy_of(batch=5).measure(make()).logprobs == pytest.approx(values, abs=1e-4)


def test_what_is_kept_depends_on_the_prompt_alone(proxy_of):
    """Log-probabilities are those of a prompt's prefill followed by the answer, one token at a time."""
    proxy, pruner = proxy_of(), vtprune.FastV(after=6, layer=2)
    values = proxy.measure(pruner).logprobs
    for row, question in enumerate(proxy.questions):
        images = [Image.open(path) for path in question.images]
        inputs = Words()(images, "USER: " + "<image>\n" * len(images) + f"{question.text} ASSISTANT:", "pt")
        total = 0.0
        with vtprune.pruning(proxy.model, pruner), torch.inference_mode():
            out = proxy.model(**inputs, use_cache=True)
            for token in proxy.answers[row]:
                logits = out.logits[0, -1].double()
                logits[IMAGE] = -math.inf
                total += float(logits.log_softmax(-1)[token])
                out = proxy.model(input_ids=torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
        assert values[row] == pytest.approx(total / len(proxy.answers[row]), abs=1e-4)


def test_answers_end_where_the_model_ends_them(proxy_of):
    first = proxy_of().answers
    model = tiny_llava()
    model.generation_config.eos_token_id = [first[0][1], first[1][2]]
    proxy = proxy_of(model)
    ends = set(model.generation_config.eos_token_id)
    assert len(proxy.answers[0]) <= 2
    for before, now in zip(first, proxy.answers, strict=True):
        assert before[: len(now)] == now
        assert not ends & set(now[:-1])
        assert len(now) == 4 or now[-1] in ends
    assert proxy.measure(Everything()).logprobs == pytest.approx(proxy.full.logprobs, abs=1e-4)


def test_tokens_are_counted_per_image(proxy_of):
    proxy = proxy_of(answers=False)
    assert proxy.visual_tokens == GRID * GRID
    count, share = proxy.tokens(vtprune.Uniform(keep=9))
    assert count == pytest.approx(9)
    assert share == pytest.approx(0.25)
    count, share = proxy.tokens(vtprune.FlowCut(keep=0.5))
    assert (count, share) == (pytest.approx(18), pytest.approx(0.5))


def test_what_a_model_cannot_be_asked(proxy_of, tmp_path):
    folder = make_set(tmp_path / "set", [{**GOOD, "question": "an <image> too many"}])
    with pytest.raises(CalibrationError, match=r"line 1.*<image>"):
        Calibration.load(folder).encode(tiny_llava(), Words())
    (folder / "a.png").write_bytes(b"no picture")
    (folder / "questions.jsonl").write_text(json.dumps(GOOD))
    with pytest.raises(CalibrationError, match=r"line 1.*not a picture"):
        Calibration.load(folder).encode(tiny_llava(), Words())
    with pytest.raises(CalibrationError, match="batch=0"):
        proxy_of(batch=0)
    with pytest.raises(UnsupportedError, match="unwrap"):
        proxy_of(vtprune.wrap(tiny_llava(), "uniform", keep=4))
    model = tiny_llava()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(UnsupportedError, match="not finite"):
        proxy_of(model)


def test_gsearch_end_to_end_on_a_random_model(proxy_of, tmp_path):
    proxy = proxy_of()

    def evaluate(rates):
        return proxy.measure(vtprune.GSearch(rates=rates, max_cuts=None))

    lax = gsearch.search(evaluate, proxy.full, 4, gsearch.Settings(Rule(0.9), grid=8))
    strict = gsearch.search(evaluate, proxy.full, 4, gsearch.Settings(Rule(0.0), grid=8))
    assert lax.mean_keep <= strict.mean_keep
    for found in (lax, strict):
        limit = 0.9 if found is lax else 0.0
        assert Rule(limit).judge(evaluate(found.rates), proxy.full).accepted
    schedule.write(tmp_path / "g.json", "gsearch", schedule.Model("m", 4, "x"), schedule.Data("d", 5, "0"),
                   {"rates": list(lax.rates), "min_layer": 2}, lax.trace)  # fmt: skip
    assert schedule.read(tmp_path / "g.json", "gsearch").values["rates"] == list(lax.rates)


# ---------------------------------------------------------------- the commands


def run(*args):
    return CliRunner().invoke(searching.app, list(map(str, args)), catch_exceptions=False, env={"COLUMNS": "200"})


def refused(*args):
    result = run(*args)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.strip().splitlines() if line.strip() and not line.startswith("note:")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture(scope="module")
def real_set(tmp_path_factory):
    from evaluations.tiny.calibration import write

    folder = tmp_path_factory.mktemp("real") / "train"
    assert write(folder, 4, per_picture=4) == 1
    return folder


def test_the_tiny_models_set_is_of_training_pictures(tmp_path, real_set):
    from evaluations.tiny.calibration import FIRST, GRADED, write
    from evaluations.worlds import make_scene

    assert write(tmp_path / "set", 6, per_picture=4) == 2
    found = Calibration.load(tmp_path / "set")
    assert len(found.questions) == 6
    assert Calibration.load(tmp_path / "set", 4).sha256 == Calibration.load(real_set).sha256
    for question in found.questions:
        scene = make_scene(int(question.images[0].stem.removeprefix("train-")), "train")
        assert scene.seed >= FIRST
        assert np.array_equal(np.asarray(Image.open(question.images[0])), scene.array())
        asked = scene.questions(4, types=GRADED, salt=7) + scene.questions(2, types=GRADED, salt=7)
        assert (question.text, question.answer) in {(q.text, q.answer) for q in asked}


def test_mistakes_are_one_line(tmp_path, real_set, monkeypatch):
    monkeypatch.setattr("vtprune.cli.running.load", lambda *args: pytest.fail("loaded a model before looking"))
    to = tmp_path / "out.json"
    assert "questions.jsonl" in refused("gsearch", "--data", tmp_path / "none", "--out", to)
    assert "tolerance" in refused("gsearch", "--data", real_set, "--out", to, "--tolerance", "1.5")
    assert "method" in refused("gsearch", "--data", real_set, "--out", to, "--method", "guess")
    assert "is a folder" in refused("gsearch", "--data", real_set, "--out", tmp_path)
    assert "make it first" in refused("gsearch", "--data", real_set, "--out", tmp_path / "no" / "out.json")
    assert "--keep" in refused("psigmoid", "--data", real_set, "--out", to, "--keep", "many")
    assert "no file" in refused("psigmoid", "--data", real_set, "--out", to, "--keep", "64", "--start", tmp_path / "no.json")
    assert "--keep" in refused("mustdrop", "--data", real_set, "--out", to, "--keep", "1.5")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def embedded(monkeypatch):
    """The embedded model, loaded once; small steps."""
    torch.set_num_threads(1)
    kept = {}
    from vtprune.cli import running

    real = running.load
    monkeypatch.setattr(running, "load", lambda *args: kept.get(args) or kept.setdefault(args, real(*args)))


@preencoding
def test_the_commands_write_schedules_that_load(tmp_path, real_set, embedded):
    common, to = ("--data", real_set, "--batch", 4), tmp_path / "g.json"
    result = run("gsearch", *common, "--out", to, "--grid", 4, "--every", 3, "--tolerance", 0.3)
    assert result.exit_code == 0, result.output
    assert "mean keep" in result.stdout
    assert "4 questions: one answer is 25.0 %" in result.stderr
    found = schedule.read(to, "gsearch")
    assert found.model.name == "tiny-llava"
    assert found.data.name == "train"
    assert found.values["rates"][:2] == [1.0, 1.0]
    assert vtprune.GSearch.load(to).rates == tuple(found.values["rates"])

    options = ("--keep", 0.4, "--trials", 2, "--start", to, "--min-layer", 1)
    # the first layer alone is an eighth of the model
    said = refused("psigmoid", *common, "--out", tmp_path / "p.json", "--keep", 0.125, "--min-layer", 1)
    assert "Give more than that" in said
    result = run("psigmoid", *common, "--out", tmp_path / "p.json", *options)
    assert result.exit_code == 0, result.output
    made = vtprune.PSigmoid.load(tmp_path / "p.json")
    assert (made.keep, made.min_layer) == (0.4, 1)
    assert made.steepness == schedule.read(tmp_path / "p.json").values["steepness"]

    # within a large distance, as four questions move in steps
    result = run("mustdrop", *common, "--out", tmp_path / "m.json", "--keep", 60, "--within", 0.05)
    assert result.exit_code == 0, result.output
    values = schedule.read(tmp_path / "m.json", "mustdrop").values
    assert values["equivalent_tokens"] == pytest.approx(60, rel=0.05)
    assert vtprune.MustDrop.load(tmp_path / "m.json").global_thr == values["global_thr"]
    assert "cannot be reached" in refused("mustdrop", *common, "--out", tmp_path / "n.json", "--keep", 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g.json", "m.json", "p.json"]


@preencoding
def test_a_stopped_command_goes_on(tmp_path, real_set, embedded, monkeypatch):
    from vtprune.search.calibration import Proxy

    to, real, left = tmp_path / "g.json", Proxy.measure, [1]

    def measure(self, *args):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return real(self, *args)

    monkeypatch.setattr(Proxy, "measure", measure)
    args = ("gsearch", "--data", real_set, "--out", to, "--grid", 4, "--every", 3, "--questions", 2)
    result = run(*args)
    assert result.exit_code == 130
    assert "goes on where it was" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["g.json.state"]
    said = refused(*args, "--tolerance", 0.5)
    assert "tolerance was 0.01, is 0.5" in said
    left.extend(range(9))
    result = run(*args)
    assert result.exit_code == 0, result.output
    assert "1 trials are known" in result.stderr
    assert len(schedule.read(to).trace) == 1 + 9 - len(left)
    assert [p.name for p in tmp_path.iterdir()] == ["g.json"]
