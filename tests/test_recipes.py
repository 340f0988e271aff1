"""The imagenet recipes against the papers: every setting, and every number of every view.

File names are of the authors' repositories. Where paper and code differ, the code is followed."""

import importlib
from dataclasses import asdict

import pytest
from conftest import METHODS

OURS = {"recipe", "eval_every"}  # settings that no paper has
RESNET = {"arch": "resnet50", "size": 224}
SETTINGS = {
    # Batch, optimizer and epochs: section 2.3 and appendix B.6. google-research/simclr: run.py
    # (temperature, warm-up), model_util.py (projector), data_util.py (strength of the colours),
    # tf2/run.py (weight decay; 1e-4 in run.py).
    ("simclr", "imagenet"): RESNET
    | {
        "epochs": 1000,
        "batch_size": 4096,
        "optimizer": "lars",
        "lr": 0.3,
        "warmup_epochs": 10.0,
        "weight_decay": 1e-6,
        "temperature": 0.1,
        "projection_dim": 128,
        "jitter_strength": 1.0,
    },
    # facebookresearch/moco: main_moco.py, and README.md for 8 GPUs of 32 images.
    ("moco_v1", "imagenet"): RESNET
    | {
        "epochs": 200,
        "batch_size": 256,
        "lr": 0.03,
        "weight_decay": 1e-4,
        "temperature": 0.07,
        "projection_dim": 128,
        "queue_size": 65536,
        "ema_momentum": 0.999,
        "bn_groups": 8,
    },
    ("moco_v2", "imagenet"): RESNET
    | {
        "epochs": 200,
        "batch_size": 256,
        "lr": 0.03,
        "weight_decay": 1e-4,
        "temperature": 0.2,
        "projection_dim": 128,
        "queue_size": 65536,
        "ema_momentum": 0.999,
        "bn_groups": 8,
    },
    # facebookresearch/moco-v3: CONFIG.md, moco/builder.py (heads), main_moco.py (crop_min, which
    # CONFIG.md changes for ResNet-50 alone), vits.py (patches).
    ("moco_v3", "imagenet"): {
        "arch": "vit_small",
        "size": 224,
        "patch_size": 16,
        "crop_min": 0.08,
        "epochs": 300,
        "batch_size": 4096,
        "optimizer": "adamw",
        "lr": 1.5e-4,
        "warmup_epochs": 40.0,
        "weight_decay": 0.1,
        "temperature": 0.2,
        "hidden_dim": 4096,
        "projection_dim": 256,
        "ema_momentum": 0.99,
    },
    ("moco_v3", "imagenet_resnet50"): RESNET
    | {
        "patch_size": 16,  # without effect
        "crop_min": 0.2,
        "epochs": 1000,
        "batch_size": 4096,
        "optimizer": "lars",
        "lr": 0.3,
        "warmup_epochs": 10.0,
        "weight_decay": 1.5e-6,
        "temperature": 1.0,
        "hidden_dim": 4096,
        "projection_dim": 256,
        "ema_momentum": 0.996,
    },
    # google-deepmind/deepmind-research: byol/configs/byol.py for 1000 epochs,
    # byol/utils/augmentations.py (crop_min).
    ("byol", "imagenet"): RESNET
    | {
        "crop_min": 0.08,
        "epochs": 1000,
        "batch_size": 4096,
        "optimizer": "lars",
        "lr": 0.2,
        "warmup_epochs": 10.0,
        "weight_decay": 1.5e-6,
        "hidden_dim": 4096,
        "projection_dim": 256,
        "ema_momentum": 0.996,
    },
    # facebookresearch/simsiam: main_simsiam.py, simsiam/builder.py (heads).
    ("simsiam", "imagenet"): RESNET
    | {
        "epochs": 100,
        "batch_size": 512,
        "lr": 0.05,
        "weight_decay": 1e-4,
        "projection_dim": 2048,
        "predictor_dim": 512,
    },
    # facebookresearch/barlowtwins: main.py. The paper has lambda 0.005.
    ("barlow", "imagenet"): RESNET
    | {
        "epochs": 1000,
        "batch_size": 2048,
        "optimizer": "lars",
        "lr": 0.2,
        # 0.0048 in main.py, for 16 GPUs (README.md) whose all_reduce has no gradient, so that the
        # gradient is a 16th of the true one: 0.0048 / 16.
        "lr_biases": 0.0003,
        "warmup_epochs": 10.0,
        "weight_decay": 1e-6,
        "redundancy_weight": 0.0051,
        "projection_dim": 8192,
    },
    # facebookresearch/swav: scripts/swav_800ep_pretrain.sh (its 313 steps with fixed prototypes are
    # an epoch, its rates 4.8 = 0.3 * 4096 / 256), main_swav.py, src/resnet50.py (projector),
    # src/multicropdataset.py (colours).
    ("swav", "imagenet"): RESNET
    | {
        "small_size": 96,
        "small_crops": 6,
        "crop_split": 0.14,
        "epochs": 800,
        "batch_size": 4096,
        "optimizer": "larc",
        "lr": 0.3,
        "warmup_epochs": 10.0,
        "weight_decay": 1e-6,
        "temperature": 0.1,
        "epsilon": 0.05,
        "sinkhorn_iterations": 3,
        "hidden_dim": 2048,
        "projection_dim": 128,
        "prototypes": 3000,
        "freeze_epochs": 1.0,
        "queue_size": 0,  # for small batches only
        "queue_start": 0,
        "jitter_strength": 1.0,
    },
    # WXinlong/DenseCL: configs/selfsup/densecl, openselfsup/models/densecl.py.
    ("densecl", "imagenet"): RESNET
    | {
        "epochs": 200,
        "batch_size": 256,
        "lr": 0.03,
        "weight_decay": 1e-4,
        "temperature": 0.2,
        "projection_dim": 128,
        "dense_weight": 0.5,
        "queue_size": 65536,
        "ema_momentum": 0.999,
        "bn_groups": 8,
    },
}

