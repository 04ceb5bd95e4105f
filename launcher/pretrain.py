#!/usr/bin/env python
"""Pre-train a LLaMA: deepspeed launcher/pretrain.py --ds_config ds_configs/zero2.json (or torchrun, or python).

Exit codes: 0 trained to the end, 2 an error that the user can mend, 1 anything else.
"""

import os
import sys

# Threads that spin while they wait bring a machine shared with anyone else to a crawl. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def main(arguments: list[str]) -> int:
    """Parse, build, train."""
    # The checks come before the heavy imports, so that a wrong flag costs seconds.
    from sltrain_dist.utils.errors import UserError, report

    try:
        from sltrain_dist.parallel import mesh
        from sltrain_dist.train.settings import resolve

        config = resolve(arguments, mesh.launched_world_size())

        from sltrain_dist.train.build import build
        from sltrain_dist.train.loop import train

        engine = config.engine
        world = mesh.initialise(config.timeout, None, engine.tensor_parallel, engine.replicate)
        try:
            train(build(config, world))
        finally:
            mesh.close()
    except UserError as error:
        return report(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
