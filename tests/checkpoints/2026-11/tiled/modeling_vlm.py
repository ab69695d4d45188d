"""The Duet model: any vision encoder, a projector, any causal language model.

`VLMModel` does four things in sight: embed the text, encode the images, put them in place, run the language model.
`VLMForConditionalGeneration` adds the language model's own head and the loss. Weights lie as in LLaVA
(`model.vision_tower`, `model.multi_modal_projector`, `model.language_model`, `lm_head`). The file travels with every
checkpoint, so it imports torch and transformers only.
"""

import copy
import os
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.processing_utils import Unpack
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import TransformersKwargs, can_return_tuple, torch_compilable_check
from transformers.utils.quantization_config import QuantizationConfigMixin

from .backbones_vlm import (
    BackboneKwargs,
    balance_loss,
    check_causal,
    check_decoder,
    check_logits,
    find_image_token_id,
    grow_embeddings,
    learned_positions,
    load_backbone_config,
    load_language_model,
    load_vision_tower,
    scale_logits,
    vision_config_of,
)
from .configuration_vlm import VLMConfig, kind_of
from .own_projector_vlm import find_own_projector, trusting
from .projector_vlm import Resampler, build_projector, select_features
from .vision_vlm import (
    VLMVisionPair,
    blank_image,
    build_vision_tower,
    forward_names,
    leave_out,
    leave_out_unused,
    run_tower,
)


@dataclass
class VLMModelOutputWithPast(BaseModelOutputWithPast):
    """
    Output of `VLMModel`.

    Args:
        image_hidden_states (`torch.Tensor` of shape `(image tokens, hidden)`, *optional*):
            The projected image features in the order in which they were put into the sequence.
        router_logits (`tuple(torch.Tensor)`, *optional*): those of each layer of a mixture of experts, where asked for.
    """

    image_hidden_states: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None


