#!/usr/bin/env python
"""One HTML page of one or more runs, to be opened offline: python launcher/report.py runs/a runs/b [--output report.html]

Curves, memory, timing, restarts and configuration; of a run that goes on, what there is so far. Exit codes: 0 done,
2 an error that the user can mend, 1 anything else.
"""

import sys
from pathlib import Path
from typing import Any

from sltrain_dist.tools.report import check_output, make_report, write_page
from sltrain_dist.train.flags import Parser, tool_parser
from sltrain_dist.utils.errors import UserError, report

FLAGS: dict[str, dict[str, Any]] = {
    "runs": {"metavar": "RUN", "nargs": "+", "help": "folders of runs, finished or not"},
    "--output": {"metavar": "FILE", "default": "report.html", "help": "the page [report.html]"},
}


def parser() -> Parser:
    """The command line."""
    return tool_parser("report.py", __doc__, FLAGS)


def main(arguments: list[str]) -> int:
    """Parse, read, write; says where the page is and what could not be read."""
    try:
        given = parser().parse_args(arguments)
        output = Path(given.output)
        check_output(output)
        text, notes = make_report(given.runs)
        write_page(output, text)
    except UserError as error:
        return report(str(error))
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    print(f"{output}: {len(text) / 1e3:,.0f} kB, opens in any browser")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
