"""The Duet model: any vision encoder, a projector, any causal language model.

`VLMModel` does four things in sight: embed the text, encode the images, put them in place, run the language model.
`VLMForConditionalGeneration` adds the language model's own head and the loss. Weights lie as in LLaVA
(`model.vision_tower`, `model.multi_modal_projector`, `model.language_model`, `lm_head`). The file travels with every
checkpoint, so it imports torch and transformers only.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.utils import can_return_tuple, logging, torch_compilable_check

from .attention_vlm import Segment, attending, readers_of, row_of
from .backbones_vlm import CACHE, BackboneKwargs, learned_positions, scale_logits
from .compose_vlm import check_positions, check_room, compose, count_visual_tokens, fit_vision_tower
from .generation_vlm import VLMGenerationMixin, savable
from .loss_vlm import IGNORE, balance_loss, keep_positions, loss_in_parts, mean_loss, targets_of, zero_of
from .model_error_vlm import DuetError
from .native_vlm import NativeForm, native_form, native_weights
from .outputs_vlm import VLMCausalLMOutputWithPast, VLMModelOutputWithPast
from .pretrained_vlm import VLMPreTrainedModel
from .projector_vlm import build_projector, select_features
from .views_vlm import in_one_row, join_views, put_in_place
from .vision_vlm import (
    blank_image,
    build_vision_tower,
    forward_names,
    leave_out,
    run_tower,
    runs_in_step,
)


logger = logging.get_logger(__name__)

_ENGINES = ("vllm", "vllm_mla", "sglang")
"""Names that inference engines give their attention, before they build a model."""


class VLMModel(VLMPreTrainedModel):
    """
    Vision encoder, projector and headless language model.

    Args:
        config (`VLMConfig`): the composition.
        vision_tower (`PreTrainedModel`, *optional*): a loaded encoder; built from `config.vision_config` if missing.
        language_model (`PreTrainedModel`, *optional*): a loaded headless one; else from `config.text_config`.

    Raises:
        `DuetError`: the encoder cannot give the visual tokens that the config asks for.
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
        self.cached_shape: tuple[int, ...] | None = None  # of a view's features, where the tower is not run
        self.max_positions = learned_positions(self.language_model)
        is_new = None in (config.vision_modules_left_out, config.num_prefix_tokens, config.image_seq_length)
        if is_new:
            fit_vision_tower(self)
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
            count_visual_tokens(self)
        check_room(config, self.max_positions)
        self.post_init()

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
            if not isinstance(block, PreTrainedModel) and getattr(block, "gradient_checkpointing", False):
                block.training = mode
        return self

    def encode_views(self, pixel_values: torch.Tensor, **kwargs) -> tuple[ModelOutput, torch.Tensor]:
        """The tower's output, and what the projector reads of it: `(views, tokens, width)`."""
        outputs, hidden_states = self.vision_hidden_states(pixel_values, **kwargs)
        strategy, prefix = self.config.vision_feature_select_strategy, self.config.num_prefix_tokens
        return outputs, select_features(hidden_states, strategy, prefix)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        image_grids: torch.LongTensor | None = None,
        vision_features: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """
        Encode and project images.

        Args:
            pixel_values (`torch.Tensor` of shape `(views, channels, height, width)`): processed images; of each the
                view of the whole, then its tiles row by row.
            image_grids (`torch.LongTensor` of shape `(images, 2)`, *optional*): rows and columns of each image's tiles,
                1 and 1 for an image that is not tiled, as they all are if not given; of shape `(views, 2)`, of each
                view those of its image, is read too.
            vision_features (`torch.Tensor` of shape `(views, tokens, width)`, *optional*): what `encode_views` gave for
                the pixels, instead of them; the tower is not run.

        Returns:
            `BaseModelOutputWithPooling`: the vision encoder's output, where it was run; `pooler_output` being the
            features in the language model's space: `(images, image_seq_length, hidden)`, or where images may be tiled a
            list with one `(tokens, hidden)` tensor an image.

        Raises:
            `DuetError`: grids and views disagree, or both pixels and features are given, or neither.
        """
        if (pixel_values is None) == (vision_features is None):
            raise DuetError("You must specify exactly one of pixel_values or vision_features")
        outputs: ModelOutput = BaseModelOutputWithPooling()
        if vision_features is None:
            outputs, vision_features = self.encode_views(pixel_values, **kwargs)
        views, newline = self.multi_modal_projector(vision_features), self.image_newline
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.get("last_hidden_state"),
            pooler_output=views if newline is None else join_views(views, newline, image_grids),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )

    def has_to_see(self) -> bool:
        """Whether every process has to see an image in each step, because all have to run the same modules."""
        return runs_in_step(self.vision_tower) or runs_in_step(self.multi_modal_projector)

    def _blank_features(self) -> torch.Tensor:
        """What comes of an image that shows nothing, `(tokens, hidden)`."""
        if self.cached_shape is None:
            seen = {"pixel_values": blank_image(self.vision_tower, self.config.image_size)}
        else:
            seen = {"vision_features": torch.zeros(1, *self.cached_shape, device=self.device, dtype=self.dtype)}
        return in_one_row(self.get_image_features(**seen, return_dict=True).pooler_output)

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
        inputs_embeds: torch.Tensor | None = None,
        image_grids: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        vision_features: torch.Tensor | None = None,
        feature_index: torch.LongTensor | None = None,
        segments: Sequence[Segment] | None = None,
        see_blank: bool = False,
        **kwargs,
    ) -> VLMModelOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, tokens)`): ids, with an image token for each feature.
            pixel_values (`torch.Tensor` of shape `(views, channels, height, width)`): every image of the batch, in
                the order of their tokens; see `get_image_features` for tiled ones.
            attention_mask (`torch.Tensor` of shape `(batch, past + tokens)`): 0 on padding.
            position_ids (`torch.LongTensor` of shape `(batch, tokens)`): positions in the language model.
            inputs_embeds (`torch.Tensor` of shape `(batch, tokens, hidden)`): instead of `input_ids`.
            image_grids (`torch.LongTensor` of shape `(images, 2)`): rows and columns of each image's tiles.
            mm_encoder_outputs (`dict`): output of `get_image_features` under `"image"`, instead of `pixel_values`.
            vision_features (`torch.Tensor` of shape `(views, tokens, width)`): what the projector reads of the images,
                instead of `pixel_values`; see `encode_views`.
            feature_index (`torch.LongTensor` of shape `(batch, tokens)`): which feature of the batch stands at each
                position, -1 where a token does; where features do not stand in the order of their tokens, each once.
            segments (`list` of `(start, end, parent, text)`): of one row of many texts, who sees whom: positions
                [start, end) see those of the segment numbered `parent`, of its parent and so on, and themselves.
                Positions in the language model go on after the parent's. See `attention_vlm`.
            see_blank (`bool`): where no image is given, run a blank one that counts 0 times if all processes have to
                run the same modules (`has_to_see`); a model that trains does so in any case.
            **kwargs: for the language model, the cache of the tokens before these among them, under the name that the
                library has for it (`cache`, before transformers 5.24 `past_key_values`).

        Raises:
            `ValueError`: image tokens and features disagree, in training also where no image is given at all.
            `DuetError`: the sequence is longer than learned positions reach, something is given twice or not at all, or
                segments come with several rows, a mask or a cache.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise DuetError("You must specify exactly one of input_ids or inputs_embeds")
        images = {
            "pixel_values": pixel_values, "vision_features": vision_features, "mm_encoder_outputs": mm_encoder_outputs
        }  # fmt: skip
        if len(given := [name for name, value in images.items() if value is not None]) > 1:
            raise DuetError(f"You cannot specify both {' and '.join(given)} at the same time")

        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        row = None
        if segments is not None:
            cache = kwargs.get("use_cache") or kwargs.get(CACHE)
            attentions = kwargs.get("output_attentions", self.language_model.config.output_attentions)
            beside = {"attention_mask": attention_mask, "a cache": cache, "attentions": attentions}
            row = row_of(segments, inputs_embeds, beside)
            kwargs["use_cache"] = False
        if self.max_positions is not None:
            longest = inputs_embeds.shape[1] if row is None else row.longest
            check_positions(self, longest, position_ids, kwargs.get(CACHE))

        image_outputs = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None or vision_features is not None:
            image_outputs = self.get_image_features(pixel_values, image_grids, vision_features, return_dict=True)
        elif image_outputs is None and (self.training or see_blank) and self.has_to_see():
            inputs_embeds = inputs_embeds + 0 * self._blank_features().sum().to(
                inputs_embeds.device, inputs_embeds.dtype
            )
        image_features = None
        if image_outputs is not None:
            image_features = in_one_row(image_outputs.pooler_output).to(inputs_embeds.device, inputs_embeds.dtype)
        if feature_index is not None:
            positions = self.image_positions(input_ids, inputs_embeds)
            inputs_embeds = put_in_place(inputs_embeds, positions, image_features, feature_index)
        elif image_features is not None:
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_features)
            inputs_embeds = inputs_embeds.masked_scatter(mask, image_features)
        elif input_ids is not None and self.training:
            # Not in evaluation, where a model that assists another is given the ids of a prompt without its images.
            self.get_placeholder_mask(input_ids, inputs_embeds, inputs_embeds.new_empty(0))

        if row is not None and position_ids is None:
            position_ids = row.position.unsqueeze(0)
        with (
            nullcontext(attention_mask)
            if row is None
            else attending(self.language_model, row, inputs_embeds.dtype) as mask
        ):
            outputs = self.language_model(
                inputs_embeds=inputs_embeds,
                attention_mask=mask,
                position_ids=position_ids,
                return_dict=True,
                **kwargs,
            )
        return VLMModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            image_hidden_states=image_features,
            image_outputs=image_outputs,
            router_logits=getattr(outputs, "router_logits", None),
            **{CACHE: outputs.get(CACHE)},
        )


class VLMForConditionalGeneration(VLMPreTrainedModel, VLMGenerationMixin):
    """
    `VLMModel` with the language model's own head: the class that trains and generates.

    Args:
        config (`VLMConfig`): the composition.
        vision_tower (`PreTrainedModel`, *optional*): a loaded encoder; built from the config if missing.
        causal_lm (`PreTrainedModel`, *optional*): a loaded causal language model, of which base and head are taken.

    Raises:
        `DuetError`: the language model's head is not one linear layer, or the backbones do not fit together.
    """

    _tp_plan = {"lm_head": "colwise_gather_output"}

    @classmethod
    def _from_config(cls, config: PreTrainedConfig, **kwargs) -> PreTrainedModel:
        # What `AutoModel.from_config` calls. An engine has a head of its own, and takes what comes first for states.
        if config.get_text_config()._attn_implementation in _ENGINES:
            return VLMModel._from_config(config, **kwargs)
        return super()._from_config(config, **kwargs)

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
            raise DuetError(
                f"the language model ({config.text_config.model_type}) ends in {type(self.lm_head).__name__}; Duet "
                "needs one whose head is a single linear layer over the vocabulary."
            )
        embeddings = self.get_input_embeddings()
        name = next(name for name, module in self.model.language_model.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"model.language_model.{name}.weight"}
        self.post_init()
        if config.tie_word_embeddings and f"model.language_model.{name}" not in self.tp_plan:
            self.tp_plan.pop("lm_head", None)  # one tensor is cut over devices in both its places, or in none

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
            dtype (`torch.dtype`): that of every weight; parameters that train want float32.
            vision_kwargs, text_kwargs (`dict`, *optional*):
                `revision`, `token`, `trust_remote_code`, `attn_implementation` and the like, for each side.

        Raises:
            `DuetError`: a backbone cannot be loaded or used, with its name and the reason.
        """
        return compose(
            cls,
            vision,
            text,
            dtype,
            dict(vision_kwargs or {}),
            dict(text_kwargs or {}),
            tokenizer=tokenizer,
            image_token=image_token,
            projector_type=projector_type,
            projector_settings=projector_settings,
            vision_feature_select_strategy=vision_feature_select_strategy,
            vision_feature_layer=vision_feature_layer,
            image_size=image_size,
            max_tiles=max_tiles,
        )

    def native_form(self) -> NativeForm:
        """See `native_form`: this model as one that the library has a class for; `DuetError` where there is none."""
        return native_form(self)

    def native_weights(self, form: NativeForm) -> dict[str, torch.Tensor]:
        """This model's weights under the names that they have in its native form."""
        return native_weights(self, form)

    def save_pretrained(self, *args, **kwargs):
        """See `PreTrainedModel.save_pretrained`; settings of generation never stand between weights and the disk."""
        self.generation_config, left_out = savable(self.generation_config)
        if left_out:
            logger.warning(f"left out of generation_config.json, as the library refuses them: {', '.join(left_out)}.")
        super().save_pretrained(*args, **kwargs)

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
        self,
        pixel_values: torch.Tensor | None = None,
        image_grids: torch.LongTensor | None = None,
        vision_features: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """See `VLMModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, image_grids, vision_features, **kwargs)

    def _image_parameters(self) -> list[nn.Parameter]:
        """All that only an image reaches."""
        modules = (self.model.vision_tower, self.model.multi_modal_projector)
        parameters = [parameter for module in modules for parameter in module.parameters()]
        newline = self.model.image_newline
        return parameters if newline is None else [*parameters, newline]

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        loss_weights: torch.Tensor | None = None,
        smoothing: float = 0.0,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        image_grids: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        vision_features: torch.Tensor | None = None,
        feature_index: torch.LongTensor | None = None,
        segments: Sequence[Segment] | None = None,
        skip_logits: bool | None = None,
        **kwargs,
    ) -> VLMCausalLMOutputWithPast:
        """
        Args (those of `VLMModel.forward`, and):
            labels (`torch.LongTensor` of shape `(batch, tokens)`):
                The token at each position, or -100 where nothing is learned. The loss is
                `-sum_i 1[y_i supervised] log F(y_i | y_<i, Z)` over their number.
            shift_labels (`torch.LongTensor` of shape `(batch, tokens)`, one of the `kwargs`):
                The token that each position predicts, or -100; as the collator gives them, or what one shard of a long
                sequence learns. Where they are given, `labels` are not read; labels alone are shifted, in
                each segment by itself.
            loss_weights (`torch.Tensor` of shape `(batch, tokens)`):
                What each term of that sum is multiplied by, 1 if not given; beside `shift_labels` where those are
                given, else beside `labels`. The number stays that of supervised tokens.
            smoothing (`float`): label smoothing, the share of each target that is spread over the vocabulary.
            logits_to_keep (`int` or `torch.Tensor`):
                Positions that the head is computed for: 0 all, `n` the last n, a 1-D tensor of positions, or a bool
                mask `(batch, tokens)` (then logits are `(kept, vocab)`). The loss is that of the kept positions, and
                `token_costs` are theirs.
            num_items_in_batch (`torch.Tensor` or `int`):
                Supervised tokens of the whole optimiser step, by which `Trainer` has the sum divided.
            skip_logits (`bool`):
                Give the loss, and `token_costs`, without the logits: those of supervised positions are made for a part
                of them at a time. Needs labels.
        """
        # Not in the signature, where `Trainer` would take it for a label that every batch has.
        shift_labels = kwargs.pop("shift_labels", None)
        if self.training and labels is None and num_items_in_batch is not None and shift_labels is not None:
            raise DuetError(
                "the Trainer keeps the labels from the model, for its own label smoothing or compute_loss_func, and "
                "that smoothing would hold each token against itself; use Duet's VLMTrainer, or leave out "
                "label_smoothing_factor (a loop of your own gives labels beside shift_labels)."
            )
        targets, weights = targets_of(labels, loss_weights, shift_labels)
        if skip_logits and targets is None:
            raise DuetError("skip_logits leaves the loss, which needs labels or shift_labels; give them.")
        if use_cache is None and (self.training or targets is not None):
            use_cache = False  # a cache has no reader in training, and would switch off packed attention masks
        text_config = self.config.text_config
        if getattr(text_config, "output_router_logits", False):  # a headless model does not look for this itself
            kwargs.setdefault("output_router_logits", True)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            image_grids=image_grids,
            mm_encoder_outputs=mm_encoder_outputs,
            vision_features=vision_features,
            feature_index=feature_index,
            segments=segments,
            see_blank=targets is not None,  # in an evaluation, and not where answers are written
            return_dict=True,
            **kwargs,
        )
        aux_loss, balance = None, None
        if outputs.router_logits:
            counted = attention_mask if segments is None else readers_of(segments, outputs.last_hidden_state.device)
            aux_loss = balance_loss(outputs.router_logits, text_config, counted)
            balance = text_config.router_aux_loss_coef * aux_loss
        if segments is not None and targets is not None and shift_labels is None:
            # No text predicts what the next begins with.
            ends = torch.tensor([end - 1 for _, end, *_ in segments], device=targets.device)
            targets = targets.index_fill(1, ends, IGNORE)
        states, targets, weights = (
            None if whole is None else keep_positions(whole, logits_to_keep)
            for whole in (outputs.last_hidden_state, targets, weights)
        )
        logits, loss, token_costs = None, None, None
        how = (targets, weights, num_items_in_batch, smoothing, balance)
        if skip_logits:
            loss, token_costs = loss_in_parts(self.lm_head, text_config, states, *how)
        else:
            logits = scale_logits(self.lm_head(states), text_config)
            if targets is not None:
                loss = mean_loss(logits, *how)
        if loss is not None and self.training and outputs.image_hidden_states is None and not self.model.has_to_see():
            loss = loss + zero_of(self._image_parameters())
        return VLMCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            image_hidden_states=outputs.image_hidden_states,
            image_outputs=outputs.image_outputs,
            aux_loss=aux_loss,
            router_logits=outputs.router_logits,
            token_costs=token_costs,
            **{CACHE: outputs.get(CACHE)},
        )


__all__ = ["VLMPreTrainedModel", "VLMModel", "VLMForConditionalGeneration"]
