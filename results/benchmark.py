"""Speed, in one thread, as ratios of two things measured in turn, so that what else runs on the
machine matters less.

    python -m results.benchmark

1. Peak memory of a whole training.
2. Views per second of `Augment` on a batch, against torchvision's v2 transforms with the same
   operations on one image at a time.
3. Two views of 224 pixels from JPEG files through `Views`, against the usual pipeline, in which
   every operation runs on one PIL image at a time in the workers; the same number of workers.
4. A whole step of simclr.py (views, forward, loss, backward, LARS), against the bare forward and
   backward passes of the same network on as many views."""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from torch import nn
from torchvision.datasets.folder import pil_loader
from torchvision.transforms import functional as TF
from torchvision.transforms import v2

import common
import moco_v2
import simclr
from results.methods import ROOT

KIBIBYTES = 1 / 1024 if sys.platform == "darwin" else 1  # unit of ru_maxrss: bytes on macOS


def seconds_of(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_turn(ours, theirs, rounds=7):
    """Median seconds of each, and the median of theirs / ours over the rounds."""
    ours()  # warm up
    theirs()
    a = []
    b = []
    for _ in range(rounds):
        a.append(seconds_of(ours))
        b.append(seconds_of(theirs))
    ratios = [their / our for our, their in zip(a, b)]
    return statistics.median(a), statistics.median(b), statistics.median(ratios)


def torchvision_view(augment):
    """The same view as `augment`, by torchvision, for one image."""
    steps = [
        v2.RandomResizedCrop(augment.size, augment.scale, antialias=True),
        v2.RandomHorizontalFlip(augment.flip),
        v2.RandomApply([v2.ColorJitter(*augment.jitter)], augment.jitter_p),
        v2.RandomGrayscale(augment.grayscale),
    ]
    if augment.blur:
        blur = v2.GaussianBlur(augment.size // 10 | 1, (0.1, 2.0))
        steps.append(v2.RandomApply([blur], augment.blur))
    steps.append(v2.ToImage())
    steps.append(v2.ToDtype(torch.float32, scale=True))
    steps.append(v2.Normalize(augment.mean, augment.std))
    return v2.Compose(steps)


def moco_v2_views(size):
    args = moco_v2.parse_args(["--recipe", "imagenet", "--size", str(size)])
    return moco_v2.build_views(args)


def benchmark_memory():
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "simclr.py", "--epochs", "1", "--out", folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * KIBIBYTES / 2**20
    print(f"Peak memory of python simclr.py: {peak:.2f} GiB")


def benchmark_augment(size, count):
    augment = moco_v2_views(size)[0]
    transform = torchvision_view(augment)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    generator = common.make_generator("benchmark")
    a, b, ratio = in_turn(
        lambda: augment(images, generator),
        lambda: torch.stack([transform(image) for image in images]),
    )
    print(
        f"Augment, {size} px: {count / a:.0f} views/s; torchvision, one image at a time: "
        f"{count / b:.0f} views/s; ratio {ratio:.1f}"
    )


class TwoViews(torch.utils.data.Dataset):
    """The usual pipeline."""

    def __init__(self, paths, transform):
        self.paths = paths
        self.transform = transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        image = pil_loader(self.paths[index])
        return self.transform(image), self.transform(image)


def exhaust(batches):
    for _ in batches:
        pass


def benchmark_files(count=192, batch_size=32, workers=2):
    images, _ = common.patterns(count)
    augments = moco_v2_views(224)
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{number}.jpg" for number in range(count)]
        for image, path in zip(images, paths):  # as large as ImageNet's images are on average
            TF.to_pil_image(image).resize((500, 375)).save(path, quality=90)
        views = common.Views(paths, augments, batch_size, workers=workers)
        dataset = TwoViews(paths, torchvision_view(augments[0]))
        usual = torch.utils.data.DataLoader(
            dataset, batch_size, num_workers=workers, persistent_workers=True
        )
        a, b, ratio = in_turn(lambda: exhaust(views), lambda: exhaust(usual), rounds=3)
    print(
        f"From JPEG files (500 x 375), two views of 224 px, {workers} workers: "
        f"{count / a:.0f} images/s; usual pipeline: {count / b:.0f} images/s; ratio {ratio:.1f}"
    )


def endless(views):
    while True:
        yield from views


def benchmark_step():
    args = simclr.parse_args(["--recipe", "patterns"])
    images, _ = common.patterns(4000)
    batches = endless(common.Views(images, simclr.build_views(args), args.batch_size))
    torch.manual_seed(0)
    model = simclr.SimCLR(args).to(memory_format=torch.channels_last)
    optimizer = simclr.build_optimizer(args, model)
    network = nn.Sequential(model.backbone, model.projector)
    x = torch.randn(2 * args.batch_size, 3, args.size, args.size)
    x = x.contiguous(memory_format=torch.channels_last)

    def step():
        x1, x2 = next(batches)
        loss, _ = model(x1, x2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def bare():
        network(x).sum().backward()

    a, b, ratio = in_turn(step, bare, rounds=15)
    print(
        f"A step of simclr.py: {1000 * a:.0f} ms; bare forward and backward of its network: "
        f"{1000 * b:.0f} ms; ratio {1 / ratio:.2f}"
    )


def main():
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {os.cpu_count()} cores")
    benchmark_memory()  # first: a child process is charged with the memory of its parent
    benchmark_augment(32, 256)
    benchmark_augment(224, 16)
    benchmark_files()
    benchmark_step()


if __name__ == "__main__":
    main()
