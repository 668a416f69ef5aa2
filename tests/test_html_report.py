"""validation_report.html: what it says, that nothing in it can run or call out, and how it behaves
in a real browser (headless Chromium, where there is one)."""

from __future__ import annotations

import base64
import copy
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import final_validation
from taskvec.reports import html as htmlreport
from taskvec.reports.html import validation_page
from tests.checks import edit_tensors
from tests.models import make_adapter, make_base

PAGE = "validation_report.html"
PRECISIONS = ("fp32", "fp16", "bf16")
DAMAGED = "model.layers.1.self_attn.q_proj.weight"
HOSTILE = '"><script>alert(1)</script><img src=//evil.example/x onerror=alert(2)>\u202e\x07\ud800'


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge that holds in three precisions below good/, and a damaged one judged below bad/."""
    root = tmp_path_factory.mktemp("pages")
    base = make_base(root / "base", "starcoder2")
    lora = make_adapter(root / "lora", base)
    final_validation.validate(str(base), str(lora), root / "good", behaviour=False)
    shutil.copytree(root / "good" / "merged_model_fp32", root / "damaged")

    def damage(tensors: dict[str, Any]) -> None:
        tensors[DAMAGED][3, 5] += 1.0

    edit_tensors(root / "damaged" / "model.safetensors", damage)
    final_validation.validate(
        str(base), str(lora), root / "bad", finetuned_model=str(root / "damaged"), behaviour=False
    )
    return root


def parts(directory: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, bytes]]:
    """The page's three inputs, read from the files beside it."""
    document = json.loads((directory / "validation_summary.json").read_text())
    comparisons = {}
    for label in document["precisions"]:
        name = "comparison_results" if label == "given" else f"comparison_results_{label}"
        comparisons[label] = json.loads((directory / name / "comparison_results.json").read_text())
    return document, comparisons, {f: (directory / f).read_bytes() for f in document["figures"]}


