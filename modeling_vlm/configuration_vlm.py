"""Configuration of a Duet model: two backbones and how they are joined.

What follows from the backbones is derived here, not declared by the user: the image size, the patch grid, the depth of
a tower that is read at an inner layer, tied heads. The file travels with every checkpoint, so it imports transformers
only.
"""

import copy
import math
import shutil
from pathlib import Path

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, dynamic_module_utils

from .model_error_vlm import DuetError


DUET_VERSION = "0.2.0"
"""The version of this code, which every saved config names."""

PROJECTOR_SETTINGS = {
    "linear": {},
    "gelu_norm": {},
    "mlp": {},
    "identity": {},
    "pixel_shuffle": {"scale": 2},
    "average_pool": {"scale": 2},
    "resampler": {"num_queries": 64, "depth": 1},
    "c_abstractor": {"scale": 2, "depth": 3},
}
"""Name of each projector -> its settings and what they are if not given; see `projector_vlm.py`."""

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


class VLMVisionPairConfig(PreTrainedConfig):
    r"""
    Two vision encoders side by side, which see one image and give one row of features a patch.

    Args:
        first_config, second_config (`PreTrainedConfig` or `dict`): the encoders.
        image_mean, image_std (`list[list[float]]`, *optional*):
            The normalisation that each encoder was trained with. The image processor applies the first's, and the
            second encoder's pixels are normalised anew inside.
    """

    model_type = "duet_vision_pair"
    sub_configs = {"first_config": AutoConfig, "second_config": AutoConfig}

    first_config: dict | PreTrainedConfig | None = None
    second_config: dict | PreTrainedConfig | None = None
    image_mean: list | None = None
    image_std: list | None = None

    def __post_init__(self, **kwargs):
        self.first_config = _sub_config(self.first_config, "first_config", default="vit")
        self.second_config = _sub_config(self.second_config, "second_config", default="vit")
        super().__post_init__(**kwargs)

    @property
    def encoders(self) -> tuple[PreTrainedConfig, PreTrainedConfig]:
        """Both configs."""
        return self.first_config, self.second_config

    @property
    def hidden_size(self) -> int:
        """Width of the features, one behind the other."""
        return sum(config.hidden_size for config in self.encoders)


