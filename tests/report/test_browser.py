"""The report in a real browser: on a phone and a desk, light and dark, by keyboard, and with names that attack it."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from halfbyte.checkpoint.inspection import Inspection, inspect
from halfbyte.report.html import visible, write

from ..check import equal, true
from .browser import NAMES, Browser, browser, installed
from .test_inspection import HOSTILE, hostile, wounded

PHONE, DESK = 360, 1280

# Each text's contrast with what lies behind it, by WCAG 2; where it is too low, the text.
CONTRAST = """(() => {
  const rgba = text => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
  const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3]));
  const back = e => e ? over(rgba(getComputedStyle(e).backgroundColor), back(e.parentElement)) : [255, 255, 255];
  const light = c => c.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const low = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let texts = 0;
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !e.checkVisibility() || e.closest("title")) continue;
    const style = getComputedStyle(e), behind = back(e);
    const [a, b] = [over(rgba(e.closest("svg") ? style.fill : style.color), behind), behind].map(light);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    texts++;
    if (ratio < 4.5) low.push(walk.currentNode.data.trim() + " " + ratio.toFixed(2));
  }
  return {texts, low};
})()"""
# Texts of plots that are too small to read, cut off at the edge, or lie on one another.
PLOTS = """[...document.querySelectorAll("svg")].flatMap(svg => {
  const frame = svg.getBoundingClientRect(), wrong = [], boxes = [];
  for (const text of svg.querySelectorAll("text")) {
    const box = text.getBoundingClientRect(), size = parseFloat(getComputedStyle(text).fontSize) * frame.width / 560;
    if (size < 10.5) wrong.push(`${text.textContent} has ${size.toFixed(1)} px`);
    if (box.left < frame.left - 1 || box.right > frame.right + 1) wrong.push(text.textContent + " is cut off");
    for (const [other, b] of boxes)
      if (box.left < b.right && b.left < box.right && box.top + 3 < b.bottom && b.top + 3 < box.bottom)
        wrong.push(`${text.textContent} lies on ${other}`);
    boxes.push([text.textContent, box]);
  }
  return wrong;
})"""
FOCUSABLE = """[...document.querySelectorAll("a[href], summary, button, input, select, [tabindex='0']")]
  .filter(e => e.checkVisibility({contentVisibilityAuto: true}))"""
FOCUSED = f"""(() => {{
  const e = document.activeElement, style = getComputedStyle(e), box = e.getBoundingClientRect();
  return {{at: {FOCUSABLE}.indexOf(e), outline: style.outlineStyle === "none" ? 0 : parseFloat(style.outlineWidth),
    seen: box.bottom > 0 && box.top < innerHeight && box.right > 0 && box.left < innerWidth}};
}})()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = installed()
    if program is None:
        pytest.skip(f"no Chromium here (looked for {', '.join(NAMES)})")
    with browser(program, tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Inspection:
    source, out = wounded(tmp_path_factory.mktemp("wounded"))
    return inspect(out, source)


def quiet(page: Browser, path: Path) -> None:
    """Nothing on the console, nothing fetched but the page itself, no dialog."""
    requests = [e["params"]["request"]["url"] for e in page.events if e.get("method") == "Network.requestWillBeSent"]
    equal(requests, [path.as_uri()])
    loud = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Page.javascriptDialogOpening")
    equal([event for event in page.events if event.get("method") in loud], [])


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_looks(tmp_path: Path, page: Browser, found: Inspection, width: int, dark: bool) -> None:
    path = tmp_path / "report.html"
    write(found, path)
    page.open(path, width, dark=dark)
    equal(page.run("[innerWidth, document.documentElement.scrollWidth <= innerWidth]"), [width, True])
    back, fore = page.run("(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))")
    equal(sum(map(int, back[4:-1].split(","))) < 3 * 64, dark, back)
    equal(sum(map(int, fore[4:-1].split(","))) > 3 * 192, dark, fore)
    page.run("document.querySelectorAll('details').forEach(e => e.open = true)")
    equal(page.run("document.documentElement.scrollWidth <= innerWidth"), True, "with all details open")
    contrast = page.run(CONTRAST)
    true(contrast["texts"] > 300, f"{contrast['texts']} texts seen")
    equal(contrast["low"], [])
    equal(page.run(PLOTS), [])
    equal(page.run("document.querySelectorAll('svg').length"), 5)
    top = "document.querySelector('#findings').getBoundingClientRect().top"
    true(page.run(f"scrollTo(0, 0), {top}") < 800, "findings are on the first screen")
    quiet(page, path)


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_keyboard(tmp_path: Path, page: Browser, found: Inspection, width: int) -> None:
    """Tab reaches every control in order, each visibly; Enter and Space work it."""
    path = tmp_path / "report.html"
    write(found, path)
    page.open(path, width)
    count = page.run(f"{FOCUSABLE}.length")
    true(count > 50, f"{count} controls")
    for at in range(count):
        page.press("Tab")
        focused = page.run(FOCUSED)
        equal((focused["at"], focused["seen"]), (at, True))
        true(focused["outline"] >= 2, f"control {at} does not show its focus: {focused}")
    page.run("document.querySelector('.skip').focus()")
    page.press("Enter")
    equal(page.run("location.hash"), "#findings")

    page.run("(window.item = document.querySelector('#layers + details')).querySelector('summary').focus()")
    for key, opened in (("Enter", True), (" ", False), (" ", True)):
        page.press(key)
        equal(page.run("item.open"), opened, f"after {key!r}")

    page.run("window.table = item.querySelector('table'); window.head = table.tHead.rows[0].cells")
    sort_by(page, "size", "cell => Number(cell.dataset.sort)")
    sort_by(page, "rel. error", "cell => parseFloat(cell.textContent)")
    sort_by(page, "saturated", "cell => parseFloat(cell.textContent)")
    page.run("[...head].find(h => h.textContent === 'where').firstChild.focus()")
    page.press("Enter")
    page.press("Enter")
    equal(page.run("table.tBodies[0].rows[0].cells[0].textContent"), "layer 0 attention k_proj")
    equal(page.run("table.tBodies[0].rows.length"), len(found.layers))
    if width == PHONE:
        page.run("(window.box = table.parentElement).focus()")
        page.press("ArrowRight")
        page.run("new Promise(done => setTimeout(done, 500))")  # smooth
        true(page.run("box.scrollLeft") > 0, "arrow keys scroll a wide table")
    quiet(page, path)


def sort_by(page: Browser, name: str, value: str) -> None:
    """Enter sorts downwards, Space upwards; the state is there for screen readers."""
    page.run(f"window.at = [...head].findIndex(h => h.textContent === {name!r}); head[at].firstChild.focus()")
    for key, state, sign in (("Enter", "descending", -1), (" ", "ascending", 1)):
        page.press(key)
        values = page.run(f"[...table.tBodies[0].rows].map(row => ({value})(row.cells[at]))")
        equal(values, sorted(values, key=lambda v: sign * v), f"{name} after {key!r}")
        true(len(set(values)) > 2, f"{name}: {values}")
        equal(page.run("[...head].map(h => h.ariaSort).filter(Boolean)"), [state])
        true(page.run("head[at].firstChild === document.activeElement"), "focus stays")


def test_names_cannot_hurt(tmp_path: Path, page: Browser) -> None:
    source, out = hostile(tmp_path)
    path = tmp_path / "report.html"
    write(inspect(out, source), path)
    page.open(path, PHONE)
    text = page.run("document.body.textContent")
    for name in HOSTILE:
        true(visible(name) in text, f"{name!r} is not shown")
    equal(
        page.run("[document.scripts.length, document.querySelectorAll('img, base, iframe, [onmouseover]').length]"),
        [1, 0],
    )
    true(page.run("document.documentElement.scrollWidth <= innerWidth"), "a name makes the page wider")
    quiet(page, path)
    # Should a name ever become HTML: the page's policy lets it neither run nor load anything.
    page.run("""document.querySelector("main").append(...["script", "img", "img"].map(n => document.createElement(n)));
      const [a, b] = document.querySelectorAll("img"), s = document.scripts[1] ?? document.scripts[0];
      a.setAttribute("onerror", "window.hurt = 1"); a.src = "missing.png"; b.src = "https://example.org/x.png";
      const again = document.createElement("script"); again.text = "window.hurt = 1"; document.body.append(again)""")
    page.run("new Promise(done => setTimeout(done, 300))")
    equal(page.run("window.hurt ?? 0"), 0)
    blocked = [e for e in page.events if e.get("method") == "Log.entryAdded"]
    true(len(blocked) >= 3, f"the policy blocked {blocked}")


def test_many_layers(tmp_path: Path, page: Browser, found: Inspection) -> None:
    """Long tables scroll in boxes of their own, long lists fold, and the file stays small."""

    def at(row: Any, layer: int) -> Any:
        return replace(row, place=(row.place[0], layer, *row.place[2:]))

    layers = tuple(at(row, layer) for layer in range(96) for row in found.layers if row.place[1] == layer % 4)
    many = replace(found, layers=layers, remarks=found.remarks * 40)
    path = tmp_path / "report.html"
    write(many, path)
    true(path.stat().st_size < 600_000, f"{path.stat().st_size} bytes")
    for width in (PHONE, DESK):
        page.open(path, width)
        equal(page.run("document.documentElement.scrollWidth <= innerWidth"), True)
        equal(page.run(PLOTS), [])
        tall = page.run("Math.max(...[...document.querySelectorAll('.scroll')].map(e => e.clientHeight))")
        true(tall <= 0.8 * 800, f"a table takes {tall} px of 800")
        length = page.run("document.documentElement.scrollHeight")
        true(length < 10_000, f"the page is {length} px long")
        moved = "document.querySelector('#heat + .scroll')"
        page.run(f"{moved}.scrollTo(100, 900)")
        shown = [
            moved,
            f"{moved}.querySelector('thead th:nth-child(3)')",
            f"{moved}.querySelector('tr:nth-child(40) th')",
        ]
        boxes = f"[{', '.join(shown)}].map(e => e.getBoundingClientRect()).map(r => [r.left, r.top])"
        frame, head, side = page.run(boxes)
        equal(round(head[1]), round(frame[1]), "the head stays in sight")
        equal(round(side[0]), round(frame[0]), "the first column stays in sight")
    quiet(page, path)


def test_print(tmp_path: Path, page: Browser, found: Inspection) -> None:
    """On paper nothing scrolls: all rows and columns are there."""
    path = tmp_path / "report.html"
    write(found, path)
    page.open(path, DESK)
    page.call("Emulation.setEmulatedMedia", media="print")
    hidden = "[...document.querySelectorAll('.scroll')].filter(e => getComputedStyle(e).overflow !== 'visible').length"
    equal(page.run(hidden), 0)
    equal(page.run("document.querySelector('nav').checkVisibility()"), False)
