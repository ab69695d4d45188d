"""What is promised of the CPU is so on an accelerator: the same step, runs that go on, answers, few bits.

    DUET_TEST_ACCELERATOR=1 python -m pytest tests/test_accelerator.py

All other tests see none, so that they are the same everywhere.
"""

import json

import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.utils import is_bitsandbytes_available

import train_pretrain
import train_sft
from inference_vlm.answering import Answerer
from inference_vlm.explain import main as explain
from processing import VLMDataCollator, read_rows
from processing.batching.encoding import encode_caption
from tests import tiny
from tests.test_same_step import FORMS, gradients


DEVICE = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
pytestmark = pytest.mark.skipif(DEVICE.type == "cpu", reason="needs an accelerator")

QUICK = [
    "--per_device_train_batch_size", "4", "--dataloader_num_workers", "0", "--disable_tqdm", "True", "--logging_steps",
    "1", "--max_new_tokens", "6", "--eval_share", "0",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _whole_numbers():
    """Products of 32 bits, as on the CPU."""
    was = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = was


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """Heads of 32 numbers, which every attention takes."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    tokenizer = tiny.with_chatml(tiny.unigram_tokenizer())
    vision = SiglipVisionConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=32, patch_size=8,
        vision_use_head=False,
    )  # fmt: skip
    tiny.wide_llama(512).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    SiglipVisionModel(vision).save_pretrained(folder / "vision")
    tiny.IMAGE_PROCESSORS["siglip"](32, 32).save_pretrained(folder / "vision")
    return folder / "vision", folder / "text"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.save_numbered_pictures(tmp_path_factory.mktemp("data"), 16)


@pytest.fixture(scope="module")
def trained(backbones, source, tmp_path_factory):
    """A run of six steps, with what it logged."""
    folder = tmp_path_factory.mktemp("run") / "run"
    named = ["--vision_model", str(backbones[0]), "--text_model", str(backbones[1])]
    train_sft.main([*source, *QUICK, *named, "--max_steps", "6", "--save_steps", "3", "--output_dir", str(folder)])
    return folder


def losses(folder):
    state = json.loads((folder / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def on(device, batch):
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
def test_a_step_is_that_of_the_cpu_however_a_batch_is_laid_out(backbones, image, attention):
    model, processor = tiny.compose(*backbones)
    model.requires_grad_(True).eval()
    captions = [f"a {word} cat" for word in ("red", "small", "large blue", "", "")]
    one = read_rows([{"image": image(1), "caption": captions}, {"image": image(2), "caption": "the sun"}])
    for encode, rows in ((encode_caption, one), (None, read_rows(tiny.ragged_dialogues(image)))):
        told = {} if encode is None else {"encode": encode}
        model.to("cpu").set_attn_implementation("eager")
        expected = gradients(model, [VLMDataCollator(processor, **told)(rows)])
        model.to(DEVICE).set_attn_implementation({"text_config": attention, "vision_config": "sdpa"})
        for name, form in FORMS.items():
            batch = VLMDataCollator(processor, **told, **form)(rows)
            loss, gradient = gradients(model, [on(DEVICE, batch)])
            assert loss == pytest.approx(expected[0], rel=1e-5), name
            assert (gradient.cpu() - expected[1]).norm() <= 1e-4 * expected[1].norm(), name


def test_a_run_learns_there_and_goes_on_where_it_stopped(trained, backbones, source, tmp_path):
    found = losses(trained / "checkpoint-6")
    assert len(found) == 6 and found[-1] < found[0]
    named = ["--vision_model", str(backbones[0]), "--text_model", str(backbones[1])]
    run, going_on = tmp_path / "run", ["--resume_from_checkpoint", str(trained / "checkpoint-3")]
    told = [*going_on, "--max_steps", "6", "--save_steps", "3", "--output_dir", str(run)]
    train_sft.main([*source, *QUICK, *named, *told])
    assert losses(run / "checkpoint-6") == pytest.approx(found, rel=1e-3)


def test_captions_are_learned_there_with_the_backbones_held(backbones, tmp_path):
    named = ["--vision_model", str(backbones[0]), "--text_model", str(backbones[1])]
    run = tmp_path / "run"
    train_pretrain.main(["--dataset", "shapes", *QUICK, *named, "--max_steps", "4", "--output_dir", str(run)])
    assert (run / "model.safetensors").exists()


def test_an_answer_is_the_same_as_on_the_cpu_and_draws_the_same_with_a_seed(trained, image):
    there, here = Answerer.load(str(trained), dtype="float32"), Answerer.load(str(trained), device="cpu")
    assert there.model.device.type == DEVICE.type and here.model.device.type == "cpu"
    part = {"type": "image", "image": image(0)}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "what is in the picture?"}]}]
    for asked in ({"temperature": 0}, {"temperature": 1.0, "seed": 7}):
        said = [
            "".join(model.stream(model.read(messages), model.settings(max_new_tokens=8, **asked)))
            for model in (there, here)
        ]
        assert said[0] == said[1]
    assert Answerer.load(str(trained)).model.dtype == torch.bfloat16


def test_an_answer_is_explained_there(trained, image, tmp_path):
    image(0).save(tmp_path / "picture.png")
    page = tmp_path / "page.html"
    asked = [str(trained), str(tmp_path / "picture.png"), "what is in the picture?", "--out", str(page)]
    assert explain([*asked, "--max_new_tokens", "4"]) == 0
    assert page.exists()


@pytest.mark.skipif(not is_bitsandbytes_available(), reason="needs bitsandbytes")
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_adapters_learn_there_on_a_base_in_few_bits(backbones, source, tmp_path, image, bits):
    named = ["--vision_model", str(backbones[0]), "--text_model", str(backbones[1])]
    few = ["--tune_text", "lora", f"--load_in_{bits}", "--learning_rate", "0.01"]
    run = tmp_path / "run"
    train_sft.main([*source, *QUICK, *named, *few, "--max_steps", "16", "--output_dir", str(run)])
    found = losses(run / "checkpoint-16")
    assert sum(found[-4:]) < sum(found[:4])
    answerer = Answerer.load(str(run))
    part = {"type": "image", "image": image(0)}
    prepared = answerer.read([{"role": "user", "content": [part, {"type": "text", "text": "what is there?"}]}])
    assert isinstance("".join(answerer.stream(prepared, answerer.settings(max_new_tokens=4))), str)
