"""Uses the page of a report in headless Chromium: python3 report_page.py REPORT.html [SCREENSHOTS]

Speaks the WebDriver protocol to chromedriver with nothing but the standard library. The page must hold
three models of two widths, two learning rates and two seeds on one task (tests/report.rs makes it).
"""

import base64
import json
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request


class Browser:
    """A session of chromedriver: one page of a given size."""

    def __init__(self, url, width, height, dark=False, scripts=True):
        self.root, self.id = url, None
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        arguments = (
            "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
            "--disable-component-update --disable-sync --disable-dev-shm-usage"
        ).split() + [f"--user-data-dir={self.profile.name}", f"--window-size={width},{height}"]
        chrome = {"args": arguments, "prefs": {} if scripts else {"profile.managed_default_content_settings.javascript": 2}}
        logs = {"browser": "ALL", "performance": "ALL"}
        answer = self.post("/session", capabilities={"alwaysMatch": {"goog:chromeOptions": chrome, "goog:loggingPrefs": logs}})
        self.id = answer["sessionId"]
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[scheme])
        # What the browser's own first page said and fetched is not of interest.
        self.post("/url", url="about:blank")
        self.log("browser"), self.log("performance")

    def request(self, method, path, body=None):
        path = path if self.id is None else f"/session/{self.id}{path}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.root + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from None

    def post(self, path, **body):
        return self.request("POST", path, body)

    def devtools(self, command, **parameters):
        return self.post("/goog/cdp/execute", cmd=command, params=parameters)

    def run(self, script, *arguments):
        return self.post("/execute/sync", script=script, args=list(arguments))

    def wait(self, script, what):
        """Until `script` gives something true."""
        end = time.monotonic() + 10
        while time.monotonic() < end:
            value = self.run(script)
            if value:
                return value
            time.sleep(0.05)
        raise AssertionError(f"{what}: not within 10 s")

    def key(self, name):
        """Presses a key, as a person would."""
        keys = {"type": "key", "id": "keyboard", "actions": [{"type": "keyDown", "value": name}, {"type": "keyUp", "value": name}]}
        self.post("/actions", actions=[keys])

    def click(self, selector):
        """Clicks on the middle of what `selector` names, as a pointer would."""
        self.run("document.querySelector(arguments[0]).scrollIntoView({block: 'center', behavior: 'instant'})", selector)
        found = self.post("/element", using="css selector", value=selector)
        self.post(f"/element/{next(iter(found.values()))}/click")

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self.request("GET", "/screenshot")))

    def log(self, kind):
        return self.post("/se/log", type=kind)

    def close(self):
        self.request("DELETE", "")
        self.profile.cleanup()


def check(condition, what):
    if not condition:
        raise AssertionError(what)


VISIBLE_ROWS = "return [...document.querySelectorAll(`#${arguments[0]} tbody tr`)].filter(row => row.offsetParent).length"
COLUMN = """
const table = document.querySelector(`#${arguments[0]} table`);
const at = [...table.tHead.rows[0].cells].findIndex(cell => cell.dataset.key === arguments[1]);
return [...table.tBodies[0].rows].map(row => row.cells[at].textContent);
"""
WIDTH = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
POINTS = "return document.querySelectorAll('#accuracy_by_parameters svg a').length"
FIGURES = "return document.querySelectorAll('.figure').length === document.querySelectorAll('.panels > div > svg').length"


def no_sideways(browser, what):
    wanted, given = browser.run(WIDTH)
    check(wanted <= given, f"{what}: the page is {wanted} wide in a window of {given}")


def set_select(browser, name, value):
    browser.run(
        "const s = document.querySelector(`select[name=${arguments[0]}]`); s.value = arguments[1];"
        "s.dispatchEvent(new Event('change', {bubbles: true}))", name, value)


