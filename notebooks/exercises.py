"""The exercises of the notebooks: an empty function, hints, a check that recognises the usual
mistakes, and a solution.

    exercises.check("simclr.nt_xent", nt_xent)      # prints one line

The check compares an answer with the solution on random tensors, so any way of writing it is right.
The empty functions and the folded hints in the notebooks are those of `stub` and `markdown`."""

import copy
import difflib
import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torchvision.ops import box_convert, box_iou, distance_box_iou

TRIALS = 4


@dataclass
class Exercise:
    """arguments: a generator of random numbers -> {name: value}, other ones at every call;
    mistakes: {what is wrong: a function that does it}; learns: the arguments that get a gradient,
    where that is part of the question; changes: those that the function changes in place."""

    solution: Callable
    arguments: Callable
    hints: list
    mistakes: dict = field(default_factory=dict)
    learns: tuple = ()
    changes: tuple = ()


# --------------------------------------------------------------------------------- random tensors
def size(generator, low, high):
    return int(torch.randint(low, high + 1, (), generator=generator))


def normal(generator, *shape):
    return torch.randn(*shape, generator=generator)


def unit(generator, *shape):
    """Normalised along the last dimension."""
    return F.normalize(normal(generator, *shape), dim=-1)


def number(generator, low, high):
    return low + (high - low) * torch.rand((), generator=generator).item()


# ----------------------------------------------------------------------------------------- start
def alignment(z1, z2):
    """The mean squared distance of the two views of an image. z1, z2: (B, C), rows normalised.
    Returns a scalar."""
    return (z1 - z2).square().sum(dim=1).mean()


def uniformity(z):
    """The logarithm of the mean of exp(-2 d²) over all pairs of different rows of z, (B, C), where
    d is their distance. Returns a scalar."""
    squared = torch.cdist(z, z).square()
    different = ~torch.eye(len(z), dtype=torch.bool)
    return torch.exp(-2 * squared[different]).mean().log()


def uniformity_with_itself(z):
    return torch.exp(-2 * torch.cdist(z, z).square()).mean().log()


def two_embeddings(generator):
    shape = (size(generator, 3, 6), size(generator, 2, 7))
    return {"z1": unit(generator, *shape), "z2": unit(generator, *shape)}


# ---------------------------------------------------------------------------------------- simclr
def nt_xent(z1, z2, temperature):
    """SimCLR's loss (equation 1). z1, z2: (B, C), rows normalised; row b of both shows image b.
    Returns the mean over all 2B views, a scalar."""
    z = torch.cat([z1, z2])  # (2B, C)
    logits = z @ z.T / temperature  # (2B, 2B)
    logits.fill_diagonal_(-math.inf)  # a view is not its own negative
    n = len(z1)
    partner = torch.cat([torch.arange(n, 2 * n), torch.arange(n)])
    return F.cross_entropy(logits, partner)


def pair_loss(z1, z2, temperature, mask=True, one_way=False, only_other=False):
    """Wrong in one of several ways."""
    z = torch.cat([z1, z2])
    logits = z @ z.T / temperature
    n = len(z1)
    partner = torch.cat([torch.arange(n, 2 * n), torch.arange(n)])
    if only_other:
        return F.cross_entropy(z1 @ z2.T / temperature, torch.arange(n))
    if mask:
        logits = logits.masked_fill(torch.eye(2 * n, dtype=torch.bool), -math.inf)
    if one_way:
        return F.cross_entropy(logits[:n], partner[:n])
    return F.cross_entropy(logits, partner)


def partner_found(z1, z2):
    """For how many of the 2B views is the most similar *other* view their partner? z1, z2: (B, C),
    rows normalised. Returns a fraction from 0 to 1."""
    z = torch.cat([z1, z2])
    similarity = z @ z.T
    similarity.fill_diagonal_(-math.inf)
    n = len(z1)
    partner = torch.cat([torch.arange(n, 2 * n), torch.arange(n)])
    return (similarity.argmax(dim=1) == partner).float().mean()


def partner_found_among_all(z1, z2):
    z = torch.cat([z1, z2])
    n = len(z1)
    partner = torch.cat([torch.arange(n, 2 * n), torch.arange(n)])
    return ((z @ z.T).argmax(1) == partner).float().mean()


def similar_views(generator):
    shape = (size(generator, 4, 7), size(generator, 3, 6))
    z1 = unit(generator, *shape)
    return {"z1": z1, "z2": F.normalize(z1 + 0.5 * normal(generator, *shape), dim=1)}


def with_temperature(make):
    return lambda generator: make(generator) | {"temperature": number(generator, 0.1, 0.9)}


# --------------------------------------------------------------------------------------- moco_v1
def enqueue(queue, pointer, keys):
    """Writes keys (B, C) over the oldest rows of the queue (K, C), in place. pointer, a tensor of
    one whole number, is the first row to write to; afterwards it is the row behind the last one.
    After row K - 1 comes row 0."""
    rows = (pointer + torch.arange(len(keys))) % len(queue)
    queue[rows] = keys
    pointer.add_(len(keys)).remainder_(len(queue))


def enqueue_without_pointer(queue, pointer, keys):
    rows = (pointer + torch.arange(len(keys))) % len(queue)
    queue[rows] = keys


def enqueue_at_the_start(queue, pointer, keys):
    queue[: len(keys)] = keys
    pointer.add_(len(keys)).remainder_(len(queue))


def enqueue_past_the_end(queue, pointer, keys):
    rows = (pointer + torch.arange(len(keys))) % len(queue)
    queue[rows] = keys
    pointer.add_(len(keys))


def queue_and_keys(generator):
    k = size(generator, 6, 9)
    c = size(generator, 1, 4)
    keys = normal(generator, size(generator, 3, 5), c)
    pointer = torch.tensor(k - 2)  # so that the keys go beyond the end
    return {"queue": normal(generator, k, c), "pointer": pointer, "keys": keys}


def momentum_update(parameters_k, parameters_q, m):
    """Equation 2, in place: each tensor in the list parameters_k becomes m times itself plus (1 -
    m) times the tensor at the same place in parameters_q, which stays as it is."""
    for k, q in zip(parameters_k, parameters_q):
        k.mul_(m).add_((1 - m) * q)