class Reader(HTMLParser):
    """The tags of a page with their attributes, and its text outside style and script."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._skip = 0
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._skip += tag in ("style", "script")

    def handle_endtag(self, tag: str) -> None:
        self._skip -= tag in ("style", "script")

    def handle_data(self, data: str) -> None:
        self.text += "" if self._skip else data


# What the page says


def test_it_is_rendered_from_the_json_alone(root: Path) -> None:
    assert validation_page(*parts(root / "good")) == (root / "good" / PAGE).read_text()


def test_the_verdict_comes_first_and_every_section_after_it(root: Path) -> None:
    for name, verdict in (("good", "Validation successful"), ("bad", "Validation failed")):
        page = (root / name / PAGE).read_text()
        first = re.search(r"<h1>(.*?)</h1>", page, re.S)
        assert first and verdict in first[1]
        ids = re.findall(r'<section id="(\w+)"', page)
        expected = ["precision", "figures", "parameters", "certificate", "behaviour", "files"]
        assert ids == (["diagnosis"] if name == "bad" else []) + expected
        assert page.index("<h1>") < page.index("<section")


def test_every_parameter_of_every_precision_is_in_the_table_without_javascript(root: Path) -> None:
    document, comparisons, _ = parts(root / "good")
    page = (root / "good" / PAGE).read_text()
    rows = re.findall(r'<tr data-k="(\w+)"><th scope="row">([^<]+)</th><td>(\w+)</td>', page)
    assert sorted(rows) == sorted(
        (entry["attribution"], name, label)
        for label in PRECISIONS
        for name, entry in comparisons[label]["parameters"].items()
    )
    assert len(rows) == 3 * document["precisions"]["fp32"]["total_parameters"]


def test_numbers_sort_by_the_value_in_the_json(root: Path) -> None:
    _, comparisons, _ = parts(root / "good")
    lora = comparisons["fp16"]["parameters"][DAMAGED]["lora"]
    row = next(r for r in htmlreport.rows(comparisons) if (r.name, r.label) == (DAMAGED, "fp16"))
    titles = [column.title for column in htmlreport.COLUMNS]
    keys = {title: cell.key for title, cell in zip(titles, row.cells, strict=True)}
    assert keys["Cosine"] == lora["cosine_similarity"]
    assert keys["Error"] == lora["relative_error"]
    assert keys["Shape"] == 32 * 32


def test_what_failed_is_named_first_with_its_diagnosis(root: Path) -> None:
    page = Reader((root / "bad" / PAGE).read_text()).text
    document, comparisons, _ = parts(root / "bad")
    (cause,) = document["precisions"]["given"]["certificate"]["diagnosis"]
    assert cause["sentence"] in page
    assert DAMAGED in page[: page.index("What each precision")]
    first = htmlreport.rows(comparisons)[0]
    assert first.failed and first.name == DAMAGED


def test_every_figure_is_embedded_once_with_a_text_for_those_who_do_not_see_it(root: Path) -> None:
    document, _, images = parts(root / "good")
    shown = [a for tag, a in Reader((root / "good" / PAGE).read_text()).tags if tag == "img"]
    embedded = [base64.b64decode((a["src"] or "").split(",")[1]) for a in shown]
    assert len(set(embedded)) == len(embedded)
    per_precision = {"cosine_similarity_analysis.png", "norm_distribution_comparison.png"}
    for file, image in images.items():
        if "/" not in file or Path(file).name in per_precision:
            assert image in embedded, file
    titles = {figure["title"] for figure in document["figures"].values()}
    assert {(a["alt"] or "").split(". ")[0] for a in shown} <= {t.split(". ")[0] for t in titles}


def test_captions_say_what_to_see(root: Path) -> None:
    document, _, _ = parts(root / "good")
    report = " ".join((root / "good" / "validation_report.txt").read_text().split())
    page = Reader((root / "good" / PAGE).read_text()).text
    for figure in document["figures"].values():
        assert figure["caption"] in page
        assert figure["caption"] in report


def test_behaviour_and_versions(root: Path) -> None:
    document, comparisons, images = parts(root / "good")
    agreement = {
        "max_logit_difference": 2.5e-5, "mean_kl": 8.7e-13, "max_kl": 5.2e-12,
        "equal_top1": 0.875, "positions": 148,
    }  # fmt: skip
    document["behaviour"] = {"fp32": {"merged": agreement, "base_plus_task_vector": agreement}}
    page = validation_page(document, comparisons, images)
    row = "fp32: base plus task vector|2.50e-05|8.70e-13|5.20e-12|87.5 %|148"
    assert row in re.sub(r"</t[hd]><td>", "|", page)
    text = " ".join(Reader(page).text.split())
    for library, version in document["versions"].items():
        assert f"{library} {version}" in text


# What the page may not do


def hostile_parts(root: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, bytes]]:
    """A damaged merge whose parameter, paths and reasons have markup and control codes."""
    document, comparisons, images = copy.deepcopy(parts(root / "bad"))
    content = comparisons["given"]
    content["parameters"][HOSTILE] = content["parameters"].pop(DAMAGED)
    for summary in (content["summary"], document["precisions"]["given"]):
        summary["certificate"]["violated_parameters"] = [HOSTILE]
        summary["certificate"]["reason"] = f"{HOSTILE} is wrong"
        summary["certificate"]["worst"]["parameter"] = HOSTILE
        summary["certificate"]["diagnosis"] = [{"cause": "x", "sentence": HOSTILE}]
    document["failures"] = [HOSTILE]
    document["inputs"].update(base_model=HOSTILE, lora_path=HOSTILE, judged=HOSTILE)
    document["behaviour"] = {"skipped": HOSTILE}
    return document, comparisons, images


def test_names_from_untrusted_files_stay_text(root: Path) -> None:
    page = validation_page(*hostile_parts(root))
    reader = Reader(page)
    tags = [tag for tag, _ in reader.tags]
    assert tags.count("script") == 1
    assert not [a for _, attributes in reader.tags for a in attributes if a.startswith("on")]
    assert all((a["src"] or "").startswith("data:") for tag, a in reader.tags if tag == "img")
    assert "<script>alert(1)</script>" in reader.text  # as text
    for letter in "\u202e\x07\ud800":
        assert letter not in page
    assert r"\u202e\x07\ud800" in reader.text
    page.encode("utf-8")


def test_nothing_is_loaded_from_elsewhere(root: Path) -> None:
    for tag, attributes in Reader((root / "good" / PAGE).read_text()).tags:
        for name in ("src", "href", "action", "srcset", "data", "poster"):
            value = attributes.get(name) or ""
            assert "//" not in value or value.startswith("data:image/png;base64,"), (tag, value)
            assert value[:5] == "data:" or ":" not in value, (tag, value)


def test_a_model_with_too_many_parameters_says_what_is_left_out(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(htmlreport, "MOST_ROWS", 10)
    document, comparisons, images = parts(root / "good")
    total = 3 * document["precisions"]["fp32"]["total_parameters"]
    page = validation_page(document, comparisons, images)
    assert page.count("<tr data-k") == 10
    assert f"{total - 10} more are in comparison_results.json" in page


# In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium; its log and its network requests are recorded."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if not chromium or not chromedriver:
        pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--disable-dev-shm-usage", f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(chromedriver))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[[Path], Any]]:
    """Opens a page at desktop width; afterwards nothing was logged and nothing was requested."""

    def get(page: Path) -> Any:
        _sized(browser, 1280)
        browser.get_log("browser"), browser.get_log("performance")
        browser.get(page.as_uri())
        return browser

    yield get
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"]) for entry in browser.get_log("performance")]
    requests = [
        event["message"]["params"]["request"]["url"]
        for event in messages
        if event["message"]["method"] == "Network.requestWillBeSent"
    ]
    assert requests
    assert [url for url in requests if url.split(":")[0] not in ("file", "data")] == []


def _sized(driver: Any, width: int, height: int = 900) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def _by_id(driver: Any, name: str) -> Any:
    return driver.find_element("id", name)


def _column(driver: Any, title: str) -> list[str]:
    """What a column shows, row by row."""
    cells: list[str] = driver.execute_script(
        """const { tHead, tBodies } = document.getElementById("table");
        const at = [...tHead.rows[0].cells].findIndex((head) => head.textContent === arguments[0]);
        return [...tBodies[0].rows].map((row) => row.cells[at].textContent);""",
        title,
    )
    return cells


def _sort(driver: Any, title: str) -> None:
    """Click on a column's heading, wherever it is scrolled to."""
    for button in driver.find_elements("css selector", "#table thead button"):
        if button.get_attribute("textContent") == title:
            driver.execute_script("arguments[0].click()", button)


