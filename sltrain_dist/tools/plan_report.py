"""From the planner's own flags to what it prints and writes."""

import math
from collections.abc import Sequence
from typing import Any

from sltrain_dist.tools import plan_output as output
from sltrain_dist.tools.plan import Plan, Request, parse_bytes, plan
from sltrain_dist.tools.plan_fit import fit
from sltrain_dist.train.summary import human_bytes
from sltrain_dist.utils.errors import UserError

_TFLOPS = {"cuda": 400.0, "cpu": 0.1}
_BANDWIDTH = {"cuda": 100.0, "cpu": 1.0}


def run(own: dict[str, Any], arguments: Sequence[str]) -> None:
    """Plan, print, write.

    Args:
        own: launcher/plan.py's flags. arguments: pretrain's.

    Raises:
        UserError: a flag that is wrong; a file that cannot be written; a plan above --gpu_memory.
    """
    request = _request(own, arguments)
    for flag in ("json", "png"):
        output.check_target(own[flag], f"--{flag}")
    if own["json"] and own["json"] == own["png"]:
        raise UserError(f"--json {own['json']}: is --png's file too; give two")
    if own["fit"]:
        found = fit(request)
        print(found.describe(), flush=True)
        if own["json"]:
            output.write_json(own["json"], [each.to_json() for each in found.plans])
        if own["png"]:
            output.draw(own["png"], found.plans[0])
        return
    one = plan(request)
    print(output.describe(one), flush=True)
    if own["json"]:
        output.write_json(own["json"], one.to_json())
    if own["png"]:
        output.draw(own["png"], one)
    _check_fits(one)


def _request(own: dict[str, Any], arguments: Sequence[str]) -> Request:
    device = own["device"]
    if own["gpus"] < 1:
        raise UserError(f"--gpus {own['gpus']}: must be at least 1")
    numbers = {"tflops": own["tflops"], "bandwidth": own["bandwidth"]}
    for flag, table in (("tflops", _TFLOPS), ("bandwidth", _BANDWIDTH)):
        if numbers[flag] is None:
            numbers[flag] = table[device]
        elif not 0 < numbers[flag] < math.inf:
            raise UserError(f"--{flag} {numbers[flag]:g}: must be positive")
    memory = None if own["gpu_memory"] is None else parse_bytes(own["gpu_memory"])
    if own["fit"] and memory is None:
        raise UserError("--fit: into what? add --gpu_memory 24GiB")
    return Request(tuple(arguments), own["gpus"], device, memory, **numbers)


def _check_fits(one: Plan) -> None:
    limit = one.request.gpu_memory
    if limit is not None and one.total > limit:
        raise UserError(
            f"--gpu_memory {human_bytes(limit)}: the plan takes {human_bytes(one.total)}, {human_bytes(one.total - limit)} more;"
            " --fit searches settings that fit"
        )
