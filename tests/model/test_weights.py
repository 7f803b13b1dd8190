"""The files that weights are laid out in: every tensor once, no file too large, one identity."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from model.weights import WEIGHTS, LazyTensors, split, weight_files, weights_sha256, write_index

SIZES = st.dictionaries(st.text(min_size=1), st.integers(0, 50), min_size=1)


@given(SIZES, st.integers(1, 100))
def test_every_tensor_is_in_one_file_and_no_file_is_too_large(sizes: dict[str, int], limit: int) -> None:
    files = split(sizes, limit)
    assert [name for names in files.values() for name in names] == list(sizes), "in their order"
    held = [sum(sizes[name] for name in names) for names in files.values()]
    for size, names in zip(held, files.values(), strict=True):
        assert names
        assert size <= limit or len(names) == 1
    # No file that the next one's first tensor would have fitted into.
    for size, names in zip(held, list(files.values())[1:], strict=False):
        assert size + sizes[names[0]] > limit
    assert (list(files) == [WEIGHTS]) == (len(files) == 1)
    assert list(files) == sorted(files)


def write(folder: Path, limit: int) -> dict[str, torch.Tensor]:
    tensors = {name: torch.arange(n, dtype=torch.float32) for name, n in (("a", 8), ("b", 3), ("c", 30), ("d", 1))}
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    for file, names in split(sizes, limit).items():
        save_file({name: tensors[name] for name in names}, folder / file)
    write_index(folder, split(sizes, limit), sum(sizes.values()))
    return tensors


@pytest.mark.parametrize(("limit", "count"), [(1000, 1), (124, 2), (45, 3)])
def test_they_are_found_and_read_again(tmp_path: Path, limit: int, count: int) -> None:
    tensors = write(tmp_path, limit)
    files = weight_files(tmp_path)
    assert len(files) == count
    assert {*tmp_path.glob("*.safetensors")} == {*files}
    with LazyTensors(files) as found:
        assert {*found} == {*tensors}
        assert all(torch.equal(found[name][:], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("limit", [1000, 45])
def test_their_identity_is_what_sha256sum_prints(tmp_path: Path, limit: int) -> None:
    write(tmp_path, limit)

    def sha256sum(*arguments: str | Path, text: str = "") -> str:
        command = ["sha256sum", *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, input=text, capture_output=True, text=True, check=True).stdout

    names = [file.name for file in weight_files(tmp_path)]
    digests = {name: {"sha256": sha256sum(name).split()[0]} for name in names}
    manifest = {"files": {**digests, "optimizer/shard-00001-model.safetensors": {"sha256": "0"}}}
    expected = digests[WEIGHTS]["sha256"] if len(names) == 1 else sha256sum("-", text=sha256sum(*names)).split()[0]
    assert weights_sha256(manifest) == expected