@dataclass
class VLMCausalLMOutputWithPast(ModelOutput):
    """
    Output of `VLMForConditionalGeneration`.

    Args:
        loss (`torch.Tensor`, *optional*, returned when `labels` is given):
            Next-token loss, the mean over the supervised tokens.
        logits (`torch.Tensor` of shape `(batch, tokens, vocab)`, or `(kept, vocab)` for a mask in `logits_to_keep`):
            Scores of every vocabulary entry before the softmax.
        past_key_values (`Cache`, *optional*): keys and values of the language model.
        hidden_states (`tuple(torch.Tensor)`, *optional*): the language model's, each `(batch, tokens, hidden)`.
        attentions (`tuple(torch.Tensor)`, *optional*): the language model's.
        image_hidden_states (`torch.Tensor` of shape `(image tokens, hidden)`, *optional*):
            The projected image features.
        aux_loss (`torch.Tensor`, *optional*): the load balancing loss of a mixture of experts, in `loss` by its weight.
        router_logits (`tuple(torch.Tensor)`, *optional*): those of each layer of a mixture of experts.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None


class VLMPreTrainedModel(PreTrainedModel):
    """Flags that both models share. They are optimistic: each backbone checks and refuses what it cannot do."""

    config_class = VLMConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(
        cls,
        *args,
        trust_remote_code: bool | None = None,
        quantization_config: QuantizationConfigMixin | dict | None = None,
        **kwargs,
    ) -> PreTrainedModel:
        """
        The library's, with care for two things.

        Args:
            trust_remote_code: whether a projector class that comes with the checkpoint may be run.
            quantization_config: where it does not say what is left whole, vision tower, projector and head are, and it
                is saved so; the library would quantise the first two.
        """
        if quantization_config is not None:
            quantization_config = _leave_out_image_parts(quantization_config)
        with trusting(trust_remote_code, **kwargs):
            return super().from_pretrained(*args, quantization_config=quantization_config, **kwargs)

    def initialize_weights(self):
        # The backbones by the library's own rule: in code that is not its own it passes over modules without tensors,
        # of which some set the buffers of their parts, that no checkpoint holds (Falcon-H1).
        for module in self.modules():
            if isinstance(module, PreTrainedModel) and not module.is_custom_code():
                module.initialize_weights()
        super().initialize_weights()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, Resampler):
            init.normal_(module.queries, std=0.02)
        elif isinstance(module, VLMModel) and module.image_newline is not None:
            init.normal_(module.image_newline, std=0.02)


def _leave_out_image_parts(quantization_config):
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
    quantization_config = copy.deepcopy(quantization_config)
    # Names are matched from their beginning, and each of the two classes may load what the other saved.
    parts = [f"{prefix}{part}" for prefix in ("", "model.") for part in ("vision_tower", "multi_modal_projector")]
    for field in ("llm_int8_skip_modules", "modules_to_not_convert"):  # bitsandbytes' word and that of the others
        if getattr(quantization_config, field, parts) is None:
            setattr(quantization_config, field, [*parts, "lm_head"])
    return quantization_config


class VLMModel(VLMPreTrainedModel):
    """
    Vision encoder, projector and headless language model.

    Args:
        config (`VLMConfig`): the composition.
        vision_tower (`PreTrainedModel`, *optional*): a loaded encoder; built from `config.vision_config` if missing.
        language_model (`PreTrainedModel`, *optional*): a loaded headless one; else from `config.text_config`.

    Raises:
        `ValueError`: the encoder cannot give the visual tokens that the config asks for.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        vision_tower: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        self.vision_tower = build_vision_tower(config.vision_config) if vision_tower is None else vision_tower
        self.language_model = AutoModel.from_config(config.text_config) if language_model is None else language_model
        # One config object per backbone, so that a setting made on either side is made on both.
        config.vision_config, config.text_config = self.vision_tower.config, self.language_model.config
        self._tower_takes = forward_names(self.vision_tower)
        self.max_positions = learned_positions(self.language_model)
        is_new = None in (config.vision_modules_left_out, config.num_prefix_tokens, config.image_seq_length)
        if is_new:
            self._fit_vision_tower()
        else:
            leave_out(self.vision_tower, config.vision_modules_left_out)
        self.multi_modal_projector = build_projector(
            config, config.vision_config.hidden_size, self.language_model.get_input_embeddings().embedding_dim
        )
        # What ends each row of views where images are tiled (LLaVA-NeXT's name for it).
        self.image_newline = None
        if config.max_tiles > 1:
            self.image_newline = nn.Parameter(torch.empty(self.language_model.get_input_embeddings().embedding_dim))
        if is_new:
            self._count_visual_tokens()
        most = config.image_tokens(config.max_tiles, 1)
        if self.max_positions is not None and most >= self.max_positions:
            raise ValueError(
                f"an image takes {'up to ' if config.max_tiles > 1 else ''}{most} positions, and the language model "
                f"({config.text_config.model_type}) has learned {self.max_positions}: no text would fit. Choose fewer "
                'visual tokens: a smaller image_size, projector_type="resampler", fewer max_tiles, or '
                'vision_feature_select_strategy="cls".'
            )
        self.post_init()

    @torch.no_grad()
    def _fit_vision_tower(self):
        """Find what the tower's features need, and its prefix tokens: a table of encoders would miss the next one."""
        config = self.config
        kind, (height, width) = kind_of(config.vision_config), config.image_size
        rows, columns = config.patch_grid
        image, training = blank_image(self.vision_tower, config.image_size, views=2), self.vision_tower.training
        self.vision_tower.eval()
        try:
            states = self.vision_hidden_states(image)[1]
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, AssertionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"the vision encoder ({kind}) cannot take images of {height}x{width} pixels: {reason} Expected an "
                "encoder of images such as ViT, CLIP, SigLIP or DINOv2, and an image_size that it can take."
            ) from error
        shape = tuple(states.shape) if isinstance(states, torch.Tensor) else ()
        if len(shape) != 3 or shape[0] != len(image) or shape[1] < rows * columns:
            raise ValueError(
                f"the vision encoder ({kind}) gives features of shape {shape or type(states).__name__} for "
                f"{len(image)} images of {rows}x{columns} patches; Duet needs one token per patch after the encoder's "
                "prefix tokens."
            )
        if not (states.is_meta or torch.equal(states, self.vision_hidden_states(image)[1])):
            raise ValueError(
                f"the vision encoder ({kind}) gives other features for the same image each time, as one that leaves "
                "out or shuffles patches at random does; choose one such as ViT, CLIP, SigLIP or DINOv2."
            )
        config.num_prefix_tokens = states.shape[1] - rows * columns
        if config.vision_feature_select_strategy == "cls" and config.num_prefix_tokens == 0:
            raise ValueError(
                f'vision_feature_select_strategy="cls" needs a CLS token, and this vision encoder ({kind}) has none; '
                'choose "patch".'
            )
        config.vision_modules_left_out = leave_out_unused(
            self.vision_tower, lambda: self.vision_hidden_states(image)[1]
        )
        self.vision_tower.train(training)

    @torch.no_grad()
    def _count_visual_tokens(self):
        """Find the tokens of a view by projecting two."""
        config, width = self.config, self.language_model.get_input_embeddings().embedding_dim
        states = self.vision_hidden_states(blank_image(self.vision_tower, config.image_size))[1]
        features = select_features(states, config.vision_feature_select_strategy, config.num_prefix_tokens)
        features = features.expand(2, -1, -1)
        try:
            projected = self.multi_modal_projector(features)
        except Exception as error:  # whatever a class of the user's own raises
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"the projector {config.projector_type} does not take features of shape {tuple(features.shape)} "
                f"(views, tokens, hidden): {reason}"
            ) from error
        if not isinstance(projected, torch.Tensor) or projected.ndim != 3 or projected.shape[::2] != (2, width):
            found = tuple(projected.shape) if isinstance(projected, torch.Tensor) else type(projected).__name__
            raise ValueError(
                f"the projector {config.projector_type} gives {found} for features of shape {tuple(features.shape)}; "
                f"expected (views, tokens, {width}), {width} being the width of the language model's embeddings."
            )
        if config.image_seq_length not in (None, projected.shape[1]):
            raise ValueError(
                f"the config has image_seq_length={config.image_seq_length}, and this vision encoder "
                f"({config.vision_config.model_type}) gives {projected.shape[1]} visual tokens; leave it out, it is "
                "found."
            )
        config.image_seq_length = projected.shape[1]

    def vision_hidden_states(self, pixel_values: torch.Tensor, **kwargs) -> tuple[ModelOutput, torch.Tensor]:
        """The tower's output, and its `(views, tokens, hidden)` states at the layer that the config names."""
        if self.config.vision_feature_layer is None:
            outputs = run_tower(self.vision_tower, self._tower_takes, pixel_values, **kwargs)
            return outputs, outputs.last_hidden_state
        # The tower ends at that layer; its last hidden state would have the final norm applied.
        kept = kwargs.get("output_hidden_states", self.vision_tower.config.output_hidden_states)
        kwargs["output_hidden_states"] = True
        outputs = run_tower(self.vision_tower, self._tower_takes, pixel_values, **kwargs)
        hidden_states = outputs.hidden_states[-1]
        if not kept:
            outputs = type(outputs)(**{name: value for name, value in outputs.items() if name != "hidden_states"})
        return outputs, hidden_states

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    def get_decoder(self) -> PreTrainedModel:
        return self.language_model

    def train(self, mode: bool = True):
        """Train, but keep backbones of which nothing learns in evaluation mode: dropout there would only be noise."""
        super().train(mode)
        for backbone in (self.vision_tower, self.language_model):
            if mode and not any(parameter.requires_grad for parameter in backbone.parameters()):
                backbone.eval()
        # Blocks are checkpointed in training mode only, and gradients pass through a frozen language model as well.
        for block in self.language_model.modules():
            if isinstance(block, GradientCheckpointingLayer) and block.gradient_checkpointing:
                block.training = mode
        return self

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, image_grids: torch.LongTensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """
        Encode and project images.

        Args:
            pixel_values (`torch.Tensor` of shape `(views, channels, height, width)`): processed images; of each the
                view of the whole, then its tiles row by row.
            image_grids (`torch.LongTensor` of shape `(images, 2)`, *optional*): rows and columns of each image's tiles,
                1 and 1 for an image that is not tiled, as they all are if not given.

        Returns:
            `BaseModelOutputWithPooling`: the vision encoder's output, `pooler_output` being the features in the
            language model's space: `(images, image_seq_length, hidden)`, or where images may be tiled a list with one
            `(tokens, hidden)` tensor an image.

        Raises:
            `ValueError`: grids and views disagree.
        """
        outputs, hidden_states = self.vision_hidden_states(pixel_values, **kwargs)
        features = select_features(
            hidden_states, self.config.vision_feature_select_strategy, self.config.num_prefix_tokens
        )
        views = self.multi_modal_projector(features)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=views if self.image_newline is None else self._join_views(views, image_grids),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )

    def _join_views(self, views, image_grids):
        """The tokens of each image: the view of the whole, then row by row its tiles, all rows ending in a newline."""
        grids = [(1, 1)] * len(views) if image_grids is None else image_grids.tolist()
        counts = views_of(grids)
        if sum(counts) != len(views):
            raise ValueError(
                f"image_grids name {sum(counts)} views of {len(grids)} images, and pixel_values hold {len(views)}; "
                "pass both as the processor gives them."
            )
        newline = self.image_newline.to(views.device, views.dtype).unsqueeze(0)
        images = []
        for (_, columns), of_image in zip(grids, views.split(counts)):
            rows = [of_image[:1], *of_image[1:].split(columns)] if len(of_image) > 1 else [of_image]
            images.append(torch.cat([part for row in rows for part in (row.flatten(0, 1), newline)]))
        return images

    def image_positions(self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """Where image tokens are, as a `(batch, tokens)` mask; without ids they are told by their embedding."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        image_id = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(image_id)).all(-1)

    def get_placeholder_mask(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor, image_features: torch.Tensor
    ) -> torch.Tensor:
        """
        Where image features go, as a `(batch, tokens, 1)` mask.

        Raises:
            `ValueError`: the number of image tokens is not the number of features.
        """
        mask = self.image_positions(input_ids, inputs_embeds)
        tokens, features = mask.sum(), image_features.shape[0]
        torch_compilable_check(
            tokens == features,
            # Not formed before it is needed: a compiled graph would be one for this number of features.
            lambda: (
                f"Image features and image tokens do not match, tokens: {tokens}, features: {features}. Each view of "
                f"an image needs {self.config.image_seq_length} image tokens; the processor saved with the model "
                "places them."
            ),
        )
        return mask.unsqueeze(-1)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_grids: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VLMModelOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, tokens)`): ids, with an image token for each feature.
            pixel_values (`torch.Tensor` of shape `(views, channels, height, width)`): every image of the batch, in
                the order of their tokens; see `get_image_features` for tiled ones.
            attention_mask (`torch.Tensor` of shape `(batch, past + tokens)`): 0 on padding.
            position_ids (`torch.LongTensor` of shape `(batch, tokens)`): positions in the language model.
            past_key_values (`Cache`): keys and values of the tokens before these.
            inputs_embeds (`torch.Tensor` of shape `(batch, tokens, hidden)`): instead of `input_ids`.
            image_grids (`torch.LongTensor` of shape `(images, 2)`): rows and columns of each image's tiles.
            mm_encoder_outputs (`dict`): output of `get_image_features` under `"image"`, instead of `pixel_values`.

        Raises:
            `ValueError`: image tokens and features disagree (in training also where no image is given at all), or the
                sequence is longer than learned positions reach.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if pixel_values is not None and mm_encoder_outputs is not None:
            raise ValueError("You cannot specify both pixel_values and mm_encoder_outputs at the same time")

        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if self.max_positions is not None:
            self._check_positions(inputs_embeds.shape[1], position_ids, past_key_values)

        image_outputs = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None:
            image_outputs = self.get_image_features(pixel_values, image_grids, return_dict=True)
        image_features = None
        if image_outputs is not None:
            image_features = _in_one_row(image_outputs.pooler_output).to(inputs_embeds.device, inputs_embeds.dtype)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_features)
            inputs_embeds = inputs_embeds.masked_scatter(mask, image_features)
        elif input_ids is not None and self.training:
            # Not in evaluation, where a model that assists another is given the ids of a prompt without its images.
            self.get_placeholder_mask(input_ids, inputs_embeds, inputs_embeds.new_empty(0))

        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            return_dict=True,
            **kwargs,
        )
        return VLMModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
            router_logits=getattr(outputs, "router_logits", None),
        )

    def _check_positions(self, tokens, position_ids, past_key_values):
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if not isinstance(past, int) or past + tokens <= self.max_positions:
            return
        # Padding on the left takes no position: only the positions themselves tell then.
        positions = past + tokens if position_ids is None else int(position_ids.max()) + 1
        if positions > self.max_positions:
            raise ValueError(
                f"the sequence has {positions} positions (image tokens included) and the language model "
                f"({self.config.text_config.model_type}) has learned {self.max_positions}; shorten the text, or set a "
                "smaller max_length in training and max_new_tokens in generation."
            )


class VLMForConditionalGeneration(VLMPreTrainedModel, GenerationMixin):
    """
    `VLMModel` with the language model's own head: the class that trains and generates.

    Args:
        config (`VLMConfig`): the composition.
        vision_tower (`PreTrainedModel`, *optional*): a loaded encoder; built from the config if missing.
        causal_lm (`PreTrainedModel`, *optional*): a loaded causal language model, of which base and head are taken.

    Raises:
        `ValueError`: the language model's head is not one linear layer, or the backbones do not fit together.
    """

    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(
        self,
        config: PreTrainedConfig,
        vision_tower: PreTrainedModel | None = None,
        causal_lm: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        # The whole causal model is built so that its head is what it is there: bias or none, any name, any size.
        if causal_lm is None:
            config.text_config.tie_word_embeddings = config.tie_word_embeddings
            causal_lm = AutoModelForCausalLM.from_config(config.text_config)
        self.model = VLMModel(config, vision_tower, causal_lm.base_model)
        self.lm_head = causal_lm.get_output_embeddings()
        if not isinstance(self.lm_head, nn.Linear):
            raise ValueError(
                f"the language model ({config.text_config.model_type}) ends in {type(self.lm_head).__name__}; Duet "
                "needs one whose head is a single linear layer over the vocabulary."
            )
        embeddings = self.get_input_embeddings()
        name = next(name for name, module in self.model.language_model.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"model.language_model.{name}.weight"}
        self.post_init()

    @classmethod
    def from_backbones(
        cls,
        vision: str | PreTrainedConfig | tuple[str | PreTrainedConfig, str | PreTrainedConfig],
        text: str | PreTrainedConfig,
        *,
        tokenizer=None,
        image_token: str = "<image>",
        projector_type: str | type[nn.Module] = "mlp",
        projector_settings: dict[str, int] | None = None,
        vision_feature_select_strategy: str = "patch",
        vision_feature_layer: int | None = None,
        image_size: int | tuple[int, int] | None = None,
        max_tiles: int = 1,
        dtype: torch.dtype = torch.float32,
        vision_kwargs: BackboneKwargs | None = None,
        text_kwargs: BackboneKwargs | None = None,
    ) -> "VLMForConditionalGeneration":
        """
        Compose a model from two backbones, try it on one image, and say in one line what was found.

        Args:
            vision (`str`, `PreTrainedConfig`, or two of them):
                Hub name or folder of a pretrained vision encoder (of a composite checkpoint such as CLIP or SigLIP its
                vision half), or a config to start from scratch. Two stand side by side, see `VLMVisionPair`.
            text (`str` or `PreTrainedConfig`): the same for the causal language model.
            tokenizer (`str` or tokenizer, *optional*, defaults to that of `text`):
                The language model's tokenizer, from which the image token's id follows.
            image_token (`str`): the image token; added to the vocabulary where the tokenizer does not have it.
            projector_type (`str` or a class): a projector's name, or a class of one's own: itself, or
                `"path/FILE.py:CLASS"`. Its file goes into every checkpoint.
            projector_settings, vision_feature_select_strategy, vision_feature_layer, image_size, max_tiles: see
                `VLMConfig`.
            dtype (`torch.dtype`): of every weight; parameters that train want float32.
            vision_kwargs, text_kwargs (`dict`, *optional*):
                `revision`, `token`, `trust_remote_code`, `attn_implementation` and the like, for each side.

        Raises:
            `ValueError`: a backbone cannot be loaded or used, with its name and the reason.
        """
        vision_kwargs, text_kwargs = dict(vision_kwargs or {}), dict(text_kwargs or {})
        if "quantization_config" in vision_kwargs | text_kwargs:
            raise ValueError(
                "backbones are composed whole; save the composed model and load it with quantization_config."
            )
        encoders = tuple(vision) if isinstance(vision, (list, tuple)) else (vision,)
        if len(encoders) not in (1, 2):
            raise ValueError(f"{len(encoders)} vision encoders were given; expected one, or two side by side.")
        vision_config = vision_config_of(encoders, vision_kwargs)
        text_config = load_backbone_config("language model", text, text_kwargs)
        check_causal(text_config)
        projector_type, projector_file = find_own_projector(projector_type)
        config = VLMConfig(
            vision_config=vision_config,
            text_config=text_config,
            projector_type=projector_type,
            projector_settings=projector_settings,
            vision_feature_select_strategy=vision_feature_select_strategy,
            vision_feature_layer=vision_feature_layer,
            image_size=image_size,
            max_tiles=max_tiles,
            image_token_id=find_image_token_id(text if tokenizer is None else tokenizer, image_token, text_kwargs),
        )
        config._projector_file, config.dtype = projector_file, dtype
        configs = getattr(config.vision_config, "encoders", (config.vision_config,))
        towers = [load_vision_tower(*pair, dtype, vision_kwargs) for pair in zip(encoders, configs)]
        causal_lm = load_language_model(text, config.text_config, dtype, text_kwargs)
        check_decoder(causal_lm)
        generation_config = causal_lm.generation_config
        default_dtype = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # the projector is born here, in the precision of the backbones
        try:
            tower = towers[0] if len(towers) == 1 else VLMVisionPair(config.vision_config, *towers)
            model = cls(config, tower, causal_lm)
        finally:
            torch.set_default_dtype(default_dtype)
        check_logits(model, causal_lm)
        grow_embeddings(model, config.image_token_id)
        generation_config.suppress_tokens = sorted({*(generation_config.suppress_tokens or []), config.image_token_id})
        model.generation_config = generation_config
        description = model.eval().describe()
        if os.environ.get("RANK", "0") == "0":  # tried in every process, said in one
            print(description)
        return model

    @torch.no_grad()
    def describe(self) -> str:
        """
        Run one image through the model, and say in one line what it is made of.

        Raises:
            `ValueError`: what comes out is not finite.
        """
        config = self.config
        image = blank_image(self.model.vision_tower, config.image_size)
        ids = torch.full((1, config.image_tokens() + 1), config.image_token_id, device=self.device)
        ids[0, -1] = 0
        logits = self(input_ids=ids, pixel_values=image).logits
        if not logits.isfinite().all():
            raise ValueError("the composed model gives infinite or undefined logits for an image; use another dtype.")

        def part(module):
            dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in module.parameters()}
            number = sum(parameter.numel() for parameter in module.parameters())
            return ", ".join([f"{number:,} parameters", *sorted(dtypes)])

        height, width = config.image_size
        rows, columns = config.patch_grid
        tiles = f", up to {config.max_tiles} tiles more" if config.max_tiles > 1 else ""
        return (
            f"{kind_of(config.vision_config)} ({height}x{width} pixels, {rows}x{columns} patches after "
            f"{config.num_prefix_tokens} prefix tokens, {config.vision_config.hidden_size} wide; "
            f"{part(self.model.vision_tower)}) -> {config.projector_type} ({config.image_seq_length} tokens an "
            f"image{tiles}; {part(self.model.multi_modal_projector)}) -> {config.text_config.model_type} "
            f"({self.get_input_embeddings().embedding_dim} wide, {logits.shape[-1]} entries, "
            f"{self.model.max_positions or 'any number of'} positions; {part(self.model.language_model)})"
        )

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module):
        self.lm_head = value

    def get_decoder(self) -> PreTrainedModel:
        return self.model.get_decoder()

    def get_image_features(
        self, pixel_values: torch.Tensor, image_grids: torch.LongTensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """See `VLMModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, image_grids, **kwargs)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs):
        # Beams and samples repeat each prompt, and a prompt may have any number of images: they go with their prompt.
        pixel_values, grids = kwargs.get("pixel_values"), kwargs.get("image_grids")
        embeds, encoded = kwargs.get("inputs_embeds"), (kwargs.get("mm_encoder_outputs") or {}).get("image")
        if encoded is not None and expand_size > 1:  # the library would drop features that no prompt has a place for
            ids = input_ids if embeds is None else None
            self.model.get_placeholder_mask(ids, embeds, _in_one_row(encoded.pooler_output))
        elif encoded is None and pixel_values is None and embeds is None and kwargs.get("past_key_values") is None:
            self.model.get_placeholder_mask(input_ids, None, input_ids.new_empty(0))  # a prompt without its images
        images_of, views_in = None, None
        if pixel_values is not None and (input_ids is not None or embeds is not None):
            shapes = [(1, 1)] * len(pixel_values) if grids is None else grids.tolist()
            tokens = torch.tensor([self.config.image_tokens(*shape) for shape in shapes]).cumsum(0)
            positions = self.model.image_positions(input_ids if embeds is None else None, embeds)
            of_prompts = positions.sum(1).cumsum(0).cpu()
            ends = torch.searchsorted(tokens, of_prompts, right=True)
            if tokens[-1] == of_prompts[-1]:
                images_of = ends.diff(prepend=ends.new_zeros(1)).tolist()
                views_in = [sum(group) for group in _split(views_of(shapes), images_of)]
                del kwargs["pixel_values"]
                kwargs.pop("image_grids", None)
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        if images_of is not None:
            kwargs["pixel_values"] = _repeated(pixel_values, views_in, expand_size)
            if grids is not None:
                kwargs["image_grids"] = _repeated(grids, images_of, expand_size)
        return input_ids, kwargs

    def _zero_of_image_parts(self) -> torch.Tensor | float:
        """A 0 that all parameters which only an image reaches have a gradient of: every process waits for theirs."""
        modules = (self.model.vision_tower, self.model.multi_modal_projector)
        parameters = [parameter for module in modules for parameter in module.parameters()]
        if self.model.image_newline is not None:
            parameters.append(self.model.image_newline)
        return 0.0 * sum(parameter.sum() for parameter in parameters if parameter.requires_grad)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        loss_weights: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        image_grids: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VLMCausalLMOutputWithPast:
        """
        Args (those of `VLMModel.forward`, and):
            labels (`torch.LongTensor` of shape `(batch, tokens)`):
                The token at each position, or -100 where nothing is learned; the model shifts them. The loss is
                `-sum_i 1[y_i supervised] log F(y_i | y_<i, Z)` over their number.
            loss_weights (`torch.Tensor` of shape `(batch, tokens)`):
                What each label's term of that sum is multiplied by, 1 if not given. The number stays that of labels.
            logits_to_keep (`int` or `torch.Tensor`):
                Positions that the head is computed for: 0 all, `n` the last n, a 1-D tensor of positions, or a bool
                mask `(batch, tokens)` (then logits are `(kept, vocab)`). The loss is that of the kept positions.
            num_items_in_batch (`torch.Tensor` or `int`):
                Supervised tokens of the whole optimiser step, by which `Trainer` has the sum divided.
            shift_labels (`torch.LongTensor` of shape `(batch, tokens)`, one of the `kwargs`):
                The token after each position, in place of `labels`: what one shard of a long sequence learns from.
        """
        # Not in the signature, where `Trainer` would take it for a label that every batch has.
        shift_labels = kwargs.pop("shift_labels", None)
        if shift_labels is None and labels is not None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
        if use_cache is None and (self.training or shift_labels is not None):
            use_cache = False  # a cache has no reader in training, and would switch off packed attention masks
        text_config = self.config.text_config
        if getattr(text_config, "output_router_logits", False):  # a headless model does not look for this itself
            kwargs.setdefault("output_router_logits", True)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            image_grids=image_grids,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(_keep_positions(outputs.last_hidden_state, logits_to_keep))
        logits = scale_logits(logits, self.config.text_config)

        loss = None
        if shift_labels is not None:
            targets = _keep_positions(shift_labels.unsqueeze(-1), logits_to_keep).squeeze(-1)
            supervised = (targets != -100).sum()
            if num_items_in_batch is None:
                num_items_in_batch = supervised
            # A batch without a supervised token has loss 0 with a graph, not 0/0.
            num_items_in_batch = torch.as_tensor(num_items_in_batch, device=logits.device).clamp(min=1)
            if loss_weights is None:
                loss = self.loss_function(
                    logits,
                    labels=None,
                    vocab_size=logits.shape[-1],
                    shift_labels=targets.contiguous(),
                    num_items_in_batch=num_items_in_batch,
                )
            else:
                weights = nn.functional.pad(loss_weights, (0, 1))[..., 1:]
                weights = _keep_positions(weights.unsqueeze(-1), logits_to_keep).flatten()
                losses = nn.functional.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="none")
                loss = (losses * weights).sum() / num_items_in_batch
            if self.training and outputs.image_hidden_states is None:
                loss = loss + self._zero_of_image_parts()
        aux_loss = None
        if outputs.router_logits:
            aux_loss = balance_loss(outputs.router_logits, text_config, attention_mask)
            if loss is not None:  # by this batch's share of the optimiser step, as the tokens are
                loss = loss + text_config.router_aux_loss_coef * aux_loss * supervised / num_items_in_batch
        return VLMCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            aux_loss=aux_loss,
            router_logits=outputs.router_logits,
        )


def _in_one_row(features: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    """`pooler_output` as `(image tokens, hidden)`."""
    return features.flatten(0, 1) if isinstance(features, torch.Tensor) else torch.cat(features)


def views_of(grids: list[tuple[int, int]]) -> list[int]:
    """How many views each image has that is cut into `rows` x `columns` tiles: the whole and, if several, the tiles."""
    return [1 + (rows * columns if rows * columns > 1 else 0) for rows, columns in grids]


def _split(values, lengths):
    """A list as lists of these lengths."""
    values = iter(values)
    return [[next(values) for _ in range(length)] for length in lengths]


def _repeated(values: torch.Tensor, lengths: list[int], times: int) -> torch.Tensor:
    """Each group of these lengths as many times, group by group."""
    return torch.cat([group for group in values.split(lengths) for _ in range(times)])


def _keep_positions(states: torch.Tensor, keep: int | torch.Tensor) -> torch.Tensor:
    """`(batch, tokens, dim)` at the positions that `logits_to_keep` names; a bool mask gives `(kept, dim)`."""
    if isinstance(keep, torch.Tensor) and keep.dtype == torch.bool and keep.ndim == 2:
        return states[keep]
    return states[:, slice(-keep, None) if isinstance(keep, int) else keep]


__all__ = ["VLMPreTrainedModel", "VLMModel", "VLMForConditionalGeneration"]
