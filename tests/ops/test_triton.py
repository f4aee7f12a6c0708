"""The Triton kernels without a GPU: run by Triton's interpreter, and compiled ahead of time."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmbiformer.ops import BACKENDS, routed_attention
from mmbiformer.ops.backends.triton import launch, why_not
from mmbiformer.ops.settings import Settings
from tests.helpers.attention import Case, check_budget
from tests.helpers.interpreted import RUNS, inputs


@pytest.fixture(scope='module')
def interpreted(tmp_path_factory):
    """Results of the kernels under the interpreter, see interpreted.py.

    By case and dtype: output and gradients, launches, and whether a second run gave the same bits.
    """
    file = tmp_path_factory.mktemp('interpreted') / 'results.pt'
    env = dict(os.environ, TRITON_INTERPRET='1', OMP_NUM_THREADS='1')
    command = [sys.executable, '-W', 'ignore', '-m', 'tests.helpers.interpreted', file]
    ran = subprocess.run(
        command, env=env, cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return torch.load(file)


@pytest.mark.parametrize(('name', 'dtype'), RUNS)
def test_error_budget(interpreted, name, dtype):
    found, _, repeated = interpreted[name, dtype]
    check_budget(found, *inputs(name, dtype))
    assert repeated


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_the_kernels_ran(interpreted, dtype):
    ran = {name: each[1] for (name, kind), each in interpreted.items() if kind == dtype}
    three = ['attend', 'grad_of_query', 'grad_of_key_and_value']
    for name, launches in ran.items():
        kernels, _, one_pass, _ = zip(*launches, strict=True)
        assert [*kernels] == (three[::2] if one_pass[0] else three), name
    launches = [each for launches in ran.values() for each in launches]
    assert {way[1:3] for way in launches} == {(False, False), (False, True), (True, False)}
    # Each kernel also looked up regions tile by tile.
    assert {kernel for kernel, *_, one_region in launches if one_region} == {*three}


def test_reasons():
    q, k, v, routes = Case().tensors(torch.float32)
    assert next(iter(BACKENDS)) == 'triton'
    with pytest.raises(RuntimeError, match=r"'triton' cannot run here: tensors are on cpu"):
        routed_attention(q, k, v, routes, num_heads=2, region_size=(2, 2), backend='triton')
    on_gpu = Pretended(q)
    assert why_not(on_gpu, on_gpu, on_gpu, num_heads=2) is None
    wide = Pretended(torch.empty(1, 2, 2, 272))
    assert 'heads of 136 channels' in why_not(on_gpu, on_gpu, wide, num_heads=2)
    double = Pretended(q.double())
    assert 'float64' in why_not(double, double, double, num_heads=2)
    assert 'all three' in why_not(on_gpu, on_gpu, Pretended(q.half()), num_heads=2)
    many = Pretended(q[:1].expand(2**16, -1, -1, -1))
    assert 'more than 65535 images' in why_not(many, many, many, num_heads=2)
    far = Pretended(torch.empty_strided(q.shape, (2**33, 2**31, 16, 1), device='meta'))
    assert 'spans more than 2147483647' in why_not(on_gpu, far, on_gpu, num_heads=2)
    large = Pretended(torch.empty(1, 512, 1024, 512, device='meta'))
    deep = Pretended(torch.empty(1, 8, 8, 4096, device='meta'))
    assert 'spans more than 2147483647' in why_not(large, large, deep, num_heads=32)


class Pretended:
    """A tensor as it would be on a GPU."""

    is_cuda = True
    device = torch.device('cuda', 0)

    def __init__(self, x):
        self.shape, self.dtype, self.stride = x.shape, x.dtype, x.stride


@pytest.fixture(autouse=True)
def modern_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))


def test_importing_needs_no_triton():
    code = """
import sys
sys.modules['triton'] = None  # importing it then raises ImportError
import torch
from mmbiformer.ops import BACKENDS, routed_attention
x, routes = torch.randn(1, 4, 4, 8), torch.zeros(1, 4, 1, dtype=torch.int64)
print(BACKENDS['triton'].why_not(x, x, x, 2))
routed_attention(x, x, x, routes, num_heads=2, region_size=(2, 2))
"""
    ran = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert 'Triton is not installed' in ran.stdout


SHAPES = {  # map, region, k, channels
    'stage 1 at 224': ((56, 56), (8, 8), 1, 64),
    'stage 2 at 224': ((28, 28), (4, 4), 4, 128),
    'stage 3 at 224': ((14, 14), (2, 2), 16, 256),
    'stage 1 at 800x1344': ((208, 336), (13, 21), 1, 64),
    'stage 3 at 800x1344': ((64, 96), (4, 6), 16, 256),
    'stage 2 at 800x1344, ragged': ((100, 168), (7, 11), 4, 128),
}
POINTERS = {
    torch.bfloat16: '*bf16',
    torch.float16: '*fp16',
    torch.float32: '*fp32',
    torch.int64: '*i64',
    torch.int32: '*i32',
}


class Recorder:
    """Stands for a kernel and keeps its launches."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches
        self.__name__ = kernel.__name__

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


