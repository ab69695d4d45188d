"""The two stages: each is one object, and whatever differs between them is asked of it.

Alignment learns captions, instruction tuning learns answers. The section of a yaml, the encoder, the way in which a
model of a stage is asked, and what comes after it are the stage's own.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from processing.batching.encoding import Encode, Encoder, encode_caption, encode_dialogue
from processing.processing_vlm import VLMProcessor


if TYPE_CHECKING:
    from .arguments import DataArguments


@dataclass(frozen=True)
class Stage:
    """
    What makes a stage what it is.

    Args:
        section: what the stage is called in a yaml.
        number: 1 or 2.
        name: what it is called for a reader.
        encode: how a conversation becomes ids and labels.
        asks: whether a caption answers a question.
        ask: how its model is asked about an image, in Python.
        next: what comes after it: a sentence, a module, and what it is given, with a place for the model's folder.
    """

    section: str
    number: int
    name: str
    encode: Encode
    asks: bool
    ask: str
    next: tuple[str, str, str]

    def encoder(self, processor: VLMProcessor, data_args: "DataArguments", max_length: int) -> Encoder:
        """How conversations are encoded, with what the arguments say about it; `max_length` is the model's to say."""
        return Encoder(processor, self.encode, max_length, **data_args.encoding_kwargs(self.asks))


PRETRAIN = Stage(
    section="pretrain",
    number=1,
    name="alignment",
    encode=encode_caption,
    asks=False,
    ask="""inputs = processor(images=Image.open("photo.jpg"), text="<image>", return_tensors="pt")""",
    next=("Next, teach it to answer", "train_sft", "--model {folder} --dataset DIALOGUES --output_dir FOLDER"),
)
SFT = Stage(
    section="sft",
    number=2,
    name="instruction tuning",
    encode=encode_dialogue,
    asks=True,
    ask="""messages = [{"role": "user", "content": [
    {"type": "image", "image": Image.open("photo.jpg")}, {"type": "text", "text": "What is in the picture?"}]}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")""",
    next=("Next, ask it about an image", "inference_vlm.ask", '{folder} IMAGE "What is in the picture?"'),
)
STAGES = {stage.section: stage for stage in (PRETRAIN, SFT)}


__all__ = ["PRETRAIN", "SFT", "STAGES", "Stage"]