def update_reversed(parameters_k, parameters_q, m):
    for k, q in zip(parameters_k, parameters_q):
        k.mul_(1 - m).add_(m * q)


def update_of_the_first(parameters_k, parameters_q, m):
    parameters_k[0].mul_(m).add_((1 - m) * parameters_q[0])


def update_without_decay(parameters_k, parameters_q, m):
    for k, q in zip(parameters_k, parameters_q):
        k.add_((1 - m) * q)


def parameters(generator):
    shapes = [(size(generator, 2, 4), 3), (size(generator, 2, 5),)]
    found = {"parameters_k": [normal(generator, *shape) for shape in shapes]}
    found["parameters_q"] = [normal(generator, *shape) for shape in shapes]
    return found | {"m": number(generator, 0.6, 0.99)}


def unshuffle(k, permutation):
    """The keys in the order of the images again. k: (B, C), where row i belongs to image
    permutation[i], because the images were shuffled by x[permutation]."""
    return k[permutation.argsort()]


def shuffled_keys(generator):
    n = size(generator, 5, 9)
    return {"k": normal(generator, n, 3), "permutation": torch.randperm(n, generator=generator)}


# --------------------------------------------------------------------------------------- moco_v2
def info_nce(q, k, queue, temperature):
    """MoCo's loss (equation 1). q, k: (B, C), queue: (K, C), rows normalised; row b of k is the
    key that belongs to row b of q. Returns the mean over the queries, with a gradient for q
    alone."""
    k = k.detach()
    queue = queue.detach()
    positive = (q * k).sum(dim=1, keepdim=True)  # (B, 1)
    negative = q @ queue.T  # (B, K)
    logits = torch.cat([positive, negative], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))


def info_nce_to_keys(q, k, queue, temperature):
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))


def info_nce_without_positive(q, k, queue, temperature):
    positive = (q * k.detach()).sum(1) / temperature
    return (torch.logsumexp(q @ queue.detach().T / temperature, 1) - positive).mean()


def info_nce_of_batch(q, k, queue, temperature):
    logits = torch.cat([q @ k.detach().T, q @ queue.detach().T], 1) / temperature
    return F.cross_entropy(logits, torch.arange(len(q)))


def queries_and_queue(generator):
    n = size(generator, 2, 5)
    c = size(generator, 3, 6)
    found = {"q": unit(generator, n, c), "k": unit(generator, n, c)}
    found["queue"] = unit(generator, size(generator, 6, 9), c)
    return found | {"temperature": number(generator, 0.1, 0.9)}


def cosine_rate(rate, progress):
    """The learning rate that falls from `rate` to 0 along half a cosine. progress: from 0, at the
    start, to 1, at the end."""
    return rate * (1 + math.cos(math.pi * progress)) / 2


def rate_and_progress(generator):
    return {"rate": number(generator, 0.1, 4), "progress": number(generator, 0.1, 0.9)}


# --------------------------------------------------------------------------------------- moco_v3
def contrastive_loss(q, k, temperature):
    """Equation 1 of MoCo v3. q, k: (B, C), rows normalised; the negatives of a query are the keys
    of the other images. Returns 2 temperature times the mean over the queries, with a gradient for
    q alone."""
    logits = q @ k.detach().T / temperature  # (B, B)
    return 2 * temperature * F.cross_entropy(logits, torch.arange(len(q)))


def queries_and_keys(generator):
    n = size(generator, 2, 6)
    c = size(generator, 3, 6)
    found = {"q": unit(generator, n, c), "k": unit(generator, n, c)}
    return found | {"temperature": number(generator, 0.1, 0.9)}


def momentum(start, progress):
    """The momentum that rises from `start` to 1 along half a cosine. progress: from 0 to 1."""
    return 1 - (1 - start) * (1 + math.cos(math.pi * progress)) / 2


def start_and_progress(generator):
    return {"start": number(generator, 0.9, 0.996), "progress": number(generator, 0.1, 0.9)}


# ------------------------------------------------------------------------------------------ byol
def regression_loss(p, z):
    """Equation 2 of BYOL: the squared distance of the normalised rows of p and z, (B, C). Returns
    the mean over B."""
    p = F.normalize(p, dim=1)
    z = F.normalize(z, dim=1)
    return (p - z).square().sum(dim=1).mean()


def predictions(generator):
    shape = (size(generator, 2, 6), size(generator, 3, 6))
    return {"p": normal(generator, *shape), "z": normal(generator, *shape)}


def symmetric_loss(p1, p2, z1, z2):
    """BYOL's whole loss: p1, p2 are the predictions from views 1 and 2, z1, z2 what the target
    says of views 1 and 2, all (B, C). Each prediction is compared with the target of the *other*
    view; both losses are added. No gradient reaches z1 and z2."""
    return regression_loss(p1, z2.detach()) + regression_loss(p2, z1.detach())


def both_predictions(generator):
    shape = (size(generator, 2, 6), size(generator, 3, 6))
    return {name: normal(generator, *shape) for name in ("p1", "p2", "z1", "z2")}


# --------------------------------------------------------------------------------------- simsiam
def negative_cosine(p, z):
    """Equation 1 of SimSiam: minus the mean cosine of the rows of p and z, (B, C), with a gradient
    for p alone."""
    return -F.cosine_similarity(p, z.detach(), dim=1).mean()


def embedding_std(z):
    """How far z, (B, C), is from a collapse (section 4.1): normalise the rows, take the standard
    deviation of each dimension over the rows, and average. Multiply by the square root of C, so
    that 1 is healthy and 0 a point."""
    z = F.normalize(z, dim=1)
    return z.std(dim=0).mean() * z.shape[1] ** 0.5


def embedding(generator):
    return {"z": normal(generator, size(generator, 5, 9), size(generator, 3, 6)) + 0.3}


