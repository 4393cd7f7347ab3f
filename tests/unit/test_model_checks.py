"""Model arguments that cannot work, found without data by shapes alone.

pytest tests/unit/test_model_checks.py
"""

import pytest
from timm.layers import to_2tuple

import models
from engine.sanity import schedule_warnings
from utils.errors import ConfigError

SETTINGS = {
    **{"num_classes": 10, "img_size": 32, "drop_path_rate": 0.0, "batch_size": 8},
    **{"in_chans": 3, "training": True, "grad_checkpointing": False},
}


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("dat_micro", {"global_pool": "bogus"}, "Invalid pool type"),
        ("dat_micro", {"global_pool": ""}, r"returns \[8, 2, 2, 10\], expected logits \[8, 10\]"),
        ("dat_micro", {"features_only": True}, "takes no argument"),
        ("dat_micro", {"window_size": 0}, "window_size is 0, expected an integer of at least 1"),
        ("dat_micro", {"window_size": 3.5}, "window_size is 3.5"),
        ("dat_micro", {"window_size": True}, "window_size is True"),
        ("dat_micro", {"num_heads": [0, 2, 4, 8]}, r"num_heads is 0 in \[0, 2, 4, 8\]"),
        ("dat_micro", {"offset_strides": [0] * 4}, "offset_strides is 0"),
        ("dat_micro", {"dims": list("abcd")}, "dims is 'a' in"),
        ("dat_micro", {"dims": 64}, "expected a list with one entry per stage"),
        ("dat_micro", {"stages": "LS"}, "stages is 'LS', expected a list"),
        ("dat_micro", {"plus_plus": "yes"}, "plus_plus is 'yes', expected True or False"),
        ("dat_micro", {"rpe_img_size": "big"}, "rpe_img_size is 'big', expected an integer of at"),
        ("dat_micro", {"rpe_img_size": [32, 32, 32]}, "or two: height and width"),
        ("dat_micro", {"rpe_img_size": []}, r"rpe_img_size is \[\]"),
        ("dat_pp_micro", {"patch_size": 1}, "patch_size is 1, a DAT\\+\\+ of 32 channels in the"),
        ("dat_pp_micro", {"patch_size": 128}, "takes 2 to 64"),
        ("dat_micro", {"drop_rate": 2}, "dropout probability has to be between 0 and 1"),
        ("dat_micro", {"plus_plus": True, "patch_size": 3}, "expected a power of two"),
        ("resnet18", {"batch_size": 1}, "DATA.BATCH_SIZE 1 is too small"),
        ("resnet18", {"output_stride": 5}, "cannot take images"),
        ("resnet18.a1_in2k", {}, "there is no model 'resnet18.a1_in2k'; did you mean 'resnet18.a1"),
        ("dat_micro.in1k", {}, "there is no model 'dat_micro.in1k'; did you mean 'dat_micro'"),
        ("vgg11_bn", {"drop_path_rate": 0.1}, "no stochastic depth: set MODEL.DROP_PATH_RATE 0"),
        ("vgg11_bn", {"grad_checkpointing": True}, "no gradient checkpointing"),
        ("vit_tiny_patch16_224", {"global_pool": "bogus"}, "cannot take images"),
        ("crossvit_tiny_240", {"img_size": 224}, "cannot take images of 224×224 pixels"),
        ("maxvit_tiny_rw_224", {"img_size": [224, 100]}, "cannot take images of 224×100 pixels"),
    ],
)
def test_arguments_that_cannot_work_are_refused(name, settings, words):
    with pytest.raises(ConfigError, match=words):
        check(name, settings)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("dat_micro", {"drop_path_rate": 0.3, "grad_checkpointing": True}),
        ("dat_pp_micro", {"rpe_img_size": 64}),
        ("dat_micro", {"rpe_img_size": [64, 32], "patch_size": 1}),
        ("resnet18", {"batch_size": 1, "training": False}),
        ("vgg11_bn", {}),
        ("resnet18", {"in_chans": 1}),
        ("dat_pp_micro", {"img_size": [32, 48], "in_chans": 1}),
        ("swin_tiny_patch4_window7_224", {"img_size": [96, 64], "in_chans": 1}),
        ("hrnet_w18_small", {}),  # takes no drop path, in other words than vgg
        ("swin_tiny_patch4_window7_224", {"img_size": 64}),
    ],
)
def test_what_works_is_accepted(name, settings):
    check(name, settings)


def check(name, settings):
    settings = SETTINGS | settings
    sizes = [to_2tuple(settings["img_size"])]
    models.check_forward(name, sizes=sizes, **settings)


# --- Schedules ------------------------------------------------------------------------------------

SCHEDULE = {
    **{"epochs": 2, "steps_per_epoch": 22, "ema_decay": 0.0, "print_freq": 10},
    **{"eval_freq": 1, "save_freq": 1, "save_steps": 0, "unreached": {}},
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"ema_decay": 0.9}, None),
        ({"ema_decay": 0.9999}, "99.6% of the average are the initial weights. 0.9 would fit"),
        ({"ema_decay": 0.9999, "epochs": 300, "steps_per_epoch": 312}, None),
        ({"print_freq": 23}, "only the last step of each epoch is recorded"),
        ({"print_freq": 22}, None),
        ({"save_steps": 44}, "SAVE_STEPS is 44, the run has 44 steps"),
        ({"save_steps": 43}, None),
        ({"eval_freq": 3}, "only the end is evaluated"),
        ({"save_freq": 3}, "SAVE_FREQ is 3"),
        ({"unreached": {"AUG.MIXUP_OFF_EPOCH": 1}}, None),
        ({"unreached": {"AUG.MIXUP_OFF_EPOCH": 2}}, "AUG.MIXUP_OFF_EPOCH names epoch 2"),
    ],
)
def test_averages_and_intervals_beyond_the_run_are_reported(changes, words):
    warnings = schedule_warnings(**SCHEDULE | changes)
    assert len(warnings) == (words is not None)
    assert words is None or words in warnings[0]
