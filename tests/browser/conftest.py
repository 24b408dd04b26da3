"""A headless Chromium for the pages a person looks at.

HIGHRANK_SWEEP=<sweep folder> looks at that sweep instead of a tiny one; HIGHRANK_SCREENSHOTS=<folder> keeps pictures.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

NEEDED = {"chromium": shutil.which("chromium"), "chromedriver": shutil.which("chromedriver")}
VISIBLE = """
const found = [];
const walk = (node) => {
  if (node.matches && node.matches(arguments[0]) && node.checkVisibility()) found.push(node);
  if (node.shadowRoot) walk(node.shadowRoot);
  node.childNodes.forEach(walk);
};
walk(document.body);
return found;
"""


class Browser:
    """Chromium with no way to any other machine."""

    def __init__(self):
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = NEEDED["chromium"]
        for word in (
            "--headless=new",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--force-color-profile=srgb",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            *(["--no-sandbox"] if os.geteuid() == 0 else []),
        ):
            options.add_argument(word)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(NEEDED["chromedriver"]))
        self.driver.set_script_timeout(120)

    def open(self, address, width, height=900):
        """Opens an address in a window of `width` x `height` CSS pixels, as on a phone below 600."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get("about:blank")
        self.driver.get_log("browser")
        self.driver.get(address)

    def errors(self):
        """Returns what the console says went wrong since the page was opened."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def origins(self):
        """Returns the origins of everything the page loaded."""
        return set(self("return performance.getEntriesByType('resource').map((each) => new URL(each.name).origin)"))

    def find(self, selector):
        """Returns the elements of a selector that can be seen, those inside web components too."""
        return self(VISIBLE, selector)

    def wait(self, condition, timeout_s=60):
        """Returns the first true value of `condition()`."""
        from selenium.common.exceptions import StaleElementReferenceException

        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            try:
                if found := condition():
                    return found
            except StaleElementReferenceException:  # the page drew it anew meanwhile
                pass
            time.sleep(0.2)
        raise TimeoutError(self.driver.find_element("tag name", "body").text[:2000])

    def keep(self, name):
        """Saves what is seen, if pictures are wanted."""
        if folder := os.environ.get("HIGHRANK_SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.driver.save_screenshot(str(Path(folder) / f"{name}.png"))

    def __call__(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)


@pytest.fixture(scope="session")
def browser():
    missing = [name for name, path in NEEDED.items() if path is None]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)}: apt-get install chromium chromium-driver")
    pytest.importorskip("selenium", reason="no selenium: pip install -e '.[test]'")
    started = Browser()
    yield started
    started.driver.quit()


@pytest.fixture(scope="session")
def sweep(request):
    given = os.environ.get("HIGHRANK_SWEEP")
    return Path(given) if given else request.getfixturevalue("tiny_sweep")


@pytest.fixture(scope="session")
def tensorboard(sweep, tmp_path_factory):
    """Returns the address of a TensorBoard on the sweep, on a free port of this machine."""
    log = tmp_path_factory.mktemp("tensorboard") / "log.txt"
    command = ["-m", "tensorboard.main", "--logdir", str(sweep), "--host", "127.0.0.1", "--port", "0"]
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, *command], stdout=out, stderr=out)
    try:
        end = time.monotonic() + 120
        while not (found := re.search(r"http://127\.0\.0\.1:\d+/", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield found[0]
    finally:
        process.terminate()
        process.wait()
