"""The processor of a Duet model, and the one encoder of messages into ids, for training and for generation.

What is special about the encoder: it never tokenises a conversation twice to compare lengths, and never looks for roles
in the text. It renders the chat template once with marks in place of the texts, so it knows which characters come from
the template and which from a message. Control tokens are read in the template's part only: what a user types is text.
The prompt of every answer is cut exactly where generation would start, so the ids before an answer in training are the
ids that generation is given. The file travels with every checkpoint and imports nothing of this package.
"""

import base64
import copy
import io
import itertools
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.request import Request, urlopen

import transformers
from PIL import Image, ImageOps
from tokenizers import Tokenizer, processors
from transformers import (
    AddedToken,
    AutoImageProcessor,
    AutoTokenizer,
    BatchFeature,
    GenerationConfig,
    PreTrainedConfig,
    ProcessorMixin,
)
from transformers.processing_utils import MultiModalData


TEMPLATES = Path(__file__).parent / "templates"

# Put before a template that reads plain strings only: it joins the parts of a content, the image token in its place.
_JOIN_PARTS = """\
{%- set joined = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set content = namespace(text='') -%}
{%- if message['content'] is string -%}
{%- set content.text = message['content'] -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- set content.text = content.text + ('IMAGE_TOKEN' if part['type'] == 'image' else part['text']) -%}
{%- endfor -%}
{%- endif -%}
{%- set joined.messages = joined.messages + [dict(message, content=content.text)] -%}
{%- endfor -%}
{%- set messages = joined.messages -%}
"""

# Marks for the rendering: characters of a private use area and a blank that every `trim` removes and none writes.
_MARK = "\ue000{}\ue001"
_MARK_PATTERN = re.compile("(\u2003?)\ue000(\\d+)\ue001(\u2003?)")
_BLANK = "\u2003"


