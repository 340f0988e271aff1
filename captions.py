"""Images with captions, for clip.py: where they come from, and how a caption becomes numbers.

Shapes: N images, H x W pixels, L tokens per caption."""

import gzip
import html
import io
import re
import zlib
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision

import common
import harness
from common import PATTERNS, Data, fail, image_files, make_generator, rank

FRAMES = (  # the sentences of the captions of patterns; {} is what is seen
    "{}",
    "{} in a picture",
    "a picture of {}",
    "a photo of {}",
    "an image with {}",
    "this shows {}",
    "look at {}",
)
NOUNS = {  # what the captions call each family
    "stripes": ("stripes", "lines", "bars"),
    "checks": ("checks", "a chessboard", "tiles"),
    "dots": ("dots", "spots", "a pegboard"),
    "rings": ("rings", "hoops", "loops"),
    "zigzag": ("a zigzag", "chevrons", "a herringbone"),
    "waves": ("waves", "ripples", "wiggles"),
    "grid": ("a grid", "a lattice", "a mesh"),
    "bricks": ("bricks", "a wall", "masonry"),
    "bullseye": ("a bullseye", "a target", "a dartboard"),
    "pinwheel": ("a pinwheel", "a fan", "a windmill"),
}
GROUNDS = {  # colours that a pattern may lie on, in RGB
    "red": (0.85, 0.15, 0.15),
    "yellow": (0.85, 0.85, 0.15),
    "green": (0.15, 0.75, 0.15),
    "cyan": (0.15, 0.8, 0.8),
    "blue": (0.15, 0.2, 0.85),
    "magenta": (0.8, 0.15, 0.8),
}
SHAPES = ("in a circle", "in a square")
TEMPLATES = (  # the seven that did best on ImageNet (official notebook)
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
SAID = 0.5  # probability that a caption mentions an attribute
TRAIN_SEED = 1  # of the patterns with captions; common.py's own have seeds 0 and 50
TEST_SEED = 70
HELD_OUT = 10  # one in so many pairs of a folder is held out, at most 1,000


@dataclass
class Captioned(Data):
    """Data whose images to train on have captions."""

    captions: list = field(default_factory=list)  # one per image in `pretrain`
    pairs: tuple = ()  # (images, captions) held out, to measure retrieval; no caption twice
    pasted: tuple = ()  # patterns on coloured grounds: images, families, grounds, held out (N,)
    templates: tuple = TEMPLATES  # sentences for the name of a class


def load_captions(name: str, root: str, device: torch.device | str = "cpu") -> Captioned:
    """`patterns`, or a folder of images with a .txt file of the same name beside each, or with a
    captions.tsv in it whose lines are: path, tab, caption. Exits with one line if it is neither."""
    if name == "patterns":
        return load_patterns(root, device)
    folder = Path(name)
    if not folder.is_dir():
        fail(f"--data {name}: neither patterns nor a folder")
    listed = (folder / "captions.tsv").exists()
    paths, captions = read_table(folder) if listed else read_text_files(folder)
    if len(paths) < 2 * HELD_OUT:
        fail(f"--data {name}: {len(paths)} image(s) with a caption; it takes {2 * HELD_OUT}")
    images = read_images(paths, device)
    fit, test = common.held_out(len(paths), min(1000, len(paths) // HELD_OUT))
    fit = fit.sort().values
    return Captioned(
        folder.resolve().name,
        pretrain=select(images, fit),
        captions=select(captions, fit),
        pairs=distinct(select(images, test), select(captions, test)),
    )


def distinct(images, captions):
    """The first image of each caption."""
    first = {}
    for row, caption in enumerate(captions):
        first.setdefault(clean(caption), row)
    rows = torch.tensor(list(first.values()))
    return select(images, rows), select(captions, rows)


def image_paths(where: str) -> list[str]:
    """The picture, or those in the folder."""
    paths = [where] if Path(where).is_file() else sorted(image_files(Path(where)))
    if not paths:
        fail(f"--images {where}: neither a picture nor a folder of pictures")
    return paths


def read_images(paths, device):
    """The images as a tensor on the device if they are small and of one size, or else the paths."""
    images = common.stack(paths) if common.is_small(paths[0]) else None
    return paths if images is None else images.to(device)


def select(items, rows):
    """These rows of a tensor, or of a list."""
    if torch.is_tensor(items):
        return items[rows.to(items.device)]
    return [items[row] for row in rows.tolist()]


def read_table(folder):
    """(paths, captions) of captions.tsv."""
    paths = []
    captions = []
    try:
        with open(folder / "captions.tsv", encoding="utf-8-sig") as file:
            lines = file.readlines()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read {folder / 'captions.tsv'}: {error}")
    empty = 0
    for number, line in enumerate(lines, 1):
        path, tab, caption = line.rstrip("\n").partition("\t")
        if not tab:
            fail(f"{folder / 'captions.tsv'}, line {number}: no tab between path and caption")
        if not (folder / path).is_file():
            fail(f"{folder / 'captions.tsv'}, line {number}: there is no image {path}")
        if clean(caption):
            paths.append(str(folder / path))
            captions.append(caption)
        else:
            empty += 1
    report_left_out({"an empty caption": empty}, len(lines))
    return paths, captions


def read_text_files(folder):
    """(paths, captions) of all images that have a .txt file beside them."""
    paths = []
    captions = []
    left_out = Counter()
    every = sorted(image_files(folder))
    for path in every:
        try:
            caption = Path(path).with_suffix(".txt").read_text(encoding="utf-8-sig").strip()
        except OSError:
            left_out["no caption"] += 1
            continue
        except UnicodeDecodeError:
            left_out["a caption that is not UTF-8"] += 1
            continue
        if clean(caption):
            paths.append(path)
            captions.append(caption)
        else:
            left_out["an empty caption"] += 1
    report_left_out(left_out, len(every))
    return paths, captions


def report_left_out(reasons, images):
    """Says how many images are not used, and why."""
    parts = [f"{count} with {reason}" for reason, count in reasons.items() if count]
    if parts and rank() == 0:
        print(f"of {images} images, left out: {', '.join(parts)}", flush=True)


# ----------------------------------------------------------------------------------- patterns
def load_patterns(root, device):
    """The patterns of common.py for testing; for training, other patterns with captions, in which
    a third of the pairs of family and ground never occur."""
    data = common.load_images("patterns", root, device)
    images = []
    captions = []
    for part in range(TRAIN_SEED, TRAIN_SEED + 4):
        found, labels, grounds, said = captioned_patterns(5000, part)
        seen = (~is_held_out(labels, grounds)).nonzero()[:, 0]
        images.append(found[seen])
        captions += select(said, seen)
    pairs, _, _, said = captioned_patterns(1000, TEST_SEED)
    pasted, labels, grounds, _ = captioned_patterns(2000, TEST_SEED + 1, pasted=1.0)
    return Captioned(
        data.name,
        pretrain=torch.cat(images).to(device),
        train=data.train,
        test=data.test,
        classes=data.classes,
        captions=captions,
        pairs=distinct(pairs.to(device), said),
        pasted=tuple(x.to(device) for x in (pasted, labels, grounds, is_held_out(labels, grounds))),
        templates=FRAMES,
    )


def is_held_out(labels, grounds):
    """Twenty of the sixty pairs of family and ground: two grounds of six for each family."""
    return (grounds >= 0) & ((labels + grounds) % 3 == 0)


def captioned_patterns(n: int, seed: int, pasted: float = 0.5):
    """n images of `patterns` with captions, of which a share `pasted` lies in a circle or a square
    on a coloured ground: uint8 (n, 3, 32, 32), families (n,), grounds (n,) with -1 for none, and n
    captions. A caption names the family by one of three nouns, and each attribute half the time."""
    images, labels, drawn = common.draw_patterns(n, seed)
    generator = make_generator("captions", seed)

    def uniform(low, high, channels=1):
        return low + (high - low) * torch.rand(n, channels, 1, 1, generator=generator)

    has_ground = torch.rand(n, generator=generator) < pasted
    grounds = torch.randint(len(GROUNDS), (n,), generator=generator)
    grounds = torch.where(has_ground, grounds, -1)
    shapes = torch.randint(len(SHAPES), (n,), generator=generator)
    grid = (torch.arange(32) + 0.5) / 16 - 1
    dx = (grid.view(1, 1, 1, 32) - uniform(-0.25, 0.25)).abs()
    dy = (grid.view(1, 1, 32, 1) - uniform(-0.25, 0.25)).abs()
    half = uniform(0.6, 1.0)  # of the shape's width, where the image is 2 wide
    is_circle = (shapes == 0).view(n, 1, 1, 1)
    inside = torch.where(is_circle, dx.hypot(dy), torch.maximum(dx, dy)) < half
    colours = torch.tensor(list(GROUNDS.values()))[grounds].view(n, 3, 1, 1)
    colours = colours * uniform(0.7, 1) + uniform(-0.06, 0.06, 3)
    blotches = 0.1 * torch.randn(n, 3, 4, 4, generator=generator)
    colours = colours + F.interpolate(blotches, [32, 32], mode="bicubic")
    colours = colours + 0.04 * torch.randn(n, 3, 32, 32, generator=generator)
    colours = (colours.clamp(0, 1) * 255).round().byte()
    zoom = uniform(0.7, 1.6)  # how much more of the pattern a shape of one size shows
    pasted = torch.where(inside, resize_patterns(images, zoom), colours)
    images = torch.where(has_ground.view(n, 1, 1, 1), pasted, images)
    frequency = drawn["frequency"] * torch.where(has_ground, zoom.flatten(), 1.0)

    said = torch.rand(n, 5, generator=generator) < SAID
    nouns = torch.randint(3, (n,), generator=generator)
    frames = torch.randint(len(FRAMES), (n,), generator=generator)
    captions = []
    for i in range(n):
        noun = NOUNS[PATTERNS[labels[i]]][nouns[i]]
        words = []
        if said[i, 0] and frequency[i] > 9:
            words.append("fine")
        if said[i, 0] and frequency[i] < 7.5:
            words.append("coarse")
        if said[i, 1]:
            words.append("pale" if drawn["pale"][i] else "dark")
        if said[i, 2] and drawn["tilt"][i].abs() > 0.2:
            words.append("right-leaning" if drawn["tilt"][i] > 0 else "left-leaning")
        article = "a " if noun.startswith("a ") else ""
        what = article + " ".join([*words, noun.removeprefix("a ")])
        if has_ground[i] and said[i, 3]:
            what += " " + SHAPES[shapes[i]]
        if has_ground[i] and said[i, 4]:
            what += " on " + list(GROUNDS)[grounds[i]]
        captions.append(FRAMES[frames[i]].format(what))
    return images, labels, grounds, captions


def resize_patterns(images, zoom):
    """images uint8 (n, 3, 32, 32), smaller by zoom (n, 1, 1, 1) around the centre, and mirrored at
    the border."""
    place = (torch.arange(32) + 0.5) / 16 - 1
    rows, columns = torch.meshgrid(place, place, indexing="ij")
    grid = torch.stack([columns, rows], dim=2) * zoom  # (n, 32, 32, 2)
    found = F.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)
    return found.round().byte()


# ------------------------------------------------------------------------------------- tokens
# Contractions, runs of letters, single digits, runs of other signs.
WORD = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+")
END = "</w>"  # marks the last symbol of a word


def clean(text):
    """Lower case, entities of HTML resolved, single spaces."""
    text = html.unescape(html.unescape(text))
    return " ".join(text.lower().split())


def byte_symbols():
    """A printable character for each of the 256 bytes, in the order of GPT-2's vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in symbols:
            symbols[byte] = chr(256 + len(symbols) - len(printable))
    return symbols


BYTES = byte_symbols()


def split_word(word):
    """The symbols of a word before any merge."""
    symbols = [BYTES[byte] for byte in word.encode()]
    symbols[-1] += END
    return symbols


def merge(symbols, pair):
    """Replaces each occurrence of the pair, from the left, by one symbol."""
    merged = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def learn_merges(captions: list[str], count: int) -> list[tuple[str, str]]:
    """Byte pair encoding (Sennrich et al., 2016, algorithm 1): the most frequent pair of symbols
    within words becomes a symbol, up to `count` times; of equally frequent pairs, the last."""
    frequency = Counter()
    for caption in captions:
        frequency.update(WORD.findall(clean(caption)))
    words = {word: split_word(word) for word in frequency}
    pairs = Counter()
    containing = {}  # {pair: the words in which it has occurred}
    for word, symbols in words.items():
        for pair in zip(symbols, symbols[1:]):
            pairs[pair] += frequency[word]
            containing.setdefault(pair, set()).add(word)
    merges = []
    while len(merges) < count and pairs:
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        if pairs[best] < 2:
            break
        merges.append(best)
        for word in containing.pop(best):
            before = words[word]
            after = merge(before, best)
            words[word] = after
            for pair in zip(before, before[1:]):
                pairs[pair] -= frequency[word]
            for pair in zip(after, after[1:]):
                pairs[pair] += frequency[word]
                containing.setdefault(pair, set()).add(word)
        pairs.pop(best, None)
    return merges


def read_merges(path: str | Path) -> list[tuple[str, str]]:
    """A file with one merge per line, ours or OpenAI's bpe_simple_vocab_16e6.txt.gz, of whose
    lines CLIP uses the first 48,894."""
    try:
        data = Path(path).read_bytes()
        text = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
        lines = text.decode().splitlines()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        fail(f"--merges {path}: {error}")
    merges = []
    for line in lines[1:48_895]:  # the first line is a title
        parts = line.split()
        if len(parts) != 2:
            fail(f"--merges {path}: not a list of merges, two symbols per line")
        merges.append((parts[0], parts[1]))
    return merges


def build_tokenizer(args, captions):
    """With the merges of the file args.merges, or args.vocabulary merges learnt from captions."""
    if args.merges:
        return Tokenizer(read_merges(args.merges), args.context)
    return Tokenizer(learn_merges(captions, args.vocabulary), args.context)


class Tokenizer:
    """Captions -> int32 (N, L): a start token, the words, an end token, zeros. The vocabulary is
    that of CLIP: 256 bytes, the same at a word's end, the merges, start, end."""

    def __init__(self, merges, length):
        symbols = list(BYTES.values())
        symbols += [symbol + END for symbol in BYTES.values()]
        symbols += [left + right for left, right in merges]
        self.length = length
        self.merges = merges
        self.ranks = {pair: i for i, pair in enumerate(merges)}
        self.ids = {symbol: i for i, symbol in enumerate(symbols)}
        self.start = len(symbols)
        self.end = len(symbols) + 1
        self.vocabulary = len(symbols) + 2
        self.encode_word = lru_cache(100_000)(self.encode_word)

    def encode_word(self, word):
        symbols = split_word(word)
        while len(symbols) > 1:
            pairs = zip(symbols, symbols[1:])
            first = min(pairs, key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if first not in self.ranks:
                break
            symbols = merge(symbols, first)
        return [self.ids[symbol] for symbol in symbols]

    def encode(self, text):
        """The tokens of a text, with start and end, however many there are."""
        tokens = [self.start]
        for word in WORD.findall(clean(text)):
            tokens += self.encode_word(word)
        return [*tokens, self.end]

    def __call__(self, texts):
        found = torch.zeros(len(texts), self.length, dtype=torch.int32)
        for row, text in enumerate(texts):
            tokens = self.encode(text)
            if len(tokens) > self.length:
                tokens = [*tokens[: self.length - 1], self.end]
            found[row, : len(tokens)] = torch.tensor(tokens)
        return found

    def report_cut(self, texts):
        """Says how many of the texts are longer than L tokens."""
        cut = sum(len(self.encode(text)) > self.length for text in texts)
        if cut and rank() == 0:
            print(f"{cut} of {len(texts)} captions are cut to {self.length} tokens", flush=True)

    def save(self, path):
        lines = [f"#version: {len(self.merges)} merges", *(" ".join(pair) for pair in self.merges)]
        harness.save(Path(path), "\n".join(lines) + "\n")


# ------------------------------------------------------------------------------------- report
def draw_pairs(run, data, title, z_image, z_text):
    """report.png: cosines of images and captions, the curves, and the captions nearest to eight
    images. z_image, z_text: the normalised embeddings (N, C) of data.pairs."""
    from matplotlib.figure import Figure  # here, so that nothing else has to wait for it

    images, captions = data.pairs
    if not torch.is_tensor(images):
        view = run.views.augments[0]
        rows = list(range(min(12, len(images))))
        images = next(iter(common.decode(common.CentreCrops(images, view), [rows], 0)))
    figure = Figure(figsize=(17, 10), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(2, 3).flatten()

    n = min(12, len(captions))
    axes[0].imshow((z_text[:n] @ z_image[:n].T).cpu())
    row = torchvision.utils.make_grid(images[:n].cpu(), n, 0)
    axes[0].imshow(row.permute(1, 2, 0), extent=(-0.5, n - 0.5, -0.6, -1.6))
    axes[0].set(title="cosines of captions (rows) and images (columns)", xticks=[])
    axes[0].set(xlim=(-0.5, n - 0.5), ylim=(n - 0.5, -1.6))
    axes[0].set_yticks(range(n), [shorten(caption) for caption in captions[:n]], fontsize=8)

    harness.draw_curve(axes[1], run.log, "loss")
    chance = run.model.chance_loss
    axes[1].axhline(chance, color="gray", linestyle=":")
    axes[1].set_title(f"loss; dotted: uninformative outputs (chance level, {chance:.2f})")
    key = "zero_shot_top1" if data.test else "image_to_text_top1"
    harness.draw_curve(axes[2], run.log, key)
    axes[2].set_title(f"{harness.METRICS[key]} (%); epoch 0: random weights")
    harness.draw_curve(axes[3], run.log, "scale")
    axes[3].set_title("scale of the cosines, 1 / temperature; starts at 14.3, at most 100")
    harness.draw_curve(axes[4], run.log, "std")
    axes[4].set(title="std of z times sqrt(C): 1 is healthy, 0 collapsed", ylim=(0, 1.1))

    nearest = (z_image[:8] @ z_text.T).topk(min(3, len(captions))).indices.tolist()
    axes[5].set(title="the three nearest captions of eight images", xlim=(0, 10), ylim=(8, 0))
    axes[5].axis("off")
    for i, rows in enumerate(nearest):
        axes[5].imshow(images[i].cpu().permute(1, 2, 0), extent=(0, 0.95, i + 0.95, i))
        text = "\n".join(shorten(captions[row]) for row in rows)
        axes[5].text(1.2, i + 0.5, text, va="center", fontsize=9)
    axes[5].set(xlim=(0, 10), ylim=(8, 0), aspect="auto")

    picture = io.BytesIO()
    figure.savefig(picture, dpi=80)
    harness.save(run.out / "report.png", picture.getvalue())


def shorten(caption):
    return caption if len(caption) <= 50 else caption[:47] + "..."
