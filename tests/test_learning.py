"""Slow: each script must really learn. A method that was broken without a sound, so that it runs
and its loss falls, is found here.

All trainings are stopped after EPOCHS of their epochs, as by a user, and two of them run at a time,
with one core each."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import METHODS, ROOT, checkpoint_of, run

EPOCHS = 10  # of so many, with the schedule of a run of that length
SCHEDULES = {"byol": 30, "moco_v3": 30, "simsiam": 25, "barlow": 25}
SCHEDULE = 20  # of the others
FLOORS = {  # kNN top-1 in percent after EPOCHS; random weights: 20 to 25, densecl and moco_v3 to 43
    "simclr": 62,
    "moco_v1": 64,
    "moco_v2": 62,
    "moco_v3": 67,
    "simsiam": 54,
    "byol": 34,
    "barlow": 53,
    "swav": 45,
    "densecl": 66,
}
ENQUEUE = "enqueue(self.queue, self.queue_ptr, k)"
ENQUEUE_DENSE = "enqueue(self.dense_queue, self.dense_queue_ptr, pooled_k)"
PREDICTOR_1 = "p1 = self.predictor(z1)"
PREDICTOR_2 = "p2 = self.predictor(z2)"
FLAGS = {  # what only hurts learning: (script, name): flags
    ("simclr", "temperature times 10"): ["--temperature", "2"],
    ("moco_v1", "temperature times 10"): ["--temperature", "1"],
    ("moco_v2", "temperature times 10"): ["--temperature", "2"],
    ("moco_v3", "temperature times 10"): ["--temperature", "1"],
    ("densecl", "temperature times 10"): ["--temperature", "2"],
    ("swav", "temperature times 10"): ["--temperature", "1"],
    ("swav", "epsilon times 10"): ["--epsilon", "0.5"],
    ("barlow", "no redundancy term"): ["--redundancy-weight", "0"],
    ("moco_v1", "momentum 0"): ["--ema-momentum", "0"],
    ("moco_v2", "momentum 0"): ["--ema-momentum", "0"],
    ("moco_v3", "momentum 0"): ["--ema-momentum", "0"],
    ("densecl", "momentum 0"): ["--ema-momentum", "0"],
    ("byol", "momentum 0"): ["--ema-momentum", "0"],
    ("moco_v1", "momentum 1"): ["--ema-momentum", "1"],
    ("moco_v2", "momentum 1"): ["--ema-momentum", "1"],
    ("moco_v3", "momentum 1"): ["--ema-momentum", "1"],
    ("densecl", "momentum 1"): ["--ema-momentum", "1"],
    ("byol", "momentum 1"): ["--ema-momentum", "1"],
}
EDITS = {  # the same for edits: {a piece of the script's source: what replaces it}
    ("simclr", "labels off by one"): {
        "partner = torch.cat([second, first])": "partner = torch.cat([second, first]).roll(1)"
    },
    ("moco_v1", "queue never updated"): {ENQUEUE: "pass"},
    ("moco_v2", "queue never updated"): {ENQUEUE: "pass"},
    ("densecl", "dense queue never updated"): {ENQUEUE_DENSE: "pass"},
    ("byol", "stop-gradient removed, target is the online network"): {
        "target_z1 = self.target_encoder(x1)": "pass",
        "target_z2 = self.target_encoder(x2)": "pass",
        "regression_loss(p1, target_z2)": "regression_loss(p1, z2)",
        "regression_loss(p2, target_z1)": "regression_loss(p2, z1)",
    },
    ("byol", "predictor removed"): {PREDICTOR_1: "p1 = z1", PREDICTOR_2: "p2 = z2"},
    ("simsiam", "stop-gradient removed"): {"z.detach(), dim=1)": "z, dim=1)"},
    ("simsiam", "predictor removed"): {PREDICTOR_1: "p1 = z1", PREDICTOR_2: "p2 = z2"},
    ("barlow", "only the redundancy term"): {"return on_diagonal +": "return"},
    ("swav", "no equal shares"): {"codes = codes / share": "codes = codes"},
}
UNSEEN = {  # they learn nearly as well, or better, for so many epochs: only exact tests see these
    ("moco_v1", "momentum 0"),
    ("densecl", "dense queue never updated"),
    ("moco_v3", "temperature times 10"),
    ("moco_v3", "momentum 0"),
    ("byol", "momentum 0"),
    ("swav", "temperature times 10"),
}
MUTATIONS = sorted((FLAGS.keys() | EDITS.keys()) - UNSEEN)


def edited(name, edits):
    source = (ROOT / f"{name}.py").read_text()
    for old, new in edits.items():
        assert source.count(old) == 1, f"{name}.py no longer has exactly one: {old}"
        source = source.replace(old, new)
    return source


def train(name, mutation, out):
    """Trains a default recipe, perhaps a mutated one, for EPOCHS -> (log, what it printed)."""
    flags = FLAGS.get((name, mutation), [])
    edits = EDITS.get((name, mutation), {})
    folder = out.with_name(f"{out.name}-source")
    folder.mkdir()
    for module in ("common.py", "harness.py"):
        shutil.copy(ROOT / module, folder)
    (folder / f"{name}.py").write_text(edited(name, edits))
    log = []
    epochs = str(SCHEDULES.get(name, SCHEDULE))
    end = time.time() + 1500
    with subprocess.Popen(
        [sys.executable, f"{name}.py", "--out", out, "--epochs", epochs, *flags],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        while process.poll() is None and len(log) <= EPOCHS and time.time() < end:
            time.sleep(0.2)
            if (out / "log.jsonl").exists():
                log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        process.send_signal(signal.SIGTERM)
        printed = process.communicate(timeout=60)[0]
    assert process.returncode == 130, printed
    assert "the same command continues" in printed
    assert len(checkpoint_of(out)["log"]) > EPOCHS
    return log, printed


@pytest.fixture(scope="module")
def trainings(request, tmp_path_factory):
    """What the selected tests need, as futures: all wait in one line for the two cores."""
    folder = tmp_path_factory.mktemp("trainings")
    futures = {}
    with ThreadPoolExecutor(2) as pool:
        for item in request.session.items:
            if "trainings" in getattr(item, "fixturenames", ()):
                key = item.callspec.params["name"], item.callspec.params.get("mutation", "")
                out = folder / str(len(futures))
                futures[key] = pool.submit(train, *key, out)
        yield futures


def test_every_method_has_its_floor():
    assert sorted(FLOORS) == METHODS


@pytest.mark.parametrize("name, mutation", sorted(EDITS))
def test_what_is_edited_is_there_once(name, mutation):
    compile(edited(name, EDITS[name, mutation]), name, "exec")


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns(name, trainings):
    """Far above random weights, and near what was measured when the script was right."""
    log, printed = trainings[name, ""].result()
    print({line["epoch"]: line["knn_top1"] for line in log if "knn_top1" in line})
    line = log[EPOCHS]
    assert line["knn_top1"] >= FLOORS[name]
    assert line["knn_top1"] >= log[0]["knn_top1"] + 10
    assert line["std"] > 0.4
    assert line["effective_rank"] > 4
    assert "warning" not in printed


@pytest.mark.exhaustive  # shows that the floors would see these
@pytest.mark.parametrize("name, mutation", MUTATIONS)
def test_mutations_fall_under_the_floor(name, mutation, trainings):
    log, printed = trainings[name, mutation].result()
    line = log[EPOCHS]
    print(f"kNN {line['knn_top1']:.1f} %, std {line['std']:.2f}, rank {line['effective_rank']:.0f}")
    assert line["knn_top1"] < FLOORS[name] or "warning" in printed


@pytest.mark.slow
def test_the_first_command_to_its_end(tmp_path):
    """What the README starts with: the whole recipe, the linear classifier, the picture."""
    ran = run("simclr.py", "--out", tmp_path, threads=2, limit=1500)
    assert ran.returncode == 0, ran.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["linear_top1"] >= 72  # random weights: 33
    assert result["knn_top1"] >= 60
    assert (tmp_path / "report.png").stat().st_size > 100_000
