"""Speed, as ratios of two things measured in turn in one run, so that a noisy machine matters less.

    python results/benchmark.py

1. Views a second of `Augment` on a batch, against torchvision's v2 transforms with the same
   operations on one image at a time; one thread.
2. Two views from JPEG files at 224 pixels through `Views`, against the usual pipeline, in which
   every operation runs on one PIL image at a time in the workers; the same workers.
3. A whole step of simclr.py (views, forward, loss, backward, LARS), against the bare forward and
   backward of the same network on as many views.
4. Peak memory of a whole training."""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torchvision.datasets.folder import pil_loader
from torchvision.transforms import v2

import common
import simclr


def in_turn(ours, theirs, rounds=7):
    """Median seconds of each, and the median over the rounds of theirs / ours, warmed up."""
    times = []
    for number in range(rounds + 1):
        pair = []
        for function in (ours, theirs):
            start = time.perf_counter()
            function()
            pair.append(time.perf_counter() - start)
        if number:
            times.append(pair)
    a, b = (statistics.median(column) for column in zip(*times))
    return a, b, statistics.median(their / our for our, their in times)


def torchvisions(augment):
    """The same view as `augment`, by torchvision, for one image."""
    steps = [
        v2.RandomResizedCrop(augment.size, augment.scale, antialias=True),
        v2.RandomHorizontalFlip(augment.flip),
        v2.RandomApply([v2.ColorJitter(*augment.jitter)], augment.jitter_p),
        v2.RandomGrayscale(augment.grayscale),
    ]
    if augment.blur:
        width = augment.size // 10 | 1
        steps.append(v2.RandomApply([v2.GaussianBlur(width, (0.1, 2.0))], augment.blur))
    steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    return v2.Compose([*steps, v2.Normalize(augment.mean, augment.std)])


def benchmark_augment(size, count):
    torch.set_num_threads(1)
    augment = common.adapt(common.AUGMENTS["moco_v2"], size)[0]
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    transform, chance = torchvisions(augment), common.seeded(0)
    a, b, ratio = in_turn(
        lambda: augment(images, chance), lambda: torch.stack([transform(x) for x in images])
    )
    print(
        f"Augment, {size} px: {count / a:.0f} views/s; torchvision, one image at a time: "
        f"{count / b:.0f} views/s; ratio {ratio:.1f}"
    )


class Usual(torch.utils.data.Dataset):
    def __init__(self, paths, transform):
        self.paths, self.transform = paths, transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        image = pil_loader(self.paths[index])
        return self.transform(image), self.transform(image)


def benchmark_files(count=192, batch=32, workers=2):
    torch.set_num_threads(1)
    images, _ = common.patterns(count)
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{i}.jpg" for i in range(count)]
        for image, path in zip(images, paths):  # as large as ImageNet's images are on average
            common.TF.to_pil_image(image).resize((500, 375)).save(path, quality=90)
        views = common.Views(paths, common.AUGMENTS["moco_v2"], batch, workers=workers)
        transform = torchvisions(common.AUGMENTS["moco_v2"][0])
        usual = torch.utils.data.DataLoader(Usual(paths, transform), batch, num_workers=workers)
        a, b, ratio = in_turn(lambda: sum(1 for _ in views), lambda: sum(1 for _ in usual), 3)
    print(
        f"From JPEG files (500 x 375), two views of 224 px, {workers} workers: "
        f"{count / a:.0f} images/s; usual pipeline: {count / b:.0f} images/s; ratio {ratio:.1f}"
    )


def benchmark_step():
    torch.set_num_threads(os.cpu_count())
    args = simclr.parse_args(["--recipe", "patterns"])
    data = common.load("patterns")
    augments = common.adapt(common.AUGMENTS["simclr"], args.size, args.jitter_strength)
    views = common.Views(data.pretrain, augments, args.batch_size)
    model = simclr.build_model(args, 4000, torch.device("cpu"))
    optimizer = simclr.build_optimizer(args, model)
    batches = iter(views)
    bare, x = model.encoder, torch.randn(2 * args.batch_size, 3, args.size, args.size)
    x = x.contiguous(memory_format=torch.channels_last)

    def step():
        nonlocal batches
        batch = next(batches, None)
        if batch is None:
            batches = iter(views)
            batch = next(batches)
        loss = model(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    a, b, ratio = in_turn(step, lambda: bare(x).sum().backward(), 15)
    print(
        f"A step of simclr.py: {1000 * a:.0f} ms; bare forward and backward of its network: "
        f"{1000 * b:.0f} ms; ratio {1 / ratio:.2f}"
    )


def benchmark_memory():
    with tempfile.TemporaryDirectory() as folder:
        script = Path(__file__).resolve().parent.parent / "simclr.py"
        command = [sys.executable, script, "--epochs", "1", "--out", folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"Peak memory of python simclr.py: {peak:.2f} GiB")


if __name__ == "__main__":
    print(f"torch {torch.__version__}, {os.cpu_count()} cores")
    benchmark_augment(32, 256)
    benchmark_augment(224, 16)
    benchmark_files()
    benchmark_step()
    benchmark_memory()
