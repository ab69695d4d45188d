"""What can be set about a run: dataclasses for `HfArgumentParser`, filled by `settings.py`.

What a setting cannot mean on this machine, or for a composed model, is refused here, before anything is read.
"""

import difflib
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

from transformers import CONFIG_MAPPING, PreTrainedConfig

from modeling_vlm.backbones_vlm import BackboneKwargs
from modeling_vlm.configuration_vlm import PROJECTOR_SETTINGS
from processing.batching.collator import ON_BAD_SAMPLE
from processing.batching.encoding import SUPERVISE, TRUNCATIONS
from processing.data_error_vlm import DuetError
from processing.reading.conversations import CAPTION_CHOICES
from processing.reading.items import SPLIT_TURNS
from processing.reading.layouts import CHOICE_ANSWERS
from processing.reading.settings import SourceSettings, parse_columns

from .defaults import default_layer


@dataclass
class ModelArguments:
    """Which model is trained."""

    model: str | None = field(
        default=None,
        metadata={"help": "A composed model to go on with (stage 2: stage 1's output folder): folder or Hub name."},
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of `model`."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code of a projector that comes with `model` from the Hub."}
    )
    vision_model: str | None = field(
        default=None,
        metadata={"help": "Vision encoder of a new model: Hub name or folder; in yaml also a config, to learn anew."},
    )
    second_vision_model: str | None = field(
        default=None, metadata={"help": "Another vision encoder beside it, whose features are put behind the first's."}
    )
    text_model: str | None = field(default=None, metadata={"help": "Language model of a new model, likewise."})
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "Tokenizer, by Hub name or folder; the language model's own if not given. For a language model "
            "from scratch one is trained on the training texts."
        },
    )
    vision_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the vision encoder."})
    text_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the language model."})
    vision_token: str | None = field(default=None, metadata={"help": "Hub token for the vision encoder."})
    text_token: str | None = field(default=None, metadata={"help": "Hub token for the language model."})
    vision_trust_remote_code: bool = field(
        default=False, metadata={"help": "Passed on for the vision encoder; an encoder that needs it is refused."}
    )
    text_trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code of the tokenizer; a language model that needs it is refused."}
    )
    vision_attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention of the vision encoder: sdpa, eager, flash_attention_2."}
    )
    text_attn_implementation: str | None = field(default=None, metadata={"help": "Attention of the language model."})
    projector_type: str = field(
        default="mlp", metadata={"help": f"{', '.join(PROJECTOR_SETTINGS)}; or a class of your own, FILE.py:CLASS."}
    )
    projector_settings: str | None = field(
        default=None, metadata={"help": "Settings of the projector, as scale=2,depth=3; a mapping in yaml."}
    )
    vision_feature_select_strategy: str = field(
        default="patch", metadata={"help": "Visual tokens: cls, patch, or full (everything the encoder returns)."}
    )
    vision_feature_layer: str | None = field(
        default=None,
        metadata={
            "help": "-k reads the encoder's hidden_states[-k], last its final output. If not given, -2 (LLaVA's) where "
            "a pretrained encoder has a norm behind its last layer and its patches are read, else last."
        },
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "Pixels of the image's sides, where not the encoder's own; in yaml also [height, width]."},
    )
    image_mode: str | None = field(
        default=None,
        metadata={"help": "How an image is made to fit: resize, pad or crop; as the encoder's own if not given."},
    )
    max_tiles: int = field(
        default=1, metadata={"help": "Cut a large image into at most so many tiles, beside the view of the whole."}
    )
    image_token: str = field(default="<image>", metadata={"help": "The placeholder of an image in a text."})
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": "A jinja file, or a template of Duet's: default, plain. The tokenizer's own if not given, and "
            "default where it has none."
        },
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "Numbers of the weights: float32, bfloat16 or float16. What trains wants float32."},
    )

    def composing_settings(self) -> list[str]:
        """The settings given that only composing two backbones reads."""
        sides = ("vision_", "second_", "text_", "projector_", "tokenizer", "image_", "max_tiles")
        return [
            f.name
            for f in fields(self)
            if f.name.startswith(sides) and not f.name.endswith("attn_implementation")
            if getattr(self, f.name) != f.default
        ]

    def __post_init__(self):
        if isinstance(self.projector_settings, str):
            given = self.projector_settings
            pairs = [pair.partition("=") for pair in given.split(",")]
            if not all(value.strip().isdecimal() for _, _, value in pairs):
                raise DuetError(f"projector_settings={given!r}: expected whole numbers, such as scale=2,depth=3.")
            self.projector_settings = {name.strip(): int(value) for name, _, value in pairs}
        layer = self.vision_feature_layer
        if layer not in (None, "last"):
            try:
                self.vision_feature_layer = int(layer)
            except ValueError:
                raise DuetError(f"vision_feature_layer={layer!r}: expected -1, -2 and so on, or last.") from None

    def vision_models(self) -> Any:
        """The vision encoder, or the two that stand side by side; each a name, or a config's settings."""
        if self.second_vision_model is None:
            return backbone_of("vision_model", self.vision_model)
        return tuple(backbone_of(name, getattr(self, name)) for name in ("vision_model", "second_vision_model"))

    def composition(self) -> dict[str, Any]:
        """How the backbones are joined: settings of `VLMConfig`, as `from_backbones` takes them."""
        names = (
            "projector_type", "projector_settings", "vision_feature_select_strategy", "vision_feature_layer",
            "image_size", "max_tiles",
        )  # fmt: skip
        settings = {name: getattr(self, name) for name in names}
        if self.vision_feature_layer is None:
            vision = self.vision_models()
            settings["vision_feature_layer"] = default_layer(
                vision, self.backbone_kwargs("vision"), self.vision_feature_select_strategy
            )
        elif self.vision_feature_layer == "last":
            settings["vision_feature_layer"] = None
        return settings

    def joining_kwargs(self, tokenizer: Any) -> dict[str, Any]:
        """What `from_backbones` of the model and of its processor are both given."""
        return {
            "tokenizer": tokenizer,
            "image_token": self.image_token,
            "vision_kwargs": self.backbone_kwargs("vision"),
            "text_kwargs": self.backbone_kwargs("text"),
        }

    def backbone_kwargs(self, side: str) -> BackboneKwargs:
        """What `from_pretrained` is given for one side, `"vision"` or `"text"`."""
        names = ("revision", "token", "trust_remote_code", "attn_implementation")
        return cast(BackboneKwargs, {name: value for name in names if (value := getattr(self, f"{side}_{name}"))})


