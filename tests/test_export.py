"""A composed model as one of the library's own: the same ids, pixels, logits and answers, without this package's code.

Which pairs of the matrix fit, and what is tried on them, is in `exporting.py`.
"""

import json
import os

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPVisionModel,
    Dinov2Model,
    LlavaForConditionalGeneration,
)

from inference_vlm import export as exporting
from inference_vlm.export import export, main
from inference_vlm.native_processor import inputs_of
from modeling_vlm import VLMForConditionalGeneration
from modeling_vlm.native_vlm import misfits, native_form
from processing import VLMProcessor
from tests import matrix, tiny
from tests.exporting import BEGIN, END, PAGE, WAYS, compose, difference, encoder_row, native_of, text_row, try_all
from tests.isolated import run_without_package
from tests.matrix import ENCODERS, LANGUAGE_MODELS, config_of
from training_vlm.load import load_model
from training_vlm.settings import parse_arguments
from training_vlm.stages import SFT


def save_clip(folder):
    torch.manual_seed(6)
    CLIPVisionModel(config_of(*ENCODERS["CLIP"][0][0])).save_pretrained(folder)
    sizes = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=sizes).save_pretrained(folder)
    return folder


def save_dinov2(folder):
    """Its positions were learned for larger images, and it interpolates them itself."""
    torch.manual_seed(7)
    kind, settings = ENCODERS["DINOv2"][0][0]
    Dinov2Model(config_of(kind, {**settings, "image_size": 48})).save_pretrained(folder)
    sizes = {"height": 32, "width": 32}
    BitImageProcessorPil(size={"shortest_edge": 36}, crop_size=sizes).save_pretrained(folder)
    return folder


PILLOW = {"backend": "pil"}
"""Which the library does not choose by itself where torchvision is installed."""
VISION = {"vit": tiny.save_vit, "siglip": tiny.save_siglip, "clip": save_clip, "dinov2": save_dinov2}
TEXT = {"gpt2": tiny.save_gpt2, "llama": tiny.save_llama}
LLAVA, DEEPSEEK = "LlavaForConditionalGeneration", "DeepseekVLForConditionalGeneration"
CASES = {
    "clip-llama": ("clip", "llama", {}, LLAVA),
    "siglip-llama": ("siglip", "llama", {"vision_feature_layer": -2}, LLAVA),
    "siglip-llama-normed": ("siglip", "llama", {}, DEEPSEEK),
    "vit-gpt2": ("vit", "gpt2", {"vision_feature_layer": -1}, LLAVA),
    "vit-gpt2-full": ("vit", "gpt2", {"vision_feature_select_strategy": "full"}, DEEPSEEK),
    "dinov2-gpt2": (
        "dinov2",
        "gpt2",
        {"vision_feature_layer": -2, "image_size": 32, "projector_type": "linear"},
        LLAVA,
    ),
    "clip-opt": ("clip", "OPT", {"projector_type": "identity"}, LLAVA),
    "clip-cohere": ("clip", "Cohere", {}, LLAVA),
    "siglip-tied": ("siglip", "Llama, tied", {"vision_feature_layer": -2}, LLAVA),
    "clip-moe": ("clip", "Qwen3-MoE", {}, LLAVA),
}
"""Name -> encoder, language model, settings and the class that holds it."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made(name)` is the folder of a case and that of what it was exported as."""
    done = {}

    def get(name):
        if name not in done:
            root = tmp_path_factory.mktemp(name)
            vision, text, options, _ = CASES[name]
            VISION[vision](root / "vision")
            if text in TEXT:
                TEXT[text](root / "text")
            else:
                matrix.save_language_model(text, root / "text")
            torch.manual_seed(0)
            strategy = options.get("vision_feature_select_strategy", "patch")
            others = {key: value for key, value in options.items() if key != "vision_feature_select_strategy"}
            model, processor = tiny.compose(root / "vision", root / "text", strategy, **others)
            matrix.shake(model)
            model.save_pretrained(root / "saved")
            processor.save_pretrained(root / "saved")
            assert main([str(root / "saved"), str(root / "exported")]) == 0
            done[name] = root / "saved", root / "exported"
        return done[name]

    return get


