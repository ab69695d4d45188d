"""The oracle of labels: every id, and whether it is learned, known from how the template is meant to be read.

Each template is written down a second time, in plain Python, as the pieces that it consists of: control tokens, text
that is given, text that is learned, ends that are learned. The ids of the pieces come from the bare vocabulary of each
tokenizer, which knows no special token at all. What training and generation get has to be just that, for any text.
"""

import copy
import functools
import itertools
import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers

from processing import VLMDataCollator
from processing.batching.encoding import (
    DROP_REASONS,
    IGNORE,
    Encoder,
    SampleDropped,
    encode_caption,
    encode_dialogue,
    encode_item,
)
from processing.messages_vlm import CONTEXT_ONLY
from tests import tiny


IMAGE = {"type": "image"}
IMAGE_TOKEN = "<image>"


# -- the oracle -------------------------------------------------------------------------------------------------------


def given_text(text):
    return "given", text


def learned(text):
    return "learned", text


def control(token):
    return "control", token


def end(token):
    return "end", token


def joined(message, kind=given_text, before="", trim=False):
    """The pieces of a message's content, neighbouring texts as one."""
    runs = [""]
    for part in message["content"]:
        if part["type"] == "image":
            runs += [None, ""]
        else:
            runs[-1] += part["text"]
    if trim:
        runs[0] = runs[0].lstrip()
        runs[-1] = runs[-1].rstrip()
    runs[0] = before + runs[0]
    return [control(IMAGE_TOKEN) if run is None else kind(run) for run in runs]


def default(messages, prompt, tokenizer):
    pieces = starting(tokenizer)
    for index, message in enumerate(messages):
        role = message["role"]
        pieces.append(given_text("\n" if index else ""))
        if role == "assistant":
            pieces += [given_text("Assistant:"), *joined(message, learned, " "), end(tokenizer.eos_token)]
        else:
            pieces += joined(message, before="User: " if role == "user" else "")
    return pieces + ([given_text("\nAssistant:")] if prompt else [])


def plain(messages, prompt, tokenizer):
    pieces = starting(tokenizer)
    for message in messages:
        if message["role"] == "assistant":
            pieces += [*joined(message, learned), end(tokenizer.eos_token)]
        else:
            pieces += joined(message)
    return pieces


def starting(tokenizer):
    return [control(tokenizer.bos_token)] if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else []


def chatml(messages, prompt, tokenizer):
    pieces = []
    for message in messages:
        kind = kinds(message)
        pieces += [control("<|im_start|>"), given_text(message["role"] + "\n"), *joined(message, kind[0])]
        pieces += [kind[1]("<|im_end|>"), given_text("\n")]
    return pieces + ([control("<|im_start|>"), given_text("assistant\n")] if prompt else [])


def kinds(message):
    return (learned, end) if message["role"] == "assistant" else (given_text, control)


def llama3(messages, prompt, tokenizer):
    def header(role):
        return [control("<|start_header_id|>"), given_text(role), control("<|end_header_id|>"), given_text("\n\n")]

    pieces = [control(tokenizer.bos_token)]
    for message in messages:
        kind = kinds(message)
        pieces += [*header(message["role"]), *joined(message, kind[0], trim=True), kind[1]("<|eot_id|>")]
    return pieces + (header("assistant") if prompt else [])


def gemma(messages, prompt, tokenizer):
    pieces = [control(tokenizer.bos_token)]
    for message in messages:
        kind = kinds(message)
        role = "model\n" if message["role"] == "assistant" else "user\n"
        pieces += [control("<start_of_turn>"), given_text(role), *joined(message, kind[0], trim=True)]
        pieces += [kind[1]("<end_of_turn>"), given_text("\n")]
    return pieces + ([control("<start_of_turn>"), given_text("model\n")] if prompt else [])


def phi(messages, prompt, tokenizer):
    """The line ends after the control tokens are taken by them."""
    pieces = []
    for message in messages:
        kind = kinds(message)
        if message["role"] == "system" and joined(message) == [given_text("")]:
            continue
        pieces += [control(f"<|{message['role']}|>"), *joined(message, kind[0]), kind[1]("<|end|>")]
    return pieces + [control("<|assistant|>" if prompt else tokenizer.eos_token)]


def vicuna(messages, prompt, tokenizer):
    pieces = []
    for message in messages:
        if message["role"] == "system":
            pieces += [*joined(message), given_text("\n\n")]
        elif message["role"] == "user":
            pieces += [*joined(message, before="USER: "), given_text(" ")]
        else:
            pieces += [given_text("ASSISTANT:"), *joined(message, learned, " "), end(tokenizer.eos_token)]
    return pieces + ([given_text("ASSISTANT:")] if prompt else [])


def mistral(messages, prompt, tokenizer):
    pieces = [control(tokenizer.bos_token)]
    for message in messages:
        if message["role"] == "system":
            pieces += joined(message)
        elif message["role"] == "user":
            pieces += [control("[INST]"), *joined(message, before=" "), given_text(" "), control("[/INST]")]
        else:
            pieces += [*joined(message, learned, " "), end(tokenizer.eos_token)]
    return pieces


