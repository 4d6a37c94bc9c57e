"""The page in a real browser: drawn, hovered, zoomed by mouse and keyboard, toggled, on a phone, harmless."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_report import HOSTILE, answered

from stepladder.reporting import page, runs

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--window-size=1200,900",
)  # fmt: skip
STEPS = 10_000


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    driver = shutil.which("chromedriver")
    if not driver:
        pytest.skip("no chromedriver: sudo apt install --no-install-recommends chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs: of ten thousand steps, of thirty, and of thirty with hostile text wherever there is text."""
    folder = tmp_path_factory.mktemp("runs")
    for name, steps, text in (("long", STEPS, "fine"), ("short", 30, "fine"), ("hostile", 30, HOSTILE)):
        run = folder / name
        run.mkdir()
        rows: list[dict[str, Any]] = []
        for step in range(1, steps + 1):
            loss = 1 + 2 * math.exp(-5 * step / steps) + 0.1 * math.sin(step)
            rows.append({"step": step, "loss": loss, "grad_norm": 1 + 0.1 * math.cos(step), "learning_rate": 1e-4,
                         "tokens_per_second": 300.0})  # fmt: skip
            if step % (steps // 5) == 0:
                rows.append({"step": step, "eval_loss": loss + 0.1})
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        facts = {"status": "failed", "error": text, "strategy": text, "recipe": {text: text, "n": steps},
                 "datasets": [{"name": text, "rows": 1, "skipped": 0, "sha256": text}]}  # fmt: skip
        if name == "short":
            facts["stopped_early"] = {
                "step": 30, "of_steps": 60, "metric": "eval_loss", "value": 2.0, "best": 1.0, "best_step": 18,
                "evaluations": 2, "patience": 2, "threshold": 0.0,
            }  # fmt: skip
        (run / "run.json").write_text(json.dumps(facts))
        answered(run, [text], [text], ["another " + text])
        page.save(folder / f"{name}.html", page.render_page([runs.read(run)]))
    page.save(
        folder / "all.html", page.render_page(runs.read_all([folder / name for name in ("long", "short", "hostile")]))
    )
    return folder


@pytest.fixture
def opened(browser, folder):
    """Open a page anew; at the end, the browser must have complained of nothing and asked for nothing else."""

    def open_page(name: str) -> Any:
        browser.get(f"file://{folder}/{name}.html")
        return browser

    for kind in ("browser", "performance"):
        browser.get_log(kind)
    yield open_page
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert asked and all(url.startswith(f"file://{folder}/") and url.endswith(".html") for url in asked), asked


def plot(browser, line: str = "loss") -> Any:
    return browser.find_element("css selector", f'figure[data-line="{line}"] .plot')


def curves(browser, line: str = "loss") -> int:
    return len(plot(browser, line).find_elements("css selector", "path.curve:not(.thin)"))


def axis(browser, line: str = "loss") -> list[int]:
    """The steps that are written under a curve."""
    texts = plot(browser, line).find_elements("css selector", 'text[text-anchor="middle"]')
    return [int(text.text.replace(",", "")) for text in texts]


def text_of(browser, selector: str) -> str:
    return browser.execute_script("return document.querySelector(arguments[0]).textContent", selector)


def test_ten_thousand_steps_are_drawn_by_few_points(opened, folder) -> None:
    """Guards the page's speed: a curve has no more points than pixels, whatever the run's length."""
    browser = opened("long")
    for line in ("loss", "grad_norm", "learning_rate", "tokens_per_second"):
        (curve,) = plot(browser, line).find_elements("css selector", "path.curve:not(.thin)")
        assert 100 < curve.get_attribute("d").count("L") < 1200, line
    assert plot(browser).find_elements("css selector", "path.band")
    assert (folder / "long.html").stat().st_size < 800_000


def test_hover_shows_the_values_at_the_step(opened, folder) -> None:
    from selenium.webdriver import ActionChains

    browser = opened("short")
    assert not browser.find_element("id", "tip").is_displayed()
    ActionChains(browser).move_to_element(plot(browser)).perform()
    tip = browser.find_element("id", "tip").text.split()
    curve = runs.read(folder / "short").curve("loss")
    (loss,) = curve.values[curve.steps == int(tip[1])]
    assert abs(float(tip[3]) - loss) < 1e-5 and 10 < int(tip[1]) < 20, tip
    assert browser.find_element("id", "tip").size["height"] < 100, "it covers the curve"
    cursors = browser.find_elements("css selector", ".plot .cursor")
    assert len(cursors) == 4, "the cursor stands in every chart at the same step"
    ActionChains(browser).move_to_element(browser.find_element("id", "recipe")).perform()
    assert not browser.find_element("id", "tip").is_displayed()


def test_an_early_stop_is_marked(opened) -> None:
    """Guards the labelled lines at the best step and at the early stop, in the chart of the loss alone, in the view."""
    browser = opened("short")
    width = browser.execute_script("return document.querySelector('figure[data-line=loss] .plot').clientWidth")
    lines = plot(browser).find_elements("css selector", "line.event")
    places = [58 + (step - 1) / 29 * (width - 58 - 24) for step in (18, 30)]  # page.js: margins left and right
    assert [float(line.get_attribute("x1")) for line in lines] == pytest.approx(places, abs=0.1)
    labels = [text.text for text in plot(browser).find_elements("css selector", "line.event + text")]
    assert labels == ["best step: 18", "stopped early: 30"]
    assert not plot(browser, "grad_norm").find_elements("css selector", "line.event")
    assert not plot(opened("long")).find_elements("css selector", "line.event")


def test_zoom_by_mouse(opened) -> None:
    from selenium.webdriver import ActionChains

    browser = opened("long")
    whole, target = axis(browser), plot(browser)
    assert whole[-1] == STEPS and not browser.find_element("id", "whole").is_enabled()
    chain = ActionChains(browser).move_to_element_with_offset(target, -100, 0).click_and_hold()
    chain.move_by_offset(60, 0).release().perform()
    near = axis(browser)
    assert whole[0] < near[0] and near[-1] - near[0] < 2000 and axis(browser, "grad_norm")[-1] < STEPS, near
    assert not plot(browser).find_elements("css selector", ".selection")
    ActionChains(browser).double_click(target).perform()
    assert axis(browser) == whole
    for _ in range(9):
        browser.find_element("id", "closer").click()
    assert axis(browser)[-1] - axis(browser)[0] < 30
    browser.find_element("id", "farther").click()
    browser.find_element("id", "whole").click()
    assert axis(browser) == whole


def test_curves_by_keyboard(opened, folder) -> None:
    """Guards those who use no mouse or see no screen: the values are said, zoom works, focus is not trapped."""
    from selenium.webdriver import Keys

    browser = opened("short")
    whole = axis(browser)
    plot(browser).send_keys(Keys.ARROW_RIGHT)
    first = runs.read(folder / "short").curve("loss").values[0]
    assert text_of(browser, "#spoken") == f"Step 1: {first:.6g}"
    plot(browser).send_keys(Keys.ARROW_RIGHT, Keys.SHIFT + Keys.ARROW_RIGHT)
    assert text_of(browser, "#spoken").startswith("Step 12: ")
    assert "step 12" in browser.find_element("id", "tip").text
    plot(browser).send_keys(Keys.NULL, "+")
    assert axis(browser) != whole and min(axis(browser)) > 2
    plot(browser).send_keys(Keys.END)
    assert max(axis(browser)) < 25
    plot(browser).send_keys(Keys.ESCAPE)
    assert axis(browser) == whole
    browser.switch_to.active_element.send_keys(Keys.TAB)
    assert browser.switch_to.active_element != plot(browser)
    assert plot(browser).get_attribute("aria-label").startswith("Loss. short: ")


def test_legend_and_scale_by_mouse_and_keyboard(opened) -> None:
    from selenium.webdriver import Keys

    browser = opened("all")
    buttons = browser.find_elements("css selector", "button.run")
    assert len(buttons) == 3 == curves(browser)
    buttons[0].click()
    assert curves(browser) == 2 and buttons[0].get_attribute("aria-pressed") == "false"
    buttons[1].send_keys(Keys.SPACE)
    assert curves(browser) == 1 == curves(browser, "grad_norm")
    buttons[0].send_keys(Keys.ENTER)
    assert curves(browser) == 2 and buttons[0].get_attribute("aria-pressed") == "true"
    before = plot(browser).find_element("css selector", "path.curve").get_attribute("d")
    browser.find_element("id", "log").click()
    assert plot(browser).find_element("css selector", "path.curve").get_attribute("d") != before


@pytest.mark.parametrize("name", ["hostile", "all"])
def test_hostile_text_does_nothing(opened, name) -> None:
    """Guards the escaping where it counts: nothing runs, nothing is loaded, the text is there to read."""
    browser = opened(name)
    assert "owned" not in browser.title
    assert not browser.find_elements("css selector", "img, iframe, object, main a, main script, [onerror], [autofocus]")
    assert HOSTILE.split("{{")[0] in text_of(browser, "main")
    assert browser.find_elements("css selector", "path.curve"), "its own script still runs"


@pytest.mark.parametrize("name", ["hostile", "long", "all"])
def test_a_phone_scrolls_down_only(opened, name) -> None:
    phone = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    browser = opened("short")
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        opened(name)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
        assert plot(browser).size["width"] > 300
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_dark_and_light(opened) -> None:
    browser = opened("short")

    def paper() -> str:
        return browser.execute_script("return getComputedStyle(document.documentElement).backgroundColor")

    light, button = paper(), browser.find_element("id", "theme")
    assert button.text == "Dark page"
    button.click()
    assert paper() != light and button.text == "Light page"
    button.click()
    assert paper() == light


def test_print_is_light_and_the_system_may_be_dark(opened) -> None:
    """Guards paper: a page that was made dark prints dark on light; and the system's wish where no button was used."""
    browser = opened("short")

    def colours() -> tuple[str, str]:
        style = "const s = getComputedStyle(document.documentElement);"
        swatch = "getComputedStyle(document.querySelector('path.curve')).stroke"
        return tuple(browser.execute_script(f"{style} return [s.backgroundColor + s.color, {swatch}]"))

    def emulate(**media) -> None:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)

    light = colours()
    try:
        browser.find_element("id", "theme").click()
        dark = colours()
        emulate(media="print")
        assert colours() == light and all(a != b for a, b in zip(dark, light, strict=True))
        opened("short")
        emulate(media="screen", features=[{"name": "prefers-color-scheme", "value": "dark"}])
        assert colours() == dark
        emulate(media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
        assert colours() == light
    finally:
        emulate(media="", features=[])
