"""A model comes from its folder or the Hub to where it is to answer, with its processor.

What is special: where it lies and in what numbers it computes follow from the hardware. The accelerator that there is
(CUDA, MPS) is taken, and weights of 32 bits become bfloat16 on one that multiplies it; on a CPU they stay what was
saved, so that it says there what an evaluation found. Which attention is the library's choice: its fused one where the
backbones have it. An adapter loads as its base does, and comes on top.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from processing.data_error_vlm import DuetError, in_a_line
from processing.processing_vlm import VLMProcessor


DTYPES = ("float32", "bfloat16", "float16")
_WRITES_ANEW = "support_avx512bf16_for_cpu"  # of layers in few bits
_NOT_READ = (OSError, ValueError, ImportError, SafetensorError)


def load(name: str, revision: str | None = None, **options: Any) -> tuple[PreTrainedModel, VLMProcessor]:
    """
    A composed model, ready to answer, and its processor.

    Args:
        name: folder or Hub name of a model or an adapter; its own code is run.
        revision: of a repository.
        **options: of the model's `from_pretrained`.

    Raises:
        DuetError: there is none, or its files cannot be read, or it is a folder and a revision is asked for.
    """
    check_revision(name, revision)
    try:
        processor = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=True)
        if not hasattr(processor, "encode_messages"):
            kind = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=True).model_type
            raise DuetError(f"it is of type {kind}, which Duet did not compose.")
        model = AutoModelForImageTextToText.from_pretrained(name, revision=revision, trust_remote_code=True, **options)
    except torch.OutOfMemoryError as error:
        raise DuetError(
            f"the model {name!r} does not fit the memory of the device; give load_in_4bit or load_in_8bit, or "
            "device_map=auto to spread it over all that there is."
        ) from error
    except _NOT_READ as error:
        reason = in_a_line(error)
        raise DuetError(
            f"the model {name!r} could not be loaded: expected a folder that Duet saved, or a name on the Hub. {reason}"
        ) from error
    for module in model.modules():
        # On a CPU that multiplies bfloat16 bitsandbytes would write 4-bit weights anew, with scales rounded to 16 bits,
        # and cannot where a layer is narrower than a block.
        if hasattr(module, _WRITES_ANEW):
            setattr(module, _WRITES_ANEW, False)
    return model.eval(), processor


def check_revision(name: str, revision: str | None) -> None:
    """
    See that a revision is asked of what has some.

    Raises:
        DuetError: it is asked of a folder.
    """
    if revision is not None and Path(name).is_dir():
        raise DuetError(f"revision={revision}: {name} is a folder, which has no revisions; leave it out.")


def place(
    name: str,
    *,
    device: str | torch.device | None = None,
    device_map: str | dict | None = None,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
) -> dict[str, Any]:
    """
    What `load` is told, so that a model lies where it answers; see `Answerer.load`.

    Raises:
        DuetError: there is no such device or type, or two of them exclude each other.
    """
    if device is not None and device_map is not None:
        raise DuetError(f"device={device} and device_map={device_map}: give one of them.")
    if load_in_4bit and load_in_8bit:
        raise DuetError("load_in_4bit and load_in_8bit: give one of them.")
    chosen = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    at = _found(device) if device is not None else chosen or torch.device("cpu")
    options: dict[str, Any] = {}
    if device_map is not None:
        options["device_map"] = device_map
    elif at.type != "cpu":
        options["device_map"] = {"": at}
    numbers = _type(dtype)
    if numbers is None and at.type != "cpu" and _multiplies_bfloat16(at) and _saved_whole(name):
        numbers = torch.bfloat16
    if numbers is not None:
        options["dtype"] = numbers
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if load_in_4bit or load_in_8bit:
        options["quantization_config"] = in_few_bits(load_in_4bit, numbers)
        options.setdefault("device_map", {"": at})
    return options


def add_loading_arguments(
    parser: argparse.ArgumentParser,
    dtype: str = "bfloat16 for 32 bits on an accelerator that multiplies it, else as saved",
) -> None:
    """
    The options of a command line that say how a model is loaded; `loading_of` reads them.

    Args:
        dtype: what the help says of a type that is not given.
    """
    group = parser.add_argument_group("the model")
    group.add_argument("--device", help="where it lies: cuda, mps, cpu; the accelerator that there is if not given")
    group.add_argument("--device_map", help="auto spreads it over all devices that there are, in place of --device")
    group.add_argument(
        "--dtype", choices=DTYPES, help=f"of the weights; if not given, {dtype}"
    )  # fmt: skip
    group.add_argument("--attn_implementation", help="of both backbones, as the library calls it: sdpa, eager")
    group.add_argument("--load_in_4bit", action="store_true", help="hold the language model in 4 bits (bitsandbytes)")
    group.add_argument("--load_in_8bit", action="store_true", help="hold the language model in 8 bits (bitsandbytes)")


def loading_of(args: argparse.Namespace) -> dict[str, Any]:
    """What a command line says of how a model is loaded, as `Answerer.load` takes it."""
    names = ("device", "device_map", "dtype", "attn_implementation", "load_in_4bit", "load_in_8bit")
    return {name: getattr(args, name) for name in names}


def _type(named: str | torch.dtype | None) -> torch.dtype | None:
    if not isinstance(named, str):
        return named
    if named not in DTYPES:
        raise DuetError(f"dtype={named}: expected one of {', '.join(DTYPES)}.")
    return getattr(torch, named)


def in_few_bits(in_4bit: bool, dtype: torch.dtype | None) -> BitsAndBytesConfig:
    """
    How bitsandbytes holds a language model, to answer or as the base of adapters: NF4, its scales quantised too, as
    QLoRA has it, or 8 bit.

    Args:
        dtype: what 4-bit layers compute in; 32 bits if `None`.
    """
    if not in_4bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype or torch.float32,
    )


def _found(device) -> torch.device:
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:  # the latter of a torch that was built without it
        here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        also = "" if here is None else f", {here.type}"
        raise DuetError(
            f"device={device}: there is none here; expected one of cpu{also}. {in_a_line(error)}"
        ) from error
    return found


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether it does so itself; CUDA would pass for it on older cards, in software."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        ones = torch.ones(2, 2, device=device, dtype=torch.bfloat16)
        return bool((ones @ ones).sum() == 8)
    except (RuntimeError, TypeError):
        return False


def _saved_whole(name: str) -> bool:
    """Whether a model's weights have 32 bits; no, where nothing says so."""
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=True).dtype == torch.float32
    except _NOT_READ:  # what is wrong with it is said when it is loaded; an adapter of peft's own has no config
        return False


__all__ = ["DTYPES", "add_loading_arguments", "check_revision", "in_few_bits", "load", "loading_of", "place"]
