"""What launcher/convert_checkpoint.py --list prints, from the data of checkpoint_report."""

import json
from collections.abc import Sequence
from typing import Any

from sltrain_dist.train.summary import human_bytes


def run_table(rows: list[dict[str, Any]]) -> str:
    """The checkpoints of a run, one a line."""
    cells = [
        (
            row["name"] + (" (latest)" if row["latest"] else ""),
            "-" if row["step"] is None else f"{row['step']:,}",
            "-" if row["age"] is None else _age(row["age"]),
            "-" if row["bytes"] is None else human_bytes(row["bytes"]),
            "whole" if row["fault"] is None else f"damaged: {row['fault']}",
        )
        for row in rows
    ]
    heads = ("checkpoint", "step", "age", "size", "files, by their sizes")
    return "\n".join(_columns([heads, *cells]))


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def checkpoint_table(report: dict[str, Any]) -> str:
    """A checkpoint: its tensors, totals by kind, and what the run was."""
    tensors = [
        (
            tensor["name"],
            " x ".join(map(str, tensor["shape"])) or "scalar",
            tensor["dtype"],
            f"{tensor['bytes']:,}",
            str(len(tensor["files"])),
        )
        for tensor in report["tensors"]
    ]
    totals = [
        (kind, f"{total['tensors']} tensors", f"{total['elements']:,} elements", human_bytes(total["bytes"]))
        for kind, total in report["totals"].items()
    ]  # fmt: skip
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    about = [
        ("step", f"{report['step']:,} updates, {report['tokens_seen']:,} tokens"),
        ("model", f"{report['model']}, method {report['method']}, support hash {report['support_hash']}"),
        ("saved by", f"{report['world_size']} ranks of engine {report['engine']}, tensor parallel {report['tensor_parallel']}"),
        ("versions", versions),
        ("data", json.dumps(report["data"])),
        ("size", f"{human_bytes(report['bytes'])} in {report['files']} files"
         + (", weights only" if report["weights_only"] else "")),
    ]  # fmt: skip
    table = _columns([("tensor", "shape", "dtype", "bytes", "files"), *tensors])
    return "\n".join([*table, "", *_columns(totals), "", *_columns(about)])


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
