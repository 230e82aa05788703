"""The page at / in a real browser: headless Chromium, where there is one."""

import shutil

import pytest
import servers

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def open_page(browser, address):
    page, faults = browser.new_page(), []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" and "favicon" not in message.text else None)
    page.goto(address)
    return page, faults


def test_a_dialog_with_its_settings_and_its_speed(browser):
    with servers.running() as (address, server):
        page, faults = open_page(browser, address)
        page.wait_for_selector("#model option", state="attached")
        page.click("summary")
        page.fill("#temperature", "0")
        page.fill("#max_tokens", "9")
        page.fill("#system", "be brief")
        for i, question in enumerate(["hello", "<b>again</b>"]):
            page.fill("#question", question)
            page.press("#question", "Enter")
            servers.wait_until(lambda: len(page.query_selector_all(".speed")) > i and page.text_content("#send") == "Send")
        said = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
        first = servers.tiny_model().chat(said, max_new_tokens=9)
        boxes = [box.text_content() for box in page.query_selector_all(".message")]
        assert boxes[:3] == ["hello", first, "<b>again</b>"] and not page.query_selector_all(".message b")  # text is never markup
        assert "tokens/s" in page.query_selector_all(".speed")[1].text_content()
        page.fill("#max_tokens", "900")
        page.fill("#question", "go on")
        page.click("#send")
        servers.wait_until(lambda: page.text_content("#send") == "Stop")
        servers.wait_until(lambda: servers.engine_of(server).scheduler.admitted)
        page.click("#send")
        servers.wait_until(lambda: servers.is_idle(server))
        page.click("#clear")
        assert not page.query_selector_all(".message") and not faults


def test_a_key_is_asked_for(browser):
    with servers.running(keys=["right"]) as (address, _):
        page, _ = open_page(browser, address)
        servers.wait_until(lambda: "API key" in page.text_content("#state"))
        page.click("summary")
        page.fill("#key", "right")
        page.dispatch_event("#key", "change")
        page.wait_for_selector("#model option", state="attached")
        page.set_viewport_size({"width": 380, "height": 700})
        assert page.evaluate("document.documentElement.scrollWidth <= 380")