def test_the_table_sorts_by_every_column(root: Path, opened: Callable[[Path], Any]) -> None:
    driver = opened(root / "good" / PAGE)
    for index, head in enumerate(driver.find_elements("css selector", "#table thead th")):
        button = head.find_element("tag name", "button")
        is_number = head.get_attribute("data-type") == "number"
        for direction in ("descending", "ascending") if is_number else ("ascending", "descending"):
            driver.execute_script("arguments[0].click()", button)
            assert head.get_attribute("aria-sort") == direction
            marked = driver.find_elements("css selector", "th[aria-sort]")
            assert marked == [head]
            cells = driver.execute_script(
                """const cells = [...document.getElementById("table").tBodies[0].rows].map(
                    (row) => row.cells[arguments[0]]);
                return cells.map((cell) => [cell.dataset.v ?? null, cell.textContent]);""",
                index,
            )
            if is_number:
                values = [float(value) for value, _ in cells if value is not None]
                assert values == sorted(values, reverse=direction == "descending")
                missing = [value is None for value, _ in cells]
                assert missing == sorted(missing)  # what has no value is last both ways
            else:
                texts = [text for _, text in cells]
                assert texts[0] == (min if direction == "ascending" else max)(texts)


def test_layer_2_comes_before_layer_10(root: Path, opened: Callable[[Path], Any], tmp_path) -> None:
    document, comparisons, images = parts(root / "good")
    entry = comparisons["fp32"]["parameters"][DAMAGED]
    for content in comparisons.values():
        content["parameters"] = {f"layers.{i}.weight": entry for i in (10, 2, 1)}
    page = tmp_path / PAGE
    page.write_text(validation_page(document, comparisons, images))
    driver = opened(page)
    names = ["layers.1.weight", "layers.2.weight", "layers.10.weight"]
    assert _column(driver, "Parameter") == names * 3
    _sort(driver, "Parameter")
    assert _column(driver, "Parameter") == [name for name in names for _ in range(3)]


