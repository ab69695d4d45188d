"""A tokenizer for a language model that starts from scratch: byte-level BPE, trained on the training texts."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .data_error_vlm import DuetError


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """
    Train a tokenizer that can spell any text, with `</s>` as end and `<pad>` as padding.

    Args:
        texts: what the language model will read and write.
        vocab_size: entries at most, special tokens included.
        max_length: positions that the language model has, saved as `model_max_length`.

    Raises:
        DuetError: fewer entries than there are bytes.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "</s>"]
    if vocab_size < len(alphabet) + len(special):
        raise DuetError(
            f"a vocabulary of {vocab_size} has no room for the {len(alphabet)} bytes and {len(special)} special "
            "tokens; set a larger vocab_size in text_model."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", model_max_length=max_length
    )
