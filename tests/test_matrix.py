"""Any encoder with any language model, on tiny random ones: the same text logits, gradients, a cache, and a folder.

By default every language model is composed with a ViT and every encoder with a Llama, because neither knows of the
other; the whole product is marked `slow`. What is tried, and the data, is in `matrix.py`.
"""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.image_transforms import to_pil_image

from modeling_vlm import VLMConfig, VLMForConditionalGeneration
from processing import VLMProcessor
from tests import matrix
from tests.matrix import ENCODERS, GROUPED, LANGUAGE_MODELS, LAYERS, SIZES, config_of, encoder_of


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """`texts(name)` is the folder of a language model and its logits for `matrix.words()`."""
    saved = {}

    def get(name):
        if name not in saved:
            folder = tmp_path_factory.mktemp("text")
            saved[name] = folder, matrix.save_language_model(name, folder)
        return saved[name]

    return get


def check(encoder, text, layer, folder):
    model = matrix.check_pair(encoder, *text, layer, folder)
    again = VLMForConditionalGeneration.from_pretrained(folder)
    expected = matrix.logits_of(model)
    assert (matrix.logits_of(again) - expected).abs().max() <= 1e-6 * expected.abs().max()
    return model


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_every_language_model_with_a_vit(name, texts, tmp_path):
    model = check("ViT", texts(name), None, tmp_path / "composed")
    assert matrix.language_model_row(name, model) in matrix.PAGE.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_with_a_llama(name, texts, tmp_path):
    models = [check(name, texts("Llama"), layer, tmp_path / str(layer)) for layer in LAYERS]
    assert matrix.encoder_row(name, models) in matrix.PAGE.read_text(encoding="utf-8").splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_pair_also_loaded_where_this_package_is_not(encoder, texts, tmp_path):
    failed = matrix.run_pairs(encoder, {name: texts(name) for name in LANGUAGE_MODELS}, tmp_path / "work")
    assert failed == {}


