"""Frame scorers: what they are fed, how they batch, stream and remember, and each backend on tiny real models."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import warnings
import weakref

import numpy as np
import pytest
import torch
import transformers
from models import images, tiny_llava, tiny_qwen, tiny_tiled
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers import models as tokenizer_models
from transformers import AutoModelForImageTextToText, AutoProcessor

import vtprune
from vtprune.embedded import tiny_model
from vtprune.prompts import words
from vtprune.pruner import UnsupportedError
from vtprune.quota import ClipBackend, Decoupler, FrameScorer, ScoreNote, VlmBackend, frame_question, relevance
from vtprune.quota.score import yes_probability

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
SPECIALS = ("<pad>", "<s>", "</s>", "<image>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}PICTURE{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def tokenizer(ends: bool = False, **options):
    """Bytes, and one piece each for A and B after a space; `ends` as CLIP's, with start and end token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = {piece: i for i, piece in enumerate([*SPECIALS, *letters, "ĠA", "ĠB"])}
    made = Tokenizer(tokenizer_models.BPE(pieces, [("Ġ", "A"), ("Ġ", "B")]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if ends:
        made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **options}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, additional_special_tokens=list(SPECIALS[3:]), clean_up_tokenization_spaces=False, **names
    )


def frames(count: int, size: tuple[int, int] = (48, 48), seed: int = 0) -> list[Image.Image]:
    noise = np.random.default_rng(seed)
    tones = noise.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return [Image.fromarray(tone).resize(size, Image.Resampling.NEAREST) for tone in tones]