def use(browser, name, shots):
    """What a person does with the page."""
    shot = (lambda what: browser.screenshot(shots / f"{name}-{what}.png")) if shots else (lambda what: None)
    browser.wait("return document.querySelectorAll('.card').length > 0", "the summary")
    no_sideways(browser, name)
    shot("top")
    # Figures are drawn when they come near.
    for i in range(browser.run("return document.querySelectorAll('.figure').length")):
        browser.run("document.querySelectorAll('.figure')[arguments[0]].scrollIntoView({behavior: 'instant'})", i)
        browser.wait(f"return document.querySelectorAll('.figure')[{i}].querySelector('.panels svg')", f"figure {i}")
        shot(f"figure{i}")
    check(browser.run(FIGURES), "every figure of one task has one panel")
    no_sideways(browser, f"{name}, with figures")
    check(browser.run(POINTS) == 6, "three models of two sizes are six points")

    check(browser.run(VISIBLE_ROWS, "runs") == 24 and browser.run(VISIBLE_ROWS, "settings") == 6, "all rows are there")
    browser.click("#runs th[data-key=accuracy] button")
    falling = [float(text.split()[0]) for text in browser.run(COLUMN, "runs", "accuracy")]
    check(falling == sorted(falling, reverse=True) and len(set(falling)) > 5, "numbers fall at the first click")
    browser.click("#runs th[data-key=accuracy] button")
    check(browser.run(COLUMN, "runs", "accuracy")[0] == f"{falling[-1]:.2f} %", "and rise at the second")
    browser.click("#runs th[data-key=run] button")
    names = browser.run(COLUMN, "runs", "run")
    check(names[0].startswith("gated_delta_net-16"), f"words rise at the first click: {names[0]}")
    check(browser.run("return document.querySelector('#runs th[data-key=run]').ariaSort") == "ascending", "it is announced")
    shot("sorted")

    # Filters act on figures, tables and summary.
    browser.run("document.querySelector('#filters').open = true")
    no_sideways(browser, f"{name}, with filters")
    browser.run("scrollTo(0, 0)")
    shot("filters")
    set_select(browser, "width", "16")
    check(browser.run(VISIBLE_ROWS, "runs") == 12 and browser.run(VISIBLE_ROWS, "settings") == 3, "one width")
    browser.run("document.querySelector('#accuracy_by_parameters').scrollIntoView({behavior: 'instant'})")
    browser.wait("return document.querySelectorAll('#accuracy_by_parameters svg a').length === 3", "three points are left")
    set_select(browser, "seed", "1")
    check(set(browser.run(COLUMN, "settings", "n")) >= {"1"}, "means are taken over one seed")
    check(browser.run("return document.querySelector('#shown').textContent") == "6 of 24 runs", "runs are counted")
    browser.click("button[aria-pressed]")
    check(browser.run(VISIBLE_ROWS, "runs") == 4, "one model less")
    check(browser.run("return document.querySelectorAll('.rank li:not([hidden])').length") <= 2, "in the summary too")
    browser.click("button[type=reset]")
    browser.wait("return document.querySelector('#shown').textContent === 'all 24 runs'", "the reset")
    browser.run(
        "const t = document.querySelector('input[name=text]'); t.value = 'mamba2 train.lr=0.004';"
        "t.dispatchEvent(new Event('input', {bubbles: true}))")
    browser.wait("return document.querySelector('#shown').textContent === '4 of 24 runs'", "text finds names and fields")
    browser.run("const t = document.querySelector('input[name=text]'); t.value = 'nothing';"
                "t.dispatchEvent(new Event('input', {bubbles: true}))")
    browser.wait("return document.querySelector('#shown').textContent === '0 of 24 runs'", "nothing is found")
    browser.wait("return document.querySelector('#accuracy_by_parameters .empty')", "and the figures say so")
    browser.click("button[type=reset]")
    browser.wait("return document.querySelector('#shown').textContent === 'all 24 runs'", "the second reset")
    if browser.run("return innerWidth < 500"):
        browser.run("document.querySelector('#filters').open = false")

    # From a point to its setting, to a run, and back.
    browser.run("document.querySelector('#accuracy_by_parameters').scrollIntoView({behavior: 'instant'})")
    browser.wait("return document.querySelectorAll('#accuracy_by_parameters svg a').length === 6", "the points are back")
    browser.click("#accuracy_by_parameters svg a")
    title = browser.wait("return document.querySelector('dialog[open] h2')?.textContent", "a point opens its setting")
    check("transformer · width 16" in title, title)
    browser.wait("return document.querySelector('dialog svg path.series')", "with its learning curves")
    check("highest mean validation accuracy" in browser.run("return document.querySelector('dialog').textContent").lower(), "why")
    shot("setting")
    browser.click("dialog td a[href^='#run-']")
    browser.wait("return document.querySelector('dialog h2').textContent.includes('transformer-16-0.001-s1')", "a run")
    text = browser.run("return document.querySelector('dialog').textContent")
    for part in ["train.lr", "0.001", "0123abcd", "node<1>", "test accuracy", "selectivbench train ../runs/"]:
        check(part in text, f"the run says {part}")
    browser.wait("return document.querySelector('dialog svg path.series')", "with its learning curve")
    shot("run")
    check(browser.run("const d = document.querySelector('dialog'); return d.scrollWidth <= d.clientWidth"), "it fits")
    browser.post("/back")
    browser.wait("return document.querySelector('dialog h2').textContent.includes('width 16')", "back is the setting")
    browser.key("\ue00c")
    browser.wait("return !document.querySelector('dialog').open && location.hash === ''", "Escape closes it")

    # The same with keys alone.
    browser.run("document.querySelector('#accuracy_by_parameters svg a').focus()")
    browser.key("\ue014")
    check(browser.run("return document.activeElement === document.querySelectorAll('#accuracy_by_parameters svg a')[1]"), "an arrow key moves on")
    browser.key("\ue007")
    browser.wait("return document.querySelector('dialog').open", "Enter opens")
    browser.key("\ue00c")
    browser.wait("return !document.querySelector('dialog').open", "and Escape closes again")
    no_sideways(browser, f"{name}, at the end")


