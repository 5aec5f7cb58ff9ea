"""python docs_page.py CHROMIUM PAGE FOLDER: open a static page without a network, use the ledger's filters, print what is shown as JSON."""
import json
import sys
from pathlib import Path

from jupyter_page import FLAGS

SHOWN = "() => [...document.querySelectorAll('#ledger tbody tr:not(.hidden)')].map(r => r.id)"


def main(chromium, file, folder):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        context = p.chromium.launch(executable_path=chromium, headless=True, args=FLAGS).new_context(offline=True, viewport=dict(width=1400, height=1000))
        page, asked, errors = context.new_page(), [], []
        page.on("request", lambda r: asked.append(r.url))
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.goto(Path(file).resolve().as_uri(), timeout=60_000)
        found = dict(all=page.evaluate(SHOWN), told=page.inner_text("#ledger .told"))
        page.screenshot(path=Path(folder) / "front.png")
        page.select_option("#ledger select[name=paper]", "BL")
        page.select_option("#ledger select[name=printed]", "contradicts")
        found["against"] = page.evaluate(SHOWN)
        page.click("#ledger tr#BL-27 summary")
        found["opened"] = page.inner_text("#ledger tr#BL-27 details")
        page.locator("#ledger").scroll_into_view_if_needed()
        page.screenshot(path=Path(folder) / "ledger.png")
        page.select_option("#ledger select[name=paper]", "")
        page.select_option("#ledger select[name=printed]", "")
        page.fill("#ledger input[name=text]", "timeception")
        found["searched"] = page.evaluate(SHOWN)
        print(json.dumps(found | dict(asked=[u for u in asked if not u.startswith(("file:", "data:"))], errors=errors)))


main(*sys.argv[1:])
