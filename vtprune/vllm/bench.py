"""A pruned server against an unpruned one, measured by vLLM's own benchmark client."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vtprune import embedded
from vtprune.marks import between
from vtprune.measure.flops import stack_flops
from vtprune.pruner import Encoder
from vtprune.vllm.choosing import rehearse
from vtprune.vllm.launch import VLLM, Server, ServerError
from vtprune.vllm.settings import Settings, check_encoder

# of the embedded model, which lend a model with random weights its words; its picture placeholder is token 4
WORDS = ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja", "generation_config.json")


@dataclass(frozen=True)
class Load:
    """What the client sends.

    Parameters:
        requests: at each concurrency, at least one for each that is in flight.
        text_tokens, output_tokens: of each request; picture: (height, width) of its one picture.
        seed: of pictures and words, which no two requests share.
    """

    requests: int = 32
    text_tokens: int = 60
    output_tokens: int = 16
    picture: tuple[int, int] = (336, 336)
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """What the client saw of one server at one concurrency; times in milliseconds.

    Parameters:
        server: what it prunes with, or "unpruned"; failed: requests without an answer.
        per_second: requests answered per second; ttft_*: to the first token; tpot_*: per token after it.
    """

    server: str
    concurrency: int
    round: int
    answered: int
    failed: int
    per_second: float
    ttft_p50: float
    ttft_p99: float
    tpot_p50: float
    tpot_p99: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def random_model(config: Path, layers: int | None, folder: Path) -> Path:
    """A folder that `vllm serve --load-format dummy` takes: a LLaVA-1.5 configuration and the embedded model's tokenizer.

    Parameters:
        config: of a LLaVA-1.5-shaped model; layers: cut its decoder to so many.
    """
    shape = json.loads(config.read_text(encoding="utf-8"))
    own = json.loads((embedded.tiny_model() / "config.json").read_text(encoding="utf-8"))
    shape["image_token_index"] = own["image_token_index"]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        shape["text_config"][name] = own["text_config"][name]
    if layers is not None:
        shape["text_config"]["num_hidden_layers"] = layers
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    for name in WORDS:
        shutil.copy(embedded.tiny_model() / name, folder / name)
    return folder


def client(server: Server, name: str, tokenizer: str, load: Load, concurrency: int, at: int, folder: Path) -> Row:
    """One run of `vllm bench serve`.

    Parameters:
        name: of the server, for the row; at: round, which gives its own pictures.
    Raises:
        ServerError: if the client fails.
    """
    height, width = load.picture
    requests = max(load.requests, concurrency)
    file = folder / f"{server.port}-{concurrency}-{at}.json"
    options: dict[str, Any] = {
        "backend": "openai-chat",
        "endpoint": "/v1/chat/completions",
        "base-url": server.url,
        "model": server.model,
        "tokenizer": tokenizer,
        "dataset-name": "random-mm",
        "num-prompts": requests,
        "num-warmups": 2,
        "max-concurrency": concurrency,
        "random-input-len": load.text_tokens,
        "random-output-len": load.output_tokens,
        "random-mm-base-items-per-request": 1,
        "random-mm-num-mm-items-range-ratio": 0,
        "random-mm-limit-mm-per-prompt": '{"image": 1, "video": 0}',
        "random-mm-bucket-config": f"{{({height}, {width}, 1): 1.0}}",
        "seed": load.seed + 1000 * at + concurrency,
        "percentile-metrics": "ttft,tpot",
        "metric-percentiles": "50,99",
        "result-dir": folder,
        "result-filename": file.name,
    }
    command = [*VLLM, "bench", "serve", "--ignore-eos", "--save-result", "--disable-tqdm"]
    command += [part for key, value in options.items() for part in (f"--{key}", str(value))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not file.is_file():
        raise ServerError(f"vllm bench serve failed. It printed last:\n{(done.stdout + done.stderr)[-4000:]}")
    seen = json.loads(file.read_text(encoding="utf-8"))
    return Row(
        server=name,
        concurrency=concurrency,
        round=at,
        answered=seen["completed"],
        failed=requests - seen["completed"],
        per_second=seen["request_throughput"],
        **{f"{what}_{p}": seen[f"{p}_{what}_ms"] for what in ("ttft", "tpot") for p in ("p50", "p99")},
    )


def compare(
    model: str,
    settings: Mapping[str, Any],
    levels: Sequence[int],
    load: Load,
    folder: Path,
    options: Sequence[str] = (),
    rounds: int = 1,
    together: bool = False,
    tokenizer: str | None = None,
    environment: Mapping[str, str] | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Serve `model` unpruned and pruned, and measure both at each concurrency.

    Parameters:
        settings: vtprune's; levels: concurrencies; options: of `vllm serve` for both; folder: for logs and raw results.
        together: start both servers first and let them take turns, which is fair on a noisy machine but needs memory for
            two; otherwise one after the other.
        tokenizer: folder of the model's, where `model` is not one; tell: called with what is going on.
    Raises:
        ServerError: if a server does not start or a client fails.
    """
    pruned = f"{settings['pruner']}, keep={settings['keep']}"
    servers = [
        (name, Server(model, folder / f"{log}.log", asked, options, environment))
        for name, log, asked in (("unpruned", "unpruned", None), (pruned, "pruned", settings))
    ]
    rows: list[Row] = []

    def run(name: str, server: Server, level: int, at: int) -> None:
        tell(f"{name}: concurrency {level}, round {at + 1} of {rounds}")
        rows.append(client(server, name, tokenizer or model, load, level, at, folder))

    with ExitStack() as running:
        if together:
            for name, server in servers:
                tell(f"{name}: starting")
                running.enter_context(server).ready()
            for at in range(rounds):
                for level in levels:
                    for name, server in servers:
                        run(name, server, level, at)
        else:
            for name, server in servers:
                tell(f"{name}: starting")
                with server:
                    server.ready()
                    for at in range(rounds):
                        for level in levels:
                            run(name, server, level, at)
    return rows


