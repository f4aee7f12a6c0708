"""Export a model to ONNX: a classifier, segmentor or detector, or the backbone of any config.

The file holds the whole way from a decoded image to the result: normalization and padding, the
network, and the post-processing. With --backbone it takes normalized images of any size and gives
the feature maps. It is checked against PyTorch before it gets its name.

Examples:
    python tools/deployment/export_onnx.py configs/maskrcnn_biformer_s_coco.py FILE.pth \\
        --out model.onnx
    python tools/deployment/export_onnx.py configs/upernet_biformer_s_ade20k.py FILE.pth \\
        --backbone --out maps.onnx
"""

from mmbiformer.commands.export import run_export
from mmbiformer.commands.faults import run_command
from mmbiformer.export.onnx import OPSET, run_onnx, write_onnx


def main() -> None:
    """Export."""
    run_export(
        description=__doc__.splitlines()[0],
        suffix='.onnx',
        needs=('onnx', 'onnxruntime', 'onnxscript'),
        note=f'opset {OPSET}',
        write=write_onnx,
        load=run_onnx,
        whole=True,
    )


if __name__ == '__main__':
    run_command(main)