def backbone_of(option: str, value: str | dict | PreTrainedConfig | None) -> str | PreTrainedConfig | None:
    """A name as it is, and settings in yaml as the config of a backbone that starts from scratch."""
    if not isinstance(value, dict):
        return value
    model_type = value.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise DuetError(f"{option} has model_type {model_type!r}; expected one that transformers knows, such as vit.")
    return CONFIG_MAPPING[model_type](**{key: setting for key, setting in value.items() if key != "model_type"})


@dataclass
class DataArguments:
    """What the model learns from."""

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Hub name, folder or file; COCO's folder or captions JSON; or `shapes`, the built-in data set."
        },
    )
    datasets: str | None = field(
        default=None,
        metadata={
            "help": "Several data sets, in yaml only: a list of {path, name, split, eval_split, revision, image_dir, "
            "columns, max_samples, weight}. With weights, each is that share of the samples."
        },
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Configuration of a data set that has several."})
    tokenizer_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "For a tokenizer that is trained: another configuration of the data set, whose words it learns too."
        },
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub data set."})
    image_dir: str | None = field(default=None, metadata={"help": "Folder that image paths are relative to."})
    allow_urls: bool = field(
        default=False, metadata={"help": "Fetch images that are URLs, up to 20 MB and 10 seconds each."}
    )
    allow_local_urls: bool = field(
        default=False, metadata={"help": "Let these URLs lead to this machine and to networks of its own, too."}
    )
    allow_links: bool = field(
        default=False, metadata={"help": "Follow links in the folder of the images that lead out of it."}
    )
    columns: str | None = field(
        default=None,
        metadata={
            "help": "What a column is, where its name does not say it: image=photo,caption=description; "
            "thumbnail=ignore for what is none of a row's content."
        },
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read the data set while training, from its beginning on; needs --max_steps."}
    )
    shuffle_buffer: int = field(
        default=1000, metadata={"help": "Samples of a streamed data set among which the next is drawn."}
    )
    train_split: str | None = field(default=None, metadata={"help": "Split to learn from; `train`, or the only one."})
    eval_split: str | None = field(
        default=None, metadata={"help": "Split for the evaluation loss; without it `eval_share` is held out."}
    )
    eval_share: float | None = field(
        default=None,
        metadata={
            "help": "Share of the training rows held out for the evaluation loss, 1,000 at most. 0.01 if not given; of "
            "a streamed data set none, because many rows would have to be read for it."
        },
    )
    test_split: str | None = field(
        default=None,
        metadata={"help": "Split whose questions are answered by `generate` after training, and judged."},
    )
    test_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Another data set for these questions: a name, as of dataset; in yaml also an entry as in datasets."
        },
    )
    download: bool = field(default=False, metadata={"help": "Fetch COCO 2017 into the folder named by `dataset`."})
    max_samples: int | None = field(
        default=None, metadata={"help": "That many rows of the training split, chosen with `sample_seed`."}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "The same for the evaluation split."})
    max_test_samples: int | None = field(default=None, metadata={"help": "The same for the test split."})
    sample_seed: int = field(default=42, metadata={"help": "Chooses the rows of `max_samples`."})
    caption_choice: str = field(
        default="all",
        metadata={"help": "Captions of an image with several: all, first, or random (another one in each epoch)."},
    )
    choice_answer: str = field(
        default="letter",
        metadata={"help": "What answers a multiple choice: the letter of the right option, or its text."},
    )
    prompt: str = field(
        default="Describe the image.", metadata={"help": "The question that a caption answers in stage 2."}
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Positions of a sequence, image tokens included; what the language model has if not given."},
    )
    truncation: str = field(
        default="truncate_text",
        metadata={
            "help": "What is longer than max_length: truncate_text cuts text from its end, keep_last_turns leaves out "
            "the first turns, drop drops it. Images are never cut."
        },
    )
    supervise: str = field(default="all", metadata={"help": "Learn all answers of a dialogue, or only the last."})
    split_turns: str = field(
        default="none",
        metadata={
            "help": "history makes each answer of a dialogue the last of a sample of its own, with the earlier ones as "
            "context: for templates that write earlier answers otherwise (thoughts, system texts). questions makes "
            "each question with its answers a sample without the turns before it, for independent questions."
        },
    )
    supervise_prompt: bool = field(default=False, metadata={"help": "Learn what the user and the system say as well."})
    on_bad_sample: str = field(
        default="skip", metadata={"help": "A row or image that cannot be read: skip and count it, or error and stop."}
    )
    encode_ahead: bool | None = field(
        default=None,
        metadata={
            "help": "Encode all texts before the first step, and never again; otherwise when a batch is made. On for "
            "up to 20,000 rows and where batches are grouped by length, if not given."
        },
    )
    pad_to_multiple_of: int | None = field(
        default=None, metadata={"help": "Round the length of a batch up: fewer shapes to prepare kernels for."}
    )

    def __post_init__(self):
        self.columns = parse_columns(self.columns)
        for name, choices in (
            ("caption_choice", CAPTION_CHOICES),
            ("choice_answer", CHOICE_ANSWERS),
            ("truncation", TRUNCATIONS),
            ("supervise", SUPERVISE),
            ("split_turns", SPLIT_TURNS),
            ("on_bad_sample", ON_BAD_SAMPLE),
        ):
            if (value := getattr(self, name)) not in choices:
                raise DuetError(f"{name}={value!r}: expected one of {', '.join(choices)}.")
        if self.eval_share is not None and not 0 <= self.eval_share < 1:
            raise DuetError(f"eval_share={self.eval_share}: expected a share from 0 to below 1.")
        for name in ("max_samples", "max_eval_samples", "max_test_samples"):
            if (limit := getattr(self, name)) is not None and limit < 1:
                raise DuetError(f"{name}={limit}: expected 1 or more.")
        if self.sample_seed < 0:
            raise DuetError(f"sample_seed={self.sample_seed}: expected 0 or more.")

    @property
    def held_out_share(self) -> float:
        """The share of the training rows that is held out where no split is named for the evaluation."""
        return self.eval_share if self.eval_share is not None else 0.0 if self.streaming else 0.01

    def sources(self) -> list[SourceSettings]:
        """
        The data sets to learn from: those of `datasets`, or the one that `dataset` names.

        Raises:
            DuetError: none or both are given, or an entry is not as expected.
        """
        if self.datasets is None:
            if self.dataset is None:
                raise DuetError("no data set is named; add --dataset NAME (a Hub name, a folder, a file, or shapes).")
            return [
                SourceSettings(
                    self.dataset, self.dataset_name, self.train_split, self.eval_split, self.dataset_revision,
                    self.image_dir, cast(dict[str, str] | None, self.columns), self.max_samples,
                )
            ]  # fmt: skip
        single = ("dataset", "dataset_name", "dataset_revision", "train_split", "eval_split", "test_split")
        if given := [name for name in single if getattr(self, name) is not None]:
            where = "test_dataset" if given[0] == "test_split" else "the entries of datasets"
            raise DuetError(f"datasets and {given[0]} are both given; say it in {where}.")
        if not isinstance(self.datasets, list) or not self.datasets:
            raise DuetError("datasets: expected a list in a yaml file, as in `datasets: [{path: DATA, weight: 0.7}]`.")
        sources = [self._source(entry, f"datasets[{number}]") for number, entry in enumerate(self.datasets)]
        weights = [source.weight for source in sources]
        if any(w is not None for w in weights) and not all(isinstance(w, (int, float)) and w > 0 for w in weights):
            raise DuetError(f"datasets have the weights {weights}; expected a positive one for each, or none.")
        return sources

    def test_source(self) -> SourceSettings | None:
        """
        The data set whose questions are answered after training: `test_dataset`, or a split of the training data's.

        Raises:
            DuetError: the entry is not as expected.
        """
        if self.test_dataset is not None:
            named = isinstance(self.test_dataset, str)
            source = self._source({"path": self.test_dataset} if named else self.test_dataset, "test_dataset")
            return replace(source, split=source.split or self.test_split, max_samples=self.max_test_samples)
        if self.test_split is not None:
            return replace(self.sources()[0], split=self.test_split, max_samples=self.max_test_samples)
        return None

    def _source(self, entry: Any, place: str) -> "SourceSettings":
        known = [f.name for f in fields(SourceSettings)]
        if not isinstance(entry, dict) or "path" not in entry:
            raise DuetError(f"{place} is {entry!r}; expected {{path: DATA, ...}} in a yaml file.")
        if unknown := [key for key in entry if key not in known]:
            raise DuetError(f"{place} has an unknown key {unknown[0]!r}{suggest(unknown[0], known)}.")
        entry = {"image_dir": self.image_dir, "columns": self.columns, "max_samples": self.max_samples, **entry}
        for key, value in entry.items():
            kinds = {"columns": (str, dict), "max_samples": (int,), "weight": (int, float)}.get(key, (str,))
            if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
                wanted = " or ".join(kind.__name__ for kind in kinds)
                raise DuetError(f"{place} has {key}: {value!r}; expected {wanted}.")
        return SourceSettings(**{**entry, "columns": parse_columns(entry["columns"])})

    def encoding_kwargs(self, asks: bool) -> dict[str, Any]:
        """
        What `encode_dialogue` or, where nothing is asked, `encode_caption` is given.

        Raises:
            DuetError: something about prompts, where there are none.
        """
        if asks and self.split_turns == "history" and (self.supervise != "all" or self.supervise_prompt):
            raise DuetError(
                "split_turns=history makes each answer a last one, which alone is learned; leave out --supervise and "
                "--supervise_prompt."
            )
        if asks:
            return {
                "truncation": self.truncation, "supervise": self.supervise, "supervise_prompt": self.supervise_prompt
            }  # fmt: skip
        if self.supervise != "all" or self.supervise_prompt or self.split_turns != "none":
            raise DuetError(
                "supervise, supervise_prompt and split_turns are about dialogues; stage 1 learns captions alone."
            )
        return {"truncation": self.truncation}


