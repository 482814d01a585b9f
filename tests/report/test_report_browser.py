"""The pages in a real browser: Chromium, headless, at desktop and phone width, light and dark.

`make test-browser` installs Chromium, its driver and axe-core before it runs these.
"""

import json
import shutil
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

from infogrowth.cli import main

AXE = Path(__file__).parents[2] / ".browser/node_modules/axe-core/axe.min.js"
DESKTOP, PHONE = (1280, 900), (390, 844)
# Without the background flags Chromium knocks at its maker's servers, which nobody asked for.
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-quic "
    "--no-first-run --disable-background-networking --disable-component-update --disable-sync"
)

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert program and driver and AXE.is_file(), "run scripts/making/install_browser.sh first"
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(driver))
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def pages(made, tmp_path_factory):
    """Every kind of page, by name."""
    folder = tmp_path_factory.mktemp("pages")
    run = folder / "run <b>"
    run.mkdir()
    steps = [{"kind": "step", "step": s, "samples_seen": 64 * s, "loss": 4 / s} for s in (1, 2, 3)]
    steps.append({"kind": "epoch", "samples_seen": 192, "recall": {"val": {"r_mean": 41.5}}})
    (run / "log.jsonl").write_text("\n".join(map(json.dumps, steps)))
    kept = [row for row in made.rows if row["verdict"] != "dropped"]
    for name, rows in (("a", kept[:110]), ("b", kept[40:])):
        entries = [{"image": r["id"], "caption": r["caption"], "gains": [0.5, 0.5]} for r in rows]
        (folder / f"{name}.json").write_text(json.dumps(entries))
    growth, lmdb = str(made.growth), ["--lmdb", str(made.lmdb)]
    report, sweep, compare = (folder / f"{n}.html" for n in ("report", "sweep", "compare"))
    assert main(["report", growth, "--training", str(run), "-o", str(report)]) == 0
    assert main(["sweep", growth, "-o", str(sweep)]) == 0
    both = [str(folder / "a.json"), str(folder / "b.json")]
    assert main(["compare", *both, *lmdb, "-o", str(compare)]) == 0
    return {"report": report, "sweep": sweep, "compare": compare}


