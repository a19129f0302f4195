"""The page in real headless Chromium; left out where Playwright or the browser is not installed."""

import os
import shutil

import pytest
from test_server import LINES, MODEL, TEXT, Live, library
from tiny import make_icae

from icae.server.app import create_app
from icae.store import SlotStore

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def model(base):
    return make_icae(base, stirred=0.05, beginnings=4)


@pytest.fixture
def live(model, tmp_path):
    store = SlotStore(tmp_path / "store")
    store.add(model, LINES[0], "stored")
    with Live(create_app(model, store, name=MODEL)) as made:
        made.store = store
        yield made


@pytest.fixture(
    params=[{"color_scheme": "light"}, {"color_scheme": "dark", "viewport": {"width": 360, "height": 740}}], ids=["desk", "phone"]
)
def page(browser, live, request):
    """The page, watched: no error in its console, no request to another host."""
    context = browser.new_context(**request.param)
    page, wrong = context.new_page(), []
    page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: wrong.append(str(e)))
    page.on("request", lambda r: wrong.append(r.url) if not r.url.startswith((live.url, "data:")) else None)
    page.set_default_timeout(15_000)
    page.goto(live.url)
    yield page
    assert wrong == []
    context.close()


def wide(page):
    """How far the page is wider than its window."""
    return page.evaluate("document.documentElement.scrollWidth - innerWidth")


def test_a_text_becomes_slots_and_is_asked(page, live, model):
    page.get_by_label("Paste a text").fill(LINES[1])
    page.get_by_role("button", name="Compress").click()
    page.get_by_text("tokens are read back right").wait_for()
    entry = next(e for e in live.store.entries() if e.name != "stored")
    assert page.locator("#grid button").count() == entry.slots
    assert page.locator("#text").text_content() == LINES[1]
    page.locator("#grid button").nth(2).hover()
    tokens = model.base.encode(LINES[1])[8:12]
    assert model.base.decode(tokens) in page.locator("#about").text_content()
    assert page.locator("#text span.on").count() == 4
    page.get_by_label("Question").fill("Who painted?")
    page.get_by_role("button", name="Ask both").click()
    page.locator("#from-text dt").first.wait_for()
    expected = library(model, live.store, entry.name, "Who painted?", 128)
    assert page.locator("#from-slots .said").text_content() == expected
    facts = page.locator("#from-slots dl").text_content()
    assert "first token" in facts and "keys and values" in facts and f"tokens saved{entry.tokens - entry.slots}" in facts
    assert wide(page) <= 0


def test_everything_works_by_keyboard(page):
    page.keyboard.press("Tab")
    page.keyboard.type(LINES[2])
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.get_by_text("tokens are read back right").wait_for()
    page.locator("#grid button").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#about").text_content().startswith("slot 2")
    page.keyboard.press("End")
    assert page.locator("#grid button").last.evaluate("b => b === document.activeElement")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.type("Who?")
    page.keyboard.press("Enter")
    page.locator("#from-text dt").first.wait_for()


def test_stored_contexts_and_mistakes(page):
    page.get_by_role("button", name="Compress").click()
    page.get_by_text("paste a text first").wait_for()
    page.get_by_label("stored context").select_option(label=page.locator("#stored option").nth(1).text_content())
    page.get_by_text("from the store").wait_for()
    page.get_by_text("tokens are read back right").wait_for()
    assert page.locator("#text").text_content() == LINES[0] and page.locator("#problem").text_content() == ""


def test_a_file_can_be_dropped(page):
    page.evaluate(
        """text => {
            const data = new DataTransfer();
            data.items.add(new File([text], "a.txt", { type: "text/plain" }));
            document.getElementById("source").dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
        }""",
        TEXT,
    )
    page.wait_for_function("text => document.getElementById('source').value === text", arg=TEXT)


def test_the_description_names_every_route_and_opens_what_is_linked(page, live):
    page.get_by_role("link", name="The interface").click()
    page.get_by_role("heading", name="Objects").wait_for()
    routes = page.evaluate("fetch('openapi.json').then(r => r.json()).then(a => Object.values(a.paths).flatMap(Object.keys).length)")
    assert page.locator("details:not([id])").count() == routes > 8
    page.get_by_text("/v1/chat/completions", exact=True).click()
    page.get_by_role("link", name="ChatRequest").first.click()
    assert page.locator("#ChatRequest").get_by_text("messages").is_visible() and wide(page) <= 0