def to_rgb(image: Image.Image) -> Image.Image:
    """An image as a viewer shows it: EXIF orientation applied, alpha on white, first frame, 8-bit RGB."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel: converting would clip everything above 255 to white
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


class _Slot(NamedTuple):
    """The place of one message text in the rendered template, and whether the template trims it there."""

    text: int
    lstrip: bool
    rstrip: bool


def _fill(literals: Sequence[str], slots: Sequence[_Slot], texts: Sequence[str]) -> list[str]:
    """The texts as the template writes them; what is trimmed reaches through parts that stand side by side."""
    filled, trims = [texts[slot.text] for slot in slots], False
    for index, slot in enumerate(slots):
        trims = slot.lstrip or (trims and not filled[index - 1] and not literals[index])
        filled[index] = filled[index].lstrip() if trims else filled[index]
    trims = False
    for index, slot in reversed(list(enumerate(slots))):
        trims = slot.rstrip or (trims and not filled[index + 1] and not literals[index + 1])
        filled[index] = filled[index].rstrip() if trims else filled[index]
    return filled


class TextEncoder:
    """
    A tokenizer that can tell control tokens from text.

    `encode` turns a string into ids without ever giving a control token, whatever the string says; `split` finds the
    control tokens of a template's own text. Control tokens are the special tokens and the added tokens that are not
    plain words or blanks (those are vocabulary).

    Raises:
        `ValueError`: the tokenizer has no backend of the `tokenizers` library.
    """

    def __init__(self, tokenizer):
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} is a slow tokenizer; Duet needs one with a `tokenizers` backend "
                "(a folder with tokenizer.json)."
            )
        special = set(tokenizer.all_special_ids)
        added = tokenizer.added_tokens_decoder
        control = {
            id: token
            for id, token in added.items()
            if token.special or id in special or not re.fullmatch(r"[\w\s]+", token.content)
        }
        self.control_ids = {token.content: id for id, token in control.items()}
        # The longest token wins, and takes the blanks that its flags say, as in the tokenizers library.
        patterns = [
            (r"\s*" if token.lstrip else "") + f"(?:{re.escape(token.content)})" + (r"\s*" if token.rstrip else "")
            for token in sorted(control.values(), key=lambda token: -len(token.content))
        ]
        self._control = re.compile("(" + "|".join(patterns) + ")") if patterns else None
        # Text may still come out as the unknown token; where that is eos as well (GPT-2), it never does.
        unknown = tokenizer.unk_token_id
        ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
        self._forbidden = set(control) - ({unknown} - ends)

        # What the tokenizer puts before every text (bos, where it adds one).
        with_special, plain = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
        self.prefix_ids = list(with_special[: len(with_special) - len(plain)])

        state = json.loads(tokenizer.backend_tokenizer.to_str())
        # A control token that is no word of the vocabulary keeps its place, so that those behind it keep their ids.
        words = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
        state["added_tokens"] = [
            {**token, "content": _MARK.format(token["id"])} if token["id"] in control else token
            for token in state["added_tokens"]
            if token["id"] not in control or token["content"] not in words
        ]
        state["truncation"] = state["padding"] = None
        self._first = Tokenizer.from_str(json.dumps(state))
        changed, only_first = _without_prefix_space(state)
        self._inner = Tokenizer.from_str(json.dumps(state)) if changed else self._first
        self._after_control = self._inner if only_first else self._first

    def split(self, text: str) -> list[tuple[int | None, str]]:
        """A template's text as `(control id, its string)` and `(None, plain text)`, in order."""
        if self._control is None:
            return [(None, text)] if text else []
        pieces = self._control.split(text)
        return [
            (self.control_ids[piece.strip() if piece not in self.control_ids else piece], piece)
            if index % 2
            else (None, piece)
            for index, piece in enumerate(pieces)
            if piece
        ]

    def encode(self, text: str, after: str | None = None) -> list[int]:
        """
        The ids of plain text.

        Args:
            text (`str`): read as text, also where it spells a control token.
            after (`str`, *optional*): what stands before it: nothing (`None`), `"control"` or `"text"`. A tokenizer
                that puts a blank before words does so at a beginning only, never inside a text.
        """
        if not text:
            return []
        backend = {None: self._first, "control": self._after_control, "text": self._inner}[after]
        encoding = backend.encode(text, add_special_tokens=False)
        ids = encoding.ids
        if self._forbidden.isdisjoint(ids):
            return ids
        # The model's own vocabulary spells a control token: break it in two and read each half as text.
        start, end = next(span for id, span in zip(ids, encoding.offsets) if id in self._forbidden)
        middle = (start + end + 1) // 2
        if not 0 < middle < len(text):
            return [id for id in ids if id not in self._forbidden]
        return self.encode(text[:middle], after) + self.encode(text[middle:], "text")


def _without_prefix_space(state: dict) -> tuple[bool, bool]:
    """Take the rule that puts a blank before a text out of a tokenizer's state: (was there one, at the start only)."""
    changed = only_first = False
    for key in ("normalizer", "pre_tokenizer"):
        part = state[key] or {}
        steps = part.get("normalizers", part.get("pretokenizers", [part]))
        for step in list(steps):
            if step.get("type") == "Prepend":
                changed = True
                steps.remove(step)
                if step is part:
                    state[key] = None
            elif step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never":
                changed, only_first = True, step.get("prepend_scheme") == "first"
                step["prepend_scheme"] = "never"
            elif step.get("type") == "ByteLevel" and step.get("add_prefix_space"):
                changed = True
                step["add_prefix_space"] = False
    return changed, only_first


