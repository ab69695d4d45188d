"""An explanation as one HTML page that needs nothing else: the answer's tokens, and what of the pictures each hangs on.

Whatever a person or a model wrote stands there as text. Without scripts the page shows the map of the whole answer.
"""

import json
import math
import statistics
import string
import unicodedata
from collections.abc import Sequence
from typing import Any

from .page_parts import HEAD, picture_uri, shown_text


PICTURE_SIDE = 1024
_SMALL = 256  # a picture whose pixels are to be seen
_TRACE = 0.005  # nats; what is less has no colour, as it may be rounding
_FEW = 3  # random orders; a map that says nothing is before two of them in one case of three

_PAGE = string.Template(
    HEAD
    + """\
<title>$title</title>
<style>
:root { --ground: #f6f7f9; --card: #fff; --ink: #1c2430; --faint: #5b6675; --line: #dfe3e9; --mark: #2563eb;
  --for: #e8500a; --against: #1f6fe0; --band: #8b95a3; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #12151a; --card: #1b2027; --ink: #e7ebf0; --faint: #9aa5b4; --line: #2c343f; --mark: #7aa7ff;
    --for: #ff7a33; --against: #5b9dff; --band: #8b95a3; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 32px 24px 64px; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "Noto Sans", "Noto Sans CJK SC",
  "Noto Sans Arabic", "Noto Color Emoji", sans-serif; }
h1 { margin: 0; font-size: 24px; line-height: 1.3; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { margin: 0 0 6px; font-size: 16px; }
p { margin: 6px 0 0; overflow-wrap: anywhere; }
.sub, .hint, figcaption { color: var(--faint); font-size: 13px; }
.answer { font-size: 19px; white-space: pre-wrap; }
.card { margin-top: 18px; padding: 16px 18px; background: var(--card); border: 1px solid var(--line);
  border-radius: 12px; }
.chips { display: flex; flex-wrap: wrap; gap: 6px; margin: 10px -8px 0; max-height: 40vh; padding: 3px 10px;
  overflow-y: auto; }
.chip { position: relative; min-width: 30px; min-height: 34px; padding: 3px 9px; border: 1px solid var(--line);
  border-radius: 8px; color: inherit; font: inherit; white-space: pre; cursor: pointer; max-width: 100%;
  overflow: hidden; text-overflow: ellipsis;
  background: color-mix(in srgb, var(--for) calc(var(--heat, 0) * 62%), var(--card)); }
.chip.on { margin-inline-start: -7px; border-start-start-radius: 0; border-end-start-radius: 0; }
.chip small { margin-inline-start: 4px; color: var(--faint); font-size: 11px; }
.chip.control { font-style: italic; color: var(--faint); }
.chip.whole { font-weight: 600; }
.chip[aria-pressed="true"] { outline: 2px solid var(--mark); outline-offset: 1px; }
.chip:focus-visible, input:focus-visible, summary:focus-visible { outline: 3px solid var(--mark); outline-offset: 2px; }
.said { min-height: 1.5em; margin-top: 12px; }
.columns { display: grid; grid-template-columns: minmax(0, 1.15fr) minmax(0, 1fr); gap: 18px; align-items: start; }
.pictures { display: grid; gap: 14px; }
.pictures.several { grid-template-columns: repeat(auto-fit, minmax(min(100%, 240px), 1fr)); }
figure { margin: 0; }
.picture { position: relative; overflow: hidden; border-radius: 8px; border: 1px solid var(--line); margin: 0 auto; }
.picture img { display: block; width: 100%; height: auto; min-height: 40px; max-height: 80vh; }
.picture img.small { image-rendering: pixelated; }
.picture svg { position: absolute; inset: 0; width: 100%; height: 100%; }
.map .picture.grey img, .map.grey .picture img { filter: grayscale(1) contrast(.85); }
.picture rect { shape-rendering: crispEdges; }
.picture .best rect { fill: none; stroke: #000; stroke-width: 3.5; vector-effect: non-scaling-stroke; }
.picture .best rect + rect { stroke: #fff; stroke-width: 1.75; }
body:not(.map) .picture svg * { visibility: hidden; }
figcaption { margin-top: 5px; overflow-wrap: anywhere; }
.scale { display: grid; grid-template-columns: auto minmax(60px, 1fr) auto; gap: 4px 10px; align-items: center;
  font-size: 13px; font-variant-numeric: tabular-nums; }
.scale i { height: 12px; border-radius: 6px; border: 1px solid var(--line);
  background: linear-gradient(90deg, var(--against), transparent 50%, var(--for)); }
.scale span:nth-child(n+4) { color: var(--faint); }
.scale span:last-child { grid-column: 2 / 4; text-align: right; }
.switches { display: flex; flex-wrap: wrap; gap: 6px 18px; margin-top: 12px; }
.switches label { display: flex; gap: 7px; align-items: center; cursor: pointer; min-height: 28px; }
.switches input { width: 17px; height: 17px; accent-color: var(--mark); }
kbd { padding: 0 5px; border: 1px solid var(--line); border-radius: 4px; font: 12px ui-monospace, Menlo, monospace;
  color: var(--faint); }
.curve { display: block; width: 100%; height: auto; margin-top: 8px; overflow: visible; }
.curve text { fill: var(--faint); font-size: 12px; }
.curve .axis { stroke: var(--line); }
.curve .chance { fill: none; stroke: var(--band); stroke-width: 2; }
.curve .band { fill: var(--band); opacity: .22; }
.curve .first { fill: none; stroke: var(--for); stroke-width: 2.5; }
.curve .chance, .curve .first { stroke-linejoin: round; }
.key { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 13px; margin-top: 6px; }
.key span::before { content: ""; display: inline-block; width: 18px; height: 3px; margin-inline-end: 7px;
  vertical-align: middle; background: var(--for); border-radius: 2px; }
.key .of-chance::before { background: var(--band); }
summary { cursor: pointer; font-weight: 600; }
@media (max-width: 760px) {
  body { padding: 18px 12px 48px; }
  h1 { font-size: 20px; }
  .answer { font-size: 17px; }
  .columns { display: block; }
  .card { padding: 13px 12px; margin-top: 12px; }
  .chips { max-height: 34vh; }
  .said { min-height: 4.5em; }
  .keys { display: none; }
}
</style>
</head>
<body class="map grey">
<header>
<h1 dir="auto">$question</h1>
<p class="answer" dir="auto">$answer</p>
<p class="sub">$facts</p>
</header>
<section class="card" aria-label="Tokens of the answer">
<h2>What each token hangs on</h2>
<p class="hint" style="margin:0">The redder a token, the more of it hangs on one patch of the picture. Choose one to see
which.
<span class="keys"><kbd>&larr;</kbd> <kbd>&rarr;</kbd> from token to token, <kbd>Esc</kbd> the whole answer.</span></p>
<div class="chips" dir="$direction" role="group" aria-label="Tokens">
$chips
</div>
<p class="said" id="said" aria-live="polite">$said</p>
</section>
<div class="columns">
<section class="card" aria-label="Pictures"><div class="pictures$several">
$pictures
</div></section>
<div>
<section class="card" aria-label="Scale">
<div class="scale"><span id="low">$low</span><i></i><span id="high">$high</span><span>likelier</span><span>less likely
when hidden, in nats</span></div>
<div class="switches" hidden>
<label><input type="checkbox" id="map" checked> Map <kbd class="keys">M</kbd></label>
<label><input type="checkbox" id="grey" checked> Picture in grey <kbd class="keys">G</kbd></label>
<label><input type="checkbox" id="own"> A scale for each token <kbd class="keys">S</kbd></label>
</div>
</section>
<section class="card" aria-label="Is the map right?">
<h2>Is the map right?</h2>
<p>$verdict</p>
$curve
<div class="key"><span>the strongest patches first</span><span class="of-chance">random orders: their mean, and
from the lowest to the highest</span></div>
</section>
</div>
</div>
<details class="card">
<summary>How to read this</summary>
<p>Each patch is hidden once under the mean colour of its picture, and the model is asked how likely it finds each token
of its own answer now, the tokens before it given. What is shown is by how much the logarithm of that likelihood falls:
0.7 nats halve it, 2.3 leave a tenth. Blue patches make the token likelier when they are hidden. What two patches show
alike, the loss of one does not tell of; what is nowhere red may hang on the words before it alone, or on a larger part
of the picture than a patch.</p>
</details>
<script type="application/json" id="data">$data</script>
<script>
const data = JSON.parse(document.getElementById("data").textContent);
const chips = [...document.querySelectorAll(".chip")], said = document.getElementById("said");
const cells = [...document.querySelectorAll(".picture svg")].map(svg => [...svg.querySelectorAll(".cell")]);
const bests = [...document.querySelectorAll(".picture .best")];
const low = document.getElementById("low"), high = document.getElementById("high");
const switches = Object.fromEntries(["map", "grey", "own"].map(name => [name, document.getElementById(name)]));
const flat = cells.flat(), count = data.log_probs.length, several = cells.length > 1;
const wholes = data.falls.map(of => of.reduce((sum, fall) => sum + fall, 0));
const fallsOf = token => token < 0 ? wholes : data.falls.map(of => of[token]);
const trace = $trace;
const mostOf = falls => {
  const most = falls.reduce((most, fall) => Math.max(most, Math.abs(fall)), 0);
  return most < trace ? 0 : most;
};
const shared = Math.max(...data.log_probs.map((_, token) => mostOf(fallsOf(token))));
let chosen = -1, seen = -1;

const nats = x => Math.abs(x) < 5e-5 ? "0" : Math.abs(x) < .1 ? x.toPrecision(1) : x.toFixed(Math.abs(x) < 10 ? 2 : 1);
const signed = x => (x > 0 ? "+" : x < 0 ? "\u2212" : "") + nats(Math.abs(x));
const percent = logProb => {
  const share = 100 * Math.exp(Math.min(0, logProb));
  if (share === 0) return "under 1e-300 %";
  if (share < .01 || share > 99.9) return share < 1 ? share.toExponential(0) + " %" : "over 99.9 %";
  return share.toFixed(share < 10 ? 2 : 1) + " %";
};
const placed = number => {
  const [picture, row, column] = data.patches[number];
  return (several ? `picture $${picture + 1}, ` : "") + `row $${row + 1}, column $${column + 1}`;
};
function show(token) {
  seen = token;
  const falls = fallsOf(token), most = token < 0 || switches.own.checked ? mostOf(falls) : shared;
  let best = 0;
  falls.forEach((fall, number) => {
    const cell = flat[number];
    cell.style.fill = fall < 0 ? "var(--against)" : "var(--for)";
    cell.style.fillOpacity = most > 0 ? .82 * Math.abs(fall) / most : 0;
    if (fall > falls[best]) best = number;
  });
  const at = flat[best], picture = data.patches[best][0];
  bests.forEach((frame, number) => {
    frame.style.display = number === picture && falls[best] >= trace ? "" : "none";
    for (const side of ["x", "y", "width", "height"])
      for (const rect of frame.children) rect.setAttribute(side, at.getAttribute(side));
  });
  low.textContent = most ? signed(-most) : "0";
  high.textContent = most ? signed(most) : "0";
  said.replaceChildren(...words(token, falls, best));
}
function words(token, falls, best) {
  const logProb = token < 0 ? data.log_probs.reduce((sum, one) => sum + one, 0) : data.log_probs[token];
  const name = document.createElement("bdi"), strong = document.createElement("b");
  name.append(token < 0 ? "The whole answer" : data.labels[token]);
  strong.append(name);
  const rest = `: $${percent(logProb)} likely; ` + (falls[best] < trace
    ? "no single patch makes more than a trace of difference."
    : `$${percent(logProb - falls[best])} with $${placed(best)} hidden, a fall of $${nats(falls[best])} nats.`);
  return [strong, rest];
}
function tell(number) {
  const fall = fallsOf(seen)[number];
  const logProb = seen < 0 ? data.log_probs.reduce((sum, one) => sum + one, 0) : data.log_probs[seen];
  said.textContent = placed(number) + " hidden: " + percent(logProb - fall) + " instead of " + percent(logProb)
    + " (" + signed(-fall) + " nats).";
}
function choose(token, focus) {
  chosen = token;
  for (const chip of chips) {
    const on = Number(chip.dataset.token) === token;
    chip.setAttribute("aria-pressed", on);
    chip.tabIndex = on ? 0 : -1;
    if (on && focus) chip.focus();
  }
  show(token);
}
for (const chip of chips) {
  const token = Number(chip.dataset.token);
  chip.addEventListener("click", () => choose(token));
  chip.addEventListener("pointerenter", event => event.pointerType === "mouse" && show(token));
  chip.addEventListener("pointerleave", event => event.pointerType === "mouse" && show(chosen));
}
flat.forEach((cell, number) => {
  for (const kind of ["pointerenter", "pointerdown"]) cell.addEventListener(kind, () => tell(number));
  cell.addEventListener("pointerleave", event => event.pointerType === "mouse" && show(chosen));
});
const turn = name => { switches[name].checked = !switches[name].checked; redraw(); };
function redraw() {
  document.body.classList.toggle("map", switches.map.checked);
  document.body.classList.toggle("grey", switches.grey.checked);
  show(chosen);
}
for (const box of Object.values(switches)) box.addEventListener("change", redraw);
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const onward = getComputedStyle(document.querySelector(".chips")).direction === "rtl" ? -1 : 1;
  const step = {ArrowRight: onward, ArrowLeft: -onward}[event.key];
  const letter = {m: "map", g: "grey", s: "own"}[event.key.toLowerCase()];
  if (step) choose(Math.max(-1, Math.min(count - 1, chosen + step)), true);
  else if (event.key === "Escape" || event.key === "Home") choose(-1, true);
  else if (event.key === "End") choose(count - 1, true);
  else if (letter) turn(letter);
  else return;
  event.preventDefault();
});
for (const chip of chips) {
  const token = Number(chip.dataset.token), most = token < 0 ? 0 : Math.max(0, ...fallsOf(token));
  chip.style.setProperty("--heat", shared ? most / shared : 0);
}
document.querySelector(".switches").hidden = false;
choose(-1);
</script>
</body>
</html>
"""
)


