"""launcher/pretrain.py with a pause in every backward pass: time to strike in the middle of a run, same arithmetic.

PACE holds the seconds, for the job's first start and those after it: "0.15,0.15" leaves the third at full speed.
"""

import os
import runpy
import time

from torch import Tensor

paces = [float(text) for text in os.environ.get("PACE", "0").split(",")]
pace = dict(enumerate(paces)).get(int(os.environ.get("SLURM_RESTART_COUNT", "0")), 0.0)
backward = Tensor.backward


def paced(self: Tensor, *args: object, **kwargs: object) -> None:
    time.sleep(pace)
    backward(self, *args, **kwargs)


Tensor.backward = paced
runpy.run_path("launcher/pretrain.py", run_name="__main__")
