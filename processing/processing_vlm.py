"""The processor of a Duet model: images and text or messages in, tensors out.

It is made from the two backbones: whatever can be derived (image size, normalisation, tokens per image, pad token, chat
template) is. Messages become ids in `messages_vlm.py`, for training and for generation alike, and images views in
`images_vlm.py`. The files travel with every checkpoint.
"""

import contextlib
import copy
import itertools
import os
import re
from pathlib import Path
from typing import cast

from PIL import Image
from transformers import (
    AutoTokenizer,
    BatchFeature,
    GenerationConfig,
    PreTrainedConfig,
    ProcessorMixin,
)
from transformers.image_transforms import to_pil_image
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import MultiModalData

from .data_error_vlm import DuetError
from .fitting_vlm import in_pillow, load_image_processor, prepare_tokenizer
from .image_files_vlm import BadImage, ImagePolicy, NamedImage, is_url, load_image
from .images_vlm import IMAGE_MODES, bounded_size, choose_grid, cut_tiles, fit, to_rgb, trim
from .messages_vlm import MessageEncoder, all_parts, with_parts


TEMPLATES = Path(__file__).parent / "templates"

# Earlier versions put a part of their own before a language model's template.
_EARLIER_PART = re.compile(
    r"\A{%- set joined = namespace\(messages=\[\]\) -%}\n.*?{%- set messages = joined\.messages -%}\n", re.DOTALL
)