# ---------------------------------------------------------------------------------------- barlow
def cross_correlation(z1, z2):
    """The table C of equation 2. z1, z2: (B, C), whose dimensions have any mean and spread: bring
    each to mean 0 and standard deviation 1 over the batch first (divide by B, not by B - 1).
    Returns (C, C): dimensions of the first view by dimensions of the second."""
    z1 = (z1 - z1.mean(dim=0)) / z1.std(dim=0, correction=0)
    z2 = (z2 - z2.mean(dim=0)) / z2.std(dim=0, correction=0)
    return z1.T @ z2 / len(z1)


def not_centred(z1, z2):
    z1 = z1 / z1.std(dim=0, correction=0)
    z2 = z2 / z2.std(dim=0, correction=0)
    return z1.T @ z2 / len(z1)


def of_images(z1, z2):
    return cross_correlation(z1.T, z2.T)


def two_views(generator):
    shape = (size(generator, 5, 9), size(generator, 2, 4))
    return {"z1": 2 * normal(generator, *shape) + 1, "z2": normal(generator, *shape) - 1}


def barlow_loss(c, redundancy_weight):
    """Equation 1 of Barlow Twins, from the table c, (C, C): the sum of (1 - c_ii)² on the
    diagonal, plus redundancy_weight times the sum of the squares off it."""
    diagonal = c.diagonal()
    on_diagonal = (1 - diagonal).square().sum()
    off_diagonal = c.square().sum() - diagonal.square().sum()
    return on_diagonal + redundancy_weight * off_diagonal


def correlations(generator):
    n = size(generator, 2, 6)
    c = 2 * torch.rand(n, n, generator=generator) - 1
    return {"c": c, "redundancy_weight": number(generator, 0.005, 0.9)}


# ------------------------------------------------------------------------------------------ swav
def sinkhorn(scores, epsilon, iterations):
    """Codes from scores (B, P), cosines (section 3.1): start with exp(scores / epsilon); in each
    iteration, first bring the sum of each prototype's column to an equal share, then the sum of
    each image's row to 1. Returns (B, P)."""
    codes = torch.exp(scores / epsilon)
    for _ in range(iterations):
        codes = codes / codes.sum(dim=0)  # the shares; their size is settled by the next line
        codes = codes / codes.sum(dim=1, keepdim=True)
    return codes


def sinkhorn_rows_first(scores, epsilon, iterations):
    codes = torch.exp(scores / epsilon)
    for _ in range(iterations):
        codes = codes / codes.sum(dim=1, keepdim=True)
        codes = codes / codes.sum(dim=0)
    return codes


def scores_of_images(generator):
    shape = (size(generator, 4, 7), size(generator, 2, 3))
    scores = 2 * torch.rand(*shape, generator=generator) - 1
    return {"scores": scores, "epsilon": number(generator, 0.2, 0.9), "iterations": 2}


def swapped_prediction(scores, codes, temperature):
    """Equation 2 of SwAV: the cross-entropy between the codes (B, P) of one crop and the softmax
    of scores (B, P) / temperature of another; the mean over B. The codes get no gradient."""
    return -(codes.detach() * F.log_softmax(scores / temperature, dim=1)).sum(dim=1).mean()


def scores_and_codes(generator):
    shape = (size(generator, 3, 6), size(generator, 2, 5))
    codes = normal(generator, *shape).softmax(dim=1)
    found = {"scores": normal(generator, *shape), "codes": codes}
    return found | {"temperature": number(generator, 0.1, 0.9)}


# --------------------------------------------------------------------------------------- densecl
def match(h_q, h_k):
    """For each cell of the query the cell of the key with the highest cosine (equation 4). h_q,
    h_k: (B, S, D), S cells with D features. Returns (B, S), numbers of cells of the key."""
    h_q = F.normalize(h_q, dim=2)
    h_k = F.normalize(h_k, dim=2)
    return (h_q @ h_k.mT).argmax(dim=2)


def maps(generator):
    shape = (size(generator, 1, 3), size(generator, 4, 6), size(generator, 2, 4))
    scale = 1 + 3 * torch.rand(*shape[:2], 1, generator=generator)
    return {"h_q": normal(generator, *shape), "h_k": scale * normal(generator, *shape)}


def dense_loss(z_q, z_k, matched, queue, temperature):
    """DenseCL's loss of the cells (equation 2). z_q, z_k: (B, S, C), queue: (K, C), all
    normalised; matched (B, S): the cell of the key that belongs to each cell of the query. Each
    cell of the query has to find its matched cell among that and the queue. Returns the mean over
    all cells."""
    images = torch.arange(len(z_q)).unsqueeze(1)  # (B, 1)
    z_k = z_k[images, matched]  # (B, S, C)
    positive = (z_q * z_k).sum(dim=2, keepdim=True)  # (B, S, 1)
    negative = z_q @ queue.T  # (B, S, K)
    logits = torch.cat([positive, negative], dim=2) / temperature
    return -logits.log_softmax(dim=2)[:, :, 0].mean()


def unmatched(z_q, z_k, matched, queue, temperature):
    same = torch.arange(z_q.shape[1]).expand(len(z_q), -1)
    return dense_loss(z_q, z_k, same, queue, temperature)


def cells_and_queue(generator):
    shape = (size(generator, 1, 3), size(generator, 3, 5), 4)
    found = {"z_q": unit(generator, *shape), "z_k": unit(generator, *shape)}
    found["matched"] = torch.randint(shape[1], shape[:2], generator=generator)
    found["queue"] = unit(generator, size(generator, 5, 8), 4)
    return found | {"temperature": number(generator, 0.1, 0.9)}


# ------------------------------------------------------------------------------------------ clip
def clip_loss(z_image, z_text, scale):
    """CLIP's loss (figure 3). z_image, z_text: (B, C), rows normalised; row b of both is a pair.
    The cosines are multiplied by scale. Returns the mean of two cross-entropies: each image has to
    find its caption, and each caption its image."""
    logits = scale * z_image @ z_text.T  # (B, B)
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def one_direction(z_image, z_text, scale):
    return F.cross_entropy(scale * z_image @ z_text.T, torch.arange(len(z_image)))


def other_direction(z_image, z_text, scale):
    return one_direction(z_text, z_image, scale)


def pairs(generator):
    n = size(generator, 2, 6)
    c = size(generator, 3, 6)
    found = {"z_image": unit(generator, n, c), "z_text": unit(generator, n, c)}
    return found | {"scale": number(generator, 2, 9)}


