"""What the speed of training is measured on: pairs of backbones with random weights, images, captions and dialogues.

Nothing is fetched. One state is drawn for each pair and every runner starts from it; texts are encoded once, by Duet's
encoder, so that all learn the same tokens. Needs torch, transformers, accelerate and Pillow.
"""

import io
import json
import os
import random
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageFilter
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    ViTConfig,
)
from transformers.utils import logging

from modeling_vlm import VLMForConditionalGeneration
from modeling_vlm.compose_vlm import composed_config, shape_of
from processing import VLMDataCollator, VLMProcessor
from processing.batching.encoding import Encoder, encode_caption, encode_dialogue
from processing.image_files_vlm import ImagePolicy
from processing.reading.items import Reading
from training_vlm.flops import costs_of, work_of
from training_vlm.learning.tuning import apply_tuning


CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<pad>", "<unk>", "</s>", "<|im_start|>", "<|im_end|>", "<image>", "system", "user", "assistant"]
PHOTOGRAPH = (640, 480)


@dataclass(frozen=True)
class Pair:
    """A vision encoder, a language model, and which features join them; LLaVA reads the same ones."""

    vision: PreTrainedConfig
    text: PreTrainedConfig
    strategy: str
    layer: int | None


def pairs() -> dict[str, Pair]:
    """Name -> pair; a function, because a config is changed by the model that is built from it."""
    siglip = {"vision_use_head": False, "attention_dropout": 0.0}
    gpt2 = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return {
        "small": Pair(
            SiglipVisionConfig(
                hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=64,
                patch_size=8, **siglip,
            ),
            LlamaConfig(
                hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
                num_key_value_heads=2, vocab_size=1024, max_position_embeddings=1024, tie_word_embeddings=True,
            ),
            "full",
            -1,
        ),
        "G": Pair(ViTConfig(image_size=224, patch_size=16), GPT2Config(vocab_size=50257, **gpt2), "cls", None),
        "S": Pair(
            SiglipVisionConfig(
                hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224,
                patch_size=16, **siglip,
            ),
            LlamaConfig(
                hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                num_key_value_heads=3, vocab_size=49152, max_position_embeddings=8192, tie_word_embeddings=True,
            ),
            "full",
            -1,
        ),
    }  # fmt: skip


@dataclass(frozen=True)
class Task:
    """
    What is learned from what.

    Args:
        shape: name of a pair.
        stage: 1 (captions; projector and the last two blocks learn) or 2 (dialogues; projector and all blocks do).
        captions: those of an image, in stage 1.
        images: of an optimiser step.
        steps: that there are data for.
    """

    shape: str
    stage: int
    captions: int
    images: int
    steps: int

    @property
    def batch(self) -> int:
        """Conversations of an optimiser step."""
        return self.images * (self.captions if self.stage == 1 else 1)

    @property
    def learning(self) -> int | None:
        """How many blocks of the language model learn, at its end; `None` for all."""
        return 2 if self.stage == 1 else None


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """One token a word, `w0` and so on, with a ChatML template; `size` entries."""
    words = SPECIAL + [f"w{number}" for number in range(size - len(SPECIAL))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>", "<image>"], chat_template=CHATML,
    )  # fmt: skip


def photograph(rng: random.Random, size: tuple[int, int]) -> bytes:
    """A JPEG with the grain and the size in bytes of a photograph."""
    colour = tuple(rng.randrange(256) for _ in range(3))
    image = Image.effect_noise(size, 60).filter(ImageFilter.GaussianBlur(1.2)).convert("RGB")
    image = Image.blend(image, Image.new("RGB", size, colour), 0.4)
    content = io.BytesIO()
    image.save(content, "JPEG", quality=85)
    return content.getvalue()


class Writer:
    """Texts of a vocabulary, drawn."""

    def __init__(self, rng: random.Random, words: int):
        self.rng, self.words = rng, words

    def says(self, least: int, mean: int, most: int) -> str:
        """So many words, on average `mean`."""
        rng = self.rng
        short = rng.random() < (most - mean) / (most - least)  # the mean of two even halves is then the one asked for
        number = rng.randint(least, mean) if short else rng.randint(mean, most)
        return " ".join(f"w{rng.randrange(self.words)}" for _ in range(number))

    def caption(self) -> str:
        """14 words on average, so that there are 15 tokens with the end."""
        return self.says(8, 14, 24)

    def dialogue(self) -> list[dict[str, str]]:
        """3 to 8 questions with answers, in LLaVA's layout: 180 tokens on average, of which 82 are learned."""
        turns = []
        for index in range(self.rng.randint(3, 8)):
            question = ("<image>\n" if index == 0 else "") + self.says(6, 13, 20)
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": self.says(2, 14, 34)}]
        return turns


