"""What inference engines read of a folder: an emulation, on a CPU, of the transformers backends of vLLM and SGLang.

No engine was run. What is done here is what their code does (vLLM's `model_executor/models/transformers`, SGLang's
`srt/models/transformers.py`): they build the headless model without weights under their own attention, put weights
into it by name, find images by token types or by the offsets of what was replaced, cut every field that the processor
gives into images, batch images of many requests, and have a head of their own. vLLM gives the model embeddings; SGLang
the ids of all requests in one row, with their images. A chat template is given contents as parts where it is seen to go
through these, and else texts and image tokens that are joined by line breaks. `transformers serve` is run, where it is
there.
"""

import base64
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import jinja2
import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoProcessor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import import_utils

from inference_vlm.export import export
from inference_vlm.native_processor import native_processor, template_of_parts
from modeling_vlm import VLMForConditionalGeneration
from tests import tiny
from tests.test_export import VISION


NAMES = ["vllm", "sglang"]


def attention(
    module, query, key, value, attention_mask, scaling=None, attention_instances=None, forward_batch=None, **kwargs
):
    """
    Causal, as both call it: the layer is found by its number, and no mask is made.

    `forward_batch` are the lengths of the requests that stand in one row; one where it is missing.
    """
    assert attention_mask is None
    attention_instances[module.layer_idx] += 1
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    requests = zip(*(part.split(forward_batch or part.shape[2], dim=2) for part in (query, key, value)))
    made = [nn.functional.scaled_dot_product_attention(*one, is_causal=True, scale=scaling) for one in requests]
    return torch.cat(made, dim=2).transpose(1, 2), None


def read_weights(folder, model):
    """A folder's weights under the names that vLLM's backend finds for them in a headless model, and its head."""
    renamings = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming)]
    children = "|".join([name for name, _ in (*model.named_children(), *model.named_parameters(recurse=False))])
    found = {}
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            for renaming in renamings:
                name, _ = renaming.rename_source_key(name)
            name = re.sub(rf"^(?!model\.)(({children}).*)", r"model.\1", name)
            name = re.sub(rf"^(model\.)((?!{children}).+)", r"\2", name)
            name = re.sub(r"^model\.(.+\.)*(lm_head.+)", r"\2", name)
            found[name.removeprefix("model.")] = tensor
    return found


