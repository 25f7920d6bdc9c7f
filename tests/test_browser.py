import os
import re
import shutil

import pytest

from tests.conftest import BACKEND
from tvkeras import zoo

pytestmark = pytest.mark.skipif(BACKEND != "tensorflow", reason="pages are the same on all")

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--no-first-run", "--disable-quic"),
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium, driven by Selenium."""
    programs = shutil.which("chromium"), shutil.which("chromedriver")
    if None in programs:
        if os.environ.get("CI"):
            pytest.fail("chromium and chromedriver are missing: `.ci/run` installs them")
        pytest.skip("needs chromium and chromedriver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    yield driver
    driver.quit()


@pytest.fixture
def leaderboard(browser, pages):
    """The leaderboard in the browser, as it opens."""
    browser.set_window_size(1250, 900)
    browser.get((pages / "index.html").as_uri())
    return browser


def cells(leaderboard, section, column):
    """The text of a column of a section's table, in the order shown."""
    script = """
        const table = document.querySelectorAll("section")[arguments[0]].querySelector("table");
        return [...table.tBodies[0].rows].map((row) => row.cells[arguments[1]].textContent);
    """
    return leaderboard.execute_script(script, section, column)


def visible(leaderboard, selector):
    """Text of the elements that can be seen."""
    found = leaderboard.find_elements("css selector", selector)
    return [element.text for element in found if element.is_displayed()]


def choose(leaderboard, name, value):
    select = leaderboard.find_element("name", name)
    select.find_element("xpath", f"option[.='{value}']").click()


def test_figures_are_loaded_and_nothing_is_wrong(leaderboard, pages):
    for name in zoo.names():
        leaderboard.get((pages / "index.html").as_uri())
        leaderboard.find_element("link text", name).click()
        sizes = leaderboard.execute_script("return [...document.images].map((i) => i.naturalWidth)")
        assert len(sizes) == len(zoo.card(name).figures)
        assert min(sizes) > 0
        leaderboard.find_element("link text", "All models").click()
        assert leaderboard.title.startswith("tvkeras zoo")
    assert leaderboard.get_log("browser") == []


def test_a_script_that_gets_into_a_page_does_not_run(leaderboard, pages):
    inject = """
        const script = document.createElement("script");
        script.textContent = "window.ran = true";
        document.head.append(script);
        document.body.innerHTML += "<img src=x onerror='window.ran = true'>";
        return window.ran === true;
    """
    for file in ("index.html", "digits_tv_lip/index.html"):
        leaderboard.get((pages / file).as_uri())
        assert not leaderboard.execute_script(inject)
        assert len(leaderboard.get_log("browser")) >= 2


def test_a_heading_sorts_its_table_both_ways_the_unreliable_last(leaderboard):
    leaderboard.execute_script("""
        const row = document.querySelector("section tbody tr");
        row.classList.add("unreliable");
        row.parentElement.append(row);
    """)
    last = cells(leaderboard, 0, 0)[-1]
    buttons = leaderboard.find_elements("css selector", "section:first-of-type thead button")
    clean = [button.text for button in buttons].index("Clean")
    button = buttons[clean]
    heading = button.find_element("xpath", "..")
    for press in (button.click, lambda: button.send_keys("\n")):  # by mouse, by keyboard
        press()
        ascending = heading.get_attribute("aria-sort") == "ascending"
        found = [float(text) for text in cells(leaderboard, 0, clean)][:-1]
        assert found == sorted(found, reverse=not ascending)
        assert len(set(found)) > 1
        assert (
            len(leaderboard.find_elements("css selector", "section:first-of-type [aria-sort]")) == 1
        )
        assert cells(leaderboard, 0, 0)[-1] == last
    assert not ascending


def test_filters_leave_what_was_asked_for(leaderboard):
    everything = visible(leaderboard, "h2")
    rows = len(visible(leaderboard, "tbody tr"))
    assert visible(leaderboard, "output") == [f"{rows} rows"]
    assert len(visible(leaderboard, ".point")) == rows  # a point for each
    choose(leaderboard, "norm", "l2")
    assert visible(leaderboard, "h2") == [title for title in everything if title.endswith(", l2")]
    choose(leaderboard, "network", "small_cnn")
    assert set(visible(leaderboard, "tbody td:nth-child(2)")) == {"small_cnn"}
    assert len(visible(leaderboard, ".point")) == len(visible(leaderboard, "tbody tr"))
    small = [about for about in map(zoo.card, zoo.names()) if about.model["model"] == "small_cnn"]
    assert visible(leaderboard, "h2") == sorted({f"{about.dataset}, l2" for about in small})
    assert visible(leaderboard, "output") == [f"{len(small)} rows"]
    choose(leaderboard, "norm", "all")
    choose(leaderboard, "network", "all")
    assert len(visible(leaderboard, "tbody tr")) == rows


def test_keys_reach_filters_headings_and_models(leaderboard):
    reached = set()
    for _ in range(25):
        leaderboard.switch_to.active_element.send_keys("\t")
        reached.add(leaderboard.switch_to.active_element.tag_name)
    assert {"select", "button", "a"} <= reached


@pytest.mark.parametrize("page", ["index.html", "digits_tv_lip/index.html"])
def test_a_narrow_screen_scrolls_in_tables_alone(leaderboard, pages, page):
    metrics = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    leaderboard.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        leaderboard.get((pages / page).as_uri())
        width = leaderboard.execute_script("return document.documentElement.scrollWidth")
    finally:
        leaderboard.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert width <= 360


def test_a_narrow_screen_shows_names_whole_and_all_errors(leaderboard, pages):
    metrics = {"width": 390, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    leaderboard.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        leaderboard.get((pages / "index.html").as_uri())
        edges = leaderboard.execute_script("""
            return [...document.querySelectorAll("section th a, .attacked")].map((element) => {
                const box = element.getBoundingClientRect();
                return [box.left, box.right, box.width, element.getClientRects().length];
            });
        """)
    finally:
        leaderboard.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    for left, right, width, lines in edges:
        assert 0 <= left < right <= 390
        assert width > 0
        assert lines == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground_in_light_and_dark(leaderboard, pages, scheme):
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    leaderboard.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    try:
        leaderboard.get((pages / "index.html").as_uri())
        colours = leaderboard.execute_script("""
            const probe = document.createElement("span");
            probe.style.color = "Canvas";
            document.body.append(probe);
            const texts = [document.querySelector("td"), document.querySelector(".scatter text")];
            const used = texts.map((text) => {
                const style = getComputedStyle(text);
                return text.tagName === "TD" ? style.color : style.fill;
            });
            return [getComputedStyle(probe).color, ...used];
        """)
    finally:
        leaderboard.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    ground, *texts = (
        sum(int(part) for part in re.findall(r"\d+", colour)[:3]) / 765 for colour in colours
    )
    assert (ground < 0.5) == (scheme == "dark")
    for text in texts:
        assert abs(text - ground) > 0.6


def test_without_scripts_the_tables_stand(leaderboard, pages):
    leaderboard.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        leaderboard.get((pages / "index.html").as_uri())
        assert visible(leaderboard, "form") == []
        assert set(zoo.names()) <= set(visible(leaderboard, "tbody a"))
    finally:
        leaderboard.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
