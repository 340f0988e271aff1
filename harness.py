"""What every run needs and no paper talks about: command line, checkpoint, log, report picture.

A run leaves in args.out (runs/<script>-<data> by default): log.jsonl, a line per epoch;
checkpoint.pt, from which the same command continues; backbone.pt, the weights under torchvision's
names; result.json; report.png."""

import argparse
import contextlib
import io
import json
import math
import os
import re
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision

from common import (
    TORCHVISION,
    CentreCrops,
    decode,
    decoded,
    fail,
    features,
    image_files,
    is_small,
    make_generator,
    rank,
    world_size,
)

DATA = "patterns, scenes, cifar10, cifar100, stl10, or a folder"
RENDERED = ("patterns", "scenes")
METRICS = {  # what the lines of a run call the figures it has
    "ap50": "AP50",
    "base_ap50": "base",
    "novel_ap50": "novel",
    "zero_shot_top1": "zero-shot top-1",
    "image_to_text_top1": "image to text @1",
    "linear_top1": "linear top-1",
    "knn_top1": "kNN",
}
COLLAPSED = 0.1  # std of z below which a line warns
NO_EFFECT = ("workers", "root", "out", "compile", "overwrite")  # on a run's numbers


# -------------------------------------------------------------------------------- command line
def parse_args(
    script: str, doc: str, settings: dict, argv: list | None = None, uses: dict | None = None
):
    """The settings of a run: those of the recipe that suits the data, then the flags given.

    script: the path of the script; settings: {name: (a value per recipe, ..., line of help)}, in
    which the row "recipe" names the recipes; uses: {name: line of help} of flags that ask for
    something other than a training, None unless given. Returns a namespace with `method`, the
    script's name.
    """
    recipes = settings["recipe"][:-1]
    parser = argparse.ArgumentParser(
        description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = fail
    add = parser.add_argument
    for name, text in {"data": DATA, **(uses or {})}.items():
        add(flag(name), default=recipes[0] if name == "data" else None, help=text)
    add("--recipe", help=f"{', '.join(recipes)}; by default, what suits the data")
    for name, (*values, text) in settings.items():
        if name != "recipe":
            add(flag(name), type=type(values[0]), help=f"{text} {tuple(values)}")
    add("--seed", type=int, default=0)
    add("--precision", default="bf16", choices=["bf16", "fp32"], help="on a GPU; fp32 is TF32")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="decoding processes")
    add("--root", default="data", help="where torchvision keeps its data sets")
    add("--out", help="folder for the results; default runs/<script>-<data>")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--overwrite", action="store_true", help="replace a finished or different run in --out")
    args = parser.parse_args(argv)

    args.method = Path(script).stem
    args.recipe = args.recipe or recipe_for(args.data, recipes)
    if args.recipe not in recipes:
        fail(f"--recipe {args.recipe}: not one of {', '.join(recipes)}")
    for name, (*values, _) in settings.items():
        if name != "recipe" and getattr(args, name) is None:
            setattr(args, name, values[recipes.index(args.recipe)])
    for name, value in vars(args).items():
        whole = type(value) is int and name not in ("seed", "workers")
        may_be_zero = not whole or 0 in settings[name]
        if type(value) in (int, float) and not (0 if may_be_zero else 1) <= value <= 1e9:
            fail(f"{flag(name)} {value}: out of range")
    args.out = args.out or f"runs/{args.method}-{Path(args.data).resolve().name}"
    return args


def flag(name):
    return "--" + name.replace("_", "-")


def recipe_for(data, recipes):
    """The first recipe for rendered data, cifar10 for other small images, imagenet for large ones;
    the second where the script has no recipes of these names."""
    if data in RENDERED:
        return recipes[0]
    if data in TORCHVISION or "imagenet" not in recipes:
        return recipes[1]
    first = next(image_files(Path(data)), None)
    return "cifar10" if first and is_small(first) else "imagenet"


