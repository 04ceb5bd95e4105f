"""launcher/pretrain.py with a pause in every backward pass: time to strike in the middle of a run, same arithmetic."""

import os
import runpy
import time

from torch import Tensor

backward = Tensor.backward


def paced(self: Tensor, *args: object, **kwargs: object) -> None:
    time.sleep(float(os.environ.get("PACE", "0")))
    backward(self, *args, **kwargs)


Tensor.backward = paced
runpy.run_path("launcher/pretrain.py", run_name="__main__")