def predicted(config: Mapping[str, Any], load: Load, settings: Settings) -> float:
    """Unpruned over pruned FLOPs of one request: vision encoder and decoder, by the convention of `vtprune.measure.flops`.

    Tokens of the answer are counted as if they went through with the prompt.

    Parameters:
        config: of a LLaVA-1.5-shaped model, as in config.json; settings: what the pruned server does.
    """
    vision, text = config["vision_config"], config["text_config"]
    patches, blocks = (vision["image_size"] // vision["patch_size"]) ** 2, vision["num_hidden_layers"]
    layer = config.get("vision_feature_layer", -2)
    encoder = Encoder(layer + 1 if layer >= 0 else blocks + layer + 1, blocks, cls=True)
    pruner = settings.strategy()
    ran = check_encoder(pruner, encoder)
    lengths = rehearse(pruner, patches, encoder, max(ran, encoder.depth)).lengths
    rest = load.text_tokens + load.output_tokens

    def flops(seen: Sequence[int], visual: int) -> int:
        eyes, decoder = _layer(vision, 2), [_layer(text, 3)] * text["num_hidden_layers"]
        whole = [[(n, n)] for n in seen]
        return stack_flops([eyes] * len(seen), whole) + stack_flops(decoder, [[(visual + rest, visual + rest)]] * len(decoder))

    return flops([patches + 1] * encoder.depth, patches) / flops(lengths, settings.tokens(patches))


def _layer(config: Mapping[str, Any], matrices: int) -> tuple[int, int]:
    """(linear FLOPs per token, attention width) of a layer whose MLP has so many matrices."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or width // heads
    queries, keys = head * heads, head * config.get("num_key_value_heads", heads)
    return 2 * (2 * width * queries + 2 * width * keys + matrices * width * config["intermediate_size"]), queries


def bar(speed_up: float) -> float:
    """The speed-up to reach: half of the gain that FLOPs predict, on top of the unpruned server."""
    return 1 + (speed_up - 1) / 2


BEGIN, END = "<!-- vtprune bench serve -->", "<!-- end of vtprune bench serve -->"


def between_markers(page: str, table: str) -> str:
    """The page with `table` between its markers `BEGIN` and `END`.

    Raises:
        ServerError: if it does not have one of each, in this order.
    """
    try:
        return between(page, BEGIN, END, table)
    except ValueError as error:
        raise ServerError(f"the page cannot be written: {error}") from error