def fed(pictures: list[Image.Image], mean=MEAN, std=STD) -> torch.Tensor:
    stacked = torch.stack([torch.from_numpy(np.array(p)) for p in pictures]).permute(0, 3, 1, 2) / 255
    return (stacked - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def brightness(pictures, question, objects):
    return [float(np.asarray(picture).mean()) for picture in pictures]


def ids_of(text: str) -> torch.Tensor:
    return tokenizer()(text, return_tensors="pt").input_ids[0]


PROMPT = "<s>user\n<|vision_start|><|video_pad|><|video_pad|><|vision_end|>Where is the dog?</s>\n<s>assistant\n"


# ---------------------------------------------------------------------- the scorer


def test_pictures_and_words_are_what_the_model_was_fed():
    asked, pictures = [], frames(5, (20, 12))

    def look(given, question, objects):
        asked.append((given, question, objects))
        return np.arange(1, len(given) + 1)

    scorer = FrameScorer(look, tokenizer(), MEAN, STD, batch=3)
    found = scorer(fed(pictures), ids_of(PROMPT))
    assert found.dtype == torch.float64 and found.tolist() == [1, 2, 3, 1, 2]
    assert [(question, objects) for _, question, objects in asked] == [("Where is the dog?", [])] * 2
    seen = [picture for given, _, _ in asked for picture in given]
    assert all(np.array_equal(a, b) for a, b in zip(seen, pictures, strict=True))
    # half precision moves a tone by rounding alone
    half = FrameScorer(lambda given, *_: asked.append(given) or [1.0] * len(given), tokenizer(), MEAN, STD)
    half(fed(pictures).bfloat16(), ids_of(PROMPT))
    assert max(np.abs(np.asarray(a, int) - np.asarray(b, int)).max() for a, b in zip(asked[-1], pictures, strict=True)) <= 2


def test_words_without_placeholders_and_roles():
    plain = tokenizer()
    text = "system\nBe kind.\nUSER: <video> <image>\nWhat? ASSISTANT:"
    assert words(plain, torch.tensor(plain(text).input_ids)) == "Be kind. What?"
    odd = plain.convert_tokens_to_ids("ĠA")
    assert words(plain, torch.tensor([odd, *plain("red").input_ids]), placeholders=[odd]) == "red"
    assert words(plain, torch.tensor(plain("Q: red").input_ids), strip="Q:") == "red"


def test_streaming_is_the_same_and_holds_one_batch():
    pictures, alive, most = frames(23), weakref.WeakSet(), []

    class Held(Image.Image):
        __hash__ = object.__hash__

    def stream():
        for picture in pictures:
            copy = picture.copy()
            copy.__class__ = Held
            alive.add(copy)
            most.append(len(alive))
            yield copy
            del copy

    sizes = []

    def look(given, question, objects):
        sizes.append(len(given))
        assert len(most) == sum(sizes)  # read no further than what is looked at
        return brightness(given, question, objects)

    scorer = FrameScorer(look, tokenizer(), MEAN, STD, batch=5)
    streamed = scorer.score(stream(), "Where is the dog?", total=23)
    assert sizes == [5, 5, 5, 5, 3] and max(most) <= 5
    whole = FrameScorer(brightness, tokenizer(), MEAN, STD)(fed(pictures), ids_of(PROMPT))
    assert torch.equal(streamed, whole) and len(set(whole.tolist())) > 20


def test_a_video_is_scored_once_per_question():
    calls = []

    def look(given, question, objects):
        calls.append(question)
        return brightness(given, question, objects)

    scorer, pixels, other = FrameScorer(look, tokenizer(), MEAN, STD, remember=2), fed(frames(4)), ids_of("Who?")
    first = scorer(pixels, ids_of(PROMPT))
    first += 1  # the caller's own copy
    assert torch.equal(scorer(pixels.clone(), ids_of(PROMPT)), first - 1) and len(calls) == 1
    scorer(pixels, other)
    changed = pixels.clone()
    changed[3, 2, 47, 47] += 1
    scorer(changed, other)
    assert len(calls) == 3
    scorer(changed, other)
    scorer(pixels, other)
    assert len(calls) == 3
    scorer(pixels, ids_of(PROMPT))  # had left as the oldest, and now takes the place of what was asked for longest ago
    scorer(pixels, other)
    assert len(calls) == 4
    forgetful = FrameScorer(look, tokenizer(), MEAN, STD, remember=0)
    assert torch.equal(forgetful(pixels, other), forgetful(pixels, other)) and len(calls) == 6


def test_threads_share_what_is_remembered():
    calls, found = [], []

    def look(given, question, objects):
        calls.append(1)
        return brightness(given, question, objects)

    scorer, pixels = FrameScorer(look, tokenizer(), MEAN, STD), fed(frames(4))
    threads = [threading.Thread(target=lambda: found.append(scorer(pixels, ids_of(PROMPT)))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and len(found) == 6 and all(torch.equal(found[0], each) for each in found)


def test_objects_come_from_the_user_then_the_decoupler_then_nowhere():
    asked = []

    def look(given, question, objects):
        asked.append(objects)
        return [1.0] * len(given)

    pixels, options = fed(frames(2)), {"decoupler": lambda question: [question.split()[-1].strip("?")]}
    for more in (options | {"objects": ["red car", " red  car", "cat"]}, options, {}):
        FrameScorer(look, tokenizer(), MEAN, STD, **more)(pixels, ids_of(PROMPT))
    assert asked == [["red car", "cat"], ["dog"], []]
    for objects in ("dog", [1]):
        with pytest.raises(UnsupportedError, match="list of strings"):
            FrameScorer(look, objects=objects)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (lambda n: [1.0] * (n + 1), "answered 4 for 3 frames"),
        (lambda n: 0.5, "answered one for 3 frames"),
        (lambda n: [1.0, float("nan"), 1.0], "frame 1 is nan"),
        (lambda n: torch.tensor([1.0, 1.0, -2.0]), "frame 2 is -2.0, negative"),
        (lambda n: ["high"] * n, "no numbers but a list"),
        (lambda n: None, "no numbers but a NoneType"),
        (lambda n: torch.ones(n, 2), "one real number per frame"),
        (lambda n: torch.ones(n, dtype=torch.complex64), "one real number per frame"),
    ],
)
def test_garbage_is_refused_by_name(answer, told):
    def my_scorer(given, question, objects):
        return answer(len(given))

    with pytest.raises(UnsupportedError, match=f"my_scorer.*{told}"):
        FrameScorer(my_scorer, tokenizer(), MEAN, STD)(fed(frames(3)), ids_of(PROMPT))


def test_what_cannot_be_scored_is_refused():
    scorer, pixels = FrameScorer(brightness, tokenizer(), MEAN, STD), fed(frames(2))
    for ill in (pixels[0], pixels[:0], pixels[:, :2], (pixels * 50).long()):
        with pytest.raises(UnsupportedError, match="T, 3, H, W"):
            scorer(ill, ids_of(PROMPT))
    with pytest.raises(UnsupportedError, match="hold NaN"):
        scorer(pixels * float("nan"), ids_of(PROMPT))
    with pytest.raises(UnsupportedError, match="no frame"):
        scorer.score(iter([]), "Who?")
    with pytest.raises(UnsupportedError, match="question is empty"):
        scorer(pixels, ids_of("<s>user\n</s>"))
    with pytest.raises(UnsupportedError, match="type ndarray"):
        scorer.score([np.zeros((4, 4, 3))], "Who?")
    with pytest.raises(UnsupportedError, match="for_processor"):
        FrameScorer(brightness)(pixels, ids_of(PROMPT))
    for ill in ({"batch": 0}, {"remember": -1}):
        with pytest.raises(UnsupportedError, match="at least"):
            FrameScorer(brightness, **ill)
    with pytest.raises(UnsupportedError, match="no scorer"):
        FrameScorer("clip")


def test_settings_name_the_scorer():
    scorer = FrameScorer(brightness, objects=["dog"])
    assert json.loads(json.dumps(scorer.settings())) == {"backend": "brightness", "objects": ["dog"], "decoupler": None}
    assert repr(scorer) == "FrameScorer(brightness, objects=['dog'])"


def test_progress_goes_to_stderr(capsys, monkeypatch):
    FrameScorer(brightness, progress=True).score(frames(5), "Who?", total=5)
    assert capsys.readouterr() == ("", "")  # no terminal
    monkeypatch.setenv("FORCE_COLOR", "1")
    FrameScorer(brightness, progress=True, batch=2).score(frames(5), "Who?", total=5)
    shown = capsys.readouterr()
    assert shown.out == "" and "frames scored" in shown.err


def test_importing_costs_no_model_library():
    code = "import sys, vtprune.quota; print({'transformers', 'open_clip', 'rich'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# ---------------------------------------------------------------------- vision-language models


def qwen():
    """A tiny Qwen2-VL with its real processor, on a tokenizer of bytes."""
    made = tokenizer()
    template = TEMPLATE.replace("PICTURE", "<|vision_start|><|image_pad|><|vision_end|>")
    sizes = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
    limits = {"min_pixels": 16 * 16, "max_pixels": 64 * 64}
    processor = transformers.Qwen2VLProcessor(
        transformers.Qwen2VLImageProcessor(**sizes, **limits),
        made,
        transformers.Qwen2VLVideoProcessor(**sizes, **limits),
        chat_template=template,
    )
    model = tiny_qwen(version="2").config
    ids = {"image": "<|image_pad|>", "video": "<|video_pad|>", "vision_start": SPECIALS[4], "vision_end": SPECIALS[5]}
    for name, token in ids.items():
        setattr(model, f"{name}_token_id", made.convert_tokens_to_ids(token))
    model.text_config.vocab_size = len(made)
    torch.manual_seed(0)
    made = transformers.Qwen2VLForConditionalGeneration._from_config(model).eval()
    for parameter in made.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return made, processor


def llava():
    made, side = tokenizer(), 48
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        made, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("PICTURE", "<image>\n"),
    )  # fmt: skip
    config = tiny_llava().config
    config.image_token_id, config.text_config.vocab_size = made.convert_tokens_to_ids("<image>"), len(made)
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration._from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model, processor


