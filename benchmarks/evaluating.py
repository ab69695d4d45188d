"""What an evaluation that asks takes: thousands of questions about stored photographs, its time and its memory.

    python benchmarks/evaluating.py                        # 5,000 questions about 1,000 images, each encoded once
    python benchmarks/evaluating.py --questions 1000 --each # and once more with every question's image encoded for it

A small encoder and a small language model with random weights; every answer has the most tokens that it may, so that
what is measured does not depend on what is said. Memory is what the process holds of its own, beyond what it held when
all questions were known.
"""

import argparse
import itertools
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from loading import WORDS, make_processor, own_memory
from speed_pairs import photograph
from speed_report import commit, machine
from transformers import LlamaConfig, ViTConfig

from evaluation_vlm import asking
from inference_vlm import answering, encoded_images
from inference_vlm.answering import greedy
from modeling_vlm import VLMForConditionalGeneration
from processing import VLMProcessor
from processing.batching.dataset import ConversationDataset, Reading
from processing.batching.encoding import Encoder, encode_dialogue


SIDE, SIZE = 112, (320, 240)


def make_questions(folder: Path, number: int, images: int) -> ConversationDataset:
    """Rows with a stored JPEG and a question each, those about an image one after the other."""
    rng = random.Random(0)
    stored = [{"bytes": photograph(rng, SIZE), "path": None} for _ in range(images)]

    def rows():
        for index in range(number):
            question = " ".join(rng.choices(WORDS, k=rng.randint(4, 16)))
            yield {"image": stored[index * images // number], "question": question, "answer": "a cat"}

    features = {"image": datasets.Image(decode=False), "question": datasets.Value("string")}
    features = datasets.Features(features | {"answer": datasets.Value("string")})
    made = datasets.Dataset.from_generator(rows, features, cache_dir=str(folder / "made"))
    return ConversationDataset(made, Reading(source="photographs"))


def compose() -> tuple[VLMForConditionalGeneration, VLMProcessor]:
    """A small model, and its processor."""
    processor = make_processor(SIDE)
    sizes = {"num_attention_heads": 4, "num_hidden_layers": 4}
    vision = ViTConfig(image_size=SIDE, patch_size=16, hidden_size=256, intermediate_size=1024, **sizes)
    text = LlamaConfig(hidden_size=128, intermediate_size=384, vocab_size=512, max_position_embeddings=512, **sizes)
    torch.manual_seed(0)
    model = VLMForConditionalGeneration.from_backbones(vision, text, tokenizer=processor.tokenizer)
    return model.eval(), VLMProcessor.from_backbones(vision, None, model.config, tokenizer=processor.tokenizer)


def measured(what: Callable[[], Any]) -> tuple[Any, float, float, float]:
    """What a call gives, its CPU and wall seconds, and the MiB that memory grew by at the most."""
    before, most = own_memory("self"), 0
    give_up = encoded_images.EncodedImages.give_up

    def watched(self):
        nonlocal most
        most = max(most, own_memory("self"))
        give_up(self)

    encoded_images.EncodedImages.give_up = watched
    cpu, wall = time.process_time(), time.perf_counter()
    try:
        found = what()
    finally:
        encoded_images.EncodedImages.give_up = give_up
    most = max(most, own_memory("self"))
    return found, time.process_time() - cpu, time.perf_counter() - wall, (most - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=5_000)
    parser.add_argument("--images", type=int, help="a fifth of the questions if not given")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=8, help="of an answer")
    parser.add_argument("--each", action="store_true", help="encode the image anew for every question as well")
    args = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    model, processor = compose()
    settings = greedy(model, processor, args.tokens)
    settings.min_new_tokens = args.tokens
    print(f"{machine()} ({commit()}), one thread, batches of {args.batch_size}, {args.tokens} tokens an answer")
    with tempfile.TemporaryDirectory() as folder:
        images = args.images or max(1, args.questions // 5)
        dataset = make_questions(Path(folder), args.questions, images)
        (questions, cpu, wall, grown) = measured(
            lambda: asking.questions_of(dataset, Encoder(processor, encode_dialogue, 256))
        )
        about = f"{len(questions):,} questions about {images:,} images"
        print(f"{about} found: {cpu:.1f} CPU s, {wall:.1f} s, {grown:.0f} MiB", flush=True)
        own_name, counter = asking.name_of, itertools.count()
        for name, name_of in (("each image encoded once", own_name), ("for every question", lambda _: next(counter))):
            if name_of is not own_name and not args.each:
                break
            answering.name_of = name_of
            for part in sorted({len(questions) // 5, len(questions)}):
                answers, cpu, wall, grown = measured(
                    lambda part=part: asking.answer_questions(
                        model, processor, questions[:part], args.batch_size, settings
                    )
                )
                print(
                    f"{name:<28}{len(answers):>7,} answers{cpu:>9.1f} CPU s{1e3 * cpu / part:>8.1f} ms each"
                    f"{wall:>9.1f} s{grown:>7.0f} MiB more",
                    flush=True,
                )


if __name__ == "__main__":
    main()
