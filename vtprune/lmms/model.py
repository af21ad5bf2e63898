"""The models that lmms-eval sees: any supported Hugging Face model, pruned or not, measured by vtprune's engine either way."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import simple_parse_args_string
from loguru import logger
from tqdm import tqdm

import vtprune
from vtprune import embedded
from vtprune.cli import running
from vtprune.cli.console import USAGE, UserError, fail
from vtprune.engine.cache import cache_name
from vtprune.families import locate
from vtprune.lmms import measuring, media
from vtprune.lmms.arguments import PIXELS, Arguments
from vtprune.lmms.measuring import Counted, Memory, Sample, Ticks
from vtprune.lmms.media import Prompt
from vtprune.measure.bench import Everything
from vtprune.measure.clock import Clock
from vtprune.pruner import Pipeline, Pruner, VtpruneError
from vtprune.registry import UnknownStrategyError
from vtprune.reporting import Report

MISTAKES = (UserError, VtpruneError, UnknownStrategyError)
MAX_NEW_TOKENS = 128
# of a task's generation_kwargs, what generate is handed where the task samples
_SAMPLING = ("temperature", "top_p", "top_k", "min_p")
_PASSED = ("num_beams", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "min_new_tokens")


class Model(lmms):
    """What both types share. Made from `--model_args` by `create_from_arg_string`, or from the same names as keywords.

    Raises:
        UserError, VtpruneError, UnknownStrategyError: for arguments that mean nothing, before anything is loaded.
    """

    # lmms-eval ends with exit code 0 after an exception; made from its command line, mistakes end the process instead
    leaves = False

    def __init__(self, **given: Any):
        super().__init__()
        given.pop("max_batch_size", None)
        self.arguments = Arguments.of(given)
        tiny = self.arguments.pretrained is None
        self.pruner = self.arguments.strategy(embedded.schedules() if tiny else {})
        self.place = measuring.place()
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        asked = self.arguments
        loaded = running.load(asked.source, self._own_device(), asked.dtype, asked.attn, asked.trust_remote_code)
        self.model, self.processor, self._device = loaded.model, loaded.processor, loaded.model.device
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.limits = self._pixel_limits()
        self.tokens = tuple(
            token for name in ("image_token", "video_token") if isinstance(token := getattr(self.processor, name, None), str)
        )
        # an unpruned run goes through the same engine, so that its figures compare
        vtprune.wrap(self.model, self.pruner or Everything(), positions=self.arguments.positions)
        self.samples: list[Sample] = []
        self.about = {
            "model": self.arguments.name,
            "pruner": self.pruner.describe() if self.pruner else None,
            "settings": self.pruner.settings() if self.pruner else {},
            "attn": self.arguments.attn,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.device),
            "batch_size": self.batch_size,
        }

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Model:
        """As lmms-eval's command line makes it; what `--model_args` says wins over `--batch_size` and `--device`.

        Raises:
            SystemExit: code 2, after one line that says what is wrong.
        """
        with _leaving(True):
            try:
                given = simple_parse_args_string(arg_string)
            except ValueError as error:
                raise UserError(f"--model_args {arg_string!r}: write it as name=value,name=value.") from error
            more = {key: value for key, value in (additional_config or {}).items() if value is not None}
            made = cls(**{**more, **given})
        made.leaves = True
        return made

    @property
    def device(self) -> torch.device:
        # also known once the model is gone
        return self._device

    @property
    def batch_size(self) -> int:
        return self.arguments.batch_size

    def _own_device(self) -> str:
        """Each process of a data-parallel run takes the accelerator of its number."""
        name = self.arguments.device
        if self._world_size > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self.accelerator.local_process_index}"
        return name

    def _pixel_limits(self) -> dict[str, int]:
        limits = {name: value for name in PIXELS if (value := getattr(self.arguments, name)) is not None}
        known = getattr(getattr(self.processor.image_processor, "valid_kwargs", None), "__annotations__", {})
        for name in limits:
            if name not in known:
                raise UserError(f"model_args {name}: {self.arguments.name}'s processor does not limit pictures by pixels.")
        return limits

    # ------------------------------------------------------------------ what lmms-eval asks for

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers with what they cost, in the order of `requests`."""
        with _leaving(self.leaves):
            self._check(requests)
            return self._batched(requests, lambda r: repr(sorted(self._generation(r).items())), self._generate_batch)

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """(loss, whether greedy decoding would say it) of each continuation; the loss is the mean negative log-likelihood
        of its tokens, which is what lmms-eval's multiple choice takes the smallest of."""
        with _leaving(self.leaves):
            self._check(requests)
            return self._batched(requests, lambda r: "", self._score_batch)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """The answers of each round, the task saying after each what comes next."""
        with _leaving(self.leaves):
            self._check(requests)
            answers = []
            for request in tqdm(requests, disable=self.rank != 0, desc="vtprune"):
                said: list[str] = []
                prompt, info = self._prompt(request), None
                while prompt is not None:
                    said.append(self._generate([request], [prompt], self._generation(request))[0].text)
                    prompt, said, info = self._next_round(request, said, info)
                answers.append(said)
            return answers

    def clean(self) -> None:
        """Called by lmms-eval once all answers are there: measurements are gathered, logged and written."""
        samples = gather_object(self.samples) if self.world_size > 1 else self.samples
        if self.rank == 0:
            try:
                self._say(samples)
            except UserError as error:
                # a full disk: the answers are still worth grading
                logger.error(f"vtprune's measurements are lost: {error}")
        vtprune.unwrap(self.model)
        super().clean()

    # ------------------------------------------------------------------ to be said by each type

    def _prompt(self, request: Instance) -> Prompt:
        raise NotImplementedError

    def _generation(self, request: Instance) -> Mapping[str, Any]:
        raise NotImplementedError

    def _next_round(self, request: Instance, said: list[str], info: Any) -> tuple[Prompt | None, list[str], Any]:
        raise NotImplementedError

    # ------------------------------------------------------------------ inside

    def _document(self, task: str, split: str, doc_id: int) -> Any:
        return self.task_dict[task][split][doc_id]

    def _question(self, text: str, visuals: Any) -> Prompt:
        return media.question(text, visuals, self.tokens, self.arguments.max_frames)

    def _check(self, requests: Sequence[Instance]) -> None:
        """Refuse, by the first question of each task, what a strategy or a budget cannot serve, before anything runs.

        Raises:
            UserError: naming the task.
        """
        parts = self.pruner.parts if isinstance(self.pruner, Pipeline) else [self.pruner] if self.pruner else []
        for task, request in {r.task_name: r for r in reversed(requests)}.items():
            prompt = self._prompt(request)
            if prompt.videos:
                self._check_video(task, prompt, parts)
            for part in parts:
                if part.modality == "video" and prompt.images and not prompt.videos:
                    raise UserError(f"task {task!r} asks about pictures, and {part.name} serves videos alone.")

    def _check_video(self, task: str, prompt: Prompt, parts: Sequence[Pruner]) -> None:
        video = getattr(self.processor, "video_processor", None)
        if video is None or locate(self.model).family.videos is None:
            raise UserError(f"task {task!r} asks about videos, which {self.arguments.name} does not take.")
        merged = getattr(video, "temporal_patch_size", None) or 1
        frames = max(math.ceil(len(clip.frames) / merged) for clip in prompt.videos)
        for part in parts:
            keep = self.arguments.keep
            if keep is None and isinstance(part.keep, int):
                raise UserError(
                    f"task {task!r} asks about videos, and {part.name}'s own budget of {part.keep} tokens is meant for a "
                    f"picture. Give keep= for a video: a share such as 0.25, or a number of tokens."
                )
            if isinstance(keep, int) and keep < frames:
                raise UserError(
                    f"task {task!r} asks about videos of {frames} frames (as the decoder sees them), and keep={keep} leaves "
                    f"less than a token for each. Give a share such as keep=0.25, or at least keep={frames}."
                )

    def _batched(
        self, requests: Sequence[Instance], alike: Callable[[Instance], str], run: Callable[[list[Instance]], list[Any]]
    ) -> list[Any]:
        """`run` on batches of requests that are `alike`; its answers in the order of `requests`."""
        groups: dict[str, list[int]] = {}
        for at, request in enumerate(requests):
            groups.setdefault(alike(request), []).append(at)
        answers: list[Any] = [None] * len(requests)
        with tqdm(total=len(requests), disable=self.rank != 0, desc="vtprune") as progress:
            for group in groups.values():
                for start in range(0, len(group), self.batch_size):
                    batch = group[start : start + self.batch_size]
                    for at, answer in zip(batch, run([requests[at] for at in batch]), strict=True):
                        answers[at] = answer
                    progress.update(len(batch))
        return answers

    def _generate_batch(self, requests: list[Instance]) -> list[GenerationResult]:
        return self._generate(requests, [self._prompt(r) for r in requests], self._generation(requests[0]))

    def _inputs(self, prompts: Sequence[Prompt], more: int) -> Any:
        """Model inputs on the device.

        Parameters:
            more: tokens that will follow.
        Raises:
            UserError: if the prompt with them exceeds max_length.
        """
        made = media.inputs(self.processor, prompts, self.limits, lambda p: media.text_of(self.processor, p))
        length, limit = made["input_ids"].shape[1], self.arguments.max_length
        if limit is not None and length + more > limit:
            raise UserError(f"a prompt of {length} tokens and {more} more exceed max_length={limit}; raise it or leave it out.")
        return made.to(self.device, self.model.dtype)

    @torch.inference_mode()
    def _generate(
        self, requests: Sequence[Instance], prompts: Sequence[Prompt], asked: Mapping[str, Any]
    ) -> list[GenerationResult]:
        inputs = self._inputs(prompts, 1)
        length = inputs["input_ids"].shape[1]
        most = asked.get("max_new_tokens") or asked.get("max_gen_toks") or MAX_NEW_TOKENS
        if self.arguments.max_length is not None:
            most = min(most, self.arguments.max_length - length)
        options = {name: asked[name] for name in _PASSED if asked.get(name) is not None}
        sampled = bool(asked.get("do_sample", (asked.get("temperature") or 0) > 0)) and asked.get("temperature") != 0
        if sampled:
            options |= {name: asked[name] for name in _SAMPLING if asked.get(name) is not None}
        before, memory = self._report(), Memory(self.device)
        memory.reset()
        ticks = Ticks(Clock(self.device))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*generation flags are not valid.*")
            made = self.model.generate(
                **inputs,
                **options,
                do_sample=sampled,
                max_new_tokens=most,
                pad_token_id=self.tokenizer.pad_token_id,
                stopping_criteria=[ticks],
            )
        answers = made[:, length:]
        samples = self._measured(requests, before, memory.peak(), ttft_ms=ticks.first_ms(), tpot_ms=ticks.each_ms())
        until = asked.get("until") or []
        stops = [until] if isinstance(until, str) else until
        results = []
        for at, sample in enumerate(samples):
            sample.input_tokens = int(inputs["attention_mask"][at].sum())
            sample.output_tokens = int((answers[at] != self.tokenizer.pad_token_id).sum())
            text = self.tokenizer.decode(answers[at], skip_special_tokens=True)
            for stop in stops:
                text = text.split(stop)[0] if stop else text
            results.append(_result(text, sample))
        return results

    @torch.inference_mode()
    def _score_batch(self, requests: list[Instance]) -> list[GenerationResult]:
        prompts, endings = [], []
        for request in requests:
            # lmms-eval asks for a bare continuation's likelihood, without document, for mutual information
            context, target, visual, doc_id, task, split = (*request.args, None, None, None, None)[:6]
            document = None if doc_id is None else self._document(task, split, doc_id)
            prompts.append(self._question(context, visual(document) if visual else None))
            endings.append(target if isinstance(target, str) else target(document))
        ids = [self._ending(prompt, ending) for prompt, ending in zip(prompts, endings, strict=True)]
        longest = max(map(len, ids))
        inputs = self._inputs(prompts, longest)
        # padding on the right comes after everything that counts, so it may be attended to
        pad = self.tokenizer.pad_token_id
        wanted = torch.tensor([row + [pad] * (longest - len(row)) for row in ids], device=self.device)
        before, memory = self._report(), Memory(self.device)
        memory.reset()
        # the prompt alone is pruned, as it is when an answer is generated; strategies must not see what is scored
        output = self.model(**inputs, use_cache=True, logits_to_keep=1)
        logits = output.logits[:, -1:]
        samples = self._measured(requests, before, memory.peak())
        if longest > 1:
            name = cache_name(self.model)
            mask = torch.cat([inputs["attention_mask"], torch.ones_like(wanted[:, 1:])], 1)
            more = self.model(input_ids=wanted[:, :-1], attention_mask=mask, use_cache=True, **{name: getattr(output, name)})
            logits = torch.cat([logits, more.logits], 1)
        scores = logits.float().log_softmax(-1)
        chosen = scores.gather(-1, wanted[..., None])[..., 0]
        results = []
        for at, (row, sample) in enumerate(zip(ids, samples, strict=True)):
            count = len(row)
            sample.input_tokens, sample.output_tokens = int(inputs["attention_mask"][at].sum()), 0
            greedy = bool((scores[at, :count].argmax(-1) == wanted[at, :count]).all())
            # lmms-eval turns a bare pair into text, but takes it whole from here
            results.append(_result((-chosen[at, :count].mean().item(), greedy), sample))
        return results

    def _ending(self, prompt: Prompt, ending: str) -> list[int]:
        """Token ids of a continuation where it stands, after the prompt."""
        text = media.text_of(self.processor, prompt)
        ending = ending.strip() if text[-1:].isspace() else " " + ending.strip()

        def tokens(words: str, special: bool = True) -> list[int]:
            return self.tokenizer(words, add_special_tokens=special)["input_ids"]

        before, whole = tokens(text), tokens(text + ending)
        found = whole[len(before) :] if whole[: len(before)] == before else tokens(ending, special=False)
        if not found:
            raise UserError("a task asks for the likelihood of an empty text.")
        return found

    def _report(self) -> Report | None:
        try:
            return vtprune.report(self.model)
        except RuntimeError:
            return None

    def _measured(self, requests: Sequence[Instance], before: Report | None, peak: int, **more: Any) -> list[Sample]:
        after = self._report()
        samples = measuring.measured(
            [(r.task_name, r.doc_id) for r in requests], None if after is before else after, peak, **more
        )
        # requests that only give each process equally many are no measurements
        self.samples += [
            s for s, r in zip(samples, requests, strict=True) if not (r.metadata or {}).get("__padding_only__")
        ]  # fmt: skip
        return samples

    def _say(self, samples: list[Sample]) -> None:
        for task, found in measuring.summary(samples).items():
            if found["visual_tokens"] is None:
                logger.info(f"vtprune: {task}: {found['samples']} samples without pictures")
                continue
            logger.info(
                f"vtprune: {task}: {found['samples']} samples, equivalent tokens {found['equivalent_tokens']:.1f} of "
                f"{found['visual_tokens']:.1f}, prefill {found['prefill_ms']:.1f} ms (median "
                f"{found['prefill_ms_median']:.1f}), selection {found['selection_ms']:.1f} ms, KV cache "
                f"{found['kv_bytes'] / 2**20:.2f} of {found['kv_bytes_full'] / 2**20:.2f} MiB"
            )
        if self.place is not None:
            measuring.write(self.place, self.about, samples)


