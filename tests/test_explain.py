"""What an answer hangs on: values that a plain reading gives too, maps that theory knows, and a page of them."""

import html
import json
import re
import shutil
import subprocess

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from PIL import Image, ImageStat
from transformers import FalconH1Config, LlamaConfig, MixtralConfig, SiglipVisionConfig, ViTConfig

from inference_vlm import explain as command
from inference_vlm.answering import Answerer, greedy
from inference_vlm.explain import Deletion, Explanation
from inference_vlm.explained_page import _curve, verdict, write_page
from inference_vlm.occlusion import Occlusion, Patch, patches_of
from inference_vlm.pieces import pieces_of
from modeling_vlm import VLMForConditionalGeneration
from processing import VLMProcessor, shapes
from processing.data_error_vlm import DuetError
from tests import tiny
from tests.matrix import LANGUAGE_MODELS


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
EYES = {**SIZES, "image_size": 32, "patch_size": 8}
TEXTS = {
    "llama": LlamaConfig(**SIZES, vocab_size=400, max_position_embeddings=256),
    "mixture": MixtralConfig(
        **SIZES, num_key_value_heads=2, vocab_size=400, num_local_experts=4, num_experts_per_tok=2, sliding_window=24
    ),
    "recurrent": FalconH1Config(**{**LANGUAGE_MODELS["Falcon-H1"][1], "vocab_size": 400}),
}


