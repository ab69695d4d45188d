"""A run with adapters: its base lies on disk before anything learns, may be held in 4 or 8 bit, and gets its adapters.

What is special: a base is written once, whole and in whole precision, as `base` in the output folder, and checkpoints
hold what learns alone; a repository that is named as the model is its own base. A run that goes on takes the base that
it began with, and is refused on another.
"""

import contextlib
import gc
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from huggingface_hub import try_to_load_from_cache
from peft import PeftConfig

from inference_vlm.loading import in_few_bits
from modeling_vlm import VLMForConditionalGeneration
from modeling_vlm.adapters_vlm import BASE, CONFIG, Adapter, find_adapter, keep_bits
from processing import VLMProcessor
from processing.data_error_vlm import DuetError, in_a_line

from .arguments import ModelArguments
from .bases import base_begun_with, discard_new_base, made_of, source_of, write_base
from .learning.adapters import composed
from .learning.lora import (
    AdaptedVLM,
    Targets,
    adapt,
    check_targets,
    config_of,
    find_targets,
    load_adapters,
    sides_in,
    wrap,
)
from .learning.originals import autocast_dtype
from .policy import TuningArguments
from .settings import Arguments
from .weightless import hold_in_few_bits


SIDES = {"vision": "vision encoder", "text": "language model"}


def adapter_named(model_args: ModelArguments) -> Adapter | None:
    """
    The adapter that `model` is, or `None`.

    Raises:
        DuetError: it has no base.
    """
    if model_args.model is None:
        return None
    return find_adapter(model_args.model, {"revision": model_args.model_revision})


def sides_of(tuning: TuningArguments) -> list[str]:
    """The backbones that learn through adapters."""
    return [side for side in SIDES if getattr(tuning, f"tune_{side}") == "lora"]


def settle_adapter(arguments: Arguments) -> Adapter | None:
    """
    The adapter that a run goes on with, or `None`.

    Raises:
        DuetError: the run asks for something that cannot be with the adapter that `model` is, or it is none.
    """
    adapter, tuning = adapter_named(arguments.model), arguments.tuning
    if tuning.merge_first and adapter is None:
        name, mend = arguments.model.model, "leave it out"
        found = "no --model is named" if name is None else f"{name} is no adapter"
        if name is not None and not Path(name).is_dir():
            found = f"{name} is no folder, and the Hub cannot be reached or has no adapter of that name"
            mend = f"check the name, the revision and the network, or {mend}"
        raise DuetError(f"merge_first merges the adapter that --model is, and {found}; {mend}.")
    if adapter is None or tuning.merge_first:
        return None
    config, has = config_of(adapter), sides_in(adapter)
    mend = "add --merge_first to go on without it"
    for side, what in SIDES.items():
        word = getattr(tuning, f"tune_{side}")
        if word == "lora" and side not in has:
            raise DuetError(f"tune_{side}=lora: the adapter in {adapter.name} has nothing in the {what}; {mend}.")
        if word not in ("lora", "frozen") and side in has:
            raise DuetError(f"tune_{side}={word}: the adapter in {adapter.name} is in the {what}; {mend}.")
    for name in tuning.told_of_lora():
        made = getattr(config, {"lora_r": "r"}.get(name, name), None)
        if name != "lora_target_modules" and made != getattr(tuning, name):  # these are compared in the model
            raise DuetError(f"{name}: the adapter in {adapter.name} was made with {made}; leave it out, or {mend}.")
    return adapter


def check_adapters(arguments: Arguments, here: bool = True) -> None:
    """
    Refuse what cannot be of adapters and of weights in few bits, before anything is read.

    Args:
        here: whether the run is to be on this machine.

    Raises:
        DuetError: what it is.
    """
    tuning, sides = arguments.tuning, sides_of(arguments.tuning)
    for bits in ("load_in_4bit", "load_in_8bit"):
        if getattr(tuning, bits):
            if not sides or tuning.tune_text not in (None, "lora", "frozen"):
                raise DuetError(
                    f"{bits}: weights in few bits cannot learn, adapters on them do; add --tune_text lora, or leave it "
                    "out."
                )
            if here and find_spec("bitsandbytes") is None:
                raise DuetError(f"{bits} needs bitsandbytes, which is not here; run `pip install bitsandbytes`.")
    if "vision" in sides and arguments.efficiency.cache_vision_features is not None:
        raise DuetError(
            "tune_vision=lora: the features of an encoder that learns cannot be cached; leave out "
            "--cache_vision_features, or freeze the encoder (--tune_vision frozen)."
        )


def begun_with(arguments: Arguments) -> ModelArguments:
    """
    The model of a run: as it is named, or the base that a run which goes on began with.

    Raises:
        DuetError: that base is another model's, or the checkpoint one of a run with another policy.
    """
    model_args, args = arguments.model, arguments.training
    if args.resume_from_checkpoint is None:
        return model_args
    checkpoint, sides = Path(args.resume_from_checkpoint), sides_of(arguments.tuning)
    goes_on = not arguments.tuning.merge_first and adapter_named(model_args) is not None
    adapts = bool(sides) or goes_on  # with an adapter that is held as it is
    if adapts != (checkpoint / CONFIG).is_file():
        found, asked = ("an adapter", "learns whole weights") if not adapts else ("a whole model", "learns adapters")
        raise DuetError(
            f"{checkpoint} holds {found}, and this run {asked}; go on with the tune_vision and tune_text that it began "
            "with."
        )
    base = base_begun_with(arguments)
    if base is None:
        return model_args
    if made_of(base)["sha256"] != source_of(arguments):
        raise DuetError(
            f"the base in {base} was made of another model, or joined otherwise; go on with the settings that the run "
            "began with, or name another output folder."
        )
    return replace(model_args, model=str(base), model_revision=None)