def llama2(messages, prompt, tokenizer):
    pieces = [control(tokenizer.bos_token)]
    for message in messages:
        if message["role"] == "assistant":
            pieces += [*joined(message, learned, " ", trim=True), learned(" "), end(tokenizer.eos_token)]
        else:
            pieces += [*joined(message, before="[INST] ", trim=True), given_text(" [/INST]")]
    return pieces


def parts(messages, prompt, tokenizer):
    pieces = [control("<|im_start|>")]
    for message in messages:
        kind = kinds(message)
        colon = ":" if message["content"][0] == IMAGE else ": "
        if kind[0] is learned:
            pieces += [given_text("Assistant:"), *joined(message, learned, " ")]
        else:
            pieces += [given_text(message["role"].capitalize() + colon), *joined(message)]
        pieces += [kind[1]("<end_of_utterance>"), given_text("\n")]
    return pieces + ([given_text("Assistant:")] if prompt else [])


READINGS = {
    "default": default, "plain": plain, "chatml": chatml, "generation": chatml, "llama3": llama3, "gemma": gemma,
    "phi": phi, "vicuna": vicuna, "mistral": mistral, "llama2": llama2, "parts": parts,
}  # fmt: skip
KNOWS_NO_SYSTEM = ("gemma",)
BARE_NAME = "\ue0f0{}"  # in place of the special tokens in a bare vocabulary; nothing spells it


@functools.cache
def trained(kind):
    """One tokenizer of each kind: training one anew would number equally good pieces in another order."""
    return tiny.TOKENIZERS[kind]()


class Bare:
    """The vocabulary of a tokenizer without its special tokens; a blank before a text only where one belongs."""

    def __init__(self, kind):
        self.kind = kind
        tokenizer = trained(kind)
        self.unknown = None if kind == "byte-level" else tokenizer.unk_token_id
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state["added_tokens"], state["post_processor"] = [], None
        self.spelled = set()
        if kind.startswith("unigram"):
            self.spelled = {piece for piece, _ in state["model"]["vocab"][:4]}
            state["model"]["vocab"][:4] = [[BARE_NAME.format(i), 0.0] for i in range(4)]
        self.first = Tokenizer.from_str(json.dumps(state))
        self.inner = Tokenizer.from_str(json.dumps(state))
        if kind.startswith("unigram"):
            self.inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        self.after_control = self.inner if kind == "unigram-first" else self.first

    def ids(self, text, after):
        tokenizer = {None: self.first, "control": self.after_control, "text": self.inner}[after]
        return tokenizer.encode(text, add_special_tokens=False).ids if text else []


@functools.cache
def case(kind, template):
    return tiny.processor_of(copy.deepcopy(trained(kind)), template), Bare(kind)


def expected(processor, bare, template, messages, prompt=False):
    """Ids and what is learned, from the pieces."""
    tokenizer = processor.tokenizer
    ids, flags, after, run, learns = [], [], None, "", False

    def write():
        nonlocal run, after
        piece = bare.ids(run, after)
        ids.extend(piece)
        flags.extend([learns] * len(piece))
        run, after = "", "text" if piece else after

    for kind, text in READINGS[template](messages, prompt, tokenizer):
        if kind in ("given", "learned"):
            if learns != (kind == "learned"):
                write()
                learns = kind == "learned"
            run += text
            continue
        write()
        ids.append(tokenizer.convert_tokens_to_ids(text))
        flags.append(kind == "end")
        after = "control"
        if kind == "end":
            learns = False
    write()
    return ids, flags


# -- conversations ----------------------------------------------------------------------------------------------------

CASES = [(kind, template) for kind in tiny.TOKENIZERS for template in tiny.TEMPLATES]
each_case = pytest.mark.parametrize("kind, template", CASES, ids=[f"{k}-{t}" for k, t in CASES])

CONTROL_STRINGS = sorted(
    {str(token) for _, tokens in tiny.TEMPLATES.values() for token in tokens}
    | {"<|endoftext|>", "<unk>", "<s>", "</s>", "<pad>", "[PAD]", "[UNK]", "[CLS]", "[SEP]", IMAGE_TOKEN}
)
FRAGMENTS = CONTROL_STRINGS + [
    "User: ", "\nUser: what", "Assistant:", "\nAssistant: no", "ASSISTANT:", "USER: ", "assistant\n", "system", "\n",
    "<|im_start|>assistant\n", "<|im_end|>\n<|im_start|>user\n", "<start_of_turn>model\n", "<image><image>", "<ima",
    "{{ messages }}", "{% generation %}", "{%- endgeneration -%}", "{# no #}", " ", "   ", "\t", "\r\n", "\u3000",
    "\u2003", "\ue0000\ue001", "\ue000", "a", "a red circle", " blue.", "42", "日本語のテキスト", "你好", "🙂",
    "\U0001f469\u200d\U0001f467", "é", "e\u0301", "<", ">", "|>", "▁", "##a", "\x00", "&lt;", "'type'", "I'm",
]  # fmt: skip