@contextlib.contextmanager
def clean_exit(stopped="stopped; the same command continues after the last finished epoch"):
    """Around a program: Ctrl-C, SIGTERM and a lack of memory end it with one line."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
        if dist.is_initialized():
            dist.barrier()
            time.sleep(0.5)  # gloo's threads still hold tensors; ending before they let go aborts
    except KeyboardInterrupt:
        if rank() == 0:
            print(f"\n{stopped}", flush=True)
        raise SystemExit(130) from None
    except (MemoryError, RuntimeError) as error:
        if not re.search("out of memory|allocate memory|size calculation overflow", str(error)):
            raise
        fail("there is not enough memory: take a smaller --batch-size, --size or network")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# --------------------------------------------------------------------------------- files of a run
def save(path: Path, content: object):
    """Writes text, bytes, or anything torch.save takes, to a temporary file that then replaces
    `path`: there is always one complete file, the new one or the old."""
    temporary = path.with_name(path.name + ".tmp")
    buffer = io.BytesIO()
    if isinstance(content, bytes):
        buffer.write(content)
    elif isinstance(content, str):
        buffer.write(content.encode())
    else:
        torch.save(content, buffer)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        fail(f"cannot write {path} ({error.strerror}); what was there before is kept")


def load_checkpoint(path: Path | str):
    """What torch.save wrote, without running code from it. Exits with one line if it is broken."""
    warnings.filterwarnings("ignore", "'torch.load' received a zip file")  # it gets a line of ours
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"{path}: no such file")
    except Exception as error:  # a damaged file can make torch raise nearly anything
        if "TorchScript" in str(error):
            fail(
                f"{path} is a TorchScript archive, which is a program: if you trust it, convert it "
                f"by torch.save(torch.jit.load('{path}', 'cpu').state_dict(), 'weights.pt')"
            )
        fail(f"{path} is not a readable checkpoint: it is damaged, or holds more than weights")


class Run:
    """One training and its files. `args` need out, method, epochs, seed, …; see parse_args."""

    def __init__(self, args, model, optimizer, views):
        self.args = args
        self.model = model
        self.optimizer = optimizer
        self.views = views
        self.out = Path(args.out)
        self.log = []  # a dictionary per epoch; [0] is the random weights
        self.resume()

    def resume(self):
        """Continues the unfinished run in args.out, if it is one with the same settings."""
        path = self.out / "checkpoint.pt"
        finished = (self.out / "result.json").exists()
        found = path.exists()
        if world_size() > 1:
            dist.barrier()  # all have looked before one of them writes
        if not found:
            return
        checkpoint = load_checkpoint(path)
        try:
            there = {**checkpoint["args"], "processes": checkpoint["world_size"]}
        except (KeyError, TypeError):
            fail(f"{path} is not a checkpoint of this program: name another --out")
        here = {**vars(self.args), "processes": world_size()}
        names = [name for name in {**here, **there} if name not in NO_EFFECT]
        differing = [flag(name) for name in names if here.get(name) != there.get(name)]
        if differing or finished:
            kind = f"a run with another {', '.join(differing)}" if differing else "a finished run"
            if not self.args.overwrite:
                fail(f"{self.out} holds {kind}: name another --out, or --overwrite it")
            return
        try:
            self.model.load_state_dict(checkpoint["model"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            set_random_state(checkpoint["random_state"])
            self.log = checkpoint["log"]
        except (KeyError, TypeError, ValueError, RuntimeError):
            fail(f"{path} is of another version of this program: name another --out")
        if rank() == 0:
            self.write_log()  # the run may have been killed between its two files

    @property
    def is_new(self):
        return not self.log

    def epochs(self):
        """The epochs that remain, of 1 to args.epochs; a killed run continues where it was."""
        for epoch in range(len(self.log), self.args.epochs + 1):
            self.steps = 0
            self.total = 0.0
            self.started = time.time()
            self.shown = self.started
            yield epoch

    def after_step(self, loss):
        """Adds to the epoch's mean loss, and shows it within the epoch on a terminal."""
        self.steps += 1
        self.total = self.total + loss.detach()
        if self.steps == len(self.views):
            if world_size() > 1:
                dist.all_reduce(self.total)
            self.loss = self.total.item() / self.steps / world_size()  # waits for the device
            self.seconds = time.time() - self.started
            if not math.isfinite(self.loss):
                epoch = len(self.log)
                fail(f"the loss of epoch {epoch} is not finite; {self.out} keeps the one before it")
        elif rank() == 0 and sys.stdout.isatty() and time.time() > self.shown + 1:
            self.shown = time.time()  # reading the loss waits for the device: once per second
            print(f"\rstep {self.steps}/{len(self.views)}, loss {loss.item():.3f}", end="")

    def log_start(self, metrics, what="random weights"):
        """Records what the weights reach before training. Replaces what was in args.out."""
        self.log = [{"epoch": 0, **metrics}]
        if rank() == 0:
            self.write()
            (self.out / "result.json").unlink(missing_ok=True)
            self.say(what, metrics)

    def after_epoch(self, metrics):
        """Records an epoch, prints its line and writes checkpoint.pt and log.jsonl."""
        epoch = len(self.log)
        line = {"epoch": epoch, "loss": self.loss, **metrics, "seconds": self.seconds}
        self.log.append(line)
        if rank() > 0:
            return
        self.write()
        speed = len(self.views) * self.args.batch_size / self.seconds
        minutes = (self.args.epochs - epoch) * self.seconds / 60
        self.say(
            f"loss {self.loss:.3f} (chance {self.model.chance_loss:.2f})  lr {line['lr']:.3g}  "
            f"std {line['std']:.2f}  rank {line['effective_rank']:.0f}  {speed:.0f} images/s  "
            f"ETA {minutes:.1f} min",
            metrics,
        )
        if line["std"] < COLLAPSED:
            print(
                f"warning: std {line['std']:.3f}: all images are getting the same embedding, the "
                "network has collapsed; try a lower learning rate or a smaller batch",
                flush=True,
            )

    def say(self, text, metrics):
        for key, name in METRICS.items():
            if key in metrics and key != "linear_top1":  # that is said at the end
                text += f"  {name} {metrics[key]:.1f} %"
        start = "\r" if sys.stdout.isatty() else ""  # over the progress within the epoch
        print(f"{start}epoch {len(self.log) - 1}/{self.args.epochs}  {text}", flush=True)

    def write(self):
        checkpoint = {
            "args": vars(self.args),
            "world_size": world_size(),
            "log": self.log,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random_state": get_random_state(),
        }
        save(self.out / "checkpoint.pt", checkpoint)
        self.write_log()

    def write_log(self):
        save(self.out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in self.log))

    def finish(self, data, found=None, draw=None):
        """Draws report.png, writes backbone.pt and result.json; returns what is in the latter.

        The figures are the log's last ones, those of random weights beside them, and `found`;
        draw(run, data, title) makes another report than draw_report.
        """
        args = self.args
        first = self.log[0]
        last = self.log[-1]
        device = self.views.device
        cuda = device.type == "cuda"
        seconds = sum(line["seconds"] for line in self.log[1:])
        result = {
            "method": args.method,
            "data": data.name,
            "arch": args.arch,
            "epochs": args.epochs,
            "batch_size": args.batch_size,
            "world_size": world_size(),
            "linear_top1": None,  # without labels it stays so, as do the next four
            "linear_top5": None,
            "knn_top1": None,
            "knn_k": last.get("knn_k"),
            "random_linear_top1": None,
            "random_knn_top1": None,
            "seconds": round(seconds, 1),
            "images_per_second": round(
                args.epochs * len(self.views) * args.batch_size / seconds, 1
            ),
            "device": torch.cuda.get_device_name() if cuda else device.type,
            "memory_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
            "torch": torch.__version__,
            "seed": args.seed,
            **(found or {}),
        }
        for key, value in last.items():
            if "_top" in key:
                result[key] = value
                result[f"random_{key}"] = first.get(key)
        title = f"{args.method} on {data.name}, {args.arch}, {args.epochs} epochs"
        (draw or draw_report)(self, data, title)
        if rank() == 0:
            backbone = self.model.backbone.state_dict()
            save(self.out / "backbone.pt", {name: x.cpu() for name, x in backbone.items()})
            save(self.out / "result.json", json.dumps(result, indent=1) + "\n")
            print(f"{title}: {summary(result, data)}. See {self.out / 'report.png'}", flush=True)
        return result


