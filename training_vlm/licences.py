"""The models that a run began with, as its card names them: their parts, their names on the Hub and their licences.

What a model was made of binds as it does itself, so the models that its card names are read too, and theirs. A licence
is what a card says, and no more is concluded than follows: where all say the same it is this model's too, where they
differ it is `other` and the card names each, and where one says nothing, or cannot be asked, nothing is claimed.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple, cast

import yaml
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx

from .arguments import ModelArguments
from .private import is_hub_name, public_name


# The Hub's own list; what else a card on this machine says is the name of another licence.
_LICENCES = set(
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m "
    "openrail++ afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 "
    "cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 "
    "cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 "
    "cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl "
    "gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 "
    "odc-by odbl osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license llama2 llama3 "
    "llama3.1 llama3.2 llama3.3 llama4 gemma other".split()
)
_MOST = 20  # models whose cards are read; of what a merge of dozens was made of no more follows
_AND = "-and-"


class Base(NamedTuple):
    """
    A model that a run began with.

    Args:
        part: what became of it, or which of the others was made of it.
        name: what to call it.
        on_hub: whether it is a name on the Hub.
        terms: `license`, `license_name` and `license_link`, as far as its card says them.
        is_nearest: whether none on the Hub lies between it and the run's model.
    """

    part: str
    name: str
    on_hub: bool
    terms: dict[str, str]
    is_nearest: bool = False

    @property
    def licence(self) -> str | None:
        """What its licence is called."""
        return self.terms.get("license_name") or self.terms.get("license")


def find_bases(model_args: ModelArguments) -> list[Base]:
    """The backbones of a new model, or the one that a run goes on with; then those that these were made of."""
    vision, text = (
        [kwargs.get("revision"), kwargs.get("token")] for kwargs in map(model_args.backbone_kwargs, ("vision", "text"))
    )
    named: dict[str, list[Any]] = {
        "vision encoder": [model_args.vision_model, *vision],
        "second vision encoder": [model_args.second_vision_model, *vision],
        "language model": [model_args.text_model, *text],
    }
    if model_args.model is not None:
        named = {"earlier model": [model_args.model, model_args.model_revision, None]}
    waiting = [(part, *where, True) for part, where in named.items() if isinstance(where[0], str)]
    bases: list[Base] = []
    known: set[str] = set()
    while waiting:
        part, name, revision, token, is_nearest = waiting.pop(0)
        on_hub = is_hub_name(name)
        data = _read_card(name, revision, token) if len(bases) < _MOST else ModelCardData()
        public = public_name(name)
        bases.append(Base(part, public, on_hub, _terms(name, revision, data), is_nearest and on_hub))
        known.add(name)
        listed = data.base_model if isinstance(data.base_model, list) else [data.base_model]
        for other in dict.fromkeys(name for name in listed if isinstance(name, str) and name.strip()):
            if other not in known and other not in [name for _, name, *_ in waiting]:
                waiting.append((f"part of {public}", other, None, token, is_nearest and not on_hub))
    return bases


def licence_of(bases: list[Base]) -> dict[str, str]:
    """What a card's metadata may say of the licence of a model that began with others."""
    if not bases or not all(base.licence for base in bases):
        return {}
    if all(base.terms == bases[0].terms for base in bases):
        return bases[0].terms
    # The name of an earlier model may be such a list itself.
    names = dict.fromkeys(name for base in bases for name in str(base.licence).split(_AND))
    return {"license": "other", "license_name": _spelled(_AND.join(names))}


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


def _terms(name: str, revision: str | None, data: ModelCardData) -> dict[str, str]:
    said, called, link = (data.get(key) for key in ("license", "license_name", "license_link"))
    if isinstance(said, list):  # one of several may be chosen, or all hold; that is its authors' to say
        said = "-".join(map(str, said))
    if not isinstance(said, str) or said.strip().lower() in ("", "unknown"):
        return {}
    if said.lower() in _LICENCES:
        said = said.lower()
    else:
        said, called = "other", called or said
    terms = {"license": said}
    if said == "other":
        if isinstance(called, str) and _spelled(called):
            terms["license_name"] = _spelled(called)
        if isinstance(link, str) and is_hub_name(name) and re.fullmatch(r"[\w.-][\w./-]*", link):
            link = f"https://huggingface.co/{name}/blob/{revision or 'main'}/{link}"  # a file of that model
        if str(link).startswith("https://"):
            terms["license_link"] = str(link)
    return terms


def _spelled(name: str) -> str:
    """The name of a licence as the Hub takes it."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-").lower()


__all__ = ["Base", "find_bases", "licence_of"]