def onevision():
    """Pictures in tiles, so that rows differ in length by the frames' aspect."""
    made, side = tokenizer(), 48
    tiles = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]]
    part = {"size": {"height": side, "width": side}, "image_grid_pinpoints": tiles}
    processor = transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(**part), made, transformers.LlavaOnevisionVideoProcessor(size=part["size"]),
        num_image_tokens=36, vision_feature_select_strategy="full", chat_template=TEMPLATE.replace("PICTURE", "<image>\n"),
        video_token="<|video_pad|>",
    )  # fmt: skip
    config = tiny_tiled("onevision").config
    config.text_config.vocab_size = len(made)
    for name, token in (("image", "<image>"), ("video", "<|video_pad|>")):
        setattr(config, f"{name}_token_id", made.convert_tokens_to_ids(token))
    config.vision_aspect_ratio = "anyres_max_9"
    torch.manual_seed(0)
    model = transformers.LlavaOnevisionForConditionalGeneration._from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model, processor


@pytest.mark.parametrize("family", [qwen, llava, onevision])
def test_vlm_scores_are_those_of_each_frame_alone(family):
    model, processor = family()
    # of two sizes: with Qwen, rows of two lengths
    pictures = frames(4) + frames(3, (64, 32), seed=1)
    one, seven = (FrameScorer(VlmBackend(model, processor), batch=n).score(pictures, "Where is the dog?") for n in (1, 7))
    assert len(set(one.tolist())) == 7
    torch.testing.assert_close(one, seven, rtol=1e-3, atol=0)

    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": frame_question("Where is the dog?")}]}],
        add_generation_prompt=True,
    )
    assert prompt.count("<image>") + prompt.count("<|image_pad|>") == 1
    inputs = processor(text=[prompt], images=[pictures[5]], add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1]
    pieces = [[processor.tokenizer.convert_tokens_to_ids(p) for p in (letter, f"Ġ{letter}")] for letter in "AB"]
    torch.testing.assert_close(one[5], yes_probability(logits, pieces[0])[0].double(), rtol=1e-3, atol=0)
    two = FrameScorer(VlmBackend(model, processor, over="letters")).score(pictures, "Where is the dog?")
    torch.testing.assert_close(two[5], yes_probability(logits, *pieces, over="letters")[0].double(), rtol=1e-3, atol=1e-6)


