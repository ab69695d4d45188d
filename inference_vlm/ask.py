"""Ask a model about an image from the shell; the answer appears as it is written.

    python -m inference_vlm.ask outputs/shapes/sft picture.png "Which colour is the circle?"

Without a question the image is captioned, which is all that a model of stage 1 can do.
"""

import argparse
import sys
from typing import cast

from transformers import GenerationMixin, TextStreamer
from transformers.utils import logging

from processing.data_error_vlm import DuetError
from processing.image_files_vlm import load_image

from .answering import greedy, load


MAX_NEW_TOKENS = 64


class _Answer(TextStreamer):
    """Prints the answer alone, without the blank that many templates have before it."""

    started = False

    def on_finalized_text(self, text: str, stream_end: bool = False):
        text = text if self.started else text.lstrip()
        self.started = self.started or bool(text)
        super().on_finalized_text(text, stream_end)


def ask(name: str, image: str, question: str | None = None, **generate) -> None:
    """
    Print a model's answer.

    Args:
        name: folder or Hub name of a composed model; its own code is run.
        image: an image file.
        question: what to ask; a caption is written where it is missing.
        **generate: arguments of `model.generate`, over those saved with the model.
    """
    picture = load_image(image)
    logging.disable_progress_bar()
    model, processor = load(name)
    if generate.get("do_sample") is False:  # and no penalty that the language model came with
        model.generation_config = greedy(model, processor, model.generation_config.max_new_tokens or MAX_NEW_TOKENS)
    if question is None:
        inputs = processor(images=picture, text=processor.image_token, return_tensors="pt")
    else:
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
    streamer = _Answer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    cast(GenerationMixin, model).generate(**inputs.to(model.device, model.dtype), streamer=streamer, **generate)


def main(argv: list[str] | None = None) -> int:
    """The command line; 1 where the model or the image cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m inference_vlm.ask", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or Hub name of a model trained with Duet; its own code is run")
    parser.add_argument("image", help="an image file")
    parser.add_argument("question", nargs="?", help="what to ask; without it the image is captioned")
    parser.add_argument("--max_new_tokens", type=int, help="longest answer")
    parser.add_argument("--temperature", type=float, help="0: the likeliest answer; above: sampled")
    args = parser.parse_args(argv)
    generate: dict[str, bool | float] = {}
    if args.max_new_tokens is not None:
        generate["max_new_tokens"] = args.max_new_tokens
    if args.temperature is not None:
        generate["do_sample"] = args.temperature > 0
        if args.temperature > 0:
            generate["temperature"] = args.temperature
    try:
        for option, least in (("max_new_tokens", 1), ("temperature", 0)):
            if (value := getattr(args, option)) is not None and not value >= least:
                raise DuetError(f"{option}={value}: expected {least} or more.")
        ask(args.model, args.image, args.question, **generate)
    except Exception as error:
        if not getattr(error, "is_duet_error", False):
            raise  # what is our own mistake keeps its stack trace
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