@dataclass
class GenerationArguments:
    """How the trained model answers, in the samples after training and as the saved default."""

    max_new_tokens: int = field(default=64, metadata={"help": "Longest answer."})
    temperature: float | None = field(
        default=None,
        metadata={
            "help": "0 takes the likeliest token; above, it is sampled. If nothing is said of sampling and beams, the "
            "samples are the likeliest tokens, and the saved defaults are those of the language model."
        },
    )
    top_p: float | None = field(
        default=None, metadata={"help": "Sample from the likeliest tokens of this total probability."}
    )
    num_beams: int | None = field(default=None, metadata={"help": "Beams of a beam search."})

    def __post_init__(self):
        for name, fits, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", self.temperature is None or self.temperature >= 0, "0 or more"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "a share above 0 and up to 1"),
            ("num_beams", self.num_beams is None or self.num_beams >= 1, "1 or more"),
        ):
            if not fits:
                raise DuetError(f"{name}={getattr(self, name)}: expected {wanted}.")
        if self.temperature == 0 and self.top_p is not None:
            raise DuetError("top_p is about sampling, and temperature=0 takes the likeliest token; leave one out.")

    def told(self) -> dict[str, Any]:
        """What was said of generation, as settings of a `GenerationConfig`."""
        settings: dict[str, Any] = {"max_new_tokens": self.max_new_tokens}
        if self.temperature is not None or self.top_p is not None:
            settings["do_sample"] = self.temperature != 0
        elif self.num_beams is not None:
            settings["do_sample"] = False
        if self.temperature:
            settings["temperature"] = self.temperature
        for name in ("top_p", "num_beams"):
            if getattr(self, name) is not None:
                settings[name] = getattr(self, name)
        return settings


def suggest(name: str, known: list[str]) -> str:
    """What else may have been meant, as the end of a message."""
    close = difflib.get_close_matches(str(name).split("=")[0], known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
