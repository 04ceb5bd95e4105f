"""A report of runs: one HTML page that holds its data, its style and its script, and asks the network for nothing.

The page's parts lie in report_page/. Texts of runs come from anywhere (names, tags, commands, reasons of failures), so
they travel as JSON that cannot end the element it stands in, and the script shows them as text, never as markup. A
content security policy in the page allows this one script, by its hash, and no connection at all.
"""

import base64
import hashlib
import html
import json
import os
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sltrain_dist import __version__
from sltrain_dist.tools.report_read import read_runs
from sltrain_dist.tools.report_shape import shape_run
from sltrain_dist.utils.errors import UserError

_PAGE = Path(__file__).parent / "report_page"
_SCRIPTS = ("format.js", "chart.js", "tables.js", "page.js")


def make_report(folders: Sequence[str], now: float | None = None) -> tuple[str, list[str]]:
    """The page, and what a person should be told of what could not be read.

    Raises:
        UserError: a folder that is no run's.
    """
    now = time.time() if now is None else now
    runs = read_runs(folders)
    shaped = [shape_run(run, now) for run in runs]
    notes = [
        f"{run.folder / name}: {count} {'line' if count == 1 else 'lines'} could not be read"
        for run in runs
        for name, count in run.unread.items()
    ]
    return page({"version": __version__, "written": now, "runs": shaped}), notes


def page(data: dict[str, Any]) -> str:
    """The HTML of ``data``; one pass over the template, so that nothing in the data is taken for a slot of it."""
    script = "\n".join((_PAGE / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    names = ", ".join(run["name"] for run in data["runs"])
    slots = {
        "title": html.escape(names if len(names) < 100 else f"{len(data['runs'])} runs"),
        "style": (_PAGE / "page.css").read_text(encoding="utf-8"),
        "script": script,
        "script_hash": f"sha256-{digest}",
        "data": embedded(data),
    }
    template = (_PAGE / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: slots[match[1]], template)


def embedded(data: object) -> str:
    """JSON that can stand inside a script element: no <, > or &, and nothing outside ASCII."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def check_output(path: Path) -> None:
    """Refuse a place where the page could not be written, before anything is read.

    Raises:
        UserError: a folder, a name that is no page's, or a folder that cannot be written in.
    """
    folder = path.absolute().parent
    if path.is_dir():
        problem = "is a folder; give a file in it, such as report.html"
    elif path.suffix not in (".html", ".htm"):  # a run's own file must not be lost to a slip
        problem = "give a name that ends in .html"
    elif not folder.is_dir():
        problem = f"there is no folder {folder}; make it first"
    else:
        try:
            tempfile.TemporaryFile(dir=folder).close()
            if path.exists():
                open(path, "ab").close()
        except OSError as error:
            problem = f"cannot be written ({error.strerror}); give another file"
        else:
            return
    raise UserError(f"--output {path}: {problem}")


def write_page(path: Path, text: str) -> None:
    """Write aside, then rename: a browser that reloads finds the old page or the new one.

    Raises:
        UserError: the disk refuses.
    """
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        raise UserError(f"--output {path}: cannot be written ({error.strerror})") from None