class VLMConfig(PreTrainedConfig):
    r"""
    A vision encoder and a causal language model, joined by a projector.

    Args:
        vision_config (`PreTrainedConfig` or `dict`, *optional*, defaults to a ViT):
            Config of any `AutoModel` image encoder that cuts an image into patches, or a `VLMVisionPairConfig`.
        text_config (`PreTrainedConfig` or `dict`, *optional*, defaults to a Llama):
            Config of any `AutoModelForCausalLM` language model.
        projector_type (`str`, defaults to `"mlp"`):
            A projector of Duet's (see `projector_vlm.py`), or `"FILE.CLASS"`: a class of the user's own, whose file
            goes into every folder that the config is saved to. `from_backbones` takes it in.
        projector_settings (`dict`, *optional*):
            Settings of the projector: `scale`, `num_queries`, `depth`; see `PROJECTOR_SETTINGS`.
        vision_feature_select_strategy (`str`, defaults to `"patch"`):
            `"cls"`: the CLS token alone; `"patch"`: every patch token; `"full"`: everything the encoder returns.
        vision_feature_layer (`int`, *optional*):
            `None` reads the encoder's `last_hidden_state`; `-k` reads `hidden_states[-k]`. The tower is then built
            without the layers above it, from a copy of its config: `config.vision_config` is that copy.
        vision_num_hidden_layers (`int` or `list[int]`, *optional*):
            Depth of the encoder (of each of a pair) before it was cut at `vision_feature_layer`; derived.
        vision_modules_left_out (`list[str]`, *optional*):
            Parts of the encoder that its features do not depend on (poolers, heads), which the tower is built without;
            found when the model is built.
        image_size (`int` or `list[int]`, *optional*, defaults to the encoder's own):
            Height and width in pixels of what the encoder sees; where it is not the encoder's own, the encoder
            interpolates its positions, if it can.
        max_tiles (`int`, defaults to 1):
            Into how many tiles of that size an image may be cut for detail, beside the view of the whole; 1 cuts none.
        num_prefix_tokens (`int`, *optional*):
            Tokens that the encoder puts before the patches (CLS, distillation, registers); found by one forward pass
            when the model is built.
        image_seq_length (`int`, *optional*):
            Positions that one view of an image takes in the language model's sequence; found with `num_prefix_tokens`.
            An image that is not tiled takes as many, a tiled one `tile_tokens(rows, columns)`.
        image_token_id (`int`, *optional*, defaults to the last id of the vocabulary):
            The placeholder that an image's features replace.
        tie_word_embeddings (`bool`, *optional*, defaults to the language model's):
            Whether head and token embeddings share one tensor.
        duet_version (`str`, *optional*):
            The version of the code that a saved folder carries; always that of the code in use, whatever is given.

    Raises:
        `DuetError`: an unknown projector, setting, strategy or layer, or an image size that gives no patch grid.
    """

    model_type = "duet_vlm"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}
    keys_to_ignore_at_inference = [
        "cache", "past_key_values", "image_hidden_states", "image_outputs", "hidden_states", "attentions", "aux_loss",
        "router_logits",
    ]  # fmt: skip

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    projector_type: str = "mlp"
    projector_settings: dict | None = None
    vision_feature_select_strategy: str = "patch"
    vision_feature_layer: int | None = None
    vision_num_hidden_layers: int | list | None = None
    vision_modules_left_out: list | None = None
    image_size: int | list | None = None
    max_tiles: int = 1
    num_prefix_tokens: int | None = None
    image_seq_length: int | None = None
    image_token_id: int | None = None
    tie_word_embeddings: bool | None = None
    duet_version: str | None = None

    # The file of a projector of the user's own, in this process only. It is run without asking, so nothing that a
    # checkpoint says may end up here.
    _projector_file = None

    def __post_init__(self, **kwargs):
        kwargs.pop("_projector_file", None)
        self.duet_version = DUET_VERSION  # a folder is saved with this code, whichever it was loaded with
        self.vision_config = _sub_config(self.vision_config, "vision_config", default="vit")
        self.text_config = _sub_config(self.text_config, "text_config", default="llama")
        self._check_projector()
        if self.vision_feature_select_strategy == "default":  # LLaVA's name for it
            self.vision_feature_select_strategy = "patch"
        if self.vision_feature_select_strategy not in SELECT_STRATEGIES:
            raise DuetError(
                f"vision_feature_select_strategy={self.vision_feature_select_strategy!r} is not known; "
                f"choose one of {', '.join(SELECT_STRATEGIES)}."
            )
        if not isinstance(self.max_tiles, int) or self.max_tiles < 1:
            raise DuetError(f"max_tiles={self.max_tiles!r}: expected 1 (no tiles) or more.")
        if self.vision_feature_layer is not None and self.vision_num_hidden_layers is None:
            self._cut_vision_tower()
        if self.image_size is None:
            self.image_size = own_image_size(_first_encoder(self.vision_config))
        size = self.image_size = list(pair_of(self.image_size))
        if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
            raise DuetError(f"image_size={size}: expected a whole number of pixels, or height and width.")
        if self.image_token_id is None:
            self.image_token_id = self.text_config.vocab_size - 1
        # The model reads the field of this config, inference engines read the language model's: keep them equal.
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        self.text_config.tie_word_embeddings = self.tie_word_embeddings
        for key, value in _AUTO_MAP.items():
            kwargs.setdefault("auto_map", {}).setdefault(key, value)
        super().__post_init__(**kwargs)

    def _check_projector(self):
        kind, given = self.projector_type, {} if self.projector_settings is None else self.projector_settings
        if not isinstance(given, dict):
            raise DuetError(f"projector_settings={given!r}: expected names and values, such as {{'scale': 2}}.")
        known = PROJECTOR_SETTINGS.get(kind) if isinstance(kind, str) else None
        if known is None and not is_own_projector(kind):
            raise DuetError(
                f"projector_type={kind!r} is not known; choose one of {', '.join(PROJECTOR_SETTINGS)}, or give "
                "`from_backbones` a class of your own as FILE.py:CLASS."
            )
        for name, value in given.items() if known is not None else ():  # a class of one's own knows its settings itself
            if name not in known:
                raise DuetError(
                    f"projector_settings has {name!r}, which {kind} does not take; it takes "
                    f"{', '.join(known) or 'none'}."
                )
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise DuetError(f"projector_settings has {name}={value!r}; expected a whole number from 1.")
        self.projector_settings = {**(known or {}), **given}

    def _cut_vision_tower(self):
        self.vision_config = copy.deepcopy(self.vision_config)
        encoders = getattr(self.vision_config, "encoders", (self.vision_config,))
        depths = [_cut(encoder, self.vision_feature_layer) for encoder in encoders]
        self.vision_num_hidden_layers = depths if len(depths) > 1 else depths[0]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded  # with what it did not use, where that is asked for
        if is_own_projector(config.projector_type) and not config._name_or_path:
            config._name_or_path = str(pretrained_model_name_or_path)  # the file of its projector lies beside it
        return loaded

    def to_dict(self) -> dict:
        settings = super().to_dict()
        settings.pop("_projector_file", None)
        _forget_folders([value for value in settings.values() if isinstance(value, (dict, list))])
        return settings

    def save_pretrained(self, save_directory, **kwargs):
        super().save_pretrained(save_directory, **kwargs)
        if is_own_projector(self.projector_type):
            source = self._name_or_path if self._projector_file is None else Path(self._projector_file).parent
            name = self.projector_type.partition(".")[0] + ".py"
            # The library's own copy, which has what the file imports beside it; nothing is run.
            file = dynamic_module_utils.get_cached_module_file(source, name)
            for path in relative_files(Path(dynamic_module_utils.HF_MODULES_CACHE, file)):
                shutil.copyfile(path, Path(save_directory, path.name))

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Rows and columns of the patches that the vision encoder cuts one view into."""
        return patch_grid_of(_first_encoder(self.vision_config), self.image_size)

    def tile_tokens(self, rows: int = 1, columns: int = 1) -> int:
        """
        Positions that an image takes which is cut into `rows` x `columns` tiles.

        The view of the whole comes first, then the tiles, row by row; where images may be tiled, the view and each row
        end in a separator.
        """
        if self.max_tiles == 1:
            return self.image_seq_length
        tiles, separators = (rows * columns, rows) if rows * columns > 1 else (0, 0)
        return self.image_seq_length * (1 + tiles) + 1 + separators


def is_own_projector(projector_type: str) -> bool:
    """Whether it names a class of the user's own: `FILE.CLASS`."""
    parts = projector_type.split(".") if isinstance(projector_type, str) else []
    return len(parts) == 2 and all(part.isidentifier() for part in parts) and parts[1] != "py"


