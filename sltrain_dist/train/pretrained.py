"""Weights of a model wherever they stand: a run, one of its checkpoints, a factored export, an HF LLaMA folder.

    run folder     the step_N that its ``latest`` names
    step_N         verified byte by byte; offsets are made again and their hash compared
    factored       launcher/export.py --to factored, launcher/import_weights.py: verified byte by byte, and
                   its offsets by the hash of the support they were written with
    hf             config.json of a LLaMA beside safetensors or pytorch_model.bin: method "full"

All four answer with the names of `Llama.named_parameters` (offsets included) and whole physical
tensors, padding zero, one tensor at a time. ``tools.weights`` makes a model of them.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import Tensor

from sltrain_dist.config import DataConfig, MethodConfig, ModelConfig
from sltrain_dist.data.cache import Cache
from sltrain_dist.data.tokenizer import Tokenizer, load_tokenizer
from sltrain_dist.params import ParameterSpec
from sltrain_dist.params.initial import SupportOffsets
from sltrain_dist.train.checkpoint import FORMAT
from sltrain_dist.train.checkpoint_folder import (
    STATE,
    TEMPORARY,
    DamagedError,
    digest,
    entries,
    file_problem,
    is_checkpoint_name,
    no_folder,
    read_latest,
    read_manifest,
    strangers,
)
from sltrain_dist.train.parameter_names import (
    blank_specs,
    check_names,
    generated_hash,
    is_ignored,
    logical_shape,
    stored_hash,
    whole_offsets,
)
from sltrain_dist.train.stored_tensors import Safetensors, StoredError, TensorFiles, open_weights
from sltrain_dist.utils.errors import UserError

FACTORED = "sltrain_dist factored 1"  # "format" in the config.json of a factored folder
CONFIG = "config.json"
Kind = Literal["checkpoint", "factored", "hf", "reference"]  # the last: tools.import_reference
Config = TypeVar("Config", ModelConfig, MethodConfig, DataConfig)


@dataclass(frozen=True)
class Pretrained:
    """Open weights. ``path`` is the folder that holds the tensors, ``flag`` the one that named it.

    shapes: physical and global, in the order of the model's parameters.
    generated: whether offsets are our generator's own for ``method.seed`` (those of an imported
    reference checkpoint are not). support_hash: params.partial_hash summed over layers.
    """

    kind: Kind
    path: Path
    flag: str
    model: ModelConfig
    method: MethodConfig
    tokenizer: Tokenizer | None
    shapes: dict[str, tuple[int, ...]]
    generated: bool
    support_hash: int
    read: Callable[[str], Tensor]

    def names(self) -> list[str]:
        """Names of all parameters, as `Llama.named_parameters` gives them."""
        return list(self.shapes)

    def tensor(self, name: str) -> Tensor:
        """One whole parameter on the CPU: offsets in their integer dtype, others as stored.

        Raises:
            UserError: the file cannot be read any more.
        """
        try:
            return self.read(name)
        except StoredError as error:
            raise UserError(f"{self.flag} {self.path}: {error}") from None


def open_pretrained(path: str | Path, flag: str, *, verify: bool = True) -> Pretrained:
    """Open a run folder, a step_N folder, a factored folder or an HF LLaMA folder.

    Args:
        path: the folder.
        flag: named in errors, as "--model".
        verify: compare checksums and the support's hash; False where another rank has just done it.

    Raises:
        UserError: no such folder, none of the four, damaged, tensors missing, left over or of another
            shape than the configuration says.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(
            f"{flag} {path}: {no_folder(folder)}; give a run, one of its step_N, an export or an HF LLaMA folder"
        )
    try:
        if folder.resolve().name.endswith(TEMPORARY):
            raise UserError(f"{flag} {folder}: a save that never finished; give its parent folder")
        if (folder / STATE).is_file() or is_checkpoint_name(folder.resolve().name):
            return _open_checkpoint(folder, flag, verify)
        if listed := entries(folder):
            newest = read_latest(folder) or listed[-1].folder.name
            return _open_checkpoint(folder / newest, flag, verify)
        config = read_config(folder, flag)
        if "format" in config:
            return _open_factored(folder, config, flag, verify)
        if (folder / "splora_config.json").is_file():
            raise UserError(
                f"{flag} {folder}: a checkpoint of the reference implementation; convert it with "
                "launcher/import_weights.py --from reference"
            )
        return _open_hf(folder, flag)
    except StoredError as error:
        raise UserError(f"{flag} {folder}: {error}") from None
    except OSError as error:
        raise UserError(f"{flag} {folder}: not readable ({error.strerror})") from None


