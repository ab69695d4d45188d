"""Weights of a saved file go into a model that exists: by the names and shapes that its modules have.

A saved file has the Hub's names and shapes of a backbone's weights (of a ViT's layers, of experts one by one), which
`from_pretrained` translates and `load_state_dict` does not. The stock Trainer calls the latter, to resume and to take
the best model, and goes on with the weights that it has when it finds none of those names. So the model translates
them itself, by the library's own table, whoever loads it; no second model is built.
"""

import copy
from typing import Any

import torch
from torch import nn


def take_saved_weights(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_) -> None:
    """
    Give the weights in `state_dict` their names in `module`, in place: a hook before `load_state_dict`.

    Experts that lie in several files wait until the last of theirs comes.

    Args:
        module: a composed model.
        state_dict: weights by the names that the modules have, which are left as they are, or as a file has them.
        prefix: what stands before the model's names where it is a part of another module.
    """
    own = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    given = {name.removeprefix(prefix): state_dict[name] for name in state_dict if name.startswith(prefix)}
    if not given.keys() <= own.keys():
        for name in given:
            del state_dict[prefix + name]
        given = _translated(module, {**module.__dict__.pop("_waiting_weights", {}), **given}, own)
    for copied, name in module.all_tied_weights_keys.items():
        if name in given:  # a file holds one of them
            given.setdefault(copied, given[name])
    state_dict.update((prefix + name, weight) for name, weight in given.items())


def _translated(module, given, own: dict[str, torch.Tensor]) -> dict[str, Any]:
    # Not at the top: whoever only runs a model needs none of these.
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(module)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found, groups = {}, {}
    for name in sorted(given, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters)
        if renamed not in own:
            found[name] = given[name]
        elif pattern is None:
            found[renamed] = given[name]
        else:
            converter, members = groups.setdefault(renamed, (copy.deepcopy(by_pattern[pattern]), []))
            converter.add_tensor(renamed, name, pattern, given[name])
            members.append(name)
    for renamed, (converter, members) in groups.items():
        try:
            weights = converter.convert(renamed, model=module, config=module.config)
        except (KeyError, RuntimeError, ValueError):  # some of the group lie in another file
            weights = {}
        weights = {name: weight[0] if isinstance(weight, list) else weight for name, weight in weights.items()}
        if weights and all(name in own and weight.shape == own[name].shape for name, weight in weights.items()):
            found.update(weights)
        else:
            module.__dict__.setdefault("_waiting_weights", {}).update({name: given[name] for name in members})
    return found
