"""Samples and account as one HTML page that needs nothing else; whatever a data set says stands there as text."""

import base64
import html
import io
import re
import string
from collections.abc import Iterator

from inference_vlm.page_parts import shown_text

from .samples import KINDS, Sample, counted, runs_of


PICTURE_SIDE = 480

_PAGE = string.Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { margin: 0 auto; max-width: 1120px; padding: 28px 32px 48px; background: #f7f8fa; color: #1c2430;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0; font-size: 26px; overflow-wrap: anywhere; }
h2 { margin: 0; font-size: 16px; overflow-wrap: anywhere; }
p { margin: 4px 0 0; color: #5b6675; overflow-wrap: anywhere; }
.legend { display: flex; flex-wrap: wrap; gap: 8px 24px; margin: 18px 0; padding: 12px 16px; background: #fff;
  border: 1px solid #dfe3e9; border-radius: 10px; position: sticky; top: 0; z-index: 1; }
.legend b { padding: 2px 10px; border-radius: 4px; color: #1c2430; font-weight: 600; }
section { margin: 16px 0; padding: 16px 20px 20px; background: #fff; border: 1px solid #dfe3e9; border-radius: 10px; }
section.dropped { border-left: 5px solid #d64545; }
section.dropped p { color: #b02a2a; }
.sample { display: flex; gap: 20px; align-items: flex-start; margin-top: 14px; }
.images { flex: none; display: flex; flex-direction: column; gap: 10px; width: 240px; }
.images img { display: block; max-width: 240px; max-height: 240px; min-height: 120px; object-fit: contain;
  border: 1px solid #dfe3e9; border-radius: 6px; }
.images small { color: #5b6675; }
.tokens { flex: 1; min-width: 0; overflow-wrap: anywhere; font: 14px/2 ui-monospace, "SF Mono", Menlo, Consolas,
  "DejaVu Sans Mono", monospace; }
.tokens span { padding: 3px 0; box-shadow: inset -1px 0 #ffffffd0; border-radius: 2px; }
.tokens span:hover { outline: 2px solid #1c2430; }
.tokens i { font-style: normal; opacity: .45; }
.tokens .image, .tokens .padding { padding: 3px 8px; border-radius: 4px; margin: 0 2px; white-space: nowrap; }
sup { margin: 0 2px; padding: 0 4px; border-radius: 4px; background: #1c7c3a; color: #fff; font-size: 11px; }
$colours
pre { margin: 10px 0 0; overflow-x: auto; font: 13px/1.6 ui-monospace, "SF Mono", Menlo, Consolas,
  "DejaVu Sans Mono", monospace; }
</style>
</head>
<body>
<h1 dir="auto">$title</h1>
$lines
<div class="legend">$legend</div>
$samples
<section><h2>The data</h2><pre>$account</pre></section>
</body>
</html>
""")


def write_page(title: str, lines: list[str], samples: list[Sample], account: str) -> str:
    """The samples and the account as one HTML page that needs nothing else."""
    legend = (f'<span><b class="{kind}">{kind}</b> {html.escape(look.meaning)}</span>' for kind, look in KINDS.items())
    sections = (_section(sample, f"{number} of {len(samples)}") for number, sample in enumerate(samples, start=1))
    return _PAGE.substitute(
        title=shown_text(title),
        lines="\n".join(f'<p dir="auto">{shown_text(line)}</p>' for line in lines),
        colours="\n".join(f".{kind} {{ background: {look.colour}; }}" for kind, look in KINDS.items()),
        legend="\n".join(legend),
        samples="\n".join(sections),
        account=html.escape(account),
    )


def _section(sample, number):
    head = f'<h2>{number}: <bdi>{shown_text(sample.name)}</bdi></h2><p dir="auto">{shown_text(sample.facts)}</p>'
    if not sample.pieces:
        return f'<section class="dropped">{head}</section>'
    figures = "".join(
        f'<div><img src="{_data_uri(image)}" alt="{name}"><small>{name}, {image.width} x {image.height}</small></div>'
        for name, image in sample.images
    )
    images = f'<div class="images">{figures}</div>' if figures else ""
    tokens = "".join(_spans(sample.pieces))
    return f'<section>{head}<div class="sample">{images}<div class="tokens" dir="auto">{tokens}</div></div></section>'


def _spans(pieces) -> Iterator[str]:
    for kind, weight, run in runs_of(pieces):
        if weight:
            yield f"<sup>{weight}</sup>"
        for piece in run:
            text = re.sub("([·→↵])", r"<i>\1</i>", html.escape(counted(piece))).replace("\n", "<br>")
            # A line may be broken behind every token.
            yield f'<span class="{kind}" title="{html.escape(piece.title)}">{text}</span><wbr>'


def _data_uri(image):
    image = image.copy()
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=92, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode('ascii')}"
