"""The built site in a real browser: every page, at the width of a telephone and of a desk; and its search.

`make docs` builds it; Chromium and its driver are those of the system.
"""

import functools
import http.server
import os
import pathlib
import re
import shutil
import threading
import urllib.parse

import griffe
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from docs import site_hooks
from docs.site_docstrings import as_markdown

ROOT = pathlib.Path(__file__).parents[2]
SITE = ROOT / "build" / "site"
PAGES = sorted(str(path.parent.relative_to(SITE)) for path in SITE.rglob("index.html"))
WIDTHS = (360, 1280)
# What a reader would see of a page: pictures that did not come, and how far it is wider than the window, by what.
SEEN = """
const wide = [...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1);
return {
  missing: [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src),
  overflow: document.documentElement.scrollWidth - innerWidth,
  wide: wide.slice(0, 3).map(e => e.tagName + '.' + e.className)
};
"""


class _Quiet(http.server.SimpleHTTPRequestHandler):
  def log_message(self, *_):
    pass


@pytest.fixture(scope="module")
def address():
  assert SITE.is_dir(), "make docs builds the site"
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(SITE)))
  threading.Thread(target=server.serve_forever, daemon=True).start()
  yield f"http://127.0.0.1:{server.server_address[1]}/"
  server.shutdown()
  server.server_close()


@pytest.fixture(scope="module")
def browser():
  options = webdriver.ChromeOptions()
  options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
  # Nothing outside this machine is reached: a page that asks for a script or a font from elsewhere logs an error.
  for argument in (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
  ):
    options.add_argument(argument)
  options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
  driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
  yield driver
  driver.quit()


def _resize(browser, width):
  """The width of what is shown, which a headless window does not have by itself."""
  metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
  browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def _shoot(browser, name):
  """Keeps a screenshot where SCREENSHOTS says."""
  if "SCREENSHOTS" in os.environ:
    folder = pathlib.Path(os.environ["SCREENSHOTS"])
    folder.mkdir(parents=True, exist_ok=True)
    browser.save_screenshot(str(folder / f"{name}.png"))


@pytest.mark.parametrize("width", WIDTHS)
def test_every_page_is_whole(browser, address, width):
  _resize(browser, width)
  faults = []
  for page in PAGES:
    browser.get(urllib.parse.urljoin(address, f"{page}/" if page != "." else ""))
    seen = browser.execute_script(SEEN)
    said = [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    if seen["missing"] or seen["overflow"] > 0 or said:
      faults.append((page, seen, said))
    _shoot(browser, f"{width}-{page.replace('/', '-')}")
  assert len(PAGES) > 50 and faults == []


@pytest.mark.parametrize("words", ["rkd_angle", "UPGrad", "exit code 75"])
def test_search_finds(browser, address, words):
  _resize(browser, 1280)
  browser.get(f"{address}?q={urllib.parse.quote(words)}")
  found = lambda driver: driver.find_elements(By.CSS_SELECTOR, ".md-search-result__item a")
  WebDriverWait(browser, 30).until(lambda driver: found(driver))
  text = " ".join(link.get_attribute("textContent") for link in found(browser)).lower()
  assert words.split()[0].lower() in text
  _shoot(browser, f"search-{words.split()[0]}")


def test_the_reference_has_every_public_name():
  package = griffe.load("kdflax", search_paths=[str(ROOT)])
  for name in package.exports:
    page = (SITE / "reference" / name / "index.html").read_text()
    missing = [member for member in site_hooks.public(package[name]) if f'id="kdflax.{name}.{member}"' not in page]
    assert missing == [], name


def test_nothing_is_asked_of_elsewhere():
  """No page loads a script, a style or a font from another address."""
  loads = re.compile(
    r'<(?:script|img|iframe)[^>]*\bsrc="(?:https?:)?//|<link[^>]*rel="(?:stylesheet|preconnect)"[^>]*//'
  )
  assert [str(path) for path in SITE.rglob("*.html") if loads.search(path.read_text())] == []


def test_arguments_that_share_a_text_are_listed_apart():
  shown = as_markdown("Adds.\n\nArgs:\n  a, b: numbers,\n    or none.")
  assert shown.endswith("Args:\n  a: numbers,\n    or none.\n  b: numbers,\n    or none.")


def test_docstrings_become_markdown():
  text = 'A loss.\n\n  a + b\n  c\n\nArgs:\n  a: it.\n\nReference: A B, "T", 2020, arXiv 2001.00001. Theirs\ndiffers.'
  shown = as_markdown(text)
  assert "```text\na + b\nc\n```" in shown and "Args:\n  a: it." in shown
  assert "[arXiv 2001.00001](https://arxiv.org/abs/2001.00001). Theirs differs." in shown