def read_config(folder: Path, flag: str) -> dict[str, Any]:
    """The config.json of a folder; raises UserError where it is no JSON object."""
    try:
        document = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{flag} {folder}: holds no {CONFIG} and no step_N; give a run, one of its step_N, an export or an "
            "HF LLaMA folder"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{flag} {folder}: {CONFIG} is not readable ({error})") from None
    if not isinstance(document, dict):
        raise UserError(f"{flag} {folder}: {CONFIG} is no JSON object")
    return document


def _make(kind: type[Config], document: Any, where: str) -> Config:
    """A configuration from its JSON; one that a later version wrote is refused."""
    known = {field.name for field in dataclasses.fields(kind)}
    if not isinstance(document, dict) or not set(document) <= known:
        raise StoredError(f"{where}: of another version of this format")
    try:
        return kind(**document)
    except TypeError:
        raise StoredError(f"{where}: of another version of this format") from None


def _open_checkpoint(folder: Path, flag: str, verify: bool) -> Pretrained:
    try:
        manifest = read_manifest(folder)
    except DamagedError as error:
        raise UserError(f"{flag} {folder}: damaged ({error}); give an older step_N") from None
    problems = strangers(folder, manifest)
    if verify and not problems:
        found = (file_problem(folder, name, entry) for name, entry in manifest.files.items())
        problems = [problem for problem in found if problem]
    if problems:
        raise UserError(f"{flag} {folder}: damaged ({problems[0]}); give an older step_N")
    document = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if document.get("format") != FORMAT:
        raise StoredError(f"format {document.get('format')!r}, this version reads {FORMAT!r}")
    model = _make(ModelConfig, document["model"], "model")
    method = _make(MethodConfig, document["method"], "method")
    specs = blank_specs(model, method)
    files = Safetensors(folder / name for name in manifest.files if name.endswith(".safetensors"))
    prefix = "model."
    stored = {
        name.removeprefix(prefix): shape
        for name, shape in files.shapes.items()
        if name.startswith(prefix)
    }
    wanted = {name: spec.shape for name, spec in specs.items() if spec.kind != "indices"}
    check_names(wanted, stored, STATE)
    support_hash = int(document["support_hash"], 16)
    if verify and support_hash != (again := generated_hash(specs, method.seed)):
        raise StoredError(
            f"of another support: hash {document['support_hash']}, made again {again:016x}"
        )

    def read(name: str) -> Tensor:
        if specs[name].kind == "indices":
            return whole_offsets(specs[name], method.seed, name)
        return files.read(prefix + name)

    shapes = {name: spec.shape for name, spec in specs.items()}
    places = (folder, folder.resolve().parent)  # the first: of a converted checkpoint
    found_tokenizers = (open_tokenizer(place) for place in places)
    tokenizer = next(filter(None, found_tokenizers), None) or _cached_tokenizer(document, model)
    return Pretrained(
        "checkpoint", folder, flag, model, method, tokenizer, shapes, True, support_hash, read
    )


def _open_factored(folder: Path, config: dict[str, Any], flag: str, verify: bool) -> Pretrained:
    if config["format"] != FACTORED:
        raise StoredError(f"format {config['format']!r}, this version reads {FACTORED!r}")
    if config.get("seal") != seal(config):
        raise StoredError(f"damaged ({CONFIG}: checksum differs)")
    try:
        records = {name: (item["bytes"], item["sha256"]) for name, item in config["files"].items()}
        model = _make(ModelConfig, config["model"], "model")
        method = _make(MethodConfig, config["method"], "method")
        generated, support_hash = bool(config["generated"]), int(config["support_hash"], 16)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise StoredError(f"{CONFIG}: of another version of this format") from None
    _check_listed(folder, records)
    for name, record in records.items() if verify else ():
        if problem := file_problem(folder, name, record):
            raise StoredError(f"damaged ({problem})")
    specs = blank_specs(model, method)
    files = open_weights(folder)
    wanted = {name: spec.shape for name, spec in specs.items()}
    if not generated and method.support == "uniform":  # another rounding of density * out * in
        for name in [name for name in wanted if name.endswith(".offsets")]:
            size = files.shapes.get(name, wanted[name])[:1]
            wanted[name] = wanted[name.removesuffix("offsets") + "values"] = size
    check_names(wanted, files.shapes, CONFIG)
    read = _checked_reader(files, specs)
    if verify:
        _check_support(specs, method.seed, read, generated, support_hash)
    return Pretrained(
        "factored", folder, flag, model, method, open_tokenizer(folder), wanted, generated, support_hash, read
    )  # fmt: skip