def zero_shot(z_image, z_prompts):
    """The class of each image by names alone. z_image: (B, C); z_prompts: (N, T, C), the
    embeddings of N names in T sentences each, all normalised. A class is the mean of its
    sentences, normalised again (section 3.1.4). Returns (B,), the number of the most similar
    class."""
    classes = F.normalize(z_prompts.mean(dim=1), dim=1)  # (N, C)
    return (z_image @ classes.T).argmax(dim=1)


def images_and_prompts(generator):
    c = 3
    prompts = unit(generator, size(generator, 4, 6), 3, c)
    return {"z_image": unit(generator, size(generator, 20, 30), c), "z_prompts": prompts}


# --------------------------------------------------------------------------------------- up_detr
def assign(cost):
    """The cheapest assignment. cost: (T, N), of giving object t the query n, with T at most 4 and
    N at most 6. Returns (T,): the query of each object, no query twice, so that the sum of the
    costs is as low as possible. (Trying all assignments is fine here; the script has a faster
    way.)"""
    objects, queries = cost.shape
    best = min(
        itertools.permutations(range(queries), objects),
        key=lambda chosen: sum(cost[t, n].item() for t, n in enumerate(chosen)),
    )
    return torch.tensor(best)


def greedy(cost):
    taken = []
    for row in cost.tolist():
        free = [n for n in range(len(row)) if n not in taken]
        taken.append(min(free, key=row.__getitem__))
    return torch.tensor(taken)


def costs(generator):
    while True:  # one in which greed does not pay
        shape = (size(generator, 2, 4), size(generator, 4, 6))
        cost = torch.rand(*shape, generator=generator)
        if not torch.equal(greedy(cost), assign(cost)):
            if not torch.equal(cost.argmin(1), assign(cost)):
                return {"cost": cost}


def attention_mask(queries, patches):
    """Which queries may not attend to which (equation 3). Each of the patches has queries /
    patches queries, one patch after the other. Returns (queries, queries), True where query i does
    not see query j: if they belong to different patches."""
    group = torch.arange(queries) // (queries // patches)
    return group.unsqueeze(1) != group


def queries_per_patch(queries, patches):
    """The bug of the official code."""
    mask = torch.ones(queries, queries, dtype=torch.bool)
    n = queries // patches
    for i in range(n):
        mask[i * n : (i + 1) * n, i * n : (i + 1) * n] = False
    return mask


def groups(generator):
    patches = size(generator, 3, 6)
    return {"queries": 2 * patches, "patches": patches}


def giou(a, b):
    """The generalised overlap of boxes: IoU minus the share of the smallest box around both that
    neither covers. a, b: (N, 4) as x1, y1, x2, y2, with x2 > x1 and y2 > y1. Returns (N,)."""
    area_a = (a[:, 2] - a[:, 0]) * (a[:, 3] - a[:, 1])
    area_b = (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])
    sides = torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])
    shared = sides.clamp(min=0).prod(dim=1)  # 0 where they do not meet
    union = area_a + area_b - shared
    around = (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).prod(dim=1)
    return shared / union - (around - union) / around


def giou_unclamped(a, b):
    area_a = (a[:, 2:] - a[:, :2]).prod(1)
    area_b = (b[:, 2:] - b[:, :2]).prod(1)
    shared = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).prod(1)
    union = area_a + area_b - shared
    around = (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).prod(1)
    return shared / union - (around - union) / around


def boxes(generator):
    found = {}
    for name in ("a", "b"):
        drawn = 0.1 + 0.5 * torch.rand(12, 4, generator=generator)
        found[name] = box_convert(drawn, "xywh", "xyxy")
    found["a"][:2] += 5  # far apart in both directions
    return found


# ------------------------------------------------------------------------------------------ vild
def ensemble(text_scores, image_scores, is_base, weight):
    """Equation 5 of ViLD: probabilities (n, N) of two heads -> their weighted geometric mean. For
    base names the text head has this weight and the image head one minus it; for novel names the
    other way round. is_base: (N,), True or False."""
    text_weight = torch.where(is_base, weight, 1 - weight)
    return text_scores**text_weight * image_scores ** (1 - text_weight)


def two_heads(generator):
    shape = (size(generator, 2, 4), size(generator, 3, 6))
    found = {"text_scores": normal(generator, *shape).softmax(1)}
    found["image_scores"] = normal(generator, *shape).softmax(1)
    found["is_base"] = torch.arange(shape[1]) % 2 == 0
    return found | {"weight": number(generator, 0.6, 0.9)}


def text_logits(z, background, names, temperature):
    """Equation 2 of ViLD-text. z: (n, C), regions, and names: (N, C), both normalised; background:
    (C,), learned and of any length, so it has to be normalised. Returns the cosines divided by the
    temperature, (n, 1 + N), with the background first."""
    background = F.normalize(background, dim=0)
    classes = torch.cat([background.unsqueeze(0), names])  # (1 + N, C)
    return z @ classes.T / temperature


def regions_and_names(generator):
    c = size(generator, 3, 6)
    found = {"z": unit(generator, size(generator, 2, 5), c), "background": 3 * normal(generator, c)}
    found["names"] = unit(generator, size(generator, 2, 5), c)
    return found | {"temperature": number(generator, 0.1, 0.9)}


# ------------------------------------------------------------------------------------- all of them
NO_DIVISION = "the temperature multiplies the cosines; it has to divide them"
A_SUM = "the result is a sum; a mean is expected"
TO_THE_TARGET = "a gradient reaches the target, which has to stay fixed: detach it"

