"""A model is loaded once, and answers: one prompt as it is written, many prompts together, turn after turn.

What is special: an image is encoded once for all prompts that show it, and what a conversation has in memory is not run
again; an answer is never longer than the positions that the language model has; it ends within a step when nobody
waits for it any more; and among many prompts an image that cannot be read costs its own prompt alone.
"""

import contextlib
import copy
import sys
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, StoppingCriteriaList
from transformers.modeling_outputs import BaseModelOutputWithPooling

from processing.batching.features import FeatureCache
from processing.data_error_vlm import DuetError
from processing.image_files_vlm import BadImage, ImagePolicy, image_content
from processing.messages_vlm import all_parts, with_parts
from processing.processing_vlm import VLMProcessor

from .asked import Prepared, Prompt, PromptTooLong, caption_ids, image_of, opened, reference_of, too_long
from .conversation import CACHE, Conversation, marks_of
from .encoded_images import EncodedImages, name_of
from .loading import load, place
from .program import program
from .sampled import WARPERS, Settings, check_settings, drawing, fresh_seed
from .spoken import Listening, Spoken
from .streaming import Either, Finish, Flag, Stream
from .turns import Turns, begin_anew, ropes_that_grow
from .weighing import Weighing


MAX_NEW_TOKENS = 256
"""The longest answer where neither the settings nor the model say."""

_BATCHES_NEAR = 8  # batches of prompts among which those of like length are put together