def lively(model, seed=5):
    """The model, with weights of which answers depend on what is seen."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def composed_of(vision, text, **options):
    """Model and processor of two configs."""
    tokenizer = tiny.byte_level_tokenizer(300)
    torch.manual_seed(0)
    model = VLMForConditionalGeneration.from_backbones(vision, text, tokenizer=tokenizer, **options)
    processor = VLMProcessor.from_backbones(vision, None, model.config, tokenizer=tokenizer)
    return lively(model), processor


@pytest.fixture
def seeing(composed):
    model, processor = composed
    return lively(model), processor


def asked(model, processor, pictures, question=None):
    """Who answers, and the prompt."""
    answerer = Answerer(model, processor)
    if question is None:
        return answerer, answerer.read_caption(pictures)
    parts = [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": question}]
    return answerer, answerer.read([{"role": "user", "content": parts}])


def explain(model, processor, pictures, question=None, **options) -> Explanation:
    answerer, prepared = asked(model, processor, pictures, question)
    return command.explain(answerer, prepared, question, **options)


def plainly(model, processor, pictures, shown, question, answer):
    """The log-probabilities of an answer about pictures, by the library alone, from their pixels; `shown` is seen."""
    prompt = asked(model, processor, pictures, question)[1].row
    ids = torch.tensor([[*prompt, *answer]])
    pixels = dict(processor.process_images(shown))
    with torch.no_grad():
        logits = model(input_ids=ids, **pixels).logits[0, len(prompt) - 1 : -1].double()
    logits[:, processor.image_token_id] = -float("inf")
    return logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]


def assert_as_plainly(model, processor, pictures, question, found):
    """Every value is that of a plain reading of the pictures with the patch hidden in them."""
    answer = [piece.id for piece in found.pieces]
    whole = plainly(model, processor, pictures, pictures, question, answer)
    assert torch.allclose(torch.tensor(found.log_probs).double(), whole, atol=1e-4)
    for patch, falls in zip(found.patches, found.falls):
        shown = list(pictures)
        shown[patch.picture] = shown[patch.picture].copy()
        colour = [round(mean) for mean in ImageStat.Stat(shown[patch.picture]).mean]
        shown[patch.picture].paste(tuple(colour), patch.box)
        expected = whole - plainly(model, processor, pictures, shown, question, answer)
        assert torch.allclose(falls, expected, atol=1e-4), patch
    assert found.falls.abs().max() > 5e-3


def test_every_fall_is_that_of_a_plain_reading_of_the_hidden_picture(seeing, image):
    model, processor = seeing
    found = explain(model, processor, [image(1)], "what is it?", max_new_tokens=4, batch_size=3, seeds=1)
    assert found.shares and len(found.patches) == 16 and found.falls.shape == (16, len(found.pieces))
    assert_as_plainly(model, processor, [image(1)], "what is it?", found)


@pytest.mark.parametrize("text", TEXTS)
def test_mixtures_windows_and_recurrent_models_are_explained_exactly(text, image):
    model, processor = composed_of(ViTConfig(**EYES), TEXTS[text])
    pictures = [image(1), image(2, (30, 50))]
    found = explain(model, processor, pictures, "left of it?", max_new_tokens=2, grid=(1, 2), batch_size=3, seeds=1)
    assert found.shares or text == "recurrent"
    assert_as_plainly(model, processor, pictures, "left of it?", found)


@pytest.mark.slow
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_every_language_model_is_explained_exactly(name, image):
    kind, settings = LANGUAGE_MODELS[name]
    model, processor = composed_of(ViTConfig(**EYES), getattr(transformers, f"{kind}Config")(**settings))
    pictures = [image(1), image(2, (30, 50))]
    found = explain(model, processor, pictures, "left?", max_new_tokens=2, grid=(1, 2), batch_size=3, seeds=1)
    assert_as_plainly(model, processor, pictures, "left?", found)


def test_a_cache_that_cannot_be_gone_on_from_is_not_used(image, monkeypatch):
    model, processor = composed_of(ViTConfig(**EYES), TEXTS["llama"])
    expected = explain(model, processor, [image(1)], "what?", max_new_tokens=3, grid=(2, 2), seeds=1)
    read = Occlusion._prefix

    def broken(self, first):
        cache = read(self, first)
        cache.layers[0].values.zero_()
        return cache

    monkeypatch.setattr(Occlusion, "_prefix", broken)
    found = explain(model, processor, [image(1)], "what?", max_new_tokens=3, grid=(2, 2), seeds=1)
    assert expected.shares and not found.shares
    assert torch.allclose(found.falls, expected.falls, atol=1e-5)


@pytest.mark.parametrize("mode", [None, "pad", "crop"])
def test_a_patch_is_hidden_in_the_picture_and_then_tiled(mode, image):
    model, processor = composed_of(ViTConfig(**EYES), TEXTS["llama"], max_tiles=4)
    processor.image_mode = mode
    picture = image(3, (90, 40))
    assert processor.tile_grid(40, 90) != (1, 1)
    found = explain(model, processor, [picture], "what is it?", max_new_tokens=2, grid=(2, 4), batch_size=5, seeds=1)
    assert_as_plainly(model, processor, [picture], "what is it?", found)


def test_pairs_of_encoders_and_captions_of_several_images_are_explained(image):
    eyes = (ViTConfig(**EYES), SiglipVisionConfig(**{**SIZES, "image_size": 16, "patch_size": 4}))
    model, processor = composed_of(eyes, TEXTS["llama"])
    pictures = [image(1), image(2)]
    found = explain(model, processor, pictures, max_new_tokens=3, batch_size=7, seeds=1)
    assert found.question is None and len(found.patches) == 32
    assert_as_plainly(model, processor, pictures, None, found)


def test_adapters_are_explained_as_they_answer(seeing, image):
    model, processor = seeing
    targets = [
        name for name, module in model.model.language_model.named_modules() if name.endswith(("q_proj", "c_attn"))
    ]
    torch.manual_seed(7)
    adapted = get_peft_model(model, LoraConfig(target_modules=targets, init_lora_weights=False, r=4, lora_alpha=32))
    found = explain(adapted.eval(), processor, [image(1)], "what is it?", max_new_tokens=3, grid=(2, 2), seeds=1)
    assert_as_plainly(adapted, processor, [image(1)], "what is it?", found)
    with adapted.disable_adapter():
        other = plainly(adapted, processor, [image(1)], [image(1)], "what is it?", [piece.id for piece in found.pieces])
    assert (torch.tensor(found.log_probs) - other).abs().max() > 1e-2


def test_the_log_probabilities_are_those_of_the_scores_of_generate(seeing, image):
    model, processor = seeing
    found = explain(model, processor, [image(4)], "how many?", max_new_tokens=5, grid=(1, 2), seeds=1)
    content = [{"type": "image", "image": image(4)}, {"type": "text", "text": "how many?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    model.generation_config = greedy(model, processor, 5)
    written = model.generate(**inputs, return_dict_in_generate=True, output_scores=True)
    scores = torch.stack(written.scores, 1)[0].log_softmax(-1)
    ids = written.sequences[0, inputs["input_ids"].shape[1] :]
    assert [piece.id for piece in found.pieces] == ids.tolist()
    assert scores.gather(-1, ids[:, None])[:, 0].tolist() == pytest.approx(found.log_probs, abs=1e-5)


def test_the_batch_size_changes_no_value(seeing, image):
    model, processor = seeing
    pictures = [image(1), image(2)]
    one, many = (
        explain(model, processor, pictures, "what?", max_new_tokens=3, grid=(2, 3), batch_size=size, seeds=1)
        for size in (1, 16)
    )
    assert torch.allclose(one.falls, many.falls, atol=1e-5) and one.falls.abs().max() > 1e-2
    for name in ("strongest", "chance"):
        ours, theirs = (torch.tensor(getattr(found.deletion, name)) for found in (one, many))
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_hiding_nothing_changes_nothing(seeing, image):
    model, processor = seeing
    flat = Image.new("RGB", (40, 30), (90, 120, 30))
    found = explain(model, processor, [flat], "what is it?", max_new_tokens=3, batch_size=4)
    assert found.falls.abs().max() < 1e-5
    prompt = asked(model, processor, [image(1)], "what?")[1].row
    occlusion = Occlusion(model, processor, [image(1)], prompt, [5, 6], batch_size=4)
    seen = []
    model.model.vision_tower.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    whole, nothing, outside = occlusion.log_probs([[], [], [Patch(0, 0, 0, (0, 0, 0, 0))]])
    assert torch.equal(whole, nothing) and torch.equal(whole, outside) and not seen


def test_a_hidden_patch_costs_a_run_of_the_views_that_it_changes_alone(image):
    model, processor = composed_of(ViTConfig(**EYES), TEXTS["llama"], max_tiles=4)
    picture = image(3, (64, 64))
    prompt = asked(model, processor, [picture], "what?")[1].row
    occlusion = Occlusion(model, processor, [picture], prompt, [5, 6], batch_size=4)
    seen = []
    model.model.vision_tower.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    list(occlusion.log_probs([[Patch(0, 0, 0, (0, 0, 16, 16))], [Patch(0, 0, 0, (24, 0, 40, 16))]]))
    assert sum(seen) == 2 + 3  # of five views


class OnePatch(torch.nn.Module):
    """A projector that lets one patch through: whatever is said of the picture, hangs on it."""

    place = 6

    def __init__(self, config, vision_size, text_size):
        super().__init__()
        self.linear = torch.nn.Linear(vision_size, text_size)

    def forward(self, features):
        projected = self.linear(features)
        kept = torch.zeros_like(projected)
        kept[:, self.place] = projected[:, self.place]
        return kept


def test_an_answer_that_hangs_on_one_patch_has_its_peak_there(image):
    model, processor = composed_of(ViTConfig(**EYES), TEXTS["llama"])
    for name, parameter in model.model.vision_tower.named_parameters():
        if re.search(r"\blayers?\.\d", name):  # each patch goes through the encoder by itself
            parameter.data.zero_()
    model.model.multi_modal_projector = OnePatch(model.config, 32, 32).eval()
    torch.nn.init.normal_(model.model.multi_modal_projector.linear.weight, std=2.0)
    tops = 0
    for seed in range(3):
        found = explain(model, processor, [image(seed, (32, 32))], "what is it?", max_new_tokens=3, seeds=3)
        others = torch.cat([found.strengths[: OnePatch.place], found.strengths[OnePatch.place + 1 :]])
        assert others.abs().max() < 1e-5 < found.strengths[OnePatch.place].abs()
        if found.strengths[OnePatch.place] > 0.1:
            tops += 1
            assert found.strongest == found.patches[OnePatch.place] == (0, 1, 2, (16, 8, 24, 16))
            deletion = found.deletion
            assert deletion.strongest[1:] == pytest.approx([deletion.strongest[-1]] * 16, abs=1e-4)
            assert "hangs on what the map shows" in verdict(deletion)
    assert tops


def test_falls_add_up_and_every_deletion_begins_and_ends_alike(seeing, image):
    model, processor = seeing
    found = explain(model, processor, [image(2)], "what is it?", max_new_tokens=4, seeds=3)
    assert found.strengths.tolist() == pytest.approx([sum(falls) for falls in found.falls.tolist()])
    curves = [found.deletion.strongest, *found.deletion.chance]
    assert {curve[0] for curve in curves} == {curves[0][0]} and {curve[-1] for curve in curves} == {curves[0][-1]}
    assert curves[0][0] == pytest.approx(sum(found.log_probs))
    assert curves[0][1] == pytest.approx(curves[0][0] - found.strengths.max().item(), abs=1e-5)
    again = explain(model, processor, [image(2)], "what is it?", max_new_tokens=4, seeds=3)
    assert again.deletion == found.deletion


def test_what_rounding_alone_makes_has_no_colour(seeing):
    model, processor = seeing
    flat = Image.new("RGB", (40, 30), (90, 120, 30))
    found = explain(model, processor, [flat], "what is it?", max_new_tokens=2, grid=(2, 2), seeds=3)
    page = page_of(found._replace(falls=found.falls + torch.tensor([[1e-6], [0.0], [0.0], [0.0]])))
    few_bits = found._replace(falls=found.falls + torch.tensor([[0.1], [0.0], [0.0], [0.0]]), rounding=0.3)
    assert page_of(few_bits).count("fill-opacity:0.000") == 4
    assert page_of(few_bits._replace(rounding=0.01)).count("fill-opacity:0.000") == 3
    assert page.count("fill-opacity:0.000") == 4 and '<span id="high">0</span>' in page


def test_rounding_alone_is_drawn_as_a_flat_line():
    drawn = _curve(Deletion([0, 1], [-7.5, -7.5000001], [[-7.5, -7.5000001]]), 1)
    heights = set(re.findall(r"[\d.]+,([\d.]+)", re.search('class="first" points="([^"]+)"', drawn)[1]))
    labels = re.findall('text-anchor="end">([^<]+)</text>', drawn)
    assert len(heights) == 1 and len(set(labels)) == len(labels)


def test_the_area_is_that_between_the_curves_over_all_shares():
    deletion = Deletion([0, 1, 4], [0.0, -8.0, -8.0], [[0.0, -2.0, -8.0], [0.0, -8.0, -8.0]])
    assert deletion.areas == [(1 * 3 + 3 * 3) / 4, 0.0]
    assert (deletion.area, deletion.spread) == (1.5, 1.5)
    assert verdict(deletion).endswith("(±\u00a01.50): too few orders to tell by.")
    assert "more than in 2 of them" in verdict(deletion._replace(chance=[*deletion.chance, deletion.chance[0]]))
    one = deletion._replace(chance=deletion.chance[:1])
    assert one.spread is None and "±" not in verdict(one)


def test_what_is_around_a_patch_is_hidden_with_it(seeing, image):
    model, processor = seeing
    near = explain(model, processor, [image(1)], "what?", around=1, max_new_tokens=3, grid=(4, 4), seeds=1)
    prompt = asked(model, processor, [image(1)], "what?")[1].row
    answer = [piece.id for piece in near.pieces]
    occlusion = Occlusion(model, processor, [image(1)], prompt, answer, [processor.image_token_id])
    corner = [patch for patch in near.patches if patch.row < 2 and patch.column < 2]
    whole, hidden = occlusion.log_probs([[], corner])
    assert torch.allclose(near.falls[0], whole - hidden, atol=1e-5)


@pytest.mark.parametrize("kind", tiny.IMAGE_PROCESSORS)
@pytest.mark.parametrize("mode", [None, "resize", "pad", "crop"])
@pytest.mark.parametrize("size", [(64, 48), (37, 90), (5, 3)])
def test_patches_are_those_that_the_encoder_sees(kind, mode, size, tmp_path):
    """White in the box of a patch, and nowhere else, is white in the pixels of that patch and nowhere else."""
    processor = tiny.processor_seeing(kind, tmp_path, image_mode=mode)
    config = type("Config", (), {"patch_grid": (4, 4), "vision_config": ViTConfig(**EYES)})
    scale = 8  # so that a patch has whole pixels, as good as
    picture = Image.new("RGB", (size[0] * scale, size[1] * scale))
    patches = patches_of(processor, config, picture)
    black = processor.process_images([picture])["pixel_values"][0]
    largest = max((patch.box[2] - patch.box[0]) * (patch.box[3] - patch.box[1]) for patch in patches)
    assert patches and len({(patch.row, patch.column) for patch in patches}) == len(patches)
    for patch in patches:
        shown = picture.copy()
        shown.paste("white", patch.box)
        changed = (processor.process_images([shown])["pixel_values"][0] - black).abs().amax(0)
        of_patches = changed.unflatten(0, (4, 8)).unflatten(2, (4, 8)).mean((1, 3))
        assert int(of_patches.argmax()) == patch.row * 4 + patch.column
        is_whole = (patch.box[2] - patch.box[0]) * (patch.box[3] - patch.box[1]) > 0.7 * largest
        assert of_patches.max() > 0.7 * of_patches.sum() or not is_whole  # a sliver is blurred into its neighbour


def test_what_is_less_than_a_patch_is_never_hidden():
    processor = tiny.processor_of("byte-level", "default")
    config = type("Config", (), {"patch_grid": (2, 2), "vision_config": ViTConfig(image_size=32, patch_size=13)})
    boxes = [patch.box for patch in patches_of(processor, config, Image.new("RGB", (320, 64)))]
    assert boxes == [(0, 0, 130, 26), (130, 0, 260, 26), (0, 26, 130, 52), (130, 26, 260, 52)]
    assert len(patches_of(processor, config, Image.new("RGB", (3, 1)), grid=(8, 8))) == 3


def test_parts_of_characters_joined_letters_and_what_cannot_be_seen_have_a_label():
    tokenizer = tiny.byte_level_tokenizer(300)
    end = tokenizer.eos_token_id

    def labels(text):
        ids = [*tokenizer(text)["input_ids"], end]
        pieces = pieces_of(tokenizer, ids, [end])
        assert [piece.id for piece in pieces] == ids and "".join(piece.text for piece in pieces) == text
        assert pieces[-1].label == "end" and pieces[-1].control
        return [piece.label + piece.part for piece in pieces[:-1]]

    assert labels("\u732b") == ["\u732b1/3", "\u732b2/3", "\u732b3/3"]
    assert labels("\U0001f600!") == [f"\U0001f600{part}/4" for part in range(1, 5)] + ["!"]
    assert labels("\u200d")[0] == "U+200D1/3"
    assert labels("\n\t") == ["\u23ce", "\u21e5"]
    assert labels("e\u0301")[1] == "\u25cc\u03011/2"
    half = pieces_of(tokenizer, [*tokenizer("\u732b")["input_ids"][:2], end], [end])
    assert [piece.part for piece in half] == ["1/2", "2/2", ""] and half[0].label == "\ufffd"


def test_arabic_letters_of_a_word_are_joined_across_tokens():
    class Words:
        all_special_ids = []

        def decode(self, ids, **kwargs):
            return "".join(["\u0642\u0637", "\u0629", " \u0645\u0627"][id] for id in ids)

    assert [piece.label for piece in pieces_of(Words(), [0, 1, 2], [9])] == [
        "\u0642\u0637\u200d", "\u200d\u0629", " \u0645\u0627"
    ]  # fmt: skip


def page_of(found, name="model", images=("a.png",)):
    return write_page(found, name, images)


def test_the_page_needs_nothing_else_and_holds_every_value(seeing, image):
    model, processor = seeing
    asked = "</script><b>\u4f60\u597d \u0645\u0627 \u202e\U0001f600"
    found = explain(model, processor, [image(1), image(2)], asked, max_new_tokens=3, grid=(2, 3), seeds=2)
    page = page_of(found, "me/<model>", ["a<b>.png", "\u202eb.png"])
    assert "(\u00b1\u00a0" in page
    assert not re.search(r"https?://|<link|@import|url\((?!#)", page) and page.count("</script>") == 2
    assert (
        "&lt;/script&gt;&lt;b&gt;\u4f60\u597d \u0645\u0627" in page and "<b>.png" not in page and "\u202e" not in page
    )
    numbers = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1])
    assert torch.allclose(torch.tensor(numbers["falls"]).double(), found.falls, rtol=1e-3, atol=1e-6)
    assert numbers["patches"] == [[patch.picture, patch.row, patch.column] for patch in found.patches]
    assert page.count('class="cell"') == 12 and page.count("data:image/png;base64,") == 2
    assert page.count("<button") == 1 + len(found.pieces)


@pytest.fixture(scope="session")
def saved(folders, tmp_path_factory):
    """A saved model of which answers depend on what is seen."""
    folder = tmp_path_factory.mktemp("explained")
    model, processor = tiny.compose(*folders("siglip-llama"), tiny.PAIRS["siglip-llama"][2])
    lively(model).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_the_command_writes_a_page_and_the_same_as_json(saved, image, tmp_path, capsys):
    for number in range(2):
        image(number).save(tmp_path / f"{number}.png")
    arguments = [
        saved,
        tmp_path / "0.png",
        tmp_path / "1.png",
        "what is it?",
        "--max_new_tokens",
        3,
        "--dtype",
        "float32",
    ]
    arguments += ["--grid", "2x3", "--around", 1, "--seeds", 2, "--batch_size", 4]
    out, numbers = tmp_path / "page.html", tmp_path / "numbers.json"
    assert command.main(list(map(str, [*arguments, "--out", out, "--json", numbers]))) == 0
    printed = capsys.readouterr()
    found = json.loads(numbers.read_text(encoding="utf-8"))
    assert str(out) in printed.out and "of 12 patches" in printed.out and "patches: 100%" in printed.err
    assert [len(of["patches"]) for of in found["images"]] == [6, 6] and len(found["deletion"]["chance"]) == 2
    assert len(found["tokens"]) == len(found["images"][0]["patches"][0]["falls"]) <= 3
    page = out.read_text(encoding="utf-8")
    assert not found["ended"] and len(found["tokens"]) == 3
    assert "of 3 tokens hangs on, of 12 patches, cut short there; " in " ".join(printed.out.split())
    assert "3 tokens, cut short there" in page
    assert "what is it?" in page and str(tmp_path) not in page + json.dumps(found) and str(saved) not in page
    assert command.main([str(saved), str(tmp_path / "0.png"), "--out", str(out), "--grid", "1"]) == 0
    assert "What is in the picture?" in out.read_text(encoding="utf-8")


def test_a_picture_of_the_net_is_called_without_what_may_be_a_password():
    assert command._named("https://me:pass@example.org:8443/a/b.png?token=1#x") == "https://example.org/a/b.png"


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--grid", "2xa"], "grid='2xa': expected rows and columns"),
        (["--grid", "0"], "grid='0': expected rows"),
        (["--batch_size", "0"], "batch_size=0: expected 1 or more"),
        (["--around", "-1"], "around=-1: expected 0 or more"),
        (["--out", "nowhere/page.html"], "which is no folder"),
        (["--json", "."], "is a folder"),
        (["--out", "a.png"], "a.png is named for two things"),
        (["--json", "./explained.html"], "is named for two things"),
        (["gone.png", "--question", "what?"], "gone.png"),
        (["http://127.0.0.1:9/a.png", "--question", "what?"], "is a URL, and none is fetched here"),
        (["--question", " "], "the question is empty"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_loaded(arguments, said, image, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image(1).save("a.png")
    asked = [] if "--question" in arguments else ["what?"]
    assert command.main(["no-model", "a.png", *asked, *arguments]) == 1
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1 and "no-model" not in error


def test_a_question_without_a_picture_and_a_batch_that_does_not_fit_are_one_line(
    saved, image, tmp_path, capsys, monkeypatch
):
    assert command.main([str(saved), "what is it?"]) == 1
    assert "there is no picture to explain an answer by" in capsys.readouterr().err
    image(1).save(tmp_path / "a.png")

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(command, "explain", full)
    assert command.main([str(saved), str(tmp_path / "a.png"), "--out", str(tmp_path / "a.html")]) == 1
    assert "error: batch_size=8 is more than fits in memory; give less.\n" in capsys.readouterr().err


def test_an_answer_that_ends_itself_is_not_called_cut_short(seeing, image):
    model, processor = seeing
    ends = list(range(model.config.text_config.vocab_size))
    model.generation_config.eos_token_id = ends
    found = explain(model, processor, [image(1)], "what?", max_new_tokens=3, grid=(1, 2), seeds=1)
    assert found.ended and len(found.pieces) == 1
    assert "1 token · " in page_of(found) and "cut short" not in page_of(found)


def test_an_answer_is_as_long_as_there_is_room_for(folders, image):
    model, processor = tiny.compose(*folders("vit-gpt2"), "patch")
    question = "what is it? " * 20
    answerer, prepared = asked(lively(model), processor, [image(1)], question)
    room = 128 - len(prepared.row)
    assert 0 < room < 8
    found = command.explain(answerer, prepared, question, grid=(1, 2), seeds=1)
    assert 0 < len(found.pieces) <= room
    with pytest.raises(DuetError, match="the prompt takes .* the language model has 128"):
        asked(model, processor, [image(1)], question * 2)


def test_a_prompt_without_a_picture_is_refused(composed):
    answerer, prepared = asked(*composed, [], "what?")
    with pytest.raises(DuetError, match="no picture, of which parts could be hidden"):
        command.explain(answerer, prepared)


def test_the_objects_that_a_drawn_answer_is_about_are_where_they_are_drawn():
    kinds = set()
    for item, turn in shapes.questions("test", 400):
        numbers = item.asked_for(turn)
        assert bool(numbers) == (turn.kind != "count" and turn.answer not in ("no", "nothing"))
        for number in numbers:
            thing = item.objects[number]
            kinds.add(turn.kind)
            assert turn.kind not in ("place", "relation") or turn.answer == f"a {thing}" and len(numbers) == 1
            assert turn.kind != "colour" or turn.answer == thing.colour
            left, top, right, bottom = item.boxes(64)[number]
            inside = item.draw(64).crop((round(left), round(top), round(right), round(bottom)))
            colour = torch.tensor(inside.getpixel((inside.width // 2, round(inside.height * 0.55))))
            assert (colour - torch.tensor(shapes.COLOURS[thing.colour])).abs().max() <= 40
    assert kinds == {"place", "colour", "exists", "relation"}


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVE = """<script>
const key = name => document.dispatchEvent(new KeyboardEvent("keydown", {key: name, bubbles: true}));
const state = () => [chosen, said.textContent, chips.findIndex(chip => chip.getAttribute("aria-pressed") === "true")];
const seenStates = [state()];
const keys = ["ArrowRight", "ArrowRight", "ArrowLeft", "End", "ArrowRight", "Escape"];
for (const name of keys) { key(name); seenStates.push(state()); }
chips[2].click(); seenStates.push(state());
key("m"); key("s");
const before = said.textContent;
flat[3].dispatchEvent(new PointerEvent("pointerenter", {pointerType: "mouse"}));
document.title = JSON.stringify({states: seenStates, map: document.body.classList.contains("map"),
  width: document.documentElement.scrollWidth, room: innerWidth, patch: said.textContent, before,
  hardly: percent(-2000), sides: [...document.querySelectorAll(".picture")].map(one => one.getBoundingClientRect())
    .flatMap(box => [box.width, box.height])});
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no browser")
def test_the_page_works_in_a_browser_by_keys_and_in_a_narrow_window(seeing, image, tmp_path):
    model, processor = seeing
    pictures = [image(1), image(2, (900, 3)), image(3, (2, 700))]
    found = explain(model, processor, pictures, "what is it?" * 4, max_new_tokens=4, grid=(2, 3), seeds=1)
    count = len(found.pieces)
    file = tmp_path / "page.html"
    file.write_text(page_of(found, "m" * 90, ["n" * 90, "b.png", "c.png"]).replace("</body>", DRIVE), encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'user'}"]
    run = subprocess.run(
        [*command, "--window-size=420,900", "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=120
    )
    title = json.loads(html.unescape(re.search("<title>(.*?)</title>", run.stdout)[1]))
    states = title["states"]
    assert [state[0] for state in states] == [-1, 0, 1, 0, count - 1, count - 1, -1, 1]
    assert [state[2] for state in states] == [state[0] + 1 for state in states]
    assert states[0][1].startswith("The whole answer: ") and states[0][1] == states[6][1] != states[1][1]
    assert all(38 < side < 900 for side in title["sides"])
    assert title["hardly"] == "under 1e-300 %"
    assert not title["map"] and title["width"] <= max(420, title["room"])
    assert title["patch"].startswith("picture 1, row 2, column 1 hidden: ") and title["patch"] != title["before"]