def with_adapters(
    model: VLMForConditionalGeneration, processor: VLMProcessor, arguments: Arguments, adapter: Adapter | None
) -> Any:
    """
    The model that a run trains: with adapters where a backbone learns through them, its base on disk.

    Args:
        model: the composed model, whole.
        processor: that belongs to it.
        adapter: what the run goes on with; its base is `model`.

    Raises:
        DuetError: what peft, bitsandbytes or the model cannot have.
    """
    tuning, identity = arguments.tuning, None
    discard_new_base(arguments)
    if adapter is None and not sides_of(tuning):
        return model
    name, revision = _repository(arguments.model, adapter)
    place = name
    if name is None:
        written = write_base(model, processor, arguments)
        name, place, identity = BASE, str(written), made_of(written)["id"]
    if tuning.load_in_4bit or tuning.load_in_8bit:
        model = _quantised(model, arguments, place, revision)
    if adapter is not None:
        adapted = load_adapters(model, adapter, name, revision, _asked_of(adapter, model, tuning))
    else:
        adapted = adapt(model, tuning, sides_of(tuning), name, revision)
    if identity is not None:  # told to all who load what is saved
        composed(adapted).config.adapter_base = identity
    if arguments.training.resume_from_checkpoint is not None:
        _check_same(adapted, Path(arguments.training.resume_from_checkpoint))
    return adapted


def sketched(model: VLMForConditionalGeneration, arguments: Arguments) -> Any:
    """
    The shape of the model that a run trains, with its adapters and in few bits; nothing is read of weights or written.

    Args:
        model: the composed model, on the meta device.

    Raises:
        DuetError: see `with_adapters`.
    """
    adapter, tuning = None, arguments.tuning
    with contextlib.suppress(OSError):  # a model that stage 1 is still to make
        adapter = settle_adapter(arguments)
    check_adapters(arguments, here=False)
    if adapter is None and not sides_of(tuning):
        return model
    if adapter is not None:
        targets = _asked_of(adapter, model, tuning)
        adapted = wrap(model, config_of(adapter))
        check_targets(adapted, targets, adapter.name)
    else:
        adapted = adapt(model, tuning, sides_of(tuning), BASE, None)
    if tuning.load_in_4bit or tuning.load_in_8bit:
        if tuning.use_dora:
            raise DuetError("what use_dora takes of memory on weights in few bits is not known; leave out one of them.")
        adapters = {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in adapters.values():
            parameter.requires_grad_(True)
        hold_in_few_bits(model.model.language_model, 4 if tuning.load_in_4bit else 8)
    return adapted


def _asked_of(adapter: Adapter, model: VLMForConditionalGeneration, tuning: TuningArguments) -> Targets | None:
    """The modules that a run says an adapter is in."""
    asked = tuning.lora_target_modules
    return None if asked is None else find_targets(model, sorted(sides_in(adapter)), asked)


def _repository(model_args: ModelArguments, adapter: Adapter | None) -> tuple[str | None, str | None]:
    """The repository that is the base itself, and its commit."""
    name, asked = (model_args.model, model_args.model_revision)
    if adapter is None and adapter_named(model_args) is not None:  # which was merged into its base
        return None, None
    if adapter is not None:
        name, asked = adapter.base, adapter.base_hub.get("revision")
        if adapter.base_hub.get("subfolder"):  # pushed with its adapter
            return None, None
    if name is None or Path(name).exists():
        return None, None
    config = try_to_load_from_cache(name, "config.json", revision=asked)
    return (name, Path(config).parent.name) if isinstance(config, str) else (None, None)


def _quantised(model, arguments, place, revision) -> VLMForConditionalGeneration:
    """The same model with a language model in few bits; tower, projector and head stay whole."""
    dtype, generation, config = model.dtype, model.generation_config, model.config
    attention = {f"{side}_config": getattr(arguments.model, f"{side}_attn_implementation") for side in SIDES}
    model.to("meta")
    del model
    gc.collect()
    asked = in_few_bits(bool(arguments.tuning.load_in_4bit), autocast_dtype(arguments.training))
    try:
        quantised = VLMForConditionalGeneration.from_pretrained(
            place,
            revision=revision,
            dtype=dtype,
            attn_implementation=attention,
            quantization_config=asked,
            trust_remote_code=True,  # it was run already
        )
    except (ImportError, ValueError, RuntimeError) as error:
        raise DuetError(f"bitsandbytes cannot hold this model: {in_a_line(error, 300)}") from error
    keep_bits(quantised)
    quantised.generation_config = generation
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(quantised.config.text_config, name, getattr(config.text_config, name, None))
    return cast(VLMForConditionalGeneration, quantised)


def _check_same(adapted: AdaptedVLM, checkpoint: Path) -> None:
    """Refuse to go on from a checkpoint of other adapters."""
    own = adapted.peft_config["default"].to_dict()
    saved = PeftConfig.from_pretrained(str(checkpoint)).to_dict()
    names = {
        "r": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "use_dora": "use_dora",
        "use_rslora": "use_rslora", "target_modules": "lora_target_modules", "target_parameters": "lora_target_modules",
    }  # fmt: skip
    for name, option in names.items():
        one, other = ((sorted(v) if isinstance(v, (set, list)) else v) for v in (own[name], saved[name]))
        if (one or None) != (other or None):
            raise DuetError(
                f"{checkpoint} holds adapters with {option}={other}, and this run has {one}; go on with the settings "
                "that the run began with."
            )


__all__ = [
    "adapter_named", "begun_with", "check_adapters", "settle_adapter", "sides_of", "sketched",
    "with_adapters",
]  # fmt: skip
