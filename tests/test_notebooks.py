"""The demo in miniature, and every notebook on the run that it leaves.

What is committed was run, and carries nothing private.
"""

import dataclasses
import json
import re
from pathlib import Path

import jax
import matplotlib
import numpy as np
import pytest

from train import pretrain
from train.pretraining.recipe import PRESETS

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def cells(path, kind="code"):
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A short run of the demo's own path: its directory, and its state."""
    preset, run_dir = PRESETS["digits"][1], tmp_path_factory.mktemp("runs") / "digits"
    config = dataclasses.replace(
        preset,
        run_dir=str(run_dir),
        network=dataclasses.replace(preset.network, channels=8, attention_resolutions=()),
        evaluation=dataclasses.replace(
            preset.evaluation, num_samples=80, sampling_steps=3, classifier_steps=400
        ),
        steps=12,
        warmup_steps=2,
        log_every=4,
        checkpoint_every=6,
    )
    return run_dir, pretrain.main(config)


def test_digits_train_and_are_measured_on_eight_devices(digits):
    """Classifier, figures and pictures."""
    run_dir, state = digits
    assert int(state.step) == 12 and jax.device_count() == 8
    figures = json.loads((run_dir / "evaluation.json").read_text())
    assert figures["accuracy_floor"] > 0.97  # of the classifier, on held-out digits
    assert 0 < figures["frechet_floor"] < figures["frechet"]
    assert figures["nfe"] == 6  # three steps, guided
    for name in ("samples.png", "loss.png", "config.json", "metrics.jsonl"):
        assert (run_dir / name).stat().st_size > 0


def run(path, digits, monkeypatch):
    """The namespace after all code cells, as `__main__`."""
    monkeypatch.setenv("JAXDIFF_SMALL", "1")
    monkeypatch.setenv("JAXDIFF_RUNS", str(digits[0].parent))
    monkeypatch.chdir(path.parent)
    matplotlib.use("Agg")
    names = ("jax_enable_x64", "jax_disable_most_optimizations")
    before = {name: jax.config.values[name] for name in names}
    jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of the time
    namespace = {"__name__": "__main__"}
    try:
        for index, cell in enumerate(cells(path)):
            code = compile("".join(cell["source"]), f"{path.name}, code cell {index}", "exec")
            exec(code, namespace)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    return namespace


def test_solvers(digits, monkeypatch, capsys):
    seen = run(ROOT / "notebooks" / "solvers.ipynb", digits, monkeypatch)
    assert max(seen["converged"]) < 1e-3 and seen["to_exact"] < 1e-5
    assert len(seen["errors"]) == 4
    for name, by_nfe in seen["errors"].items():
        few, many = (np.array(by_nfe[n]) for n in sorted(by_nfe))
        assert np.all(many < 0.75 * few), name  # four times the evaluations
    for values, nfe in seen["adapted"].values():
        assert max(values) < 0.05 and np.asarray(nfe).min() > 20
    for name, by_nfe in seen["laws"].items():
        few, many = (by_nfe[n][:, 1] for n in sorted(by_nfe))
        assert many.mean() < few.mean() and np.all(many < 3 * seen["floor"]), name
    for n in seen["GRID_STEPS"]:
        start = np.array(seen["grid_errors"]["log-SNR", n])
        for name in ("search_times", "optimise_times"):
            assert np.all(np.array(seen["grid_errors"][name, n]) < 1.2 * start), name
    assert seen["inversion"]["EDICT", 10][0] > 0.01  # right, but not
    assert seen["inversion"]["EDICT", 10][1] < 1e-9  # exact in return
    assert np.abs(seen["deviation"]["exact"]).max() < 0.05
    assert 3 < seen["bits"]["dequantised"][0] < 9
    capsys.readouterr()


