"""Parts of tensors in safetensors files: put together to the bit, or refused in one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sltrain_dist.tools.output import new_folder
from sltrain_dist.train.stored_tensors import Safetensors, StoredError
from sltrain_dist.utils.errors import UserError

WHOLE = torch.arange(24, dtype=torch.float32).view(6, 4)


def write(path: Path, part: Tensor, offsets: object) -> Path:
    places = json.dumps({"w": {"saved_offsets": offsets}})
    save_file({"w": part.contiguous()}, path, metadata={"DCP_SHARDING_INFO": places})
    return path


def test_parts_make_a_whole(tmp_path: Path) -> None:
    """Boxes along both dimensions, a scalar and an empty part; bfloat16 too."""
    for dtype in (torch.float32, torch.bfloat16):
        whole, folder = WHOLE.to(dtype), tmp_path / str(dtype)
        folder.mkdir()
        boxes = (
            (whole[:2], [0, 0]),
            (whole[2:, :1], [2, 0]),
            (whole[2:, 1:], [2, 1]),
            (whole[6:], [6, 0]),
        )
        paths = [write(folder / f"{n}.safetensors", *box) for n, box in enumerate(boxes)]
        save_file({"count": torch.tensor(3)}, folder / "count.safetensors")
        files = Safetensors([*paths, folder / "count.safetensors"])
        assert files.shapes == {"w": (6, 4), "count": ()}
        assert torch.equal(files.read("w"), whole)
        assert int(files.read("count")) == 3


@pytest.mark.parametrize(
    ("second", "offsets", "message"),
    [
        (WHOLE[4:], [4, 0], "elements of w are missing"),
        (WHOLE[1:3], [1, 0], "elements of w are"),
        (torch.cat((WHOLE[2:3], WHOLE[2:5])), [3, 0], "elements of w are missing"),
        (WHOLE[3:].to(torch.bfloat16), [3, 0], "another dtype or rank"),
        (WHOLE[3], [3], "another dtype or rank"),
        (WHOLE[3:], [3], "says that it begins at"),
        (WHOLE[3:], [-3, 0], "says that it begins at"),
        (WHOLE[3:], ["3", 0], "says that it begins at"),
        (WHOLE[3:], 3, "not readable"),
        (WHOLE[3:], None, "not readable"),
    ],
)
def test_parts_of_nothing_are_refused(
    second: Tensor, offsets: object, message: str, tmp_path: Path
) -> None:
    first = write(
        tmp_path / "1.safetensors", WHOLE[:2] if "missing" in message else WHOLE[:3], [0, 0]
    )
    with pytest.raises(StoredError, match=message):
        Safetensors([first, write(tmp_path / "2.safetensors", second, offsets)])


def test_an_overlap_as_large_as_the_gap(tmp_path: Path) -> None:
    """The count of elements is right, and yet rows 3 and 4 are there twice and rows 0 and 1 never."""
    paths = [
        write(tmp_path / "1.safetensors", WHOLE[2:5], [2, 0]),
        write(tmp_path / "2.safetensors", WHOLE[3:], [3, 0]),
    ]
    with pytest.raises(StoredError, match="elements of w are"):
        Safetensors(paths)


def test_a_file_that_is_cut_off_later(tmp_path: Path) -> None:
    """After it was opened: one line and no crash."""
    path = write(tmp_path / "1.safetensors", WHOLE, [0, 0])
    files = Safetensors([path])
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(StoredError, match=r"1\.safetensors: not readable"):
        files.read("w")
    path.unlink()
    with pytest.raises(StoredError, match=r"1\.safetensors: not readable \(No such file"):
        files.read("w")


def write_into_nothing(output: Path) -> None:
    with new_folder(output) as inside:
        shutil.rmtree(inside)
        (inside / "file").write_bytes(b"")


def test_a_new_folder_names_the_source_that_fails(tmp_path: Path) -> None:
    output, gone = tmp_path / "out", tmp_path / "gone"
    with (
        pytest.raises(UserError, match=r"gone cannot be read \(No such file") as caught,
        new_folder(output),
    ):
        gone.read_bytes()
    assert "cannot be written" not in str(caught.value)
    with pytest.raises(UserError, match=r"out: cannot be written \(No such file"):
        write_into_nothing(output)
    assert not list(tmp_path.iterdir())
