"""What the recipes name, as far as it is public: shapes of backbones and rows of data sets, whole or small.

`python -m tests.recipes [RECIPE ...]` estimates recipes with the whole shapes and writes the table of
`docs/recipes.md`; its prose is left as it is.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
import transformers
import yaml
from PIL import Image
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from tests import tiny
from training_vlm.estimate import settled, tokens_of
from training_vlm.learning.originals import shown_size
from training_vlm.settings import RECIPES, stages_of
from training_vlm.sketch import Sketch
from training_vlm.stages import PRETRAIN, SFT, STAGES, Stage


PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
HEADER = """\
| recipe | stage | GPUs | learns | batch | memory of each GPU | hours | published |
|---|---|---|---|---|---|---|---|"""
BEGIN, END = "<!-- table: python -m tests.recipes -->", "<!-- end of table -->"

VIT = {"image_size": 224, "patch_size": 16}
SIGLIP = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
SO400M = {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "intermediate_size": 4304}
LLAMA = {"vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True}
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}

# Hub name -> kind of image processor, class of the checkpoint, class and settings of its vision half.
ENCODERS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "google/vit-base-patch16-224": ("vit", "ViTModel", "vit", VIT),
    "google/vit-base-patch16-224-in21k": ("vit", "ViTModel", "vit", VIT),
    "google/siglip-base-patch16-224": ("siglip", "SiglipVisionModel", "siglip_vision_model", {**SIGLIP, **VIT}),
    "google/siglip-base-patch16-512": (
        "siglip", "SiglipVisionModel", "siglip_vision_model", {**SIGLIP, "patch_size": 16, "image_size": 512}
    ),
    "google/siglip-so400m-patch14-384": (
        "siglip", "SiglipVisionModel", "siglip_vision_model", {**SO400M, "patch_size": 14, "image_size": 384}
    ),
    "openai/clip-vit-large-patch14-336": (
        "clip", "CLIPVisionModel", "clip_vision_model",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
         "patch_size": 14, "image_size": 336, "projection_dim": 768},
    ),
}  # fmt: skip
# Hub name -> tokenizer, kind and settings.
LANGUAGE_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "openai-community/gpt2": ("byte-level", "gpt2", IDS),
    "distilbert/distilgpt2": ("byte-level", "gpt2", {**IDS, "n_layer": 6}),
    "HuggingFaceTB/SmolLM2-135M": (
        "byte-level", "llama",
        {**LLAMA, **IDS, "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
         "num_key_value_heads": 3, "intermediate_size": 1536},
    ),
    "HuggingFaceTB/SmolLM2-360M-Instruct": (
        "chatml", "llama",
        {**LLAMA, **IDS, "hidden_size": 960, "num_hidden_layers": 32, "num_attention_heads": 15,
         "num_key_value_heads": 5, "intermediate_size": 2560},
    ),
    "microsoft/phi-2": (
        "byte-level", "phi",
        {**IDS, "vocab_size": 51200, "hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32,
         "intermediate_size": 10240, "max_position_embeddings": 2048, "partial_rotary_factor": 0.4},
    ),
    "lmsys/vicuna-7b-v1.5": (
        "unigram-always", "llama",
        {"vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
         "intermediate_size": 11008, "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2,
         "pad_token_id": 0},
    ),
}  # fmt: skip
LAYERS = {"num_hidden_layers": 3, "n_layer": 2}
NARROWER = 8  # times, in the small shapes: every width of a published model is a multiple of it


class Device(NamedTuple):
    """A graphics card, with the peak of its 16 bit products that accumulate in 32 bits, in TFLOP/s."""

    name: str
    peak: float


A100, H100, RTX4090 = Device("A100", 312), Device("H100", 989), Device("RTX 4090", 165)
UTILISATION = 0.4


class Run(NamedTuple):
    """
    What is assumed of a stage of a recipe.

    Args:
        devices: how many take a step together.
        samples: conversations of the data set.
        text: tokens of text beside an image, as `--tokens_per_sample`.
        sharded: whether weights, gradients and optimizer are divided among the devices.
        published: what its authors say of its duration.
    """

    device: Device
    devices: int
    samples: int
    text: str
    sharded: bool = False
    published: str = ""


CAPTIONS, MIX, CAULDRON, DOCMATIX = 558_128, 665_298, 1_700_000, 1_270_000
RUNS: dict[tuple[str, Stage], Run] = {
    ("llava_15_7b", PRETRAIN): Run(A100, 8, CAPTIONS, "20", published="3.5"),
    ("llava_15_7b", SFT): Run(A100, 8, MIX, "250/125", sharded=True, published="10"),
    ("llava_15_7b_lora", PRETRAIN): Run(A100, 8, CAPTIONS, "20", published="3.5"),
    ("llava_15_7b_lora", SFT): Run(A100, 8, MIX, "250/125"),
    ("llava_15_7b_qlora_24gb", PRETRAIN): Run(RTX4090, 1, CAPTIONS, "20"),
    ("llava_15_7b_qlora_24gb", SFT): Run(RTX4090, 1, MIX, "250/125"),
    ("tinyllava_3b", PRETRAIN): Run(A100, 4, CAPTIONS, "20"),
    ("tinyllava_3b", SFT): Run(A100, 4, MIX, "250/125", sharded=True),
    ("nanovlm_222m", SFT): Run(H100, 1, CAULDRON, "60/20", published="6"),
    ("smolvlm_500m", SFT): Run(H100, 8, CAULDRON + DOCMATIX, "60/20"),
    ("coco_vit_gpt2", PRETRAIN): Run(RTX4090, 1, 591_753, "14"),
    ("flickr30k_vit_distilgpt2", SFT): Run(RTX4090, 1, 100, "50/16"),
}


# --- stand-ins


def config_of(kind: str, settings: dict[str, Any], small: bool) -> PreTrainedConfig:
    """A config of published settings, or of a model an eighth as wide, with a few layers and a few hundred words."""
    config = CONFIG_MAPPING[kind](**settings)
    if not small:
        return config
    sizes = ("hidden_size", "intermediate_size", "projection_dim", "n_embd")
    given = config.to_dict()
    less = {name: given[name] // NARROWER for name in sizes if name in given}
    less |= {name: number for name, number in LAYERS.items() if name in given}
    less |= {"vocab_size": 512} if "vocab_size" in given else {}
    return CONFIG_MAPPING[kind](**{**settings, **less})


def save_encoder(name: str, folder: Path, small: bool) -> Path:
    """The folder of an encoder; without weights where it is whole."""
    processor, model, kind, settings = ENCODERS[name]
    config = config_of(kind, settings, small)
    _save(getattr(transformers, model), config, folder, small)
    tiny.IMAGE_PROCESSORS[processor](config.image_size, config.image_size).save_pretrained(folder)
    return folder


def save_language_model(name: str, folder: Path, small: bool) -> Path:
    """The folder of a language model, with a small tokenizer; without weights where it is whole."""
    tokenizer, kind, settings = LANGUAGE_MODELS[name]
    config = config_of(kind, settings, small)
    _save(AutoModelForCausalLM, config, folder, small)
    made = tiny.with_chatml(tiny.byte_level_tokenizer()) if tokenizer == "chatml" else tiny.TOKENIZERS[tokenizer]()
    made.save_pretrained(folder)
    return folder


def _save(kind, config, folder, small):
    if not small:
        config.save_pretrained(folder)
        return
    torch.manual_seed(0)
    make = kind.from_config if hasattr(kind, "from_config") else kind
    make(config).save_pretrained(folder)


def save_rows(name: str, folder: Path, configuration: str | None) -> tuple[Path, Path]:
    """Rows of a data set as it has them, and the folder of its images."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [f"{number}.jpg" for number in range(4)]
    for number, picture in enumerate(pictures):
        size = (640, 480) if number else (1024, 1024)
        Image.new("RGB", size, (60 * number, 90, 40)).save(folder / picture)
    said = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A red circle."}]
    if name == "coco":
        (folder / "annotations").mkdir()
        (folder / "train2017").mkdir()
        for picture in pictures:
            shutil.move(folder / picture, folder / "train2017" / picture)
        images = [{"id": number, "file_name": picture} for number, picture in enumerate(pictures)]
        captions = [{"image_id": number, "caption": f"a cat {n}"} for number in range(4) for n in range(5)]
        (folder / "annotations" / "captions_train2017.json").write_text(
            json.dumps({"images": images, "annotations": captions})
        )
        return folder, folder / "train2017"
    if name == "nlphuji/flickr30k":
        rows = {"image": [str(folder / picture) for picture in pictures], "caption": [["a cat", "a mat"]] * 4}
        _parquet(rows, folder / "test-0000.parquet", image=True)
        return folder, folder
    if name.startswith("HuggingFaceM4/"):  # the_cauldron and Docmatix
        texts = [[{"user": "What is it?", "assistant": "A red circle.", "source": configuration or ""}] * 2] * 4
        rows = {"images": [[str(folder / picture)] for picture in pictures], "texts": texts}
        _parquet(rows, folder / "train-0000.parquet")
        return folder, folder
    file = folder / Path(name).name
    if file.name.startswith("blip_laion_cc_sbu"):
        rows = [{"id": str(n), "image": picture, "conversations": said} for n, picture in enumerate(pictures)]
    else:  # LLaVA's mix: dialogues of several turns, and some without an image
        more = [*said, {"from": "human", "value": "How many?"}, {"from": "gpt", "value": "Two."}]
        rows = [{"id": str(n), "image": picture, "conversations": more} for n, picture in enumerate(pictures)]
        rows.append({"id": "text", "model": "", "conversations": [{**more[2]}, {**more[3]}]})
    file.write_text(json.dumps(rows))
    return file, folder