def test_vlm_leaves_the_model_as_it_was():
    model, processor = qwen()
    model.model.rope_deltas = mark = torch.tensor([[7]])
    FrameScorer(VlmBackend(model, processor)).score(frames(2), "Who?")
    Decoupler(model, processor, max_new_tokens=2)("Who?")
    assert model.model.rope_deltas is mark


@pytest.mark.parametrize("family", [qwen, onevision])
def test_quota_by_the_pruned_model_itself(family):
    """What a model says of its own frames in the middle of a call is what it says outside, and leaves no trace in the call."""
    model, processor = family()
    placeholder = "<|vision_start|><|video_pad|><|vision_end|>" if family is qwen else "<|video_pad|>"
    clip = np.stack([np.asarray(picture) for picture in frames(4)])
    inputs = processor(
        text=[PROMPT.replace("<|vision_start|><|video_pad|><|video_pad|><|vision_end|>", placeholder)],
        videos=[torch.from_numpy(clip).permute(0, 3, 1, 2)], do_sample_frames=False, return_tensors="pt",
    )  # fmt: skip
    seen = []

    def remembered(pixels, ids):
        scorer = FrameScorer.for_processor(
            VlmBackend(model, processor), processor, decoupler=Decoupler(model, processor, max_new_tokens=2)
        )
        seen.append((pixels.clone(), ids.clone(), scorer(pixels, ids)))
        return seen[-1][2]

    def answer(**options):
        with vtprune.pruning(model, vtprune.QuoTA(keep=12, **options)):
            return model.generate(**inputs, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)

    live = answer(scorer=remembered)
    (pixels, ids, scores) = seen[0]
    assert len(seen) == 1 and pixels.shape[0] == 4 and len(set(scores.tolist())) == 4
    assert words(processor.tokenizer, ids) == "Where is the dog?"
    torch.testing.assert_close(remembered(pixels, ids), scores)
    beforehand = answer(scores=scores)
    assert torch.equal(live.sequences, beforehand.sequences)
    torch.testing.assert_close(torch.stack(live.logits), torch.stack(beforehand.logits))
    # and the scores matter
    other = answer(scores=scores.flip(0) ** 9)
    assert not torch.allclose(live.logits[0], other.logits[0])