def test_the_table_filters_by_text_kind_and_precision(
    root: Path, opened: Callable[[Path], Any]
) -> None:
    driver = opened(root / "good" / PAGE)
    total = 3 * parts(root / "good")[0]["precisions"]["fp32"]["total_parameters"]
    assert len(_column(driver, "Parameter")) == total
    _by_id(driver, "words").send_keys("LAYERS.1 q_proj")
    assert set(_column(driver, "Parameter")) == {DAMAGED, DAMAGED.replace("weight", "bias")}
    assert f"6 rows (of {total})" in _by_id(driver, "count").text
    _by_id(driver, "kind").send_keys("adapter")
    assert _column(driver, "Parameter") == [DAMAGED] * 3
    _by_id(driver, "label").send_keys("fp16")
    assert _column(driver, "Precision") == ["fp16"]
    assert _by_id(driver, "count").get_attribute("aria-live") == "polite"
    _by_id(driver, "reset").click()
    assert len(_column(driver, "Parameter")) == total


def test_what_fails_can_be_filtered_for(root: Path, opened: Callable[[Path], Any]) -> None:
    driver = opened(root / "bad" / PAGE)
    _by_id(driver, "kind").send_keys("fails")
    assert _column(driver, "Parameter") == [DAMAGED]
    assert driver.find_element("tag name", "h1").text == "✗ Validation failed"


def test_everything_is_reached_by_keyboard(root: Path, opened: Callable[[Path], Any]) -> None:
    from selenium.webdriver.common.keys import Keys

    driver = opened(root / "good" / PAGE)

    def press(*keys: str) -> Any:
        for key in keys:
            driver.switch_to.active_element.send_keys(key)
        return driver.switch_to.active_element

    driver.find_element("tag name", "body").send_keys(Keys.TAB)
    assert driver.switch_to.active_element.get_attribute("class") == "skip"
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert driver.execute_script(outline) == "solid"
    press(Keys.ENTER)
    assert press(Keys.TAB).get_attribute("id") == "words"
    press("q_proj")
    assert press(Keys.TAB).get_attribute("id") == "kind"
    assert press(Keys.TAB).get_attribute("id") == "label"
    assert press(Keys.TAB).get_attribute("id") == "reset"
    assert "tall" in press(Keys.TAB).get_attribute("class")  # the table scrolls by arrow keys
    button = press(Keys.TAB)
    assert button.tag_name == "button" and driver.execute_script(outline) == "solid"
    press(Keys.ENTER)
    assert driver.find_element("css selector", "th[aria-sort]").text.startswith("Parameter")
    for control in driver.find_elements("css selector", "input, select"):
        assert control.accessible_name
    for region in driver.find_elements("css selector", "[role=region]"):
        assert region.accessible_name or not region.is_displayed()


