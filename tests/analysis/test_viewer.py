"""The page of recorded decodes: whole, safe, the same bytes each time, and working in a browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from eesd.analysis.viewer import write_viewer
from eesd.errors import EesdError

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=20000",
]
# Drives the page as a person would and leaves what it saw in the document.
DRIVE = """
const saw = {errors: window.errors};
const set = (id, value) => { find(id).value = value; find(id).dispatchEvent(new Event("change")); };
saw.runs = [...find("run").options].map(option => option.value);
saw.methods = [...find("method").options].map(option => option.value);
set("method", "eesd");
saw.text = [...document.querySelectorAll("#output .token")].map(token => token.textContent).join("");
saw.kinds = [...document.querySelectorAll("#output .token")].map(token => token.className.replace("token ", ""));
saw.rounds = find("rounds").tBodies[0].rows.length;
const rejected = document.querySelector("#output .rejected");
// A headless window may lack the focus that would make focus() tell the page.
const tell = name => rejected.dispatchEvent(new FocusEvent(name));
rejected.focus();
saw.focusable = document.activeElement === rejected;
tell("focus");
saw.tip = find("tip").hidden ? "" : find("tip").textContent;
tell("blur");
saw.gone = find("tip").hidden;
const key = name => document.body.dispatchEvent(new KeyboardEvent("keydown", {key: name, bubbles: true}));
key("ArrowLeft");
key("ArrowLeft");
saw.back = document.querySelectorAll("#output .future").length;
key(" ");
saw.playing = find("play").textContent;
find("theme").click();
saw.theme = document.documentElement.dataset.theme;
setTimeout(() => {
  saw.status = find("status").textContent;
  const made = document.createElement("pre");
  made.id = "saw";
  made.textContent = JSON.stringify(saw);
  document.body.append(made);
}, 8000);
"""


def view(method: str, rounds: list[dict], item: str = "asdiv-1", group: str = "main") -> dict:
    facts = {"model": "m", "dtype": "float32", "device_name": "a machine", "threads": 2, "engine": "torch"}
    prompt = "Two & </script><b>two</b>?"
    same = {"task": "asdiv", "group": group, "item": item, "prompt": prompt, "first": "It", **facts}
    return {**same, "method": method, "rounds": rounds, "decode_s": rounds[-1]["s"], "commit": "abc"}


def draft(text: str, q: float | None = 0.5, p: float = 0.4) -> dict:
    return {"text": text, "q": q, "p": p}


def one(drafts: list[dict], accepted: int, text: str | None, s: float, kept: int | None = None) -> dict:
    kept = accepted if kept is None else kept
    return {"drafts": drafts, "accepted": accepted, "kept": kept, "text": text, "stop": "controller", "s": s}


@pytest.fixture
def views(tmp_path: Path) -> Path:
    rows = [
        view("vanilla", [one([], 0, text, 0.1 * i) for i, text in enumerate([" is", " four", ".", "!"], 1)]),
        view(
            "eesd",
            [
                one([draft(" is"), draft(" 5", None, 0.01)], 1, " four", 0.12),
                one([draft("."), draft("!")], 2, None, 0.2),
            ],
        ),
        # Of another group, whose decodes are no rivals of these.
        view("eesd", [one([], 0, text, 0.1 * i) for i, text in enumerate([" five", "."], 1)], group="other"),
    ]
    path = tmp_path / "views.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_page_is_whole_and_safe(views: Path, tmp_path: Path):
    write_viewer([views], tmp_path / "a.html")
    write_viewer([views], tmp_path / "b.html")
    page = (tmp_path / "a.html").read_text()
    assert page == (tmp_path / "b.html").read_text()
    assert "/*STYLE*/" not in page and "/*SCRIPT*/" not in page and "/*DATA*/" not in page
    assert page.count("</script>") == 2, "no text of a model ends an element"
    assert not re.search(r"(src|href)=[\"'](?!#)", page) and "://" not in page, "nothing comes from a network"
    assert 'lang="en"' in page and 'aria-live="polite"' in page and page.count("<label") >= 6
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert [row["method"] for row in data] == ["vanilla", "eesd", "eesd"]
    assert [row["tokens"] for row in data] == [5, 5, 3]


def test_a_file_that_is_no_view_is_named(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"model": "m"}\n')
    with pytest.raises(EesdError, match=r"rows.jsonl:1: no 'group'"):
        write_viewer([path], tmp_path / "out.html")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here; Debian and Ubuntu have it as package chromium")
def test_it_works_in_a_browser(views: Path, tmp_path: Path):
    write_viewer([views], tmp_path / "viewer.html")
    watch = "<script>window.errors = []; addEventListener('error', e => errors.push(e.message));</script>"
    page = (tmp_path / "viewer.html").read_text().replace("<head>", "<head>" + watch, 1)
    driven = tmp_path / "driven.html"
    driven.write_text(page.replace("</body>", f"<script>{DRIVE}</script></body>"))
    command = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", driven.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False).stdout
    saw = json.loads(html.unescape(re.search(r'<pre id="saw">(.*?)</pre>', dom, re.S)[1]))
    assert saw["errors"] == []
    assert saw["runs"] == ["m, main", "m, other"]
    assert saw["methods"] == ["vanilla", "eesd"]
    assert saw["text"] == "It is four.!"
    assert saw["kinds"] == ["plain", "accepted", "corrected", "accepted", "accepted"]
    assert saw["rounds"] == 2
    assert saw["focusable"], "rejected drafts are reached by keyboard"
    assert "5" in saw["tip"] and "copied" in saw["tip"] and "1.0 %" in saw["tip"] and saw["gone"]
    assert saw["back"] == 2, "two rounds back, two tokens are yet to come"
    assert saw["playing"] == "Pause" and saw["theme"] in ("dark", "light")
    assert "0.20 s" in saw["status"] and "2.00 times as fast" in saw["status"]