def show(browser, page, size=DESKTOP, dark=False):
    width, height = size
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    features = [
        {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
        {"name": "prefers-reduced-motion", "value": "reduce"},  # no gliding under the pointer
    ]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(page.as_uri())
    # A page opened from disk may remember the theme of the test before.
    browser.execute_script("localStorage.clear()")
    browser.refresh()
    browser.get_log("browser")
    browser.refresh()


def script(browser, text, *arguments):
    return browser.execute_script(text, *arguments)


def shown_values(browser, panel, key):
    """The sort values of a gallery's visible cards, in the order in which they stand."""
    return script(
        browser,
        """return [...document.querySelectorAll(arguments[0] + " [data-cards] > li")]
             .filter(card => !card.hidden).map(card => Number(card.dataset[arguments[1]]))""",
        panel,
        key,
    )


@pytest.mark.parametrize("name", ["report", "sweep", "compare"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_page_renders_without_errors_and_passes_the_accessibility_check(
    browser, pages, name, size, dark
):
    show(browser, pages[name], size, dark)
    assert browser.get_log("browser") == []
    assert script(browser, "return window.__injected") is None
    width = script(browser, "return document.documentElement.scrollWidth")
    assert width <= size[0], "the page scrolls sideways"
    expected = "rgb(17, 21, 27)" if dark else "rgb(245, 246, 248)"
    color = script(browser, "return getComputedStyle(document.body).backgroundColor")
    assert color == expected
    script(browser, "document.querySelectorAll('.panel').forEach(p => { p.hidden = false; })")
    # The policy of the page stops scripts of the page, not those of the driver: axe runs.
    assert accessibility_problems(browser) == []


def accessibility_problems(browser):
    """What axe-core finds wrong with the page as it stands, one line each."""
    browser.execute_script(AXE.read_text(encoding="utf-8"))
    result = browser.execute_async_script(
        "const done = arguments[arguments.length - 1]; axe.run().then(done, e => done(String(e)))"
    )
    assert len(result["passes"]) > 15  # it did look
    return [
        f"{found['id']}: {found['help']}: {found['nodes'][0]['html'][:200]}"
        for found in result["violations"]
    ]


def test_every_image_shows(browser, pages):
    show(browser, pages["report"])
    broken, whole = browser.execute_async_script(
        """const done = arguments[arguments.length - 1];
        const images = [...document.images];
        images.forEach(p => { p.loading = "eager"; });
        Promise.all(images.map(p => p.decode().then(() => p.naturalWidth > 0, () => false)))
          .then(ok => done([ok.filter(good => !good).length, ok.filter(Boolean).length]));"""
    )
    assert broken == 0
    assert whole > 100


def test_galleries_open_by_click_and_by_keyboard(browser, pages):
    show(browser, pages["report"])
    visible = (
        "return [...document.querySelectorAll('.panel')].filter(p => !p.hidden).map(p => p.id)"
    )
    assert script(browser, visible) == ["panel-dropped"]
    browser.find_element(By.ID, "tab-redundant").click()
    assert script(browser, visible) == ["panel-redundant"]
    ActionChains(browser).send_keys(Keys.ARROW_RIGHT).perform()
    assert script(browser, visible) == ["panel-novel"]
    assert browser.switch_to.active_element.get_attribute("id") == "tab-novel"
    ActionChains(browser).send_keys(Keys.HOME).perform()
    assert script(browser, visible) == ["panel-dropped"]
    ActionChains(browser).send_keys(Keys.ARROW_LEFT).perform()  # around the end
    assert script(browser, visible) == ["panel-novel"]


def test_a_gallery_is_sorted_by_click_and_by_keyboard(browser, pages):
    show(browser, pages["report"])
    browser.find_element(By.ID, "tab-novel").click()
    panel = "#panel-novel"
    gains = shown_values(browser, panel, "gain")
    assert gains == sorted(gains, reverse=True)
    Select(browser.find_element(By.CSS_SELECTOR, f"{panel} [data-sort]")).select_by_value("row")
    rows = shown_values(browser, panel, "row")
    assert rows == sorted(rows, reverse=True)
    order = browser.find_element(By.CSS_SELECTOR, f"{panel} [data-direction]")
    script(browser, "arguments[0].focus()", order)
    ActionChains(browser).send_keys(Keys.ENTER).perform()
    rows = shown_values(browser, panel, "row")
    assert rows == sorted(rows)
    assert "smallest first" in order.text


def test_the_first_rows_show_before_all_of_them(browser, pages):
    show(browser, pages["report"])
    browser.find_element(By.ID, "tab-novel").click()
    assert len(shown_values(browser, "#panel-novel", "row")) == 24
    more = browser.find_element(By.CSS_SELECTOR, "#panel-novel [data-all]")
    assert more.text == "Show all 60"
    script(browser, "arguments[0].focus()", more)
    ActionChains(browser).send_keys(Keys.ENTER).perform()
    assert len(shown_values(browser, "#panel-novel", "row")) == 60
    assert not more.is_displayed()


def test_finding_leaves_the_cards_with_these_words(browser, pages, made):
    show(browser, pages["report"])
    words = "crimson"
    browser.find_element(By.CSS_SELECTOR, "#panel-dropped [data-find]").send_keys(words)
    dropped = [row for row in made.rows if row["verdict"] == "dropped"]
    expected = {row["row"] for row in dropped if words in row["caption"]}
    assert set(shown_values(browser, "#panel-dropped", "row")) == expected != set()
    status = browser.find_element(By.CSS_SELECTOR, "#panel-dropped [data-status]")
    assert status.text == f"{len(expected)} found"


def test_a_table_is_sorted_by_click_and_by_keyboard(browser, pages):
    show(browser, pages["report"])
    counts = """return [...document.querySelectorAll(".reasons tbody tr")]
                  .map(row => Number(row.dataset.count))"""
    head = browser.find_element(By.CSS_SELECTOR, '.reasons [data-column="count"]')
    script(browser, "arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", head)
    before = script(browser, counts)
    assert before == sorted(before, reverse=True)
    head.click()
    assert script(browser, counts) == sorted(before)
    ActionChains(browser).send_keys(Keys.ENTER).perform()
    assert script(browser, counts) == before
    sort = script(browser, "return arguments[0].closest('th').ariaSort", head)
    assert sort == "descending"


def test_a_sample_opens_large_and_the_arrow_keys_walk_on(browser, pages):
    show(browser, pages["report"])
    first = browser.find_element(By.CSS_SELECTOR, "#panel-dropped .open")
    script(browser, "arguments[0].focus({preventScroll: false})", first)
    ActionChains(browser).send_keys(Keys.ENTER).perform()
    assert accessibility_problems(browser) == []
    position = browser.find_element(By.ID, "position")
    number = position.text.split(" of ")[1]
    assert position.text == f"1 of {number}"
    assert "alignment below min_align" in browser.find_element(By.ID, "detail-body").text
    ActionChains(browser).send_keys(Keys.ARROW_RIGHT).perform()
    assert position.text == f"2 of {number}"
    browser.find_element(By.ID, "previous").click()
    browser.find_element(By.ID, "previous").click()
    assert position.text == f"{number} of {number}"
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    assert not script(browser, "return document.getElementById('detail').open")
    assert browser.switch_to.active_element.get_attribute("class") == "open"


def test_a_image_on_the_map_shows_itself_when_it_is_reached_by_keyboard(browser, pages):
    show(browser, pages["report"])
    mark = browser.find_element(By.CSS_SELECTOR, ".landmark")
    bubble = mark.find_element(By.CSS_SELECTOR, ".bubble")
    assert not bubble.is_displayed()
    script(browser, "arguments[0].focus()", mark)
    assert bubble.is_displayed()
    assert "gain" in bubble.text


def test_the_theme_can_be_chosen_and_is_remembered(browser, pages):
    show(browser, pages["report"], dark=False)
    color = "return getComputedStyle(document.body).backgroundColor"
    light = script(browser, color)
    button = browser.find_element(By.ID, "theme")
    button.click()  # auto -> light
    button.click()  # light -> dark
    assert button.text == "Theme: dark"
    dark = script(browser, color)
    assert dark != light
    browser.refresh()
    assert script(browser, color) == dark
    script(browser, "localStorage.clear()")


def test_without_its_script_the_page_is_still_complete(browser, pages):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(pages["report"].as_uri())
        shown = [p.is_displayed() for p in browser.find_elements(By.CSS_SELECTOR, ".panel")]
        assert shown == [True] * 4
        assert not browser.find_element(By.CSS_SELECTOR, ".tools").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
