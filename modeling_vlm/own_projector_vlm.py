"""A projector class of the user's own, in a file of theirs.

The file is copied into every checkpoint and named in its config, and loaded with the library's loader of remote code,
with the same consent (`docs/projectors.md`). This file travels with every checkpoint too.
"""

import inspect
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module, get_imports

from .configuration_vlm import relative_files
from .model_error_vlm import DuetError


def find_own_projector(projector: str | type[nn.Module]) -> tuple[str, str | None]:
    """
    What a config calls a projector, and the file of one's own.

    Args:
        projector: a projector's name, or a class of one's own: itself, or `"path/FILE.py:CLASS"`.

    Returns:
        `tuple[str, str | None]`: `"FILE.CLASS"` and its file for a class of one's own, else what was given and `None`.

    Raises:
        `DuetError`: the class is nowhere that a checkpoint could take its code along from.
    """
    if isinstance(projector, str) and ":" not in projector:
        return projector, None
    if isinstance(projector, str):
        file, _, name = projector.rpartition(":")
    elif isinstance(projector, type):
        file, name = _file_of(projector), projector.__name__
    else:
        raise DuetError(f"projector_type={projector!r}: expected a name, a class, or FILE.py:CLASS.")
    file = Path(file).expanduser().resolve()
    if not file.is_file() or file.suffix != ".py" or not name.isidentifier():
        raise DuetError(f"projector_type={projector!r}: expected FILE.py:CLASS, and there is no such {file}.")
    with _in_one_line(f"the projector's file {file.name} cannot be read"):
        files = relative_files(file)
        imports = {(path.name, module) for path in files for module in get_imports(path)}
    for path in files:
        if not path.stem.isidentifier() or path.stem == "__init__" or path.stem.endswith("_vlm"):
            raise DuetError(
                f"the projector's file {path.name} cannot be copied beside Duet's own, which end in _vlm.py; give it a "
                "name that is a Python name and ends otherwise."
            )
    for importing, module in sorted(imports):
        if module == __name__.partition(".")[0] or _lies_in(module, file.parent):
            raise DuetError(
                f"the projector's file {importing} imports {module}, which a checkpoint would not take along; put what "
                f"it needs into a file beside it, and write `from .FILE import NAME`."
            )
    return f"{file.stem}.{name}", str(file)


def _file_of(projector):
    name = projector.__qualname__
    if projector.__module__ == "__main__" or "." in name:
        raise DuetError(
            f"the projector {name} is defined in a notebook, a script or a function, from where a checkpoint cannot "
            "take its code along; move the class into a file of its own and name it as FILE.py:CLASS."
        )
    with _in_one_line(f"the projector {name} has no file"):
        return inspect.getfile(projector)


def _lies_in(module, folder):
    """Whether a module that is imported by its absolute name is a file or a package of this folder, or the folder."""
    spec = find_spec(module)
    if spec is None:
        return (folder / f"{module}.py").is_file()
    return spec.origin is not None and folder in tuple(Path(spec.origin).parents)[:2]


_LOADING = ContextVar("loading", default=(False, {}))


@contextmanager
def trusting(remote_code: bool | None, **kwargs):
    """
    While a checkpoint is loaded: whether the user lets its code be run, and where it is.

    Args:
        remote_code: the `trust_remote_code` of `from_pretrained`.
        **kwargs: its other arguments, such as `revision` and `token`.
    """
    names = ("revision", "token", "cache_dir", "local_files_only", "proxies")
    state = _LOADING.set((bool(remote_code), {name: kwargs[name] for name in names if name in kwargs}))
    try:
        yield
    finally:
        _LOADING.reset(state)


def build_own_projector(config: PreTrainedConfig, vision_size: int, text_size: int) -> nn.Module:
    """
    The projector of the user's own that `config.projector_type` names; see `build_projector`.

    Raises:
        `DuetError`: its code may not be run, cannot be loaded, or does not make a projector.
    """
    own_class = _load_own_class(config)
    with _in_one_line(f"the projector {config.projector_type} cannot be made of (config, vision_size, text_size)"):
        projector = own_class(config, vision_size, text_size)
    _refuse_lost_tensors(config, projector)
    for tensor in (*projector.parameters(), *projector.buffers()):
        if not tensor.is_meta:
            tensor._is_hf_initialized = True  # by its own class: the library leaves it as it is
    return projector


def _load_own_class(config):
    trusted, source = _LOADING.get()
    if config._projector_file is not None:
        folder, source = Path(config._projector_file).parent, {}
    elif not config._name_or_path:
        raise DuetError(
            f"projector_type={config.projector_type!r} names no file; give the class to `from_backbones` as "
            "FILE.py:CLASS."
        )
    # Where this very file came with the checkpoint, its code was trusted already.
    elif trusted or __name__.startswith("transformers_modules."):
        folder = config._name_or_path
    else:
        raise DuetError(
            f"the projector {config.projector_type} is code that comes with the checkpoint {config._name_or_path!r}; "
            "read its file, and pass trust_remote_code=True (--trust_remote_code) to have it run."
        )
    with _in_one_line(f"the projector {config.projector_type} cannot be loaded"):
        own_class = get_class_from_dynamic_module(config.projector_type, folder, **source)
    file, is_class = config.projector_type.partition(".")[0], isinstance(own_class, type)
    if not is_class or not issubclass(own_class, nn.Module) or own_class.__module__.rpartition(".")[2] != file:
        raise DuetError(
            f"the projector {config.projector_type} is no torch.nn.Module that {file}.py itself defines; name a file "
            "and a class in it."
        )
    config._projector_file = inspect.getfile(own_class)  # the library's copy: what is saved is what was run
    return own_class


def _refuse_lost_tensors(config, projector):
    for path, module in projector.named_modules():
        tensors = {name for name, value in vars(module).items() if isinstance(value, torch.Tensor)}
        for name in sorted(tensors | module._non_persistent_buffers_set):
            raise DuetError(
                f"the projector {config.projector_type} keeps a tensor {f'{path}.{name}'.lstrip('.')} that is not "
                "saved, so a loaded checkpoint would lack it; make it a parameter, or "
                "`register_buffer(name, tensor)` it."
            )


@contextmanager
def _in_one_line(what):
    """Whatever a file of the user's own raises, said in a line."""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise DuetError(f"{what}: {reason}") from error


__all__ = ["build_own_projector", "find_own_projector", "trusting"]
