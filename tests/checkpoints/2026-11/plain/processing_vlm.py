"""The processor of a Duet model: images and text or messages in, tensors out.

It is made from the two backbones: whatever can be derived (image size, normalisation, tokens per image, pad token, chat
template) is. Messages become ids in `messages_vlm.py`, for training and for generation alike, and images views in
`images_vlm.py`. The files travel with every checkpoint.
"""

import base64
import copy
import io
import itertools
import os
import re
from pathlib import Path
from urllib.request import Request, urlopen

import transformers
from PIL import Image
from tokenizers import processors
from transformers import (
    AddedToken,
    AutoTokenizer,
    BatchFeature,
    GenerationConfig,
    PreTrainedConfig,
    ProcessorMixin,
)
from transformers.image_transforms import to_pil_image
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import MultiModalData

from .images_vlm import IMAGE_MODES, choose_grid, cut_tiles, fit, to_rgb
from .messages_vlm import MARK, MessageEncoder, all_parts, with_parts


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


class VLMProcessor(ProcessorMixin):
    r"""
    Images and text or messages in, tensors out.

    Args:
        image_processor: the vision encoder's image processor.
        tokenizer: the language model's tokenizer, with `image_token` as a special token.
        chat_template (`str`, *optional*): the jinja template of a conversation.
        image_token (`str`): the placeholder of an image in a text.
        image_seq_length (`int`): positions that one view of an image takes.
        image_mode (`str`, *optional*):
            How an image is made to fit: `"resize"` stretches it, `"pad"` puts it whole on a ground of the mean colour,
            `"crop"` takes the centre. As the encoder's own image processor does it if not given.
        max_tiles (`int`):
            Into how many tiles of the encoder's image size an image may be cut for detail, beside the view of the
            whole; 1 cuts none. Each view and each row of tiles then ends in one more position.

    Raises:
        `ValueError`: no such `image_mode`, or less than one tile.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template=None,
        image_token="<image>",
        image_seq_length=1,
        image_mode=None,
        max_tiles=1,
    ):
        if image_mode not in (None, *IMAGE_MODES):
            raise ValueError(f"image_mode={image_mode!r} is not known; choose one of {', '.join(IMAGE_MODES)}.")
        if not isinstance(max_tiles, int) or max_tiles < 1:
            raise ValueError(f"max_tiles={max_tiles!r}: expected 1 (no tiles) or more.")
        self.image_mode = image_mode
        self.max_tiles = max_tiles
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.image_seq_length = image_seq_length
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self._encoder = self._encoder_of = None

    def __getstate__(self):
        """Without what is made on the spot: `datasets` names its caches by the state, and workers are sent it."""
        return {**self.__dict__, "_encoder": None, "_encoder_of": None}

    @classmethod
    def from_backbones(
        cls,
        vision: str | PreTrainedConfig | tuple[str | PreTrainedConfig, str | PreTrainedConfig],
        text: str | PreTrainedConfig,
        model_config: PreTrainedConfig,
        *,
        tokenizer=None,
        image_token: str = "<image>",
        chat_template: str | None = None,
        image_mode: str | None = None,
        vision_kwargs: dict | None = None,
        text_kwargs: dict | None = None,
    ) -> "VLMProcessor":
        """
        The processor that belongs to a composed model.

        Args:
            vision, text, tokenizer, image_token, vision_kwargs, text_kwargs:
                what `VLMForConditionalGeneration.from_backbones` was given; for an encoder that starts from scratch the
                images are resized and normalised to [-1, 1]. Of two encoders the first's image processor is taken.
            model_config (`VLMConfig`): the composed model's config.
            chat_template (`str`, *optional*):
                A jinja template, the name of one of Duet's (`"default"`, `"plain"`) or a file. Without it the
                tokenizer's own is used, and `"default"` where it has none.
            image_mode (`str`, *optional*): see the class.

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
        vision = vision[0] if isinstance(vision, (list, tuple)) else vision
        processor = cls(
            image_processor=_load_image_processor(vision, model_config, options),
            tokenizer=tokenizer,
            image_token=image_token,
            image_seq_length=model_config.image_seq_length,
            image_mode=image_mode,
            max_tiles=model_config.max_tiles,
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
            if file.parent == TEMPLATES and self.encoder.text.prefix_ids:
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
        content = [{"type": "image"}, {"type": "text", "text": MARK.format(0)}]
        try:
            text = self.encoder.render([{"role": "user", "content": content}], template)
        except ValueError:
            return False
        return text.count(self.image_token) == 1 and text.count(MARK.format(0)) == 1 and "'type'" not in text

    # -- texts and images, as every processor ---------------------------------------------------------------------

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model's inputs; `input_ids` first, because the Trainer takes lengths from the first."""
        return ["input_ids", "attention_mask", "pixel_values", *(["image_grids"] if self.max_tiles > 1 else [])]

    @property
    def view_size(self) -> tuple[int, int]:
        """Height and width in pixels of what the encoder sees."""
        images = self.image_processor
        size = dict(images.crop_size if getattr(images, "do_center_crop", False) else images.size)
        return tuple(size.get(side, size.get("shortest_edge")) for side in ("height", "width"))

    def image_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the tiles of an image of that many pixels; 1 and 1 where it is not tiled."""
        return choose_grid((height, width), self.view_size, self.max_tiles) if self.max_tiles > 1 else (1, 1)

    def image_tokens(self, height: int, width: int) -> int:
        """Positions that an image of that many pixels takes."""
        return self.grid_tokens(*self.image_grid(height, width))

    def grid_tokens(self, rows: int, columns: int) -> int:
        """Positions that an image of `rows` x `columns` tiles takes; as `VLMConfig.image_tokens`."""
        if self.max_tiles == 1:
            return self.image_seq_length
        tiles, separators = (rows * columns, rows) if rows * columns > 1 else (0, 0)
        return self.image_seq_length * (1 + tiles) + 1 + separators

    def process_images(self, images: list, return_tensors: str | None = "pt", **kwargs) -> BatchFeature:
        """
        Images to what the model takes.

        Args:
            images: RGB images of any size.
            **kwargs: passed to the image processor.

        Returns:
            `pixel_values` `(views, channels, height, width)`, of each image the view of the whole and then its tiles
            row by row; and, where images are tiled, `image_grids` `(images, 2)`, the rows and columns of each.
        """
        images = [to_rgb(image) if isinstance(image, Image.Image) else image for image in images]
        if self.image_mode is None and self.max_tiles == 1:
            return self.image_processor(images, return_tensors=return_tensors, **kwargs)
        if not all(isinstance(image, Image.Image) for image in images):
            # Arrays whose values need no rescaling are shares of 255, which they become here.
            shares = True if kwargs.pop("do_rescale", None) is False else None
            images = [i if isinstance(i, Image.Image) else to_rgb(to_pil_image(i, shares)) for i in images]
        grids = [self.image_grid(image.height, image.width) for image in images]
        # What fits already is not to be scaled and cropped once more, as encoders' own processors do (256, then 224).
        kwargs |= {"do_resize": False, "do_center_crop": False}
        views = []
        for image, grid in zip(images, grids):
            views.append(self._fit(image, (1, 1)))
            if grid != (1, 1):
                views += cut_tiles(self._fit(image, grid), grid)
        pixels = self.image_processor(views, **kwargs)["pixel_values"]
        data = {"pixel_values": pixels, **({"image_grids": grids} if self.max_tiles > 1 else {})}
        return BatchFeature(data, tensor_type=return_tensors)

    def _fit(self, image, grid):
        """The image made to fit that many rows and columns of views."""
        size = tuple(side * count for side, count in zip(self.view_size, grid))
        fill = tuple(round(255 * mean) for mean in self.image_processor.image_mean or (0, 0, 0))
        return fit(image, size, self.image_mode or "resize", fill, self.image_processor.resample)

    def _process_images(self, images, **kwargs):
        # What every processor's `__call__` calls; overridden, because of one image several views may be made.
        images = make_flat_list_of_images(images)
        processed = self.process_images(images, **{"return_tensors": None, **kwargs})
        return processed, [self.replace_image_token(processed, index) for index in range(len(images))]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The placeholders of one image: an image token for each position that it takes."""
        grid = image_inputs["image_grids"][image_idx] if "image_grids" in image_inputs else (1, 1)
        return self.image_token * self.grid_tokens(*(int(side) for side in grid))

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """Tokens per image from its `(height, width)` alone, for inference engines."""
        if image_sizes is None:
            return MultiModalData()
        grids = [self.image_grid(*size) for size in image_sizes]
        return MultiModalData(
            num_image_tokens=[self.grid_tokens(*grid) for grid in grids],
            num_image_patches=[1 + (rows * columns if rows * columns > 1 else 0) for rows, columns in grids],
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
        conversations = [with_parts(c) for c in (conversation if batched else [conversation])]
        rendering = dict(
            add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message, **kwargs
        )
        if not tokenize:
            prompts = [self.encoder.render(messages, template, **rendering) for messages in conversations]
            return prompts if batched else prompts[0]
        if options.get("truncation"):
            raise ValueError("truncation could cut an image's tokens; shorten the messages instead.")

        encoded = [self.encode_messages(m, chat_template=template, **rendering) for m in conversations]
        opened = [[_open(part) for part in all_parts(m) if part["type"] == "image"] for m in conversations]
        counts = [[self.image_tokens(image.height, image.width) for image in images] for images in opened]
        expanded = [self.expand_images(*pair, counts=of_row) for of_row, pair in zip(counts, encoded)]
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
            data["assistant_masks"] = [
                _pad([int(weight > 0) for weight in weights], length, 0, side) for _, weights in expanded
            ]
        images = [image for of_row in opened for image in of_row]
        if images:
            data.update(self.process_images(images, None, **options.get("images_kwargs", {})))
        if not return_dict:
            data = {"input_ids": data["input_ids"]}
        if not batched and return_tensors is None:
            of_images = ("pixel_values", "image_grids")
            data = {key: value if key in of_images else value[0] for key, value in data.items()}
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
        supervise_prompt: bool = False,
        chat_template: str | None = None,
        **template_kwargs,
    ) -> tuple[list[int], list[float]]:
        """
        Ids of a conversation, one id an image, and the weight of each in the loss.

        Supervised (of weight 1) are the tokens of each assistant message and the end token behind it: the first token
        that the template puts after the answer (with the blanks before a control token), else eos. `"train": False` on
        an assistant message leaves it out, `"weight"` is the weight of its tokens and its end.

        Args:
            supervise_prompt (`bool`): everything but images and answers left out is supervised, the prompts too.

        Returns:
            `(ids, weights)`, two lists of one length, the weight 0 where nothing is learned; see `expand_images`.

        Raises:
            `ValueError`: the template refuses the messages, or rewrites them in a way that cannot be followed.
        """
        template = chat_template or self.chat_template
        if template is None:
            raise ValueError("this processor has no chat template; set one with `set_chat_template`.")
        return self.encoder.encode_messages(
            messages,
            template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            supervise_prompt=supervise_prompt,
            **template_kwargs,
        )

    def encode_caption(self, content: list[dict]) -> tuple[list[int], list[float]]:
        """
        Ids of stage 1's sequence, which has no roles: what the tokenizer starts with, image, caption, eos.

        Args:
            content: parts in their order, image parts and the caption; every text and the eos are supervised.

        Returns:
            `(ids, weights)` as `encode_messages`; the ids before the caption are those of
            `processor(images=..., text="<image>")`.
        """
        return self.encoder.encode_caption(content)

    def expand_images(self, ids: list[int], *parallel: list, counts: list[int] | None = None) -> tuple[list, ...]:
        """
        Repeat each image's one id, and what runs parallel to the ids, as often as the image takes positions.

        Args:
            counts: positions of each image, in the order of their ids, where they are tiled; see `image_tokens`.
        """
        remaining = itertools.repeat(self.grid_tokens(1, 1)) if counts is None else iter(counts)
        times = [next(remaining) if id == self.image_token_id else 1 for id in ids]
        return tuple([v for v, count in zip(row, times) for _ in range(count)] for row in (ids, *parallel))

    @property
    def encoder(self) -> MessageEncoder:
        """What makes ids of messages; made anew when the tokenizer has changed."""
        made_of = (id(self.tokenizer), len(self.tokenizer))
        if self._encoder is None or self._encoder_of != made_of:
            self._encoder, self._encoder_of = MessageEncoder(self.tokenizer, self.image_token), made_of
        return self._encoder

    @property
    def end_token_ids(self) -> list[int]:
        """Ids that end an answer: eos, and the token that the chat template puts after one."""
        ends = [self.tokenizer.eos_token_id]
        if self.chat_template is not None:
            probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            ids, weights = self.encode_messages(probe)
            ends += [id for id, weight in zip(ids, weights) if weight][-1:]
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
    if hasattr(transformers, name):
        processor = getattr(transformers, name).from_pretrained(vision, **options)
    else:  # it has no Pillow form (DINOv3): one that does the same
        kind = "CLIPImageProcessorPil" if settings.get("do_center_crop") else "ViTImageProcessorPil"
        processor = _of_settings(kind, settings)
    if hasattr(processor, "max_num_patches"):  # it cuts patches itself (SigLIP 2), which is left to the model here
        return _of_settings("ViTImageProcessorPil", {**settings, "size": size})
    probe = Image.new("RGB", (width + 7, height + 3))
    for change in ({}, _scaled(processor, height, width), {"size": size}, {"size": size, "crop_size": size}):
        for key, value in change.items():
            setattr(processor, key, value)
        pixels = processor(probe, return_tensors="pt")["pixel_values"]
        if tuple(pixels.shape[-2:]) == (height, width):
            return processor
    raise ValueError(
        f"the image processor of {str(vision)!r} does not give images of {height}x{width} pixels, the size that the "
        "vision encoder takes."
    )


def _of_settings(kind, settings):
    names = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor")
    names += ("do_normalize", "image_mean", "image_std")
    return getattr(transformers, kind)(**{n: settings[n] for n in names if settings.get(n) is not None})


def _scaled(processor, height, width):
    """What has a processor that scales the shorter side and crops the middle do so for another size."""
    edge, crop = dict(processor.size or {}).get("shortest_edge"), dict(getattr(processor, "crop_size", None) or {})
    if not edge or not getattr(processor, "do_center_crop", False) or not {"height", "width"} <= crop.keys():
        return {}
    scale = max(height / crop["height"], width / crop["width"])
    return {"size": {"shortest_edge": round(edge * scale)}, "crop_size": {"height": height, "width": width}}


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
