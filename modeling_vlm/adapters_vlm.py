"""Adapters of peft and their base become one model, and lie in folders that load wherever both of them went.

What is special: a folder holds all that was learned by the names that peft gives it, LoRA's weights and beside them
what learned as a whole, so that peft's own `PeftModel` loads both. Its base is the folder `base` in it or beside it, or
a repository; so that a run's folder may be moved, copied or pushed. The file travels with every checkpoint, and needs
peft only where there is an adapter.
"""

import contextlib
import copy
import json
import shutil
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from huggingface_hub import HfApi, save_torch_state_dict
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.pytorch_utils import Conv1D
from transformers.utils import find_adapter_config_file, logging
from transformers.utils.hub import create_and_tag_model_card
from transformers.utils.quantization_config import QuantizationConfigMixin

from .files_vlm import check_file
from .model_error_vlm import DuetError, in_a_line


logger = logging.get_logger(__name__)

BASE, CONFIG, WEIGHTS, PREFIX = "base", "adapter_config.json", "adapter_model.safetensors", "base_model.model."
SOURCE = "base_source.json"
"""In a base: its `id`, which the config of an adapter has too, and what it was made of, as a hash."""

_ASIDE = ("_set_aside-", "_overwritten-")  # where the output folder of a run has what it does not go on with
_HUB = ("cache_dir", "local_files_only", "revision", "token")
_OF_ADAPTERS = "lora_"


class Adapter(NamedTuple):
    """
    Where an adapter lies, and its base.

    Attributes:
        name: folder or repository.
        hub: how the repository is asked: revision, token and the like.
        base: folder or repository.
        base_hub: how that repository is asked, and its `subfolder`.
    """

    name: str
    hub: dict[str, Any]
    base: str
    base_hub: dict[str, Any]


def find_adapter(name: str | Path | None, kwargs: dict[str, Any]) -> Adapter | None:
    """
    What the arguments of `from_pretrained` say of an adapter, `None` where they name a model.

    Args:
        name: folder or repository that is loaded.
        kwargs: its other arguments; those that only the library's own loader of adapters would read are taken out.

    Raises:
        `DuetError`: there is no base to it.
    """
    given = kwargs.pop("adapter_kwargs", None) or {}
    adapter = given.get("_adapter_model_path")  # found by an auto class, which may name the base already
    hub = {key: kwargs[key] for key in _HUB if kwargs.get(key) is not None}
    if name is None or kwargs.get("subfolder"):
        return None
    name = str(name)
    if adapter is not None:
        hub = {key: given[key] for key in _HUB if given.get(key) is not None}
    else:
        found = Path(name, CONFIG).is_file() if Path(name).is_dir() else find_adapter_config_file(name, **hub)
        if not found:
            return None
    adapter = str(adapter or name)
    base, base_hub = base_of(adapter, hub)
    if adapter != name and not Path(adapter).is_dir() and base != adapter:
        base = name
    return Adapter(adapter, hub, base, {**{key: value for key, value in hub.items() if key != "revision"}, **base_hub})


