"""The page in a real browser: it loads without a network, is searched, sorted, opened, closed, and used by keyboard."""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from r2cli.analysis import depth_page, layer_table, page
from r2cli.analysis.depth import PARTS, Comparison, Depth, Mend, ValueLoss
from r2cli.analysis.layer_table import Analysis, AnalyzedLayer, AnalyzeSettings
from r2cli.console import escaped
from r2cli.storage.stream import from_memory

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine: apt-get install chromium"),
]

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">&amp;\u2028'"
LAYERS = 200


def row(name: str, seed: int, **settings: Any) -> AnalyzedLayer:
    x = torch.randn(8, 40, generator=torch.Generator().manual_seed(seed)) / 10
    x[seed % 8, 3] = 0.3 + seed / 100
    return layer_table.row(from_memory(name, x, ""), AnalyzeSettings(**settings))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of 200 layers, one of them with a name that tries to be code, and one layer that is broken."""
    rows = [row(f"blocks.{n}.conv.weight", n) for n in range(LAYERS - 2)]
    broken = torch.ones(4, 4)
    broken[0, 0] = math.nan
    odd = [row(HOSTILE, 1), layer_table.row(from_memory("broken", broken, ""), AnalyzeSettings())]
    sheets = [
        Analysis("first.safetensors", "", (*rows, *odd), ()),
        Analysis("second.safetensors", "", tuple(row(f"blocks.{n}.conv.weight", n + 7) for n in range(LAYERS - 2)), ()),
    ]
    shown = {"bits": 4, "granularity": "tensor", "sort": "sqnr"}
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_bytes(page.to_bytes(sheets, shown, sigma=4.0, advice="use `r2 pretrain`"))
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser: Any, written: Path) -> Iterator[Any]:
    """The page, which must ask for nothing but itself and say nothing on the console."""
    tab = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme="light")
    wrong: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: wrong.append(message.text))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(written.as_uri())
    yield tab
    assert wrong == [] and [url for url in asked if not url.startswith("data:")] == [written.as_uri()]
    tab.close()


def names(tab: Any) -> list[str]:
    found: list[str] = tab.locator("#layers .layer").all_text_contents()
    return found


def column(tab: Any, index: int) -> list[str]:
    """The first file's value of every row, in the column."""
    found: list[str] = tab.eval_on_selector_all("#layers tr", f"rows => rows.map(r => r.children[{index}].innerText)")
    return [text.split("\n")[0] for text in found]


def focused(tab: Any) -> str:
    found: str = tab.evaluate("document.activeElement.id || document.activeElement.textContent")
    return found


def test_it_opens_with_every_layer_and_draws_only_what_is_seen(opened: Any) -> None:
    assert len(names(opened)) == LAYERS and opened.locator("#shown").inner_text() == f"{LAYERS} layers"
    opened.wait_for_function("[...document.querySelectorAll('#layers canvas')].some(c => c.width !== 300)")
    drawn = opened.evaluate("[...document.querySelectorAll('#layers canvas')].filter(c => c.width !== 300).length")
    assert 0 < drawn < LAYERS / 2
    assert opened.locator("#advice code").inner_text() == "r2 pretrain"


def test_a_hostile_name_is_only_text(opened: Any) -> None:
    assert escaped(HOSTILE) in names(opened) and opened.title() == "first.safetensors – r2 analyze"
    opened.locator("#search").fill("owned")
    opened.locator("#layers tr").click()
    assert opened.locator("#title").text_content() == escaped(HOSTILE) and opened.locator("img").count() == 0


def test_search(opened: Any) -> None:
    opened.locator("#search").fill("BLOCKS.19")
    assert set(names(opened)) == {f"blocks.{n}.conv.weight" for n in (19, *range(190, 198))}
    assert opened.locator("#shown").inner_text() == f"9 of {LAYERS} layers"
    opened.locator("#search").fill("nothing like it")
    assert names(opened) == [] and opened.locator("#none").is_visible()


def test_sort(opened: Any) -> None:
    header = opened.locator("#head button", has_text="max/std")
    cell = opened.locator("#head th", has_text="max/std")
    assert cell.get_attribute("aria-sort") == "none"
    header.click()
    assert cell.get_attribute("aria-sort") == "descending" and column(opened, 2)[0] == "1 bad"
    values = [float(text) for text in column(opened, 2)[1:]]
    assert values == sorted(values, reverse=True)
    header.click()
    assert cell.get_attribute("aria-sort") == "ascending" and names(opened)[-1] == "broken"
    opened.locator("#head button", has_text="Layer").click()
    assert names(opened)[:2] == ["blocks.0.conv.weight", "blocks.1.conv.weight"]
    opened.locator("#bits").select_option("2")
    assert opened.locator("#head button", has_text="2 bit dB").is_visible()


