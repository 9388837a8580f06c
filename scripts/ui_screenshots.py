"""Takes the screenshots of docs/ui.md: `python scripts/ui_screenshots.py runs/<sweep>-<scale>`.

Needs a finished, mirrored and reported sweep, the UI of its runs folder (`python run.py ui`) in another terminal, and
`pip install playwright pillow` with a Chromium (`--browser`).
"""

import argparse
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from moepp.records import read_json
from moepp.tracking import pages
from moepp.tracking.mlflow_views import ARMS, TRIALS, view_key

COLOURS = 128  # keeps a screenshot below 100 kB
# MLflow opens its assistant over a third of the first page that a browser sees.
NO_ASSISTANT = "localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="directory of the sweep")
    parser.add_argument(
        "--base", help="where the UI is served; unless told, where `run.py ui` has last served the runs"
    )
    parser.add_argument("--browser", default="/usr/bin/chromium")
    parser.add_argument("--out", type=Path, default=Path("docs/ui"))
    parser.add_argument("--wait", type=float, default=6.0, help="seconds that a page takes to draw")
    options = parser.parse_args()
    base = options.base or pages.address("", pages.known_port(options.sweep.parent))
    options.out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=options.browser, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 860})
        page.add_init_script(NO_ASSISTANT)
        for name, address in addresses(base, options.sweep).items():
            _take(page, address, options.out / f"{name}.png", options.wait)
        browser.close()


def addresses(base: str, sweep: Path) -> dict[str, str]:
    """The pages by the name of their screenshot; the run is the second arm's first, compared with the baseline's."""
    plan, parent = read_json(sweep / "sweep.json"), read_json(sweep / "mlflow.json")
    seed = plan["trials"][0]["seed"]
    first = {trial["arm"]: sweep / trial["path"] for trial in plan["trials"] if trial["seed"] == seed}
    arm = next(arm for arm in first if arm != plan["baseline"])
    run, other = (read_json(first[name] / "mlflow.json")["run_id"] for name in (arm, plan["baseline"]))
    place = parent["experiment_id"]
    one = pages.run_page(base, place, run)
    return {
        "arms": pages.view_page(base, place, view_key(parent["run_id"], ARMS), charts=True),
        "arms_table": pages.view_page(base, place, view_key(parent["run_id"], ARMS)),
        "trials": pages.view_page(base, place, view_key(parent["run_id"], TRIALS)),
        "trials_charts": pages.view_page(base, place, view_key(parent["run_id"], TRIALS), charts=True),
        "report": pages.run_page(base, place, parent["run_id"]),
        "report_page": pages.report_page(base, place, parent["run_id"], next(iter(parent["sections"]))),
        "models": pages.models_page(base, place),
        "run": one,
        "run_metrics": one.replace("?", "/model-metrics?"),
        "run_system": one.replace("?", "/system-metrics?"),
        "run_artifacts": one.replace("?", "/artifacts?"),
        "compare": pages.comparison_page(base, [other, run], [place]),
    }


def _take(page: Page, address: str, file: Path, seconds: float) -> None:
    page.goto("about:blank")  # else a change behind the # does not load anew
    page.goto(address)
    page.wait_for_timeout(1000 * seconds)
    if "compare-runs" in address:  # plots of single points stand above what a user came for
        page.get_by_text("Visualizations", exact=True).click()
        page.get_by_text("Run details", exact=True).click()
        page.wait_for_timeout(500)
    if (more := page.get_by_text("Show more", exact=True)).count():
        more.first.click()
        page.wait_for_timeout(500)
    page.screenshot(path=file, timeout=30_000 * seconds)
    Image.open(file).convert("RGB").quantize(COLOURS).save(file, optimize=True)
    print(f"{file} {file.stat().st_size / 1000:.0f} kB  {page.url}")


if __name__ == "__main__":
    main()
