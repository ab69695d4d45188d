"""An image is made to fit as it is asked: stretched, whole on the mean colour, its centre, or the encoder's own way."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from processing import VLMDataCollator, VLMProcessor
from processing.images_vlm import IMAGE_MODES, fit, to_rgb
from tests import tiny


RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
SIZES = [(1, 1), (20_000, 1), (1, 20_000), (32, 32), (31, 33), (50, 20), (20, 50), (90, 64)]
each_kind = pytest.mark.parametrize("kind", tiny.IMAGE_PROCESSORS)
each_view = pytest.mark.parametrize("view", [(32, 32), (24, 40), (40, 24)], ids=str)


def bands(width, height, *colours):
    """Upright bands of equal width."""
    image = Image.new("RGB", (len(colours), 1))
    for place, colour in enumerate(colours):
        image.putpixel((place, 0), colour)
    return image.resize((width, height), Image.Resampling.NEAREST)


def seen(processor, images):
    """What the encoder gets, as 8-bit images `(images, height, width, 3)`: the normalisation undone."""
    pixels = processor.process_images(images)["pixel_values"]
    mean, std = (torch.tensor(getattr(processor.image_processor, f"image_{name}")) for name in ("mean", "std"))
    return (pixels.permute(0, 2, 3, 1) * std + mean).mul(255).round().int().numpy()


def mean_colour(processor):
    return [round(255 * mean) for mean in processor.image_processor.image_mean]


@each_kind
@each_view
def test_resize_shows_everything_stretched(kind, view, tmp_path):
    processor = tiny.processor_seeing(kind, tmp_path, view, image_mode="resize")
    (pixels,) = seen(processor, [bands(300, 20, RED, BLUE)])
    middle = view[1] // 2
    assert pixels.shape == (*view, 3)
    assert (pixels[:, : middle - 2] == RED).all() and (pixels[:, middle + 2 :] == BLUE).all()


@each_kind
@each_view
@pytest.mark.parametrize("size", [(64, 16), (16, 64), (7, 9), (300, 301)], ids=str)
def test_pad_shows_the_whole_image_in_the_middle_of_the_mean_colour(kind, view, size, tmp_path):
    processor = tiny.processor_seeing(kind, tmp_path, view, image_mode="pad")
    (pixels,) = seen(processor, [Image.new("RGB", size, GREEN)])
    scale = min(view[0] / size[1], view[1] / size[0])
    shown = round(size[1] * scale), round(size[0] * scale)
    top, left = (view[0] - shown[0]) // 2, (view[1] - shown[1]) // 2
    inside = np.zeros(view, dtype=bool)
    inside[top : top + shown[0], left : left + shown[1]] = True
    assert (pixels[inside] == GREEN).all() and (pixels[~inside] == mean_colour(processor)).all()
    assert shown[0] == view[0] or shown[1] == view[1]


@each_kind
@each_view
def test_pad_keeps_proportions_and_order(kind, view, tmp_path):
    processor = tiny.processor_seeing(kind, tmp_path, view, image_mode="pad")
    (pixels,) = seen(processor, [bands(4 * view[1], 4 * view[0], RED, BLUE)])
    middle = view[1] // 2
    assert (pixels[:, : middle - 1] == RED).all() and (pixels[:, middle + 1 :] == BLUE).all()


@each_kind
@each_view
def test_crop_shows_the_centre(kind, view, tmp_path):
    processor = tiny.processor_seeing(kind, tmp_path, view, image_mode="crop")
    wide = bands(6 * view[1], 2 * view[0], RED, *[GREEN] * 3, BLUE)
    tall = bands(6 * view[0], 2 * view[1], RED, *[GREEN] * 3, BLUE).transpose(Image.Transpose.ROTATE_90)
    for pixels in seen(processor, [wide, tall]):
        assert pixels.shape == (*view, 3) and (pixels == GREEN).all()


@each_kind
@each_view
@pytest.mark.parametrize("mode", IMAGE_MODES)
def test_what_fits_is_normalised_and_nothing_else(kind, view, mode, tmp_path, image):
    """An encoder that scales to 256 and cuts out 224 would otherwise do so with what is made to fit already."""
    processor = tiny.processor_seeing(kind, tmp_path, view, image_mode=mode)
    own = processor.image_processor
    for size in ((50, 20), view[::-1]):
        picture = image(1, size)
        fitted = np.asarray(fit(picture, view, mode, tuple(mean_colour(processor)), own.resample), dtype=np.float64)
        expected = (fitted / 255 - own.image_mean) / own.image_std
        (found,) = processor.process_images([picture])["pixel_values"].permute(0, 2, 3, 1)
        assert np.abs(found.numpy() - expected).max() < 1e-5


@each_kind
@each_view
def test_the_encoders_own_way_is_the_encoders_own(kind, view, tmp_path, image):
    pictures = [image(seed, size) for seed, size in enumerate(SIZES[3:])]
    processor = tiny.processor_seeing(kind, tmp_path, view)
    expected = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    pixels = processor.process_images(pictures)["pixel_values"]
    assert expected.shape[2:] == view and torch.equal(pixels, expected)


@each_kind
def test_a_tiled_image_is_shown_whole_where_nothing_else_is_asked_for(kind, tmp_path):
    processor = tiny.processor_seeing(kind, tmp_path, (32, 32), max_tiles=4)
    whole = seen(processor, [bands(128, 32, RED, WHITE, WHITE, WHITE)])[0]
    assert (whole[:, :6] == RED).all() and (whole[:, 10:] == WHITE).all()


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_a_processor_that_crops_does_so_at_another_size_as_well(kind, tmp_path):
    """The share of an upright image's width that is seen stays the same: its middle, nothing stretched."""
    image = bands(800, 400, RED, GREEN, GREEN, RED)
    for view in ((32, 32), (48, 48), (64, 48)):
        processor = tiny.processor_seeing(kind, tmp_path, view, own_size=(32, 32))
        (pixels,) = seen(processor, [image])
        assert pixels.shape == (*view, 3) and (pixels[:, 2:-2] == GREEN).all()


