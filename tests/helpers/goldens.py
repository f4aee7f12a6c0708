"""The goldens: outputs of the authors' code in float64, on weights given by a formula."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DATA = Path(__file__).parents[1] / 'data' / 'goldens'


def uniform(name: str, shape: tuple[int, ...], salt: str = '') -> Tensor:
    """Pseudo-random float64 numbers in [-1, 1) that depend on the name only."""
    count = int(np.prod(shape, dtype=np.int64))
    with np.errstate(over='ignore'):
        z = np.arange(count, dtype=np.uint64)
        z += np.uint64(zlib.crc32((salt + name).encode())) << np.uint64(32)
        z += np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return torch.from_numpy((z >> np.uint64(11)) / 2**52 - 1).reshape(shape)


def parameter(name: str, shape: tuple[int, ...], salt: str = '') -> Tensor:
    """A parameter or buffer under its name in the authors' state dict."""
    if name.endswith('num_batches_tracked'):
        return torch.tensor(0)
    u = uniform(name, shape, salt)
    if name.endswith('running_var'):
        return 1 + 0.5 * u
    if name.endswith('running_mean'):
        return 0.1 * u
    if len(shape) >= 2:
        gains = (('qkv', 2.0), ('rv_', 2.0), ('r_latents', 2.0), ('pos_embed', 0.3))
        gain = next((gain for part, gain in gains if part in name), 0.7)
        return gain * u * (3 / np.prod(shape[1:])) ** 0.5
    return 1 + 0.1 * u if name.endswith('weight') else 0.05 * u


class Golden:
    """One file of goldens.

    Args:
        name: File name without suffix.
    """

    def __init__(self, name: str) -> None:
        with np.load(DATA / f'{name}.npz') as file:
            self.arrays = {key: file[key] for key in file.files}
        self.case = json.loads(str(self.arrays.get('case', '{}')))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights, under the authors' names."""
        entries = (str(entry).split(' ', 1) for entry in self.arrays['state_dict_keys'])
        return {
            name: tuple(int(n) for n in shape.strip('()').split(',') if n.strip())
            for name, shape in entries
        }

    def official_state_dict(self) -> dict[str, Tensor]:
        """The weights, under the authors' names."""
        return {
            name: parameter(name, shape, self.case['salt']) for name, shape in self.shapes().items()
        }

    def released(self) -> dict[str, Tensor]:
        """The weights as the authors' files hold them, in float32."""
        return {
            name: value.float() if value.is_floating_point() else value
            for name, value in self.official_state_dict().items()
        }

    def input(self) -> Tensor:
        return 1.7 * uniform('input', tuple(self.case['shape']), self.case['salt'])

    def cotangent(self, shape: tuple[int, ...]) -> Tensor:
        return uniform('cotangent', shape, self.case['salt'])

    def check(self, name: str, actual: Tensor, rtol: float = 1e-9) -> None:
        """Compare with what is stored under a name, relative to its largest value."""
        actual = actual.detach().double()
        if name in self.arrays:
            picked, expected = actual.flatten(), torch.from_numpy(self.arrays[name]).flatten()
        else:
            assert actual.shape == tuple(self.arrays[f'{name}/shape'])
            picked = actual.flatten()[torch.from_numpy(self.arrays[f'{name}/idx'])]
            expected = torch.from_numpy(self.arrays[f'{name}/val'])
            stats = torch.stack([actual.mean(), actual.std(), actual.abs().mean()])
            self._close(f'{name}/mean_std_absmean', stats, expected.abs().max(), rtol)
        error = (picked - expected).abs().max() / expected.abs().max()
        assert error <= rtol, f'{name}: relative error {error:.2e} exceeds {rtol:.0e}'

    def _close(self, name: str, actual: Tensor, scale: Tensor, rtol: float) -> None:
        error = (actual - torch.from_numpy(self.arrays[name])).abs().max() / scale
        assert error <= rtol, f'{name}: relative error {error:.2e} exceeds {rtol:.0e}'