EXERCISES = {
    "start.alignment": Exercise(
        alignment,
        two_embeddings,
        ["A squared distance is a sum over the C dimensions.", "Then take the mean over the rows."],
        {
            "the mean is over all numbers; sum over the dimensions first": (
                lambda z1, z2: F.mse_loss(z1, z2)
            ),
            "the distance is not squared": lambda z1, z2: (z1 - z2).norm(dim=1).mean(),
            A_SUM: lambda z1, z2: (z1 - z2).square().sum(),
        },
    ),
    "start.uniformity": Exercise(
        uniformity,
        lambda generator: {"z": two_embeddings(generator)["z1"]},
        [
            "`torch.cdist(z, z)` gives the distances of all pairs of rows.",
            "The diagonal, each row with itself, does not count: select the rest with a mask.",
            "First the mean, then the logarithm.",
        ],
        {
            "each row is compared with itself as well": uniformity_with_itself,
            "the distance is not squared": lambda z: torch.pdist(z).mul(-2).exp().mean().log(),
            "the logarithm comes before the mean": lambda z: -2 * torch.pdist(z).square().mean(),
            "the logarithm is missing": lambda z: uniformity(z).exp(),
        },
    ),
    "simclr.nt_xent": Exercise(
        nt_xent,
        with_temperature(two_embeddings),
        [
            "Put all 2B views into one table of cosines, (2B, 2B), divided by the temperature.",
            "No view may choose itself: set the diagonal to minus infinity.",
            "The partner of row b is row b + B, and the reverse. Now it is a cross-entropy.",
        ],
        {
            "a view is its own negative: mask the diagonal": (
                lambda z1, z2, temperature: pair_loss(z1, z2, temperature, mask=False)
            ),
            "only the views in z1 look for their partner; those in z2 have to as well": (
                lambda z1, z2, temperature: pair_loss(z1, z2, temperature, one_way=True)
            ),
            "the other views in z1 are negatives of a view in z1, too": (
                lambda z1, z2, temperature: pair_loss(z1, z2, temperature, only_other=True)
            ),
            NO_DIVISION: lambda z1, z2, temperature: nt_xent(z1, z2, 1 / temperature),
            A_SUM: lambda z1, z2, temperature: 2 * len(z1) * nt_xent(z1, z2, temperature),
        },
    ),
    "simclr.partner_found": Exercise(
        partner_found,
        similar_views,
        [
            "Start from the same table of cosines as the loss.",
            "The most similar view of all is the view itself: mask the diagonal before `argmax`.",
        ],
        {
            "every view finds itself: mask the diagonal": partner_found_among_all,
            "that is a percentage; a fraction is expected": (
                lambda z1, z2: 100 * partner_found(z1, z2)
            ),
            "only z2 is searched; the other views in z1 count as well": (
                lambda z1, z2: ((z1 @ z2.T).argmax(1) == torch.arange(len(z1))).float().mean()
            ),
        },
    ),
    "moco_v1.enqueue": Exercise(
        enqueue,
        queue_and_keys,
        [
            "The rows to write to are pointer, pointer + 1, ..., as many as there are keys.",
            "Modulo K, they begin again at 0.",
            "`pointer.add_(...)` changes the tensor itself; `pointer = ...` only the name.",
        ],
        {
            "the pointer does not move": enqueue_without_pointer,
            "the keys always go to the first rows; begin at the pointer": enqueue_at_the_start,
            "the pointer runs past the end: it is a number modulo K": enqueue_past_the_end,
        },
        changes=("queue", "pointer"),
    ),
    "moco_v1.momentum_update": Exercise(
        momentum_update,
        parameters,
        ["Go through both lists with `zip`.", "`k.mul_(m)` changes k in place; then add the rest."],
        {
            "m is on the wrong side: the keys' encoder has to change slowly": update_reversed,
            "only the first tensor is updated": update_of_the_first,
            "the old value is not multiplied by m": update_without_decay,
        },
        changes=("parameters_k",),
    ),
    "moco_v1.unshuffle": Exercise(
        unshuffle,
        shuffled_keys,
        [
            "Row i has to go to row permutation[i].",
            "That is what the inverse permutation does; `argsort` gives it.",
        ],
        {
            "the permutation is applied a second time; its inverse is needed": (
                lambda k, permutation: k[permutation]
            ),
            "the keys are still shuffled": lambda k, permutation: k,
            "the order is reversed, which is not the inverse": lambda k, permutation: k.flip(0),
        },
    ),
    "moco_v2.info_nce": Exercise(
        info_nce,
        queries_and_queue,
        [
            "The positive is one cosine per query, (B, 1); the negatives are (B, K).",
            "Put the positive in front: then the right class is 0 for all.",
            "`detach` what must not learn.",
        ],
        {
            "a gradient reaches the keys; only the query learns": info_nce_to_keys,
            "the positive is missing in the denominator": info_nce_without_positive,
            "the keys of the other images in the batch are no negatives here": info_nce_of_batch,
            NO_DIVISION: lambda q, k, queue, temperature: info_nce(q, k, queue, 1 / temperature),
            A_SUM: lambda q, k, queue, temperature: len(q) * info_nce(q, k, queue, temperature),
        },
        learns=("q",),
    ),
    "moco_v2.cosine_rate": Exercise(
        cosine_rate,
        rate_and_progress,
        ["Half a period of the cosine goes from 1 to -1.", "Add 1 and divide by 2."],
        {
            "half a cosine: the argument goes from 0 to π, not to 2π": (
                lambda rate, progress: cosine_rate(rate, 2 * progress)
            ),
            "that is a quarter of the cosine; half of it, lifted above 0, is expected": (
                lambda rate, progress: rate * math.cos(math.pi * progress / 2)
            ),
            "it rises; it has to fall": lambda rate, progress: cosine_rate(rate, 1 - progress),
            "it is not divided by 2": lambda rate, progress: 2 * cosine_rate(rate, progress),
        },
    ),
    "moco_v3.contrastive_loss": Exercise(
        contrastive_loss,
        queries_and_keys,
        [
            "A table of cosines, (B, B), with the right answers on the diagonal.",
            "Do not forget the factor, and what must not learn.",
        ],
        {
            "the factor 2 temperature is missing": (
                lambda q, k, temperature: contrastive_loss(q, k, temperature) / (2 * temperature)
            ),
            "the factor is 2 temperature, not temperature": (
                lambda q, k, temperature: contrastive_loss(q, k, temperature) / 2
            ),
            "a gradient reaches the keys; only the query learns": (
                lambda q, k, temperature: (
                    2 * temperature * F.cross_entropy(q @ k.T / temperature, torch.arange(len(q)))
                )
            ),
            "the softmax is over the queries; it has to be over the keys": (
                lambda q, k, temperature: (
                    2
                    * temperature
                    * F.cross_entropy(k.detach() @ q.T / temperature, torch.arange(len(q)))
                )
            ),
        },
        learns=("q",),
    ),
    "moco_v3.momentum": Exercise(
        momentum,
        start_and_progress,
        ["What falls along half a cosine is the distance to 1.", "It begins as 1 - start."],
        {
            "it falls to 0; it has to rise to 1": (
                lambda start, progress: start * (1 + math.cos(math.pi * progress)) / 2
            ),
            "it rises along a line; half a cosine is expected": (
                lambda start, progress: start + (1 - start) * progress
            ),
            "it starts at 1 and ends at `start`": (
                lambda start, progress: momentum(start, 1 - progress)
            ),
        },
    ),
    "byol.regression_loss": Exercise(
        regression_loss,
        predictions,
        [
            "Normalise the rows of both.",
            "The squared distance is a sum over C, then a mean over B.",
        ],
        {
            "the rows are not normalised": lambda p, z: (p - z).square().sum(1).mean(),
            "the mean is over all numbers; sum over the dimensions first": (
                lambda p, z: F.mse_loss(F.normalize(p, dim=1), F.normalize(z, dim=1))
            ),
            "the columns are normalised; it has to be the rows": (
                lambda p, z: (F.normalize(p, dim=0) - F.normalize(z, dim=0)).square().sum(1).mean()
            ),
            "that is 1 - cos, half of the squared distance": (
                lambda p, z: regression_loss(p, z) / 2
            ),
            A_SUM: lambda p, z: len(p) * regression_loss(p, z),
        },
    ),
    "byol.symmetric_loss": Exercise(
        symmetric_loss,
        both_predictions,
        [
            "2 - 2 cos is the squared distance of normalised vectors.",
            "`F.cosine_similarity(p, z, dim=1)` is one number per row.",
            "Predictions and targets cross: p1 with z2, p2 with z1.",
        ],
        {
            TO_THE_TARGET: (
                lambda p1, p2, z1, z2: regression_loss(p1, z2) + regression_loss(p2, z1)
            ),
            "each prediction is compared with the target of its own view": (
                lambda p1, p2, z1, z2: symmetric_loss(p1, p2, z2, z1)
            ),
            "one direction is missing": (lambda p1, p2, z1, z2: regression_loss(p1, z2.detach())),
            "both directions are averaged; they are added": (
                lambda p1, p2, z1, z2: symmetric_loss(p1, p2, z1, z2) / 2
            ),
            "the gradient stops at the predictions; it has to stop at the targets": (
                lambda p1, p2, z1, z2: (
                    regression_loss(p1.detach(), z2) + regression_loss(p2.detach(), z1)
                )
            ),
        },
        learns=("p1", "p2"),
    ),
    "simsiam.negative_cosine": Exercise(
        negative_cosine,
        predictions,
        ["`F.cosine_similarity(p, z, dim=1)` is one number per row.", "One word is missing still."],
        {
            TO_THE_TARGET: lambda p, z: -F.cosine_similarity(p, z, dim=1).mean(),
            "the sign is wrong: the loss has to fall as they agree": (
                lambda p, z: F.cosine_similarity(p, z.detach(), dim=1).mean()
            ),
            "the gradient stops at the prediction; it has to stop at z": (
                lambda p, z: -F.cosine_similarity(p.detach(), z, dim=1).mean()
            ),
            "that is a product, not a cosine: normalise both": (
                lambda p, z: -(p * z.detach()).sum(1).mean()
            ),
        },
        learns=("p",),
    ),
    "simsiam.embedding_std": Exercise(
        embedding_std,
        embedding,
        ["`z.std(dim=0)` has one number per dimension.", "Normalise the rows first."],
        {
            "the rows are not normalised": lambda z: z.std(0).mean() * z.shape[1] ** 0.5,
            "the factor, the square root of C, is missing": (
                lambda z: embedding_std(z) / z.shape[1] ** 0.5
            ),
            "the standard deviation is over the dimensions of a row; it has to be over the rows": (
                lambda z: F.normalize(z, dim=1).std(1).mean() * z.shape[1] ** 0.5
            ),
        },
    ),
    "barlow.cross_correlation": Exercise(
        cross_correlation,
        two_views,
        [
            "`z.std(dim=0, correction=0)` divides by B.",
            "The table is a matrix product over the batch, divided by B.",
        ],
        {
            "the mean is not subtracted": not_centred,
            "that correlates images; the dimensions have to be compared": of_images,
            "the product is not divided by B": (lambda z1, z2: len(z1) * cross_correlation(z1, z2)),
            "the standard deviation divides by B - 1; use correction=0": (
                lambda z1, z2: cross_correlation(z1, z2) * (len(z1) - 1) / len(z1)
            ),
            "rows and columns are exchanged": lambda z1, z2: cross_correlation(z2, z1),
        },
    ),
    "barlow.barlow_loss": Exercise(
        barlow_loss,
        correlations,
        ["`c.diagonal()`.", "The squares off the diagonal: those of all, less those on it."],
        {
            "the weight is on the diagonal as well": (
                lambda c, redundancy_weight: (
                    redundancy_weight * (torch.eye(len(c)) - c).square().sum()
                )
            ),
            "the squares on the diagonal count among those off it": (
                lambda c, redundancy_weight: (
                    (1 - c.diagonal()).square().sum() + redundancy_weight * c.square().sum()
                )
            ),
            "the redundancy term is missing": (
                lambda c, redundancy_weight: (1 - c.diagonal()).square().sum()
            ),
            "the result is a mean; a sum is expected": (
                lambda c, redundancy_weight: barlow_loss(c, redundancy_weight) / c.numel()
            ),
        },
    ),
    "swav.sinkhorn": Exercise(
        sinkhorn,
        scores_of_images,
        [
            "`codes / codes.sum(dim=0)` divides each column by its sum.",
            "For the rows, `keepdim=True` keeps the shape (B, 1).",
            "The rows come last in each round, so that they sum to 1.",
        ],
        {
            "rows first, then columns: the rows do not sum to 1 at the end": sinkhorn_rows_first,
            "that is a softmax: the prototypes have no equal shares": (
                lambda scores, epsilon, iterations: (scores / epsilon).softmax(1)
            ),
            "only one round was made": (
                lambda scores, epsilon, iterations: sinkhorn(scores, epsilon, 1)
            ),
            "epsilon multiplies the scores; it has to divide them": (
                lambda scores, epsilon, iterations: sinkhorn(scores, 1 / epsilon, iterations)
            ),
        },
    ),
    "swav.swapped_prediction": Exercise(
        swapped_prediction,
        scores_and_codes,
        ["`F.log_softmax` over the prototypes.", "Sum over the prototypes, mean over the images."],
        {
            "a gradient reaches the codes, which have to stay fixed: detach them": (
                lambda scores, codes, temperature: (
                    -(codes * F.log_softmax(scores / temperature, 1)).sum(1).mean()
                )
            ),
            "the softmax is over the images; it has to be over the prototypes": (
                lambda scores, codes, temperature: (
                    -(codes.detach() * F.log_softmax(scores / temperature, 0)).sum(1).mean()
                )
            ),
            "the mean is over all numbers; sum over the prototypes first": (
                lambda scores, codes, temperature: (
                    swapped_prediction(scores, codes, temperature) / scores.shape[1]
                )
            ),
            "the sign is wrong": (
                lambda scores, codes, temperature: -swapped_prediction(scores, codes, temperature)
            ),
            NO_DIVISION: (
                lambda scores, codes, temperature: swapped_prediction(
                    scores, codes, 1 / temperature
                )
            ),
        },
        learns=("scores",),
    ),
    "densecl.match": Exercise(
        match,
        maps,
        ["Normalise the features of each cell.", "A table of cosines per image, (B, S, S)."],
        {
            "the features are not normalised, so long ones win": (
                lambda h_q, h_k: (h_q @ h_k.mT).argmax(2)
            ),
            "that is the query's cell for each cell of the key": (lambda h_q, h_k: match(h_k, h_q)),
            "that is the least similar cell": lambda h_q, h_k: match(h_q, -h_k),
        },
    ),
    "densecl.dense_loss": Exercise(
        dense_loss,
        cells_and_queue,
        [
            "First bring the key's cells into the order of the query's: z_k[image, matched].",
            "Then it is MoCo's loss with B times S queries.",
        ],
        {
            "cell s is compared with cell s; take the matched cell": unmatched,
            NO_DIVISION: (
                lambda z_q, z_k, matched, queue, temperature: dense_loss(
                    z_q, z_k, matched, queue, 1 / temperature
                )
            ),
            "the result is a sum over the cells; a mean is expected": (
                lambda z_q, z_k, matched, queue, temperature: (
                    z_q.shape[1] * dense_loss(z_q, z_k, matched, queue, temperature)
                )
            ),
        },
    ),
    "clip.clip_loss": Exercise(
        clip_loss,
        pairs,
        ["One table of cosines, and its transpose.", "The right answers are on the diagonal."],
        {
            "only the images look for their captions": one_direction,
            "only the captions look for their images": other_direction,
            "both directions are added; their mean is expected": (
                lambda z_image, z_text, scale: 2 * clip_loss(z_image, z_text, scale)
            ),
            "the scale divides the cosines; it has to multiply them": (
                lambda z_image, z_text, scale: clip_loss(z_image, z_text, 1 / scale)
            ),
        },
    ),
    "clip.zero_shot": Exercise(
        zero_shot,
        images_and_prompts,
        [
            "Average over the sentences, dim=1.",
            "Normalise the averages: they are not of one length.",
        ],
        {
            "the mean of the sentences has to be normalised": (
                lambda z_image, z_prompts: (z_image @ z_prompts.mean(1).T).argmax(1)
            ),
            "only the first sentence is used": (
                lambda z_image, z_prompts: (z_image @ z_prompts[:, 0].T).argmax(1)
            ),
            "that is the most similar single sentence; take the mean of each class": (
                lambda z_image, z_prompts: (
                    torch.einsum("bc,ntc->bnt", z_image, z_prompts).max(2).values.argmax(1)
                )
            ),
        },
    ),
    "up_detr.assign": Exercise(
        assign,
        costs,
        [
            "`itertools.permutations(range(N), T)` goes through all assignments.",
            "Add up the cost of each, and keep the cheapest.",
        ],
        {
            "each object takes its cheapest query, also one that is taken": (
                lambda cost: cost.argmin(1)
            ),
            "the objects choose one by one; a dearer choice can be cheaper for all": greedy,
            "that is the dearest assignment": lambda cost: assign(-cost),
        },
    ),
    "up_detr.attention_mask": Exercise(
        attention_mask,
        groups,
        ["Query i belongs to patch i // (queries / patches).", "Compare all pairs of groups."],
        {
            "True and False are exchanged: True is what a query does not see": (
                lambda queries, patches: ~attention_mask(queries, patches)
            ),
            "the blocks end after queries / patches of them; there is one per patch": (
                queries_per_patch
            ),
            "the queries of a patch follow one another: 0, 0, 1, 1, not 0, 1, 0, 1": (
                lambda queries, patches: (
                    (torch.arange(queries) % patches).unsqueeze(1)
                    != torch.arange(queries) % patches
                )
            ),
        },
    ),
    "up_detr.giou": Exercise(
        giou,
        boxes,
        [
            "The shared part: from the larger of the left ends to the smaller of the right ends.",
            "It is 0 if they do not meet: clamp each side before multiplying.",
            "The box around both: the other way round.",
        ],
        {
            "that is the IoU; what neither covers is missing": lambda a, b: box_iou(
                a, b
            ).diagonal(),
            "two negative sides make a positive area: clamp them at 0": giou_unclamped,
            "that is the overlap with the distance of the centres (DIoU)": (
                lambda a, b: distance_box_iou(a, b).diagonal()
            ),
        },
    ),
    "vild.ensemble": Exercise(
        ensemble,
        two_heads,
        ["A geometric mean is a product of powers.", "`torch.where(is_base, weight, 1 - weight)`."],
        {
            "base and novel are exchanged": (
                lambda text_scores, image_scores, is_base, weight: ensemble(
                    text_scores, image_scores, ~is_base, weight
                )
            ),
            "novel names are weighted like base names": (
                lambda text_scores, image_scores, is_base, weight: (
                    text_scores**weight * image_scores ** (1 - weight)
                )
            ),
            "that is the arithmetic mean": (
                lambda text_scores, image_scores, is_base, weight: (
                    torch.where(is_base, weight, 1 - weight) * text_scores
                    + torch.where(is_base, 1 - weight, weight) * image_scores
                )
            ),
        },
    ),
    "vild.text_logits": Exercise(
        text_logits,
        regions_and_names,
        ["Normalise the background, and put it before the names.", "Then it is one product."],
        {
            "the background is not normalised": (
                lambda z, background, names, temperature: (
                    z @ torch.cat([background.unsqueeze(0), names]).T / temperature
                )
            ),
            "the background comes last; it has to be first": (
                lambda z, background, names, temperature: text_logits(
                    z, background, names, temperature
                ).roll(-1, 1)
            ),
            "the background is missing": (
                lambda z, background, names, temperature: z @ names.T / temperature
            ),
            NO_DIVISION: (
                lambda z, background, names, temperature: text_logits(
                    z, background, names, 1 / temperature
                )
            ),
        },
    ),
}


