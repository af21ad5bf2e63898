"""Serving inside vLLM: settings and choices anywhere; a real `vllm serve` of the embedded model where vLLM is installed."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import vtprune
from vtprune import embedded
from vtprune.cli import app
from vtprune.pruner import BudgetError, Encoder, Keep, Pruner, SelectView, UnsupportedError, VtpruneError
from vtprune.registry import UnknownStrategyError
from vtprune.vllm import bench, launch
from vtprune.vllm.bench import BEGIN, END, Load, Row, bar, between_markers, compare, predicted, random_model
from vtprune.vllm.choosing import fresh, rehearse, select, square
from vtprune.vllm.launch import Server, ServerError
from vtprune.vllm.settings import Settings, check_count, check_encoder
from vtprune.vllm.weights import published_names

CLIP = Encoder(depth=7, blocks=8, cls=True)


def read(pruner="flowcut", keep=64, **fields) -> Settings:
    return Settings.read({"pruner": pruner, "keep": keep, **fields})


# Settings: what a server is asked to do


def test_nothing_asked_is_nothing_done():
    assert Settings.read(None) is None


@pytest.mark.parametrize(("keep", "tokens"), [(64, 64), (0.25, 144), (1000, 576), (1.0, 576), (0.0001, 1)])
def test_tokens_are_known_before_a_picture_is_seen(keep, tokens):
    assert read(keep=keep).tokens(576) == tokens


@pytest.mark.parametrize("given", [3, "flowcut", [], {}, {"keep": 64}, {"pruner": 1, "keep": 64}])
def test_settings_without_meaning_are_refused_with_an_example(given):
    with pytest.raises(UnsupportedError, match='"pruner": "flowcut"'):
        Settings.read(given)


@pytest.mark.parametrize("keep", [0, -1, 1.5, True, "64", float("nan")])
def test_budgets_without_meaning_are_refused(keep):
    with pytest.raises(BudgetError):
        read(keep=keep)


def test_a_budget_must_be_given():
    with pytest.raises(BudgetError, match="before it has seen a picture"):
        Settings.read({"pruner": "flowcut"})


def test_unknown_names_get_the_nearest():
    with pytest.raises(UnknownStrategyError, match="'flowcut'"):
        read("flowcutt")
    with pytest.raises(TypeError, match="'momentum'"):
        read("flowcut", momentun=0.5)


@pytest.mark.parametrize(
    ("pruner", "fields", "why"),
    [
        ("fastv", {}, "'prefill' stage"),
        ("pyramiddrop", {}, "'prefill' stage"),
        ("flowcut", {"decoder_keep": 32}, "'prefill' stage"),
        ("flowcut+fastv", {}, "'fastv' acts in the 'prefill' stage"),
        ("evict", {}, "'decode' stage"),
        ("resolution", {}, "'shrink' stage"),
        ("cdpruner", {}, "text embeddings"),
        ("evs", {}, "videos alone"),
        ("dycoke", {}, "videos alone"),
    ],
)
def test_strategies_that_cannot_be_served_are_refused_with_the_reason(pruner, fields, why):
    with pytest.raises(UnsupportedError, match=why):
        read(pruner, **fields)


def test_the_served_stages_of_a_strategy_can_be_picked():
    with pytest.raises(UnsupportedError, match=r'"only": \["encode", "select"\]'):
        read("todre")
    assert read("todre", only=["encode", "select"]).strategy().stages() == ("encode", "select")
    assert read("todre", tau=None).strategy().stages() == ("encode", "select")


def test_a_request_may_choose_its_budget_and_nothing_else():
    settings = read(keep=64, momentum=0.25)
    assert settings.requested(None) is None
    assert settings.requested({"keep": 32}) == 32
    assert settings.requested({"keep": 0.5, "pruner": "flowcut", "momentum": 0.25}) == 0.5
    with pytest.raises(BudgetError):
        settings.requested({"keep": 0})
    for other in ({"pruner": "random"}, {"momentum": 0.5}, {"seed": 1}):
        with pytest.raises(UnsupportedError, match="cannot be chosen by a request"):
            settings.requested(other)


def test_strategy_and_budget_are_in_the_cache_key():
    keys = [
        read().cache_key(),
        read().cache_key(32),
        read(keep=0.5).cache_key(),
        read(keep=1).cache_key(),
        read(keep=1.0).cache_key(),
        read("random").cache_key(),
        read("random", seed=1).cache_key(),
    ]
    assert len(set(keys)) == len(keys)
    assert read(keep=64).cache_key(32) == read(keep=32).cache_key()


def test_a_composition_spends_one_budget_and_a_request_another():
    settings = read("flowcut+divprune", keep=0.11)
    assert [p.keep for p in settings.for_tokens(63, 576).parts] == [0.22, 0.11]
    assert [p.keep for p in settings.for_tokens(40, 576).parts] == [80, 40]


# What the model has


@pytest.mark.parametrize(("name", "blocks"), [("flowcut", 7), ("todre", 8), ("divprune", 0)])
def test_as_many_blocks_run_one_by_one_as_the_strategy_needs(name, blocks):
    """ToDRE watches the block after the feature block."""
    assert check_encoder(read(name, **({"tau": None} if name == "todre" else {})).strategy(), CLIP) == blocks


def test_strategies_of_the_encoder_need_one_that_is_served():
    for name in ("flowcut", "visionzip"):
        with pytest.raises(UnsupportedError, match="cannot be served here: tiles"):
            check_encoder(read(name).strategy(), CLIP, "tiles")
        with pytest.raises(UnsupportedError, match="cannot be served here: vtprune runs CLIP"):
            check_encoder(read(name).strategy(), Encoder(7, 8, cls=False), "vtprune runs CLIP towers block by block")

    class OfCls(vtprune.Random):
        requires = frozenset({"cls"})

    with pytest.raises(UnsupportedError, match="needs a class token"):
        check_encoder(OfCls(), Encoder(7, 8, cls=False))
    with pytest.raises(UnsupportedError, match=r'"only": \["select"\]'):
        check_encoder(read("todre", tau=None).strategy(), CLIP, "tiles")
    assert check_encoder(read("todre", only=["select"]).strategy(), CLIP, "tiles") == 0
    assert check_encoder(read("divprune").strategy(), CLIP, "tiles") == 0


@pytest.mark.parametrize("pruner", ["flowcut", "visionzip", "divprune", "random", "uniform", "flowcut+divprune"])
def test_what_is_served_keeps_its_budget_exactly(pruner):
    strategy = read(pruner, keep=40).strategy()
    assert rehearse(strategy, 144, CLIP, max(7, check_encoder(strategy, CLIP))).left == 40


def test_a_strategy_that_misses_its_budget_is_found():
    strategy = read("mustdrop", only=["encode"]).strategy()
    with pytest.raises(VtpruneError, match="room for 64"):
        check_count(rehearse(strategy, 576, CLIP, 8).left, 64, "mustdrop")


class Texted(Pruner):
    """Does not say that it reads the text."""

    name, keep = "texted", 4

    def select(self, view: SelectView) -> Keep:
        return Keep(torch.stack(view.text)[:, :4].long())


def test_reading_the_text_without_saying_so_is_found():
    with pytest.raises(UnsupportedError, match="such as the text"):
        rehearse(Texted(), 16)


# One encoder batch


class Counting(Pruner):
    name, keep = "counting", 2

    def __init__(self):
        self.batches = []

    def select(self, view: SelectView) -> Keep:
        self.batches.append(view.features.shape[0])
        return Keep(torch.arange(2).expand(view.features.shape[0], -1))


def test_pictures_of_equal_size_are_chosen_from_in_one_call():
    features = [torch.randn(n, 4) for n in (9, 16, 9, 9, 16)]
    pruner = Counting()
    chosen = select(pruner, features, fresh(features), [square(len(f)) for f in features])
    assert pruner.batches == [3, 2]
    assert all(torch.equal(c, f[:2]) for c, f in zip(chosen, features, strict=True))


@pytest.mark.parametrize("pruner", ["divprune", "random", "uniform"])
def test_a_picture_is_pruned_alone_as_in_a_batch(pruner):
    strategy = read(pruner, keep=5).strategy()
    features = [torch.randn(25, 8) for _ in range(3)]
    together = select(strategy, features, fresh(features), [(5, 5)] * 3)
    alone = [select(strategy, [f], fresh([f]), [(5, 5)])[0] for f in features]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_weights_that_newer_transformers_writes_get_published_names():
    names = {
        "vision_tower.encoder.layers.0.mlp.fc1.weight": "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
        "model.vision_tower.embeddings.class_embedding": "model.vision_tower.vision_model.embeddings.class_embedding",
        "vision_tower.vision_model.pre_layrnorm.bias": "vision_tower.vision_model.pre_layrnorm.bias",
        "model.language_model.layers.0.mlp.up_proj.weight": "model.language_model.layers.0.mlp.up_proj.weight",
    }
    found = [name for name, _ in published_names((name, torch.zeros(1)) for name in names)]
    assert found == list(names.values())


# The benchmark


def test_a_benchmark_model_has_the_shape_asked_for_and_the_embedded_words(tmp_path):
    folder = random_model(embedded.config("llava-1.5-7b"), 2, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == 2 and config["text_config"]["hidden_size"] == 4096
    own = json.loads((embedded.tiny_model() / "config.json").read_text())
    assert config["image_token_index"] == own["image_token_index"] and (folder / "tokenizer.json").is_file()


def test_flops_predict_what_pruning_can_gain():
    config, load = json.loads(embedded.config("llava-1.5-7b").read_text()), Load(text_tokens=60, output_tokens=16)
    assert predicted(config, load, read("uniform", 576)) == 1
    # 6.5 G multiplications per token in the decoder and 0.3 G in the encoder, and what attention adds
    assert 4.0 < predicted(config, load, read("uniform")) < 4.5
    # patches leave in the encoder, too
    assert predicted(config, load, read("flowcut")) > predicted(config, load, read("uniform"))
    assert bar(4.2) == 2.6


def test_a_table_goes_between_the_markers_of_a_page():
    page = f"above\n\n{BEGIN}\nold\n{END}\n\nbelow\n"
    assert between_markers(page, "| new |\n") == f"above\n\n{BEGIN}\n| new |\n{END}\n\nbelow\n"
    for broken in ("nothing", f"{END}\n{BEGIN}", page + page):
        with pytest.raises(ServerError, match="goes between"):
            between_markers(broken, "| new |")


def test_bench_serve_writes_figures_and_table(tmp_path, monkeypatch):
    def measured(server: str, level: int, rate: float) -> Row:
        return Row(server, level, 0, 32, 0, rate, ttft_p50=900, ttft_p99=1800.4, tpot_p50=40, tpot_p99=60)

    rows = [measured("unpruned", 16, 0.5), measured("flowcut, keep=64", 16, 1.6)]
    monkeypatch.setattr(bench, "compare", lambda *args, **options: rows)
    monkeypatch.setattr(launch, "check_installed", lambda: None)
    page, figures = tmp_path / "page.md", tmp_path / "figures.json"
    page.write_text(f"# Page\n{BEGIN}\n{END}\n")
    command = ["bench", "serve", "--concurrency", "16", "--markdown", str(page), "--json", str(figures)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "| flowcut, keep=64 | 16 | 1.60 | 3.20x | 900 ms | 1800 ms | 40 ms | 60 ms | 0 |" in page.read_text()
    data = json.loads(figures.read_text())
    assert data["rows"] == [row.as_dict() for row in rows] and data["flops_predict"] > 4
    page.write_text("no place for it")
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2 and "goes between" in done.output


# A server

served = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
LENGTH = 8
STRATEGIES = {
    "off": None,
    "flowcut": {"pruner": "flowcut", "keep": 64},
    "todre": {"pruner": "todre", "keep": 64, "tau": None},
    "visionzip": {"pruner": "visionzip", "keep": 0.1},
    "random": {"pruner": "random", "keep": 64, "seed": 3},
    "uniform": {"pruner": "uniform", "keep": 64},
}


def environment(folder) -> dict[str, str]:
    return {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # or it would keep to one core of two
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


class Served(Server):
    """`vllm serve` of the embedded model, with chunked prefill and prefix caching."""

    def __init__(self, folder, settings=None):
        options = ["--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager", "--limit-mm-per-prompt"]
        options += ['{"image": 4}', "--enable-prefix-caching", "--enable-chunked-prefill", "--max-num-batched-tokens", "600"]
        options += ["--max-model-len", "3000", "--max-num-seqs", "16", "--trust-request-mm-kwargs"]
        log = folder / f"{len(list(folder.glob('*.log')))}.log"
        super().__init__(str(embedded.tiny_model()), log, settings, options, environment(folder))

    def ask(self, question: str, pictures=(), timeout=300, **body):
        """(HTTP status, answer)."""
        content = [{"type": "image_url", "image_url": {"url": p if isinstance(p, str) else data_url(p)}} for p in pictures]
        content += [*body.pop("content", []), {"type": "text", "text": question}]
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": LENGTH,
            "ignore_eos": True,
            "return_token_ids": True,
            **body,
        }
        request = urllib.request.Request(
            f"{self.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"{}")


def data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def tokens(answer) -> list[int]:
    status, body = answer
    assert status == 200, body
    return body["choices"][0]["token_ids"]


@dataclass
class Reference:
    """vtprune on transformers, renumbering the survivors as vLLM does."""

    model: torch.nn.Module
    processor: object

    def answer(self, settings, question: str, pictures=()) -> list[int]:
        content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": question}]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        # servers take it that a chat template has put the special tokens in
        inputs = self.processor(text=text, images=list(pictures) or None, return_tensors="pt", add_special_tokens=False)

        def generate():
            with torch.no_grad():
                return self.model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False, eos_token_id=-1)

        if settings is None:
            out = generate()
        else:
            fields = {k: v for k, v in settings.items() if k != "pruner"}
            with vtprune.pruning(self.model, settings["pruner"], positions="compact", **fields):
                out = generate()
        return out[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="module")
def reference() -> Reference:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = embedded.tiny_model()
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return Reference(model, AutoProcessor.from_pretrained(folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("serve")


def pictures() -> list[Image.Image]:
    found = [Image.open(path).convert("RGB") for path in list(embedded.pictures().values())[:4]]
    # of several sizes and shapes
    return [found[0], found[1].resize((500, 400)), found[2].resize((200, 336)), found[3].crop((20, 20, 300, 330))]


QUESTIONS = ["What shape is the white object?", "How many objects are there?", "What colour is the largest object?"]


def mixed(many: bool) -> list[tuple[str, list[Image.Image]]]:
    """Requests of mixed sizes: without a picture, with one, with several, some of them again."""
    shown = pictures()
    requests = [(QUESTIONS[i % 3], [p]) for i, p in enumerate(shown)]
    requests += [(QUESTIONS[1], [shown[0]]), (QUESTIONS[0], []), (QUESTIONS[0] + " " + " ".join(QUESTIONS * 6), [shown[2]])]
    if many:
        requests += [(QUESTIONS[2], [shown[1], shown[0]]), (QUESTIONS[1], shown[:3])]
    return requests


def check_equal(server: Served, reference: Reference, settings, many: bool = True) -> None:
    requests = mixed(many)
    with ThreadPoolExecutor(len(requests)) as pool:
        found = [tokens(a) for a in pool.map(lambda r: server.ask(*r), requests)]
    assert found == [reference.answer(settings, *r) for r in requests]
    # once more, now from the caches
    assert [tokens(server.ask(*r)) for r in requests[:3]] == found[:3]


class TestServed:
    pytestmark = served

    @pytest.mark.parametrize("name", ["off", "todre", "visionzip", "random", "uniform"])
    def test_answers_are_those_of_transformers(self, folder, reference, name):
        settings = STRATEGIES[name]
        with Served(folder, settings) as server:
            # the draw depends on a picture's place in the prompt, and vLLM shares features between places
            check_equal(server.ready(), reference, settings, many=name != "random")
            if settings is None:
                status, body = server.ask(QUESTIONS[0], pictures()[:1], mm_processor_kwargs={"vtprune": {"keep": 8}})
                assert status == 400 and "without a strategy" in json.dumps(body)

    @pytest.fixture(scope="class")
    def flowcut(self, folder):
        with Served(folder, STRATEGIES["flowcut"]) as server:
            yield server.ready()

    def test_flowcut_answers_are_those_of_transformers(self, flowcut, reference):
        check_equal(flowcut, reference, STRATEGIES["flowcut"])
        assert "flowcut leaves 64 of 576" in flowcut.output()

    def test_requests_choose_their_budget(self, flowcut, reference):
        shown, budgets = pictures(), [16, 0.5, None, 10_000, 16]
        with ThreadPoolExecutor(8) as pool:
            answers = list(
                pool.map(
                    lambda keep: flowcut.ask(QUESTIONS[0], shown[:1], mm_processor_kwargs=keep and {"vtprune": {"keep": keep}}),
                    budgets,
                )
            )
        text = flowcut.ask(QUESTIONS[0])[1]["usage"]["prompt_tokens"]
        used = [body["usage"]["prompt_tokens"] - text for _, body in answers]
        assert used == [16, 288, 64, 576, 16]
        for keep, answer in zip(budgets, answers, strict=True):
            settings = None if keep == 10_000 else {"pruner": "flowcut", "keep": keep or 64}
            assert tokens(answer) == reference.answer(settings, QUESTIONS[0], shown[:1])

    def test_bad_requests_fail_alone(self, flowcut):
        shown = pictures()
        video = [{"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}]
        bad = [
            ({"pictures": shown[:1] * 10}, "image"),
            ({"content": video}, "video"),
            ({"pictures": ["data:image/png;base64," + base64.b64encode(b"no picture").decode()]}, "image"),
            ({"pictures": shown[:1], "mm_processor_kwargs": {"vtprune": {"keep": 0}}}, "at least 1"),
            ({"pictures": shown[:1], "mm_processor_kwargs": {"vtprune": {"pruner": "random"}}}, "chosen by a request"),
        ]
        with ThreadPoolExecutor(8) as pool:
            good = pool.submit(flowcut.ask, QUESTIONS[0], shown[1:2])
            answers = list(pool.map(lambda kind: flowcut.ask(QUESTIONS[0], **kind[0]), bad))
            assert tokens(good.result()) == tokens(flowcut.ask(QUESTIONS[0], shown[1:2]))
        for (_, why), (status, body) in zip(bad, answers, strict=True):
            assert status == 400 and why in json.dumps(body).lower(), (status, body)

    def test_the_openai_client(self, flowcut, reference):
        openai = pytest.importorskip("openai")
        client = openai.OpenAI(base_url=f"{flowcut.url}/v1", api_key="none")
        shown = pictures()[0]
        answer = client.chat.completions.create(
            model="tiny",
            messages=[
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": data_url(shown)}},
                        {"type": "text", "text": QUESTIONS[0]},
                    ],
                }
            ],
            temperature=0,
            max_tokens=LENGTH,
            extra_body={"mm_processor_kwargs": {"vtprune": {"keep": 32}}, "return_token_ids": True, "ignore_eos": True},
        )
        want = reference.answer({"pruner": "flowcut", "keep": 32}, QUESTIONS[0], [shown])
        assert answer.choices[0].model_dump()["token_ids"] == want

    @pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
    def test_curl(self, flowcut, tmp_path):
        content = [
            {"type": "image_url", "image_url": {"url": data_url(pictures()[0])}},
            {"type": "text", "text": QUESTIONS[0]},
        ]
        body = tmp_path / "request.json"
        body.write_text(json.dumps({"model": "tiny", "messages": [{"role": "user", "content": content}], "temperature": 0}))
        done = subprocess.run(
            ["curl", "-sS", f"{flowcut.url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", f"@{body}"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert json.loads(done.stdout)["choices"][0]["message"]["content"].strip()

    def test_a_killed_server_loses_the_requests_in_flight_alone(self, flowcut):
        shown = pictures()
        before = tokens(flowcut.ask(QUESTIONS[0], shown[:1]))
        with ThreadPoolExecutor(4) as pool:
            flying = [pool.submit(flowcut.ask, QUESTIONS[0], shown[:1], max_tokens=2500) for _ in range(4)]
            time.sleep(1)
            assert not any(f.done() for f in flying)
            flowcut.stop(signal.SIGKILL)
            assert all(isinstance(f.exception(), OSError) for f in flying)
        flowcut.start()
        assert tokens(flowcut.ready().ask(QUESTIONS[0], shown[:1])) == before

    def test_a_strategy_that_cannot_be_served_stops_the_server_with_the_reason(self, folder):
        with Served(folder, {"pruner": "fastv", "keep": 64}) as server:
            assert server.process.wait(900) != 0
            assert "'fastv' acts in the 'prefill' stage" in server.output()

    @pytest.mark.skipif("VTPRUNE_TIMED" not in os.environ, reason="takes minutes of an idle machine; VTPRUNE_TIMED=1 runs it")
    def test_pruning_answers_more_requests_per_second(self, folder):
        """Random weights in LLaVA's proportions; at least half of what the FLOPs predict is gained."""
        shape = Path(__file__).parent.parent / "docs/bench/serve-shape.json"
        model = random_model(shape, None, folder / "model")
        load = Load(requests=32, output_tokens=8)
        options = ["--load-format", "dummy", "--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "1024"]
        options += ["--max-num-seqs", "16"]
        # the model on one core, where the client does not get in its way
        room = environment(folder) | {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "auto"}
        plain, pruned = compare(str(model), STRATEGIES["flowcut"], [16], load, folder, options, environment=room)
        assert plain.failed == pruned.failed == 0
        asked = bar(predicted(json.loads(shape.read_text()), load, read("flowcut")))
        assert pruned.per_second / plain.per_second >= asked > 2