@pytest.mark.parametrize("name", ["good", "bad"])
@pytest.mark.parametrize("width", [320, 360, 768])
def test_no_page_scrolls_sideways(
    root: Path, opened: Callable[[Path], Any], name: str, width: int
) -> None:
    driver = opened(root / name / PAGE)
    _sized(driver, width, 740)
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_in_light_and_dark(
    root: Path, opened: Callable[[Path], Any], scheme: str
) -> None:
    """WCAG 2 contrast of at least 4.5 between each text and what lies behind it."""
    driver = opened(root / "bad" / PAGE)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    pairs = driver.execute_script(
        """const behind = (e) => { for (; e; e = e.parentElement) {
            const c = getComputedStyle(e).backgroundColor;
            if (!c.startsWith("rgba(0, 0, 0, 0")) return c; } return "rgb(255, 255, 255)"; };
        const some = "h1, h2, .answer, .note, figcaption, nav a, dt, dd, td, th, .controls label";
        return [...document.querySelectorAll(some)].map(
            (e) => [e.className + e.tagName, getComputedStyle(e).color, behind(e)]);"""
    )
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})

    def luminance(color: str) -> float:
        channels = [int(value) / 255 for value in re.findall(r"\d+", color)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    darkest = min(luminance(paper) for _, _, paper in pairs)
    assert (darkest < 0.05) == (scheme == "dark")
    for what, ink, paper in pairs:
        low, high = sorted((luminance(ink), luminance(paper)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (what, ink, paper)


def test_hostile_names_run_nothing(root: Path, opened: Callable[[Path], Any], tmp_path) -> None:
    page = tmp_path / PAGE
    page.write_text(validation_page(*hostile_parts(root)), encoding="utf-8")
    driver = opened(page)
    assert not driver.find_elements("css selector", "img:not([src^=data])")
    assert _column(driver, "Parameter")[0].startswith('"><script>alert(1)</script>')


def test_thousands_of_rows_stay_quick(
    root: Path, opened: Callable[[Path], Any], tmp_path: Path
) -> None:
    """Only so many rows are laid out until more are asked for, and all of them sort."""
    document, comparisons, images = parts(root / "good")
    entry = comparisons["fp32"]["parameters"][DAMAGED]
    for content in comparisons.values():
        content["parameters"] = {
            f"model.layers.{i}.weight": {**entry, "task_vector_norm": (i * 7919) % 1000 / 1000}
            for i in range(1000)
        }
    page = tmp_path / PAGE
    page.write_text(validation_page(document, comparisons, images))
    driver = opened(page)
    assert len(_column(driver, "Parameter")) == 500
    assert "500 of 3,000" in _by_id(driver, "count").text
    _sort(driver, "‖T‖")
    assert [float(text) for text in _column(driver, "‖T‖")[:6]] == [0.999] * 3 + [0.998] * 3
    for rows in (2000, 3000):
        driver.execute_script("arguments[0].click()", _by_id(driver, "more"))
        assert len(_column(driver, "Parameter")) == rows
    assert not _by_id(driver, "more").is_displayed()


def test_it_prints_every_figure_and_repeats_the_headings(
    root: Path, opened: Callable[[Path], Any], tmp_path: Path
) -> None:
    driver = opened(root / "good" / PAGE)
    assert driver.find_elements("css selector", "#figures details:not([open])")
    options = {"preferCSSPageSize": True, "generateTaggedPDF": False}
    printed = driver.execute_cdp_cmd("Page.printToPDF", options)["data"]
    pdf = base64.b64decode(printed)
    assert pdf.startswith(b"%PDF-")
    assert not driver.find_elements("css selector", "#figures details[open] + details[open]")
    embedded = len(driver.find_elements("tag name", "img"))
    assert len(re.findall(rb"/Subtype\s*/Image", pdf)) >= embedded
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    styles = driver.execute_script(
        """const style = (s) => getComputedStyle(document.querySelector(s));
        return [style("#controls").display, style("nav").display, style("#table thead").display,
                style("figure").breakInside, style("#table thead button").display];"""
    )
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert styles == ["none", "none", "table-header-group", "avoid", "contents"]
    if pdftotext := shutil.which("pdftotext"):
        (tmp_path / "page.pdf").write_bytes(pdf)
        text = subprocess.run(
            [pdftotext, "-layout", str(tmp_path / "page.pdf"), "-"], capture_output=True, check=True
        ).stdout.decode()
        pages = [page for page in text.split("\f") if "self_attn.q_proj.weight" in page]
        tables = [page for page in pages if page.count("self_attn") > 3]
        assert len(tables) >= 2
        assert all("Why it changed" in page for page in tables)


def test_it_can_be_read_without_javascript(root: Path, opened: Callable[[Path], Any]) -> None:
    driver = opened(root / "good" / PAGE)
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    driver.refresh()
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert not _by_id(driver, "controls").is_displayed()
    assert not driver.find_elements("css selector", "#table thead button")
    total = 3 * parts(root / "good")[0]["precisions"]["fp32"]["total_parameters"]
    assert len(driver.find_elements("css selector", "#table tbody tr")) == total