def quiet(browser, page):
    """Nothing was said in the console, nothing was fetched but the page."""
    said = [entry["message"] for entry in browser.log("browser")]
    check(not said, f"the console says {said}")
    asked = set()
    for entry in browser.log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            asked.add(message["params"]["request"]["url"].split("#")[0])
    asked = {url for url in asked if not url.startswith("data:")}
    check(asked == {page}, f"the page fetched {asked}")


def main(page, shots):
    page = pathlib.Path(page).resolve().as_uri()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    loads = 0
    try:
        root = f"http://127.0.0.1:{port}"
        for _ in range(200):
            try:
                urllib.request.urlopen(root + "/status", timeout=5).close()
                break
            except OSError:
                time.sleep(0.05)
        for name, width, height, dark in [
            ("desktop", 1280, 900, False), ("desktop-dark", 1280, 900, True),
            ("phone", 360, 740, False), ("phone-dark", 360, 740, True),
        ]:
            browser = Browser(root, width, height, dark)
            try:
                browser.post("/url", url=page)
                use(browser, name, shots)
                quiet(browser, page)
                loads += 1
                # Links to a part and to a run work from elsewhere.
                browser.post("/url", url="about:blank")
                browser.post("/url", url=page + "#settings")
                browser.wait("return Math.abs(document.querySelector('#settings').getBoundingClientRect().top) < 200",
                             "a link to the settings")
                browser.post("/url", url="about:blank")
                browser.post("/url", url=page + "#run-0")
                browser.wait("return document.querySelector('dialog')?.open", "a link to a run")
                if name == "desktop":
                    printed = browser.post("/print")
                    check(len(base64.b64decode(printed)) > 20000, "it prints")
                    if shots:
                        (shots / "print.pdf").write_bytes(base64.b64decode(printed))
                    loads += 1
            finally:
                browser.close()
        # Without scripts there are the tables and static figures.
        browser = Browser(root, 1280, 900, scripts=False)
        try:
            browser.post("/url", url=page)
            check(browser.run(VISIBLE_ROWS, "runs") == 24, "tables need no script")
            static = "const all = [...document.querySelectorAll('.plots')]; return all.length >= 4 && all.every(one => one.querySelector('noscript > svg'))"
            check(browser.run(static), "nor do figures")
            check(browser.run("return document.querySelector('#filters').hidden"), "what needs one is not shown")
            if shots:
                browser.screenshot(shots / "no-script.png")
            quiet(browser, page)
            loads += 1
        finally:
            browser.close()
    finally:
        driver.terminate()
        driver.wait()
    print(json.dumps({"loads": loads}))


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    folder = pathlib.Path(sys.argv[2]) if len(sys.argv) == 3 else None
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    main(sys.argv[1], folder)