class Answerer:
    """
    A composed model that answers; one prompt at a time, unless its turns are shared: then a step of each in turn.

    Args:
        model: a composed model, with adapters in it or without, where it is to answer.
        processor: its processor.
        name: what it is called.

    Attributes:
        max_positions (`int`): those that the language model was made for; `None` for any number.
        turns (`Turns`): who may use the model, and when; `turns.share(4)` has four answers written at the same time,
            each as it is alone.

    Raises:
        DuetError: the model's code is of an earlier Duet, and this transformers needs today's.
    """

    def __init__(self, model: Any, processor: VLMProcessor, name: str = ""):
        self.model, self.processor, self.name = model.eval(), processor, name
        self._composed = _composed(model)
        _refuse_old_code(self._composed)
        self.max_positions: int | None = self._composed.model.max_positions or _context(self._text_config)
        self.turns = Turns(self._composed)
        self._reading = threading.Lock()  # what encodes texts remembers some

    @classmethod
    def load(
        cls,
        name: str,
        *,
        device: str | torch.device | None = None,
        device_map: str | dict | None = None,
        dtype: str | torch.dtype | None = None,
        attn_implementation: str | None = None,
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
    ) -> "Answerer":
        """
        A model from its folder or the Hub, which runs its own code; an adapter comes with its base.

        Args:
            device: where it is to lie; on the accelerator that there is (CUDA, MPS), else the CPU, if not given.
            device_map: how it is spread over devices (`"auto"`), in place of `device`.
            dtype: of the weights. If not given, those of 32 bits become bfloat16 on an accelerator that multiplies it,
                and others stay what was saved.
            attn_implementation: of both backbones; the library's choice if not given.
            load_in_4bit, load_in_8bit: hold the language model in few bits, by bitsandbytes.

        Raises:
            DuetError: there is no such model or device, or it cannot be loaded so.
        """
        options = place(
            name, device=device, device_map=device_map, dtype=dtype, attn_implementation=attn_implementation,
            load_in_4bit=load_in_4bit, load_in_8bit=load_in_8bit,
        )  # fmt: skip
        return cls(*load(name, **options), name)

    @property
    def _text_config(self):
        return self._composed.config.get_text_config()

    # -- what is asked --------------------------------------------------------------------------------------------

    def read(
        self,
        messages: list[dict],
        *,
        allow_urls: bool = False,
        allow_local_urls: bool = False,
        allow_files: bool = True,
    ) -> Prepared:
        """
        A conversation as a prompt for the next answer.

        Args:
            messages: as `processor.apply_chat_template` takes them; an image part carries a PIL image, a path, a
                `data:` URI or a URL.
            allow_urls: whether http and https URLs are fetched; with `allow_local_urls` from this machine and networks
                of its own, too.
            allow_files: whether images may be files of this machine.

        Raises:
            BadImage: a `DuetError`: an image that cannot be had.
            DuetError: messages that the chat template cannot render, or more positions than there are.
        """
        messages = with_parts(messages)
        with self._reading:
            ids, _ = self.processor.encode_messages(messages, add_generation_prompt=True)
        named = [image_of(part) for part in all_parts(messages) if part["type"] == "image"]
        policy = ImagePolicy(allow_urls=allow_urls, allow_local_urls=allow_local_urls, own_paths=True)
        turns = sum(message.get("role") == "user" for message in messages)
        return self._prepared(Prompt(ids, [reference_of(image, policy, allow_files) for image in named]), turns)

    def read_caption(
        self, images: Sequence[Any], *, allow_urls: bool = False, allow_local_urls: bool = False
    ) -> Prepared:
        """Images as the prompt for a caption, without a question; all that a model of stage 1 can do. See `read`."""
        policy = ImagePolicy(allow_urls=allow_urls, allow_local_urls=allow_local_urls, own_paths=True)
        references = [reference_of(image, policy, True) for image in images]
        with self._reading:
            ids = caption_ids(self.processor, len(images))
        return self._prepared(Prompt(ids, references), 1)

    def _prepared(self, prompt: Prompt, turns: int) -> Prepared:
        images = [opened(reference) for reference in prompt.images]
        counts = [self.processor.image_tokens(image.height, image.width) for image in images]
        (row,) = self.processor.expand_images(prompt.ids, counts=counts)
        if self.max_positions is not None and len(row) >= self.max_positions:
            raise PromptTooLong(too_long(len(row), counts, self.max_positions, turns))
        return Prepared(row, images, [image_content(image) for image in images], counts)

    def settings(
        self,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
    ) -> Settings:
        """
        How an answer is written; what is not given is as the model's own `generation_config` has it, but for beams.

        Args:
            max_new_tokens: longest answer.
            temperature: 0 takes the likeliest token at each step, without what the model's own settings add to that.
            top_p, top_k, min_p: what is drawn from; given without a temperature, tokens are drawn, too.
            repetition_penalty: above 1 disfavours what is there already.
            seed: the same seed draws the same answer; another each time if not given.

        Raises:
            DuetError: a value that none of them can have.
        """
        given = {
            "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k,
            "min_p": min_p, "repetition_penalty": repetition_penalty,
        }  # fmt: skip
        check_settings({**given, "seed": seed})
        own = self._composed.generation_config
        most = max_new_tokens or own.max_new_tokens or MAX_NEW_TOKENS
        if temperature == 0:
            config = greedy(self._composed, self.processor, most)
            config.repetition_penalty = repetition_penalty
            return Settings(config, seed)
        config = copy.deepcopy(own)
        config.max_new_tokens = most
        config.max_length = config.num_beams = config.num_return_sequences = None
        if any(given[name] is not None for name in WARPERS if name in given):
            config.do_sample = True
        for name, value in given.items():
            if value is not None:
                setattr(config, name, value)
        self.processor.update_generation_config(config)
        return Settings(config, seed)

    # -- what is answered -----------------------------------------------------------------------------------------

    def stream(
        self,
        prepared: Prepared,
        settings: Settings | None = None,
        *,
        stop: Sequence[str] = (),
        conversation: Conversation | None = None,
        cancelled: Flag | None = None,
    ) -> Stream:
        """
        The answer in pieces, as it is written in another thread; together they are what `text_of` makes of its ids.

        Args:
            prepared: of `read`.
            settings: of `settings`; the model's own if not given.
            stop: strings at which the answer ends, without them.
            conversation: what earlier turns left in memory, and where this one goes.
            cancelled: ends the writing within a step once it is set.

        Raises:
            DuetError: an empty stop string.
        """

        def write(tell, left):
            return self.write(
                prepared, settings, stop=stop, conversation=conversation, tell=tell,
                cancelled=Either(left, cancelled),
            )  # fmt: skip

        _check_stops(stop)  # here, not where it is first read
        return Stream(write)

    def write(
        self,
        prepared: Prepared,
        settings: Settings | None = None,
        *,
        stop: Sequence[str] = (),
        conversation: Conversation | None = None,
        cancelled: Flag | None = None,
        tell: Callable[[str], None] = lambda piece: None,
    ) -> Finish:
        """
        Write the answer in this thread, and give each piece to `tell`; see `stream`.

        Raises:
            DuetError: an empty stop string.
        """
        seeds = None if settings is None or settings.seed is None else [settings.seed]
        ended = Either(cancelled).is_set
        with self.turns.place(ended) as pause:
            return self._write(
                [prepared], settings, stop, seeds, ended, pause, lambda _, piece: tell(piece), conversation
            )[0]

    def write_together(
        self,
        prepared: Sequence[Prepared],
        settings: Settings | None = None,
        *,
        stop: Sequence[str] = (),
        seeds: Sequence[int] | None = None,
        cancelled: Flag | None = None,
        tell: Callable[[int, str], None] = lambda number, piece: None,
    ) -> list[Finish]:
        """
        Write the answers to several prompts at a time, and give each piece with the number of its prompt to `tell`.

        Args:
            seeds: one a prompt; if not given, the settings' own and those after it.

        Raises:
            DuetError: an empty stop string.
        """
        # Each has its own room for an answer, so those with less than the rest are answered apart; and so is one whose
        # length would change how the positions of the others are turned.
        of_room: dict[tuple[int, int | None], list[int]] = {}
        together = self.turns.most_together
        settings = settings or self.settings()
        if seeds is None and settings.seed is not None:
            seeds = range(settings.seed, settings.seed + len(prepared))
        most = settings.config.max_new_tokens
        for number, one in enumerate(prepared):
            room = self._room(one, most)
            apart = together is not None and one.prompt_tokens + room > together
            of_room.setdefault((room, number if apart else None), []).append(number)
        found: dict[int, Finish] = {}
        ended = Either(cancelled).is_set
        for numbers in of_room.values():
            with self.turns.place(ended) as pause:
                finishes = self._write(
                    [prepared[number] for number in numbers], settings, stop,
                    None if seeds is None else [seeds[number] for number in numbers], ended, pause,
                    lambda row, piece, numbers=numbers: tell(numbers[row], piece),
                )  # fmt: skip
            found.update(zip(numbers, finishes))
        return [found[number] for number in range(len(prepared))]

    def _room(self, prepared: Prepared, most: int) -> int:
        return most if self.max_positions is None else min(most, self.max_positions - prepared.prompt_tokens)

    @torch.no_grad()
    def _write(self, prepared, settings, stop, seeds, ended, pause, tell, conversation=None) -> list[Finish]:
        _check_stops(stop)
        if ended():  # while it waited, perhaps without a turn of its own
            return [Finish("cancelled", one.prompt_tokens, one.image_tokens, 0, 0) for one in prepared]
        processor, rows = self.processor, [one.row for one in prepared]
        marks = [marks_of(one.row, processor.image_token_id, one.names, one.counts) for one in prepared]
        cache, known = (None, 0) if conversation is None else conversation.take(marks[0])
        settings = settings or self.settings()
        config, drawn = drawing(settings.config, seeds or [fresh_seed() for _ in rows])
        own = config.stop_strings or ()
        stop = [*stop, *([own] if isinstance(own, str) else own)]
        room, ends = self._room(prepared[0], config.max_new_tokens), _ends_of(config, processor, stop)
        features = self._features(prepared, [mark for of_row in marks for mark in of_row[known:]])
        inputs = _inputs(rows, features, processor.tokenizer.pad_token_id, self.model.device)
        if cache is not None:
            inputs[CACHE] = cache
        spoken = [Spoken(processor.tokenizer, ends, stop) for _ in rows]
        listening = Listening(spoken, inputs["input_ids"].shape[1], tell, ended, pause)
        writer = copy.copy(self._composed)  # the same modules, adapters among them, with settings of its own
        writer.generation_config = config
        found = writer.generate(
            **inputs, max_new_tokens=room, eos_token_id=ends, stop_strings=None, logits_processor=drawn,
            return_dict_in_generate=True, stopping_criteria=StoppingCriteriaList([listening]),
        )  # fmt: skip
        if conversation is not None:
            marks[0] += found.sequences[0, len(rows[0]) :].tolist()
            conversation.keep(found.get(CACHE), marks[0], self._text_config)
        finishes = []
        for number, (one, said) in enumerate(zip(prepared, spoken)):
            if piece := said.end():
                tell(number, piece)
            cut = "cancelled" if ended() and said.count < room else "length"
            reason = "stop" if said.ended else cut
            finishes.append(Finish(reason, one.prompt_tokens, one.image_tokens, said.count, known))
        return finishes

    def _features(self, prepared: Sequence[Prepared], marks: Sequence[Any]) -> list[torch.Tensor]:
        """Those of the images that begin among these marks, in their order."""
        new = [mark[0] for mark in marks if isinstance(mark, tuple) and mark[1] == 0]
        images = EncodedImages(self._composed, self.processor, [new])
        shown = {name: image for one in prepared for name, image in zip(one.names, one.images)}
        images.encode({name: shown[name] for name in new})
        return images.take(new)


