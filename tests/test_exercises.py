"""The checks of the exercises know right from wrong, and name the usual mistakes."""

import importlib
import inspect
import math

import exercises
import pytest
import torch
import torch.nn.functional as F
from exercises import EXERCISES

from results.methods import SCRIPTS


# Right answers written in another way: loops, another order, other types.
def nt_xent(z1, z2, temperature):
    views = [*z1.double(), *z2.double()]
    total = 0.0
    for i, view in enumerate(views):
        weights = [math.exp(view @ other / temperature) for other in views]
        total -= math.log(weights[(i + len(z1)) % len(views)] / (sum(weights) - weights[i]))
    return total / len(views)


def partner_found(z1, z2):
    found = 0
    for one, others in ((z1, z2), (z2, z1)):
        for i, view in enumerate(one):
            rest = torch.cat([one[:i], one[i + 1 :]])
            best = torch.cat([rest, others]).mv(view).max()
            found += bool(view @ others[i] >= best - 1e-6)
    return found / (2 * len(z1))


def enqueue(queue, pointer, keys):
    for key in keys:
        queue[pointer.item()] = key
        pointer.copy_((pointer + 1) % len(queue))


def momentum_update(parameters_k, parameters_q, m):
    for number in range(len(parameters_k)):
        parameters_k[number].copy_(torch.lerp(parameters_q[number], parameters_k[number], m))


def unshuffle(k, permutation):
    ordered = torch.empty_like(k)
    ordered[permutation] = k
    return ordered


def info_nce(q, k, queue, temperature):
    losses = []
    for one, key in zip(q, k):
        logits = torch.stack([one @ other.detach() for other in [key, *queue]])
        losses.append(-(logits / temperature).log_softmax(0)[0])
    return sum(losses) / len(losses)


def contrastive_loss(q, k, temperature):
    with torch.no_grad():
        keys = k.clone()
    return -2 * temperature * (q @ keys.T / temperature).log_softmax(1).diagonal().mean()


def symmetric_loss(p1, p2, z1, z2):
    with torch.no_grad():
        z1 = z1 / z1.norm(dim=1, keepdim=True)
        z2 = z2 / z2.norm(dim=1, keepdim=True)
    one = (F.normalize(p1, dim=1) * z2).sum(1).mean()
    other = (F.normalize(p2, dim=1) * z1).sum(1).mean()
    return 4 - 2 * one - 2 * other


def negative_cosine(p, z):
    z = F.normalize(z, dim=1).data
    return -(F.normalize(p, dim=1) * z).sum(1).mean()


def cross_correlation(z1, z2):
    n = z1.shape[1]
    return torch.corrcoef(torch.cat([z1.T, z2.T]))[:n, n:]


def barlow_loss(c, redundancy_weight):
    total = 0.0
    for i in range(len(c)):
        for j in range(len(c)):
            value = c[i, j].item()
            total += (1 - value) ** 2 if i == j else redundancy_weight * value**2
    return total


def sinkhorn(scores, epsilon, iterations):
    codes = torch.exp((scores.double() - 1) / epsilon).T  # (P, B), as in the official code
    for _ in range(iterations):
        codes = codes / codes.sum(1, keepdim=True) / len(codes)
        codes = codes / codes.sum(0, keepdim=True)
    return codes.T.float()


def swapped_prediction(scores, codes, temperature):
    return F.cross_entropy(scores / temperature, codes.detach())


def match(h_q, h_k):
    found = []
    for q, k in zip(h_q, h_k):
        found.append([F.cosine_similarity(cell, k, dim=1).argmax().item() for cell in q])
    return found


def dense_loss(z_q, z_k, matched, queue, temperature):
    losses = []
    for q, k, cells in zip(z_q, z_k, matched):
        for cell, partner in zip(q, cells):
            logits = torch.cat([(cell @ k[partner]).unsqueeze(0), queue @ cell]) / temperature
            losses.append(torch.logsumexp(logits, 0) - logits[0])
    return torch.stack(losses).mean()


def clip_loss(z_image, z_text, scale):
    logits = (scale * z_image @ z_text.T).double()
    rows = logits.log_softmax(1).diagonal()
    columns = logits.log_softmax(0).diagonal()
    return -(rows + columns).mean().item() / 2


def zero_shot(z_image, z_prompts):
    classes = z_prompts.sum(1)
    return [F.cosine_similarity(z, classes, dim=1).argmax().item() for z in z_image]