def _check_listed(folder: Path, records: dict[str, Any]) -> None:
    """Refuse weights that the sealed configuration does not list: they would be read in place of those it does."""
    for name in records:
        if Path(name).name != name or name in ("", ".", "..") or "\\" in name:
            raise StoredError(f"{CONFIG} lists {name!r}, which is no file of this folder")
    for pattern in ("*.safetensors", "*.bin", "*.index.json"):
        for path in sorted(folder.glob(pattern)):
            if path.name not in records:
                raise StoredError(f"{path.name}: not listed in {CONFIG}; take it away")


def _check_support(
    specs: dict[str, ParameterSpec],
    seed: int,
    read: Callable[[str], Tensor],
    generated: bool,
    support_hash: int,
) -> None:
    """Compare the offsets of a factored folder with the hash it was written with; one layer in memory at a time.

    Raises:
        StoredError: they, or those that our generator makes for ``seed``, are of another support; offsets
            outside their tiles, or twice in one (those of a generated support are its generator's).
    """

    def distinct(name: str) -> Tensor:
        offsets = read(name)
        ordered = offsets.sort(dim=-1).values
        if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
            raise StoredError(f"tensor {name} holds an offset twice")
        return offsets

    found = stored_hash(specs, seed, read if generated else distinct)
    if found != support_hash:
        raise StoredError(
            f"of another support: hash {support_hash:016x}, of the offsets in the files {found:016x}"
        )
    if generated and support_hash != (again := generated_hash(specs, seed)):
        raise StoredError(f"of another support: hash {support_hash:016x}, made again {again:016x}")


def seal(config: dict[str, Any]) -> str:
    """The checksum of a factored folder's configuration, itself left out."""
    document = {name: value for name, value in config.items() if name != "seal"}
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def file_records(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file of a folder, as ``files`` of a factored configuration has them."""
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": digest(path)}
        for path in sorted(folder.iterdir())
    }


def _checked_reader(files: TensorFiles, specs: dict[str, ParameterSpec]) -> Callable[[str], Tensor]:
    """Reads tensors, and refuses offsets that would point outside their matrix."""

    def read(name: str) -> Tensor:
        tensor = files.read(name)
        initial = specs[name].initial
        if isinstance(initial, SupportOffsets) and tensor.numel():
            low, high = int(tensor.min()), int(tensor.max())
            if (
                tensor.dtype != initial.support.offset_dtype
                or low < 0
                or high >= initial.support.positions
            ):
                raise StoredError(f"tensor {name} holds offsets outside its tiles")
        return tensor

    return read


def _open_hf(folder: Path, flag: str) -> Pretrained:
    model = ModelConfig.load(str(folder), flag)
    method = MethodConfig(method="full")
    specs = blank_specs(model, method)
    files = open_weights(folder)
    logical = {name: logical_shape(name, spec.shape, model) for name, spec in specs.items()}
    found = {name: shape for name, shape in files.shapes.items() if not is_ignored(name)}
    if model.tie_word_embeddings:
        found.pop("lm_head.weight", None)
    check_names(logical, found, CONFIG)
    for name in logical:
        if not files.dtypes[name].is_floating_point:
            raise StoredError(
                f"tensor {name} is {files.dtypes[name]}: quantised weights cannot be read"
            )

    def read(name: str) -> Tensor:
        stored = files.read(name)
        if stored.shape == specs[name].shape:
            return stored
        padded = stored.new_zeros(specs[name].shape)
        padded[tuple(slice(0, size) for size in stored.shape)] = stored
        return padded

    shapes = {name: spec.shape for name, spec in specs.items()}
    return Pretrained(
        "hf", folder, flag, model, method, open_tokenizer(folder), shapes, True, 0, read
    )


def open_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer that lies in a folder, or None; a broken one is for --tokenizer to name."""
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    if not any((folder / name).is_file() for name in names):
        return None
    try:
        return load_tokenizer(str(folder))
    except UserError:
        return None


def _cached_tokenizer(document: dict[str, Any], model: ModelConfig) -> Tokenizer | None:
    """The tokenizer of a run that is older than the copy in its folder, where the cache still has it."""
    try:
        data = _make(DataConfig, document["config"]["data"], "data")
        return Cache(data, model.vocab_size).open_tokenizer()
    except (UserError, StoredError, OSError, KeyError):
        return None
