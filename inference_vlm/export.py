"""Rewrite a composed model as one that the library has a class for: no code of Duet's, the same logits.

    python -m inference_vlm.export outputs/shapes/sft exported
    python -m inference_vlm.export me/my-adapter exported --dtype bfloat16 --max_shard_size 5GB

Programs that know LLaVA take the folder as it is. What is special: it is read back from the disk as any program would,
and has its name only if ids, pixels and logits, with a picture and without, are those of the model that it was made of;
what does not fit exactly is refused, with the nearest that would.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.conversion_mapping import get_model_conversion_mapping

from processing.data_error_vlm import DuetError, in_a_line
from processing.fitting_vlm import in_pillow
from processing.processing_vlm import VLMProcessor

from .loading import DTYPES, load
from .native_processor import conversations, differing, differing_words, inputs_of, leave_out_prefix, native_processor
from .program import ended_by, program, show_any_text
from .whole_folder import check_free, whole_folder


TOLERANCE = 1e-5
"""How far the logits may be apart, as a share of the greatest."""


def export(
    name: str, out: str | Path, dtype: str | None = None, revision: str | None = None, max_shard_size: str | None = None
) -> str:
    """
    Write a composed model, or an adapter and its base, as one of the library's own.

    Args:
        name: folder or repository; its own code is run.
        out: the folder, which must not hold anything; it is there once all of it is, and computes the same.
        dtype: of the weights, that of the model if not given.
        revision: of a repository.
        max_shard_size: of a file of weights, as the library takes it ("5GB").

    Returns:
        `str`: what was written, in a line.

    Raises:
        DuetError: there is no such model, none of the library's classes computes the same, or the folder cannot be
            written.
    """
    out = Path(out)
    check_free(out)
    shards: dict[str, Any] = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    try:
        split_torch_state_dict_into_shards({}, **shards)
    except ValueError as error:
        raise DuetError(f"max_shard_size={max_shard_size}: expected a number and its unit, such as 5GB.") from error
    model, processor = _load(name, dtype, revision)
    image = _picture(processor)
    try:
        form = model.native_form()
        native, changed = _processor_for(form, model, processor, image)
    except ValueError as error:
        if getattr(error, "is_duet_error", False):
            raise DuetError(
                f"{name} is not exported: {in_a_line(error)} What can be is composed and trained in that way."
            ) from error
        raise
    with whole_folder(out) as folder:
        _as_native(model, form).save_pretrained(folder, **shards)
        native.save_pretrained(folder)
        difference = _check(name, folder, model, processor, image)
    said = [
        f"{out} is a {form.architecture} ({str(model.dtype).removeprefix('torch.')}) and needs no code of Duet's: "
        f"logits with a picture and without differ by {difference:.1e}, ids and pixels are the same."
    ]
    if form.config.model_type != "llava":
        said.append(
            "Programs that know LLaVA alone do not take it: for them, read the encoder with --vision_feature_layer -2."
        )
    return " ".join([*said, *changed])


def _load(name, dtype, revision) -> tuple[Any, VLMProcessor]:
    asked = {} if dtype is None else {"dtype": getattr(torch, dtype)}
    model, processor = load(name, revision=revision, merge_adapter=True, **asked)
    if not hasattr(model, "native_form"):
        raise DuetError(
            f"{name} was saved by an earlier Duet, which does not know of exports; give it the code of today's with "
            f"`{program('inference_vlm.update')} {name}`."
        )
    if getattr(model.config, "quantization_config", None) is not None:
        raise DuetError(
            f"the weights of {name} are held in few bits; export the model that they were made of, or an adapter on "
            "it, which is exported with whole weights."
        )
    return model, processor


def _picture(processor):
    """A picture of noise, of another shape than the encoder sees."""
    height, width = processor.view_size
    noise = torch.randint(0, 256, (height // 2 + 5, width // 2 + 11, 3), generator=torch.Generator().manual_seed(0))
    return Image.fromarray(noise.to(torch.uint8).numpy())


def hindrance(model: Any, processor: VLMProcessor) -> str | None:
    """Why a composed model that has a native form is not exported with its processor; `None` where it is."""
    try:
        _processor_for(model.native_form(), model, processor, _picture(processor))
    except ValueError as error:
        if getattr(error, "is_duet_error", False):
            return in_a_line(error)
        raise
    return None


def _processor_for(form, model, processor, image):
    """The library's processor for a native form, and what had to be changed for it, a sentence each."""
    patch_size = form.config.vision_config.patch_size
    patch_size = patch_size if isinstance(patch_size, int) else patch_size[0]
    native = native_processor(processor, form.select, patch_size, model.config.num_prefix_tokens)
    return native, _fit_ids(processor, native, image)


