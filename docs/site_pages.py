"""What the site shows beside `docs/`, as pages that are made when it is built: README, results, sources, and the API.

What is special: links are written for a reader of the files. One that leads out of `docs/` becomes a link to a page
that shows that file, so that the site needs no other place; a folder is a page that lists what is in it.
"""

import json
import os
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File


ROOT = Path(__file__).parents[1]

API = {
    "model": [
        "modeling_vlm.VLMForConditionalGeneration", "modeling_vlm.VLMModel", "modeling_vlm.VLMConfig",
        "modeling_vlm.VLMVisionPair", "modeling_vlm.VLMVisionPairConfig",
    ],
    "data": [
        "processing.VLMProcessor", "processing.VLMDataCollator", "processing.read_rows",
        "processing.reading.sources.open_source",
    ],
    "training": [
        "training_vlm.arguments.ModelArguments", "training_vlm.arguments.DataArguments",
        "training_vlm.training_arguments.VLMTrainingArguments", "training_vlm.policy.TuningArguments",
        "training_vlm.learning.trainer.VLMTrainer",
    ],
    "asking": [
        "inference_vlm.answering.Answerer", "inference_vlm.answering.answer", "inference_vlm.explain.explain",
        "inference_vlm.export.export", "inference_vlm.merge.merge",
    ],
    "judging": [
        "evaluation_vlm.metrics.Metric", "evaluation_vlm.judgement.judge", "evaluation_vlm.judgement.Judgement",
        "evaluation_vlm.asking.answer_questions",
    ],
}  # fmt: skip
"""Page -> what a program may use, in the order of its use."""

_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
_SHOWN = {".py": "python", ".yaml": "yaml", ".jinja": "jinja", ".cfg": "ini", ".toml": "toml", ".txt": "text"}
_PICTURES = {".png", ".svg"}
_UNSEARCHED = "---\nsearch: {exclude: true}\n---\n\n"


def on_files(files, config):
    """Add a page for all that the pages link to, and for what those link to in turn."""
    for name, objects in API.items():
        text = f"# {name.capitalize()}\n\n" + "\n\n".join(f"::: {place}" for place in objects)
        files.append(File.generated(config, f"api/{name}.md", content=text))
    waiting, seen = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        text = "" if path.suffix in _PICTURES else _text(path)
        if path.parent != ROOT / "docs" or path.suffix == ".py":
            content = path.read_bytes() if path.suffix in _PICTURES else text
            files.append(File.generated(config, _place(path), content=content))
        waiting += [target for _, link, _ in _LINK.findall(_prose(text)) if (target := _target(path, link))]
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn links to files of the repository into links to their pages."""
    origin = _origin(page.file.src_uri)

    def to_page(match):
        target = _target(origin, match[2])
        if target is None:
            return match[0]
        return match[1] + posixpath.relpath(_place(target), posixpath.dirname(page.file.src_uri) or ".") + match[3]

    parts = re.split(r"(^```.*?^```|`[^`\n]+`)", markdown, flags=re.S | re.M)
    return "".join(part if part.startswith("`") else _LINK.sub(to_page, part) for part in parts)


def on_page_content(html, page, config, files):
    """Types of arguments are code on the site, and need no marks of code in it."""
    if not page.file.src_uri.startswith("api/"):
        return html
    return re.sub(r"<code>[^<]*</code>", lambda code: code[0].replace("`", "").replace("*optional*", "optional"), html)


def _prose(text):
    return re.sub(r"^```.*?^```|`[^`\n]+`", "", text, flags=re.S | re.M)


def _place(path):
    """Where a file of the repository, or a folder, is on the site."""
    name = path.relative_to(ROOT).as_posix()
    if name == "README.md":
        return "index.md"
    if path.suffix in {".md"} | _PICTURES:
        return name.removeprefix("docs/")
    return f"source/{name}.md"


def _origin(place):
    """The file that a page is made of."""
    if place.startswith("source/"):
        return ROOT / place.removeprefix("source/").removesuffix(".md")
    return (
        ROOT / "README.md"
        if place == "index.md"
        else next((path for path in (ROOT / "docs" / place, ROOT / place) if path.exists()), ROOT / "docs" / place)
    )


def _target(origin, link):
    """The file or folder of the repository that a link in one of its files leads to."""
    if "://" in link or link.startswith("mailto:"):
        return None
    path = Path(os.path.normpath((origin if origin.is_dir() else origin.parent) / link))
    return path if path.exists() else None


def _text(path):
    """A file as Markdown."""
    title = f"{_UNSEARCHED}# {path.relative_to(ROOT).as_posix()}\n\n"
    if path.is_dir():
        there = sorted(one for one in path.iterdir() if not one.name.startswith((".", "__")))
        shown = [
            one
            for one in there
            if one.suffix in _SHOWN.keys() | {".md", ".ipynb"} or (one.is_dir() and any(one.iterdir()))
        ]
        line = "- `{0}`" if path.name == "tests" else "- [{0}]({0})"  # more pages than all others together, for few
        return title + "\n".join(line.format(one.name) for one in shown)
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    if path.suffix == ".ipynb":
        cells = [("".join(cell["source"]), cell["cell_type"]) for cell in json.loads(text)["cells"]]
        return "\n\n".join(source if kind == "markdown" else f"```python\n{source}\n```" for source, kind in cells)
    return f'{title}``````{_SHOWN.get(path.suffix, "text")} linenums="1"\n{text}\n``````'