class VLMProcessor(ProcessorMixin):
    r"""
    Images and text or messages in, tensors out.

    Args:
        image_processor: the vision encoder's image processor.
        tokenizer: the language model's tokenizer, with `image_token` as a special token.
        chat_template (`str`, *optional*): the jinja template of a conversation.
        image_token (`str`): the placeholder of an image in a text.
        image_seq_length (`int`): positions that one image takes.
    """

    def __init__(
        self, image_processor=None, tokenizer=None, chat_template=None, image_token="<image>", image_seq_length=1
    ):
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.image_seq_length = image_seq_length
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self._encoder = self._encoder_of = None
        self._layouts = {}

    def __getstate__(self):
        """Without what is made on the spot: `datasets` names its caches by the state, and workers are sent it."""
        return {**self.__dict__, "_encoder": None, "_encoder_of": None, "_layouts": {}}

    @classmethod
    def from_backbones(
        cls,
        vision: str | PreTrainedConfig,
        text: str | PreTrainedConfig,
        model_config: PreTrainedConfig,
        *,
        tokenizer=None,
        image_token: str = "<image>",
        chat_template: str | None = None,
        vision_kwargs: dict | None = None,
        text_kwargs: dict | None = None,
    ) -> "VLMProcessor":
        """
        The processor that belongs to a composed model.

        Args:
            vision, text, tokenizer, image_token, vision_kwargs, text_kwargs:
                what `VLMForConditionalGeneration.from_backbones` was given; for an encoder that starts from scratch the
                images are resized and normalised to [-1, 1].
            model_config (`VLMConfig`): the composed model's config.
            chat_template (`str`, *optional*):
                A jinja template, the name of one of Duet's (`"default"`, `"plain"`) or a file. Without it the
                tokenizer's own is used, and `"default"` where it has none.

        Raises:
            `ValueError`: the tokenizer uses the image token for something else, or cannot be used, or the chat
                template cannot place images.
        """
        options = {k: v for k, v in (text_kwargs or {}).items() if k != "attn_implementation"}
        if tokenizer is None or isinstance(tokenizer, (str, Path)):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer or text, **options)
        else:
            tokenizer = copy.deepcopy(tokenizer)
        _prepare_tokenizer(tokenizer, image_token)
        image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if image_token_id != model_config.image_token_id:
            raise ValueError(
                f"the tokenizer gives {image_token} the id {image_token_id}, the model's config has "
                f"{model_config.image_token_id}; compose model and processor from the same tokenizer."
            )
        options = {k: v for k, v in (vision_kwargs or {}).items() if k != "attn_implementation"}
        processor = cls(
            image_processor=_load_image_processor(vision, model_config, options),
            tokenizer=tokenizer,
            image_token=image_token,
            image_seq_length=model_config.image_seq_length,
        )
        processor.set_chat_template(chat_template)
        return processor

    def set_chat_template(self, chat_template: str | None = None):
        """
        Choose the template of conversations; see `from_backbones`.

        Raises:
            `ValueError`: no such template, or one that loses a text or an image.
        """
        template = chat_template or self.tokenizer.chat_template or "default"
        if isinstance(template, dict):
            template = template["default"]
        if "{" not in template:
            file = TEMPLATES / f"{template}.jinja"
            file = file if file.is_file() else Path(template)
            if not file.is_file():
                known = ", ".join(sorted(path.stem for path in TEMPLATES.glob("*.jinja")))
                raise ValueError(f"chat template {template!r} is neither a file nor one of Duet's templates ({known}).")
            template = file.read_text(encoding="utf-8")
            if file.parent == TEMPLATES and self.text_encoder.prefix_ids:
                template = "{{- bos_token -}}\n" + template  # what this tokenizer starts every text with
        for candidate in (template, _JOIN_PARTS.replace("IMAGE_TOKEN", self.image_token) + template):
            if self._places_images(candidate):
                # On both, so that `AutoTokenizer` renders what the processor renders.
                self.chat_template = self.tokenizer.chat_template = candidate
                return
        raise ValueError(
            "the chat template loses the text or the image of a user message; expected a jinja template that writes "
            "`message['content']`, given as a string or as a list of parts."
        )

    def _places_images(self, template):
        content = [{"type": "image"}, {"type": "text", "text": _MARK.format(0)}]
        try:
            text = self._render([{"role": "user", "content": content}], template)
        except ValueError:
            return False
        return text.count(self.image_token) == 1 and text.count(_MARK.format(0)) == 1 and "'type'" not in text

    # -- texts and images, as every processor ---------------------------------------------------------------------

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model's inputs; `input_ids` first, because the Trainer takes lengths from the first."""
        return ["input_ids", "attention_mask", "pixel_values"]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The placeholders of one image: `image_seq_length` image tokens."""
        return self.image_token * self.image_seq_length

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """Tokens per image from its `(height, width)` alone, for inference engines."""
        if image_sizes is None:
            return MultiModalData()
        return MultiModalData(
            num_image_tokens=[self.image_seq_length] * len(image_sizes), num_image_patches=[1] * len(image_sizes)
        )

    # -- messages -------------------------------------------------------------------------------------------------

    def apply_chat_template(
        self,
        conversation: list[dict] | list[list[dict]],
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        return_assistant_tokens_mask: bool = False,
        processor_kwargs: dict | None = None,
        **kwargs,
    ):
        """
        Messages to a prompt (`tokenize=False`) or to tensors.

        Args:
            conversation: messages, or a list of conversations. A content is a string or a list of parts; an image part
                carries a PIL image, a path or a URL under `image`, `path`, `url` or `image_url`.
            chat_template (`str`, *optional*): instead of the processor's own.
            add_generation_prompt (`bool`): end with what the assistant's answer starts after.
            continue_final_message (`bool`): end inside the last message, which the model goes on writing.
            return_assistant_tokens_mask (`bool`): add `assistant_masks`, 1 on the tokens that training supervises.
            processor_kwargs (`dict`): `padding` (batches pad to the longest, on the left, unless `False`),
                `max_length` for `padding="max_length"`, `return_mm_token_type_ids`.
            **kwargs: passed to the template.

        Raises:
            `ValueError`: the template cannot render these messages, or truncation is asked for.
        """
        template = chat_template or self.chat_template
        options = dict(processor_kwargs or {})
        for key in ("padding", "max_length", "truncation", "padding_side", "return_mm_token_type_ids"):
            if key in kwargs:
                options.setdefault(key, kwargs.pop(key))
        batched = bool(conversation) and isinstance(conversation[0], (list, tuple))
        conversations = [_with_parts(c) for c in (conversation if batched else [conversation])]
        rendering = dict(
            add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message, **kwargs
        )
        if not tokenize:
            prompts = [self._render(messages, template, **rendering) for messages in conversations]
            return prompts if batched else prompts[0]
        if options.get("truncation"):
            raise ValueError("truncation could cut an image's tokens; shorten the messages instead.")

        encoded = [self.encode_messages(m, chat_template=template, **rendering) for m in conversations]
        expanded = [self.expand_images(*pair) for pair in encoded]
        side = options.get("padding_side") or self.tokenizer.padding_side
        length = self._padded_length(expanded, options, return_tensors)
        rows = [ids for ids, _ in expanded]
        data = {
            "input_ids": [_pad(ids, length, self.tokenizer.pad_token_id, side) for ids in rows],
            "attention_mask": [_pad([1] * len(ids), length, 0, side) for ids in rows],
        }
        if options.get("return_mm_token_type_ids"):
            data["mm_token_type_ids"] = [
                _pad([int(id == self.image_token_id) for id in ids], length, 0, side) for ids in rows
            ]
        if return_assistant_tokens_mask:
            data["assistant_masks"] = [_pad([int(flag) for flag in flags], length, 0, side) for _, flags in expanded]
        images = [_open(part) for messages in conversations for part in _parts(messages) if part["type"] == "image"]
        if images:
            data.update(self.image_processor(images, **options.get("images_kwargs", {})))
        if not return_dict:
            data = {"input_ids": data["input_ids"]}
        if not batched and return_tensors is None:
            data = {key: value[0] if key != "pixel_values" else value for key, value in data.items()}
        features = BatchFeature(data, tensor_type=return_tensors)
        return features if return_dict else features["input_ids"]

    def _padded_length(self, expanded, options, return_tensors):
        padding = options.get("padding", len(expanded) > 1 and return_tensors is not None)
        if padding == "max_length":
            return options["max_length"]
        return max(len(ids) for ids, _ in expanded) if padding in (True, "longest") else 0

    def encode_messages(
        self,
        messages: list[dict],
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        **template_kwargs,
    ) -> tuple[list[int], list[bool]]:
        """
        Ids of a conversation, one id an image, and which of them are supervised.

        Supervised are the tokens of each assistant message and the end token behind it: the first token that the
        template puts after the answer (with the blanks before a control token), else eos. `"train": False` on a message
        leaves it out.

        Returns:
            `(ids, supervised)`, two lists of one length; see `expand_images`.

        Raises:
            `ValueError`: the template refuses the messages, or rewrites them in a way that cannot be followed.
        """
        template = chat_template or self.chat_template
        if template is None:
            raise ValueError("this processor has no chat template; set one with `set_chat_template`.")
        messages = _with_parts(messages)
        texts = [part["text"] for part in _parts(messages) if part["type"] == "text"]
        literals, slots, empty = self._follow(messages, texts, template, add_generation_prompt, template_kwargs)
        if continue_final_message:
            literals[-1] = ""
        answers = self._find_answers(messages, literals, slots, template, template_kwargs, empty)
        ids, supervised = self._encode_pieces(texts, literals, slots, answers, open_end=continue_final_message)
        images = sum(part["type"] == "image" for part in _parts(messages))
        if ids.count(self.image_token_id) != images:
            raise ValueError(
                f"the chat template writes {ids.count(self.image_token_id)} image tokens for {images} images; expected "
                f"one {self.image_token} for each image part."
            )
        return ids, supervised

    def encode_caption(self, content: list[dict]) -> tuple[list[int], list[bool]]:
        """
        Ids of stage 1's sequence, which has no roles: what the tokenizer starts with, image, caption, eos.

        Args:
            content: parts in their order, image parts and the caption; every text and the eos are supervised.

        Returns:
            `(ids, supervised)` as `encode_messages`; the ids before the caption are those of
            `processor(images=..., text="<image>")`.
        """
        ids = list(self.text_encoder.prefix_ids)
        supervised, after = [False] * len(ids), None
        for part in content:
            if part["type"] == "image":
                piece, after = [self.image_token_id], "control"
            else:
                piece, after = self.text_encoder.encode(part["text"], after), "text"
            ids = ids + piece
            supervised += [part["type"] == "text"] * len(piece)
        return ids + [self.tokenizer.eos_token_id], supervised + [True]

    def expand_images(self, ids: list[int], *parallel: list) -> tuple[list, ...]:
        """Repeat each image's one id, and what runs parallel to the ids, `image_seq_length` times."""
        counts = [self.image_seq_length if id == self.image_token_id else 1 for id in ids]
        return tuple([v for v, count in zip(row, counts) for _ in range(count)] for row in (ids, *parallel))

    @property
    def text_encoder(self) -> TextEncoder:
        """The tokenizer with control tokens kept apart; made anew when the tokenizer has changed."""
        made_of = (id(self.tokenizer), len(self.tokenizer))
        if self._encoder is None or self._encoder_of != made_of:
            self._encoder, self._encoder_of = TextEncoder(self.tokenizer), made_of
        return self._encoder

    @property
    def end_token_ids(self) -> list[int]:
        """Ids that end an answer: eos, and the token that the chat template puts after one."""
        ends = [self.tokenizer.eos_token_id]
        if self.chat_template is not None:
            probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            ids, supervised = self.encode_messages(probe)
            ends += [id for id, flag in zip(ids, supervised) if flag][-1:]
        return sorted(set(ends))

    def update_generation_config(self, generation_config: GenerationConfig):
        """Let `generate` stop at the end of an answer, pad, and never write an image token."""
        known = generation_config.eos_token_id
        known = [] if known is None else known if isinstance(known, list) else [known]
        ends = sorted({*known, *self.end_token_ids})
        generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
        generation_config.pad_token_id = self.tokenizer.pad_token_id
        suppressed = {*(generation_config.suppress_tokens or []), self.image_token_id}
        generation_config.suppress_tokens = sorted(suppressed)

    # -- the encoder ----------------------------------------------------------------------------------------------

    def _render(self, messages, template, **kwargs):
        shown = [
            {**m, "content": [p if p["type"] == "text" else {"type": "image"} for p in m["content"]]} for m in messages
        ]
        try:
            return self.tokenizer.apply_chat_template(shown, chat_template=template, tokenize=False, **kwargs)
        except Exception as error:  # a template may raise whatever it likes
            roles = ", ".join(str(message.get("role")) for message in messages)
            reason = " ".join(str(error).split())
            raise ValueError(f"the chat template refuses these messages (roles: {roles}): {reason}") from error

    def _layout(self, messages, template, add_generation_prompt, kwargs, empty):
        """
        The rendered conversation as literals and slots: `literal, slot, literal, ..., slot, literal`.

        It depends on roles and parts, not on the words, so it is found once for each shape of conversation.
        """
        shape = [{**m, "content": [p["type"] for p in m["content"]], "train": None, "weight": None} for m in messages]
        key = json.dumps([shape, template, add_generation_prompt, kwargs, sorted(empty)], default=repr, sort_keys=True)
        if key in self._layouts:
            return self._layouts[key]

        def render(mark):
            marks = itertools.count()
            marked = []
            for message in messages:
                content = []
                for part in message["content"]:
                    if part["type"] == "text":
                        index = next(marks)
                        part = {"type": "text", "text": "" if index in empty else mark.format(index)}
                    content.append(part)
                marked.append({**message, "content": content})
            return self._render(marked, template, add_generation_prompt=add_generation_prompt, **kwargs)

        pieces = _MARK_PATTERN.split(render(_MARK))
        trimmed = _MARK_PATTERN.split(render(_BLANK + _MARK + _BLANK))
        literals = tuple(pieces[0::4])
        if tuple(trimmed[0::4]) != literals:
            raise ValueError("the chat template changes with the text of the messages; choose another template.")
        slots = tuple(
            _Slot(int(index), lstrip=not left, rstrip=not right)
            for left, index, right in zip(trimmed[1::4], trimmed[2::4], trimmed[3::4])
        )
        if len(self._layouts) > 4096:
            self._layouts.clear()
        self._layouts[key] = literals, slots
        return literals, slots

    def _follow(self, messages, texts, template, add_generation_prompt, kwargs):
        """The layout of these very messages, and which texts it leaves out: some templates treat empty ones apart."""
        rendered = self._render(messages, template, add_generation_prompt=add_generation_prompt, **kwargs)
        owners = [message["role"] for message in messages for part in message["content"] if part["type"] == "text"]
        blank = frozenset(index for index, text in enumerate(texts) if not text.strip())
        nothing = frozenset(index for index in blank if not texts[index])
        answers = frozenset(index for index in blank if owners[index] == "assistant")
        for empty in dict.fromkeys((frozenset(), nothing - answers, blank - answers, nothing, blank)):
            literals, slots = self._layout(messages, template, add_generation_prompt, kwargs, empty)
            filled = [*_fill(literals, slots, texts), ""]
            if "".join(a + b for a, b in zip(literals, filled)) == rendered:
                return list(literals), list(slots), empty
        raise ValueError(
            "the chat template rewrites the text of a message, so its tokens cannot be told apart; expected a template "
            "that writes texts as they are, or trimmed."
        )

    def _find_answers(self, messages, literals, slots, template, kwargs, empty):
        """
        For each assistant message: the pieces from which to which it goes, and whether it is supervised.

        An answer starts where the generation prompt of the messages before it ends, so what the template still writes
        before the text (a blank, an empty thought) belongs to the answer. If the last answer's generation prompt is no
        beginning of the conversation, it takes that beginning's place; an earlier such answer is only context.
        """
        owner = [i for i, message in enumerate(messages) for part in message["content"] if part["type"] == "text"]
        answers = []
        for index in reversed([i for i, message in enumerate(messages) if message["role"] == "assistant"]):
            own = [position for position, slot in enumerate(slots) if owner[slot.text] == index]
            if not own:
                continue
            first, last = own[0], own[-1]
            if index:
                prompt_literals, prompt_slots = self._layout(messages[:index], template, True, kwargs, empty)
            else:  # nothing can be asked before it; what the template writes before its text is given
                prompt_literals, prompt_slots = tuple(literals[: first + 1]), tuple(slots[:first])
            begins = (
                prompt_slots == tuple(slots[:first])
                and prompt_literals[:-1] == tuple(literals[:first])
                and literals[first].startswith(prompt_literals[-1])
            )
            if not begins and index == len(messages) - 1:
                literals[: first + 1], slots[:first] = prompt_literals, prompt_slots
                last += len(prompt_slots) - first
                first, begins = len(prompt_slots), True
            start = len(prompt_literals[-1]) if begins else len(literals[first])
            learned = begins and messages[index].get("train") is not False
            answers.append(_Answer(first, start, last, learned))
        return answers

    def _encode_pieces(self, texts, literals, slots, answers, open_end):
        """Tokenise what stands between control tokens and the ends of answers, piece by piece."""
        encoder, pieces = self.text_encoder, _Pieces(self.image_token_id)
        buffer, filled = "", _fill(literals, slots, texts)

        def flush():
            nonlocal buffer
            pieces.add(encoder.encode(buffer, pieces.after), "text")
            buffer = ""

        def write(literal):
            nonlocal buffer
            for control, piece in encoder.split(literal):
                if control is None:
                    buffer += piece
                else:
                    flush()
                    pieces.add([control], "control")

        starts = {answer.first: answer for answer in answers}
        ends = {answer.last: answer for answer in answers}
        written = 0
        for position, literal in enumerate(literals):
            if position in starts:
                write(literal[written : starts[position].start])
                flush()
                pieces.learn = starts[position].learned
                written = starts[position].start
            write(literal[written:])
            written = 0
            if position < len(slots):
                buffer += filled[position]
            if position in ends:
                # A blank between an answer and its end token is the answer's: a blank alone could not end one.
                (control, piece), *more = encoder.split(literals[position + 1]) or [(None, "")]
                if control is None and piece.isspace() and more:
                    buffer += piece
                    written = len(piece)
                flush()
                pieces.learn = False
                at_end = position == len(slots) - 1 and not literals[-1]
                pieces.end_pending = ends[position].learned and (bool(literals[position + 1]) or at_end)
                if at_end and not open_end:
                    pieces.add([self.tokenizer.eos_token_id], "control")
        flush()
        return pieces.ids, pieces.supervised