def relative_files(file: Path) -> list[Path]:
    """A Python file and those it imports from beside it, and they in turn."""
    return [file, *map(Path, dynamic_module_utils.get_relative_import_files(file))]


def pair_of(size: int | list | tuple) -> tuple[int, int]:
    """Height and width."""
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)


def own_image_size(config: PreTrainedConfig) -> tuple[int, int]:
    """
    Height and width in pixels of the images that an encoder was trained with.

    Raises:
        `DuetError`: it is no encoder that cuts images into patches.
    """
    size = getattr(config, "image_size", None)
    if size is None and getattr(config, "num_patches", None):  # any size: the one that its positions are learned for
        size = math.isqrt(config.num_patches) * _field(config, "patch_size")
    return pair_of(size or _field(config, "image_size"))


def patch_grid_of(config: PreTrainedConfig, image_size: int | list | tuple) -> tuple[int, int]:
    """
    Rows and columns of the patches that an encoder cuts an image of this size into.

    Raises:
        `DuetError`: there is not one whole patch.
    """
    patch = pair_of(_field(config, "patch_size"))
    grid = tuple(pixels // side for pixels, side in zip(pair_of(image_size), patch))
    if 0 in grid:
        raise DuetError(
            f"image_size={list(pair_of(image_size))} is smaller than a patch of the vision encoder "
            f"({config.model_type}, {patch[0]}x{patch[1]} pixels); choose a larger image_size."
        )
    return grid


def kind_of(config: PreTrainedConfig) -> str:
    """The `model_type` of an encoder, or of both of a pair."""
    return " and ".join(encoder.model_type for encoder in getattr(config, "encoders", (config,)))


def _first_encoder(config):
    return getattr(config, "encoders", (config,))[0]


def _field(config, name):
    value = getattr(config, name, None)
    if value is None:
        where = f" {config._name_or_path!r}" if config._name_or_path else ""
        raise DuetError(
            f"the vision encoder{where} ({config.model_type}) has no {name} in its config; Duet needs an encoder that "
            "cuts images into patches, such as ViT, CLIP, SigLIP or DINOv2."
        )
    return value


def _forget_folders(settings):
    """Leave out where parts of a model came from, as the library does of a whole one: it may be a folder here."""
    if isinstance(settings, dict) and "_name_or_path" in settings:
        settings["_name_or_path"] = ""
    for value in settings.values() if isinstance(settings, dict) else settings:
        if isinstance(value, (dict, list)):
            _forget_folders(value)


def _cut(config, layer):
    """Leave the layers above `hidden_states[layer]` out of an encoder's config; gives its depth before."""
    depth = config.num_hidden_layers
    if not isinstance(layer, int) or not -depth <= layer < 0:
        raise DuetError(
            f"vision_feature_layer={layer!r} does not fit a vision encoder of {depth} layers; choose null (its final "
            f"output) or a number from -{depth} (after the first layer) to -1 (after the last)."
        )
    kept = config.num_hidden_layers = depth + 1 + layer
    if getattr(config, "stage_names", None) is not None:  # one stage a layer, of which some are outputs
        config.stage_names = config.stage_names[: kept + 1]
        config.set_output_features_output_indices(out_features=None, out_indices=None)
    return depth


def _sub_config(config, name, default):
    if config is None:
        return CONFIG_MAPPING[default]()
    if isinstance(config, dict):
        model_type = config.get("model_type")
        settings = {key: value for key, value in config.items() if key != "model_type"}
        if model_type == VLMVisionPairConfig.model_type:
            return VLMVisionPairConfig(**settings)
        if model_type not in CONFIG_MAPPING:
            raise DuetError(
                f"{name} has model_type={model_type!r}, which this transformers does not know; expected the "
                "`model_type` of a model that the Auto classes load, for example 'vit' or 'llama'."
            )
        return CONFIG_MAPPING[model_type](**settings)
    return config


__all__ = ["VLMConfig", "VLMVisionPairConfig"]