# -------------------------------------------------------------------------------------- the check
def check(name, answer):
    """Prints whether the answer, a function, does what the exercise asks for."""
    print(f"{name}: {judge(name, answer)}")


def judge(name, answer):
    """right; no answer yet; or not yet, and why."""
    if name not in EXERCISES:
        near = difflib.get_close_matches(name, EXERCISES, 3, 0.3)
        return f"there is no such exercise; did you mean {', '.join(near or EXERCISES)}?"
    if not callable(answer):
        return f"not yet: a function is expected, and this is a {type(answer).__name__}"
    exercise = EXERCISES[name]
    inputs = []
    for trial in range(TRIALS):
        generator = torch.Generator().manual_seed(trial)
        inputs.append(exercise.arguments(generator))
    for arguments in inputs:
        try:
            found = outcome(exercise, answer, arguments)
        except (Exception, SystemExit) as error:
            said = (str(error).splitlines() or [""])[0]
            return f"not yet: raises {type(error).__name__}: {said}"
        if is_empty(exercise, found, arguments):
            return "no answer yet"
        problem = difference(found, outcome(exercise, exercise.solution, arguments))
        if problem:
            return f"not yet: {usual_mistake(exercise, answer, inputs) or problem}"
    return "right"


def outcome(exercise, function, arguments):
    """What a call does: {result, the arguments afterwards, their gradients}."""
    given = copy.deepcopy(arguments)
    if exercise.learns:
        for value in given.values():
            if torch.is_tensor(value) and value.is_floating_point():
                value.requires_grad_(True)
    result = function(**given)
    found = {"the result": result}
    if exercise.changes:
        found = {}
    if exercise.learns and torch.is_tensor(result) and result.requires_grad and result.numel() == 1:
        result.sum().backward()
    for name, value in given.items():
        if exercise.learns and torch.is_tensor(value) and value.is_floating_point():
            grad = torch.zeros_like(value) if value.grad is None else value.grad
            found[f"the gradient of {name}"] = grad
        parts = value if isinstance(value, list) else [value]
        for number, part in enumerate(parts):
            if torch.is_tensor(part):
                place = f"{name}[{number}]" if isinstance(value, list) else name
                found[f"{place}, afterwards"] = part.detach().clone()
    return found


