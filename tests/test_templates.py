"""Published chat templates lose no sample, and no answer is learned behind a prompt that generation never gives.

`templates/README.md` says where they come from. What a template itself refuses (Gemma 1 a system message) is left out.
"""

import functools
import re
from pathlib import Path

import pytest

from processing.messages_vlm import CONTEXT_ONLY
from tests import tiny


FOLDER = Path(__file__).parent / "templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
CONTROL = "|".join(
    [r"<\|[^<>|\s'\"{}]+\|>", r"<｜[^<>\s'\"]+?｜>", r"\[/?[A-Z_]+\]", r"<(?:start|end)_of_\w+>"]
    + [r"<(?:turn|channel)\|>", r"<\|(?:turn|channel)>"]
)
IMAGE = {"type": "image"}
ANSWERS = {
    "words": "a red circle", "a thought": "<think>\nit is red\n</think>\n\na circle", "its end": "red</think>a circle",
    "two ends": "a </think> b </think> c", "an open one": "<think> a", "line ends": "\n\na circle\n", "blanks": "  \n",
    "nothing": "", "blanks around": "  a circle ", "control tokens": "x <|im_end|> <think> </s>[/INST] y",
}  # fmt: skip
REFUSES_SYSTEM = ("gemma",)
# The generation prompt opens a thought or closes one, or the system message stands in the last question.
CONTEXT = {
    "deepseek_r1_distill": (2, 2), "deepseekv3": (2, 2), "nemotron_3_nano": (2, 2), "qwen3_5_nothink": (2, 2),
    "qwen3_5_think": (2, 2), "qwen3_6": (2, 2), "mistral_v2v3": (0, 2), "mistral_v3_tekken": (0, 2), "pixtral": (0, 2),
}  # fmt: skip


@functools.cache
def processor_of(name):
    """A byte-level tokenizer with the special tokens that a template writes, and those of thoughts."""
    template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = tiny.byte_level_tokenizer()
    tokenizer.add_tokens(["<s>", "</s>", *sorted(set(re.findall(CONTROL, template)))], special_tokens=True)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token = "<s>", "</s>", None
    tokenizer.chat_template = template
    return tiny.processor_of(tokenizer)


def dialogue(*answers, system=False):
    def text(words):
        return {"type": "text", "text": words}

    messages = [{"role": "system", "content": [text("be brief")]}] if system else []
    for number, answer in enumerate(answers):
        asked = [IMAGE, text("what is it?")] if not number else [text("and </think>?")]
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": [text(answer)]}]
    return messages


def check(processor, ends, messages):
    """Learned are answers with their ends, each behind its own generation prompt; the others are noted."""
    notes, learned = [], 0
    ids, weights = processor.encode_messages(messages, notes=notes)
    left = list(weights)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt, _ = processor.encode_messages(messages[:index], add_generation_prompt=True)
        start = stop = len(prompt)
        if ids[:start] == prompt and weights[start]:
            learned += 1
            while stop < len(ids) and left[stop]:
                stop += 1
            assert ids[stop - 1] in ends
            left[start:stop] = [0.0] * (stop - start)
    assert not any(left)
    assert learned + len(notes) == len(messages) // 2 and set(notes) <= {CONTEXT_ONLY}
    assert ids[:start] == prompt and weights[start]  # the last one always is learned
    assert ids.count(processor.image_token_id) == 1
    return notes, processor.tokenizer.decode(ids[start:stop])


@pytest.mark.parametrize("name", NAMES)
def test_a_published_template_is_kept_as_it_is(name):
    processor = processor_of(name)
    template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    assert processor.chat_template == processor.tokenizer.chat_template == template


@pytest.mark.parametrize("name", NAMES)
def test_no_sample_is_lost_and_answers_are_learned_behind_the_prompts_of_generation(name):
    processor = processor_of(name)
    ends = processor.end_token_ids
    for kind, answer in ANSWERS.items():
        for system in (False, True) if name not in REFUSES_SYSTEM else (False,):
            for answers in ((answer,), ("one", answer), (answer, "two", answer)):
                notes, written = check(processor, ends, dialogue(*answers, system=system))
                if kind == "words" and len(answers) == 3:
                    assert answer in written and len(notes) == CONTEXT.get(name, (0, 0))[system]