def assign(cost):
    return importlib.import_module("up_detr").hungarian(cost.tolist())


def giou(a, b):
    return importlib.import_module("torchvision").ops.generalized_box_iou(a, b).diagonal()


def ensemble(text_scores, image_scores, is_base, weight):
    exponent = is_base * weight + ~is_base * (1 - weight)
    return torch.exp(exponent * text_scores.log() + (1 - exponent) * image_scores.log())


ALSO_RIGHT = {
    "start.alignment": lambda z1, z2: (2 - 2 * (z1 * z2).sum(1)).mean(),
    "start.uniformity": lambda z: torch.log((-2 * torch.pdist(z.double()) ** 2).exp().mean()),
    "simclr.nt_xent": nt_xent,
    "simclr.partner_found": partner_found,
    "moco_v1.enqueue": enqueue,
    "moco_v1.momentum_update": momentum_update,
    "moco_v1.unshuffle": unshuffle,
    "moco_v2.info_nce": info_nce,
    "moco_v2.cosine_rate": lambda rate, progress: rate * math.cos(math.pi * progress / 2) ** 2,
    "moco_v3.contrastive_loss": contrastive_loss,
    "moco_v3.momentum": lambda start, progress: (
        start + (1 - start) * math.sin(math.pi * progress / 2) ** 2
    ),
    "byol.regression_loss": lambda p, z: (2 - 2 * F.cosine_similarity(p, z)).mean(),
    "byol.symmetric_loss": symmetric_loss,
    "simsiam.negative_cosine": negative_cosine,
    "simsiam.embedding_std": lambda z: importlib.import_module("common").health(z)["std"],
    "barlow.cross_correlation": cross_correlation,
    "barlow.barlow_loss": barlow_loss,
    "swav.sinkhorn": sinkhorn,
    "swav.swapped_prediction": swapped_prediction,
    "densecl.match": match,
    "densecl.dense_loss": dense_loss,
    "clip.clip_loss": clip_loss,
    "clip.zero_shot": zero_shot,
    "up_detr.assign": assign,
    "up_detr.attention_mask": lambda queries, patches: importlib.import_module(
        "up_detr"
    ).attention_mask(queries, patches),
    "up_detr.giou": giou,
    "vild.ensemble": ensemble,
    "vild.text_logits": lambda z, background, names, temperature: torch.cat(
        [
            F.cosine_similarity(z, background.expand_as(z)).unsqueeze(1) / temperature,
            z @ names.T / temperature,
        ],
        dim=1,
    ),
}
IN_A_SCRIPT = {  # the script's own function, where it takes the same arguments
    "simclr.nt_xent": ("simclr", "nt_xent"),
    "moco_v1.enqueue": ("moco_v1", "enqueue"),
    "moco_v3.contrastive_loss": ("moco_v3", "contrastive_loss"),
    "byol.regression_loss": ("byol", "regression_loss"),
    "simsiam.negative_cosine": ("simsiam", "negative_cosine"),
    "swav.sinkhorn": ("swav", "sinkhorn"),
    "swav.swapped_prediction": ("swav", "swapped_prediction"),
    "densecl.match": ("densecl", "match"),
    "clip.clip_loss": ("clip", "contrastive_loss"),
    "up_detr.attention_mask": ("up_detr", "attention_mask"),
    "vild.ensemble": ("vild", "ensemble"),
    "vild.text_logits": ("vild", "text_logits"),
}
EACH = pytest.mark.parametrize("name", EXERCISES)


def inputs(name, trial=7):
    return EXERCISES[name].arguments(torch.Generator().manual_seed(trial))


def test_every_script_has_exercises():
    found = [name.split(".")[0] for name in EXERCISES]
    assert all(found.count(name) >= 2 for name in ("start", *SCRIPTS))
    assert set(found) == {"start", *SCRIPTS}
    assert ALSO_RIGHT.keys() == EXERCISES.keys()


@EACH
def test_right_answers_are_right(name):
    exercise = EXERCISES[name]
    assert exercises.judge(name, exercise.solution) == "right"
    assert exercises.judge(name, ALSO_RIGHT[name]) == "right"


