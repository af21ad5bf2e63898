"""QuoTA around the scorer: what it is asked, how its answers become scores, which frames it sees."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune.pruner import UnsupportedError
from vtprune.quota import by_slot, decouple_prompt, frame_question, last, parse, phrases, relevance, sample, yes_probability

# ---------------------------------------------------------------------- query


def test_the_prompt_holds_the_question_and_examples_that_parse():
    question = 'What is in the {box}? (A) "a cat" (B) nothing'
    prompt = decouple_prompt(f"  {question}\n")
    assert prompt.count(question) == 1 and prompt.rstrip().endswith(question)
    examples = prompt.split("Question: ")[1:4]
    assert [parse(example) for example in examples] == [["boat", "bridge"], ["bag", "bench"], []]
    assert parse(prompt.split("Question: ")[0]) == []


@pytest.mark.parametrize(
    "reply, objects",
    [
        ('Step 1: yes\nStep 3: ["Cat ", "cat", "", "  red   car"]', ["cat", "red car"]),
        ('Step 1: yes\nStep 3: ["a"]\nStep 3: ["b"]', ["a"]),
        ("Step 1: yes\nStep 3: ['the dog\\'s ball']", ["the dog's ball"]),
        ("Step 1: yes\nStep 3: [1, 2]", []),
        ("Step 1: yes\nStep 3: [None, 'cat']", []),
        ("Step 1: yes\nStep 3: [__import__('os').getcwd()]", []),
        ("Step 1: yes\nStep 3: [open('x', 'w')]", []),
        ("Step 1: yes\nStep 3: [" + "(" * 5000 + "]", []),
        ("Step 1: yes\nStep 3: [" + "-" * 50000 + "1]", []),
        ("Step 1: yes\nStep 3: ['a\0']", []),
        ("", []),
    ],
)
def test_parsing(reply, objects, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse(reply) == objects
    assert not list(tmp_path.iterdir())


@settings(max_examples=100, deadline=None)
@given(st.text(), st.lists(st.text(alphabet="abc xyz'\"\\", max_size=9), max_size=5))
def test_no_reply_raises(text, names):
    for reply in (text, f"step 1: yes step 3: [{text}]", f"step 1: yes\nstep 3: {names!r}"):
        objects = parse(reply)
        assert all(isinstance(name, str) and name for name in objects)
    assert parse(f"step 1: yes\nstep 3: {names!r}") == list(
        dict.fromkeys(" ".join(name.split()) for name in names if name.strip())
    )


def test_falls_back_to_the_whole_question():
    question = "Who enters first? (A) the man (B) the dog"
    for objects in (None, [], parse("no idea"), ["  "]):
        assert phrases(question, objects) == [question]
        assert question in frame_question(question, objects)
    assert phrases(question, ["man", "dog", "man"]) == ["man", "dog"]
    asked = frame_question(question, ["man", "dog"])
    assert "man, dog" in asked and question not in asked and "A. Yes\nB. No" in asked
    assert phrases("", ["man"]) == ["man"]  # a list needs no question


@pytest.mark.parametrize("objects", ["man", [1], {"man"}, [["man"]]])
def test_objects_that_are_no_list_of_strings(objects):
    with pytest.raises(UnsupportedError, match="list of strings"):
        phrases("Who?", objects)


def test_an_empty_question():
    for ask in (decouple_prompt, phrases, frame_question):
        with pytest.raises(UnsupportedError, match="question is empty"):
            ask(" \n")


# ---------------------------------------------------------------------- score head


def test_last_position_with_padding_on_either_side():
    logits = torch.arange(24.0).view(3, 4, 2)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]])
    assert torch.equal(last(logits, mask), torch.stack([logits[0, 3], logits[1, 1], logits[2, 3]]))
    with pytest.raises(UnsupportedError, match="all padding"):
        last(logits, mask * torch.tensor([[1], [0], [1]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_probability_of_the_letter(dtype):
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)).mul(8).to(dtype)
    p = logits.double().softmax(-1)
    for yes in (3, [3, 17]):
        ids = [yes] if isinstance(yes, int) else yes
        made = yes_probability(logits, yes, 9)
        assert made.dtype == torch.float32
        torch.testing.assert_close(made.double(), p[:, ids].sum(-1), rtol=1e-5, atol=0)
        made = yes_probability(logits, yes, 9, over="letters")
        expected = p[:, ids].sum(-1) / (p[:, ids].sum(-1) + p[:, 9])
        torch.testing.assert_close(made.double(), expected, rtol=1e-5, atol=0)


def test_extreme_logits_stay_probabilities():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [-math.inf, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert yes_probability(logits, 0).tolist() == pytest.approx([1, 0, 0, 1 / 3])
    assert yes_probability(logits, 0, 1, over="letters").tolist() == pytest.approx([1, 0, 0, 0.5])


@pytest.mark.parametrize(
    "yes, no, over, match",
    [
        (3, None, "vocabulary", "vocabulary of 3"),
        (-1, None, "vocabulary", "vocabulary of 3"),
        (0, None, "letters", "needs the token id of the other letter"),
        (0, 0, "letters", "each once"),
        ([], 1, "letters", "each once"),
        (0, [], "letters", "each once"),
        (0, 1, "both", "over='both'"),
    ],
)
def test_letters_that_mean_nothing(yes, no, over, match):
    with pytest.raises(UnsupportedError, match=match):
        yes_probability(torch.zeros(2, 3), yes, no, over=over)


def test_a_scorer_that_answers_garbage():
    logits = torch.zeros(3, 4)
    logits[1, 2] = math.nan
    with pytest.raises(UnsupportedError, match=r"frames \[1\]"):
        yes_probability(logits, 0)
    with pytest.raises(UnsupportedError, match=r"frames \[0, 1, 2\]"):
        yes_probability(torch.full((3, 4), -math.inf), 0)


# ---------------------------------------------------------------------- similarities


def test_mappings():
    similarity = torch.tensor([[0.20, 0.24], [0.22, 0.21], [0.30, 0.10]], dtype=torch.float16)
    best = similarity.float().amax(-1)
    torch.testing.assert_close(relevance(similarity), (best - 0.22) / 0.08, atol=2e-3, rtol=0)
    torch.testing.assert_close(relevance(similarity, "sigmoid", scale=50, bias=-10), torch.sigmoid(50 * best - 10))
    generic = torch.tensor([[0.2, 0.1], [0.25, 0.2], [0.2, 0.2]])
    expected = []
    for row, others in zip(similarity.double(), generic.double(), strict=True):
        each = [torch.cat([s[None], others]).mul(100).softmax(0)[0] for s in row]
        expected.append(float(max(each)))
    assert relevance(similarity, "generic", generic=generic).tolist() == pytest.approx(expected, rel=1e-4)
    assert relevance(similarity[:, 0]).tolist() == pytest.approx([0, 0.2, 1], abs=3e-3)


@pytest.mark.parametrize("value", [0.0, 0.25, -0.3])
def test_no_frame_stands_out(value):
    assert relevance(torch.full((4,), value)).tolist() == [1, 1, 1, 1]
    assert relevance(torch.full((1,), value)).tolist() == [1]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=9), st.sampled_from(["sigmoid", "generic", "minmax"]))
def test_mappings_keep_the_order_and_the_range(values, mapping):
    scores = relevance(torch.tensor(values), mapping, generic=torch.zeros(len(values), 2), scale=10.0)
    assert scores.isfinite().all() and scores.min() >= 0 and scores.max() <= 1
    order = torch.tensor(values).argsort(stable=True)
    assert (scores[order].diff() >= 0).all()


@pytest.mark.parametrize(
    "similarity, options, match",
    [
        (torch.zeros(3), {"mapping": "square"}, "mapping='square'"),
        (torch.zeros(3, 0), {}, r"shape \(3, 0\)"),
        (torch.zeros(0), {}, r"shape \(0,\)"),
        (torch.zeros(3, 1, 1), {}, r"shape \(3, 1, 1\)"),
        (torch.zeros(3), {"mapping": "generic"}, "generic=None"),
        (torch.zeros(3), {"mapping": "generic", "generic": torch.zeros(2, 1)}, r"generic=\(2, 1\)"),
        (torch.tensor([0.1, math.nan, 0.3]), {}, r"frames \[1\]"),
        (torch.tensor([0.1, math.inf, 0.3]), {}, r"frames \[1\]"),
    ],
)
def test_bad_similarities(similarity, options, match):
    with pytest.raises(UnsupportedError, match=match):
        relevance(similarity, **options)


def test_slots_of_several_frames():
    scores = torch.tensor([0.1, 0.5, 0.2, 0.4, 0.3])
    assert by_slot(scores, 2).tolist() == pytest.approx([0.5, 0.4, 0.3])
    assert by_slot(scores, 2, "mean").tolist() == pytest.approx([0.3, 0.3, 0.3])
    for bad in ((0, "max"), (2, "sum")):
        with pytest.raises(UnsupportedError):
            by_slot(scores, *bad)


# ---------------------------------------------------------------------- sampling


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 10**6), st.floats(0.1, 240), st.none() | st.integers(1, 300))
def test_sampling_within_its_limits(frames, fps, most):
    sampled = sample(frames, fps, most=most)
    count = len(sampled.frames)
    assert 1 <= count <= min(frames, most or 160)
    assert count >= min(frames, most or 160, 96)
    assert list(sampled.frames) == sorted(set(sampled.frames))
    assert sampled.frames[0] == 0 and (count == 1 or sampled.frames[-1] == frames - 1)
    assert all(0 <= time < sampled.seconds for time in sampled.times)


def test_longer_videos_get_more():
    counts = [len(sample(int(hours * 90000), 25).frames) for hours in (0.1, 0.5, 1, 2, 10)]
    assert counts == [102, 128, 160, 160, 160]
    assert len(sample(180000, 25, parity=True).frames) == 224
    assert len(sample(180000, 25, most=1000).frames) == 224
    assert sample(1, 30) == sample(1, 30.0)
    assert sample(1, 0.4).stamps == "0.00s"


@pytest.mark.parametrize(
    "options, match",
    [
        ({"frames": 0}, "0 frames"),
        ({"frames": -1}, "-1 frames"),
        ({"fps": 0}, "fps=0"),
        ({"fps": math.nan}, "fps=nan"),
        ({"fps": math.inf}, "fps=inf"),
        ({"base": 0}, "base=0"),
        ({"extra": -1}, "extra=-1"),
        ({"most": 0}, "most=0"),
        ({"period": 0}, "period=0"),
    ],
)
@pytest.mark.parametrize("parity", [True, False])
def test_bad_videos(options, match, parity):
    with pytest.raises(UnsupportedError, match=match):
        sample(**{"frames": 100, "fps": 25.0, "parity": parity, **options})