@pytest.fixture
def launches(monkeypatch):
    """The launches that are made while the test runs; they are not executed."""
    made = []
    names = 'attend', 'grad_of_query', 'grad_of_key_and_value', 'count_routes', 'invert_routes'
    for name in names:
        monkeypatch.setattr(launch, name, Recorder(getattr(launch, name), made))
    return made


def compile_ahead(kernel, args, options, capability):
    """Compile a launch as Triton would; registers, shared memory and stack, in bytes."""
    signature, constants, attributes = {}, {}, {}
    for i, (parameter, arg) in enumerate(zip(kernel.params, args, strict=False)):
        fixed = isinstance(arg, int) and not parameter.do_not_specialize
        if isinstance(arg, torch.Tensor):
            signature[parameter.name] = POINTERS[arg.dtype]
        elif isinstance(arg, float):
            signature[parameter.name] = 'fp32'
        elif fixed and arg == 1:
            signature[parameter.name] = 'constexpr'
            constants[(i,)] = 1
        else:
            signature[parameter.name] = 'i32'
        if isinstance(arg, torch.Tensor) or (fixed and arg % 16 == 0):
            attributes[(i,)] = [['tt.divisibility', 16]]
    for i, parameter in enumerate(kernel.params):
        if parameter.name in options:
            signature[parameter.name] = 'constexpr'
            constants[(i,)] = options[parameter.name]
    source = ASTSource(kernel, signature, constants, attributes)
    settings = {name: options[name] for name in ('num_warps', 'num_stages') if name in options}
    return triton.compile(source, target=GPUTarget('cuda', capability, 32), options=settings)


def resources(compiled, folder):
    """Registers, bytes of shared memory and bytes of stack, where spilled registers go."""
    file = folder / 'kernel.cubin'
    file.write_bytes(compiled.asm['cubin'])
    tool = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'
    usage = subprocess.run([tool, '-res-usage', file], capture_output=True, text=True, check=True)
    find = {name: re.search(rf'{name}:(\d+)', usage.stdout).group(1) for name in ('REG', 'STACK')}
    return int(find['REG']), compiled.metadata.shared, int(find['STACK'])


def launch_all(launches, size, region, topk, heads, head_dim, dtype):
    """Record the launches of a forward and backward pass, from slices of a packed projection."""
    regions = -(-size[0] // region[0]) * -(-size[1] // region[1])
    packed = torch.empty(1, *size, 3 * heads * head_dim, dtype=dtype, device='meta')
    routes = torch.empty(1, regions, topk, dtype=torch.int64, device='meta')
    settings = Settings(heads, region, region, 0.1)
    maps = packed.chunk(3, -1)
    out, stats = launch.forward(*maps, routes, settings)
    launch.backward(out, *maps, routes, out, stats, settings)
    return launches


@pytest.mark.parametrize('capability', [80, 90])
@pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)
def test_compiles_ahead_without_spills(
    shape, capability, launches, tmp_path, monkeypatch, record_property
):
    """For BiFormer-S in bfloat16."""
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path / 'cache'))
    size, region, topk, channels = shape
    launch_all(launches, size, region, topk, channels // 32, 32, torch.bfloat16)
    one_pass = topk == 1 and region[0] * region[1] <= 64
    assert len({kernel for kernel, *_ in launches}) == (3 if one_pass else 4)
    for kernel, args, options in launches:
        used = resources(compile_ahead(kernel, args, options, capability), tmp_path)
        record_property(kernel.__name__, used)
        print(f'{kernel.__name__}: {used[0]} registers, {used[1]} B shared, {used[2]} B stack')
        assert used[2] == 0


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(('heads', 'head_dim'), [(3, 40), (1, 100), (1, 128)])
def test_wide_heads_compile(heads, head_dim, dtype, launches, tmp_path, monkeypatch):
    """Their tiles fit into registers and shared memory, except for a few spilled registers."""
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path / 'cache'))
    for region, topk in (((8, 8), 1), ((2, 2), 49)):
        launch_all(launches, (28, 28), region, topk, heads, head_dim, dtype)
    for kernel, args, options in launches:
        _, shared, stack = resources(compile_ahead(kernel, args, options, 90), tmp_path)
        assert shared <= 227 * 2**10
        # Heads of 100 channels spill four registers of 128; no released model has such heads.
        assert stack <= (512 if dtype == torch.float32 else 16)


@pytest.mark.parametrize('head_dim', [32, 128])
def test_float32_sums_tile_by_tile(head_dim, launches, tmp_path, monkeypatch):
    """One running sum over all of a hub's queries would lose digits, and Triton fuses sums."""
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path / 'cache'))
    launch_all(launches, (56, 56), (8, 8), 2, 1, head_dim, torch.float32)
    kernel, args, options = launches[-1]
    assert kernel is launch.grad_of_key_and_value.kernel
    code = compile_ahead(kernel, args, options, 90).asm['ttir']
    dots = re.findall(r'%(\w+) = tt.dot .*-> tensor<\d+x(\d+)xf32>', code)
    sums = [name for name, width in dots if re.search(rf'arith.addf %\w+, %{name} ', code)]
    assert len(sums) == 2  # dk and dv
