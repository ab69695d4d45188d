"""Configuration of a Duet model: two backbones and how they are joined.

What follows from the backbones is derived here, not declared by the user: the patch grid, the depth of a tower that is
read at an inner layer, tied heads. The file travels with every checkpoint, so it imports transformers only.
"""

import copy

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig


PROJECTOR_TYPES = ("linear", "gelu_norm", "mlp")
SELECT_STRATEGIES = ("cls", "patch", "full")

# The config names its own classes, so every Auto class finds them in a saved folder, whichever of them did the saving.
_AUTO_MAP = {
    "AutoConfig": "configuration_vlm.VLMConfig",
    "AutoModel": "modeling_vlm.VLMForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_vlm.VLMForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_vlm.VLMForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_vlm.VLMForConditionalGeneration",
    "AutoProcessor": "processing_vlm.VLMProcessor",
}


class VLMConfig(PreTrainedConfig):
    r"""
    A vision encoder and a causal language model, joined by a projector.

    Args:
        vision_config (`PreTrainedConfig` or `dict`, *optional*, defaults to a ViT):
            Config of any `AutoModel` image encoder with a fixed `image_size` and `patch_size`.
        text_config (`PreTrainedConfig` or `dict`, *optional*, defaults to a Llama):
            Config of any `AutoModelForCausalLM` language model.
        projector_type (`str`, defaults to `"mlp"`):
            `"linear"`: one layer (LLaVA, https://arxiv.org/abs/2304.08485); `"gelu_norm"`: Linear, GELU, LayerNorm;
            `"mlp"`: Linear, GELU, Linear (LLaVA-1.5, https://arxiv.org/abs/2310.03744).
        vision_feature_select_strategy (`str`, defaults to `"patch"`):
            `"cls"`: the CLS token alone; `"patch"`: every patch token; `"full"`: everything the encoder returns.
        vision_feature_layer (`int`, *optional*):
            `None` reads the encoder's `last_hidden_state`; `-k` reads `hidden_states[-k]`. The tower is then built
            without the layers above it, from a copy of its config: `config.vision_config` is that copy.
        vision_num_hidden_layers (`int`, *optional*):
            Depth of the encoder before it was cut at `vision_feature_layer`; derived.
        num_prefix_tokens (`int`, *optional*):
            Tokens that the encoder puts before the patches (CLS, distillation, registers); found by one forward pass
            when the model is built.
        image_seq_length (`int`, *optional*):
            Positions that one image takes in the language model's sequence; found with `num_prefix_tokens`.
        image_token_id (`int`, *optional*, defaults to the last id of the vocabulary):
            The placeholder that an image's features replace.
        tie_word_embeddings (`bool`, *optional*, defaults to the language model's):
            Whether head and token embeddings share one tensor.

    Raises:
        `ValueError`: an unknown projector, strategy or layer.
    """

    model_type = "duet_vlm"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}
    keys_to_ignore_at_inference = [
        "past_key_values", "image_hidden_states", "hidden_states", "attentions", "aux_loss", "router_logits"
    ]  # fmt: skip

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    projector_type: str = "mlp"
    vision_feature_select_strategy: str = "patch"
    vision_feature_layer: int | None = None
    vision_num_hidden_layers: int | None = None
    num_prefix_tokens: int | None = None
    image_seq_length: int | None = None
    image_token_id: int | None = None
    tie_word_embeddings: bool | None = None

    def __post_init__(self, **kwargs):
        self.vision_config = _sub_config(self.vision_config, "vision_config", default="vit")
        self.text_config = _sub_config(self.text_config, "text_config", default="llama")
        if self.projector_type not in PROJECTOR_TYPES:
            raise ValueError(
                f"projector_type={self.projector_type!r} is not known; choose one of {', '.join(PROJECTOR_TYPES)}."
            )
        if self.vision_feature_select_strategy not in SELECT_STRATEGIES:
            raise ValueError(
                f"vision_feature_select_strategy={self.vision_feature_select_strategy!r} is not known; "
                f"choose one of {', '.join(SELECT_STRATEGIES)}."
            )
        if self.vision_feature_layer is not None and self.vision_num_hidden_layers is None:
            self._cut_vision_tower()
        if self.image_token_id is None:
            self.image_token_id = self.text_config.vocab_size - 1
        # The model reads the field of this config, inference engines read the language model's: keep them equal.
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        self.text_config.tie_word_embeddings = self.tie_word_embeddings
        for key, value in _AUTO_MAP.items():
            kwargs.setdefault("auto_map", {}).setdefault(key, value)
        super().__post_init__(**kwargs)

    def _cut_vision_tower(self):
        depth = self.vision_config.num_hidden_layers
        kept = depth + 1 + self.vision_feature_layer
        if self.vision_feature_layer >= 0 or kept < 1:
            raise ValueError(
                f"vision_feature_layer={self.vision_feature_layer} does not fit a vision encoder of {depth} layers; "
                f"choose null (its final output) or a number from -{depth} (after the first layer) to -1 (after the "
                "last)."
            )
        self.vision_num_hidden_layers = depth
        self.vision_config = copy.deepcopy(self.vision_config)
        self.vision_config.num_hidden_layers = kept
        if getattr(self.vision_config, "stage_names", None) is not None:  # one stage a layer, of which some are outputs
            self.vision_config.stage_names = self.vision_config.stage_names[: kept + 1]
            self.vision_config.set_output_features_output_indices(out_features=None, out_indices=None)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that the vision encoder takes."""
        return _pair(self._vision_field("image_size"))

    @property
    def num_patches(self) -> int:
        """Patches the vision encoder cuts one image into."""
        (height, width), (patch_height, patch_width) = self.image_size, _pair(self._vision_field("patch_size"))
        return (height // patch_height) * (width // patch_width)

    def _vision_field(self, name):
        value = getattr(self.vision_config, name, None)
        if value is None:
            where = f" {self.vision_config._name_or_path!r}" if self.vision_config._name_or_path else ""
            raise ValueError(
                f"the vision encoder{where} ({self.vision_config.model_type}) has no {name} in its config; Duet needs "
                "an encoder that cuts images of one fixed size into patches, such as ViT, CLIP, SigLIP or DINOv2."
            )
        return value


def _pair(size):
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)


def _sub_config(config, name, default):
    if config is None:
        return CONFIG_MAPPING[default]()
    if isinstance(config, dict):
        model_type = config.get("model_type")
        if model_type not in CONFIG_MAPPING:
            raise ValueError(
                f"{name} has model_type={model_type!r}, which this transformers does not know; expected the "
                "`model_type` of a model that the Auto classes load, for example 'vit' or 'llama'."
            )
        return CONFIG_MAPPING[model_type](**{k: v for k, v in config.items() if k != "model_type"})
    return config


__all__ = ["VLMConfig"]