def ours(folder):
    return VLMForConditionalGeneration.from_pretrained(folder).eval(), VLMProcessor.from_pretrained(folder)


def theirs(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder, **PILLOW)


def asked(image, *more):
    content = [*({"type": "image", "image": i} for i in (image, *more)), {"type": "text", "text": "what is it?"}]
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize("name", CASES)
def test_an_exported_folder_is_one_of_the_librarys_own_with_the_same_ids_pixels_logits_and_answers(name, made, image):
    saved, exported = made(name)
    model, processor = ours(saved)
    native, other = theirs(exported)
    assert type(native).__name__ == CASES[name][3] and type(other).__name__ == "LlavaProcessor"
    greedy = {"max_new_tokens": 6, "do_sample": False}
    for messages in (asked(image(0)), asked(image(1, (90, 31)), image(2, (32, 32))), asked(image(3))[:1]):
        inputs, found = inputs_of(processor, messages), inputs_of(other, messages)
        assert torch.equal(inputs["input_ids"], found["input_ids"])
        assert torch.equal(inputs["pixel_values"], found["pixel_values"])
        with torch.no_grad():
            expected, logits = model(**inputs).logits, native(**found).logits
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(model.generate(**inputs, **greedy), native.generate(**found, **greedy))
    words = [{"role": "user", "content": [{"type": "text", "text": "how many?"}]}]
    inputs = inputs_of(other, words)
    with torch.no_grad():
        torch.testing.assert_close(native(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["clip-llama", "vit-gpt2", "clip-opt", "siglip-llama-normed"])
def test_a_batch_behind_padding_is_answered_as_by_the_composed_model(name, made, image):
    """With learned positions too, and with prompts of very different length."""
    saved, exported = made(name)
    model, _ = ours(saved)
    native, other = theirs(exported)
    long = [{"role": "user", "content": [{"type": "text", "text": "describe the picture in many words, please"}]}]
    inputs = other.apply_chat_template(
        [asked(image(0)), asked(image(1), image(2)), long], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt", processor_kwargs={"padding": True},
    )  # fmt: skip
    assert inputs["attention_mask"].min() == 0
    greedy = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(native.generate(**inputs, **greedy), model.generate(**inputs, **greedy))


@pytest.mark.parametrize("name", CASES)
def test_an_exported_folder_holds_no_code_and_names_none(name, made):
    _, exported = made(name)
    assert not [path.name for path in exported.iterdir() if path.suffix == ".py"]
    for path in exported.glob("*.json"):
        assert "auto_map" not in path.read_text() and "vlm" not in path.read_text().lower().replace("deepseekvl", "")
    assert not list(exported.parent.glob("*unfinished*"))


@pytest.mark.parametrize("name", ["siglip-llama", "vit-gpt2", "siglip-tied"])
def test_generation_settings_dtype_and_tokenizer_are_kept(name, made):
    saved, exported = made(name)
    model, native = ours(saved)[0], theirs(exported)[0]
    for field in ("eos_token_id", "pad_token_id", "suppress_tokens", "bos_token_id"):
        assert getattr(native.generation_config, field) == getattr(model.generation_config, field)
    assert native.dtype == model.dtype and native.config.image_token_id == model.config.image_token_id
    one, other = AutoTokenizer.from_pretrained(saved), AutoTokenizer.from_pretrained(exported)
    assert one.get_vocab() == other.get_vocab() and other.padding_side == "left"
    for text in ("a cat", "User: what?\nAssistant:", "<image> naïve 你好 🙂"):
        plain = {"add_special_tokens": False}
        assert one(text, **plain)["input_ids"] == other(text, **plain)["input_ids"]
    assert native.config.tie_word_embeddings == (name == "siglip-tied")


def test_what_a_tokenizer_puts_before_a_text_is_left_out_only_where_a_conversation_would_get_it(made, image):
    """The Llama's template starts with no bos, and its tokenizer adds one; the library's processor would add it."""
    saved, _ = made("siglip-llama")
    out = saved.parent / "again"
    said = export(str(saved), out)
    assert "no longer puts <s> before a text" in said and "as in '<s><image>'" in said
    assert AutoTokenizer.from_pretrained(saved)("a cat")["input_ids"][0] == 1
    assert AutoTokenizer.from_pretrained(out)("a cat")["input_ids"][0] != 1
    own, other = VLMProcessor.from_pretrained(saved), AutoProcessor.from_pretrained(out, **PILLOW)
    caption = own(images=[image(0)], text="<image>"), other(images=[image(0)], text="<s><image>")
    assert caption[0]["input_ids"] == caption[1]["input_ids"]
    saved, _ = made("vit-gpt2")
    assert "before a text" not in export(str(saved), saved.parent / "again")


@pytest.mark.parametrize("ends", ["\ny", "\n("])
def test_that_a_tokenizer_reads_an_answer_together_with_what_stands_before_it_is_said(ends, image):
    """The composed model learned the two apart."""
    tokenizer = tiny.byte_level_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["pre_tokenizer"] |= {"use_regex": False}
    first, then = (pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(c)[0][0] for c in ends)
    state["model"]["merges"].insert(0, [first, then])
    state["model"]["vocab"][first + then] = len(tokenizer)
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    processor = tiny.processor_of(tokenizer, "chatml", image_seq_length=16)
    native = exporting.native_processor(processor, "full", 8, 0)
    said = exporting._fit_ids(processor, native, image(0))
    assert len(said) == 1 and "is read there together with the template around it, as other ids" in said[0]


@pytest.mark.parametrize("kind", list(VISION))
@pytest.mark.parametrize("mode", [None, "resize"])
def test_pixels_are_the_same_for_pictures_of_any_shape(kind, mode, tmp_path, image):
    VISION[kind](tmp_path / "vision")
    tiny.save_gpt2(tmp_path / "text")
    options = {"image_size": 32} if kind == "dinov2" else {}
    model, _ = tiny.compose(tmp_path / "vision", tmp_path / "text", vision_feature_layer=-2, **options)
    processor = VLMProcessor.from_backbones(
        str(tmp_path / "vision"), str(tmp_path / "text"), model.config, image_mode=mode
    )
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    export(str(tmp_path / "saved"), tmp_path / "exported")
    other = AutoProcessor.from_pretrained(tmp_path / "exported", **PILLOW)
    for seed, size in enumerate([(32, 32), (7, 200), (301, 64), (33, 31), (1, 1)]):
        picture = image(seed, size)
        assert torch.equal(inputs_of(processor, asked(picture))["pixel_values"],
                           inputs_of(other, asked(picture))["pixel_values"])  # fmt: skip
    for mode in ("L", "1", "P", "CMYK"):
        picture = image(5, (50, 30)).convert(mode)
        own, found = (one(images=picture, text="<image>", return_tensors="pt") for one in (processor, other))
        assert torch.equal(own["pixel_values"], found["pixel_values"])
    known = other._get_num_multimodal_tokens(image_sizes=[(10, 20), (10000, 10000)])
    assert known.num_image_tokens == [model.config.image_seq_length] * 2 and known.num_image_patches == [1, 1]


@pytest.mark.parametrize("tokenizer", tiny.TOKENIZERS)
@pytest.mark.parametrize("template", tiny.TEMPLATES)
def test_every_template_is_written_and_read_as_by_the_composed_processor(template, tokenizer, image):
    processor = tiny.processor_of(tokenizer, template, image_seq_length=16)
    native = exporting.native_processor(processor, "full", 8, 0)
    exporting._fit_ids(processor, native, image(0))
    for messages in exporting.conversations(image(0), processor):
        for end in (True, False):
            expected, found = (
                one.apply_chat_template(messages, add_generation_prompt=end) for one in (processor, native)
            )
            assert found == expected
        assert inputs_of(processor, messages)["input_ids"].tolist() == inputs_of(native, messages)["input_ids"].tolist()
    strings = [{"role": "user", "content": "what is it?"}]
    assert native.apply_chat_template(strings) == processor.apply_chat_template(strings)


def test_an_exported_folder_learns_from_the_same_loss_and_gradients(made, image):
    saved, exported = made("clip-llama")
    (model, _), (native, other) = ours(saved), theirs(exported)
    inputs = inputs_of(other, [*asked(image(0)), {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}])
    labels = torch.where(inputs["input_ids"] == other.image_token_id, -100, inputs["input_ids"])
    losses = [one.train()(**inputs, labels=labels).loss for one in (model, native)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
    for loss in losses:
        loss.backward()
    found = {name: parameter.grad for name, parameter in native.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-6)


# -- in a process without this package --------------------------------------------------------------------------------

CHILD = """
import json
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

torch.set_num_threads(1)
work, names, found = Path(sys.argv[1]), json.loads(sys.argv[2]), {"importable": importable}
image = Image.open(work / "image.png")
messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what is it?"}]}]
for name, folder in names.items():
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        torch.save(model(**inputs).logits, work / f"{name}.pt")
    asking = pipeline("image-text-to-text", model=folder)
    answer = asking(text=messages, max_new_tokens=6, do_sample=False, return_full_text=False)
    found[name] = {"module": type(model).__module__, "answer": answer[0]["generated_text"]}
(work / "found.json").write_text(json.dumps(found))
"""


def test_a_process_without_this_package_and_without_trust_in_code_answers_the_same(made, tmp_path, image):
    names = {name: str(made(name)[1]) for name in ("clip-llama", "siglip-llama-normed", "vit-gpt2")}
    image(0).save(tmp_path / "image.png")
    run_without_package(CHILD, tmp_path, json.dumps(names))
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.pop("importable") == [] and found.keys() == names.keys()
    for name, said in found.items():
        model, processor = ours(made(name)[0])
        inputs = inputs_of(processor, asked(image(0)))
        with torch.no_grad():
            expected = model(**inputs).logits
        torch.testing.assert_close(torch.load(tmp_path / f"{name}.pt"), expected, rtol=1e-5, atol=1e-5)
        written = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        assert said["answer"] == processor.decode(written[0], skip_special_tokens=True)
        assert said["module"].startswith("transformers.models.")


# -- how it is written ------------------------------------------------------------------------------------------------


def test_weights_have_the_names_of_the_classs_checkpoints_on_the_hub(made):
    """As engines read them: the parts by their first word, experts one by one."""
    for name, part in (
        ("clip-moe", "language_model.model.layers.0.mlp.experts.1.gate_proj.weight"),
        ("siglip-llama", "language_model.lm_head.weight"),
        ("dinov2-gpt2", "vision_tower.embeddings.cls_token"),
    ):
        names = load_file(made(name)[1] / "model.safetensors").keys()
        assert part in names
        assert {name.split(".")[0] for name in names} == {"language_model", "vision_tower", "multi_modal_projector"}
        inner = "vision_tower.vision_model.embeddings."
        assert any(name.startswith(inner) for name in names) == (name != "dinov2-gpt2")


def test_weights_come_in_files_of_the_size_that_is_asked_for_and_in_another_dtype(made, image):
    saved, _ = made("clip-llama")
    out = saved.parent / "shards"
    assert "(bfloat16)" in export(str(saved), out, dtype="bfloat16", max_shard_size="100KB")
    assert len(list(out.glob("model-*.safetensors"))) > 1 and (out / "model.safetensors.index.json").is_file()
    native, _ = theirs(out)
    assert {parameter.dtype for parameter in native.parameters()} == {torch.bfloat16}


def test_a_factor_of_the_logits_goes_into_the_head(made):
    """Cohere's: the native class has none, so an engine must not apply it a second time."""
    native = theirs(made("clip-cohere")[1])[0]
    assert config_of(*LANGUAGE_MODELS["Cohere"]).logit_scale == 0.25 and native.config.text_config.logit_scale == 1.0
    assert not native.config.tie_word_embeddings
    embeddings, head = native.get_input_embeddings().weight, native.lm_head.weight
    assert torch.equal(head, embeddings * 0.25)


def test_engines_find_the_language_models_own_class(made):
    for name, expected in (("clip-llama", "LlamaForCausalLM"), ("vit-gpt2", "GPT2LMHeadModel")):
        assert theirs(made(name)[1])[0].config.text_config.architectures == [expected]


def test_adapters_are_merged(tmp_path, image):
    from peft import LoraConfig, get_peft_model

    save_clip(tmp_path / "vision")
    tiny.save_gpt2(tmp_path / "text")
    base, processor = tiny.compose(tmp_path / "vision", tmp_path / "text")
    base.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    base = VLMForConditionalGeneration.from_pretrained(tmp_path / "base")
    how = LoraConfig(r=2, target_modules=r".*language_model.*c_attn", modules_to_save=["multi_modal_projector"])
    adapted = get_peft_model(base, how)
    matrix.shake(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    processor.save_pretrained(tmp_path / "adapter")
    base.config.save_pretrained(tmp_path / "adapter")
    export(str(tmp_path / "adapter"), tmp_path / "exported")
    native, other = theirs(tmp_path / "exported")
    inputs = inputs_of(other, asked(image(0)))
    merged = VLMForConditionalGeneration.from_pretrained(tmp_path / "adapter", merge_adapter=True).eval()
    plain = VLMForConditionalGeneration.from_pretrained(tmp_path / "base").eval()
    with torch.no_grad():
        found = native(**inputs).logits
        torch.testing.assert_close(found, merged(**inputs).logits, rtol=1e-5, atol=1e-5)
        assert (found - plain(**inputs).logits).abs().max() > 1e-2


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left")])
def test_the_folder_appears_whole_or_not_at_all(error, made, monkeypatch, tmp_path, capsys):
    saved, _ = made("clip-llama")
    capsys.readouterr()
    out = tmp_path / "out"

    def full(model, folder, *args, **kwargs):
        folder.mkdir()
        (folder / "model.safetensors").write_text("half of it")
        raise error

    with monkeypatch.context() as broken:
        broken.setattr(LlavaForConditionalGeneration, "save_pretrained", full)
        assert main([str(saved), str(out)]) == 1
        assert f"error: {out} could not be written: " in capsys.readouterr().err
        assert not list(tmp_path.iterdir())
    killed, other, mine = (tmp_path / f"out.unfinished{end}" for end in ("-1", "-2", ""))
    for folder in (killed, other, mine, out):
        folder.mkdir()
    os.utime(killed, (0, 0))
    assert main([str(saved), str(out)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"out", other.name, mine.name}  # another process may be at it
    assert (out / "config.json").is_file() and out.stat().st_mode == other.stat().st_mode


def test_what_is_not_exact_is_not_kept(made, monkeypatch, tmp_path, capsys):
    """The weights are those on the disk: one that is lost on the way there is seen."""
    saved, _ = made("clip-llama")
    model = exporting._as_native

    def losing(*args):
        native = model(*args)
        layer = native.model.multi_modal_projector.linear_1
        layer.bias = torch.nn.Parameter(layer.bias + 1e-2)  # not in place: the composed model shares its weights
        return native

    monkeypatch.setattr(exporting, "_as_native", losing)
    assert main([str(saved), str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ") and "what was written gives logits that differ by" in said
    assert not (tmp_path / "out").exists()


# -- what is refused --------------------------------------------------------------------------------------------------

REFUSED = {
    "resampler": ({"projector_type": "resampler"}, "projector_type=resampler has no", {"projector_type": "mlp"}),
    "shuffle": ({"projector_type": "pixel_shuffle"}, "pixel_shuffle has no counterpart", {"projector_type": "linear"}),
    "norm": ({"projector_type": "gelu_norm"}, "gelu_norm has no counterpart", {"projector_type": "mlp"}),
    "cls": ({"strategy": "cls"}, "the CLS token alone", {"strategy": "full"}),
    "tiles": ({"max_tiles": 4}, "images are cut into tiles", {"max_tiles": 1}),
    "size": (
        {"image_size": 48},
        "positions are interpolated to an image_size of 48x48 .its own, 32",
        {"image_size": 32},
    ),
    "registers": ({"encoder": "DINOv3 ViT"}, "all but the first 5 tokens", {"strategy": "full"}),
    "normed": ({"encoder": "DINOv2"}, "read after the encoder's last norm", {"layer": -2}),
    "linear": ({"encoder": "SigLIP", "projector_type": "linear"}, "after the encoder's last norm", {"layer": -2}),
    "patches": ({"encoder": "SigLIP 2"}, "is given patches that Duet cuts", {"encoder": "SigLIP"}),
    "pair": ({"encoder": "DINOv2 + SigLIP"}, "two vision encoders", {"encoder": "SigLIP"}),
    "bias": ({"text": "Phi"}, r"head \(phi\) has a bias", {"text": "Llama"}),
    "cap": ({"text": "Gemma 2"}, r"\(gemma2\) caps its logits", {"text": "Qwen3"}),
    "width": ({"text": "OPT, embeddings projected"}, "not as wide as its states, 32", {"text": "Llama"}),
}
"""Name -> what is asked, the reason, and the nearest that is exported."""


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_with_the_reason_and_the_nearest_that_fits(name, capsys):
    given, reason, nearest = REFUSED[name]
    asked = {"encoder": "CLIP", "text": "Llama", "layer": None, **given}
    model = compose(**asked)
    with pytest.raises(ValueError, match=reason) as refused:
        native_form(model)
    assert str(refused.value).count(" can be exported)") == 1 and "\n" not in str(refused.value)
    near = compose(**{**asked, **nearest})
    assert difference(near, native_of(near)) == 0


def test_composing_says_in_its_line_whether_the_pair_can_be_exported(capsys):
    for encoder, layer, expected in (
        ("CLIP", None, f"; exported natively as {LLAVA}"),
        ("SigLIP", None, f"; exported natively as {DEEPSEEK}"),
        ("DINOv2", None, "; not exported natively: the features are read after the encoder's last norm"),
    ):
        VLMForConditionalGeneration.from_backbones(
            matrix.encoder_of(encoder), config_of(*LANGUAGE_MODELS["Llama"]), vision_feature_layer=layer
        )
        said = capsys.readouterr().out
        assert expected in said and said.count("\n") == 1
    VLMForConditionalGeneration.from_backbones(
        matrix.encoder_of("DINOv2"), config_of(*LANGUAGE_MODELS["Phi"]), vision_feature_layer=-2, max_tiles=2
    )
    said = capsys.readouterr().out
    assert "images are cut into tiles" in said and "head (phi) has a bias" in said


@pytest.mark.parametrize("mode, expected", [("pad", "yet not exported natively: image_mode=pad"), ("resize", None)])
def test_a_run_says_where_the_processor_keeps_a_model_from_being_exported(mode, expected, folders, capsys):
    vision, text = map(str, folders("siglip-llama"))
    arguments = parse_arguments(
        SFT,
        [
            "--vision_model",
            vision,
            "--text_model",
            text,
            "--dataset",
            "shapes",
            "--image_mode",
            mode,
            "--output_dir",
            "o",
        ],
    )
    load_model(SFT, arguments, None)
    said = capsys.readouterr().out
    assert "; exported natively as " in said and ("yet not" in said) == bool(expected) and (expected or "") in said


@pytest.mark.parametrize("mode", ["pad", "crop"])
def test_an_image_mode_that_the_library_has_not_is_refused(mode, made, tmp_path, capsys):
    saved, _ = made("clip-llama")
    model, processor = ours(saved)
    processor.image_mode = mode
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    assert main([str(tmp_path / "saved"), str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert f"image_mode={mode} makes images fit as no image processor" in said and "and trained in that way." in said
    assert not (tmp_path / "out").exists()


def test_the_empty_folder_that_one_stands_in_can_be_named(made, monkeypatch, tmp_path, capsys):
    saved, _ = made("clip-llama")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main([str(saved), "."]) == 0
    assert (tmp_path / "here" / "model.safetensors").exists()


def test_what_is_no_composed_model_gives_one_line(made, tmp_path, capsys):
    saved, exported = made("clip-llama")
    (tmp_path / "full").mkdir()
    mine = tmp_path / "full" / "file"
    mine.write_text("mine")
    capsys.readouterr()
    for name, out, expected in (
        (exported, tmp_path / "out", "is of type llava, which Duet did not compose"),
        (tmp_path / "nowhere", tmp_path / "out", "could not be loaded"),
        (saved, tmp_path / "full", "holds something already"),
        ("unread", mine / "in" / "it", f"cannot be made: {mine} is a file"),
    ):
        assert main([str(name), str(out)]) == 1
        said = capsys.readouterr().err
        assert said.startswith("error: ") and expected in said and said.count("\n") == 1
    for option, given, expected in (
        ("--max_shard_size", "much", "max_shard_size=much: expected a number and its unit"),
        ("--revision", "v2", f"revision=v2: {saved} is a folder, which has no revisions"),
    ):
        assert main([str(saved), str(tmp_path / "out"), option, given]) == 1
        assert expected in capsys.readouterr().err
    assert mine.read_text() == "mine" and not (tmp_path / "out").exists()


def test_a_folder_with_the_code_of_an_earlier_duet_names_the_command_that_mends_it(made, monkeypatch, tmp_path, capsys):
    saved, _ = made("clip-llama")
    monkeypatch.delattr(VLMForConditionalGeneration, "native_form")
    model, processor = ours(saved)
    monkeypatch.setattr(exporting, "load", lambda *args, **kwargs: (model, processor))
    assert main([str(saved), str(tmp_path / "out")]) == 1
    assert f"python -m inference_vlm.update {saved}" in capsys.readouterr().err


# -- the matrix -------------------------------------------------------------------------------------------------------

REPRESENTATIVE = (
    "GPT-2",
    "OPT",
    "BLOOM",
    "MPT",
    "Falcon-H1",
    "Mixtral",
    "Gemma 3 text",
    "Granite",
    "LFM2",
    "DeepSeek-V3",
)


@pytest.mark.parametrize("text", REPRESENTATIVE)
def test_language_models_of_every_kind_have_the_same_logits_alone_and_behind_padding(text):
    model = compose("CLIP", text, None)
    assert difference(model, native_of(model)) <= 1e-6


@pytest.mark.parametrize("encoder", ENCODERS)
def test_encoders_of_every_kind_have_the_same_logits_or_are_refused_as_the_page_says(encoder):
    assert encoder_row(encoder) in PAGE.read_text(encoding="utf-8").splitlines()
    for layer, strategy in WAYS:
        model = compose(encoder, "Llama", layer, strategy)
        if not misfits(model):
            assert difference(model, native_of(model)) == 0


@pytest.mark.parametrize("text", ["Llama", "Phi", "Gemma 4 text", "OPT, embeddings projected"])
def test_language_models_are_exported_or_refused_as_the_page_says(text):
    assert text_row(text) in PAGE.read_text(encoding="utf-8").splitlines()


def test_the_page_lists_every_encoder_and_every_language_model():
    lines = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].splitlines()
    names = [line.strip("|").split("|")[0].strip() for line in lines if line.startswith("|")]
    assert [name for name in names if name in ENCODERS] == list(ENCODERS)
    assert [name for name in names if name in LANGUAGE_MODELS] == list(LANGUAGE_MODELS)


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_pair_is_exact_or_refused(encoder):
    tried = try_all(encoder)
    assert len(tried) == len(LANGUAGE_MODELS) * len(matrix.LAYERS)
    assert all(value is None or value <= 1e-6 for value in tried.values())