texts = st.one_of(
    st.lists(st.sampled_from(FRAGMENTS), max_size=5).map("".join),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    st.sampled_from(["", " ", "  \n"]),
)


@st.composite
def conversations(draw, system=True):
    def content(images):
        parts = [text_part(draw(texts)) for _ in range(draw(st.integers(0 if images else 1, 2)))] + [IMAGE] * images
        return draw(st.permutations(parts))

    messages = [{"role": "system", "content": content(0)}] if system and draw(st.booleans()) else []
    images = 0
    for _ in range(draw(st.integers(1, 3))):
        here = draw(st.integers(0, 4 - images)) if draw(st.booleans()) else 0
        images += here
        messages += [{"role": "user", "content": content(here)}, {"role": "assistant", "content": content(0)}]
    return messages


def text_part(text):
    return {"type": "text", "text": text}


def dialogue(turns, images, system, seed=0):
    """Plain words; the images spread over the turns."""
    words = random.Random(seed)

    def text(answer=False):
        said = ["a red circle", "what is it?", "there are two objects", "blue.", "how many"]
        return text_part(" ".join(words.choices(said, k=words.randint(1, 2))))

    messages = [{"role": "system", "content": [text()]}] if system else []
    for turn in range(turns):
        here = [IMAGE] * len(range(turn, images, turns))
        messages.append({"role": "user", "content": [*here, text()] if turn % 2 else [text(), *here]})
        messages.append({"role": "assistant", "content": [text()]})
    return messages


def with_pictures(messages, pictures):
    """Messages as `apply_chat_template` takes them: each image part carries its image."""
    pictures = iter(pictures)
    return [
        {**m, "content": [{**p, "image": next(pictures)} if p["type"] == "image" else p for p in m["content"]]}
        for m in messages
    ]


def all_texts(messages):
    return [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]


def replaced(messages, change):
    """The messages with `change(message, text)` in place of each text."""
    return [
        {**m, "content": [text_part(change(m, p["text"])) if p["type"] == "text" else p for p in m["content"]]}
        for m in messages
    ]


def count_images(messages):
    return sum(part["type"] == "image" for message in messages for part in message["content"])


def learned_ids(encoded):
    return [id for id, flag in zip(*encoded) if flag]


def control_ids(processor, bare):
    tokenizer = processor.tokenizer
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} - {bare.unknown}


def check(kind, template, messages, picture):
    """Every promise about one conversation."""
    processor, bare = case(kind, template)
    tokenizer = processor.tokenizer
    ids, supervised = processor.encode_messages(messages)
    special = control_ids(processor, bare)

    # Ids and labels are those of the pieces. (Where a vocabulary has pieces that spell its own special tokens, a text
    # that holds one may be cut in other places, so that only what follows is compared.)
    comparable = not any(spelled in text for spelled in bare.spelled for text in all_texts(messages))
    if comparable:
        assert (ids, supervised) == expected(processor, bare, template, messages)

    # No control token but where the template has one with harmless texts.
    harmless = processor.apply_chat_template(replaced(messages, lambda message, text: text and "a"))
    found = [id for id in tokenizer(harmless, add_special_tokens=False)["input_ids"] if id in special]
    assert [id for id in ids if id in special] in (found, [*found, tokenizer.eos_token_id])
    assert ids.count(processor.image_token_id) == count_images(messages)

    # The ids before each answer are those that generation is given; what is learned is the answer and one end token.
    rendered = processor.apply_chat_template(messages)
    exact = kind == "byte-level" and template != "phi"  # phi's control tokens take line ends, which are gone
    assert not exact or tokenizer.decode(ids) in (rendered, rendered + tokenizer.eos_token)
    left = list(supervised)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked, nothing = processor.encode_messages(messages[:index], add_generation_prompt=True)
        assert ids[: len(asked)] == asked and nothing == supervised[: len(asked)]
        if comparable:
            assert expected(processor, bare, template, messages[:index], prompt=True)[0] == asked
        start = len(asked)
        stop = next(i for i in range(start, len(ids)) if ids[i] in special)
        assert all(supervised[start : stop + 1]) and ids[stop] in processor.end_token_ids
        left[start : stop + 1] = [False] * (stop + 1 - start)
        if exact:
            answer = "".join(all_texts([message]))
            answer = answer.strip() if template in ("llama3", "gemma", "llama2") else answer
            answer = " " + answer if template in ("default", "vicuna", "mistral", "llama2", "parts") else answer
            answer = answer + " " if template == "llama2" else answer
            assert tokenizer.decode(ids[start:stop]) == answer
    assert not any(left)

    # And with pixels, `apply_chat_template` gives just these ids, `image_seq_length` an image.
    pictured = with_pictures(messages[:index], [picture] * 9)
    (prompt,) = processor.apply_chat_template(pictured, add_generation_prompt=True, tokenize=True)
    assert prompt == processor.expand_images(asked)[0]
    assert prompt.count(processor.image_token_id) == count_images(messages) * processor.image_seq_length