def test_vlm_reads_the_objects_and_its_letters():
    model, processor = llava()
    backend = VlmBackend(model, processor)
    asked = backend.prepare("Where?", ["dog", "cat"])
    assert frame_question("Where?", ["dog", "cat"]) in asked.prompt and asked.prompt.endswith("<s>assistant\n")
    to_id = processor.tokenizer.convert_tokens_to_ids
    assert asked.yes == [to_id("A"), to_id("ĠA")] and asked.no == [to_id("B"), to_id("ĠB")]
    with pytest.raises(UnsupportedError, match="no single token for 'yes'"):
        VlmBackend(model, processor, yes="yes").prepare("Where?", [])
    processor.chat_template = processor.tokenizer.chat_template = None
    with pytest.raises(UnsupportedError, match="no chat template"):
        backend.prepare("Where?", [])
    with pytest.raises(UnsupportedError, match="tokenizer"):
        VlmBackend(model, processor.image_processor)
    with pytest.raises(UnsupportedError, match="over='all'"):
        VlmBackend(model, processor, over="all")


@pytest.fixture(scope="module")
def embedded():
    model = AutoModelForImageTextToText.from_pretrained(tiny_model(), dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(tiny_model())


def test_embedded_model_scores_its_own_frames(embedded):
    model, processor = embedded
    pictures = frames(2, (40, 40))
    scorer = FrameScorer.for_processor(VlmBackend(model, processor), processor)
    assert "'tiny-llava'" in repr(scorer)
    pixels = processor.image_processor(pictures, return_tensors="pt").pixel_values
    prompt = processor.tokenizer("USER: <image>\nWhat color is the star? ASSISTANT:", return_tensors="pt").input_ids[0]
    found = scorer(pixels, prompt)
    assert found.shape == (2,) and found.min() > 0 and found.max() <= 1
    # the processor scaled the pictures to 336 pixels, which the scorer sees again
    shown = [Image.fromarray(np.asarray(p.resize((336, 336), Image.Resampling.BICUBIC))) for p in pictures]
    torch.testing.assert_close(found, scorer.score(shown, "what color is the star?"), rtol=2e-2, atol=0)


# ---------------------------------------------------------------------- the decoupler


def test_decoupler_asks_once_and_takes_only_the_form(monkeypatch):
    model, processor = llava()
    said = {"reply": 'Step 1: yes\nStep 2: ["Dog", "left"]\nStep 3: ["Dog"]'}
    asked = []

    def generate(input_ids, **options):
        asked.append((input_ids, options))
        reply = processor.tokenizer(said["reply"], return_tensors="pt").input_ids
        return torch.cat([input_ids, reply], 1)

    monkeypatch.setattr(model, "generate", generate)
    decoupler = Decoupler(model, processor, max_new_tokens=50, remember=2)
    found = decoupler("Where is the Dog?")
    found.append("changed by the caller")
    assert decoupler("Where is the Dog?") == ["dog"] and len(asked) == 1
    prompt = processor.tokenizer.decode(asked[0][0][0])
    assert "Question: Where is the Dog?" in prompt and "<image>" not in prompt and prompt.count("<s>user") == 1
    assert asked[0][1]["do_sample"] is False and asked[0][1]["max_new_tokens"] == 50
    for question, reply in (("a?", "Step 1: no"), ("b?", "Step 3: [__import__('os')]"), ("c?", "no idea")):
        said["reply"] = reply
        assert decoupler(question) == []
    assert len(asked) == 4
    decoupler("Where is the Dog?")  # forgotten by now
    assert len(asked) == 5
    with pytest.raises(UnsupportedError, match="question is empty"):
        decoupler(" ")
    with pytest.raises(UnsupportedError, match="max_new_tokens"):
        Decoupler(model, processor, max_new_tokens=0)


@pytest.mark.parametrize("bare", [False, True])
def test_decoupler_generates_text_greedily(bare):
    model, processor = qwen()
    processor.tokenizer.chat_template = TEMPLATE
    decoupler = Decoupler(model, processor.tokenizer if bare else processor, max_new_tokens=4)
    assert decoupler.reply("Who?") == decoupler.reply("Who?") and decoupler("Who?") == []


def test_decoupler_feeds_the_scorer():
    model, processor = llava()
    asked = []

    def look(given, question, objects):
        asked.append((question, objects))
        return [1.0] * len(given)

    decoupler = Decoupler(model, processor, max_new_tokens=2)
    FrameScorer(look, decoupler=decoupler).score(frames(1), "Who?")
    assert asked == [("Who?", [])]  # a random model keeps to no form
    assert "Decoupler(Llava" in json.dumps(FrameScorer(look, decoupler=decoupler).settings())


# ---------------------------------------------------------------------- CLIP


class Counted:
    """A ClipBackend on made-up embeddings: a picture's is its mean colour, a text's is set by its first letter."""

    def __init__(self, **options):
        self.looked, self.read = 0, []
        self.backend = ClipBackend(
            self.pictures, self.texts, lambda text: len(text.split()) + 2, 8, source="made up", **options
        )

    def pictures(self, given):
        self.looked += len(given)
        return torch.stack([torch.from_numpy(np.asarray(p).reshape(-1, 3).mean(0)) for p in given])

    def texts(self, strings):
        self.read.append(strings)
        return torch.stack([torch.eye(3)["rgb".index(text[0])] if text[0] in "rgb" else torch.ones(3) for text in strings])


def colours(*tones: tuple[int, int, int]) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), tone) for tone in tones]