def is_empty(exercise, found, arguments):
    if exercise.changes:
        untouched = outcome(exercise, lambda **given: None, arguments)
        return all(torch.equal(found[key], untouched[key]) for key in found)
    return found["the result"] is None or found["the result"] is ...


def difference(found, expected):
    """What is not as expected; or an empty text."""
    for key, right in expected.items():
        value = found[key]
        if isinstance(value, (bool, int, float, list, tuple)):
            try:
                value = torch.as_tensor(value)
            except (TypeError, ValueError, RuntimeError):
                pass
        if not torch.is_tensor(value):
            return f"{key} is a {type(value).__name__}; a tensor is expected"
        right = torch.as_tensor(right)
        if value.shape != right.shape:
            return f"{key} has the shape {tuple(value.shape)}; {tuple(right.shape)} is expected"
        value = value.detach().double()
        right = right.detach().double()
        if value.isnan().any():
            return f"{key} is not a number (nan)"
        if not torch.allclose(value, right, rtol=1e-4, atol=1e-6):
            worst = (value - right).abs().flatten().argmax()
            one, other = value.flatten()[worst].item(), right.flatten()[worst].item()
            where = "is" if value.numel() == 1 else "has a number that is"
            return f"on random input, {key} {where} {one:.4g}; {other:.4g} is expected"
    return ""