def base_of(name: str, hub: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """
    Folder or repository of an adapter's base, with its revision and subfolder.

    Args:
        name: folder or repository of the adapter.
        hub: how the repository is asked.

    Raises:
        `DuetError`: there is none.
    """
    file = Path(name, CONFIG) if Path(name).is_dir() else find_adapter_config_file(name, **hub)
    if file is None:
        raise DuetError(f"there is no adapter in {name}: it has no {CONFIG}.")
    check_file("adapter", name, Path(file))
    settings = json.loads(Path(file).read_text(encoding="utf-8"))
    named = settings.get("base_model_name_or_path") or BASE
    if not isinstance(named, str):
        raise DuetError(f"the adapter in {name} names its base by {named!r} in {CONFIG}; expected a folder or a name.")
    if not Path(name).is_dir():
        if named in (name, BASE):  # pushed with it
            return name, {"subfolder": BASE, "revision": hub.get("revision")}
        return named, {"revision": settings.get("revision")}
    folder = Path(name).resolve()
    is_aside = folder.parent.name.startswith(_ASIDE)
    places = [folder / named, *_bases_in(folder), *_bases_in(folder.parent)]
    places += _bases_in(folder.parent.parent) if is_aside else []
    there = [place for place in places if (place / "config.json").is_file()]
    expected = _told(folder / "config.json", "adapter_base")
    if own := [place for place in there if expected is None or _told(place / SOURCE, "id") in (None, expected)]:
        return str(own[0]), {}
    if there:  # another one, which is told when it is loaded
        return str(there[0]), {}
    if named.count("/") == 1 and not named.startswith(("/", ".")):
        return named, {"revision": settings.get("revision")}
    raise DuetError(
        f"the adapter in {name} has no base: expected a composed model in {folder / BASE} or {folder.parent / BASE} "
        f"(it names {named!r}); move or copy the whole output folder of its run, base and all."
    )


def _bases_in(run: Path) -> list[Path]:
    """Where the output folder of a run has bases; an earlier one is where its checkpoints were moved to."""
    return [run / BASE, *sorted(place for kind in _ASIDE for place in run.glob(f"{kind}*/{BASE}"))]


def _told(file: Path, key: str) -> str | None:
    try:
        return json.loads(file.read_text(encoding="utf-8")).get(key)
    except (OSError, ValueError, AttributeError):
        return None


def from_adapter(
    model_class: type[PreTrainedModel],
    adapter: Adapter,
    *args,
    merge: bool,
    quantization_config: QuantizationConfigMixin | dict | None,
    **kwargs,
) -> Any:
    """
    What `from_pretrained` gives for an adapter: its base, held as it was when the adapter learned, with all in it.

    Args:
        merge: give a plain model, its weights those that the adapter makes of them; what was quantised is not any more.
        quantization_config, **kwargs: of `from_pretrained`.

    Raises:
        `DuetError`: peft is not installed, or the adapter is another model's.
    """
    try:
        config = model_class.config_class.from_pretrained(adapter.name, **adapter.hub)
    except OSError:  # one of peft's own making
        config = kwargs.pop("config", None)
    if config is not None:
        held = config.__dict__.pop("quantization_config", None)  # the base itself lies whole on disk
        _check_base(adapter, config.__dict__.pop("adapter_base", None))
        quantization_config, kwargs["config"] = quantization_config or held, config
    kwargs = {name: value for name, value in kwargs.items() if name not in _HUB} | adapter.base_hub
    loaded = model_class.from_pretrained(adapter.base, *args, quantization_config=quantization_config, **kwargs)
    model, *others = loaded if isinstance(loaded, tuple) else (loaded,)
    keep_bits(model)
    if merge and quantization_config is not None:
        logger.warning("the base is quantised: it is dequantised, and the adapter merged into what that gives.")
        model = _dequantised(model)
    model = put_on(model, adapter, merge)
    return (model, *others) if others else model


def _check_base(adapter: Adapter, expected: str | None) -> None:
    found = _told(Path(adapter.base, SOURCE), "id")
    if expected is not None and found not in (None, expected):
        raise DuetError(
            f"the adapter in {adapter.name} learned on another base than the one in {adapter.base}, which a later run "
            "may have written; put them together again."
        )


def _dequantised(model: PreTrainedModel) -> PreTrainedModel:
    """A base in whole precision, of the numbers that its bits stand for, with GPT-2's layers as they are saved."""
    model = model.dequantize()
    with torch.device("meta"):
        plain = type(model)(copy.deepcopy(model.config))
    for name, layer in list(plain.named_modules()):
        linear = model.get_submodule(name)
        if isinstance(layer, Conv1D) and isinstance(linear, nn.Linear):
            layer.weight, layer.bias = nn.Parameter(linear.weight.data.T.contiguous()), linear.bias
            model.set_submodule(name, layer)
    return model


def put_on(model: PreTrainedModel, adapter: Adapter, merge: bool) -> PreTrainedModel:
    """
    Put an adapter, and what learned beside it, into its base.

    Args:
        model: the base.
        merge: give a plain model, its weights those that the adapter makes of them.

    Raises:
        `DuetError`: peft is not installed, or the adapter is another model's.
    """
    peft = _peft()
    hub = {key: value for key, value in adapter.hub.items() if key != "local_files_only"}
    read_config(adapter)
    _check_weights(adapter.name)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fan_in_fan_out")  # peft sets it right for each layer, and says so
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            adapted = peft.PeftModel.from_pretrained(model, adapter.name, **hub)
    except (RuntimeError, ValueError, KeyError) as error:
        raise DuetError(
            f"the adapter in {adapter.name} does not fit the base in {adapter.base}: {in_a_line(error, 300)}"
        ) from error
    weights = peft.load_peft_weights(adapter.name, device="cpu", **hub)
    beside = {name.removeprefix(PREFIX) for name in weights if f".{_OF_ADAPTERS}" not in name}
    if merge:
        try:
            model = adapted.merge_and_unload()
        except (AttributeError, RuntimeError, ValueError) as error:  # the first of methods that have nothing to merge
            reason = in_a_line(error, 300)
            raise DuetError(f"the adapter in {adapter.name} cannot be merged into its base: {reason}") from error
        model.__dict__.pop("peft_config", None)
    else:
        model._hf_peft_config_loaded = True  # as the library's own loader of adapters has it
        model._learned_beside = beside
        for config in model.peft_config.values():  # it may be saved anywhere
            config.base_model_name_or_path, config.revision = adapter.base, adapter.base_hub.get("revision")
    with contextlib.suppress(OSError):  # there may be none with it
        model.generation_config = GenerationConfig.from_pretrained(adapter.name, **adapter.hub)
    return model.eval()


def read_config(adapter: Adapter) -> Any:
    """
    Peft's config of an adapter.

    Raises:
        `DuetError`: peft is not installed, or cannot read it.
    """
    try:
        return _peft().PeftConfig.from_pretrained(adapter.name, **adapter.hub)
    except (KeyError, TypeError, ValueError) as error:
        if getattr(error, "is_duet_error", False):
            raise
        raise DuetError(
            f"the adapter in {adapter.name} cannot be read: peft makes nothing of its {CONFIG}, "
            f"{type(error).__name__}: {in_a_line(error, 200)}; update peft, or name another adapter."
        ) from error


def _check_weights(name: str) -> None:
    folder = Path(name)
    if not folder.is_dir():
        return
    found = [folder / file for file in (WEIGHTS, "adapter_model.bin") if (folder / file).is_file()]
    if not found:
        raise DuetError(f"the adapter in {name} has no weights: expected an {WEIGHTS} in it; fetch them.")
    check_file("adapter", name, found[0])


def keep_bits(model: nn.Module) -> None:
    """
    Have bitsandbytes leave 4-bit weights as they are quantised.

    On a CPU that multiplies bfloat16 it would write them anew when they are first used in evaluation, with scales
    rounded to 16 bits, in a form through which no gradient goes.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def is_adapted(model: nn.Module) -> bool:
    """Whether a composed model has adapters of peft in it."""
    return bool(getattr(model, "peft_config", None))


def learned_beside(model: PreTrainedModel) -> set[str]:
    """Names of the parameters of a model with adapters that are no adapters, and that learn, or did."""
    names = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    return getattr(model, "_learned_beside", set()) | {name for name in names if f".{_OF_ADAPTERS}" not in name}


def save_adapter(
    model: PreTrainedModel,
    folder: str | Path,
    state_dict: dict[str, torch.Tensor] | None = None,
    repository: str | None = None,
) -> None:
    """
    Save what a model with adapters has learned, with all that loading it needs; its base too where it was loaded.

    Args:
        state_dict: of the model, where it is not whole in this process.
        repository: where the folder is to be pushed, base and all.

    Raises:
        `DuetError`: it is to be pushed, and its base is elsewhere.
    """
    peft, (name, config) = _peft(), next(iter(model.peft_config.items()))
    state = model.state_dict() if state_dict is None else state_dict
    adapters = peft.get_peft_model_state_dict(model, state, name, save_embedding_layers=False)
    weights = adapters | {name: state[name] for name in sorted(learned_beside(model)) if name in state}
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(
        {PREFIX + name: tensor for name, tensor in weights.items()},
        folder,
        filename_pattern="adapter_model{suffix}.safetensors",
        max_shard_size="1TB",  # peft reads one file
    )
    config = copy.copy(config)
    base = Path(config.base_model_name_or_path or BASE)
    if base.is_absolute() and base.is_dir():  # of an adapter that was loaded: whoever has the folder has all of it
        if base.resolve() != (there := (Path(folder) / BASE).resolve()):
            beside = there.with_name(f"_{BASE}.new")
            shutil.rmtree(beside, ignore_errors=True)  # of a save that was killed
            shutil.copytree(base, beside)
            shutil.rmtree(there, ignore_errors=True)  # whose files would be read beside those of this one
            beside.replace(there)
        config.base_model_name_or_path = BASE
    if repository is not None and config.base_model_name_or_path == BASE:
        if not (Path(folder) / BASE / "config.json").is_file():
            raise DuetError(
                "the base of this adapter lies with its run; load the checkpoint with from_pretrained and push that, "
                "or have the run push (--push_to_hub)."
            )
        (Path(folder) / BASE / SOURCE).unlink(missing_ok=True)
        config.base_model_name_or_path, config.revision = repository, None
    config.inference_mode = True
    config.save_pretrained(str(folder))
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    if model._auto_class is not None:
        custom_object_save(model, folder, config=model.config)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def push_adapter(
    model: PreTrainedModel,
    repo_id: str,
    state_dict: dict[str, torch.Tensor] | None = None,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: list[str] | None = None,
    **kwargs,
) -> Any:
    """
    Push what a model with adapters has learned, and its base, to one repository, so that it loads by name.

    Args:
        state_dict: see `save_adapter`.
        others: see `PreTrainedModel.push_to_hub`.
    """
    api = HfApi(token=token)
    repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with TemporaryDirectory() as folder:
        save_adapter(model, folder, state_dict, repository)
        create_and_tag_model_card(repository, tags, token=token).save(Path(folder, "README.md"))
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repository, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=commit_message or "Upload adapter",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def _peft():
    try:
        import peft
    except ImportError as error:
        raise DuetError("this is an adapter, and peft is not installed; run `pip install peft`.") from error
    return peft


__all__ = [
    "Adapter", "base_of", "find_adapter", "from_adapter", "is_adapted", "keep_bits", "learned_beside", "push_adapter",
    "put_on", "read_config", "save_adapter",
]  # fmt: skip