def _composed(model: Any) -> Any:
    """The composed model itself, which may have adapters around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _context(config) -> int | None:
    """How many positions a language model was made for, by its config; rotary ones may be scaled."""
    limit = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if limit is None or not rope.get("factor"):
        return limit
    return max(limit, int(rope["factor"] * (rope.get("original_max_position_embeddings") or limit)))


def _check_stops(stop: Sequence[str]) -> None:
    if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
        raise DuetError(f"stop={stop!r}: expected a list of strings that are not empty.")


def _ends_of(config: GenerationConfig, processor: VLMProcessor, stop: Sequence[str]) -> list[int]:
    """Ids that end an answer: those of the settings, and control tokens among the stop strings, which no text shows."""
    known = config.eos_token_id
    ends = [] if known is None else list(known) if isinstance(known, (list, tuple)) else [known]
    control = processor.encoder.text.control_ids
    return sorted({*ends, *(control[text] for text in stop if text in control)})


@contextlib.contextmanager
def _generating(composed: Any, config: GenerationConfig) -> Iterator[None]:
    """With these settings in place of the model's own, from which `generate` would take what is not said."""
    own = composed.generation_config
    composed.generation_config = config
    try:
        yield
    finally:
        composed.generation_config = own


def greedy(model: PreTrainedModel, processor: VLMProcessor, max_new_tokens: int) -> GenerationConfig:
    """Settings that take the likeliest token at each step, with the model's own token ids and no penalty."""
    config = GenerationConfig(
        bos_token_id=model.generation_config.bos_token_id,
        eos_token_id=model.generation_config.eos_token_id,
        max_new_tokens=max_new_tokens,
    )
    processor.update_generation_config(config)
    return config


