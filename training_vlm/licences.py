"""The models that a run began with, as its card names them: their parts, their names on the Hub and their licences.

A licence is what a model's own card says, and no more is concluded than follows: where all say the same it is this
model's too, where they differ it is `other` and the card names each, and where one says nothing nothing is claimed.
"""

import re
from pathlib import Path
from typing import NamedTuple, cast

import yaml
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx

from .arguments import ModelArguments
from .private import is_hub_name, public_name


# Those of the Hub's own list that a card on this machine, which no Hub has looked at, may be believed to mean.
_LICENCES = set(
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bsd bsd-2-clause bsd-3-clause cc cc0-1.0 "
    "cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-4.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-nc-nd-4.0 agpl-3.0 "
    "gpl gpl-3.0 lgpl lgpl-3.0 mpl-2.0 llama2 llama3 llama3.1 llama3.2 gemma unlicense".split()
)


class Base(NamedTuple):
    """
    A model that a run began with.

    Args:
        part: what became of it.
        name: what to call it.
        on_hub: whether it is a name on the Hub.
        terms: `license`, `license_name` and `license_link`, as far as its card says them.
    """

    part: str
    name: str
    on_hub: bool
    terms: dict[str, str]

    @property
    def licence(self) -> str | None:
        """What its licence is called."""
        return self.terms.get("license_name") or self.terms.get("license")


def find_bases(model_args: ModelArguments) -> list[Base]:
    """The backbones of a new model; of one that a run goes on with, those that its card names, or itself."""
    if model_args.model is not None:
        data = _read_card(model_args.model, model_args.model_revision)
        listed = data.base_model if isinstance(data.base_model, list) else [data.base_model] if data.base_model else []
        if names := [name for name in listed if isinstance(name, str) and is_hub_name(name)]:
            return [Base("backbone", name, True, _terms(name, _read_card(name))) for name in names]
        own = model_args.model
        return [Base("earlier model", public_name(own), is_hub_name(own), _terms(own, data))]
    named = {
        "vision encoder": (model_args.vision_model, "vision"),
        "second vision encoder": (model_args.second_vision_model, "vision"),
        "language model": (model_args.text_model, "text"),
    }
    bases = []
    for part, (name, side) in named.items():
        if isinstance(name, str):
            kwargs = model_args.backbone_kwargs(side)  # type: ignore[arg-type]
            card = _read_card(name, kwargs.get("revision"), kwargs.get("token"))
            bases.append(Base(part, public_name(name), is_hub_name(name), _terms(name, card)))
    return bases


def licence_of(bases: list[Base]) -> dict[str, str]:
    """What a card's metadata may say of the licence of a model that began with others."""
    if not bases or not all(base.licence for base in bases):
        return {}
    if all(base.terms == bases[0].terms for base in bases):
        return bases[0].terms
    names = dict.fromkeys(str(base.licence) for base in bases)
    return {"license": "other", "license_name": re.sub(r"[^\w.-]+", "-", "-and-".join(names)).lower()}


def _read_card(name: str, revision: str | None = None, token: str | bool | None = None) -> ModelCardData:
    """What the card of a model says of it; nothing where there is none, or where it cannot be had."""
    try:
        file = Path(name, "README.md")
        if not Path(name).is_dir():
            file = Path(hf_hub_download(name, "README.md", revision=revision, token=token))
        card = ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True)
        return cast(ModelCardData, card.data)
    except (OSError, ValueError, TypeError, HfHubHTTPError, httpx.HTTPError, yaml.YAMLError):
        return ModelCardData()


def _terms(name: str, data: ModelCardData) -> dict[str, str]:
    terms = {key: data.get(key) for key in ("license", "license_name", "license_link")}
    if isinstance(terms["license"], list) and len(terms["license"]) == 1:
        terms["license"] = terms["license"][0]
    if not isinstance(terms["license"], str) or not terms["license"].strip():
        return {}
    if not is_hub_name(name) and terms["license"] not in _LICENCES:
        terms["license"], terms["license_name"] = "other", terms["license_name"] or terms["license"]
    if isinstance(terms["license_name"], str):
        terms["license_name"] = re.sub(r"[^\w.-]+", "-", terms["license_name"]).strip("-").lower()
    if not str(terms["license_link"]).startswith("https://"):  # a file beside that model is none beside this one
        terms["license_link"] = None
    return {key: value for key, value in terms.items() if isinstance(value, str) and value}


__all__ = ["Base", "find_bases", "licence_of"]
