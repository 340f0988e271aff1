"""Slow: each script must really learn. A method that was broken without a sound, so that it runs
and its loss falls, is found here.

Each training is stopped before its schedule ends, as by a user."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import METHODS, ROOT, checkpoint_of, run

TRAININGS = {  # epochs trained, of a schedule of so many, and the kNN top-1 (%) to reach. Random
    # weights have 20 to 25, densecl and moco_v3 up to 43. How soon byol and simsiam begin to learn
    # differs between seeds and processors.
    "simclr": (10, 20, 62),
    "moco_v1": (10, 20, 64),
    "moco_v2": (10, 20, 62),
    "moco_v3": (10, 30, 67),
    "simsiam": (15, 25, 34),
    "byol": (15, 30, 36),
    "barlow": (10, 25, 53),
    "swav": (10, 20, 45),
    "densecl": (10, 20, 55),
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
    """Trains a default recipe, perhaps a mutated one, for some epochs -> (log, what it printed)."""
    flags = FLAGS.get((name, mutation), [])
    edits = EDITS.get((name, mutation), {})
    folder = out.with_name(f"{out.name}-source")
    folder.mkdir()
    for module in ("common.py", "harness.py"):
        shutil.copy(ROOT / module, folder)
    (folder / f"{name}.py").write_text(edited(name, edits))
    log = []
    epochs, schedule, _ = TRAININGS[name]
    end = time.time() + 1500
    with subprocess.Popen(
        [sys.executable, f"{name}.py", "--out", out, "--epochs", str(schedule), *flags],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        while process.poll() is None and len(log) <= epochs and time.time() < end:
            time.sleep(0.2)
            if (out / "log.jsonl").exists():
                log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        process.send_signal(signal.SIGTERM)
        printed = process.communicate(timeout=60)[0]
    assert process.returncode == 130, printed
    assert "the same command continues" in printed
    assert len(checkpoint_of(out)["log"]) > epochs
    return log, printed


def test_every_method_has_its_floor():
    assert sorted(TRAININGS) == METHODS


@pytest.mark.parametrize("name, mutation", sorted(EDITS))
def test_what_is_edited_is_there_once(name, mutation):
    compile(edited(name, EDITS[name, mutation]), name, "exec")


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns(name, tmp_path):
    """Far above random weights, and above what a broken script reaches."""
    log, printed = train(name, "", tmp_path / "run")
    print({line["epoch"]: line["knn_top1"] for line in log if "knn_top1" in line})
    epochs, _, floor = TRAININGS[name]
    line = log[epochs]
    assert line["knn_top1"] >= floor
    assert line["knn_top1"] >= log[0]["knn_top1"] + 10
    assert line["std"] > 0.4
    assert line["effective_rank"] > 4
    assert "warning" not in printed


@pytest.mark.exhaustive  # shows that the floors would see these
@pytest.mark.parametrize("name, mutation", MUTATIONS)
def test_mutations_fall_under_the_floor(name, mutation, tmp_path):
    log, printed = train(name, mutation, tmp_path / "run")
    epochs, _, floor = TRAININGS[name]
    line = log[epochs]
    print(f"kNN {line['knn_top1']:.1f} %, std {line['std']:.2f}, rank {line['effective_rank']:.0f}")
    assert line["knn_top1"] < floor or "warning" in printed


@pytest.mark.slow
def test_the_first_command_to_its_end(tmp_path):
    """What the README starts with: the whole recipe, the linear classifier, the picture."""
    ran = run("simclr.py", "--out", tmp_path, limit=1500)
    assert ran.returncode == 0, ran.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["linear_top1"] >= 72  # random weights: 33
    assert result["knn_top1"] >= 60
    assert (tmp_path / "report.png").stat().st_size > 100_000
