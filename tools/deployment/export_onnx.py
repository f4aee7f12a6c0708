"""Export a classifier, or the backbone of any config, to ONNX.

A classifier's file takes normalized images of one size and gives logits, for any batch. With
--backbone the file takes images of any size and gives the feature maps. Necks and heads of
detectors and segmentors are not exported. The file is checked against PyTorch before it gets its
name.

Examples:
    python tools/deployment/export_onnx.py configs/biformer_s_in1k.py FILE.pth --out logits.onnx
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
    )


if __name__ == '__main__':
    run_command(main)