def test_an_image_processor_without_a_pillow_form_is_stood_in_for(tmp_path):
    """DINOv3's is one; these are its settings."""
    own = {"height": 24, "width": 24}
    settings = {
        "image_processor_type": "DINOv3ViTImageProcessorFast", "do_resize": True, "size": own, "resample": 2,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225], "do_center_crop": None, "crop_size": None,
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    tokenizer = tiny.byte_level_tokenizer()
    config = SimpleNamespace(image_size=(32, 32), image_token_id=len(tokenizer), image_seq_length=3, max_tiles=1)
    processor = VLMProcessor.from_backbones(str(tmp_path), None, config, tokenizer=tokenizer)
    (pixels,) = seen(processor, [bands(300, 20, RED, BLUE)])
    assert pixels.shape == (32, 32, 3) and (pixels[:, :14] == RED).all() and (pixels[:, 18:] == BLUE).all()
    assert list(processor.image_processor.image_mean) == settings["image_mean"]


def test_the_plain_call_sees_what_training_sees(tmp_path):
    processor = tiny.processor_seeing("vit", tmp_path)
    picture = bands(20, 60, RED, BLUE)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "lying.jpg", exif=exif)
    lying = Image.open(tmp_path / "lying.jpg")
    for image in (picture.convert("L"), picture.convert("RGBA"), picture.convert("P"), lying):
        expected = processor.process_images([to_rgb(image)])["pixel_values"]
        assert torch.equal(processor(images=image, text="<image>", return_tensors="pt")["pixel_values"], expected)


@pytest.mark.parametrize("settings", [{"image_mode": "pad"}, {"max_tiles": 4}, {}], ids=str)
def test_arrays_of_shares_are_the_images_that_they_are(settings, tmp_path):
    processor = tiny.processor_seeing("vit", tmp_path, **settings)
    array = np.moveaxis(np.asarray(bands(32, 32, RED, BLUE)), -1, 0).astype(np.float32) / 255
    expected = processor.process_images([bands(32, 32, RED, BLUE)])["pixel_values"]
    found = processor.process_images([array], do_rescale=False)["pixel_values"]
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=0)