@torch.no_grad()
def answer(
    model: Any,
    processor: VLMProcessor,
    prompts: Sequence[Prompt],
    batch_size: int,
    config: GenerationConfig,
    cache: FeatureCache | None = None,
    in_step: bool = False,
    weighing: Weighing | None = None,
    progress: bool = False,
) -> list[str | None]:
    """
    What the model says, in the order of the prompts; `None` where an image cannot be read, which is printed.

    An answer is as long as the positions of the language model allow, and empty where a prompt fills all of them, which
    is printed too. The model, its mode and its settings of generation are afterwards as they were.

    Args:
        model: a composed model, or one with adapters around it.
        batch_size: prompts answered at a time; those about an image come near each other, those of like length
            together.
        config: the settings of generation, instead of the model's own.
        cache: features of the images, read in place of encoding them.
        in_step: every process calls this with prompts of its own, and makes the same calls of the model: those that
            share its weights have to.
        weighing: weighs texts for the prompts, as each is answered; every process gives one or none does.
        progress: draw a bar on stderr.

    Raises:
        DuetError: the model's code is of an earlier Duet, and this transformers needs today's.
    """
    composed = _composed(model)
    _refuse_old_code(composed)
    names = [tuple(map(name_of, prompt.images)) for prompt in prompts]
    images = EncodedImages(model, processor, names, cache)
    asking = _Asking(prompts, names, images, processor, composed.model.max_positions, config.max_new_tokens)
    answers: list[str | None] = [None] * len(prompts)
    was_training, ropes = model.training, ropes_that_grow(composed)
    model.eval()
    try:
        bar = tqdm(total=len(prompts), unit="question", disable=not progress, leave=False, file=sys.stderr)
        with _generating(composed, config), bar:
            for batch, room, encodes in _rounds(asking.batches(batch_size), images, in_step):
                begin_anew(ropes)
                written = _written(model, processor, images, batch, room, encodes, in_step)
                for index, ids in zip(batch.indices if batch else (), written):
                    answers[index] = text_of(processor, ids)
                if weighing is not None:
                    begin_anew(ropes)
                    indices, rows, shown = ([], [], []) if batch is None else (batch.indices, batch.rows, batch.names)
                    features = [images.of(names) for names in shown]
                    weighing.weigh(model, processor, indices, rows, features, asking.limit, in_step)
                images.give_up()
                bar.update(0 if batch is None else len(batch.indices))
    finally:
        model.train(was_training)
    for index in asking.full:
        answers[index] = text_of(processor, [])
    if asking.full:
        print(
            f"{len(asking.full):,} of {len(prompts):,} questions fill all {asking.limit:,} positions: their answers "
            "are empty"
        )
    return answers


