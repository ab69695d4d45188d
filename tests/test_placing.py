"""A model is loaded once to where it answers, in the numbers that the hardware multiplies; an adapter with its base."""

import pytest
import torch
from transformers import BitsAndBytesConfig

from inference_vlm import loading
from inference_vlm.answering import Answerer
from inference_vlm.loading import load, place
from processing.data_error_vlm import DuetError


@pytest.fixture
def folder(composed, tmp_path):
    """A saved model."""
    model, processor = composed
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def said(answerer, image):
    part = {"type": "image", "image": image(0)}
    prepared = answerer.read([{"role": "user", "content": [part, {"type": "text", "text": "what is it?"}]}])
    return "".join(answerer.stream(prepared, answerer.settings(temperature=0, max_new_tokens=6)))


def test_a_saved_model_answers_on_the_cpu_in_its_own_numbers(folder, composed, image, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    answerer = Answerer.load(folder)
    assert answerer.name == folder and answerer.model.device.type == "cpu" and answerer.model.dtype == torch.float32
    assert said(answerer, image) == said(Answerer(*composed), image)
    assert Answerer.load(folder, dtype="bfloat16").model.dtype == torch.bfloat16


def test_weights_of_32_bits_become_bfloat16_on_an_accelerator_that_multiplies_it_and_others_stay(
    composed, folder, tmp_path, monkeypatch
):
    at = torch.device("cuda", 0)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: at)
    multiplies = [True]
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: multiplies[0])
    assert place(folder) == {"device_map": {"": at}, "dtype": torch.bfloat16}
    assert place(folder, dtype="float32") == {"device_map": {"": at}, "dtype": torch.float32}
    assert place(folder, device="cpu") == {}
    assert place(folder, device_map="auto") == {"device_map": "auto", "dtype": torch.bfloat16}
    composed[0].half().save_pretrained(tmp_path / "half")
    assert place(str(tmp_path / "half")) == {"device_map": {"": at}}
    multiplies[0] = False
    assert place(folder) == {"device_map": {"": at}}


def test_few_bits_are_asked_for_as_a_base_was_held_in_training(folder, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    four = place(folder, load_in_4bit=True)
    assert four["quantization_config"].bnb_4bit_quant_type == "nf4" and four["device_map"] == {"": torch.device("cpu")}
    assert isinstance(place(folder, load_in_8bit=True)["quantization_config"], BitsAndBytesConfig)


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_a_model_in_few_bits_answers(folder, image, bits):
    pytest.importorskip("bitsandbytes")
    answerer = Answerer.load(folder, device="cpu", **{bits: True})
    assert answerer.model.is_quantized
    assert isinstance(said(answerer, image), str)


@pytest.mark.parametrize(
    "options, line",
    [
        ({"device": "nowhere"}, "device=nowhere: there is none here; expected one of cpu"),
        ({"device": "cuda:77"}, "device=cuda:77: there is none here"),
        ({"device": "cpu", "device_map": "auto"}, "give one of them"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "give one of them"),
        ({"dtype": "int8"}, "dtype=int8: expected one of float32"),
        ({"attn_implementation": "magic"}, "could not be loaded"),
    ],
)
def test_what_cannot_be_is_a_line(folder, options, line):
    with pytest.raises(DuetError, match=line) as error:
        Answerer.load(folder, **options)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_no_model_of_duets_is_a_line(folders, tmp_path):
    for name in (str(tmp_path / "none"), str(tmp_path), str(folders("vit-gpt2")[1]), str(folders("siglip-llama")[0])):
        with pytest.raises(DuetError, match="the model .* could not be loaded|which Duet did not compose"):
            Answerer.load(name, device="cpu")


def test_a_model_that_does_not_fit_says_what_would_help(folder, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loading.AutoModelForImageTextToText, "from_pretrained", full)
    with pytest.raises(DuetError, match="load_in_4bit"):
        load(folder)


@pytest.mark.parametrize("pair", ["siglip-llama"])
def test_an_adapter_answers_as_on_its_base(composed, image, tmp_path):
    peft = pytest.importorskip("peft")
    model, processor = composed
    model.save_pretrained(tmp_path / "run" / "base")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=r".*language_model.*(q_proj|v_proj)"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    expected = said(Answerer(adapted, processor), image)
    adapted.peft_config["default"].base_model_name_or_path = "base"
    model.save_pretrained(tmp_path / "run" / "adapter")
    processor.save_pretrained(tmp_path / "run" / "adapter")
    plain = Answerer.load(str(tmp_path / "run" / "adapter"), device="cpu")
    assert said(plain, image) == expected
