#!/usr/bin/env python
"""Is this launch healthy? pretrain.py's flags, under the same launcher: torchrun ... launcher/doctor.py FLAGS.

Looks at versions, GPUs, connections, clocks, disk, text, kernels, memory, support and checkpoint on all ranks, then
trains a few updates, is killed, resumes and reshards. Prints a row for each with the mend where one failed.
--slurm JOB.sbatch [FLAGS] does it inside a job; --dry_run [RANKS] plans the run on imagined ranks of a login node.
Exit codes: 0 all passed, 2 something to mend (torchrun makes a 1 of it), 1 anything else; with --slurm the job's.
"""

import os
import sys
from pathlib import Path
from typing import Any

# Threads that spin while they wait bring a machine shared with anyone else to a crawl. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# What torch's C++ has to say about a rank that does not come, the doctor says in one line.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")

from sltrain_dist.train.flags import Parser, tool_parser

FLAGS: dict[str, dict[str, Any]] = {
    "--json": {"metavar": "FILE", "help": "write the table there, too"},
    "--skip": {"metavar": "NAME,...", "help": "checks to leave out, such as trial"},
    "--meet_timeout": {"type": float, "default": 60.0, "help": "seconds to wait for all ranks [60]"},
    "--trial_timeout": {"type": float, "default": 600.0, "help": "seconds of each of the trial's three runs [600]"},
    "--gpu_memory": {"metavar": "SIZE", "help": "of a rank, as 24GiB; derived: what its GPU, or its share of the host, has free"},
    "--slurm": {"metavar": "SCRIPT", "help": "submit this job script with the doctor in place of pretrain.py, show its output; sbatch's flags may stand before it: \"--nodes=2 slurm/pretrain_7b.sbatch\""},
    "--dry_run": {"nargs": "?", "type": int, "const": 0, "metavar": "RANKS", "help": "plan the run on imagined ranks instead"},
}  # fmt: skip


def parser() -> Parser:
    """The command line."""
    return tool_parser("doctor.py", __doc__, FLAGS)


def main(arguments: list[str]) -> int:
    """Parse, examine, print."""
    from sltrain_dist.utils.errors import UserError, report

    try:
        given, rest = parser().parse_known_args(arguments)
        if given.slurm is not None or given.dry_run is not None:
            from sltrain_dist.tools import doctor_slurm

            return doctor_slurm.run(vars(given), arguments)

        from sltrain_dist.tools.doctor import run

        return run(vars(given), rest, Path(__file__).with_name("pretrain.py"))
    except UserError as error:
        return report(str(error))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