def _refuse_old_code(composed):
    """Refuse code of an earlier Duet where transformers does not drop features itself once the prompt has been read."""
    own = type(composed).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation
    if not own and not hasattr(GenerationMixin, "_expand_multimodal_outputs"):
        raise DuetError(
            "the model carries the code of an earlier Duet, with which this release of transformers cannot answer from "
            f"encoded images; run `{program('inference_vlm.update')} FOLDER` on it, or update transformers."
        )


class _Batch(NamedTuple):
    """Prompts that are answered together, the names of their images, and the tokens that there is room for."""

    indices: list[int]
    rows: list[list[int]]
    shown: list[dict[Hashable, Any]]
    names: list[tuple[Hashable, ...]]
    room: int


class _Asking:
    """Prompts in the order in which they are answered, `limit` being the positions of the language model."""

    def __init__(self, prompts, names, images, processor, limit, max_new_tokens):
        self.prompts, self.names, self.images, self.processor = prompts, names, images, processor
        self.limit, self.max_new_tokens = limit, max_new_tokens
        self.full: list[int] = []

    def _together(self, batch_size) -> Iterator[list[int]]:
        """Numbers of prompts: those about the same images lie near each other, and in between lengths decide."""
        about: dict[tuple[Hashable, ...], list[int]] = {}
        for index, names in enumerate(self.names):
            about.setdefault(names, []).append(index)
        near: list[int] = []
        last = next(reversed(about), None)
        for names, indices in about.items():
            near += indices
            if len(near) >= _BATCHES_NEAR * batch_size or names == last:
                near.sort(key=lambda index: len(self.prompts[index].ids))
                yield from (near[start : start + batch_size] for start in range(0, len(near), batch_size))
                near = []

    def batches(self, batch_size: int) -> Iterator[_Batch]:
        """The batches, whose images are opened when it is their turn."""
        for indices in self._together(batch_size):
            # Each has its own room for an answer, so those with less than the rest are answered apart.
            of_room: dict[int, list[tuple[int, list[int], dict[Hashable, Any]]]] = {}
            for index in indices:
                shown = dict(zip(self.names[index], self.prompts[index].images))
                try:
                    counts = {name: self.images.tokens(name, reference) for name, reference in shown.items()}
                except BadImage as error:
                    print(f"a question is left out: {error}")
                    self.images.leave_out(self.names[index])
                    continue
                in_order = [counts[name] for name in self.names[index]]
                (row,) = self.processor.expand_images(self.prompts[index].ids, counts=in_order)
                room = self.max_new_tokens if self.limit is None else min(self.max_new_tokens, self.limit - len(row))
                if room < 1:
                    self.full.append(index)
                    self.images.leave_out(self.names[index])
                else:
                    of_room.setdefault(room, []).append((index, row, shown))
            for room, group in of_room.items():
                numbers, rows, shown_by = map(list, zip(*group))
                yield _Batch(numbers, rows, shown_by, [self.names[index] for index in numbers], room)