def _parquet(rows: dict[str, list], file: Path, image: bool = False) -> None:
    one = datasets.Image()
    features = {"image": one} if image else {"images": [one]}
    made = datasets.Dataset.from_dict(rows)
    for column, feature in features.items():
        made = made.cast_column(column, feature)
    made.to_parquet(file)


def stand_in(recipe: str, folder: Path, small: bool = True) -> Path:
    """
    The recipe with folders of stand-ins in the places of what it names; all other settings are its own.

    Args:
        small: models that can be trained, and rows; else whole shapes, and no data.
    """
    settings = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8"))
    sections = [settings, *(settings[name] for name in STAGES if name in settings)]
    made: dict[str, Path] = {}
    for section in sections:
        for option, save in (("vision_model", save_encoder), ("text_model", save_language_model)):
            if isinstance(name := section.get(option), str):
                place = folder / name.replace("/", "--")
                section[option] = str(made.setdefault(name, place) if name in made else save(name, place, small))
                made[name] = place
        for option in ("output_dir", "model"):
            if option in section:
                section[option] = str(folder / section[option])
        if small and section.get("dataset", "shapes") != "shapes":
            place, images = save_rows(section["dataset"], folder / f"data-{len(list(folder.iterdir()))}", None)
            section["dataset"] = str(place)
            section.pop("dataset_revision", None)
            if "image_dir" in section:
                section["image_dir"] = str(images)
        if small:
            for number, entry in enumerate(section.get("datasets", ())):
                place, _ = save_rows(entry["path"], folder / f"data-{number}", entry.pop("name", None))
                entry["path"] = str(place)
    file = folder / f"{recipe}.yaml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return file