def test_the_page_lists_what_the_matrix_holds_and_every_pair_has_its_mark():
    page = matrix.PAGE.read_text(encoding="utf-8")
    lines = page.partition(matrix.BEGIN)[2].partition(matrix.END)[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    first, second = (index for index, row in enumerate(rows) if row[0] in ("encoder", "language model"))
    assert rows[0] == ["", *ENCODERS]
    assert rows[2:first] == [[name, *["✓"] * len(ENCODERS)] for name in LANGUAGE_MODELS]
    assert [row[0] for row in rows[first + 2 : second]] == list(ENCODERS)
    assert [row[0] for row in rows[second + 2 :]] == list(LANGUAGE_MODELS)


@pytest.mark.parametrize("name", ["OLMoE", "Qwen3-MoE"])
def test_the_router_loss_of_a_mixture_of_experts_is_kept(name):
    torch.manual_seed(0)
    kind, settings = LANGUAGE_MODELS[name]
    causal_lm = AutoModelForCausalLM.from_config(matrix.config_of(kind, {**settings, "output_router_logits": True}))
    config = VLMConfig(vision_config=matrix.encoder_of("ViT"), text_config=causal_lm.config)
    model = VLMForConditionalGeneration(config, None, causal_lm)
    ids = torch.randint(1, 300, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    for training in (False, True):
        expected = causal_lm.train(training)(ids, attention_mask=mask, labels=labels)
        found = model.train(training)(input_ids=ids, attention_mask=mask, labels=labels)
        torch.testing.assert_close(found.aux_loss, expected.aux_loss)
        torch.testing.assert_close(found.loss, expected.loss)
        number = (labels[:, 1:] != -100).sum()
        half = model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=2 * number)
        torch.testing.assert_close(half.loss, expected.loss / 2)
        assert found.aux_loss > 0
    batch = matrix.batch_of(matrix.rows_of(model))
    model(**batch, labels=batch["input_ids"]).loss.backward()
    routers = [parameter for name, parameter in model.named_parameters() if name.endswith("gate.weight")]
    assert routers and all(parameter.grad is not None for parameter in routers)


# -- composite checkpoints --------------------------------------------------------------------------------------------

HALVES = {**SIZES, "patch_size": 8}
COMPOSITES = {
    "CLIP": ("CLIP", {**HALVES, "image_size": 32}, "CLIPImageProcessorPil"),
    "SigLIP": ("Siglip", {**HALVES, "image_size": 32}, "SiglipImageProcessorPil"),
    "SigLIP 2": ("Siglip2", {**HALVES, "num_patches": 16}, "Siglip2ImageProcessorPil"),
    "AIMv2": ("Aimv2", {**HALVES, "image_size": 32}, "CLIPImageProcessorPil"),
}
"""Name -> prefix of the classes, settings of the vision half, image processor."""


def save_composite(name, folder):
    """A checkpoint with a text half, as it lies on the Hub."""
    prefix, settings, processor = COMPOSITES[name]
    torch.manual_seed(5)
    text = getattr(transformers, f"{prefix}TextConfig")(**SIZES, vocab_size=50)
    vision = getattr(transformers, f"{prefix}VisionConfig")(**settings)
    config = getattr(transformers, f"{prefix}Config")(text_config=text.to_dict(), vision_config=vision.to_dict())
    model = getattr(transformers, f"{prefix}Model")(config)
    matrix.shake(model)
    model.save_pretrained(folder)
    sizes = {"height": 32, "width": 32}
    options = {
        "CLIP": {"size": {"shortest_edge": 32}, "crop_size": sizes},
        "SigLIP": {"size": sizes},
        "SigLIP 2": {"patch_size": 8, "max_num_patches": 16},
        "AIMv2": {"size": {"shortest_edge": 32}, "crop_size": sizes},
    }
    getattr(transformers, processor)(**options[name]).save_pretrained(folder)
    return model.vision_model.eval()


@pytest.mark.parametrize("name", COMPOSITES)
def test_a_composite_checkpoint_gives_its_vision_half(name, texts, tmp_path, image):
    half, (text, _) = save_composite(name, tmp_path), texts("Llama")
    model = VLMForConditionalGeneration.from_backbones(str(tmp_path), str(text))
    theirs, ours = half.state_dict(), model.model.vision_tower.state_dict()
    assert ours and all(torch.equal(ours[weight], theirs[weight]) for weight in ours)
    left_out = {weight for weight in theirs if weight not in ours}
    assert all(weight.startswith(tuple(model.config.vision_modules_left_out)) for weight in left_out)
    processor = VLMProcessor.from_backbones(str(tmp_path), str(text), model.config)
    batch = processor(images=[image(0)], text=[processor.image_token + "a cat"], return_tensors="pt")
    assert batch["pixel_values"].shape == (1, 3, 32, 32) and tuple(model.config.image_size) == (32, 32)
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()
        found = model.model.vision_hidden_states(batch["pixel_values"])[1]
        expected = features_of(name, half, batch["pixel_values"])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", [name for name in COMPOSITES if name != "AIMv2"])
def test_another_image_size_is_what_the_encoder_itself_makes_of_it(name, texts, tmp_path, image):
    """AIMv2 does not interpolate its positions, and is refused: see `test_compose_errors.py`."""
    half, (text, _) = save_composite(name, tmp_path), texts("Llama")
    model = VLMForConditionalGeneration.from_backbones(str(tmp_path), str(text), image_size=(48, 40))
    assert model.config.image_seq_length == 30
    processor = VLMProcessor.from_backbones(str(tmp_path), str(text), model.config)
    pixels = processor(images=[image(0, (90, 70))], text=[processor.image_token], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 48, 40)
    with torch.no_grad():
        found = model.model.vision_hidden_states(pixels)[1]
        expected = features_of(name, half, pixels, interpolate_pos_encoding=True)
    torch.testing.assert_close(found, expected)


def features_of(name, half, pixels, **options):
    """What an encoder gives by itself, SigLIP 2 for the patches that its own image processor cuts."""
    if name != "SigLIP 2":
        return half(pixels, **options).last_hidden_state
    rows, columns = (side // 8 for side in pixels.shape[-2:])
    processor = transformers.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=rows * columns)
    picture = to_pil_image(((pixels[0] * 0.5 + 0.5) * 255).round().byte().permute(1, 2, 0).numpy())
    patches = processor([picture], return_tensors="pt")
    assert patches["spatial_shapes"].tolist() == [[rows, columns]]
    return half(**patches).last_hidden_state


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_in_half_precision_takes_the_pixels_that_the_processor_gives(name):
    torch.manual_seed(0)
    vision = encoder_of(name)
    model = VLMForConditionalGeneration.from_backbones(vision, config_of("Llama", GROUPED), dtype=torch.bfloat16)
    pixels = torch.randn(2, 3, *model.config.image_size)
    features = model.get_image_features(pixels)
    assert features.pooler_output.dtype == torch.bfloat16 and features.pooler_output.isfinite().all()
    assert "pooler_output" in features.keys() and features.pooler_output.shape[0] == 2


@pytest.mark.parametrize("saved, loaded", [("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "auto")])
def test_a_pair_is_of_the_dtype_that_it_is_loaded_in(saved, loaded, tmp_path):
    dtype = getattr(torch, saved)
    pair = encoder_of("DINOv2 + SigLIP")
    VLMForConditionalGeneration.from_backbones(pair, config_of("Llama", GROUPED), dtype=dtype).save_pretrained(tmp_path)
    model = VLMForConditionalGeneration.from_pretrained(tmp_path, dtype=loaded)
    wanted = dtype if loaded == "auto" else getattr(torch, loaded)
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}
    assert model.get_image_features(torch.randn(1, 3, *model.config.image_size)).pooler_output.dtype == wanted