def _fit_ids(processor, native, image):
    """See that conversations become the same ids; what had to be changed for it, a sentence each."""
    changed = []
    if differing(processor, native, image):
        changed.append(_without_prefix(processor, native))
    if left := differing(processor, native, image):
        raise DuetError(
            f"a conversation ({left[0]}) becomes other ids in transformers' own processor than those that the model "
            "learned, because its template is read in other pieces; a template whose pieces end in control tokens, "
            "such as ChatML, can be exported."
        )
    if words := differing_words(processor, native):
        changed.append(
            f"An earlier answer such as {words[0]!r} is read there together with the template around it, as other ids; "
            "a template whose pieces end in control tokens keeps them apart."
        )
    return changed


def _without_prefix(processor, native):
    leave_out_prefix(native.tokenizer)
    before = "".join(processor.tokenizer.convert_ids_to_tokens(processor.encoder.text.prefix_ids))
    return (
        f"Its tokenizer no longer puts {before} before a text: the library's processor would put it before a "
        f"conversation too, whose template has none; write it where it is to be, as in '{before}"
        f"{processor.image_token}', which asks for a caption."
    )


def _as_native(model, form) -> PreTrainedModel:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it reports parts that the encoder has, and nothing reads, as new
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            native = getattr(transformers, form.architecture).from_pretrained(
                None, config=form.config, state_dict=model.native_weights(form), dtype=model.dtype
            )
    finally:
        transformers.logging.set_verbosity(verbosity)
    # Saved under the names of this class's checkpoints on the Hub, each expert by itself: engines read no others.
    native._weight_conversions = get_model_conversion_mapping(native, add_legacy=False)
    native.generation_config = model.generation_config
    return native


@torch.no_grad()
def _check(name: str, folder: Path, model: PreTrainedModel, processor: VLMProcessor, image: Image.Image) -> float:
    """
    How far the logits of what was written are from those of the model, as a share of the greatest.

    Raises:
        DuetError: they are further apart than `TOLERANCE`, or pixels or ids are not the same.
    """
    theirs = AutoModelForImageTextToText.from_pretrained(folder).eval()
    native: ProcessorMixin = AutoProcessor.from_pretrained(folder)
    native.image_processor = in_pillow(native.image_processor)  # torchvision's resizes to other pixels, if hardly
    greatest = 0.0
    for messages in conversations(image, processor):
        asked, found = (inputs_of(one, messages) for one in (processor, native))
        for key in ("input_ids", "pixel_values"):
            if not torch.equal(asked[key], found[key]) if key in asked else key in found:
                raise DuetError(f"{name} is not exported: transformers' own processor gives other {key} than its own.")
        expected, logits = (one(**of_it).logits.float() for one, of_it in ((model, asked), (theirs, found)))
        greatest = max(greatest, ((logits - expected).abs().max() / expected.abs().max()).item())
    if not greatest <= TOLERANCE:
        hint = "" if model.dtype == torch.float32 else "; --dtype float32 keeps what a lower precision rounds"
        raise DuetError(
            f"{name} is not exported: what was written gives logits that differ by {greatest:.1e}, as a share of the "
            f"greatest; expected at most {TOLERANCE:.0e}{hint}."
        )
    return greatest


def main(argv: list[str] | None = None) -> int:
    """The command line; 1 where it could not be done, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog=program("inference_vlm.export"), description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="a folder that Duet saved, an adapter's too, or a name on the Hub")
    parser.add_argument("out", type=Path, help="the folder that is written")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; that of the model if not given")
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    parser.add_argument("--max_shard_size", help="of a file of weights, such as 5GB; the library's own if not given")
    args = parser.parse_args(argv)
    show_any_text()
    try:
        print(export(args.model, args.out, args.dtype, args.revision, args.max_shard_size))
    except (Exception, KeyboardInterrupt) as error:
        return ended_by(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