def test_clip_takes_the_best_phrase_and_maps_over_the_whole_video():
    pictures = colours((250, 0, 0), (0, 250, 0), (0, 120, 120), (90, 90, 90), (10, 0, 200))
    cosine = torch.nn.functional.normalize(torch.stack([torch.tensor(p.getpixel((0, 0))).float() for p in pictures]), dim=-1)
    for mapping, more in (("minmax", {}), ("sigmoid", {"scale": 10.0, "bias": -4.0}), ("generic", {"scale": 20.0})):
        for batch in (1, 2, 7):
            counted = Counted(mapping=mapping, **more)
            found = FrameScorer(counted.backend, objects=["red car", "green door"], batch=batch).score(pictures, "x")
            generic = (cosine @ torch.full((3, 1), 3**-0.5)).expand(-1, 4)
            expected = relevance(cosine[:, :2], mapping, generic=generic, **more)
            torch.testing.assert_close(found, expected.double())
    with pytest.raises(UnsupportedError, match="mapping='max'"):
        Counted(mapping="max")
    with pytest.raises(UnsupportedError, match="texts that fit any frame"):
        Counted(mapping="generic", generic=[])


def test_a_second_question_costs_no_pictures():
    counted, pixels = Counted(), fed(colours((250, 0, 0), (0, 250, 0), (9, 9, 99)))
    scorer = FrameScorer(counted.backend, tokenizer(), MEAN, STD)
    red, blue = scorer(pixels, ids_of("red car")), scorer(pixels, ids_of("blue door"))
    assert red.argmax() == 0 and blue.argmax() == 2
    assert counted.looked == 3 and counted.read == [["red car"], ["blue door"]]
    scorer(pixels, ids_of("red car"))
    assert counted.looked == 3 and len(counted.read) == 2
    scorer(pixels * 0.9, ids_of("red car"))
    assert counted.looked == 6


