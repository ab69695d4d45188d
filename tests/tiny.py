"""Tiny random backbones and tokenizers, made on the spot and saved in Hub format: what every test composes.

Two pairs stand for all: ViT + GPT-2 (CLS token, pooler, learned positions, tied head, no pad token, no chat template)
and SigLIP + Llama (no CLS token, composite checkpoint, untied head, a text-only chat template).
"""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AddedToken,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
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
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


GENERATION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

LLAMA3 = (
    "{{- bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' "
    "+ message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

# An empty system message is left out, and eos follows the whole; its control tokens take the blanks behind them.
PHI = (
    "{% for message in messages %}{% if message['role'] != 'system' or message['content'] %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

# No control token but eos; the blank before an answer is the answer's.
VICUNA = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

# The prompt ends in a control token.
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% elif message['role'] == 'system' %}{{ message['content'] }}"
    "{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)

# A blank stands between an answer and its end.
LLAMA2 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% else %}"
    "{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}{% endif %}{% endfor %}"
)

# Like SmolVLM's: it reads contents as parts, and writes the image token itself.
PARTS = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

# It writes nothing at all after the last answer.
OPEN = (
    "{% for message in messages %}{{ '\n' if not loop.first }}{{ message['role'] + ': ' + message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\nassistant:' }}{% endif %}"
)

TEMPLATES = {
    "default": ("default", []),
    "plain": ("plain", []),
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"]),
    "generation": (GENERATION, ["<|im_start|>", "<|im_end|>"]),
    "llama3": (LLAMA3, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    "gemma": (GEMMA, ["<start_of_turn>", "<end_of_turn>"]),
    "phi": (
        PHI,
        [AddedToken(f"<|{name}|>", special=True, rstrip=True) for name in ("system", "user", "assistant", "end")],
    ),
    "vicuna": (VICUNA, []),
    "mistral": (MISTRAL, ["[INST]", "[/INST]"]),
    "llama2": (LLAMA2, []),
    "parts": (PARTS, ["<|im_start|>", "<end_of_utterance>"]),
}
"""Name -> chat template and the special tokens it writes."""


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
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    # Pieces of one score come in another order each time; with it a model of random weights would say something else.
    pieces = [(piece, round(score, 6)) for piece, score in json.loads(tokenizer.to_str())["model"]["vocab"]]
    pieces[len(special) :] = sorted(pieces[len(special) :], key=lambda piece: (-piece[1], piece[0]))
    tokenizer.model = models.Unigram(pieces, unk_id=special.index("<unk>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def wordpiece_tokenizer() -> PreTrainedTokenizerFast:
    """Like BERT's: lower-cased WordPiece, special tokens on both sides of every text."""
    tokenizer = Tokenizer(models.WordPiece())
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    # The library's trainer breaks ties otherwise each time: words that come often stay whole, others fall into letters.
    words = Counter(word for text in CORPUS for word in text.lower().split() if word.isalnum())
    letters = sorted({letter for text in CORPUS for letter in text.lower() if not letter.isspace()})
    pieces = special + letters + [f"##{letter}" for letter in letters]
    pieces += [word for word in sorted(words, key=lambda word: (-words[word], word)) if word not in letters]
    tokenizer.model = models.WordPiece({piece: id for id, piece in enumerate(pieces[:200])}, unk_token="[UNK]")
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


TOKENIZERS = {
    "byte-level": byte_level_tokenizer,
    "unigram-always": unigram_tokenizer,
    "unigram-first": lambda: unigram_tokenizer("first"),
    "wordpiece": wordpiece_tokenizer,
}
"""Name -> function that makes a tokenizer of that kind."""


def processor_of(
    tokenizer: PreTrainedTokenizerFast | str,
    template: str | None = None,
    image_seq_length: int = 3,
    max_tiles: int = 1,
    **options,
) -> VLMProcessor:
    """A processor without a model: a kind of tokenizer or one itself, and the name of one of `TEMPLATES`."""
    if isinstance(tokenizer, str):
        tokenizer = TOKENIZERS[tokenizer]()
    if template is not None:
        template, tokens = TEMPLATES[template]
        tokenizer.add_tokens(tokens, special_tokens=True)
    image_token = options.get("image_token", "<image>")
    config = SimpleNamespace(
        image_size=(32, 32),
        image_token_id=tokenizer.get_vocab().get(image_token, len(tokenizer)),
        image_seq_length=image_seq_length,
        max_tiles=max_tiles,
    )
    return VLMProcessor.from_backbones(
        ViTConfig(image_size=32), None, config, tokenizer=tokenizer, chat_template=template, **options
    )


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


def wide_llama(positions: int = 256) -> LlamaForCausalLM:
    """A Llama of 64 numbers in heads of 32, which blocks of 4 bit and every attention take."""
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, vocab_size=256,
        max_position_embeddings=positions, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def save_numbered_pictures(folder: Path, number: int) -> list[str]:
    """Pictures of noise with a dialogue about each, as the options that name them."""
    random, rows = np.random.default_rng(0), []
    for index in range(number):
        Image.fromarray(random.integers(0, 256, (24, 36, 3), dtype=np.uint8)).save(folder / f"{index}.png")
        turns = [("user", "what is in the picture?"), ("assistant", f"there are {index} objects")]
        rows.append({"images": [f"{index}.png"], "messages": [{"role": r, "content": c} for r, c in turns]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--dataset", str(folder / "rows.jsonl"), "--image_dir", str(folder)]


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


IMAGE_PROCESSORS = {
    "vit": lambda height, width: ViTImageProcessorPil(size={"height": height, "width": width}),
    "siglip": lambda height, width: SiglipImageProcessorPil(size={"height": height, "width": width}),
    "clip": lambda height, width: CLIPImageProcessorPil(
        size={"shortest_edge": min(height, width)}, crop_size={"height": height, "width": width}
    ),
    "dinov2": lambda height, width: BitImageProcessorPil(  # 256, of which 224 are cut out
        size={"shortest_edge": max(height, width) * 8 // 7}, crop_size={"height": height, "width": width}
    ),
}
"""Kind -> function that makes an encoder's own image processor for images of a height and width."""


def processor_seeing(
    kind: str, folder: Path, image_size=(32, 32), max_tiles: int = 1, image_mode: str | None = None, own_size=None
):
    """A processor without a model, three positions a view, its image processor of that kind and made for `own_size`."""
    IMAGE_PROCESSORS[kind](*(own_size or image_size)).save_pretrained(folder)
    tokenizer = byte_level_tokenizer()
    config = SimpleNamespace(
        image_size=image_size, image_token_id=len(tokenizer), image_seq_length=3, max_tiles=max_tiles
    )
    return VLMProcessor.from_backbones(str(folder), None, config, tokenizer=tokenizer, image_mode=image_mode)