class Simple(Model):
    """For tasks that give text and visuals apart (`doc_to_text`, `doc_to_visual`), and for log-likelihoods."""

    is_simple = True

    def _prompt(self, request: Instance) -> Prompt:
        if request.request_type == "loglikelihood":
            context, _, visual, doc_id, task, split = (*request.args, None, None, None, None)[:6]
        else:
            context, _, visual, *_, doc_id, task, split = request.args
        return self._question(context, visual(self._document(task, split, doc_id)) if visual else None)

    def _generation(self, request: Instance) -> Mapping[str, Any]:
        return request.args[1]

    def _next_round(self, request: Instance, said: list[str], info: Any) -> tuple[Prompt | None, list[str], Any]:
        _, _, _, ask, doc_id, task, split = request.args
        document = self._document(task, split, doc_id)
        visuals, text, over, outputs, info = ask(
            document, previous_output=said, round_idx=len(said), previous_round_info=info
        )  # fmt: skip
        said = list(outputs) if outputs is not None else said
        return (None if over else self._question(text, visuals)), said, info


class Chat(Model):
    """For tasks as conversations (`doc_to_messages`); lmms-eval makes them of text and visuals where a task has none."""

    is_simple = False

    def _prompt(self, request: Instance) -> Prompt:
        if request.request_type == "loglikelihood":
            return Simple._prompt(self, request)
        _, messages, _, doc_id, task, split = request.args
        return self._conversation(messages(self._document(task, split, doc_id)))

    def _conversation(self, messages: list[dict[str, Any]]) -> Prompt:
        return media.conversation(ChatMessages(messages=messages).messages, self.tokens, self.arguments.max_frames)

    def _generation(self, request: Instance) -> Mapping[str, Any]:
        return request.args[2]

    def _next_round(self, request: Instance, said: list[str], info: Any) -> tuple[Prompt | None, list[str], Any]:
        _, messages, _, doc_id, task, split = request.args
        document = self._document(task, split, doc_id)
        made = messages(document, round_idx=len(said), previous_output=list(said), previous_round_info=info)
        if not isinstance(made, tuple) or made[1]:
            outputs = made[2] if isinstance(made, tuple) else None
            return None, list(outputs) if outputs is not None else said, info
        return self._conversation(made[0]), said, made[3]


def _result(said: Any, sample: Sample) -> GenerationResult:
    counts = Counted(sample.input_tokens, sample.output_tokens, None, sample)
    return GenerationResult(said, counts)


@contextmanager
def _leaving(leaves: bool) -> Iterator[None]:
    """Mistakes that the user can mend as one line and exit code 2, if the process is lmms-eval's own."""
    try:
        yield
    except MISTAKES as error:
        if not leaves:
            raise
        fail(str(error))
        raise SystemExit(USAGE) from error