def compose(pair: Pair, folder: Path, device: str = "cpu") -> tuple[VLMForConditionalGeneration, VLMProcessor]:
    """
    Model and processor of a pair with random weights, on the spot; LLaVA's config lies in `folder/llava`.

    Args:
        device: where the weights are drawn; elsewhere than on the CPU the pair is not tried.
    """
    torch.manual_seed(0)
    tokenizer = word_tokenizer(pair.text.vocab_size)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(pair.text, name, getattr(tokenizer, name))
    layout = {"vision_feature_select_strategy": pair.strategy, "vision_feature_layer": pair.layer}
    if pair.layer is not None:
        llava = LlavaConfig(
            vision_config=pair.vision.to_dict(), text_config=pair.text.to_dict(),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            image_seq_length=(pair.vision.image_size // pair.vision.patch_size) ** 2,
            tie_word_embeddings=pair.text.tie_word_embeddings, **layout,
        )  # fmt: skip
        llava.save_pretrained(folder / "llava")
    if device == "cpu":
        model = VLMForConditionalGeneration.from_backbones(pair.vision, pair.text, tokenizer=tokenizer, **layout)
    else:
        config = composed_config(pair.vision, pair.text, tokenizer=tokenizer, **layout)
        shape_of(VLMForConditionalGeneration, config)
        with torch.device(device):
            model = VLMForConditionalGeneration(config).cpu()
    processor = VLMProcessor.from_backbones(pair.vision, pair.text, model.config, tokenizer=tokenizer)
    return model, processor


def make_rows(task: Task, folder: Path, words: int, side: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """
    Images, and the rows that show them.

    The images of the first step are as large as the encoder sees them, so that no resizing differs between runners.

    Args:
        words: of the vocabulary.
        side: pixels of the encoder.

    Returns:
        Rows with one file an image, and rows in which each text has a file of its own, so that no image is known to
        be shown twice.
    """
    rng = random.Random(0)
    writer, together, apart = Writer(rng, words), [], []
    for number in range(task.images * task.steps):
        name = f"{number}.jpg"
        size = (side, side) if number < task.images else PHOTOGRAPH
        (folder / name).write_bytes(photograph(rng, size))
        if task.stage == 2:
            together.append({"image": name, "conversations": writer.dialogue()})
            apart.append(together[-1])
            continue
        captions = [writer.caption() for _ in range(task.captions)]
        together.append({"image": name, "captions": captions})
        for copy, caption in enumerate(captions):
            os.link(folder / name, folder / f"{number}_{copy}.jpg")
            apart.append({"image": f"{number}_{copy}.jpg", "caption": caption})
    return together, apart


def encode_rows(task: Task, rows: list[dict[str, Any]], folder: Path, processor: VLMProcessor) -> list[dict[str, Any]]:
    """The conversations of rows as ids and labels, each with one id an image; images stay paths."""
    encoder = Encoder(processor, encode_caption if task.stage == 1 else encode_dialogue)
    reading, encoded = Reading(source="rows", images=ImagePolicy(own_paths=True)), []
    for number, row in enumerate(rows):
        for item in reading.items(row, number):
            kept = encoder(item)
            encoded.append(
                {"image": str(folder / row["image"]), "input_ids": kept["input_ids"], "labels": kept["labels"]}
            )
    return encoded


def make(task: Task, folder: Path) -> dict[str, Any]:
    """
    All that the runners of a task read, in `folder`: `model`, `llava`, `together.jsonl`, `apart.jsonl`, `encoded.json`.

    Returns:
        What was made, in numbers: tokens and supervised tokens of each text, step by step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pair = pairs()[task.shape]
    model, processor = compose(pair, folder)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    if (folder / "llava").is_dir():
        os.link(folder / "model" / "model.safetensors", folder / "llava" / "model.safetensors")
    together, apart = make_rows(task, folder, pair.text.vocab_size - len(SPECIAL), pair.vision.image_size)
    for name, rows in (("together", together), ("apart", apart)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    encoded = encode_rows(task, together, folder, processor)
    (folder / "encoded.json").write_text(json.dumps(encoded))
    apply_tuning(model, "frozen", f"last:{task.learning or pair.text.num_hidden_layers}")
    return {"flops": necessary(model, processor, encoded, task.batch)}


def necessary(
    model: VLMForConditionalGeneration, processor: VLMProcessor, encoded: list[dict[str, Any]], batch: int
) -> list[dict[str, int]]:
    """What each step has to compute at the least, in FLOP: all of it (`whole`), and with features that are `cached`."""
    costs, steps = costs_of(model), []
    collate = VLMDataCollator(processor, padding_free=True, share_prefix=True)
    for start in range(0, len(encoded), batch):
        row = collate([{**item, "images": [item["image"]]} for item in encoded[start : start + batch]])
        work = work_of(row, (), int((row["shift_labels"] != -100).sum()), costs.windows)
        steps.append({"whole": costs.of(work), "cached": costs.of(replace(work, encoded=0))})
    return steps


def make_and_tell(connection: Connection, task: Task, folder: Path) -> None:
    """`make`, in a process of its own; what it prints is of no interest but where it fails."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    connection.send(make(task, folder))
