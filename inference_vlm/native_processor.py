"""The library's own processor for a composed model that is exported: the same pixels and ids, without Duet's code.

What is special: a chat template gets a beginning that gives it contents as it reads them, as a string or as parts; and
where the library's processor would put a token before a conversation that the template does not, the tokenizer is kept
from doing so, so that a conversation has the ids that the model was trained on.
"""

import copy
from typing import Any

from PIL import Image
from tokenizers import processors
from transformers import LlavaProcessor, PreTrainedTokenizerBase, ProcessorMixin

from processing.data_error_vlm import DuetError
from processing.processing_vlm import VLMProcessor


_BEGINNING = """{%- set read = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is string and message['role'] in PARTS -%}
{%- set message = dict(message, content=[{'type': 'text', 'text': message['content']}]) -%}
{%- elif message['content'] is defined and message['content'] is iterable and message['content'] is not string
  and message['role'] not in PARTS -%}
{%- set text = namespace(value='') -%}
{%- for part in message['content'] -%}
{%- set text.value = text.value + (IMAGE if part['type'] in ['image', 'image_url'] else part['text']) -%}
{%- endfor -%}
{%- set message = dict(message, content=text.value) -%}
{%- endif -%}
{%- set read.messages = read.messages + [message] -%}
{%- endfor -%}
{%- set messages = read.messages -%}
"""


_WORDS = ("yes.", "No!", "(a) 12", "- one\n- two", '"x", y', "f(x) = 1;", "<b>", "\u4f60\u597d\u3002", "\U0001f642")
"""Texts that a tokenizer might read together with what a template puts around them."""


def native_processor(processor: VLMProcessor, select: str, patch_size: int, prefix_tokens: int) -> LlavaProcessor:
    """
    The library's processor that gives what a composed model's own gives.

    Args:
        select: what of the encoder's tokens the model reads, in LLaVA's words.
        patch_size: the encoder's, in pixels.
        prefix_tokens: how many tokens the encoder puts before its patches.

    Raises:
        DuetError: images are made to fit as no image processor of the library does.
    """
    tokenizer = copy.deepcopy(processor.tokenizer)
    template = tokenizer.chat_template = template_of_parts(processor)
    native = LlavaProcessor(
        image_processor=_image_processor(processor),
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy=select,
        chat_template=template,
        image_token=processor.image_token,
        num_additional_image_tokens=prefix_tokens,
    )
    for part in (native, native.image_processor, tokenizer):  # Duet's code does not come with them
        part._auto_class = None
        for settings in (vars(part), getattr(part, "init_kwargs", {})):
            settings.pop("auto_map", None)
            settings.pop("processor_class", None)
    return native


def _image_processor(processor):
    images = copy.deepcopy(processor.image_processor)
    height, width = processor.view_size
    size = {"height": height, "width": width}
    if processor.image_mode == "resize":
        images.do_resize, images.do_center_crop, images.size = True, False, size
    elif processor.image_mode is not None:
        raise DuetError(
            f"image_mode={processor.image_mode} makes images fit as no image processor of transformers' own does "
            "(--image_mode resize, or none at all, can be exported)."
        )
    images.do_convert_rgb = True  # of which some image processors have nothing, and then read no grey picture
    if getattr(images, "crop_size", None) is None:
        images.crop_size = size  # where `LlavaProcessor` reads what an engine asks it for: tokens by size alone
    return images


def template_of_parts(processor: VLMProcessor) -> str:
    """
    The processor's template, made to take a content as a string and as parts, as the processor does.

    Engines give it parts where it goes through `message['content']` itself; else they join texts by line breaks.
    """
    template = processor.chat_template or ""  # which is refused as one that loses texts
    reads = processor.encoder.reads_parts(template)
    parts = [role for role in ("user", "system", "assistant") if reads.get(role, reads["user"])]
    said = ("a", [{"type": "text", "text": "a"}])
    if len(parts) == 3 and len({_rendered(processor.tokenizer, template, content) for content in said}) == 1:
        return template  # it takes both
    return _BEGINNING.replace("PARTS", repr(parts)).replace("IMAGE", repr(processor.image_token)) + template


def _rendered(tokenizer, template, content):
    messages = [{"role": "user", "content": content}]
    try:
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    except Exception:  # a template may raise whatever it likes
        return None


def conversations(image: Image.Image, processor: VLMProcessor) -> list[list[dict[str, Any]]]:
    """Conversations that the processor's template takes: with and without an image, with instructions, of two turns."""
    asked = _says("user", "What is in the picture? Two words, please.", image)
    tried = [
        [asked],
        [_says("user", "Count to 3 -- naïve café, 你好 🙂.")],
        [_says("system", "Be brief."), asked],
        [asked, _says("assistant", "A cat."), _says("user", "And now?", image)],
    ]
    return tried[:2] + [messages for messages in tried[2:] if _takes(processor, messages)]


def _says(role, text, *images):
    return {"role": role, "content": [*({"type": "image", "image": i} for i in images), {"type": "text", "text": text}]}


def _takes(processor, messages):
    try:
        return bool(processor.apply_chat_template(messages, add_generation_prompt=True))
    except ValueError:  # no such role, or one turn only
        return False


def inputs_of(processor: Any, messages: list[dict[str, Any]]) -> dict[str, Any]:
    """What a model is given that is to answer."""
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def differing(processor: VLMProcessor, native: ProcessorMixin, image: Image.Image) -> list[str]:
    """In which of `conversations` two processors give other ids: what is said of them; nothing where all are equal."""
    tried = conversations(image, processor)
    return [", ".join(m["role"] for m in messages) for messages in tried if not _same_ids(processor, native, messages)]


def differing_words(processor: VLMProcessor, native: ProcessorMixin) -> list[str]:
    """Of words that begin and end otherwise, those around which two processors read a dialogue as other ids."""
    dialogues = {words: [_says("user", words), _says("assistant", words), _says("user", words)] for words in _WORDS}
    return [w for w, said in dialogues.items() if _takes(processor, said) and not _same_ids(processor, native, said)]


def _same_ids(processor, native, messages):
    ours = inputs_of(processor, messages)["input_ids"].tolist()
    try:
        return ours == inputs_of(native, messages)["input_ids"].tolist()
    except Exception:  # a template may raise whatever it likes
        return False


def leave_out_prefix(tokenizer: PreTrainedTokenizerBase) -> None:
    """Keep a tokenizer from putting tokens of its own around a text."""
    for name in ("add_bos_token", "add_eos_token"):
        if getattr(tokenizer, name, None):
            setattr(tokenizer, name, False)
            tokenizer.init_kwargs[name] = False
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])


__all__ = [
    "conversations",
    "differing",
    "differing_words",
    "inputs_of",
    "leave_out_prefix",
    "native_processor",
    "template_of_parts",
]