def test_geometry(digits, monkeypatch, capsys):
    seen = run(ROOT / "notebooks" / "geometry.ipynb", digits, monkeypatch)
    assert max(seen["exact"].values()) < 1e-3
    for moved, predicted in list(seen["speeds"].values())[:2]:  # the third is a mean over draws
        assert abs(moved / predicted - 1) < 0.02
    assert seen["gaussian_error"] < 1e-5 and seen["tweedie_error"] < 1e-4
    assert seen["fired"] == 0
    errors = {name: float(np.max(runs[-1][1])) for name, runs in seen["convergence"].items()}
    assert errors["GolubKahanLanczos"] < errors["power iteration, as published"]
    for space in "XH":
        matrix = seen["over_time"][space]
        np.testing.assert_allclose(matrix, matrix.T)
        assert np.all(np.diag(matrix) == 0) and matrix.max() < 1.1
    np.testing.assert_allclose(seen["cosines"][:, 2], seen["reach"], atol=1e-3)
    assert seen["asyrp_identity"] < 1e-5
    assert seen["plane"].accuracy > 0.9
    changes = [jump[2] for jump in seen["jumps"]]
    assert np.all(np.isfinite(changes)) and changes[0] < changes[-1]
    capsys.readouterr()


def test_finetuning(digits, monkeypatch, capsys):
    seen = run(ROOT / "notebooks" / "finetuning.ipynb", digits, monkeypatch)
    for n, (u, v) in seen["statistics"].items():
        for values, truth in ((u, 0), (v, seen["bias"][n])):
            assert abs(values.mean() - truth) < 4 * values.std(ddof=1) / len(values) ** 0.5
    for before, after in seen["laws"].values():
        assert before[1] < 0.3 and abs(after[1] - 0.5) < 0.05 and abs(after[0] - 0.2) < 0.05
    distances = seen["distances"]
    for name in ("all weights", "last step", "adapter"):
        assert distances[f"3 steps, {name}"] < 0.7 * distances["3 steps"]
    assert next(iter(seen["found"])) == "tuned, classifier"
    assert all(np.isfinite(row["frechet"]) for row in seen["found"].values())
    for lines in seen["curves"].values():
        assert any("held_out_loss" in line for line in lines)
    capsys.readouterr()


def test_guidance(digits, monkeypatch, capsys):
    seen = run(ROOT / "notebooks" / "guidance.ipynb", digits, monkeypatch)
    far = seen["measured"]
    assert len(far) == 25 and np.all(np.isfinite(list(far.values())))
    for law in ("CFG, 3", "quotient"):
        assert far[f"{law}, chains"] < far[law] / 3
    capsys.readouterr()


def test_distillation(digits, monkeypatch, capsys):
    seen = run(ROOT / "notebooks" / "distillation.ipynb", digits, monkeypatch)
    slopes = {name: np.array(values) - 1 for name, values in seen["slopes"].items()}
    np.testing.assert_allclose(slopes["DDIM, and training on data"], [-0.146, -0.076], atol=1e-3)
    np.testing.assert_allclose(slopes["Heun's method"], [0.049, 0.0115], atol=1e-3)
    assert all(np.isfinite(values).all() for values in seen["distances"].values())
    for alpha, pulls in seen["pulls"].items():
        assert pulls[0] < 0 < pulls[1] and (pulls[-1] < 0) == (alpha == 1.2)
    assert seen["seen"][0][1] > 10 * seen["seen"][1][1]
    capsys.readouterr()


def test_unlearning(digits, monkeypatch, capsys):
    seen = run(ROOT / "notebooks" / "unlearning.ipynb", digits, monkeypatch)
    found = seen["found"]
    assert len(found) == 9 and all(np.isfinite(list(row.values())).all() for row in found.values())
    # Another name for the class changes nothing else.
    assert found["renamed"]["unasked"] == found["before"]["unasked"]
    assert seen["errors"]["renamed"] == [1.0] * 5
    np.testing.assert_allclose(seen["curves"]["renamed"], seen["curves"]["before"])
    assert np.isfinite(seen["pictures"]["after"]).all()
    capsys.readouterr()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_with_outputs_and_nothing_private(path):
    code, text = cells(path), path.read_text()
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1))  # in order, once
    outputs = [output for cell in code for output in cell["outputs"]]
    assert outputs and all(o["output_type"] != "error" for o in outputs)
    assert any("image/png" in o.get("data", {}) for o in outputs)
    assert path.stat().st_size < 1.5e6
    pictures = r'"image/png": "[^"]*"'
    words = re.sub(pictures, "", text)
    for private in (r"/(home|Users|root|tmp|work|private|mnt|opt)/", r"[A-Z]:\\\\", r"\w@\w+\.\w"):
        assert not re.search(private, words), private
    assert set(json.loads(text)["metadata"]) <= {"kernelspec", "language_info"}
