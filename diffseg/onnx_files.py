"""A trained network as an ONNX file, for programs without PyTorch."""

import json
from pathlib import Path

import torch

from diffseg.errors import DiffsegError
from diffseg.files import atomic_path
from diffseg.segmenters import Ensemble, Segmenter, hex_colours

INPUT, OUTPUT = "image", "logits"
TRACED, OTHER = (2, 3, 96, 64), (1, 3, 50, 87)  # shapes of the trace, and of another image that checks the file
TOLERANCE = 1e-3  # of the logits' largest absolute value; our choice, a hundred times the rounding we saw


def export_onnx(network: Segmenter | Ensemble, path: Path) -> float:
    """Write a network as one ONNX file, and return its largest difference from torch, relative to the largest logit.

    Input "image": float32 B x 3 x H x W in 0..1, of any batch and size, scaled as `diffseg.inference` does; output
    "logits": float32 B x classes x H x W. The file's metadata have `classes`, `palette` ("#rrggbb") and `side` as JSON.
    The file is run by ONNX Runtime on noise of two batches and sizes before it gets its name; it replaces one of that
    name. Raises before the export a DiffsegError or an OSError where `path` cannot be written, a package of the extra
    `onnx` is missing or the network has a Swin encoder; after it a DiffsegError where it failed, or where the outputs
    differ by more than TOLERANCE.
    """
    if path.suffix != ".onnx" or path.is_dir():
        raise DiffsegError(f"{path} is a folder or does not end in .onnx; give a file such as network.onnx.")
    if "swin" in network.name:  # PyTorch 2.15 fails at its fused attention, and fixes what its windows do at one size
        raise DiffsegError(
            f"{network.name} cannot be written as ONNX, since Swin's windows depend on the size of the image; train "
            "another segmenter, such as segformer-b2."
        )
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx needs it, and says so late
    except ImportError as error:
        raise DiffsegError(
            f"an ONNX file needs {error.name}, which is not installed; run pip install 'diffseg[onnx]'."
        ) from error
    network = network.cpu().eval()
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(shape, generator=generator) for shape in (TRACED, OTHER)]
    free = {axis: torch.export.Dim.DYNAMIC for axis in (0, 2, 3)}
    notes = {"classes": network.classes, "palette": hex_colours(network.palette), "side": network.side}
    with atomic_path(path) as temporary:  # first, because the export takes a while and the place may not be writable
        try:
            program = torch.onnx.export(
                network,
                (images[0],),
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=(free,),
                dynamo=True,
                verbose=False,
            )
        except Exception as error:  # each stage of the exporter has its own kinds
            line = str(error.__cause__ or error).partition("\n")[0]  # the exporter's own text is coloured and general
            raise DiffsegError(
                f"{network.name} cannot be written as ONNX by this PyTorch ({line}); train another segmenter, such as "
                "segformer-b2, or try another version of PyTorch."
            ) from error
        program.model.metadata_props.update({name: json.dumps(value) for name, value in notes.items()})
        program.save(temporary, external_data=False)
        session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])
        difference = max(disagreement(network, session, image) for image in images)
        if difference > TOLERANCE:
            raise DiffsegError(
                f"ONNX Runtime's logits of {network.name} differ from PyTorch's by {difference:.2g} of the largest "
                "one, so no file was written; try another version of the package onnxruntime."
            )
    return difference


@torch.inference_mode()
def disagreement(network: torch.nn.Module, session, images: torch.Tensor) -> float:
    """Return the largest difference between ONNX Runtime's logits and torch's, relative to torch's largest one."""
    [found] = session.run([OUTPUT], {INPUT: images.numpy()})
    expected = network(images)
    return float((torch.from_numpy(found) - expected).abs().max() / expected.abs().max())
