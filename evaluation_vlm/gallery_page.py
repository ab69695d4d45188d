"""Questions, answers and scores as one HTML page that needs nothing else, to be searched, sorted and filtered.

Whatever a data set or a model says stands there as text. Without scripts the page shows all of it, in its order.
"""

import string
from collections.abc import Mapping, Sequence

from inference_vlm.page_parts import HEAD, picture_uri, shown_text

from .gallery import Shown


PICTURE_SIDE = 400
_SMALL = 128  # a picture whose pixels are to be seen

_PAGE = string.Template(
    HEAD
    + """\
<title>$title</title>
<style>
:root { --ground: #f6f7f9; --card: #fff; --ink: #1c2430; --faint: #5b6675; --line: #dfe3e9; --mark: #2563eb;
  --good: #0b7a3e; --good-ground: #e3f5ea; --bad: #b3261e; --bad-ground: #fcebea; --mid: #8a5a00;
  --mid-ground: #fdf1d8; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #12151a; --card: #1b2027; --ink: #e7ebf0; --faint: #9aa5b4; --line: #2c343f; --mark: #7aa7ff;
    --good: #6fd79b; --good-ground: #143122; --bad: #ff9a92; --bad-ground: #3a1b1a; --mid: #f0c36a;
    --mid-ground: #352a12; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 32px 24px 64px; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0; font-size: 26px; line-height: 1.25; letter-spacing: -.01em; overflow-wrap: anywhere; }
.sub { margin: 6px 0 0; color: var(--faint); overflow-wrap: anywhere; }
.values { display: flex; flex-wrap: wrap; gap: 12px; margin: 22px 0 0; padding: 0; list-style: none; }
.values li { min-width: 132px; padding: 12px 16px; background: var(--card); border: 1px solid var(--line);
  border-radius: 12px; }
.values b { display: block; font-size: 24px; font-weight: 600; line-height: 1.2; font-variant-numeric: tabular-nums; }
.values span { color: var(--faint); font-size: 13px; }
.controls { display: flex; flex-wrap: wrap; gap: 10px; align-items: center; position: sticky; top: 0; z-index: 1;
  margin: 22px -24px 0; padding: 12px 24px; background: var(--ground); border-bottom: 1px solid var(--line); }
.controls input, .controls select { height: 38px; padding: 0 12px; border: 1px solid var(--line); border-radius: 9px;
  background: var(--card); color: inherit; font: inherit; max-width: 100%; }
.controls input { flex: 1 1 200px; min-width: 0; }
.controls select { flex: 0 1 auto; min-width: 0; }
.controls :focus-visible { outline: 2px solid var(--mark); outline-offset: 1px; }
.controls output { margin-left: auto; color: var(--faint); font-size: 13px; white-space: nowrap; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 16px;
  margin-top: 18px; align-items: start; }
article { display: flex; flex-direction: column; background: var(--card); border: 1px solid var(--line);
  border-radius: 12px; overflow: hidden; }
article[hidden] { display: none; }
figure { margin: 0; display: flex; justify-content: center; background: var(--ground);
  border-bottom: 1px solid var(--line); }
figure img { display: block; width: 100%; height: 230px; object-fit: contain; }
figure img.small { image-rendering: pixelated; }
.text { padding: 14px 16px 16px; min-width: 0; }
.head { display: flex; gap: 8px; align-items: center; justify-content: space-between; margin-bottom: 8px; }
.kind { min-width: 0; color: var(--faint); font-size: 12.5px; overflow-wrap: anywhere; }
.score { flex: none; padding: 1px 10px; border-radius: 999px; font-size: 13px; font-weight: 600;
  font-variant-numeric: tabular-nums; color: var(--mid); background: var(--mid-ground); }
.score.good { color: var(--good); background: var(--good-ground); }
.score.bad { color: var(--bad); background: var(--bad-ground); }
.asked { margin: 0 0 10px; font-weight: 600; overflow-wrap: anywhere; white-space: pre-wrap; }
dl { margin: 0; display: grid; grid-template-columns: auto minmax(0, 1fr); gap: 4px 12px; }
dt { color: var(--faint); font-size: 13px; line-height: 22px; }
dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; }
dd small { color: var(--faint); }
.none { color: var(--faint); font-style: italic; font-weight: 400; }
@media (max-width: 520px) {
  body { padding: 20px 14px 48px; }
  .controls { margin: 18px -14px 0; padding: 10px 14px; position: static; }
  .controls input { flex: 1 1 100%; }
  .controls select { flex: 1 1 130px; }
  .controls output { flex: 1 1 100%; margin: 0; }
  .values { display: grid; grid-template-columns: 1fr 1fr; }
  .values li { min-width: 0; }
  h1 { font-size: 22px; }
}
</style>
</head>
<body>
<header>
<h1>$title</h1>
<p class="sub">$subtitle</p>
$values
</header>
<form class="controls" hidden>
<input type="search" id="words" placeholder="Search questions and answers" aria-label="Search questions and answers">
$kinds
<select id="order" aria-label="Order">
<option value="1">Lowest score first</option><option value="-1">Highest score first</option></select>
<output id="count"></output>
</form>
<main>
$cards
</main>
<script>
const form = document.querySelector(".controls"), main = document.querySelector("main");
const cards = [...main.children], words = document.getElementById("words"), kind = document.getElementById("kind");
const order = document.getElementById("order"), count = document.getElementById("count");
form.hidden = false;
function choose() {
  const looked = words.value.trim().toLowerCase();
  let shown = 0;
  for (const card of cards) {
    card.hidden = (kind && kind.value && card.dataset.kind !== kind.value)
      || (looked && !card.textContent.toLowerCase().includes(looked));
    shown += !card.hidden;
  }
  count.textContent = shown === cards.length ? `$${cards.length} shown` : `$${shown} of $${cards.length} shown`;
}
function sort() {
  const scored = cards.filter(card => card.querySelector(".score"));
  const others = cards.filter(card => !card.querySelector(".score"));
  main.append(...(order.value === "1" ? scored : scored.reverse()), ...others);
}
form.addEventListener("input", choose);
order.addEventListener("change", sort);
form.addEventListener("submit", event => event.preventDefault());
choose();
sort();
</script>
</body>
</html>
"""
)