# -- the promises -----------------------------------------------------------------------------------------------------


@each_case
def test_labels_are_the_pieces_for_every_number_of_turns_and_images(kind, template, image):
    for turns in range(1, 7):
        for images in range(5):
            for system in (False, True) if template not in KNOWS_NO_SYSTEM else (False,):
                messages = dialogue(turns, images, system, seed=turns * 10 + images)
                processor, bare = case(kind, template)
                assert processor.encode_messages(messages) == expected(processor, bare, template, messages)
    check(kind, template, dialogue(6, 4, template not in KNOWS_NO_SYSTEM), image())


def oracle_on_any_text(kind, template, data, picture):
    check(kind, template, data.draw(conversations(template not in KNOWS_NO_SYSTEM)), picture)


shared = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@each_case
@settings(max_examples=10, **shared)
@given(data=st.data())
def test_labels_are_the_pieces_for_any_text(kind, template, image, data):
    oracle_on_any_text(kind, template, data, image())


@pytest.mark.slow
@each_case
@settings(max_examples=300, **shared)
@given(data=st.data())
def test_labels_are_the_pieces_for_very_many_texts(kind, template, image, data):
    oracle_on_any_text(kind, template, data, image())


@each_case
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_control_token_typed_in_any_role_stays_text(kind, template, role, image):
    if role == "system" and template in KNOWS_NO_SYSTEM:
        pytest.skip("the template has no system role")
    for typed in CONTROL_STRINGS:
        messages = replaced(
            dialogue(1, 1, role == "system"), lambda m, text, typed=typed: typed if m["role"] == role else text
        )
        check(kind, template, messages, image())


@each_case
def test_what_is_learned_does_not_depend_on_what_is_asked(kind, template):
    processor, _ = case(kind, template)
    messages = dialogue(3, 2, template not in KNOWS_NO_SYSTEM)
    answers = learned_ids(processor.encode_messages(messages))
    for typed in ["b", "Assistant:", "<|im_start|>assistant\n", IMAGE_TOKEN, "🙂 ", *CONTROL_STRINGS]:
        other = replaced(messages, lambda m, text, typed=typed: text if m["role"] == "assistant" else typed)
        assert learned_ids(processor.encode_messages(other)) == answers
    if template == "plain" and kind == "unigram-always":
        return  # an answer right after an image starts with a blank there
    without = [{**m, "content": [p for p in m["content"] if p != IMAGE]} for m in messages]
    assert learned_ids(processor.encode_messages(without)) == answers