def summary(result, data):
    parts = []
    for key, name in METRICS.items():
        if result.get(key) is not None:
            if key == "knn_top1":
                name += f"(k={result['knn_k']}, T=.1, cosine)"
            text = f"{name} {result[key]:.1f} %"
            start = result.get(f"random_{key}")
            if start is not None:
                text += f" (random weights {start:.1f} %)"
            parts.append(text)
    if not data.test:
        return ", ".join(["trained; its evaluation needs labels", *parts])
    if "ap50" not in result:
        parts.append(f"chance {100 / len(data.classes):.1f} %")
    if data.large:
        parts.append("linear evaluation by evaluate.py")
    return ", ".join(parts)


def get_random_state():
    """Of torch's own generators, which are the same in all processes."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state):
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


# -------------------------------------------------------------------------------------- report
@torch.no_grad()
def draw_report(run, data, title):
    """report.png: the views, the curves, the spectrum, and what the features find similar. Every
    process computes its part of the features, the first one draws."""
    views = run.views
    batch = [view[:8] for view in next(iter(views))]
    plain = views.augments[0]
    images = data.test[0] if data.test else data.pretrain
    images = images[:: max(1, len(images) // 1000)][:1000]  # folders are sorted by class
    workers = run.args.workers
    h = F.normalize(features(run.model.backbone, images, plain, views.device, workers), dim=1)
    if rank() > 0:
        return
    from matplotlib.figure import Figure  # here, so that nothing else has to wait for it

    figure = Figure(figsize=(15, 9), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(2, 3).flatten()

    side = max(view.shape[-1] for view in batch)
    padded = [F.pad(view, [0, side - view.shape[-1]] * 2) for view in batch]  # small crops to scale
    show_images(axes[0], torch.cat(padded), f"{len(batch)} views of eight images, one per column")

    draw_curve(axes[1], run.log, "loss")
    chance = run.model.chance_loss
    axes[1].axhline(chance, color="gray", linestyle=":")
    axes[1].set_title(f"loss; dotted: uninformative outputs (chance level, {chance:.2f})")
    draw_curve(axes[2], run.log, "knn_top1")
    axes[2].set_title("kNN top-1 (%); epoch 0: random weights")

    values = torch.linalg.svdvals(h.cpu())
    axes[3].semilogy((values / values[0]).clamp(min=1e-6).tolist())
    axes[3].set(title="singular values of h: an early drop is a collapse", xlabel="rank")
    draw_curve(axes[4], run.log, "std")
    axes[4].set(title="std of z times sqrt(C): 1 is healthy, 0 collapsed", ylim=(0, 1.1))

    order = torch.randperm(len(h), generator=make_generator("queries"))
    queries = h[order[:8].to(h.device)]
    nearest = (queries @ h.T).topk(min(6, len(h))).indices.T.flatten()  # first: the image itself
    if torch.is_tensor(images):
        found = images[nearest.to(images.device)]
    else:
        found = next(decoded(decode(CentreCrops(images, plain), [nearest.tolist()], 0)))
    show_images(axes[5], found, "top row: images; below each, its five nearest neighbours")

    picture = io.BytesIO()
    figure.savefig(picture, dpi=80)
    save(run.out / "report.png", picture.getvalue())


def show_images(axis, images, title):
    images = images.cpu().float()
    grid = torchvision.utils.make_grid(images, 8, 1, normalize=True, scale_each=True)
    axis.imshow(grid.permute(1, 2, 0).numpy())
    axis.set(title=title, xticks=[], yticks=[])


def draw_curve(axis, log, key):
    lines = [line for line in log if key in line]
    axis.plot([line["epoch"] for line in lines], [line[key] for line in lines], marker=".")
    axis.set(xlabel="epoch")
    axis.xaxis.get_major_locator().set_params(integer=True)