# --- the page


def sketched(recipe: str, stage: Stage, folder: Path, samples: int | None = None) -> Sketch:
    """A stage of a recipe with the whole shapes, as the estimate sees it; with fewer rows where so many are named."""
    run, file = RUNS[recipe, stage], stand_in(recipe, folder, small=False)
    arguments = settled(stage, ["--config", str(file)])
    maker = settled(PRETRAIN, ["--config", str(file)]) if stage is SFT and PRETRAIN in stages_of(file) else None
    return Sketch(stage, arguments, maker, tokens_of(run.text), samples or run.samples, run.devices)


def row_of(recipe: str, stage: Stage, folder: Path) -> str:
    """The line of the page for a stage of a recipe."""
    run, sketch = RUNS[recipe, stage], sketched(recipe, stage, folder)
    learned = sum(parameter.numel() for parameter in sketch.model.parameters() if parameter.requires_grad)
    peak = sketch.rehearsed.peak
    divided = sum(peak[kind] for kind in ("weights", "gradients", "optimizer")) if run.sharded else 0
    memory = shown_size(peak.total() - divided + divided // run.devices)
    if run.sharded:
        memory += f", sharded; {shown_size(peak.total())} on one"
    hours = sketch.flops / (run.device.peak * 1e12 * UTILISATION * run.devices) / 3600
    args = sketch.arguments.training
    together = args.per_device_train_batch_size * args.gradient_accumulation_steps * run.devices
    told = f"{hours:,.2g}" if hours > 0.01 else "below 0.01"
    cells = [
        f"{run.devices} x {run.device.name}", f"{learned / 1e6:,.4g} M", f"{together:,}", memory, told, run.published,
    ]  # fmt: skip
    return head_of(recipe, stage) + " | ".join(cells) + " |"


def head_of(recipe: str, stage: Stage) -> str:
    """With what the line of the page begins."""
    return f"| [{recipe}](../recipes/{recipe}.yaml) | {stage.number} | "


def main(argv: list[str] | None = None) -> None:
    """Estimate the recipes that are named, or all, and write their lines of the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("recipes", nargs="*", help="of which the lines are written anew; all if none is named")
    named = parser.parse_args(argv).recipes
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    table, _, after = rest.partition(END)
    lines = HEADER.splitlines()
    for recipe, stage in RUNS:
        found = [line for line in table.splitlines() if line.startswith(head_of(recipe, stage))]
        if not found or not named or recipe in named:
            with tempfile.TemporaryDirectory() as folder:
                found = [row_of(recipe, stage, Path(folder))]
            print(found[0], flush=True)
        lines += found
    page = "\n".join([BEGIN, "", *lines, "", END])
    PAGE.write_text(f"{before}{page}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