class Engine:
    """A folder, read as an engine reads it."""

    def __init__(self, folder, name, dtype=torch.float32):
        AttentionInterface.register(name, attention)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        key = next(key for key in config.auto_map if key.startswith("AutoModel"))
        assert key == "AutoModel"
        assert get_class_from_dynamic_module(config.auto_map[key], folder).is_backend_compatible()
        self.text_config = config.get_text_config()
        assert config != self.text_config  # so it is multimodal
        self.text_config._attn_implementation = name
        with init_empty_weights(include_buffers=False):
            self.model = AutoModel.from_config(config, dtype=dtype, trust_remote_code=True)
        assert {parameter.device.type for parameter in self.model.parameters()} == {"meta"}
        with torch.device("meta"):  # once more, to see what is compiled
            assert type(AutoModel.from_config(config, trust_remote_code=True)) is type(self.model)
        weights = read_weights(folder, self.model)
        head = weights.pop("lm_head.weight", None)
        self.model.load_state_dict(
            {name: tensor.to(dtype) for name, tensor in weights.items()}, strict=True, assign=True
        )
        self.model.eval()
        tied = self.text_config.tie_word_embeddings or config.tie_word_embeddings
        self.head = self.model.get_input_embeddings().weight if tied else head.to(dtype)
        # What they compile, skip or quantise apart is found so.
        assert self.model.get_encoder(modality="image") is self.model.vision_tower
        assert self.model.get_decoder() is self.model.language_model
        self.calls = dict.fromkeys(range(self.text_config.num_hidden_layers), 0)
        self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)

    def by_types(self, text, images):
        """Ids, fields of each image, and where each image stands: from the token types, and the counts by size."""
        made = self.process(text, images, return_mm_token_type_ids=True)
        counts = self.counts(images)
        (ids,) = made.pop("input_ids").tolist()
        types = made.pop("mm_token_type_ids")[0]
        positions = torch.where(types == 1)[0]
        assert len(positions) == sum(counts["num_image_tokens"])
        places = [part.tolist() for part in positions.split(counts["num_image_tokens"])]
        return ids, self.cut(made, counts), places

    def by_offsets(self, text, images):
        """The same from what replaces each image token, for a text of image tokens alone."""
        token = self.processor.image_token
        made = self.process(token * len(images), images, return_text_replacement_offsets=True)
        offsets = made.pop("text_replacement_offsets")[0]
        assert [entry["type"] for entry in offsets] == ["image"] * len(images)
        tokenizer = self.processor.tokenizer
        repeated = [tokenizer.encode(entry["replacement"], add_special_tokens=False) for entry in offsets]
        assert [len(ids) for ids in repeated] == self.counts(images)["num_image_tokens"]
        ids, places = [], []
        remaining = iter(repeated)
        for id in tokenizer.encode(text):
            if id == self.processor.image_token_id:
                replacement = next(remaining)
                places.append([*range(len(ids), len(ids) + len(replacement))])
                ids += replacement
            else:
                ids.append(id)
        made.pop("input_ids")
        return ids, self.cut(made, self.counts(images)), places

    def process(self, text, images, **asked):
        """What the processor makes of them, in the model's precision."""
        made = self.processor(text=text, images=images, truncation=False, return_tensors="pt", **asked)
        return {key: value.to(self.model.dtype) if is_float(value) else value for key, value in made.items()}

    def most_tokens(self):
        """Those that memory is planned for: of a very large image, or of one as the image processor has it."""
        size = self.processor.image_processor.size
        sizes = [(10_000, 10_000), *([(size["height"], size["width"])] if "height" in size else [])]
        return max(self.processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"])

    def counts(self, images):
        return self.processor._get_num_multimodal_tokens(image_sizes=[(i.height, i.width) for i in images])

    def cut(self, made, counts):
        """Every field is cut into images by how many views each has, whatever the field is."""
        made.pop("attention_mask", None)
        views = counts["num_image_patches"]
        assert len(made["pixel_values"]) == sum(views)
        cut = {key: value.split(views) for key, value in made.items()}
        return [{key: parts[index] for key, parts in cut.items()} for index in range(len(views))]

    @torch.no_grad()
    def encode(self, images: list[dict]) -> list[torch.Tensor]:
        """Images of several requests at once."""
        batch = {key: torch.cat([image[key] for image in images]) for key in images[0]}
        features = self.model.get_image_features(batch.pop("pixel_values"), **batch)
        assert not isinstance(features, tuple)
        features = features.pooler_output
        if isinstance(features, torch.Tensor):
            views = [len(image["pixel_values"]) for image in images]
            flat = features.reshape(-1, features.shape[-1])
            return list(flat.split([count * (len(flat) // sum(views)) for count in views]))
        return list(features)

    @torch.no_grad()
    def logits(self, ids, features, places):
        """Those of one request."""
        embeds = self.model.get_input_embeddings()(torch.tensor(ids))
        for one, place in zip(features, places):
            assert one.shape == (len(place), self.text_config.hidden_size)
            embeds[place] = one
        states = self.model(
            input_ids=None, inputs_embeds=embeds[None], use_cache=False, position_ids=torch.arange(len(ids))[None],
            return_dict=False, attention_instances=self.calls,
        )[0][0]  # fmt: skip
        assert states.shape == (len(ids), self.text_config.hidden_size)
        return nn.functional.linear(states, self.head)

    @torch.no_grad()
    def logits_of_row(self, requests):
        """Those of requests, `(ids, fields of each image, places)`, that stand behind each other, with their pixels."""
        ids = torch.tensor([id for ids, *_ in requests for id in ids])
        images = [one for _, cut, _ in requests for one in cut]
        lengths = [len(ids) for ids, *_ in requests]
        states = self.model(
            input_ids=ids[None], inputs_embeds=None, use_cache=False, return_dict=False,
            position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
            attention_instances=self.calls, forward_batch=lengths,
            **{key: torch.cat([image[key] for image in images]) for key in images[0]},
        )[0][0]  # fmt: skip
        return nn.functional.linear(states, self.head).split(lengths)


def is_float(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


KINDS = {"siglip-llama": 1, "siglip-llama-tiles": 4, "vit-gpt2": 1, "vit-gpt2-tiles": 3}


@pytest.fixture(scope="module", params=KINDS)
def composed_folder(request, folders, tmp_path_factory):
    """A model whose images are tiled or not, and its folder."""
    pair = request.param.removesuffix("-tiles")
    model, processor = tiny.compose(*folders(pair), max_tiles=KINDS[request.param])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model.eval(), processor, folder


@pytest.mark.parametrize("read", ["by_types", "by_offsets"])
@pytest.mark.parametrize("name", NAMES)
def test_an_engine_that_reads_a_composed_folder_computes_its_logits(name, read, composed_folder, image):
    """Requests of several images, of other shapes, encoded together: those of tiles have other numbers of views."""
    model, processor, folder = composed_folder
    engine = Engine(folder, name)
    assert {child for child, _ in engine.model.named_children()} == {
        "vision_tower", "multi_modal_projector", "language_model"
    }  # fmt: skip
    requests = [
        ("<image>what is it?", [image(0, (64, 32))]),
        ("what<image>is<image><image>it?", [image(1, (31, 90)), image(2, (20, 20)), image(3, (70, 70))]),
    ]
    done = [getattr(engine, read)(*request) for request in requests]
    features = iter(engine.encode([one for _, images, _ in done for one in images]))
    for (text, images), (ids, _, places) in zip(requests, done):
        expected = processor(text=text, images=images, return_tensors="pt")
        assert ids == expected["input_ids"][0].tolist()
        found = engine.logits(ids, [next(features) for _ in images], places)
        with torch.no_grad():
            torch.testing.assert_close(found, model(**expected).logits[0], rtol=1e-4, atol=1e-4)
    assert set(engine.calls.values()) == {2}  # every layer, once a request
    longest = max(len(place) for _, _, places in done for place in places)
    assert engine.most_tokens() == longest or processor.max_tiles > 1  # of which they know a square image's alone


REQUESTS = {
    "<image>what is it?": [(64, 32)],
    "no image": [],
    "what<image>is<image><image>": [(31, 90), (9, 9), (70, 70)],
}


def test_requests_in_one_row_and_pixels_of_all_of_them_give_the_logits_of_each(composed_folder, image):
    """With a request between them that has no image, and images of other numbers of tiles."""
    model, processor, folder = composed_folder
    engine = Engine(folder, "sglang")
    texts = {text: [image(index, size) for index, size in enumerate(sizes)] for text, sizes in REQUESTS.items()}
    read = [
        engine.by_types(*pair) if pair[1] else (processor.tokenizer(pair[0])["input_ids"], [], [])
        for pair in texts.items()
    ]
    for (text, images), found in zip(texts.items(), engine.logits_of_row(read)):
        expected = processor(text=text, images=images, return_tensors="pt")
        with torch.no_grad():
            torch.testing.assert_close(found, model(**expected).logits[0], rtol=1e-4, atol=1e-4)


def test_images_are_encoded_in_another_order_and_beside_other_requests_to_the_same_features(composed_folder, image):
    """Engines keep what the processor made of an image, and encode it with whatever comes along."""
    engine = Engine(composed_folder[2], "vllm")
    (_, first, _), (_, then, _) = (
        engine.by_offsets("<image>" * len(sizes), [image(seed, size) for seed, size in enumerate(sizes)])
        for sizes in ([(64, 32), (20, 20)], [(31, 90)])
    )
    alone = [engine.encode([one])[0] for one in (*first, *then)]
    mixed = engine.encode([then[0], first[1], first[0]])
    for one, other in zip(mixed, (alone[2], alone[1], alone[0])):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_an_engine_in_half_precision_computes_what_the_model_does_in_it(composed_folder, image):
    """They take bfloat16 where the weights have 32 bits."""
    _, processor, folder = composed_folder
    engine = Engine(folder, "vllm", torch.bfloat16)
    half = VLMForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()
    text, images = "<image>is<image>it?", [image(1, (31, 90)), image(2, (20, 20))]
    ids, cut, places = engine.by_types(text, images)
    assert {one["pixel_values"].dtype for one in cut} == {torch.bfloat16}
    found = engine.logits(ids, engine.encode(cut), places)
    with torch.no_grad():
        expected = half(**processor(text=text, images=images, return_tensors="pt").to(torch.bfloat16)).logits[0]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def gives_parts(template):
    """Whether engines give a template a content as parts: it goes through `message['content']` of a message itself."""
    tree = jinja2.Environment().parse(re.sub(r"{%-? *(end)?generation *-?%}", "", template))
    messages = {
        loop.target.name for loop in tree.find_all(jinja2.nodes.For) if getattr(loop.iter, "name", None) == "messages"
    }
    return any(
        isinstance(loop.iter, jinja2.nodes.Getitem)
        and getattr(loop.iter.node, "name", None) in messages
        and getattr(loop.iter.arg, "value", None) == "content"
        for loop in tree.find_all(jinja2.nodes.For)
    )


@pytest.mark.parametrize("name", tiny.TEMPLATES)
def test_engines_give_the_template_made_for_them_parts_which_it_writes_as_the_processor_does(name, image):
    processor = tiny.processor_of("byte-level", name, image_seq_length=16)
    template = template_of_parts(processor)
    assert gives_parts(template) and gives_parts(native_processor(processor, "full", 8, 0).chat_template)
    parts = [{"type": "text", "text": "is "}, {"type": "image"}, {"type": "text", "text": "it\n?"}]
    for content in (parts, parts[1:], "is it?"):
        messages = [{"role": "user", "content": content}]
        said = processor.tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        assert said == processor.apply_chat_template(messages, add_generation_prompt=True)
    if name == "chatml":
        assert not gives_parts(processor.chat_template)  # of a language model that knew texts alone


def test_the_engines_headless_model_is_built_only_under_their_attention(composed_folder):
    _, _, folder = composed_folder
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert type(AutoModel.from_config(config, trust_remote_code=True)).__name__ == "VLMForConditionalGeneration"
    for name in NAMES:
        AttentionInterface.register(name, attention)
        config.get_text_config()._attn_implementation = name
        with init_empty_weights(include_buffers=False):
            assert type(AutoModel.from_config(config, trust_remote_code=True)).__name__ == "VLMModel"


def test_grids_once_a_view_are_read_as_those_of_images_in_generation_too(folders, image):
    model, processor = tiny.compose(*folders("siglip-llama"), max_tiles=4)
    model.eval()
    inputs = {"text": ["a<image><image>b", "c<image>d"], "images": [image(0, (64, 32)), image(1), image(2, (96, 32))]}
    plain = processor(**inputs, padding=True, return_tensors="pt")
    asked = processor(**inputs, padding=True, return_tensors="pt", return_mm_token_type_ids=True)
    assert len(plain["image_grids"]) == 3 and len(asked["image_grids"]) == len(asked["pixel_values"]) > 3
    del asked["mm_token_type_ids"]
    for beams in (1, 2):
        greedy = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
        assert torch.equal(model.generate(**plain, **greedy), model.generate(**asked, **greedy))


@pytest.mark.parametrize("encoder", ["siglip", "clip", "dinov2"])
def test_the_weights_of_an_exported_folder_are_found_by_name(encoder, folders, tmp_path):
    """By the backend above; vLLM's own LLaVA and SGLang's look for the first words and for the Hub's inner ones."""
    VISION[encoder](tmp_path / "vision")
    size = {"image_size": 32} if encoder == "dinov2" else {}
    model, processor = tiny.compose(tmp_path / "vision", folders("siglip-llama")[1], vision_feature_layer=-2, **size)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    export(str(tmp_path / "saved"), tmp_path / "exported")
    headless = AutoModel.from_pretrained(tmp_path / "exported")
    weights = read_weights(tmp_path / "exported", headless)
    assert torch.equal(weights.pop("lm_head.weight"), model.lm_head.weight)
    held = headless.state_dict()
    assert weights.keys() == held.keys() and all(torch.equal(weights[name], held[name]) for name in held)


# -- a native folder, served ------------------------------------------------------------------------------------------


@contextmanager
def served(folder, log) -> Iterator[str]:
    """`transformers serve FOLDER`: the address that it answers at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = "from transformers.cli.transformers import main; main()"
    how = ["serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with open(log, "w") as written:
        server = subprocess.Popen(
            [sys.executable, "-c", start, *how], stdout=written, stderr=written, env=environment, cwd=log.parent
        )
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            assert server.poll() is None, log.read_text()[-2000:]
            try:
                urllib.request.urlopen(f"{address}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        server.wait(20)


def is_serve_available() -> bool:
    return getattr(import_utils, "is_serve_available", bool)()


@pytest.mark.skipif(not is_serve_available(), reason="needs transformers[serving]")
@pytest.mark.parametrize("layer", [None, pytest.param(-2, marks=pytest.mark.slow)])
def test_transformers_serve_takes_an_exported_folder_unchanged(layer, folders, image, tmp_path):
    """With an image in the request, and without; and says what the composed model says."""
    model, processor = tiny.compose(*folders("siglip-llama"), vision_feature_layer=layer)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    export(str(tmp_path / "saved"), tmp_path / "exported")
    model = VLMForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
    image(0).save(tmp_path / "image.png")
    url = "data:image/png;base64," + base64.b64encode((tmp_path / "image.png").read_bytes()).decode()
    text = {"type": "text", "text": "what is it?"}
    contents = ([{"type": "image_url", "image_url": {"url": url}}, text], [text], "what is it?")
    with served(tmp_path / "exported", tmp_path / "log") as address:
        for content in contents:
            body = {
                "model": str(tmp_path / "exported"), "messages": [{"role": "user", "content": content}],
                "max_tokens": 5, "temperature": 0.0,
            }  # fmt: skip
            asked = urllib.request.Request(
                f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(asked, timeout=120) as answer:
                said = json.load(answer)["choices"][0]["message"]["content"]
            parts = [{"type": "image", "image": image(0)}, text] if content is contents[0] else [text]
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True,
                return_tensors="pt",
            )  # fmt: skip
            written = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            assert said == processor.decode(written, skip_special_tokens=True)
