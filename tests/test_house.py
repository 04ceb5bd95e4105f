"""Rules of the house that no linter checks: who may import what, lengths of files, and the README's claims."""

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sltrain_dist"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "launcher").glob("*.py")])


def imported(path, *, top_level):
    """Modules that a file imports, at its top level only or anywhere."""
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_file(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    part = path.relative_to(ROOT).parts
    if part[0] == "sltrain_dist" and part[1] not in ("parallel", "train"):
        assert not [name for name in imported(path, top_level=False) if "torch.distributed" in name]
    optional = {"deepspeed", "bitsandbytes", "datasets", "transformers", "wandb", "apex",
                "flash_attn", "matplotlib", "tensorboard"}  # fmt: skip
    if path.name != "zero.py":
        at_import = {name.split(".")[0] for name in imported(path, top_level=True)}
        assert not at_import & optional, "imported before it is used"


def test_trains_without_the_optional_packages(tmp_path):
    """torch, numpy, tokenizers and safetensors alone must train under --engine fsdp on local text."""
    missing = "deepspeed transformers datasets wandb tensorboard matplotlib psutil bitsandbytes"
    block = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({missing.split()!r}))\n"
        "from tests.launcher import tiny\n"
        "from launcher.pretrain import main\n"
        "from pathlib import Path\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "tiny.write_inputs(folder)\n"
        "sys.exit(main(tiny.flags(folder, folder / 'run', tracker='auto', num_training_steps=3)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", block],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "tracker none" in done.stdout
    assert "matplotlib is not installed" in done.stdout
    assert (tmp_path / "run" / "latest").read_text().strip() == "step_3"


def test_readme_names_what_exists():
    text = (ROOT / "README.md").read_text()
    assert text.index("make pretrain") < text.index("make test") < text.index("##")
    from sltrain_dist.train.flags import FLAGS

    others = {"num_gpus", "standalone", "nproc_per_node", "nodes", "help"}
    for name in (
        "generate",
        "evaluate",
        "export",
        "import_weights",
        "convert_checkpoint",
        "plan",
        "report",
        "doctor",
    ):
        parser = importlib.import_module(f"launcher.{name}").parser()
        others |= {option.removeprefix("--") for option in parser._option_string_actions}
    flags = set(re.findall(r"--([a-z][a-z0-9_]+)", text))
    assert flags <= set(FLAGS) | others
    for path in re.findall(r"(?:launcher|benchmarks|docs|ds_configs|slurm)/[\w./]+\w", text):
        assert (ROOT / path).exists() or "{" in path, path


def test_recipes_are_presets():
    recipes = json.loads((PACKAGE / "presets" / "recipes.json").read_text())
    from sltrain_dist.config import ModelConfig
    from sltrain_dist.train.flags import FLAGS

    for name, recipe in recipes.items():
        assert name in ModelConfig.presets()
        assert set(recipe) <= set(FLAGS)
