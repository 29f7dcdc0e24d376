"""A trained network as ONNX: the file alone gives what PyTorch gives, at any batch and size."""

import json
import sys

import numpy as np
import pytest
import torch

from diffseg.benchmarks.classes import CITYSCAPES
from diffseg.errors import DiffsegError
from diffseg.onnx_files import INPUT, TOLERANCE, export_onnx
from diffseg.segmenters import new_networks


def network(name: str, count: int = 1) -> torch.nn.Module:
    made = new_networks(count, name, CITYSCAPES.classes, 0, palette=CITYSCAPES.palette).eval()
    made.side = 64
    return made


@pytest.mark.parametrize(
    "name, count",
    [
        ("resunet-resnet10t", 1),
        pytest.param("resunet-resnet10t", 2, marks=pytest.mark.slow),
        pytest.param("deeplabv3plus-resnet18", 1, marks=pytest.mark.slow),
        pytest.param("segformer-mini", 1, marks=pytest.mark.slow),
    ],
)
def test_onnx_runtime_agrees_with_torch_at_any_batch_and_size(tmp_path, name, count):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    made, file = network(name, count), tmp_path / "network.onnx"
    assert export_onnx(made, file) < TOLERANCE
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    notes = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert notes["classes"] == list(CITYSCAPES.classes) and notes["side"] == 64 and notes["palette"][0] == "#804080"
    for shape in ((3, 3, 33, 70), (1, 3, 128, 64)):
        image = torch.rand(shape)
        [found] = session.run(None, {INPUT: image.numpy()})
        with torch.inference_mode():
            np.testing.assert_allclose(found, made(image), atol=1e-4)


def test_a_missing_package_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DiffsegError, match=r"onnxruntime, which is not installed; run pip install 'diffseg\[onnx\]'"):
        export_onnx(network("resunet-resnet10t"), tmp_path / "network.onnx")
    assert not any(tmp_path.iterdir())


def test_what_cannot_be_written_is_said_before_the_export(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.onnx, "export", None)  # the export would fail
    made = network("resunet-resnet10t")
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "file").write_text("mine")
    for place in ("folder.onnx", "network.pt"):
        with pytest.raises(DiffsegError, match="is a folder or does not end in .onnx"):
            export_onnx(made, tmp_path / place)
    with pytest.raises(FileExistsError):
        export_onnx(made, tmp_path / "file" / "network.onnx")
    for name in ("upernet-swin-mini", "mask2former-swin-mini"):
        with pytest.raises(DiffsegError, match=f"{name} cannot be written as ONNX, since Swin's windows"):
            export_onnx(network(name), tmp_path / "network.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.onnx"]
