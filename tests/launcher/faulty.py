"""launcher/pretrain.py with faults planted: python faulty.py FLAGS, told by environment variables.

FAULTY_NAN     "5:9": the losses of the batches from number 5 to 8 are not finite (counted as data is, from 0)
FAULTY_SPIKE   "7": the loss of batch 7 is fifty times what it is
FAULTY_RANK    "1": the losses above are changed on this rank only
FAULTY_BATCHES a folder: every rank writes number and checksum of each of its batches to batches-RANK there
FAULTY_PAUSE   "3:evaluation": write a file "paused" into the folder FAULTY_FOLDER and wait for its removal,
               before batch 3, or before the first batch of an evaluation
"""

import math
import os
import sys
import time
import zlib
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from sltrain_dist.utils import interrupt

    interrupt.install()

from launcher import pretrain
from sltrain_dist.train import evaluate, loop

update, evaluated = loop.update, evaluate.evaluate


def meant(name, batch):
    text = os.environ.get(name, "-1:-1")
    if "%" in text:
        first, every = map(int, text.split("%"))
        return batch % every == first
    first, _, last = text.partition(":")
    return batch in range(int(first), int(last or int(first) + 1))


def pause(place):
    folder = os.environ.get("FAULTY_FOLDER")
    if folder and place in os.environ.get("FAULTY_PAUSE", "").split():
        marker = Path(folder) / f"paused-{os.environ.get('RANK', '0')}"
        marker.touch()
        while marker.exists():
            time.sleep(0.02)


def faulty_update(run, micro_batches, lr, **options):
    pause(f"{run.position}")
    factor = 1.0
    if os.environ.get("FAULTY_RANK", str(run.mesh.rank)) != str(run.mesh.rank):
        pass
    elif meant("FAULTY_NAN", run.position):
        factor = math.nan
    elif meant("FAULTY_SPIKE", run.position):
        factor = 50.0
    if folder := os.environ.get("FAULTY_BATCHES"):
        tokens = b"".join(batch["tokens"].numpy().tobytes() for batch in micro_batches)
        with open(f"{folder}/batches-{run.mesh.rank}", "a") as file:
            file.write(f"{run.position} {zlib.crc32(tokens)}\n")
    slow, _, seconds = os.environ.get("FAULTY_SLOW", "-1:0").partition(":")
    if run.mesh.rank == int(slow):
        time.sleep(float(seconds))
    hook = run.engine.module.register_forward_hook(lambda module, args, loss: loss * factor)
    try:
        return update(run, micro_batches, lr, **options)
    finally:
        hook.remove()


def faulty_evaluate(*args):
    pause("evaluation")
    return evaluated(*args)


if __name__ == "__main__":
    loop.update, loop.evaluate = faulty_update, faulty_evaluate
    code = pretrain.main(sys.argv[1:])
    interrupt.ignore()
    sys.exit(code)
