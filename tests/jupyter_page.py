"""python jupyter_page.py CHROMIUM URL SECONDS FOLDER: open a notebook in JupyterLab, run all its cells, print what is on the page as JSON."""
import json
import sys
from pathlib import Path

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
DONE = """() => {
    const prompts = [...document.querySelectorAll('.jp-Notebook .jp-InputPrompt')].map(p => p.innerText);
    return prompts.some(p => /\\[\\d+\\]/.test(p)) && !prompts.some(p => p.includes('*'));
}"""
FOUND = """() => {
    const all = (q, f) => [...document.querySelectorAll('.jp-OutputArea-output' + q)].map(f);
    const kind = k => all(`[data-mime-type="application/vnd.jupyter.${k}"]`, e => e.innerText);
    return {error: kind('error'), stderr: kind('stderr'), tables: all(' table', e => e.innerText),
            images: all(' img', e => [e.naturalWidth, e.naturalHeight]), links: all(' a[href]', e => [e.innerText, e.getAttribute('href')])};
}"""


def tell(text):
    print(text, file=sys.stderr, flush=True)


def main(chromium, url, seconds, folder):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        page = p.chromium.launch(executable_path=chromium, headless=True, args=FLAGS).new_page(viewport=dict(width=1400, height=1000))
        tell(f"opening {url}")
        page.goto(url, timeout=60_000)
        page.wait_for_selector(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook .jp-Cell", timeout=60_000)
        tell("waiting for the kernel")
        page.wait_for_selector("#jp-bottom-panel :text('| Idle'), .jp-StatusBar-Widget :text('| Idle')", timeout=60_000)
        page.click(".lm-MenuBar-itemLabel:text-is('Run')")
        page.click(".lm-Menu-itemLabel:text-is('Run All Cells')")
        tell("running all cells")
        try:
            page.wait_for_function(DONE, timeout=float(seconds) * 1000)
        finally:
            page.screenshot(path=Path(folder) / "page.png")
        tell("reading the page")
        print(json.dumps(page.evaluate(FOUND)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
