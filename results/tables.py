"""Makes what is derived from other files: the tables in README.md and results/README.md, and
results/diffs/.

    python -m results.tables            # writes what is stale
    python -m results.tables --check    # exit code 1 and a line for each stale file
"""

import argparse
import difflib
import json
import re
import statistics

from common import fail
from results.few_labels import RANDOM, SEEDS
from results.methods import ROOT, SCRIPTS, parent

LONGEST_DIFF = 250  # lines from which on nobody would read a diff
MARKED = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def diffs():
    """{path: text} of the diffs between scripts and their parents, without the long ones; of
    clip.py a long one as well, since it is read beside a script of another kind."""
    made = {}
    for child in SCRIPTS:
        old = parent(child)
        if old is None:
            continue
        names = [f"{old}.py", f"{child}.py"]
        texts = [(ROOT / name).read_text().splitlines(keepends=True) for name in names]
        lines = list(difflib.unified_diff(*texts, *names, n=1))
        if len(lines) < LONGEST_DIFF or child == "clip":
            made[ROOT / "results" / "diffs" / f"{old}--{child}.diff"] = "".join(lines)
    return made


# -------------------------------------------------------------------------------------- tables
def read(name):
    """The runs recorded in results/<name>.json, or, one per line, in results/<name>.jsonl."""
    path = ROOT / "results" / f"{name}.json"
    if path.exists():
        return json.loads(path.read_text())
    path = path.with_suffix(".jsonl")
    if not path.exists():
        fail(f"there is a place for a table, but no file results/{name}.json or .jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def grouped(runs, *keys):
    """The runs, in lists of those that agree in these keys."""
    groups = {}
    for run in runs:
        values = tuple(run[key] for key in keys)
        groups.setdefault(values, []).append(run)
    return groups.values()


def spread(runs, key, scale=1):
    """Mean ± standard deviation; of a single run, its value."""
    values = [scale * run[key] for run in runs]
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def link(run, root):
    return f"[{run['method']}]({root}{run['method']}.py)"


def markdown(columns, rows):
    lines = [columns, ["-"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)


def devices(runs):
    return "; ".join(sorted({f"{run['device']}, torch {run['torch']}" for run in runs}))


def accuracies(runs, root):
    """Of the nine methods, and of a supervised network beside them. On patterns also from one and
    from three labels per class; photographs have a table of that for themselves."""
    columns = ["method", "backbone", "epochs", "seeds", "linear top-1 (%)", "kNN top-1 (%)"]
    columns.append("both, random weights")
    few = [line for line in read("few_labels") if line["data"] == runs[0]["data"]]
    shown = (1, 3) if runs[0]["data"] == "patterns" else ()
    if shown:
        columns.append("linear, 1 / 3 labels per class")
    columns.append("training (s)")
    rows = []
    for group in grouped(runs, "method", "arch", "epochs"):
        first = group[0]
        row = [link(first, root), first["arch"], first["epochs"], len(group)]
        row.append(spread(group, "linear_top1"))
        row.append(f"{spread(group, 'knn_top1')} (k={first['knn_k']})")
        row.append(f"{spread(group, 'random_linear_top1')}, {spread(group, 'random_knn_top1')}")
        if shown:
            same = {"method": first["method"], "epochs": first["epochs"], "steps": 0}
            row.append(" / ".join(with_labels(few, labels, same) for labels in shown))
        row.append(spread(group, "seconds"))
        rows.append(row)
    supervised = [line for line in few if line["steps"] and line["method"] == RANDOM]
    whole = with_labels(supervised, 0, {})
    if whole:
        row = ["supervised, from scratch", "thin", "", len(SEEDS), whole, "", ""]
        if shown:
            row.append(" / ".join(with_labels(supervised, labels, {}) for labels in shown))
        rows.append([*row, ""])
    return f"{markdown(columns, rows)}\n\nDevice: {devices(runs)}."


def with_labels(lines, labels, same):
    """Mean ± standard deviation of the lines from so many labels per class that agree with `same`;
    an empty cell where there is none."""
    wanted = {"labels": labels, **same}
    found = [line for line in lines if wanted.items() <= line.items()]
    return spread(found, "top1") if found else ""


def few_labels(lines, _):
    """Of what results/few_labels.py records on photographs."""
    numbers = sorted({line["labels"] for line in lines} - {0})
    columns = ["pre-training", "epochs", "what the labels train"]
    columns += [f"{n} label{'s' if n > 1 else ''} per class (%)" for n in numbers]
    rows = []
    photographs = [line for line in lines if line["data"] != "patterns"]

    def order(line):
        return line["steps"], line["method"] == RANDOM, line["method"], line["epochs"]

    photographs.sort(key=order)
    for group in grouped(photographs, "method", "epochs", "steps"):
        first = group[0]
        if not any(line["labels"] for line in group):
            continue  # a supervised network with all labels stands in the table of the methods
        name = "none: random weights" if first["method"] == RANDOM else first["method"]
        trained = "a linear classifier"
        if first["steps"]:
            trained = f"the network, {first['steps']} steps"
        row = [name, first["epochs"] or "", trained]
        rows.append([*row, *[with_labels(group, n, {}) for n in numbers]])
    return markdown(columns, rows)


def accuracies_short(runs, root):
    columns = ["method", "linear top-1 (%)", "kNN top-1 (%)", "random weights, linear (%)"]
    columns.append("training, one CPU thread (min)")
    rows = []
    for group in grouped(runs, "method", "arch", "epochs"):
        row = [link(group[0], root)]
        for key in ("linear_top1", "knn_top1", "random_linear_top1"):
            row.append(spread(group, key))
        row.append(spread(group, "seconds", scale=1 / 60))
        rows.append(row)
    return markdown(columns, rows)


def one_gpu(runs, root):
    """Of the lines that results/cifar10.py records."""
    columns = ["method", "images", "backbone", "epochs", "batch", "seeds", "kNN k=200 (%)"]
    columns += ["kNN k=10 (%)", "linear top-1 (%)", "training (min)", "images/s"]
    columns += ["TFLOP/s (of bf16)", "memory (GiB)", "device"]
    same = ("method", "data", "arch", "epochs", "batch_size", "device", "torch")
    rows = []
    for group in grouped(runs, *same):
        first = group[0]
        row = [link(first, root), first["data"], first["arch"], first["epochs"]]
        row += [first["batch_size"], len(group)]
        for key in ("knn200_top1", "knn10_top1", "linear_top1", "minutes", "images_per_second"):
            row.append(spread(group, key))
        share = f" ({first['share']:.0%})" if first["share"] else ""
        row.append(spread(group, "tflops") + share)
        row.append(spread(group, "memory_gib") if first["memory_gib"] else "")
        row.append(devices(group))
        rows.append(row)
    return markdown(columns, rows)


def parts_of_a_step(runs, root):
    """Of what results/steps.py records."""
    first = runs[0]
    columns = ["method", *first["milliseconds"], "images/s", "TFLOP/s"]
    rows = []
    for run in runs:
        row = [link(run, root)]
        row += [f"{value:.0f}" for value in run["milliseconds"].values()]
        row += [f"{run['images_per_second']:.0f}", f"{run['tflops']:.2f}"]
        rows.append(row)
    return (
        f"{markdown(columns, rows)}\n\nMilliseconds; {first['arch']}, {first['batch_size']} images "
        f"of 32 pixels per step. Device: {devices(runs)}."
    )


def matches(runs, _):
    """Of what results/matches.py records."""
    columns = ["images", "backbone", "epochs", "seeds", "trained (%)", "random weights (%)"]
    columns.append("a guess (%)")
    rows = []
    for group in grouped(runs, "data", "arch", "epoch"):
        first = group[0]
        row = [first["data"], first["arch"], first["epoch"], len(group)]
        row += [spread(group, "trained"), spread(group, "random"), f"{first['guess']:.1f}"]
        rows.append(row)
    return markdown(columns, rows)


def findings(entries, _):
    """Of what results/findings.py makes from its runs."""
    columns = ["finding", "claim", "source", "paper", "here, linear top-1 (%)"]
    columns.append("gap and standard error: verdict")
    rows = []
    waiting = []
    for entry in entries:
        if entry["verdict"] == "not measured":
            waiting.append(entry["key"])
            continue
        paper = [f"{name}: {value}" for name, value in entry["paper"].items()]
        here = []
        for name, arm in entry["arms"].items():
            found = arm["found"]
            if found is not None:
                std = f" ± {found['std']:.1f}" if found["std"] is not None else ""
                here.append(f"{name}: {found['mean']:.1f}{std}")
        row = [entry["key"], entry["claim"], entry["source"], ", ".join(paper), ", ".join(here)]
        verdicts = []
        for line in entry["compare"]:
            some = len(line["arms"]) < len(entry["arms"])
            names = f"{' / '.join(line['arms'])}: " if some else ""
            gap = f"{line['gap']:+.1f} ({line['error']:.1f})"
            verdicts.append(f"{names}{gap}: **{line['verdict']}**")
        rows.append([*row, "; ".join(verdicts)])
    text = markdown(columns, rows) if rows else "No finding has all its runs yet."
    if waiting:
        text += f"\n\nRuns are missing for: {', '.join(waiting)}."
    return text


def zero_shot(runs, _):
    """Of what `python -m results.series zero_shot` records."""
    columns = ["text encoder", "seeds", "ten families (%)", "on grounds (%)"]
    columns += ["family and ground, 60-way: seen (%)", "held out (%)", "image to text @1 / @5 (%)"]
    columns += ["text to image @1 / @5 (%)", "linear (%)", "training (s)"]
    rows = []
    for group in grouped(runs, "arm"):
        rows.append([group[0]["arm"], len(group), *zero_shot_cells(group, "")])
        rows[-1].append(spread(group, "seconds"))
    rows.append(["random weights", len(runs), *zero_shot_cells(runs, "random_"), ""])
    return f"{markdown(columns, rows)}\n\nDevice: {devices(runs)}."


def zero_shot_cells(runs, start):
    cells = []
    for key in ("zero_shot", "pasted", "seen", "held_out"):
        cells.append(spread(runs, f"{start}{key}_top1"))
    for key in ("image_to_text", "text_to_image"):
        first = spread(runs, f"{start}{key}_top1")
        cells.append(f"{first} / {spread(runs, f'{start}{key}_top5')}")
    return [*cells, spread(runs, f"{start}linear_top1")]


def open_vocabulary(runs, _):
    """Of what `python -m results.series open_vocabulary` records. Of one series of runs come also
    the rows of CLIP on crops and of chance."""
    columns = ["detector", "seeds", "base AP50 (%)", "novel AP50 (%)", "base AP (%)"]
    columns += ["novel AP (%)", "detection (ms per image)", "training (s)"]
    rows = []
    for group in grouped(runs, "arm"):
        row = [group[0]["arm"], len(group)]
        row += detector_cells(group, "")
        row.append(spread(group, "detection_seconds", scale=1000))
        rows.append([*row, spread(group, "seconds")])
    distilled = [run for run in runs if run["arm"] == "ViLD-ensemble"]
    if distilled:
        for way, name in (("text", "the ensemble's text head"), ("image", "its image head")):
            rows.append([name, len(distilled), *detector_cells(distilled, f"{way}_"), "", ""])
        row = ["CLIP on its proposals", len(distilled), *detector_cells(distilled, "teacher_")]
        rows.append([*row, spread(distilled, "teacher_seconds", scale=1000), ""])
        guess = spread(distilled, "guess_novel_ap50")
        rows.append(["a guess among the novel names", len(distilled), "", guess, "", "", "", ""])
    return f"{markdown(columns, rows)}\n\nDevice: {devices(runs)}."


def detector_cells(runs, start):
    cells = []
    for key in ("ap50", "ap"):
        for kind in ("base", "novel"):
            name = f"{start}{kind}_{key}"
            cells.append(spread(runs, name) if name in runs[0] else "")
    return cells


def pretraining(runs, _):
    """Of what `python -m results.series pretraining` records. Each run also trains from scratch, on
    the same scenes; of the runs whose names begin with it, only that counts."""
    columns = ["pre-training", "seeds", "AP50 after a third (%)", "AP50 (%)", "AP (%)"]
    columns += ["patches found: own / of another image (%)", "pre-training (s)", "fine-tuning (s)"]
    rows = []
    for group in grouped(runs, "arm"):
        name = group[0]["arm"]
        if name.startswith("scratch"):
            rows.append([name, len(group), *precision_cells(group, "scratch_"), "", "", ""])
        else:
            found = [spread(group, "pretext_share"), spread(group, "pretext_other_share")]
            row = [name, len(group), *precision_cells(group, ""), " / ".join(found)]
            rows.append([*row, spread(group, "seconds"), spread(group, "tune_seconds")])
        if name == "random patches":
            row = ["none: scratch", len(group), *precision_cells(group, "scratch_"), "", ""]
            rows.append([*row, spread(group, "scratch_tune_seconds")])
    return f"{markdown(columns, rows)}\n\nDevice: {devices(runs)}."


def precision_cells(runs, start):
    return [spread(runs, f"{start}{key}") for key in ("third_ap50", "ap50", "ap")]


TABLES = {  # name: the file with the runs, and what makes the table of them
    "patterns": ("patterns", accuracies),
    "patterns_short": ("patterns", accuracies_short),
    "laptop": ("laptop", accuracies),
    "few_labels": ("few_labels", few_labels),
    "cifar10": ("cifar10", one_gpu),
    "steps": ("steps", parts_of_a_step),
    "densecl_matches": ("densecl_matches", matches),
    "findings": ("findings", findings),
    "zero_shot": ("zero_shot", zero_shot),
    "open_vocabulary": ("open_vocabulary", open_vocabulary),
    "pretraining": ("pretraining", pretraining),
}


def fill(text, root):
    """The text, with what stands between `<!-- table NAME -->` and `<!-- end -->` made anew; root:
    where the scripts are, as seen from the file."""

    def made(place):
        start, name, end = place.groups()
        if name not in TABLES:
            fail(f"<!-- table {name} -->: not one of {', '.join(TABLES)}")
        file, make = TABLES[name]
        return f"{start}{make(read(file), root)}\n{end}"

    return MARKED.sub(made, text)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = fail
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args(argv).check
    made = diffs()
    for path, root in ((ROOT / "README.md", ""), (ROOT / "results" / "README.md", "../")):
        made[path] = fill(path.read_text(), root)
    obsolete = set((ROOT / "results" / "diffs").glob("*.diff")) - made.keys()
    stale = [path for path, text in made.items() if not path.exists() or path.read_text() != text]
    stale += sorted(obsolete)
    for path in stale:
        name = path.relative_to(ROOT)
        if check:
            print(f"stale: {name}; run python -m results.tables")
        elif path in obsolete:
            path.unlink()
            print(f"removed {name}")
        else:
            path.write_text(made[path])
            print(f"made {name}")
    if check and stale:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
