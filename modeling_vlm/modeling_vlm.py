"""The Duet model: any vision encoder, a projector, any causal language model.

`VLMModel` does four things in sight: embed the text, encode the images, put them in place, run the language model.
`VLMForConditionalGeneration` adds the language model's own head and the loss. Weights lie as in LLaVA
(`model.vision_tower`, `model.multi_modal_projector`, `model.language_model`, `lm_head`). The file travels with every
checkpoint, so it imports torch and transformers only.
"""

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
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.utils import can_return_tuple, torch_compilable_check

from .backbones_vlm import (
    BackboneKwargs,
    balance_loss,
    check_head_is_kept,
    find_image_token_id,
    grow_embeddings,
    learned_positions,
    load_backbone_config,
    load_language_model,
    load_vision_tower,
    scale_logits,
)
from .configuration_vlm import VLMConfig
from .projector_vlm import build_projector, select_features


@dataclass
class VLMModelOutputWithPast(BaseModelOutputWithPast):
    """
    Output of `VLMModel`.

    Args:
        image_hidden_states (`torch.Tensor` of shape `(images * image_seq_length, hidden)`, *optional*):
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
        image_hidden_states (`torch.Tensor` of shape `(images * image_seq_length, hidden)`, *optional*):
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
        self.vision_tower = AutoModel.from_config(config.vision_config) if vision_tower is None else vision_tower
        self.multi_modal_projector = build_projector(config)
        self.language_model = AutoModel.from_config(config.text_config) if language_model is None else language_model
        # One config object per backbone, so that a setting made on either side is made on both.
        config.vision_config, config.text_config = self.vision_tower.config, self.language_model.config
        self.max_positions = learned_positions(self.language_model)
        if config.image_seq_length is None or config.num_prefix_tokens is None:
            self._count_visual_tokens()
        self.post_init()

    @torch.no_grad()
    def _count_visual_tokens(self):
        """Find prefix tokens and tokens per image by one forward pass: a table of encoders would miss the next one."""
        config, weight = self.config, next(self.vision_tower.parameters())
        channels = getattr(config.vision_config, "num_channels", 3)
        image = torch.zeros(1, channels, *config.image_size, dtype=weight.dtype, device=weight.device)
        tokens = self.vision_hidden_states(image)[1].shape[1]
        config.num_prefix_tokens = tokens - config.num_patches
        if config.num_prefix_tokens < 0:
            raise ValueError(
                f"the vision encoder ({config.vision_config.model_type}) returns {tokens} tokens for "
                f"{config.num_patches} patches; Duet needs one token per patch after the encoder's prefix tokens."
            )
        if config.vision_feature_select_strategy == "cls" and config.num_prefix_tokens == 0:
            raise ValueError(
                f'vision_feature_select_strategy="cls" needs a CLS token, and this vision encoder '
                f'({config.vision_config.model_type}) has none; choose "patch".'
            )
        features = torch.empty(1, tokens, 1, device="meta")
        found = select_features(features, config.vision_feature_select_strategy, config.num_prefix_tokens).shape[1]
        if config.image_seq_length not in (None, found):
            raise ValueError(
                f"the config has image_seq_length={config.image_seq_length}, and this vision encoder "
                f"({config.vision_config.model_type}) gives {found} visual tokens; leave it out, it is found."
            )
        config.image_seq_length = found

    def vision_hidden_states(self, pixel_values: torch.Tensor, **kwargs) -> tuple[ModelOutput, torch.Tensor]:
        """The tower's output, and its `(images, tokens, hidden)` states at the layer that the config names."""
        if self.config.vision_feature_layer is None:
            outputs = self.vision_tower(pixel_values, return_dict=True, **kwargs)
            return outputs, outputs.last_hidden_state
        # The tower ends at that layer; its last hidden state would have the final norm applied.
        outputs = self.vision_tower(pixel_values, return_dict=True, **{**kwargs, "output_hidden_states": True})
        return outputs, outputs.hidden_states[-1]

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
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """
        Encode and project images.

        Args:
            pixel_values (`torch.Tensor` of shape `(images, channels, height, width)`): processed images.

        Returns:
            `BaseModelOutputWithPooling`: the vision encoder's output, `pooler_output` being the features in the
            language model's space, a list with one `(image_seq_length, hidden)` tensor an image.
        """
        outputs, hidden_states = self.vision_hidden_states(pixel_values, **kwargs)
        features = select_features(
            hidden_states, self.config.vision_feature_select_strategy, self.config.num_prefix_tokens
        )
        outputs.pooler_output = list(self.multi_modal_projector(features))
        return outputs

    def get_placeholder_mask(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor, image_features: torch.Tensor
    ) -> torch.Tensor:
        """
        Where image features go, as a `(batch, tokens, 1)` mask.

        Raises:
            `ValueError`: the number of image tokens is not the number of features.
        """
        if input_ids is None:
            image_id = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(image_id)).all(-1)
        else:
            mask = input_ids == self.config.image_token_id
        tokens, features = mask.sum(), image_features.shape[0]
        torch_compilable_check(
            tokens == features,
            f"Image features and image tokens do not match, tokens: {tokens}, features: {features}. Each image needs "
            f"{self.config.image_seq_length} image tokens; the processor saved with the model places them.",
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
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs,
    ) -> VLMModelOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, tokens)`): ids, `image_seq_length` image tokens an image.
            pixel_values (`torch.Tensor` of shape `(images, channels, height, width)`): every image of the batch, in
                the order of their tokens.
            attention_mask (`torch.Tensor` of shape `(batch, past + tokens)`): 0 on padding.
            position_ids (`torch.LongTensor` of shape `(batch, tokens)`): positions in the language model.
            past_key_values (`Cache`): keys and values of the tokens before these.
            inputs_embeds (`torch.Tensor` of shape `(batch, tokens, hidden)`): instead of `input_ids`.
            mm_encoder_outputs (`dict`): output of `get_image_features` under `"image"`, instead of `pixel_values`.

        Raises:
            `ValueError`: image tokens and features disagree, or the sequence is longer than learned positions reach.
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
            image_outputs = self.get_image_features(pixel_values, return_dict=True)
        image_features = None
        if image_outputs is not None:
            image_features = torch.cat(tuple(image_outputs.pooler_output)).to(inputs_embeds.device, inputs_embeds.dtype)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_features)
            inputs_embeds = inputs_embeds.masked_scatter(mask, image_features)
        elif input_ids is not None:
            no_features = inputs_embeds.new_empty(0)
            self.get_placeholder_mask(input_ids, inputs_embeds, no_features)

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

    def __init__(
        self,
        config: PreTrainedConfig,
        vision_tower: PreTrainedModel | None = None,
        causal_lm: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        # The whole causal model is built so that its head is what it is there: bias or none, any name, any size.
        if causal_lm is None:
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
        vision: str | PreTrainedConfig,
        text: str | PreTrainedConfig,
        *,
        tokenizer=None,
        image_token: str = "<image>",
        projector_type: str = "mlp",
        vision_feature_select_strategy: str = "patch",
        vision_feature_layer: int | None = None,
        dtype: torch.dtype = torch.float32,
        vision_kwargs: BackboneKwargs | None = None,
        text_kwargs: BackboneKwargs | None = None,
    ) -> "VLMForConditionalGeneration":
        """
        Compose a model from two backbones.

        Args:
            vision (`str` or `PreTrainedConfig`):
                Hub name or folder of a pretrained vision encoder (of a composite checkpoint such as CLIP or SigLIP its
                vision half), or a config to start from scratch.
            text (`str` or `PreTrainedConfig`): the same for the causal language model.
            tokenizer (`str` or tokenizer, *optional*, defaults to that of `text`):
                The language model's tokenizer, from which the image token's id follows.
            image_token (`str`): the image token; added to the vocabulary where the tokenizer does not have it.
            projector_type, vision_feature_select_strategy, vision_feature_layer: see `VLMConfig`.
            dtype (`torch.dtype`): of every weight; parameters that train want float32.
            vision_kwargs, text_kwargs (`dict`, *optional*):
                `revision`, `token`, `trust_remote_code`, `attn_implementation` and the like, for each side.

        Raises:
            `ValueError`: a backbone cannot be loaded or used, with its name and the reason.
        """
        vision_kwargs, text_kwargs = dict(vision_kwargs or {}), dict(text_kwargs or {})
        vision_config = load_backbone_config("vision encoder", vision, vision_kwargs)
        vision_config = getattr(vision_config, "vision_config", vision_config)
        text_config = load_backbone_config("language model", text, text_kwargs)
        config = VLMConfig(
            vision_config=vision_config,
            text_config=text_config,
            projector_type=projector_type,
            vision_feature_select_strategy=vision_feature_select_strategy,
            vision_feature_layer=vision_feature_layer,
            image_token_id=find_image_token_id(text if tokenizer is None else tokenizer, image_token, text_kwargs),
        )
        config.dtype = dtype
        vision_tower = load_vision_tower(vision, config.vision_config, dtype, vision_kwargs)
        causal_lm = load_language_model(text, config.text_config, dtype, text_kwargs)
        generation_config = causal_lm.generation_config
        default_dtype = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # the projector is born here, in the precision of the backbones
        try:
            model = cls(config, vision_tower, causal_lm)
        finally:
            torch.set_default_dtype(default_dtype)
        check_head_is_kept(model, causal_lm)
        grow_embeddings(model, config.image_token_id)
        generation_config.suppress_tokens = sorted({*(generation_config.suppress_tokens or []), config.image_token_id})
        model.generation_config = generation_config
        return model.eval()

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

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """See `VLMModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs):
        # Beams and samples repeat each prompt, and a prompt may have any number of images: they go with their prompt.
        pixel_values, split = kwargs.get("pixel_values"), None
        if pixel_values is not None and input_ids is not None:
            images = (input_ids == self.config.image_token_id).sum(1) // self.config.image_seq_length
            if images.sum() == len(pixel_values):
                split = kwargs.pop("pixel_values").split(images.tolist())
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        if split is not None:
            kwargs["pixel_values"] = torch.cat([of_prompt for of_prompt in split for _ in range(expand_size)])
        return input_ids, kwargs

    def _zero_of_image_parts(self) -> torch.Tensor | float:
        """A 0 that all parameters which only an image reaches have a gradient of: every process waits for theirs."""
        modules = (self.model.vision_tower, self.model.multi_modal_projector)
        learning = [p for module in modules for p in module.parameters() if p.requires_grad]
        return 0.0 * sum(parameter.sum() for parameter in learning)

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
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs,
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
        """
        if use_cache is None and (self.training or labels is not None):
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
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(_keep_positions(outputs.last_hidden_state, logits_to_keep))
        logits = scale_logits(logits, self.config.text_config)

        loss = None
        if labels is not None:
            targets = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
            targets = _keep_positions(targets.unsqueeze(-1), logits_to_keep).squeeze(-1)
            if num_items_in_batch is None:
                num_items_in_batch = (targets != -100).sum()
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
            loss = None if loss is None else loss + text_config.router_aux_loss_coef * aux_loss
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


def _keep_positions(states: torch.Tensor, keep: int | torch.Tensor) -> torch.Tensor:
    """`(batch, tokens, dim)` at the positions that `logits_to_keep` names; a bool mask gives `(kept, dim)`."""
    if isinstance(keep, torch.Tensor) and keep.dtype == torch.bool and keep.ndim == 2:
        return states[keep]
    return states[:, slice(-keep, None) if isinstance(keep, int) else keep]


__all__ = ["VLMPreTrainedModel", "VLMModel", "VLMForConditionalGeneration"]
