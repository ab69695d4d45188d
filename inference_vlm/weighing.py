"""How likely a model finds each of several texts as the answer to a prompt.

What is special: it happens while the prompts are answered (see `answering`), with the features of their images that are
there already. A text is weighed by the mean log-likelihood of its tokens, its end token included: it is likeliest whose
loss, if it were learned, would be least. So a long text has no disadvantage.
"""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers.modeling_outputs import BaseModelOutputWithPooling

from processing.batching.encoding import IGNORE, encode_dialogue
from processing.processing_vlm import VLMProcessor


def answer_ids(processor: VLMProcessor, text: str) -> list[int]:
    """The ids of a text as the answer to a question: with what a chat template puts before it, and its end token."""
    messages = [
        {"role": role, "content": [{"type": "text", "text": said}]}
        for role, said in (("user", "?"), ("assistant", text))
    ]
    return [label for label in encode_dialogue(processor, {"messages": messages})["labels"] if label != IGNORE]


class Weighing:
    """
    Weighs texts for prompts, as the prompts are answered.

    Args:
        options: for each prompt the ids of its texts, none where nothing is to be weighed.
        batch_size: texts that are weighed at a time.

    Attributes:
        found (`dict[int, tuple[float, ...]]`): number of a prompt -> mean log-likelihoods, in the order of its texts;
            `-inf` for one that there is no room for. A prompt that cannot be asked is not in it.
    """

    def __init__(self, options: Sequence[Sequence[list[int]]], batch_size: int):
        self.options, self.batch_size = options, batch_size
        self.found: dict[int, tuple[float, ...]] = {}

    def weigh(
        self,
        model: Any,
        processor: VLMProcessor,
        indices: Sequence[int],
        rows: Sequence[list[int]],
        features: Sequence[list[torch.Tensor]],
        limit: int | None,
        in_step: bool,
    ) -> None:
        """
        Weigh the texts of some prompts.

        Args:
            indices: the numbers of the prompts.
            rows: their ids, with each image expanded.
            features: those of their images.
            limit: positions that there are.
            in_step: other processes do the same with prompts of theirs.
        """
        asked = [
            (place, number, text)
            for place, index in enumerate(indices)
            for number, text in enumerate(self.options[index])
            if limit is None or len(rows[place]) + len(text) <= limit
        ]
        weights = {index: [-float("inf")] * len(self.options[index]) for index in indices if self.options[index]}
        parts = [asked[start : start + self.batch_size] for start in range(0, len(asked), self.batch_size)]
        calls = max(gather_object([len(parts)])) if in_step else len(parts)
        for part in parts:
            found = _means(
                model,
                processor.tokenizer.pad_token_id,
                [(rows[place], text) for place, _, text in part],
                [of_one for place, _, _ in part for of_one in features[place]],
            )
            for (place, number, _), value in zip(part, found):
                weights[indices[place]][number] = value
        for _ in range(calls - len(parts)):
            _means(model, processor.tokenizer.pad_token_id, [([processor.tokenizer.eos_token_id] * 2, [0])], [])
        self.found |= {index: tuple(values) for index, values in weights.items()}


def _means(model, pad, rows, features) -> list[float]:
    """The mean log-likelihood of the second part of each row, after its first."""
    length, device = max(len(prompt) + len(text) for prompt, text in rows), model.device
    ids = torch.full((len(rows), length), pad)
    there, predicts = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, text) in enumerate(rows):
        end = len(prompt) + len(text)
        ids[row, :end] = torch.tensor([*prompt, *text])
        there[row, :end] = 1
        predicts[row, len(prompt) - 1 : end - 1] = True
    inputs: dict[str, Any] = {"input_ids": ids.to(device), "attention_mask": there.to(device), "use_cache": False}
    if features:
        inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=features)}
    logits = model(**inputs, logits_to_keep=predicts.to(device)).logits.float()
    targets = torch.tensor([id for _, text in rows for id in text], device=device)
    found = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0].cpu()
    return [part.mean().item() for part in found.split([len(text) for _, text in rows])]


__all__ = ["Weighing", "answer_ids"]