def _rounds(
    batches: Iterator[_Batch], images: EncodedImages, in_step: bool
) -> Iterator[tuple[_Batch | None, int, bool]]:
    """
    What is done at a time: a batch, the tokens that may be written, and whether images are encoded.

    In step, every process has as many rounds, and `None` in those in which it has no batch of the room of the others:
    who has written its answer goes on with the others, and would run out of positions.
    """
    batch = next(batches, None)
    while True:
        encodes = batch is not None and images.needs(name for names in batch.names for name in names)
        found = [(None if batch is None else batch.room, encodes)]
        if in_step:
            found = gather_object(found)
        least = min((room for room, _ in found if room is not None), default=None)
        if least is None:
            return
        encodes = any(encodes for room, encodes in found if room == least)
        if batch is None or batch.room != least:
            yield None, least, encodes
        else:
            yield batch, least, encodes
            batch = next(batches, None)


def _written(model, processor, images, batch, room, encodes, in_step) -> list[list[int]]:
    """The ids that the model goes on with, for each prompt of a batch."""
    if batch is not None:
        shown = {name: reference for of_prompt in batch.shown for name, reference in of_prompt.items()}
        if encodes and not images.needs(shown):
            images.encode_nothing()
        images.encode(shown)
        rows, features = batch.rows, images.take(name for names in batch.names for name in names)
    else:
        if encodes:
            images.encode_nothing()
        rows, features = [[processor.tokenizer.eos_token_id]], []
    inputs = _inputs(rows, features, processor.tokenizer.pad_token_id, model.device)
    if in_step:
        inputs["synced_gpus"] = True
    return model.generate(**inputs, max_new_tokens=room)[:, inputs["input_ids"].shape[1] :].tolist()


def _inputs(rows: list[list[int]], features: Any, pad: int, device: torch.device) -> dict[str, Any]:
    """What `generate` takes of prompts, padded on the left, and of the images in them."""
    length = max(map(len, rows))
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor([[pad] * (length - len(row)) + row for row in rows], device=device),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device),
    }
    if features:
        inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=features)}
    return inputs


def text_of(processor: VLMProcessor, ids: list[int]) -> str:
    """What ids say, without control tokens and the blanks around them."""
    return processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


__all__ = [
    "MAX_NEW_TOKENS", "Answerer", "Conversation", "Finish", "Flag", "Prepared", "Prompt", "Settings", "Stream",
    "answer", "greedy", "load", "text_of",
]  # fmt: skip