def test_a_layer_opens_with_everything_and_tells_values(opened: Any) -> None:
    opened.locator("#search").fill("blocks.5.")
    opened.locator("#layers tr").click()
    dialog = opened.locator("#detail")
    assert dialog.is_visible() and opened.locator("#title").inner_text() == "blocks.5.conv.weight"
    assert dialog.locator(".losses table").count() == 2, "one for each file"
    chart = dialog.locator("svg[aria-label^='Histogram of blocks']").first
    box = chart.bounding_box()
    opened.mouse.move(box["x"] + box["width"] * 0.52, box["y"] + box["height"] / 2)
    opened.wait_for_function("document.getElementById('tip').style.opacity === '1'")
    assert " to " in opened.locator("#tip").inner_text()
    told = opened.locator("#channel").inner_text()
    opened.locator("#channels canvas").focus()
    opened.keyboard.press("ArrowDown" if "channel 0." in told else "ArrowUp")
    assert opened.locator("#channel").inner_text() != told
    opened.locator("#channels .tabs button").nth(1).click()
    assert opened.locator("#channels .tabs button").nth(1).get_attribute("aria-pressed") == "true"


def test_a_broken_layer_opens_too(opened: Any) -> None:
    opened.locator("#search").fill("broken")
    opened.locator("#layers tr").click()
    assert "1, 0" in opened.locator(".facts").inner_text()


def test_files_are_compared_and_can_be_hidden(opened: Any) -> None:
    opened.locator("#search").fill("blocks.5.")
    assert opened.locator("#layers canvas").count() == 2
    second = opened.locator("#sheets button").nth(1)
    second.click()
    assert opened.locator("#layers canvas").count() == 1 and second.get_attribute("aria-pressed") == "false"
    opened.locator("#sheets button").first.click()
    assert opened.locator("#layers canvas").count() == 1, "the last one stays"


def test_the_keyboard_is_enough(opened: Any) -> None:
    order = []
    for _ in range(15):
        opened.keyboard.press("Tab")
        order.append(focused(opened))
    assert order[0] == "theme" and "search" in order and order.index("search") < order.index("bits")
    assert "Kurtosis" in order
    opened.locator("#head button").first.focus()
    opened.keyboard.press("Enter")
    assert opened.locator("#head th").first.get_attribute("aria-sort") == "ascending"
    for _ in range(8):
        opened.keyboard.press("Tab")
    assert focused(opened) == "blocks.0.conv.weight"
    outline = opened.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "the focus can be seen"
    opened.keyboard.press("Enter")
    assert opened.locator("#detail").is_visible() and focused(opened) == "close"
    inside = opened.evaluate("document.getElementById('detail').contains(document.activeElement)")
    opened.keyboard.press("Tab")
    assert inside and opened.evaluate(
        "document.activeElement === document.body || document.getElementById('detail').contains(document.activeElement)"
    )
    opened.locator("#next").focus()
    opened.keyboard.press("Enter")
    assert opened.locator("#title").inner_text() == "blocks.1.conv.weight" and focused(opened) == "next"
    opened.keyboard.press("Escape")
    assert not opened.locator("#detail").is_visible() and focused(opened) == "blocks.1.conv.weight"
    opened.keyboard.press("/")
    assert focused(opened) == "search"


def test_light_and_dark(browser: Any, written: Path, opened: Any) -> None:
    def paper(tab: Any) -> int:
        found: int = tab.evaluate("+getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]")
        return found

    assert paper(opened) > 200
    opened.locator("#theme").click()
    assert paper(opened) < 60
    dark = browser.new_page(color_scheme="dark")
    dark.goto(written.as_uri())
    assert paper(dark) < 60
    dark.close()


def test_a_comparison_opens_with_both_histograms_of_a_layer(browser: Any, tmp_path: Path) -> None:
    counts = {"low": -1.0, "high": 1.0, "floats": [1, 9, 3], "codes": [0, 12, 1], "ends": [-0.5, 0.5], "bits": 8}
    picture = {"values": counts, "weights": counts, "channels": [[3, 20.0, 75.0]]}
    rows = [ValueLoss(name, 20, 30, cost, dict.fromkeys(PARTS, 9.0)) for name, cost in (("a", 40), ("b", 10))]
    mend = Mend("b", "8 bits", 12, 2, 64, 2.5, {"b": "8"})
    found = Comparison(Depth(tuple(rows), (9.5,)), 4, mends=(mend,), pictures={"a": picture, "b": picture})
    path = tmp_path / "compare.html"
    path.write_bytes(depth_page.to_bytes(found, HOSTILE))
    tab, wrong = browser.new_page(), list[str]()
    tab.on("console", lambda message: wrong.append(message.text))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.goto(path.as_uri())
    assert names(tab) == ["a", "b"] and escaped(HOSTILE) in tab.title()
    tab.locator("#sort").select_option("cost")
    assert names(tab) == ["b", "a"] and tab.locator("#mends code").inner_text() == "--keep 'b=8'"
    assert "for its cost first" in tab.locator("#mends h3").inner_text() and "2.5" in tab.locator("#mends").inner_text()
    tab.locator("#layers tr").first.click()
    assert tab.locator("#title").inner_text() == "b" and tab.locator("#detail svg").count() == 2
    assert tab.locator("#detail .edge").count() == 4 and "75.0 %" in tab.locator("#detail").inner_text()
    tab.locator("#close").click()
    assert not tab.locator("#detail").is_visible() and wrong == []
    tab.close()