def usual_mistake(exercise, answer, inputs):
    """The mistake that behaves as the answer does on all inputs."""
    for sentence, wrong in exercise.mistakes.items():
        same = True
        for arguments in inputs:
            try:
                found = outcome(exercise, answer, arguments)
                same = same and not difference(found, outcome(exercise, wrong, arguments))
            except (Exception, SystemExit):
                same = False
        if same:
            return sentence
    return ""


# ---------------------------------------------------------------------------------- for notebooks
def stub(name):
    """The function to be written."""
    solution = EXERCISES[name].solution
    lines = inspect.getsource(solution).splitlines()
    end = next(number for number, line in enumerate(lines[1:], 1) if line.rstrip().endswith('"""'))
    return "\n".join([*lines[: end + 1], "    ..."])


def markdown(name):
    """The name of an exercise, and hints and the solution, each folded."""
    exercise = EXERCISES[name]
    parts = [f"### {name.split('.')[1]}"]
    for number, hint in enumerate(exercise.hints, 1):
        parts.append(f"<details><summary>Hint {number}</summary>\n\n{hint}\n\n</details>")
    source = inspect.getsource(exercise.solution).rstrip()
    parts.append(f"<details><summary>Solution</summary>\n\n```python\n{source}\n```\n\n</details>")
    return "\n\n".join(parts)
