"""mCE, relative mCE and mPC against examples worked out by hand."""

import pytest

from mmbiformer.evaluation.robustness import (
    ALEXNET,
    CORRUPTIONS,
    corruption_errors,
    mean_corruption_error,
    mean_performance,
)


def test_a_worked_example():
    """Errors 10, 20, 30, 40, 50 % are 150 over five severities; AlexNet's fog is 5 x 81.9324."""
    errors = {'fog': {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4, 5: 0.5}}
    assert corruption_errors(errors) == {'fog': pytest.approx(100 * 1.5 / 4.09662)}
    # With 5 % clean, corruption adds 25 % on average; to AlexNet's it adds 81.9324 - 43.478.
    assert corruption_errors(errors, 0.05) == {'fog': pytest.approx(100 * 25 / 38.4544)}


def test_alexnet_itself_is_at_100():
    errors = {name: dict.fromkeys(range(1, 6), ALEXNET[name]) for name in CORRUPTIONS}
    assert mean_corruption_error(errors) == pytest.approx(100)
    assert mean_corruption_error(errors, 0.43478) == pytest.approx(100)


def test_mean_is_over_corruptions_not_over_images():
    """Half of AlexNet's errors in 14, and AlexNet's own in one: (14 / 2 + 1) / 15."""
    errors = {name: dict.fromkeys(range(1, 6), ALEXNET[name] / 2) for name in CORRUPTIONS}
    errors['brightness'] = dict.fromkeys(range(1, 6), ALEXNET['brightness'])
    assert mean_corruption_error(errors) == pytest.approx(100 * 8 / 15)


def test_incomplete_tables_have_no_mean():
    errors = {name: dict.fromkeys(range(1, 6), 0.5) for name in CORRUPTIONS}
    assert mean_corruption_error(errors) is not None
    del errors['snow'][3]
    assert 'snow' not in corruption_errors(errors)
    assert mean_corruption_error(errors) is None
    assert mean_performance(errors) is None


def test_the_fifteen():
    assert len(CORRUPTIONS) == 15 and {*CORRUPTIONS} == {*ALEXNET}


def test_mean_performance_is_that_of_mmdetection(tmp_path, monkeypatch, capsys):
    """By its own script: mPC over a table of AP."""
    mmdet = pytest.importorskip('mmdet')
    import pickle
    import runpy
    from pathlib import Path

    script = Path(mmdet.__file__).parent / '.mim/tools/analysis_tools/robustness_eval.py'
    if not script.is_file():
        pytest.skip('MMDetection was installed without its tools')
    table = {
        name: {severity: 0.4 - 0.01 * i - 0.05 * severity for severity in range(1, 6)}
        for i, name in enumerate(CORRUPTIONS)
    }
    names = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')
    rows = {
        name: {
            severity: {f'coco/bbox_{each}': value for each in names}
            for severity, value in {0: 0.5, **row}.items()
        }
        for name, row in table.items()
    }
    path = tmp_path / 'results.pkl'
    path.write_bytes(pickle.dumps(rows))
    tool = runpy.run_path(str(script), run_name='tool')
    found = tool['get_coco_style_results'](str(path), prints='mPC')
    theirs = found[:15, 1:, 0].mean()
    assert mean_performance(table) == pytest.approx(theirs, rel=1e-5)
    mean_performance({**table, 'saturate': {1: 0.0}})  # what is not in the benchmark is left out
    printed = float(capsys.readouterr().out.split('maxDets=100 ] = ')[1][:5])
    assert mean_performance(table) == pytest.approx(printed, abs=6e-4)
