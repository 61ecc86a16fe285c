"""Clicks through the microscope in JupyterLab: run by test_microscope.py in a Python that has jupyterlab and playwright."""
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import sync_playwright

PORT = 8873
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


@contextlib.contextmanager
def lab(folder):
    "JupyterLab in a folder, until the block ends."
    options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={PORT}", "--IdentityProvider.token=", "--ServerApp.password=", f"--notebook-dir={folder}",
               "--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with open(folder / "lab.log", "w") as log:
        process = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], stdout=log, stderr=subprocess.STDOUT,
                                   env=os.environ | dict(JUPYTER_PATH=str(folder / "jupyter"), JUPYTERLAB_SETTINGS_DIR=str(folder / "settings")))
    try:
        for _ in range(120):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/api/status", timeout=1)
                break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{PORT}/lab/tree"
    finally:
        process.terminate()
        process.wait(20)


def set_theme(folder, theme):
    "Write the user's settings, which JupyterLab reads when its page is loaded."
    place = folder / "settings/@jupyterlab/apputils-extension"
    place.mkdir(parents=True, exist_ok=True)
    (place / "themes.jupyterlab-settings").write_text(json.dumps(dict(theme=f"JupyterLab {theme.title()}")))
    (place / "notification.jupyterlab-settings").write_text(json.dumps(dict(fetchNews="false")))


def use(page, folder, theme):
    "Run the notebook and click; each step waits for what it should bring."
    box = page.locator(".fs-microscope").first

    def shows(text):
        box.locator(".fs-view", has_text=text).first.wait_for(timeout=20000)

    def button(name):
        return box.get_by_role("button", name=re.compile(f"{name}$"))  # an icon is a letter before it

    box.wait_for(timeout=120000)
    shows("sample 0 of")
    button("Next").click()
    shows("shares its row with")
    field = box.get_by_label("text", exact=True)
    field.fill("糖尿病")
    field.press("Enter")
    shows("filters: text 糖尿病")
    shows("sample 5 of")
    box.get_by_label("cut", exact=True).check()
    button("Search").click()
    shows("tokens lost")
    page.screenshot(path=str(folder / f"{theme}_cut.png"), full_page=True)
    box.get_by_label("template", exact=True).fill("ziya")
    button("Compare").click()
    shows("<human>")
    button("All samples").click()
    box.locator("svg rect").first.wait_for(timeout=20000)
    box.get_by_text("the same in Python").click()
    box.get_by_text("View(data).find(text='糖尿病', cut=True)").wait_for(timeout=20000)
    too_wide = box.evaluate("b => b.scrollWidth - b.clientWidth")
    assert too_wide <= 1, f"the microscope is {too_wide} pixels wider than its cell"
    chip = box.locator(".fs-chip").first
    assert "position" in chip.get_attribute("title"), chip.get_attribute("title")
    colours = chip.evaluate("c => [getComputedStyle(c).color, getComputedStyle(document.body).getPropertyValue('--jp-layout-color0')]")
    print(theme, colours)
    page.screenshot(path=str(folder / f"{theme}_compare.png"), full_page=True)


def main(folder):
    "Both themes, one after the other."
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with lab(folder) as address, sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=chromium, args=QUIET)
        page = browser.new_page(viewport=dict(width=1400, height=1500))
        for theme in ("light", "dark"):
            set_theme(folder, theme)
            page.goto(f"{address}/{theme}.ipynb?reset", timeout=60000)
            page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=60000)
            time.sleep(2)
            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
            use(page, folder, theme)
            alone = browser.new_page(viewport=dict(width=700, height=1000), color_scheme=theme, java_script_enabled=False)
            alone.goto((folder / "page.html").as_uri())
            alone.locator(".fs-row").first.wait_for(timeout=20000)
            alone.screenshot(path=str(folder / f"{theme}_page.png"))
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