def write_page(title: str, subtitle: str, values: Mapping[str, str], shown: Sequence[Shown]) -> str:
    """
    The page.

    Args:
        title, subtitle: what it is about.
        values: what was measured, each as it is written.
        shown: in the order of their scores, the lowest first.
    """
    listed = "".join(f"<li><b>{_text(value)}</b><span>{_text(name)}</span></li>" for name, value in values.items())
    kinds = sorted({one.kind for one in shown})
    options = "".join(f'<option value="{_text(kind)}">{_text(kind)}</option>' for kind in kinds)
    chooser = f'<select id="kind" aria-label="Kind"><option value="">All kinds</option>{options}</select>'
    return _PAGE.substitute(
        title=_text(title),
        subtitle=_text(subtitle),
        values=f'<ul class="values">{listed}</ul>' if values else "",
        kinds=chooser if len(kinds) > 1 else "",
        cards="\n".join(map(_card, shown)),
    )


def _card(one: Shown) -> str:
    picture = ""
    if one.image is not None:
        small = ' class="small"' if max(one.image.size) < _SMALL else ""
        source = picture_uri(one.image, PICTURE_SIDE, exact=_SMALL - 1, quality=85)
        picture = f'<figure><img{small} src="{source}" alt="" loading="lazy"></figure>'
    score = "" if one.score is None else f'<span class="score {one.mark}">{_text(one.written)}</span>'
    asked = _text(one.asked) if one.asked else '<span class="none">the image alone</span>'
    answer = _text(one.answer) if one.answer else '<span class="none">nothing</span>'
    first, *others = one.expected or ("",)
    more = f" <small>or {_text(' · '.join(others[:9]))}</small>" if others else ""
    return (
        f'<article data-kind="{_text(one.kind)}">{picture}<div class="text"><div class="head">'
        f'<span class="kind">{_text(one.kind)}</span>{score}</div><p class="asked" dir="auto">{asked}</p><dl>'
        f'<dt>Expected</dt><dd dir="auto">{_text(first)}{more}</dd><dt>Generated</dt>'
        f'<dd dir="auto">{answer}</dd></dl></div></article>'
    )


_LONGEST = 4_000  # letters of a text


def _text(text: str) -> str:
    return shown_text(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}...")


__all__ = ["write_page"]
