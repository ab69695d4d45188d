"""What tells of this machine and its user, and what stands for it where others read.

A file that lies beside a model goes where the model goes. So it names data and models by the last part of their path,
or by their name on the Hub, and never by the folders that they lie in. An address on the web is named as it is, without
what gives access to it: a password, a signature.
"""

import os
import re
from collections import Counter
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from processing.batching.account import Account


_BEGINS, _ENDS = r"(?<![\w./\\~-])", r"(?![\w.-])"
_STOPS = r"/\\:;,\"'<>|"
# What comes before the folders of a path: a scheme with a machine or without, a login, a drive, a home, this folder.
_ROOT = (
    rf"(?:[A-Za-z][\w+.-]*:(?://(?:(?!::)[^{_STOPS.replace(':', '')}\s])*(?=[/\\])|(?=//))|"
    r"[\w.-]+@[\w.-]+:|[A-Za-z]:|~[\w.-]*|\.\.?)?"
)
# A folder's name may hold blanks; so a slash that comes later in a sentence is taken for one of the path.
_FOLDERS = rf"[/\\]+(?=[^\s/\\])(?:(?:[^{_STOPS}\n]|(?<=\w)'(?=\w))+[/\\]+)*(?=[^/\\\s])"
_PLACES = re.compile(
    r"(?<!\w)(?P<web>(?i:https?|hf))://(?P<rest>(?:\[[\w:.%]*\])?(?:(?!::)[^\s\"'<>|,;?#])*)"
    # A signature may hold what else ends an address; the next of a list begins with its scheme.
    r"(?:[?#](?:(?!::|[|,;]\w+://)[^\s\"'<>])*(?<![,;]))?|"
    rf"{_BEGINS}(?P<folders>{_ROOT}{_FOLDERS})(?P<last>[^{_STOPS}\s]*)"
)
_HOMES = re.compile(r"(?:[A-Za-z]:|/var|/export|file://)?[/\\]+(?:home|Users)[/\\]+")
_IN_HOUSE = re.compile(r"[^.]*|[\d.]+|\[.*|.*\.(?:local|lan|home|corp|internal|intranet)", re.IGNORECASE)


def is_hub_name(name: str) -> bool:
    """Whether a model or a data set is one of the Hub and no file or folder here, as its name tells."""
    if os.path.exists(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def public_name(name: str) -> str:
    """What to call a model or a data set: its name on the Hub, or the last part of its path."""
    if is_hub_name(name):
        return name
    if os.path.exists(name):
        folder, last = os.path.split(os.path.abspath(name))
        return "~" if _HOMES.fullmatch(f"{folder}/") or Path(folder, last) == Path.home() else last
    return re.split(r"[/\\]", without_folders(name).rstrip("/\\"))[-1]


def without_folders(text: str) -> str:
    """A text in which files and folders are named by the last part of their path, and no address gives access."""
    for folder in sorted({str(Path.home()), os.getcwd()}, key=len, reverse=True):
        if len(folder) > 1:
            text = re.sub(_BEGINS + re.escape(folder) + _ENDS, "~", text)
    return _PLACES.sub(_public_place, text)


def _public_place(found: re.Match) -> str:
    if found["web"] is None:
        last = found["last"].split("?")[0] if "://" in found["folders"] else found["last"]
        return "~" if _HOMES.fullmatch(found["folders"]) else last
    place, slash, path = found["rest"].partition("/")
    web, host = found["web"].lower(), place.rpartition("@")[2]
    if web != "hf" and _IN_HOUSE.fullmatch(host.partition(":")[0]):
        return path.rstrip("/").rpartition("/")[2]
    return f"{web}://{host}{slash}{path}"


def public_account(account: Account) -> Account:
    """The account of a run's data with its sources, and what was wrong with their rows, named for others."""
    names: dict[str, str] = {}
    counted: Counter[str] = Counter()
    for source in dict.fromkeys([*account.sources, *(source for source, _ in account.named)]):
        names[source] = name = without_folders(source)
        if name != source:  # else a run that this one goes on from has named it already
            counted[name] += 1
            names[source] = name if counted[name] == 1 else f"{name} ({counted[name]})"
    public = Account.from_state(account.state())
    public.sources = {}
    for source, counts in account.sources.items():
        public.sources.setdefault(names[source], Counter()).update(counts)
    public.named = {
        (names[source], row): (reason, without_folders(detail))
        for (source, row), (reason, detail) in account.named.items()
    }
    return public


__all__ = ["is_hub_name", "public_account", "public_name", "without_folders"]