@pytest.mark.parametrize("name", IN_A_SCRIPT)
def test_the_solution_is_what_the_script_does(name):
    """In value; in the script the caller, not the loss, stops some gradients."""
    script, function = IN_A_SCRIPT[name]
    function = getattr(importlib.import_module(script), function)
    exercise = EXERCISES[name]
    for trial in range(5):
        arguments = inputs(name, trial)
        ours = exercises.outcome(exercise, exercise.solution, arguments)
        theirs = exercises.outcome(exercise, lambda **given: function(*given.values()), arguments)
        for key in ours:
            if "gradient" not in key:
                assert not exercises.difference({key: theirs[key]}, {key: ours[key]})


@EACH
def test_mistakes_are_named(name):
    """Each by its own sentence, and there are at least two."""
    mistakes = EXERCISES[name].mistakes
    assert len(mistakes) >= 3
    for sentence, wrong in mistakes.items():
        assert exercises.judge(name, wrong) == f"not yet: {sentence}"


@EACH
def test_whatever_is_handed_in_gets_one_line(name, capsys):
    def fails(**arguments):
        raise ValueError("a line\nand another")

    def leaves(**arguments):
        raise SystemExit(2)

    answers = {
        "no answer yet": lambda **arguments: None,
        "raises ValueError: a line": fails,
        "raises SystemExit": leaves,
        "raises TypeError": lambda: 1,
        "a function is expected": "text",
        "a function is expected, and this is a Tensor": torch.zeros(3),
    }
    if not EXERCISES[name].changes:
        answers |= {
            "is a str; a tensor": lambda **arguments: "text",
            "is a dict; a tensor": lambda **arguments: {},
            "has the shape (3, 1, 2)": lambda **arguments: torch.ones(3, 1, 2),
        }
    for said, answer in answers.items():
        exercises.check(name, answer)
        printed = capsys.readouterr().out
        assert printed.startswith(f"{name}: ") and printed.count("\n") == 1
        assert said in printed, printed


@EACH
def test_numbers_that_are_wrong_for_no_known_reason(name):
    exercise = EXERCISES[name]
    if exercise.changes:
        return

    def shifted(factor):
        def answer(**arguments):
            result = torch.as_tensor(exercise.solution(**arguments))
            return result.double() * factor + factor - 1

        return answer

    assert "nan" in exercises.judge(name, shifted(math.nan))
    assert "is expected" in exercises.judge(name, shifted(1.37))
    assert exercises.judge(name, shifted(math.inf)).startswith("not yet: ")


@EACH
def test_an_answer_that_spoils_its_arguments_is_not_right(name):
    exercise = EXERCISES[name]

    def spoils(**arguments):
        result = exercise.solution(**arguments)
        for value in arguments.values():
            if torch.is_tensor(value) and value.is_floating_point():
                value.data.mul_(2)
        return result

    tensors = [x for x in inputs(name).values() if torch.is_tensor(x) and x.is_floating_point()]
    if tensors and not exercise.changes:
        said = exercises.judge(name, spoils)
        assert "afterwards" in said or "gradient" in said


@EACH
def test_the_empty_function_is_one(name):
    """It has the signature and the docstring of the solution, and is no answer yet."""
    space = {"torch": torch}
    exec(exercises.stub(name), space)
    empty = space[name.split(".")[1]]
    solution = EXERCISES[name].solution
    assert inspect.signature(empty) == inspect.signature(solution)
    assert inspect.getdoc(empty) == inspect.getdoc(solution)
    assert list(inspect.signature(empty).parameters) == list(inputs(name))
    assert exercises.judge(name, empty) == "no answer yet"


@EACH
def test_hints_and_solution_are_folded(name):
    text = exercises.markdown(name)
    source = inspect.getsource(EXERCISES[name].solution).rstrip()
    assert source in text
    unfolded = text
    while "<details>" in unfolded:
        before, _, rest = unfolded.partition("<details>")
        unfolded = before + rest.partition("</details>")[2]
    assert unfolded.strip() == f"### {name.split('.')[1]}"
    assert len(EXERCISES[name].hints) >= 2
    for hint in EXERCISES[name].hints:
        assert hint in text


def test_inputs_differ_from_trial_to_trial():
    for name in EXERCISES:
        assert str(inputs(name, 0)) != str(inputs(name, 1))
        assert str(inputs(name, 0)) == str(inputs(name, 0))


def test_an_unknown_name_is_one_line(capsys):
    exercises.check("simclr.ntxent", print)
    printed = capsys.readouterr().out
    assert "simclr.nt_xent" in printed and printed.count("\n") == 1
