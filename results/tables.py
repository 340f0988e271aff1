"""Makes what is derived: the tables of README.md from results/*.json, results/diffs/*.diff, and
results/compare.png, the README's picture, which is a cell's output in notebooks/compare.ipynb.

python results/tables.py            # writes them
python results/tables.py --check    # exit code 1 if one is stale (a test runs this)
"""

import base64
import difflib
import json
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if path.stem != "common")


def parent_of(script):
    """The script beside which this one's docstring asks to be read, or None."""
    found = re.search(
        r"^Read it (?:beside|as a diff of) (\w+)\.py",
        (ROOT / f"{script}.py").read_text(),
        re.MULTILINE,
    )
    return found and found.group(1)


def diffs():
    """{path: text} of each script's diff to its parent."""
    made = {}
    for script in SCRIPTS:
        if parent := parent_of(script):
            old, new = (
                (ROOT / f"{name}.py").read_text().splitlines(keepends=True)
                for name in (parent, script)
            )
            text = "".join(difflib.unified_diff(old, new, f"{parent}.py", f"{script}.py", n=1))
            made[ROOT / "results" / "diffs" / f"{parent}--{script}.diff"] = text
    return made


def picture():
    """The picture in the output of the notebook's cell that says so, as PNG."""
    cells = json.loads((ROOT / "notebooks" / "compare.ipynb").read_text())["cells"]
    cell = next(c for c in cells if "# The README's picture" in "".join(c["source"]))
    return base64.b64decode("".join(cell["outputs"][0]["data"]["image/png"]))


def spread(runs, key):
    values = [run[key] for run in runs]
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def table(name):
    """The rows of results/<name>.json, a line for each setting, as a Markdown table."""
    runs = json.loads((ROOT / "results" / f"{name}.json").read_text())
    groups = {}
    for run in runs:
        groups.setdefault((run["method"], run["arch"], run["epochs"]), []).append(run)
    lines = [
        "| method | backbone | epochs | seeds | linear top-1 (%) | kNN top-1 (%) "
        "| both, random weights | training (s) |",
        "|-|-|-|-|-|-|-|-|",
    ]
    for (method, arch, epochs), group in groups.items():
        columns = [
            f"[{method}]({method}.py)", arch, str(epochs), str(len(group)),
            spread(group, "linear_top1"),
            f"{spread(group, 'knn_top1')} (k={group[0]['knn_k']})",
            f"{spread(group, 'random_linear_top1')}, {spread(group, 'random_knn_top1')}",
            spread(group, "seconds"),
        ]
        lines.append(f"| {' | '.join(columns)} |")
    devices = sorted({f"{run['device']}, torch {run['torch']}" for run in runs})
    return "\n".join([*lines, "", f"Device: {'; '.join(devices)}."])


def matches(name):
    """The rows of results/<name>.json, of results/matches.py, a line for each data set."""
    groups = {}
    for run in json.loads((ROOT / "results" / f"{name}.json").read_text()):
        groups.setdefault((run["data"], run["arch"], run["epoch"]), []).append(run)
    lines = [
        "| images | backbone | epochs | seeds | trained (%) | random weights (%) | a guess (%) |",
        "|-|-|-|-|-|-|-|",
    ]
    for (data, arch, epoch), group in groups.items():
        columns = [data, arch, str(epoch), str(len(group)), spread(group, "trained"),
                   spread(group, "random"), f"{group[0]['guess']:.1f}"]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def cifar10(name):
    """The lines of results/<name>.jsonl, of results/cifar10.py, a line for each setting."""
    path, groups = ROOT / "results" / f"{name}.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else ():
        run = json.loads(line)
        key = [run[key] for key in ("method", "data", "arch", "epochs", "batch_size", "device")]
        groups.setdefault((*key, run["torch"]), []).append(run)
    lines = [
        "| method | images | backbone | epochs | batch | seeds | kNN k=200 (%) | kNN k=10 (%) "
        "| linear top-1 (%) | training (min) | images/s | TFLOP/s (of bf16) | memory (GiB) "
        "| device |",
        "|-|-|-|-|-|-|-|-|-|-|-|-|-|-|",
    ]
    for (method, data, arch, epochs, batch, device, torch), group in groups.items():
        share, memory = group[0]["share"], group[0]["memory_gib"]
        columns = [
            f"[{method}]({method}.py)", data, arch, str(epochs), str(batch), str(len(group)),
            spread(group, "knn200_top1"), spread(group, "knn10_top1"),
            spread(group, "linear_top1"), spread(group, "minutes"),
            spread(group, "images_per_second"),
            spread(group, "tflops") + (f" ({share:.0%})" if share else ""),
            spread(group, "memory_gib") if memory else "", f"{device}, torch {torch}"]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines) if groups else "No run yet: no GPU was at hand."


def steps(name):
    """The rows of results/<name>.json, of results/steps.py: milliseconds of each part."""
    runs = json.loads((ROOT / "results" / f"{name}.json").read_text())
    parts = list(runs[0]["milliseconds"])
    lines = [f"| method | {' | '.join(parts)} | images/s | TFLOP/s |",
             "|-|" + "-|" * (len(parts) + 2)]
    for run in runs:
        shown = [f"{value:.0f}" for value in run["milliseconds"].values()]
        shown += [f"{run['images_per_second']:.0f}", f"{run['tflops']:.2f}"]
        lines.append(f"| [{run['method']}]({run['method']}.py) | {' | '.join(shown)} |")
    first = runs[0]
    return "\n".join([*lines, "", f"Milliseconds; {first['arch']}, {first['batch_size']} images of "
                      f"32 pixels a step; device: {first['device']}, torch {first['torch']}."])


KINDS = {"cifar10": cifar10, "steps": steps, "densecl_matches": matches}


def readme():
    """README.md with what stands between `<!-- table NAME -->` and `<!-- end -->` made anew."""
    return re.sub(
        r"(<!-- table (\w+) -->\n).*?(<!-- end -->)",
        lambda found: "{}{}\n{}".format(
            found.group(1),
            KINDS.get(found.group(2), table)(found.group(2)),
            found.group(3),
        ),
        (ROOT / "README.md").read_text(),
        flags=re.DOTALL,
    )


def main():
    made = diffs() | {ROOT / "README.md": readme()}
    stale = [path for path, text in made.items() if not path.exists() or path.read_text() != text]
    drawn = ROOT / "results" / "compare.png"
    if not drawn.exists() or drawn.read_bytes() != picture():
        stale.append(drawn)
    stale += [path for path in (ROOT / "results" / "diffs").glob("*.diff") if path not in made]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"stale: {path.relative_to(ROOT)}; run python results/tables.py")
        raise SystemExit(bool(stale))
    for path in stale:
        if path == drawn:
            path.write_bytes(picture())
        else:
            path.unlink() if path not in made else path.write_text(made[path])
        print(f"made {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
