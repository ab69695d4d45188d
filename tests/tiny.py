"""Tiny random backbones and tokenizers, made on the spot and saved in Hub format: what every test composes.

Two pairs stand for all: ViT + GPT-2 (CLS token, pooler, learned positions, tied head, no pad token, no chat template)
and SigLIP + Llama (no CLS token, composite checkpoint, untied head, a text-only chat template).
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from modeling_vlm import VLMForConditionalGeneration
from processing import VLMDataCollator, VLMProcessor


CORPUS = [
    "what is in the picture? a red circle is at the top left.",
    "User: which colour has the square\nAssistant: it is blue",
    "how many objects are there? there are two objects and a large green triangle",
    "describe the image. a small cat sits on a mat and looks at the sun.",
] * 30

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level_tokenizer(vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """Like GPT-2's: byte-level BPE, one special token that is bos, eos and unk, no pad token, no template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, unk_token=end)


def unigram_tokenizer(prepend_scheme: str = "always") -> PreTrainedTokenizerFast:
    """Like SentencePiece models: unigram, a blank before every text, bos added, a pad token of its own."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def wordpiece_tokenizer() -> PreTrainedTokenizerFast:
    """Like BERT's: lower-cased WordPiece, special tokens on both sides of every text."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        eos_token="[SEP]", bos_token="[CLS]",
    )  # fmt: skip


def with_chatml(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A text-only ChatML template and its two special tokens."""
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = CHATML
    return tokenizer


def save_vit(folder: Path) -> Path:
    """A classifier checkpoint, as google/vit-base-patch16-224 is one: it has no pooler."""
    torch.manual_seed(1)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8,
        num_labels=5,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def save_siglip(folder: Path) -> Path:
    """A composite checkpoint with a text half, of which the vision half is wanted."""
    torch.manual_seed(2)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    config = SiglipConfig(
        text_config=SiglipTextConfig(vocab_size=50, **sizes).to_dict(),
        vision_config=SiglipVisionConfig(image_size=32, patch_size=8, **sizes).to_dict(),
    )
    SiglipModel(config).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def save_gpt2(folder: Path) -> Path:
    """Learned positions (128), a tied head, a vocabulary without room for an image token."""
    torch.manual_seed(3)
    tokenizer = byte_level_tokenizer()
    config = GPT2Config(
        n_embd=32, n_layer=3, n_head=4, n_positions=128, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_llama(folder: Path) -> Path:
    """Rotary positions, an untied head, a text-only ChatML template, spare rows in the embedding."""
    torch.manual_seed(4)
    tokenizer = with_chatml(unigram_tokenizer())
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=256, max_position_embeddings=256, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


PAIRS = {"vit-gpt2": (save_vit, save_gpt2, "cls"), "siglip-llama": (save_siglip, save_llama, "patch")}


def compose(vision: Path, text: Path, strategy: str = "patch", **options):
    """Model and processor of two saved backbones."""
    torch.manual_seed(0)
    model = VLMForConditionalGeneration.from_backbones(
        str(vision), str(text), vision_feature_select_strategy=strategy, **options
    )
    processor = VLMProcessor.from_backbones(str(vision), str(text), model.config)
    processor.update_generation_config(model.generation_config)
    return model, processor


def dialogue(question: str, answer: str, *images, more: tuple[tuple[str, str], ...] = ()) -> dict:
    """A conversation about images, which come first; `more` are further questions and answers."""
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}, _says("assistant", answer)]
    for asked, answered in more:
        messages += [_says("user", asked), _says("assistant", answered)]
    return {"images": list(images), "messages": messages}


def _says(role, text):
    return {"role": role, "content": [{"type": "text", "text": text}]}


def ragged_dialogues(image) -> list[dict]:
    """Eight conversations with no to three images, one to three turns and answers of very different length."""
    long = "a large green triangle is at the top left and a small red circle sits on the mat below it"
    return [
        dialogue("what is it?", "a cat", image(0)),
        dialogue("how many?", "two", image(1), image(2)),
        dialogue("describe the picture in many words.", long, image(3), more=(("which colour?", "red"),)),
        dialogue("no picture here. which colour has the sun?", "blue"),
        dialogue("what?", "it is blue and it looks at the sun", image(4)),
        dialogue("is there a square?", "no", more=(("and a cat?", "yes"), ("and a mat?", long))),
        dialogue("left of it?", "the mat", image(5), image(6), image(7)),
        dialogue("and?", long, image(8)),
    ]


def collate(processor: VLMProcessor, conversations: list[dict]) -> dict[str, torch.Tensor]:
    """The collator's batch."""
    return VLMDataCollator(processor)(conversations)