def test_a_long_text_goes_in_parts_and_is_told():
    counted, question = Counted(mapping="sigmoid", scale=1.0), "red one two three four five green one two three four five"
    with pytest.warns(ScoreNote, match=r"14 tokens .*longer than the 8 that made up reads: it is compared in 2 parts"):
        found = FrameScorer(counted.backend).score(colours((250, 0, 0), (250, 250, 0)), question)
    assert counted.read == [["red one two three four five", "green one two three four five"]]
    # the mean of both parts, not the better one
    torch.testing.assert_close(found, torch.tensor([0.5, 2**-0.5]).sigmoid().double())


def write_clip(folder, kind: str):
    """A tiny random CLIP or SigLIP of transformers with its processor."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    made = tokenizer(ends=True, model_max_length=24)
    text = {**sizes, "vocab_size": len(made), "max_position_embeddings": 24, "bos_token_id": 1, "eos_token_id": 2}
    vision = {**sizes, "image_size": 32, "patch_size": 16}
    torch.manual_seed(3)
    if kind == "clip":
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
        model, part = transformers.CLIPModel(config), transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
        processor = transformers.CLIPProcessor(part, made)
    else:
        config = transformers.SiglipConfig(text_config={**text, "pad_token_id": 0}, vision_config=vision)
        model, part = transformers.SiglipModel(config), transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
        torch.nn.init.constant_(model.logit_bias, -1.5)
        torch.nn.init.constant_(model.logit_scale, 1.0)
        processor = transformers.SiglipProcessor(part, made)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_transformers_checkpoints(kind, tmp_path):
    model, processor = write_clip(tmp_path, kind)
    backend = ClipBackend.from_pretrained(tmp_path, device="cpu")
    assert backend.mapping == {"clip": "generic", "siglip": "sigmoid"}[kind] and backend.window == 24
    pictures, phrases = frames(5), ["red dog", "a cat"]
    one, many = (FrameScorer(backend, objects=phrases, batch=n).score(pictures, "x") for n in (1, 7))
    torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-6)
    assert len(set(one.tolist())) == 5
    if kind == "siglip":
        texts = processor.tokenizer(phrases, padding="max_length", max_length=24, return_tensors="pt").input_ids
        pixels = processor.image_processor(pictures, return_tensors="pt").pixel_values
        with torch.no_grad():
            logits = model(input_ids=texts, pixel_values=pixels).logits_per_image
        torch.testing.assert_close(many, logits.sigmoid().amax(-1).double(), rtol=1e-4, atol=1e-6)
    with pytest.warns(ScoreNote, match="than the 24 that"):
        FrameScorer(backend).score(pictures, "Which of the doors is opened by the man with the hat?")


def test_other_checkpoints_are_refused(tmp_path):
    tiny_llava().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="'llava' model; a CLIP or SigLIP"):
        ClipBackend.from_pretrained(tmp_path)


@pytest.mark.slow
def test_open_clip(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (tmp_path / "vtprune-tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "vtprune-tiny.json")
    model = open_clip.create_model("vtprune-tiny").eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    backend = ClipBackend.open_clip("vtprune-tiny", tmp_path / "weights.safetensors", device="cpu")
    assert repr(backend) == "ClipBackend('open_clip:vtprune-tiny:weights.safetensors', mapping='generic')"
    pictures, phrases = frames(5), ["a red dog", "a cat"]
    one, many = (FrameScorer(backend, objects=phrases, batch=n).score(pictures, "x") for n in (1, 7))
    torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-6)

    read = open_clip.get_tokenizer("vtprune-tiny")
    prepare = open_clip.image_transform(32, is_train=False)
    with torch.no_grad():
        seen = model.encode_image(torch.stack([prepare(p) for p in pictures]), normalize=True)
        asked, generic = (model.encode_text(read(list(texts)), normalize=True) for texts in (phrases, backend.generic))
    expected = relevance(seen @ asked.T, "generic", generic=seen @ generic.T, scale=float(model.logit_scale.exp()))
    torch.testing.assert_close(many, expected.double(), rtol=1e-4, atol=1e-6)
    with pytest.warns(ScoreNote, match=r"102 tokens .*77 that open_clip"):
        FrameScorer(backend).score(pictures, "dog " * 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ScoreNote)
        FrameScorer(backend).score(pictures, "dog " * 75)  # exactly the window
    for name, weights in (
        ("no-such-model", None),
        ("vtprune-tiny", None),
        ("vtprune-tiny", str(tmp_path / "none.safetensors")),
    ):
        with pytest.raises(UnsupportedError, match="open_clip cannot load"):
            ClipBackend.open_clip(name, weights, device="cpu")


def test_open_clip_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UnsupportedError, match=r"pip install \"vtprune\[clip\]\""):
        ClipBackend.open_clip("ViT-B-32", "openai")


def test_embedded_text_tower(embedded):
    model, _ = embedded
    own = ClipBackend.embedded()
    given = ClipBackend.embedded(vision=model.model.vision_tower)
    pictures = frames(3, (40, 40))
    a, b = (FrameScorer(backend, objects=["red square", "star"]).score(pictures, "x") for backend in (own, given))
    torch.testing.assert_close(a, b)
    assert a.max() == 1 and a.min() == 0
    # different words, different embeddings: the end token is there to be read off
    asked = own.prepare("x", ["red square", "white star"])
    assert asked.parts[0] @ asked.parts[1] < 0.99
    with pytest.warns(ScoreNote, match="than the 64 that embedded reads"):
        own.prepare("what color is the star? " * 20, [])


def test_embedded_text_tower_takes_vision_towers_of_any_size():
    vision = transformers.CLIPVisionConfig(
        hidden_size=192, intermediate_size=64, num_hidden_layers=1, num_attention_heads=6, image_size=168, patch_size=14
    )
    scorer = FrameScorer(ClipBackend.embedded(transformers.CLIPVisionModel(vision).eval()))
    assert len(set(scorer.score(frames(3), "what color is the star?").tolist())) == 3
    narrow = tiny_llava().model.vision_tower
    with pytest.raises(UnsupportedError, match="width 32 does not go"):
        ClipBackend.embedded(narrow)
    with pytest.raises(UnsupportedError, match="siglip_vision_model"):
        ClipBackend.embedded(tiny_llava(siglip=True).model.vision_tower)


def test_scores_do_not_reach_into_a_wrapped_model(embedded):
    """A vision tower whose model is wrapped still answers as if it were not, outside a call of the model."""
    model, _ = embedded
    backend, pictures = ClipBackend.embedded(vision=model.model.vision_tower), frames(3, (40, 40))
    free = FrameScorer(backend).score(pictures, "star")
    with vtprune.pruning(model, "flowcut", keep=64):
        assert torch.equal(FrameScorer(backend).score(pictures, "star"), free)


def test_for_processor(embedded):
    _, processor = embedded
    scorer = FrameScorer.for_processor(brightness, processor, batch=4)
    assert scorer.batch == 4 and scorer.tokenizer is processor.tokenizer and processor.image_token_id in scorer.placeholders
    torch.testing.assert_close(scorer.mean.flatten(), torch.tensor(processor.image_processor.image_mean))
    with pytest.raises(UnsupportedError, match="image_mean"):
        FrameScorer.for_processor(brightness, processor.tokenizer)
    pixels = images(2)
    assert scorer(pixels, processor.tokenizer("Who?", return_tensors="pt").input_ids[0]).shape == (2,)