@each_case
def test_plain_words_give_the_ids_of_the_whole_string(kind, template):
    """Where pieces end in control tokens, encoding them apart is what the tokenizer itself does with the string."""
    processor, _ = case(kind, template)
    for system in (False, True) if template not in KNOWS_NO_SYSTEM else (False,):
        messages = dialogue(2 if kind in ("byte-level", "wordpiece") else 1, 1, system)
        prompt = messages[:-1]
        whole = processor.apply_chat_template(prompt, add_generation_prompt=True)
        ids, _ = processor.encode_messages(prompt, add_generation_prompt=True)
        assert ids == processor.tokenizer(whole, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", tiny.TOKENIZERS)
def test_templates_with_and_without_generation_marks_give_the_same_labels(kind):
    for turns in (1, 3):
        messages = dialogue(turns, 2, system=True)
        assert case(kind, "generation")[0].encode_messages(messages) == case(kind, "chatml")[0].encode_messages(
            messages
        )


@each_case
def test_an_answer_that_is_not_to_be_trained_on_is_only_context(kind, template):
    processor, _ = case(kind, template)
    messages = dialogue(3, 1, False)
    ids, supervised = processor.encode_messages(messages)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    for left_out in answers:
        marked = [{**m, "train": index != left_out} for index, m in enumerate(messages)]
        same, fewer = processor.encode_messages(marked)
        assert same == ids
        before = len(processor.encode_messages(messages[:left_out], add_generation_prompt=True)[0])
        stop = before + supervised[before:].index(False) if False in supervised[before:] else len(ids)
        assert fewer == [flag and not before <= i < stop for i, flag in enumerate(supervised)]
    with pytest.raises(SampleDropped, match=DROP_REASONS[0]):
        encode_dialogue(processor, {"messages": [{**m, "train": False} for m in messages]})


@each_case
def test_an_empty_answer_is_an_end_token(kind, template):
    """Also beside other empty texts, which some templates leave out."""
    processor, bare = case(kind, template)
    for asked in ("what", "", " "):
        for system in (None, "", " ", "be brief") if template not in KNOWS_NO_SYSTEM else (None,):
            said = [("user", asked), ("assistant", ""), ("user", "and?"), ("assistant", "")]
            said = said if system is None else [("system", system), *said]
            messages = [{"role": role, "content": [text_part(text)]} for role, text in said]
            encoded = processor.encode_messages(messages)
            assert encoded == expected(processor, bare, template, messages)
            assert len([id for id in learned_ids(encoded) if id in processor.end_token_ids]) == 2


@each_case
def test_an_image_in_an_answer_is_not_learned_and_its_end_is(kind, template):
    processor, _ = case(kind, template)
    messages = dialogue(2, 0, False)
    contents = [[IMAGE, text_part("blue")], [text_part("a"), IMAGE, text_part("b")], [text_part("blue"), IMAGE]]
    for content in contents[
        : 2 if template == "llama2" else 3
    ]:  # there, a blank between image and end is all it learns
        messages[1] = {"role": "assistant", "content": content}
        ids, supervised = processor.encode_messages(messages)
        assert ids.count(processor.image_token_id) == 1
        assert not supervised[ids.index(processor.image_token_id)]
        ends = [id in processor.end_token_ids and flag for id, flag in zip(ids, supervised)]
        assert sum(ends) == 2 and not supervised[ends.index(True) + 1]


@pytest.mark.parametrize("template", ["llama3", "gemma", "llama2"])
def test_parts_side_by_side_are_trimmed_as_one(template):
    processor, bare = case("byte-level", template)
    for words in (["  ", " a ", "b ", "\n"], [" ", "", "  "], ["a", ""], ["", "a "]):
        messages = dialogue(1, 0, False)
        for message in messages:
            message["content"] = [text_part(text) for text in words]
        assert processor.encode_messages(messages) == expected(processor, bare, template, messages)


@pytest.mark.parametrize("kind", tiny.TOKENIZERS)
def test_without_an_end_of_its_own_an_answer_ends_with_what_follows_and_the_last_with_eos(kind):
    processor, bare = tiny.processor_of(copy.deepcopy(trained(kind))), Bare(kind)
    processor.set_chat_template(tiny.OPEN)
    said = [("user", "what is it?"), ("assistant", "a red circle"), ("user", "how many"), ("assistant", "two")]
    messages = [{"role": role, "content": [text_part(text)]} for role, text in said]
    prompt = bare.ids("user: what is it?\nassistant:", None)
    first, second = bare.ids(" a red circle", "text"), bare.ids(" two", "text")
    between = bare.ids("\nuser: how many\nassistant:", "text")
    ids, supervised = processor.encode_messages(messages)
    assert ids == [*prompt, *first, *between, *second, processor.tokenizer.eos_token_id]
    given = [False] * len(prompt), [False] * (len(between) - 1)
    assert supervised == [*given[0], *[True] * (len(first) + 1), *given[1], *[True] * (len(second) + 1)]
    assert processor.end_token_ids == [processor.tokenizer.eos_token_id]
    assert processor.encode_messages(messages[:3], add_generation_prompt=True)[0] == [*prompt, *first, *between]


def test_an_answer_after_a_text_gets_no_blank():
    for template in ("chatml", "llama3", "gemma"):
        for kind in ("unigram-always", "unigram-first"):
            processor, _ = case(kind, template)
            ids, supervised = processor.encode_messages(replaced(dialogue(1, 0, False), lambda m, text: "blue"))
            pieces = processor.tokenizer.convert_ids_to_tokens(learned_ids((ids, supervised)))
            assert "".join(pieces[:-1]) == "blue"


@each_case
def test_an_answer_to_nothing_is_learned_without_its_role(kind, template):
    """No generation can be asked for it, so there is no prompt that it would have to follow."""
    if template in KNOWS_NO_SYSTEM:
        pytest.skip("the template wants a user first")
    processor, _ = case(kind, template)
    said = replaced(dialogue(2, 0, False), lambda m, text: "hello")[1:]
    ids, supervised = processor.encode_messages(said)
    start, stop = supervised.index(True), supervised.index(False, supervised.index(True))
    assert processor.tokenizer.decode(ids[start : stop - 1]).strip() == "hello"
    assert ids[stop - 1] in processor.end_token_ids


def test_of_two_answers_in_a_row_each_starts_where_generation_starts():
    processor, _ = case("byte-level", "chatml")
    messages = dialogue(1, 0, False) + [{"role": "assistant", "content": [text_part("more")]}]
    ids, supervised = processor.encode_messages(messages)
    for index in (1, 2):
        asked, _ = processor.encode_messages(messages[:index], add_generation_prompt=True)
        assert ids[: len(asked)] == asked and supervised[len(asked)]


def test_words_added_to_a_vocabulary_keep_their_ids():
    tokenizer = tiny.byte_level_tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.add_tokens(["zebra", "<think>"])
    tokenizer.add_tokens(["<|last|>"], special_tokens=True)
    tokenizer.add_tokens(["giraffe"])
    processor = tiny.processor_of(tokenizer)
    encode = processor.encoder.text.encode
    assert encode("a zebra") == tokenizer("a zebra")["input_ids"]
    assert encode("a giraffe") == tokenizer("a giraffe")["input_ids"]
    for typed in ("<think>", "<|last|>", IMAGE_TOKEN):
        assert tokenizer.convert_tokens_to_ids(typed) not in encode(f"a {typed} zebra")


# -- templates that look into texts ---------------------------------------------------------------------------------

# As Qwen3: a thought is cut out of an answer and written anew, behind the last question alone; line ends are stripped.
THINKS = r"""{%- set ns = namespace(last=-1) -%}
{%- for m in messages if m['role'] == 'user' -%}{%- set ns.last = ns.last + 2 -%}{%- endfor -%}
{%- for m in messages -%}
{{- '<|im_start|>' + m['role'] + '\n' -}}
{%- set text = m['content'] -%}
{%- if m['role'] == 'assistant' -%}
{%- set thought = '' -%}
{%- if '</think>' in text -%}
{%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') -%}
{%- set text = text.split('</think>')[-1].lstrip('\n') -%}
{%- endif -%}
{%- if loop.index0 >= ns.last -%}
{%- set text = '<think>\n' + thought + '\n</think>\n\n' + text.lstrip('\n') -%}
{%- endif -%}
{%- endif -%}
{{- text + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
# Its prompt opens a thought, which earlier answers do not have.
OPENS = r"""{%- for m in messages -%}
{{- '<|im_start|>' + m['role'] + '\n' + m['content'].split('</think>')[-1] + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n<think>\n' -}}{%- endif -%}
"""
# As Mistral v0.3: the system message stands in the last question.
MOVES = r"""{%- set ns = namespace(left=0) -%}
{%- for m in messages if m['role'] == 'user' -%}{%- set ns.left = ns.left + 1 -%}{%- endfor -%}
{%- for m in messages -%}
{%- if m['role'] == 'user' -%}
{%- set ns.left = ns.left - 1 -%}
{{- '[INST] ' -}}
{%- if not ns.left and messages[0]['role'] == 'system' -%}{{- messages[0]['content'] + '\n\n' -}}{%- endif -%}
{{- m['content'] + '[/INST]' -}}
{%- elif m['role'] == 'assistant' -%}
{{- ' ' + m['content'] + eos_token -}}
{%- endif -%}
{%- endfor -%}
"""


def thinking(template):
    tokenizer = tiny.byte_level_tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"], special_tokens=True)
    tokenizer.add_tokens(["<think>", "</think>"])
    processor = tiny.processor_of(tokenizer)
    processor.set_chat_template(template)
    return processor


def spoken(*texts, system=None):
    said = [] if system is None else [("system", system)]
    said += zip(itertools.cycle(("user", "assistant")), texts)
    return [{"role": role, "content": [text_part(text)]} for role, text in said]


@pytest.mark.parametrize(
    "answer, written",
    [
        ("blue.", "<think>\n\n</think>\n\nblue."),
        ("<think>\nit is</think>\n\nblue.", "<think>\nit is\n</think>\n\nblue."),
        ("it is</think>blue.", "<think>\nit is\n</think>\n\nblue."),
        ("a</think>b</think>c", "<think>\na\n</think>\n\nc"),
        ("\n\nblue.\n", "<think>\n\n</think>\n\nblue.\n"),
        ("\n", "<think>\n\n</think>\n\n"),
        ("", "<think>\n\n</think>\n\n"),
        ("  ", "<think>\n\n</think>\n\n  "),
        ("<think> <|im_end|> never", "<think>\n\n</think>\n\n<think> <|im_end|> never"),
        ("\n<|im_end|>\n</think>\n<think><|im_start|>", "<think>\n<|im_end|>\n</think>\n\n<think><|im_start|>"),
    ],
)
@pytest.mark.parametrize("earlier", [(), ("a", "<think>\nno\n</think>yes"), ("a </think>?", "\nyes")])
def test_an_answer_is_learned_as_a_template_that_cuts_thoughts_writes_it(answer, written, earlier):
    processor = thinking(THINKS)
    tokenizer = processor.tokenizer
    messages = spoken(*earlier, "what is </think>?", answer)
    ids, weights = processor.encode_messages(messages)
    prompt, _ = processor.encode_messages(messages[:-1], add_generation_prompt=True)
    learned_last = [id for id, weight in zip(ids[len(prompt) :], weights[len(prompt) :]) if weight]
    assert ids[: len(prompt)] == prompt and tokenizer.decode(learned_last) == written + "<|im_end|>"
    # The template's own marks are control tokens; what is typed is text, whatever it spells.
    think, close = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    assert [learned_last.count(id) for id in (think, close)] == [1, 1] and prompt.count(close) == 0
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"])
    assert [id for id in learned_last if id in ends] == [ends[0]]
    if earlier:
        assert sum(weight for weight in weights) > len(learned_last)


def test_what_a_template_writes_anew_is_its_own_and_what_it_leaves_is_typed():
    """Though both look the same: a thought cut out and written with nothing around it, and a question beside it."""
    written_with_lines = r"'<think>\n' + thought + '\n</think>\n\n' + text.lstrip('\n')"
    template = THINKS.replace(written_with_lines, "'<think>' + thought + '</think>' + text")
    assert template != THINKS
    processor = thinking(template)
    think, close = processor.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    for answer in ("it is</think>blue.", "<think>it is</think>blue."):
        messages = spoken("what is a </think> b?", answer)
        ids, weights = processor.encode_messages(messages)
        learned_last = [id for id, weight in zip(ids, weights) if weight]
        assert processor.tokenizer.decode(learned_last) == "<think>it is</think>blue.<|im_end|>"
        assert [learned_last.count(id) for id in (think, close)] == [1, 1] == [ids.count(think), ids.count(close)]


@pytest.mark.parametrize(
    "template, system, context",
    [(OPENS, None, 2), (OPENS, "be brief", 2), (MOVES, "be brief", 2), (MOVES, None, 0), (tiny.CHATML, "be brief", 0)],
)
def test_an_answer_that_generation_would_be_asked_for_in_other_words_is_context_only_and_noted(
    template, system, context
):
    processor = thinking(template)
    messages = spoken("what?", "blue.", "and?", "red.", "how many?", "two", system=system)
    encoded = encode_dialogue(processor, {"messages": messages})
    assert encoded.get("notes", []) == [CONTEXT_ONLY] * context
    ids, labels = encoded["input_ids"], list(encoded["labels"])
    learned = 0
    for index in range(len(messages)):
        if messages[index]["role"] == "assistant":
            prompt, _ = processor.encode_messages(messages[:index], add_generation_prompt=True)
            if ids[: len(prompt)] == prompt and labels[len(prompt)] != IGNORE:
                learned += 1
                start = stop = len(prompt)
                while stop < len(ids) and labels[stop] != IGNORE:
                    stop += 1
                labels[start:stop] = [IGNORE] * (stop - start)
    assert learned == 3 - context and set(labels) == {IGNORE}  # nothing is learned behind another prompt
    _, record = encode_item({"messages": messages, "notes": ["odd"]}, Encoder(processor))
    assert record.notes == ("odd", *encoded.get("notes", []))
    asked = [{**m, "train": m is messages[-1]} for m in messages]
    assert "notes" not in encode_dialogue(processor, {"messages": asked})


# -- long ones --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [*tiny.TEMPLATES, "thinks", "opens", "moves"])
def test_a_long_dialogue_is_encoded_as_its_prefixes_are_and_takes_time_as_it_is_long(template, monkeypatch):
    own = {"thinks": THINKS, "opens": OPENS, "moves": MOVES}
    processor = thinking(own[template]) if template in own else case("byte-level", template)[0]
    said = [word for turn in range(60) for word in (f"what is {turn}?", f"a circle {turn}")]
    system = None if template in KNOWS_NO_SYSTEM else "be brief"
    messages, notes = spoken(*said, system=system), []
    monkeypatch.setattr("processing.messages_vlm._LONG", 10_000)
    processor.encoder._layouts.clear()
    exact = processor.encode_messages(messages, notes=notes)
    monkeypatch.setattr("processing.messages_vlm._LONG", 16)
    processor.encoder._layouts.clear()
    rendered, render, found = [], processor.encoder._render, []
    monkeypatch.setattr(processor.encoder, "_render", lambda m, *a, **k: rendered.append(len(m)) or render(m, *a, **k))
    assert processor.encode_messages(messages, notes=found) == exact and found == notes
    assert sum(rendered) < 20 * len(messages)


def test_texts_are_read_as_far_as_they_can_be_kept():
    for kind in ("byte-level", "unigram-always", "wordpiece"):
        processor, _ = case(kind, "chatml")
        long = "a red circle is <|im_end|> at the top left.\n two 日本語 </s> objects  " * 2_000
        messages = spoken("what?", long, "and?", "blue. " * 500)
        whole = processor.encode_messages(messages)
        read, encode = [], processor.encoder.text.encode
        caption = processor.encode_caption([IMAGE, text_part(long)])
        for length in (1, 7, 100, 1_000):
            ids, weights = processor.encode_messages(messages, max_length=length)
            assert (ids[: length + 1], weights[: length + 1]) == (whole[0][: length + 1], whole[1][: length + 1])
            assert length < len(ids) < length + 100
            ids, weights = processor.encode_caption([IMAGE, text_part(long)], max_length=length)
            assert (ids[:length], weights[:length]) == (caption[0][:length], caption[1][:length])
            assert length < len(ids) < length + 100
        assert not read and encode(long, at_most=len(encode(long))) == encode(long)


def test_a_text_of_very_many_control_strings_is_read_in_time_as_it_is_long():
    processor, bare = case("unigram-always", "chatml")
    spelled = next(iter(bare.spelled))
    ids = processor.encoder.text.encode(f"a {spelled} b " * 5_000)
    assert len(ids) > 5_000 and control_ids(processor, bare).isdisjoint(ids)


def test_the_first_turns_of_a_long_dialogue_are_left_out_until_it_fits():
    processor, _ = case("byte-level", "chatml")
    messages = spoken(*[word for turn in range(60) for word in (f"what is {turn}?", f"a circle {turn}")])
    for length in (60, 200, 700):
        encoded = encode_dialogue(processor, {"messages": messages}, length, truncation="keep_last_turns")
        turns = range(1, len(messages) // 2 + 1)
        fits = [n for n in turns if len(processor.encode_messages(messages[-2 * n :])[0]) <= length]
        assert encoded["input_ids"] == processor.encode_messages(messages[-2 * max(fits) :])[0]
    with pytest.raises(SampleDropped, match="more than 20 positions"):
        encode_dialogue(processor, {"messages": messages}, 20, truncation="keep_last_turns")


# -- stage 1 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.TOKENIZERS)
@settings(max_examples=25, **shared)
@given(caption=texts)
def test_stage_1_is_image_caption_end_without_roles(kind, image, caption):
    processor, bare = case(kind, "chatml")
    messages = [{"role": "user", "content": [IMAGE]}, {"role": "assistant", "content": [text_part(caption)]}]
    encoded = encode_caption(processor, {"messages": messages})
    prompt = processor(images=image(), text=IMAGE_TOKEN)["input_ids"][0]
    ids, labels = processor.expand_images(encoded["input_ids"], encoded["labels"])
    eos = processor.tokenizer.eos_token_id
    assert ids[: len(prompt)] == list(prompt) and labels[: len(prompt)] == [IGNORE] * len(prompt)
    assert ids[len(prompt) :] == labels[len(prompt) :] and ids[-1] == eos
    assert control_ids(processor, bare).isdisjoint(ids[len(prompt) : -1])
    if not any(spelled in caption for spelled in bare.spelled):
        assert ids[len(prompt) : -1] == bare.ids(caption, "control")
    assert encoded["length"] == len(ids)


# -- max_length -------------------------------------------------------------------------------------------------------


def check_every_length(processor, encode, messages, picture, template=None):
    """From 1 to full: an intact sample, or a drop with the reason that is true."""
    conversation = {"messages": messages, "images": [picture.copy() for _ in range(count_images(messages))]}
    whole = encode(processor, conversation)
    all_ids, all_labels = processor.expand_images(whole["input_ids"], whole["labels"])
    image_id, size = processor.image_token_id, processor.image_seq_length
    kept = 0
    for max_length in range(1, len(all_ids) + 2):
        collator = VLMDataCollator(processor, max_length, encode)
        batch = collator([copy.copy(conversation)])
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        assert len(ids) <= max_length
        if collator.dropped:
            ((reason, count),) = collator.dropped.items()
            fits = all_ids[:max_length].count(image_id) == count_images(messages) * size
            assert count == 1 and reason == DROP_REASONS[2 if fits else 1]
            assert not (fits and any(label != IGNORE for label in all_labels[1:max_length]))
            assert "pixel_values" not in batch and labels == [IGNORE]
            continue
        kept += 1
        assert ids == all_ids[: len(ids)] and labels == all_labels[: len(ids)]
        assert len(ids) == min(max_length, len(all_ids))  # nothing is lost without need
        assert any(label != IGNORE for label in labels[1:])
        assert ids.count(image_id) == count_images(messages) * size
        assert len(batch.get("pixel_values", [])) == count_images(messages)
    assert kept


@each_case
def test_every_max_length_gives_an_intact_sample_or_a_counted_drop(kind, template, image):
    processor, _ = case(kind, template)
    for turns, images in ((1, 0), (2, 1), (2, 3)):
        check_every_length(processor, encode_dialogue, dialogue(turns, images, False), image())


def test_the_first_token_of_all_is_never_what_a_sample_is_kept_for(image):
    """There is nothing that it could be predicted from."""
    processor, _ = case("byte-level", "plain")
    messages = dialogue(1, 0, False)
    alone = replaced(messages, lambda m, text: "blue" if m["role"] == "assistant" else "")
    assert processor.encode_messages(alone)[1][0]
    check_every_length(processor, encode_dialogue, alone, image())
    with pytest.raises(SampleDropped, match=DROP_REASONS[0]):
        encode_dialogue(processor, {"messages": replaced(messages, lambda m, text: "")})


@pytest.mark.parametrize("kind", tiny.TOKENIZERS)
def test_every_max_length_of_stage_1_gives_an_intact_sample_or_a_counted_drop(kind, image):
    processor, _ = case(kind, "default")
    messages = [{"role": "user", "content": [IMAGE]}, {"role": "assistant", "content": [text_part("a red circle")]}]
    check_every_length(processor, encode_caption, messages, image())


@settings(max_examples=20, **shared)
@given(data=st.data())
def test_every_max_length_of_any_text_gives_an_intact_sample_or_a_counted_drop(image, data):
    processor, _ = case(*data.draw(st.sampled_from([c for c in CASES if c[1] not in KNOWS_NO_SYSTEM])))
    check_every_length(processor, encode_dialogue, data.draw(conversations()), image())
