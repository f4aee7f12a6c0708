"""ONNX files: written from a graph, run in ONNX Runtime."""

import math
import re
from pathlib import Path

import torch
from torch.export import ExportedProgram

from ..errors import UserError
from .graph import Exportable
from .verify import Runner

OPSET = 18


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    """Attention in nodes that ONNX Runtime fuses; PyTorch's own transpose all keys first."""
    from onnxscript import opset18 as op

    scale = op.Constant(value_float=query.shape[3] ** -0.5 if scale is None else scale)
    logits = op.MatMul(op.Mul(query, scale), op.Transpose(key, perm=[0, 1, 3, 2]))
    if attn_mask is not None:
        logits = op.Add(logits, attn_mask)
    return op.MatMul(op.Softmax(logits, axis=-1), value)


def _gelu(x, approximate='none'):
    """GELU in the order of nodes that ONNX Runtime fuses; PyTorch's own have another."""
    from onnxscript import opset18 as op

    erf = op.Erf(op.Div(x, op.Constant(value_float=math.sqrt(2))))
    product = op.Mul(x, op.Add(erf, op.Constant(value_float=1.0)))
    return op.Mul(product, op.Constant(value_float=0.5))


def write_onnx(program: ExportedProgram, path: Path, net: Exportable) -> None:
    """Write an ONNX file; its input is ``images``, its outputs are ``net.output_names``.

    Raises:
        UserError: If a module uses an operator that ONNX or PyTorch's exporter does not know.
    """
    try:
        onnx_program = torch.onnx.export(
            program,
            input_names=['images'],
            output_names=net.output_names,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
            custom_translation_table={
                torch.ops.aten.scaled_dot_product_attention.default: _attention,
                torch.ops.aten.gelu.default: _gelu,
            },
        )
    except torch.onnx.OnnxExporterError as error:
        if node := _untranslated(error, program):
            *_, (path, kind) = node.meta['nn_module_stack'].values()
            raise UserError(
                f'{path} ({kind}) uses {node.target}, which cannot be translated to ONNX; take '
                'another module there, or export the feature maps by --backbone'
            ) from error
        raise
    proto = onnx_program.model_proto
    # PyTorch calls the open sizes s77, u0 or so; those of map1 become batch, height1 and width1.
    names: dict[str, str] = {}
    for value in (*proto.graph.input, *proto.graph.output):
        axes = net.axes(value.name)
        for dim, name in zip(value.type.tensor_type.shape.dim, axes, strict=False):
            if dim.dim_param:
                names.setdefault(dim.dim_param, name)
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                terms = names.get(dim.dim_param, dim.dim_param)
                dim.dim_param = re.sub(r'\w+', lambda m: names.get(m[0], m[0]), terms)
    # PyTorch notes shapes of weights too; ONNX Runtime's quantization wants to change them.
    weights = {each.name for each in proto.graph.initializer}
    kept = [value for value in proto.graph.value_info if value.name not in weights]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(kept)
    for key, text in net.metadata.items():
        proto.metadata_props.add(key=key, value=text)
    path.write_bytes(proto.SerializeToString())


def _untranslated(error: BaseException | None, program: ExportedProgram) -> torch.fx.Node | None:
    """The node of the graph that an error of PyTorch's exporter is about, if it names one."""
    while error is not None:
        if found := re.search(r'translating node %(\w+?)(?:_\d+)? ', str(error)):
            # The exporter has another graph, whose operators are parts of this one's.
            named = (node for node in program.graph.nodes if found[1] in str(node.target))
            return next((node for node in named if node.meta.get('nn_module_stack')), None)
        error = error.__cause__
    return None


def run_onnx(path: Path, threads: int = 0) -> Runner:
    """Load an ONNX file into ONNX Runtime, on CPU.

    Args:
        path: The file.
        threads: Number of threads. Defaults to 0: one for each core.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        path.read_bytes(), options, providers=['CPUExecutionProvider']
    )
    return lambda images: [
        torch.from_numpy(x) for x in session.run(None, {'images': images.numpy()})
    ]
