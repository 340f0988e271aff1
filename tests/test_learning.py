"""Slow: each script must really learn; a method that was broken without a sound, so that it runs
and its loss falls, is found here.

All trainings of default recipes are stopped after EPOCHS of their epochs, as by a user, and two of
them run at a time, with one core each."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ROOT, run

EPOCHS = 10  # of 20 to 30
FLOORS = {  # kNN top-1 in percent after EPOCHS; random weights: 20 to 25, densecl and moco_v3 to 43
    "simclr": 62, "moco_v1": 64, "moco_v2": 62, "moco_v3": 67, "simsiam": 54, "byol": 34,
    "barlow": 53, "swav": 45, "densecl": 66,
}
ENQUEUE = "        enqueue(self.queue, self.queue_ptr, k)"
MUTATIONS = {  # what only hurts learning: a flag and its value, or a piece of code and another
    **{(name, "temperature times 10"): ("--temperature", str(10 * temperature))
       for name, temperature in (("simclr", 0.2), ("moco_v1", 0.1), ("moco_v2", 0.2),
                                 ("densecl", 0.2), ("moco_v3", 0.1), ("swav", 0.1))},
    **{(name, f"momentum {momentum}"): ("--ema-momentum", momentum) for momentum in "01"
       for name in ("moco_v1", "moco_v2", "densecl", "moco_v3", "byol")},
    ("simclr", "labels off by one"): ("own.roll(n)", "own.roll(n + 1)"),
    ("moco_v1", "queue never updated"): (ENQUEUE, "        "),
    ("moco_v2", "queue never updated"): (ENQUEUE, "        "),
    ("densecl", "dense queue never updated"): (
        "        enqueue(self.dense_queue, self.dense_queue_ptr, pooled)", "        "),
    ("byol", "stop-gradient removed, target is the online network"): (
        "        with torch.no_grad():  # no gradient to the target; its batch normalisation is in "
        "train mode\n            target_z1, target_z2 = self.target_encoder(x1), "
        "self.target_encoder(x2)", "        target_z1, target_z2 = (z1, z2)"),
    ("byol", "predictor removed"): (
        "p1, p2 = self.predictor(z1), self.predictor(z2)", "p1, p2 = z1, z2"),
    ("simsiam", "stop-gradient removed"): ("z.detach(), dim=1)", "z, dim=1)"),
    ("simsiam", "predictor removed"): (
        "p1, p2 = self.predictor(z1), self.predictor(z2)", "p1, p2 = z1, z2"),
    ("barlow", "no redundancy term"): ("--redundancy-weight", "0"),
    ("barlow", "only the redundancy term"): ("return on_diagonal +", "return"),
    ("swav", "epsilon times 10"): ("--epsilon", "0.5"),
    ("swav", "no equal shares"): ("codes = codes / share", "codes = codes"),
}
UNSEEN = {  # they learn nearly as well, or better, for so many epochs: only exact tests see these
    ("moco_v1", "momentum 0"), ("densecl", "dense queue never updated"),
    ("moco_v3", "temperature times 10"), ("moco_v3", "momentum 0"), ("byol", "momentum 0"),
    ("swav", "temperature times 10"),
}


def train(name, out, old=None, new=None):
    """Trains a default recipe, perhaps a mutated one, for EPOCHS -> (log, what it printed)."""
    source, flags = ROOT, []
    if old and old.startswith("--"):
        flags = [old, new]
    elif old:
        source = out.with_name(out.name + "-source")
        source.mkdir()
        shutil.copy(ROOT / "common.py", source)
        text = (ROOT / f"{name}.py").read_text()
        assert text.count(old) == 1, f"{name}.py no longer has: {old}"
        (source / f"{name}.py").write_text(text.replace(old, new))
    log, started = [], time.time()
    with subprocess.Popen(
        [sys.executable, f"{name}.py", "--out", out, *flags], cwd=source, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        while process.poll() is None and len(log) <= EPOCHS and time.time() < started + 1500:
            time.sleep(0.2)
            if (out / "log.jsonl").exists():
                log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "the same command goes on" in said, said
    assert torch.load(out / "checkpoint.pt", weights_only=True)["epoch"] >= EPOCHS
    return log, said


@pytest.fixture(scope="module")
def trainings(request, tmp_path_factory):
    """What the selected tests need, as futures: all wait in one line for the two cores."""
    folder, futures = tmp_path_factory.mktemp("trainings"), {}
    with ThreadPoolExecutor(2) as pool:
        for item in request.session.items:
            if "trainings" in getattr(item, "fixturenames", ()):
                key = item.callspec.params.get("mutation") or (item.callspec.params["script"], "")
                out = folder / str(len(futures))
                futures[key] = pool.submit(train, key[0], out, *MUTATIONS.get(key, ()))
        yield futures


@pytest.mark.slow
def test_default_recipe_learns(script, trainings):
    """Far above random weights, and near what was measured when the script was right."""
    log, said = trainings[script.__name__, ""].result()
    print({line["epoch"]: line["knn_top1"] for line in log if "knn_top1" in line})
    assert log[EPOCHS]["knn_top1"] >= FLOORS[script.__name__]
    assert log[EPOCHS]["knn_top1"] >= log[0]["knn_top1"] + 10
    assert log[EPOCHS]["std"] > 0.4 and log[EPOCHS]["effective_rank"] > 4
    assert "warning" not in said


@pytest.mark.exhaustive  # twenty minutes; shows that the floors would see these
@pytest.mark.parametrize("mutation", sorted(MUTATIONS.keys() - UNSEEN), ids=" ".join)
def test_mutations_fall_under_the_floor(mutation, trainings):
    log, said = trainings[mutation].result()
    line = log[EPOCHS]
    print(f"kNN {line['knn_top1']:.1f} %, std {line['std']:.2f}, rank {line['effective_rank']:.0f}")
    assert line["knn_top1"] < FLOORS[mutation[0]] or "warning" in said


@pytest.mark.slow
def test_the_first_command_to_its_end(tmp_path):
    """What the README starts with: the whole recipe, the linear classifier, the picture."""
    ran = run("simclr.py", "--out", tmp_path, threads=2, limit=1500)
    assert ran.returncode == 0, ran.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["linear_top1"] >= 72  # random weights: 33
    assert result["knn_top1"] >= 60 and (tmp_path / "report.png").stat().st_size > 100_000
