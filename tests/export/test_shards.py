"""Weights that are written in several files."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file

from diffoundry.export import shards
from diffoundry.export.weight_files import find


def test_weights_in_several_files_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_SHARD_BYTES", 4000)
    tensors = {f"block_{i}.weight": torch.randn(25, 30 + i, dtype=torch.float64).to(torch.float16) for i in range(7)}
    shards.write_shards(tmp_path, "diffusion_pytorch_model", iter(tensors.items()))
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(each.nbytes for each in tensors.values())
    assert list(index["weight_map"]) == list(tensors)
    (tmp_path / "config.json").write_text("{}")
    files = find(tmp_path, "diffusers").files
    assert [path.name[-17:] for path in files] == [f"{i:05}.safetensors" for i in (1, 2, 3)]
    held = {name: each for path in files for name, each in load_file(path).items()}
    assert all(torch.equal(held[name], tensor) for name, tensor in tensors.items())