class _Answer(NamedTuple):
    """An assistant message: from character `start` of literal `first` to slot `last`."""

    first: int
    start: int
    last: int
    learned: bool


class _Pieces:
    """Ids as they are written, each with the word whether it is supervised."""

    def __init__(self, image_token_id):
        self.image_token_id = image_token_id
        self.ids, self.supervised = [], []
        self.after, self.learn, self.end_pending = None, False, False

    def add(self, ids, kind):
        for id in ids:
            shows = id == self.image_token_id
            self.ids.append(id)
            self.supervised.append((self.learn or self.end_pending) and not shows)
            self.end_pending = self.end_pending and shows
            self.after = kind


def _prepare_tokenizer(tokenizer, image_token):
    """Give a language model's tokenizer an image token, a pad token, and nothing at the end of a prompt."""
    known = tokenizer.get_vocab().get(image_token)
    token = tokenizer.added_tokens_decoder.get(known)
    if known is not None and not (token is not None and token.special):
        raise ValueError(
            f"the tokenizer already uses {image_token!r} (id {known}) for something that is no special token; choose "
            "another image_token."
        )
    tokenizer.add_tokens(AddedToken(image_token, special=True, normalized=False), special_tokens=True)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{type(tokenizer).__name__} has no eos token, so a model could not learn to stop; add one.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is known from lengths, so the two may share an id
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    special = tokenizer("a")["input_ids"]
    start = next(i for i in range(len(special)) if special[i : i + len(plain)] == plain)
    if len(special) > start + len(plain):
        names = tokenizer.convert_ids_to_tokens(special[:start])
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=[f"{name}:0" for name in names] + ["$A:0"], special_tokens=list(zip(names, special[:start]))
        )
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"


