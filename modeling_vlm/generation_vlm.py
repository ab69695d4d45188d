"""Generation: beams and samples repeat each prompt, and its images go with it; settings are such as can be saved.

The library repeats every input row by row, and a prompt may have any number of images, each of any number of views. It
refuses to save settings that contradict each other, as language models ship them (a temperature and no `do_sample`).
The file travels with every checkpoint.
"""

import functools

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .attention_vlm import attend_as_chosen
from .backbones_vlm import CACHE
from .views_vlm import grids_of_images, in_one_row, views_of


class VLMGenerationMixin(GenerationMixin):
    """The library's generation for a composed model, whose images are flat over the batch."""

    def generate(self, *args, **kwargs):
        """See `GenerationMixin.generate`; after training on rows of many texts, with the attention that was chosen."""
        attend_as_chosen(self.model.language_model)
        return super().generate(*args, **kwargs)

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # from whose signature the library reads much
    def prepare_inputs_for_generation(self, *args, **kwargs):
        if not kwargs.get("is_first_iteration", False) and kwargs.get("use_cache", True):
            # They are the prompt's, and transformers 5.17 gives them with every token.
            kwargs.pop("mm_encoder_outputs", None)
        return super().prepare_inputs_for_generation(*args, **kwargs)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs):
        pixel_values, grids = kwargs.get("pixel_values"), kwargs.get("image_grids")
        embeds, encoded = kwargs.get("inputs_embeds"), (kwargs.get("mm_encoder_outputs") or {}).get("image")
        ids = input_ids if embeds is None else None
        if encoded is not None and expand_size > 1:  # the library would drop features that no prompt has a place for
            self.model.get_placeholder_mask(ids, embeds, in_one_row(encoded.pooler_output))
        elif encoded is None and pixel_values is None and embeds is None and kwargs.get(CACHE) is None:
            self.model.get_placeholder_mask(input_ids, None, input_ids.new_empty(0))  # a prompt without its images
        repeated = {}
        if expand_size > 1 and encoded is not None:
            features = list(encoded.pooler_output)
            images_of = self._images_of_prompts([len(image) for image in features], ids, embeds)
            groups = [group for group in _split(features, images_of) for _ in range(expand_size)]
            pooler_output = [image for group in groups for image in group]
            repeated["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=pooler_output)}
            del kwargs["mm_encoder_outputs"]
        elif pixel_values is not None and (input_ids is not None or embeds is not None):
            shapes = grids_of_images(grids, len(pixel_values))
            images_of = self._images_of_prompts([self.config.tile_tokens(*shape) for shape in shapes], ids, embeds)
            if images_of is not None:
                views_in = [sum(group) for group in _split(views_of(shapes), images_of)]
                repeated["pixel_values"] = _repeated(kwargs.pop("pixel_values"), views_in, expand_size)
                if kwargs.pop("image_grids", None) is not None:
                    repeated["image_grids"] = _repeated(grids.new_tensor(shapes), images_of, expand_size)
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return input_ids, {**kwargs, **repeated}

    def _images_of_prompts(self, tokens, ids, embeds) -> list[int] | None:
        """How many of the images, of so many tokens each, each prompt has; `None` where they are not the prompts'."""
        ends = torch.tensor(tokens).cumsum(0)
        of_prompts = self.model.image_positions(ids, embeds).sum(1).cumsum(0).cpu()
        if ends[-1] != of_prompts[-1]:
            return None
        images = torch.searchsorted(ends, of_prompts, right=True)
        return images.diff(prepend=images.new_zeros(1)).tolist()


def savable(config: GenerationConfig) -> tuple[GenerationConfig, list[str]]:
    """
    Settings that the library agrees to save, and the names of those that had to be left out.

    A temperature or the like without a word about `do_sample` means to sample; beside `do_sample=False` it is left out.
    """
    given = {name: value for name, value in vars(config).items() if value is not None and not name.startswith("_")}
    if "do_sample" not in given and not _agrees(given) and _agrees({**given, "do_sample": True}):
        given["do_sample"] = True
    kept = {name: given[name] for name in ("do_sample", "num_beams") if name in given}  # that others depend on
    for name, value in given.items():
        if _agrees({**kept, name: value}):
            kept[name] = value
    return _config_of(kept), [name for name in given if name not in kept]


def _config_of(settings):
    config = GenerationConfig()
    vars(config).update(settings)  # its constructor would speak of each contradiction
    return config


def _agrees(settings):
    try:
        config = _config_of(settings)
        config.validate(strict=True)
        config.to_json_string()
    except (ValueError, TypeError, AttributeError):  # a value, its type, a mapping in place of an object
        return False
    return True


def _split(values, lengths):
    """A list as lists of these lengths."""
    values = iter(values)
    return [[next(values) for _ in range(length)] for length in lengths]


def _repeated(values: torch.Tensor, lengths: list[int], times: int) -> torch.Tensor:
    """Each group of these lengths as many times, group by group."""
    return torch.cat([group for group in values.split(lengths) for _ in range(times)])


__all__ = ["VLMGenerationMixin", "savable"]
