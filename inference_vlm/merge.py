"""Make one plain model of an adapter and its base.

    python -m inference_vlm.merge outputs/assistant/checkpoint-500 outputs/merged
    python -m inference_vlm.merge me/my-adapter merged --dtype bfloat16

The folder that is written is a composed model like any other: it needs no peft and no base, and computes what the
adapter on its base did. What is special: a base that was held in 4 or 8 bit when the adapter learned is quantised
again, and its weights are what these bits stand for, so that the answers are those that were trained; and the folder
has its name once all of it is written.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import find_adapter_config_file

from processing.data_error_vlm import DuetError, in_a_line

from .loading import DTYPES, check_revision
from .program import ended_by, program, show_any_text
from .whole_folder import check_free, whole_folder


ADAPTER = "adapter_config.json"


def merge(name: str, out: str | Path, dtype: str | None = None, revision: str | None = None) -> str:
    """
    Write the plain model that an adapter and its base are.

    Args:
        name: folder or repository of the adapter; its own code is run.
        out: the folder, which must not hold anything.
        dtype: of the weights, that of the base if not given.
        revision: of a repository.

    Returns:
        `str`: what was written, in a line.

    Raises:
        DuetError: there is no such adapter, its base is not there, or the folder cannot be written.
    """
    out = Path(out)
    check_free(out)
    check_revision(name, revision)
    asked = {} if dtype is None else {"dtype": getattr(torch, dtype)}
    try:
        _check_adapter(name, revision)
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=True)
        quantised = getattr(config, "quantization_config", None) is not None
        processor = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=True)
        model = AutoModelForImageTextToText.from_pretrained(
            name, revision=revision, trust_remote_code=True, merge_adapter=True, **asked
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        if getattr(error, "is_duet_error", False):
            raise DuetError(in_a_line(error)) from error
        raise DuetError(
            f"the adapter {name!r} could not be loaded: expected a folder of a run with adapters, or a Hub name; "
            f"{in_a_line(error)}"
        ) from error
    with whole_folder(out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    count = sum(parameter.numel() for parameter in model.parameters())
    said = f"{out} is a plain model: {count:,} parameters, {str(model.dtype).removeprefix('torch.')}"
    return f"{said}; its base, which was held in few bits, is dequantised." if quantised else f"{said}."


def _check_adapter(name: str, revision: str | None) -> None:
    file = Path(name, ADAPTER) if Path(name).is_dir() else find_adapter_config_file(name, revision=revision)
    if file is None:
        raise DuetError(
            f"{name} is no folder, and the Hub cannot be reached or has no adapter of that name; check the name, the "
            "revision and the network."
        )
    if not Path(file).is_file():
        raise DuetError(f"{name} holds no {ADAPTER}: it is no adapter, and there is nothing to merge.")
    try:
        settings = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise DuetError(f"{file} is no JSON, as if it were cut short; fetch it again.") from error
    if not isinstance(settings, dict):
        raise DuetError(f"{file} holds no settings by name; fetch it again.")


def main(argv: list[str] | None = None) -> int:
    """The command line; 1 where it could not be done, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog=program("inference_vlm.merge"), description=(__doc__ or "").splitlines()[0])
    parser.add_argument("adapter", help="a folder of a run with adapters, a checkpoint of it, or a name on the Hub")
    parser.add_argument("out", type=Path, help="the folder that is written")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; that of the base if not given")
    parser.add_argument("--revision", help="branch, tag or commit of an adapter on the Hub")
    args = parser.parse_args(argv)
    show_any_text()
    try:
        print(merge(args.adapter, args.out, args.dtype, args.revision))
    except (Exception, KeyboardInterrupt) as error:
        return ended_by(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