def _load_image_processor(vision, model_config, options):
    """The encoder's own image processor in its Pillow form, made to give images of the size the encoder takes."""
    height, width = model_config.image_size
    size = {"height": height, "width": width}
    if isinstance(vision, PreTrainedConfig):
        half = [0.5, 0.5, 0.5]
        return transformers.ViTImageProcessorPil(size=size, image_mean=half, image_std=half)
    settings, _ = transformers.ImageProcessingMixin.get_image_processor_dict(vision, **options)
    name = settings.get("image_processor_type") or settings.get("feature_extractor_type", "")
    name = re.sub("(Fast|Pil)$", "", name.replace("FeatureExtractor", "ImageProcessor")) + "Pil"
    loader = getattr(transformers, name, AutoImageProcessor)
    processor = loader.from_pretrained(vision, **options)
    probe = Image.new("RGB", (width + 7, height + 3))
    for change in ({}, {"size": size}, {"size": size, "crop_size": size}):
        for key, value in change.items():
            setattr(processor, key, value)
        if tuple(processor(probe, return_tensors="pt")["pixel_values"].shape[-2:]) == (height, width):
            return processor
    raise ValueError(
        f"the image processor of {str(vision)!r} does not give images of {height}x{width} pixels, the size that the "
        "vision encoder takes."
    )


