"""Makes what is derived: the tables of README.md from results/*.json, and results/diffs/*.diff.

python results/tables.py            # writes them
python results/tables.py --check    # exit code 1 if one is stale (a test runs this)
"""

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


def readme():
    """README.md with what stands between `<!-- table NAME -->` and `<!-- end -->` made anew."""
    return re.sub(
        r"(<!-- table (\w+) -->\n).*?(<!-- end -->)",
        lambda found: "{}{}\n{}".format(
            found.group(1),
            (matches if "matches" in found.group(2) else table)(found.group(2)),
            found.group(3),
        ),
        (ROOT / "README.md").read_text(),
        flags=re.DOTALL,
    )


def main():
    made = diffs() | {ROOT / "README.md": readme()}
    stale = [path for path, text in made.items() if not path.exists() or path.read_text() != text]
    stale += [path for path in (ROOT / "results" / "diffs").glob("*.diff") if path not in made]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"stale: {path.relative_to(ROOT)}; run python results/tables.py")
        raise SystemExit(bool(stale))
    for path in stale:
        path.unlink() if path not in made else path.write_text(made[path])
        print(f"made {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