@each_kind
@pytest.mark.parametrize("mode", [None, *IMAGE_MODES])
def test_any_size_fits(kind, mode, tmp_path):
    processor = tiny.processor_seeing(kind, tmp_path, (24, 40), image_mode=mode)
    # CLIP's way would make of a line one of twenty thousand times the height.
    sizes = SIZES if mode is not None or kind in ("vit", "siglip") else [(1, 1), *SIZES[3:]]
    pixels = processor.process_images([Image.new("RGB", size, RED) for size in sizes])["pixel_values"]
    assert pixels.shape == (len(sizes), 3, 24, 40) and pixels.isfinite().all()


@pytest.mark.parametrize("mode", IMAGE_MODES)
def test_images_are_made_to_fit_upright_and_on_white(mode, tmp_path):
    processor = tiny.processor_seeing("vit", tmp_path, image_mode=mode)
    upright = bands(20, 60, RED, BLUE)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise to see it upright
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "lying.png", exif=exif)
    clear = Image.new("RGBA", (20, 60), (0, 0, 0, 0))
    with Image.open(tmp_path / "lying.png") as lying:
        assert lying.size == (60, 20)
        shown = seen(processor, [lying, upright, clear, Image.new("RGB", (20, 60), WHITE)])
    assert (shown[0] == shown[1]).all() and (shown[2] == shown[3]).all() and (shown[0] != shown[2]).any()


def test_arrays_and_tensors_are_images_too(tmp_path, image):
    processor = tiny.processor_seeing("vit", tmp_path, image_mode="pad", max_tiles=4)
    array = np.asarray(image(3, (70, 40)))
    given = (image(3, (70, 40)), array, array.transpose(2, 0, 1), torch.from_numpy(array.copy()).permute(2, 0, 1))
    first, *others = (processor(images=one, text="<image>", return_tensors="pt") for one in given)
    assert len(first["pixel_values"]) > 1
    assert all(torch.equal(other[name], first[name]) for other in others for name in first)


def test_a_large_jpeg_that_is_decoded_smaller_looks_the_same(tmp_path):
    smooth = Image.linear_gradient("L").resize((800, 600))
    Image.merge("RGB", [smooth, smooth.rotate(90), smooth.rotate(180)]).save(tmp_path / "large.jpg", quality=95)
    for mode in (None, *IMAGE_MODES):
        processor = tiny.processor_seeing("vit", tmp_path, (24, 40), image_mode=mode)
        sample = tiny.dialogue("what?", "a", str(tmp_path / "large.jpg"))
        reduced = VLMDataCollator(processor)([sample])["pixel_values"]
        with Image.open(tmp_path / "large.jpg") as whole:
            exact = processor.process_images([whole.convert("RGB")])["pixel_values"]
        assert reduced.shape == exact.shape and (reduced - exact).abs().max() < 0.1


def test_the_mode_is_saved_with_the_processor(tmp_path, image):
    processor = tiny.processor_seeing("dinov2", tmp_path / "encoder", (24, 40), max_tiles=3, image_mode="pad")
    processor.save_pretrained(tmp_path / "saved")
    again = VLMProcessor.from_pretrained(tmp_path / "saved")
    assert (again.image_mode, again.max_tiles, again.view_size) == ("pad", 3, (24, 40))
    one, other = (p.process_images([image(1, (100, 30))]) for p in (processor, again))
    assert torch.equal(one["pixel_values"], other["pixel_values"]) and len(one["pixel_values"]) > 1


def test_an_unknown_mode_gives_one_line(tmp_path):
    with pytest.raises(ValueError, match="image_mode='stretch' is not known; choose one of resize, pad, ") as caught:
        tiny.processor_seeing("vit", tmp_path, image_mode="stretch")
    assert "\n" not in str(caught.value)