def _with_parts(messages):
    """Messages with contents as lists of parts, without the null keys that `datasets` adds."""
    result = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        parts = []
        for part in content or []:
            part = {key: value for key, value in part.items() if value is not None}
            kind = part.get("type")
            if kind == "image_url":
                part = {"type": "image", "url": part["image_url"]["url"]}
            elif kind not in ("image", "text") or (kind == "text" and not isinstance(part.get("text"), str)):
                raise ValueError(
                    f'a content part of type {kind!r} was found; expected {{"type": "text", "text": ...}} or '
                    '{"type": "image"}.'
                )
            parts.append(part)
        result.append({**message, "content": parts})
    return result


def _parts(messages):
    return [part for message in messages for part in message["content"]]


def _open(part):
    found = next((part[key] for key in ("image", "path", "url", "base64") if key in part), None)
    if isinstance(found, Image.Image):
        return to_rgb(found)
    if not isinstance(found, (str, Path)):
        raise ValueError("an image part names no image; expected a PIL image, a path or a URL under 'image'.")
    try:
        if os.path.isfile(found):
            source = found
        elif str(found).startswith(("http://", "https://")):
            request = Request(found, headers={"User-Agent": f"transformers/{transformers.__version__}"})
            with urlopen(request, timeout=60) as response:
                source = io.BytesIO(response.read())
        else:
            source = io.BytesIO(base64.b64decode(str(found).split(",")[-1], validate=True))
        with Image.open(source) as image:
            return to_rgb(image)
    except Exception as error:  # Pillow's decoders raise nearly anything on a broken file
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{str(found)[:80]}: no readable image file, URL or base64 data was found there ({reason})."
        ) from error


def _pad(row, length, value, side):
    padding = [value] * (length - len(row))
    return padding + row if side == "left" else row + padding


__all__ = ["VLMProcessor"]