def write_page(explanation: Any, name: str, images: Sequence[str]) -> str:
    """
    The page.

    Args:
        explanation (`Explanation`): what was found.
        name: what the model is called.
        images: what the pictures are called.
    """
    found, deletion = explanation, explanation.deletion
    strengths = found.strengths.tolist()
    most = max((abs(value) for value in strengths), default=0.0)
    trace = max(_TRACE, found.rounding)
    most = 0.0 if most < trace else most
    caption = "What is in the picture?" if len(found.pictures) == 1 else "What is in the pictures?"
    hidden = f"{_counted(found.patches, 'patch', 'es')}, each hidden once under its picture's mean colour"
    facts = [name, _counted(found.pieces, "token") + ("" if found.ended else ", cut short there"), hidden]
    if found.around:
        facts[-1] += f", with {found.around} on every side of it"
    if found.rounding > 1e-3:
        facts.append(f"computed in few bits: rounding alone makes {found.rounding:.2g} nats")
    numbers = {
        "log_probs": [round(value, 6) for value in found.log_probs],
        "labels": [piece.label.strip(" ") + (f" ({piece.part})" if piece.part else "") for piece in found.pieces],
        "patches": [[patch.picture, patch.row, patch.column] for patch in found.patches],
        "falls": [[float(f"{value:.4g}") for value in of_patch] for of_patch in found.falls.tolist()],
    }
    return _PAGE.substitute(
        title=shown_text(f"{found.question or caption} {found.answer}"[:90]),
        question=shown_text(found.question) if found.question else caption,
        answer=shown_text(found.answer) if found.answer else "<i>no words</i>",
        facts=shown_text(" · ".join(facts)),
        direction=_direction(found.answer),
        chips="\n".join(_chips(found.pieces)),
        said="",
        several=" several" if len(found.pictures) > 1 else "",
        pictures="\n".join(_figure(found, number, name, strengths, most) for number, name in enumerate(images)),
        low=f"\u2212{most:.2g}" if most else "0",
        high=f"+{most:.2g}" if most else "0",
        trace=f"{trace:.4g}",
        verdict=verdict(deletion),
        curve=_curve(deletion, len(found.patches)),
        data=json.dumps(numbers, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
    )


def verdict(deletion: Any) -> str:
    """What a deletion curve says of the map, in words."""
    area, spread = deletion.area, deletion.spread
    beaten = sum(of_order > 0.01 for of_order in deletion.areas)
    orders = _counted(deletion.chance, "random order")
    figures = f"Hidden in the order of the map, patches cost the answer {abs(area):.2f} nats "
    figures += f"{'more' if area >= 0 else 'less'} than in {orders}"
    figures += "" if spread is None else f" (±\u00a0{spread:.2f})"
    if len(deletion.areas) < _FEW:
        return f"{figures}: too few orders to tell by."
    if beaten == len(deletion.areas):
        return f"{figures}, and more than in each: it hangs on what the map shows."
    return f"{figures}, and more than in {beaten} of them: little beyond chance, so read the map with care."


def _counted(things, what, plural="s"):
    return f"{len(things)} {what}{plural if len(things) != 1 else ''}"


def _direction(text):
    first = next((c for c in text if unicodedata.bidirectional(c) in ("L", "R", "AL")), "a")
    return "ltr" if unicodedata.bidirectional(first) == "L" else "rtl"


def _chips(pieces):
    yield '<button class="chip whole" data-token="-1" aria-pressed="true">Whole answer</button>'
    for number, piece in enumerate(pieces):
        kind = " control" if piece.control else " on" if number and not piece.label.startswith((" ", "\u2423")) else ""
        part = f"<small>{piece.part}</small>" if piece.part else ""
        label = shown_text(piece.label.strip(" "))
        yield (
            f'<button class="chip{kind}" data-token="{number}" aria-pressed="false"><bdi>{label}</bdi>{part}</button>'
        )


def _figure(found, number, name, strengths, most):
    picture = found.pictures[number]
    width, height = picture.size
    cells = []
    for patch, strength in zip(found.patches, strengths):
        if patch.picture == number:
            left, top, right, bottom = patch.box
            colour, share = "for" if strength >= 0 else "against", abs(strength) / most if most else 0
            cells.append(
                f'<rect class="cell" x="{left}" y="{top}" width="{right - left}" height="{bottom - top}" '
                f'style="fill:var(--{colour});fill-opacity:{0.82 * share:.3f}"/>'
            )
    # As tall as a screen shows it.
    style = f"max-width:max(40px, min(100%, {round(72 * width / height, 1)}vh))"
    small = ' class="small"' if max(picture.size) <= _SMALL else ""
    source = picture_uri(picture, PICTURE_SIDE, exact=_SMALL, quality=88)
    return (
        f'<figure><div class="picture" style="{style}"><img{small} src="{source}" alt="" width="{width}" '
        f'height="{height}"><svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" aria-hidden="true">'
        f'{"".join(cells)}<g class="best" style="display:none"><rect/><rect/></g></svg></div>'
        f"<figcaption>{shown_text(name)}, {width} x {height}</figcaption></figure>"
    )


_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 420, 240, 44, 14, 34


def _curve(deletion, patches):
    """The curves of the deletion as a picture."""
    means = [statistics.fmean(values) for values in zip(*deletion.chance)]
    upper, lower = ([end(values) for values in zip(*deletion.chance)] for end in (max, min))
    values = [*deletion.strongest, *upper, *lower]
    step = _step(max(values) - min(values))
    low, high = math.floor(min(values) / step) * step, math.ceil(max(values) / step) * step
    span = (high - low) or step
    right, bottom = _WIDTH - 8, _HEIGHT - _BOTTOM

    def at(hidden, value):
        x = _LEFT + (right - _LEFT) * hidden / max(1, deletion.hidden[-1])
        return f"{x:.1f},{_TOP + (bottom - _TOP) * (high - value) / span:.1f}"

    def line(values):
        return " ".join(at(hidden, value) for hidden, value in zip(deletion.hidden, values))

    band = " ".join([line(upper), *reversed(line(lower).split())])
    heights = [(high - step * number, bottom - _TOP) for number in range(round(span / step) + 1)]
    marks = "".join(
        f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(value)}</text>'
        for value, y in ((value, _TOP + side * (high - value) / span) for value, side in heights)
    )
    shares = "".join(
        f'<text x="{_LEFT + (right - _LEFT) * share:.0f}" y="{bottom + 16}" text-anchor="{anchor}">{share:.0%}</text>'
        for share, anchor in ((0, "start"), (0.5, "middle"), (1, "end"))
    )
    said = f"Log-probability of the answer while more and more of {patches} patches are hidden"
    return (
        '<p class="hint">log-probability of the answer, in nats</p>'
        f'<svg class="curve" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{said}">{marks}{shares}'
        f'<text x="{(_LEFT + right) / 2:.0f}" y="{_HEIGHT - 3}" text-anchor="middle">share of the patches hidden</text>'
        f'<polygon class="band" points="{band}"/><polyline class="chance" points="{line(means)}"/>'
        f'<polyline class="first" points="{line(deletion.strongest)}"/></svg>'
    )


def _step(span):
    """A round number of which about four make a span, which is more than what rounding makes."""
    if span < 1e-3:
        return 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    return next(power * times for times in (1, 2, 5, 10) if power * times * 4 >= span)


def _number(value):
    return f"{value:.6g}".replace("-", "\u2212") if abs(value) > 1e-12 else "0"


__all__ = ["verdict", "write_page"]
