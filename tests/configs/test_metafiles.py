"""The metafiles list the shipped configs, with published figures and where weights are from."""

import shutil
import subprocess

import pytest

from mmbiformer.models import BiFormer
from tests.helpers.configs import ENTRIES, ROOT, metafiles, model_of

# Parameters and multiply-adds of the classifiers, by the authors' code.
CLASSIFIERS = {
    'biformer_t': (13_142_760, 2_228_044_160),
    'biformer_s': (25_536_232, 4_487_312_640),
    'biformer_b': (56_804_968, 9_794_514_816),
    'biformer_stl': (28_372_552, 4_589_905_728),
    'biformer_stl_nchw': (28_372_552, 4_592_615_248),
    'debiformer_t': (21_495_598, 2_653_589_952),
    'debiformer_s': (44_008_028, 5_439_885_184),
    'debiformer_b': (95_501_926, 11_741_105_280),
    'bixt_ti_l64_p16': (15_121_192, 1_679_473_344),
    'bixt_ti_l64_p16s8': (15_121_192, 4_705_424_832),
    'bixt_ti_l64_p16s4': (15_121_192, 16_809_230_784),
    'bixt_ed256_l64_p16': (26_682_088, 2_922_641_664),
    'bixt_ed256LS_l64_p16s8': (26_700_008, 8_142_200_064),
    'bixt_ti_l64_d13_p16': (16_381_672, None),
    'bixt_ti_l64_d13_p16s8': (16_381_672, None),
    'bixt_ti_l64_d13_p16s4': (16_381_672, None),
    'bixt_ti_cnv_l64_d13_p16': (16_453_120, None),
    'bixt_ti_cnv_l64_d13_p8': (16_443_352, None),
}
FIGURES = {
    'biformer_t_in1k': [81.4],
    'biformer_s_in1k': [83.8, 96.638],
    'biformer_b_in1k': [84.3],
    'biformer_s_tokenlabel_in1k': [84.3],
    'biformer_b_tokenlabel_in1k': [85.4],
    'biformer_s_in1kv2': [74.0],
    'biformer_stl_in1k': [82.7],
    'biformer_stl_nchw_in1k': [82.7],
    'maskrcnn_biformer_s_coco': [47.8, 43.2],
    'maskrcnn_biformer_b_coco': [48.6, 43.7],
    'retinanet_biformer_s_coco': [45.9],
    'retinanet_biformer_b_coco': [47.1],
    'sfpn_biformer_s_ade20k': [48.9],
    'sfpn_biformer_b_ade20k': [49.9],
    'upernet_biformer_s_ade20k': [49.8, 50.8],
    'upernet_biformer_b_ade20k': [51.0, 51.7],
    'debiformer_t_in1k': [81.9],
    'debiformer_s_in1k': [83.9],
    'debiformer_b_in1k': [84.4],
    'maskrcnn_debiformer_s_coco': [47.5, 42.5],
    'maskrcnn_debiformer_b_coco': [48.5, 43.2],
    'retinanet_debiformer_s_coco': [45.6],
    'retinanet_debiformer_b_coco': [47.1],
    'sfpn_debiformer_b_ade20k': [50.6],
    'upernet_debiformer_b_ade20k': [51.4, 52.0],
    'bixt_ti_l64_p16_in1k': [80.10, 94.74],
    'bixt_ti_l64_p16s8_in1k': [81.88, 95.43],
    'bixt_ti_l64_p16s4_in1k': [82.70, 95.91],
    'bixt_ti_l64_d13_p16_in1k': [80.44, 94.90],
    'bixt_ti_l64_d13_p16s8_in1k': [82.44, 95.82],
    'bixt_ti_l64_d13_p16s4_in1k': [83.04, 96.18],
    'bixt_ed256_l64_p16_in1k': [81.74, 95.37],
    'bixt_ed256LS_l64_p16s8_in1k': [83.24, 96.17],
    'bixt_ti_cnv_l64_p16_in1k': [81.00, 95.18],
    'bixt_ti_cnv_l64_d13_p16_in1k': [80.95, 95.05],
    'bixt_ti_cnv_l64_d13_p8_in1k': [82.47, 95.68],
    'bixt_ti_l64_p16_ft384_in1k': [81.85, 95.68],
    'bixt_ti_l64_p16s8_ft384_in1k': [82.77, 96.04],
    'bixt_ti_l64_p16s4_ft384_in1k': [83.15, 96.18],
    'bixt_ti_l64_d13_p16_ft384_in1k': [82.15, 95.72],
    'bixt_ti_l64_d13_p16s8_ft384_in1k': [83.06, 96.27],
    'bixt_ed256LS_l64_p16s8_ft384_in1k': [83.89, 96.58],
}


def test_list_the_tracked_configs():
    """A user's own config beside them is not tracked."""
    if shutil.which('git') is None or not (ROOT / '.git').exists():
        pytest.skip('not a checkout')
    command = ['git', 'ls-files', '--', 'configs/*.py']
    listed = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    tracked = {path for path in listed.stdout.split() if path.count('/') == 1}
    assert {f'configs/{name}.py' for name in ENTRIES} == tracked


def test_names_are_unique():
    names = [entry['Name'] for entry in ENTRIES.values()]
    collections = [each['Name'] for file in metafiles() for each in file['Collections']]
    for each in (names, collections):
        assert len(each) == len({*each})
    assert {entry['In Collection'] for entry in ENTRIES.values()} <= {*collections}


@pytest.mark.parametrize('name', CLASSIFIERS)
def test_classifiers(name):
    entry, (parameters, macs) = ENTRIES[f'{name}_in1k'], CLASSIFIERS[name]
    counts = dict(Parameters=parameters) | (dict(FLOPs=macs) if macs else {})
    assert entry['Metadata'] == counts
    assert sum(p.numel() for p in model_of(f'{name}_in1k').parameters()) == parameters
    if name.startswith('biformer'):  # the others' files have no addresses
        size = name.removeprefix('biformer_')
        url = BiFormer.released[{'t': 'tiny', 's': 'small', 'b': 'base'}.get(size, size)]
        assert entry['Weights'] == entry['Converted From']['Weights'] == url


@pytest.mark.parametrize('name', ENTRIES)
def test_figures_are_the_published_ones(name):
    entry = ENTRIES[name]
    found = [v for result in entry.get('Results', []) for v in result['Metrics'].values()]
    assert found == FIGURES.get(name, [])
    assert (entry['Provenance'] == 'published by the authors') == (name in FIGURES)
