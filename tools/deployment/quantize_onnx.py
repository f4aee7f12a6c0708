"""Quantize an exported file to int8: convolutions and linear layers, calibrated on your images.

Weights get a scale for each channel. Routing, attention, norms and post-processing stay in float32.
Measure the result by test_onnx.py. Needs onnx and onnxruntime; torch is not used.

Example:
    python tools/deployment/quantize_onnx.py model.onnx images/*.jpg --out model_int8.onnx
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from PIL import Image
from run_onnx import Model

QUANTIZED = ['Conv', 'Gemm', 'MatMul']
"""``MatMul`` only where one side is a weight."""


class Images(CalibrationDataReader):
    """Images as the file takes them, one after the other.

    Args:
        model: The file.
        paths: The images.
    """

    def __init__(self, model: Model, paths: list[str]) -> None:
        self.model, self.paths = model, iter(paths)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next image; None after the last."""
        path = next(self.paths, None)
        if path is None:
            return None
        with Image.open(path) as file:
            image = np.asarray(file.convert('RGB'))
        return {'images': self.model.prepare(image)[None]}


def main() -> None:
    """Quantize."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('model', help='file of export_onnx.py')
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='some hundred typical images')
    parser.add_argument('--out', type=Path, required=True, metavar='FILE.onnx')
    args = parser.parse_args()
    try:
        model = Model(args.model)
    except Exception as error:
        parser.error(f'{args.model}: {error}')
    quantize_static(
        args.model,
        args.out,
        Images(model, args.images),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=QUANTIZED,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        extra_options=dict(MatMulConstBOnly=True),
    )
    quantized = onnx.load(args.out)
    del quantized.metadata_props[:]
    quantized.metadata_props.extend(onnx.load(args.model).metadata_props)
    onnx.save(quantized, args.out)
    sizes = [Path(path).stat().st_size / 2**20 for path in (args.model, args.out)]
    print(f'wrote {args.out}: {sizes[1]:.1f} MiB instead of {sizes[0]:.1f} MiB')


if __name__ == '__main__':
    sys.exit(main())
