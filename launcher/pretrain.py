#!/usr/bin/env python
"""Pre-train a LLaMA: deepspeed launcher/pretrain.py --ds_config ds_configs/zero2.json (or torchrun, or python).

With --dry_run [RANKS] it plans the run on imagined ranks instead (launcher/plan.py), and trains nothing.
Exit codes: 0 trained to the end; 2 an error that the user can mend; 75 a signal (SIGUSR1, SIGTERM, SIGINT) asked for the
end and everything is saved: start it again with --continue_from auto; 1 anything else; 128 + n a second signal n.
Torchrun takes 75 for a fault: where it would restart its workers they end with 0, and heartbeat.json says "interrupted".
"""

import contextlib
import os
import sys

if __name__ == "__main__":  # before the heavy imports: a signal may come at any moment
    from sltrain_dist.utils import interrupt

    interrupt.install()

# Read when torch is imported. Threads that spin while they wait bring a machine shared with anyone else to a crawl.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # collectives that the flight recorder keeps
os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # its profiler is not to say when it starts


def main(arguments: list[str]) -> int:
    """Parse, build, train."""
    # The checks come before the heavy imports, so that a wrong flag costs seconds.
    from sltrain_dist.utils.errors import FaultError, UserError, report
    from sltrain_dist.utils.interrupt import REQUEUE, InterruptError

    try:
        if any(argument.partition("=")[0] == "--dry_run" for argument in arguments):
            from sltrain_dist.tools.doctor_slurm import dry_run

            return dry_run(arguments)

        from sltrain_dist.parallel import mesh
        from sltrain_dist.train.settings import resolve

        config = resolve(arguments, mesh.launched_world_size())

        from sltrain_dist.train.build import build
        from sltrain_dist.train.liveness import end_soon
        from sltrain_dist.train.loop import train

        engine = config.engine
        world = mesh.initialise(config.timeout, None, engine.tensor_parallel, engine.replicate)
        try:
            train(build(config, world))
        except FaultError as error:
            end_soon()  # closing the groups may wait for the dead: say first what happened
            return report(str(error), 1, error.speaks)
        finally:
            mesh.close()
    except UserError as error:
        return report(str(error))
    except InterruptError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            with contextlib.suppress(OSError):  # the launcher that read it may be what is gone
                print(f"interrupted by {error}", flush=True)
        left = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) - int(
            os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        )
        return 0 if left > 0 else REQUEUE
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    interrupt.ignore()  # launchers send a signal to the rank that ends last, and take its end for the outcome
    sys.exit(code)