MOCO_V2 = {  # facebookresearch/moco: main_moco.py, --aug-plus
    "size": 224,
    "scale": (0.2, 1.0),
    "flip": 0.5,
    "jitter": (0.4, 0.4, 0.4, 0.1),
    "jitter_p": 0.8,
    "grayscale": 0.2,
    "blur": 0.5,
    "solarize": 0.0,
    "bicubic": False,
    "margin": 256 / 224,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}
MOCO_V1 = MOCO_V2 | {  # without --aug-plus
    "jitter": (0.4, 0.4, 0.4, 0.4),
    "jitter_p": 1.0,
    "blur": 0.0,
}
SIMCLR = MOCO_V2 | {  # data_util.py; values stay between 0 and 1
    "scale": (0.08, 1.0),
    "jitter": (0.8, 0.8, 0.8, 0.2),
    "bicubic": True,
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
}
BYOL = MOCO_V2 | {  # utils/augmentations.py; the first of two different views
    "scale": (0.08, 1.0),
    "jitter": (0.4, 0.4, 0.2, 0.1),
    "blur": 1.0,
    "bicubic": True,
}
BYOL_2 = BYOL | {"blur": 0.1, "solarize": 0.2}
MOCO_V3 = BYOL | {"bicubic": False}  # facebookresearch/moco-v3: main_moco.py
MOCO_V3_2 = BYOL_2 | {"bicubic": False}
SWAV = MOCO_V2 | {  # src/multicropdataset.py; its 0.228 is 0.229 here
    "scale": (0.14, 1.0),
    "jitter": (0.8, 0.8, 0.8, 0.2),
}
SWAV_SMALL = SWAV | {"size": 96, "scale": (0.05, 0.14)}
VIEWS = {
    ("simclr", "imagenet"): [SIMCLR, SIMCLR],
    ("moco_v1", "imagenet"): [MOCO_V1, MOCO_V1],
    ("moco_v2", "imagenet"): [MOCO_V2, MOCO_V2],
    ("moco_v3", "imagenet"): [MOCO_V3, MOCO_V3_2],
    ("moco_v3", "imagenet_resnet50"): [
        MOCO_V3 | {"scale": (0.2, 1.0)},
        MOCO_V3_2 | {"scale": (0.2, 1.0)},
    ],
    ("byol", "imagenet"): [BYOL, BYOL_2],
    ("simsiam", "imagenet"): [MOCO_V2, MOCO_V2],  # main_simsiam.py
    ("barlow", "imagenet"): [BYOL, BYOL_2],  # main.py
    ("swav", "imagenet"): [SWAV] * 2 + [SWAV_SMALL] * 6,
    ("densecl", "imagenet"): [MOCO_V2, MOCO_V2],  # configs/selfsup/densecl
}


def imagenet_recipes():
    found = []
    for name in METHODS:
        for recipe in importlib.import_module(name).SETTINGS["recipe"][:-1]:
            if recipe.startswith("imagenet"):
                found.append((name, recipe))
    return found


@pytest.mark.parametrize("name, recipe", imagenet_recipes())
def test_settings_are_the_papers(name, recipe):
    script = importlib.import_module(name)
    args = vars(script.parse_args(["--recipe", recipe]))
    settings = {key: args[key] for key in script.SETTINGS if key not in OURS}
    assert settings == SETTINGS[name, recipe]


@pytest.mark.parametrize("name, recipe", imagenet_recipes())
def test_views_are_the_papers(name, recipe):
    script = importlib.import_module(name)
    views = script.build_views(script.parse_args(["--recipe", recipe]))
    assert [asdict(view) for view in views] == VIEWS[name, recipe]