_OPTIONS = (
    "padding", "max_length", "truncation", "padding_side", "pad_to_multiple_of", "add_special_tokens",
    "return_mm_token_type_ids", "images", "images_kwargs",
)  # fmt: skip
_ASKED_BY_ENGINES = ("return_mm_token_type_ids", "return_text_replacement_offsets")
_IMAGE_KEYS = ("image", "path", "url", "base64")
_MEDIA = ("videos", "audio", "audios")
_NO_BOUND = 1e20  # a tokenizer that knows no bound names a larger one


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
        `DuetError`: no such `image_mode`, or less than one tile.
    """

    chat_template: str | None
    allow_local_urls = False
    """Whether the URLs of image parts may lead to this machine and to networks of its own; set it where they may."""

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
            raise DuetError(f"image_mode={image_mode!r} is not known; choose one of {', '.join(IMAGE_MODES)}.")
        if not isinstance(max_tiles, int) or max_tiles < 1:
            raise DuetError(f"max_tiles={max_tiles!r}: expected 1 (no tiles) or more.")
        self.image_mode = image_mode
        self.max_tiles = max_tiles
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.image_seq_length = image_seq_length
        for holder, template in ((self, chat_template), (tokenizer, tokenizer.chat_template)):
            holder.chat_template = _EARLIER_PART.sub("", template, 1) if isinstance(template, str) else template
        super().__init__(in_pillow(image_processor), tokenizer, chat_template=self.chat_template)
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
                images are resized and normalised to [-1, 1]. The first of two encoders gives the image processor.
            model_config (`VLMConfig`): the composed model's config.
            chat_template (`str`, *optional*):
                A jinja template, the name of one of Duet's (`"default"`, `"plain"`) or a file. Without it the
                tokenizer's own is used, and `"default"` where it has none.
            image_mode (`str`, *optional*): see the class.

        Raises:
            `DuetError`: the tokenizer uses the image token for something else, or cannot be used, or the chat
                template cannot place images.
        """
        options = {k: v for k, v in (text_kwargs or {}).items() if k != "attn_implementation"}
        if tokenizer is None or isinstance(tokenizer, (str, Path)):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer or text, **options)
        else:
            tokenizer = copy.deepcopy(tokenizer)
        prepare_tokenizer(tokenizer, image_token)
        image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if image_token_id != model_config.image_token_id:
            raise DuetError(
                f"the tokenizer gives {image_token} the id {image_token_id}, the model's config has "
                f"{model_config.image_token_id}; compose model and processor from the same tokenizer."
            )
        options = {k: v for k, v in (vision_kwargs or {}).items() if k != "attn_implementation"}
        vision = vision[0] if isinstance(vision, (list, tuple)) else vision
        processor = cls(
            image_processor=load_image_processor(vision, model_config, options),
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
            `DuetError`: no such template, or one that loses a text or an image.
        """
        template = chat_template or self.tokenizer.chat_template or "default"
        if isinstance(template, dict):
            template = template.get("default", "default")
        if "{" not in template:
            file = TEMPLATES / f"{template}.jinja"
            file = file if file.is_file() else Path(template)
            if not file.is_file():
                known = ", ".join(sorted(path.stem for path in TEMPLATES.glob("*.jinja")))
                raise DuetError(f"chat template {template!r} is neither a file nor one of Duet's templates ({known}).")
            template = file.read_text(encoding="utf-8")
            if file.parent == TEMPLATES and self.encoder.text.prefix_ids:
                template = "{{- bos_token -}}\n" + template  # what this tokenizer starts every text with
        self.encoder.reads_parts(template)
        # On both, byte for byte, so that other programs know the language model's template by its text.
        self.chat_template = self.tokenizer.chat_template = template

    # -- texts and images, as every processor ---------------------------------------------------------------------

    def __call__(self, images=None, text=None, videos=None, audio=None, **kwargs) -> BatchFeature:
        """
        Images and texts, with an image token for each image, to tensors, as every processor; an empty list is none.

        Where an engine asks for what it locates images by, `image_grids` come once a view: see `grids_of_images`.

        Raises:
            `DuetError`: videos or audio, or another number of image tokens than images.
        """
        _refuse_media({"videos": videos, "audio": audio, "audios": kwargs.pop("audios", None)})
        made = super().__call__(images if _holds_any(images) else None, text, **kwargs)
        if "image_grids" in made and any(kwargs.get(name) for name in _ASKED_BY_ENGINES):
            # They cut whatever there is into images by the views of each, so each view gets the grid of its image.
            grids = made["image_grids"]
            of_views = [index for index, grid in enumerate(grids) for _ in range(_views(*map(int, grid)))]
            made["image_grids"] = [grids[index] for index in of_views] if isinstance(grids, list) else grids[of_views]
        return made

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs) -> "VLMProcessor":
        """
        A saved processor, as every processor's `from_pretrained`.

        This class is here already, so the folder's code is run only with `trust_remote_code=True`.
        """
        if not kwargs.setdefault("trust_remote_code", False):
            # Its parts say themselves of which class they are; the model's config would have to be run to be read.
            kwargs.setdefault("config", PreTrainedConfig())
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model's inputs; `input_ids` first, because the Trainer takes lengths from the first."""
        return ["input_ids", "attention_mask", "pixel_values", *(["image_grids"] if self.max_tiles > 1 else [])]

    @property
    def view_size(self) -> tuple[int, int]:
        """Height and width in pixels of what the encoder sees."""
        images = self.image_processor
        size = dict(images.crop_size if getattr(images, "do_center_crop", False) else images.size)
        height, width = (int(size.get(side) or size["shortest_edge"]) for side in ("height", "width"))
        return height, width

    def tile_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the tiles of an image of that many pixels; 1 and 1 where it is not tiled."""
        size = bounded_size(height, width)
        return choose_grid(size, self.view_size, self.max_tiles) if self.max_tiles > 1 else (1, 1)

    def image_tokens(self, height: int, width: int) -> int:
        """Positions that an image of that many pixels takes."""
        return self.tile_tokens(*self.tile_grid(height, width))

    def tile_tokens(self, rows: int, columns: int) -> int:
        """Positions that an image of `rows` x `columns` tiles takes; as `VLMConfig.tile_tokens`."""
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
            if "shortest_edge" in dict(getattr(self.image_processor, "size", None) or {}):
                # It scales the short side, cuts out the middle, and would make a giant of a line.
                images = [trim(image) if isinstance(image, Image.Image) else image for image in images]
            return self.image_processor(images, return_tensors=return_tensors, **kwargs)
        if not all(isinstance(image, Image.Image) for image in images):
            # Arrays whose values need no rescaling are shares of 255, which they become here.
            shares = True if kwargs.pop("do_rescale", None) is False else None
            images = [i if isinstance(i, Image.Image) else to_rgb(to_pil_image(i, shares)) for i in images]
        grids = [self.tile_grid(image.height, image.width) for image in images]
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
        height, width = self.view_size
        size = (height * grid[0], width * grid[1])
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
        return self.image_token * self.tile_tokens(*(int(side) for side in grid))

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """Tokens per image from its `(height, width)` alone, for inference engines."""
        if image_sizes is None:
            return MultiModalData()
        grids = [self.tile_grid(*size) for size in image_sizes]
        return MultiModalData(
            num_image_tokens=[self.tile_tokens(*grid) for grid in grids],
            num_image_patches=[_views(*grid) for grid in grids],
        )

    # -- messages -------------------------------------------------------------------------------------------------

    # Options by keyword only, and what a version of the library has more of them is in `kwargs`.
    def apply_chat_template(  # type: ignore[override]
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
            tokenize (`bool`): tensors, of one conversation a batch of one, in place of the prompt.
            chat_template (`str`, *optional*): instead of the processor's own.
            add_generation_prompt (`bool`): end with what the assistant's answer starts after.
            continue_final_message (`bool`): end inside the last message, which the model goes on writing.
            return_assistant_tokens_mask (`bool`): add `assistant_masks`, 1 on the tokens that training supervises.
            processor_kwargs (`dict`): as for every processor, `padding` (tensors of several conversations are padded
                unless it is `False`), `truncation`, `max_length`, `padding_side`, `pad_to_multiple_of`,
                `return_mm_token_type_ids`, `images_kwargs`, and `images` for image parts that name none.
            **kwargs: the same, or passed to the template.

        Raises:
            `DuetError`: the template cannot render these messages, `max_length` would cut an image, or something is
                given that is neither text nor image.
        """
        template = self._template(chat_template)
        options = dict(processor_kwargs or {})
        for key in ("common_kwargs", "text_kwargs"):
            options |= options.pop(key, {})
        options |= {key: kwargs.pop(key) for key in (*_OPTIONS, *_MEDIA) if key in kwargs}
        _refuse_media(options)
        for key in ("sanitize_control_tokens", "load_audio_from_video"):  # what is typed is text here, always
            kwargs.pop(key, None)
        return_tensors = options.get("return_tensors") if return_tensors in (None, "auto") else return_tensors
        batched = bool(conversation) and not isinstance(conversation[0], dict)
        each: list = conversation if batched else [conversation]
        conversations = [with_parts(messages) for messages in each]
        rendering = dict(
            add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message, **kwargs
        )
        if not tokenize:
            prompts = [self.encoder.render(messages, template, **rendering) for messages in conversations]
            return prompts if batched else prompts[0]
        most, length = self._bounds(options, len(conversations) > 1 and return_tensors is not None)
        if self.tokenizer.truncation_side == "right":
            rendering["max_length"] = most
        encoded = [self.encode_messages(m, chat_template=template, **rendering) for m in conversations]
        given = cast(list, make_flat_list_of_images(options["images"])) if _holds_any(options.get("images")) else []
        beside = iter(given)
        opened = [
            [self._open(p if _names_image(p) else {**p, "image": next(beside, None)}) for p in parts_of_images]
            for parts_of_images in ([p for p in all_parts(m) if p["type"] == "image"] for m in conversations)
        ]
        counts = [[self.image_tokens(image.height, image.width) for image in images] for images in opened]
        expanded = [self.expand_images(*pair, counts=of_row) for of_row, pair in zip(counts, encoded)]
        expanded = [self._cut(ids, weights, most) for ids, weights in expanded]
        rows = [ids for ids, _ in expanded]
        if length is None:
            length = max(map(len, rows), default=0)
        multiple = options.get("pad_to_multiple_of") or 1
        length = -(-length // multiple) * multiple
        side = options.get("padding_side") or self.tokenizer.padding_side
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
        features = BatchFeature(data, tensor_type=return_tensors)
        return features if return_dict else features["input_ids"]

    def _template(self, given: str | None) -> str:
        template = given or self.chat_template
        if template is None:
            raise DuetError("this processor has no chat template; set one with `set_chat_template`.")
        return template

    def _open(self, part):
        """The image that an image part carries."""
        found = next((part[key] for key in _IMAGE_KEYS if key in part), None)
        if not isinstance(found, (Image.Image, str, Path)):
            raise DuetError("an image part names no image; expected a PIL image, a path or a URL under 'image'.")
        reference = found
        if is_url(found):
            reference = NamedImage(found, ImagePolicy(allow_local_urls=self.allow_local_urls))
        elif isinstance(found, str) and not found.startswith("data:") and not os.path.exists(found):
            reference = f"data:image/*;base64,{found}"
        try:
            return load_image(reference)
        except BadImage as error:
            raise DuetError(
                f"{str(found)[:80]}: no readable image file, URL or base64 data was found there ({error})"
            ) from error

    def _bounds(self, options, pads):
        """The positions to which conversations are cut (`None`: not), and padded (`None`: to the longest; 0: not)."""
        most = options.get("max_length") or self.tokenizer.model_max_length
        most = None if most > _NO_BOUND else most
        cuts = options.get("truncation") not in (None, False, "do_not_truncate")
        padding = options.get("padding", pads)
        length = {"max_length": most or 0, "longest": None, True: None}.get(padding, 0)
        return most if cuts else None, length

    def _cut(self, ids, weights, most):
        if most is None or len(ids) <= most:
            return ids, weights
        kept = slice(0, most) if self.tokenizer.truncation_side == "right" else slice(len(ids) - most, None)
        found, left = ids.count(self.image_token_id), ids[kept].count(self.image_token_id)
        if left < found:
            raise DuetError(
                f"max_length={most} would cut an image: {found} positions are images', {left} of them would be left; "
                "give a greater max_length, or fewer images."
            )
        return ids[kept], weights[kept]

    def encode_messages(
        self,
        messages: list[dict],
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        supervise_prompt: bool = False,
        max_length: int | None = None,
        notes: list[str] | None = None,
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
            max_length (`int`): where the caller cuts; only the beginning of texts past it is read.
            notes (`list`): to which `CONTEXT_ONLY` is added for each answer that is not learned, because generation
                would be asked for it in other words than stand before it here.

        Returns:
            `(ids, weights)`, two lists of one length, the weight 0 where nothing is learned; see `expand_images`.

        Raises:
            `DuetError`: the template refuses the messages, or rewrites them in a way that cannot be followed.
        """
        return self.encoder.encode_messages(
            messages,
            self._template(chat_template),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            supervise_prompt=supervise_prompt,
            max_length=max_length,
            notes=notes,
            **template_kwargs,
        )

    def encode_caption(self, content: list[dict], max_length: int | None = None) -> tuple[list[int], list[float]]:
        """
        Ids of stage 1's sequence, which has no roles: what the tokenizer starts with, image, caption, eos.

        Args:
            content: parts in their order, image parts and the caption; every text and the eos are supervised.
            max_length (`int`): see `encode_messages`.

        Returns:
            `(ids, weights)` as `encode_messages`; the ids before the caption are those of
            `processor(images=..., text="<image>")`.
        """
        return self.encoder.encode_caption(content, max_length)

    def expand_images(self, ids: list[int], *parallel: list, counts: list[int] | None = None) -> tuple[list, ...]:
        """
        Repeat each image's one id, and what runs parallel to the ids, as often as the image takes positions.

        Args:
            counts: positions of each image, in the order of their ids, where they are tiled; see `image_tokens`.
        """
        remaining = itertools.repeat(self.tile_tokens(1, 1)) if counts is None else iter(counts)
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
        """
        Ids that end an answer: eos, and the token that the chat template puts after one.

        Some templates put another behind an answer that is not the last; it counts if it is a control token.
        """
        ends = {self.tokenizer.eos_token_id}
        if self.chat_template is not None:
            turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            ids, weights = self.encode_messages(turn)
            ends |= {*[id for id, weight in zip(ids, weights) if weight][-1:]}
            with contextlib.suppress(DuetError):  # it may know one turn only
                ids, weights = self.encode_messages([*turn, turn[0], {**turn[1], "train": False}])
                last = [id for id, weight in zip(ids, weights) if weight][-1:]
                ends |= {*last}.intersection(self.encoder.text.control_ids.values())
        return sorted(ends)

    def update_generation_config(self, generation_config: GenerationConfig):
        """Let `generate` stop at the end of an answer, pad, and never write an image token."""
        known = generation_config.eos_token_id
        known = [] if known is None else known if isinstance(known, list) else [known]
        ends = sorted({*known, *self.end_token_ids})
        generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
        generation_config.pad_token_id = self.tokenizer.pad_token_id
        suppressed = {*(generation_config.suppress_tokens or []), self.image_token_id}
        generation_config.suppress_tokens = sorted(suppressed)


def _holds_any(media) -> bool:
    """Whether something is in there, however deep the lists."""
    return any(map(_holds_any, media)) if isinstance(media, (list, tuple)) else media is not None


def _refuse_media(options):
    given = [name for name in _MEDIA if _holds_any(options.get(name))]
    if given:
        raise DuetError(f"{' and '.join(given)} were given; Duet reads images and text, so leave them out.")


def _views(rows, columns) -> int:
    """How many views an image has that is cut into so many tiles."""
    return 1 + (rows * columns if rows * columns > 1 else 0)


def _names_image(part) -> bool:
    return any(key in part for key in _IMAGE_KEYS)


def _pad(row, length, value, side):
    padding = [value] * (length - len(row))
    return padding + row if side == "left" else row + padding


__all__ = ["VLMProcessor"]
