import pytest
from tiny import one_line

from icae.config import ICAEConfig, TrainConfig
from icae.errors import ICAEError


@pytest.mark.parametrize(
    "config, settings, part",
    [
        (TrainConfig, {"ratios": 8}, "ratios must be a list"),
        (TrainConfig, {"ratios": [0]}, "ratios"),
        (TrainConfig, {"ratios": []}, "ratios"),
        (TrainConfig, {"ratios": [2.5]}, "whole number"),
        (TrainConfig, {"compile": True}, "compile is for device=cpu with bf16=true"),
        (TrainConfig, {"device": "cuda:1"}, "device must be one of cpu, cuda, mps"),
        (TrainConfig, {"rate_factors": [[0, -1.0]]}, "rate_factors must be at least 0"),
        (TrainConfig, {"bf16": "flase"}, "bf16 must be a boolean, got 'flase'"),
        (TrainConfig, {"windows": [[0, 32], [300, 64], [100, 16]]}, "ascending"),
        (TrainConfig, {"windows": [[0, 16.5]]}, "windows"),
        (TrainConfig, {"windows": []}, "windows"),
        (TrainConfig, {"windows": [[5, 16]]}, "from 0 on"),
        (TrainConfig, {"rate_factors": [[0, 1], [0, 2]]}, "rate_factors"),
        (TrainConfig, {"response_length": 0}, "response_length must be at least 1, got 0"),
        (TrainConfig, {"learning_rate": -1}, "learning_rate must be above 0"),
        (TrainConfig, {"adam_beta2": 1}, "adam_beta2 must be below 1"),
        (TrainConfig, {"distil": 1.5}, "distil must be at most 1"),
        (TrainConfig, {"seed": -1}, "seed"),
        (TrainConfig, {"log_steps": 0}, "log_steps"),
        (TrainConfig, {"workers": -1}, "workers"),
        (TrainConfig, {"train": 5}, "train must be a string or a list or a dictionary, got 5"),
        (TrainConfig, {"replay": {"a.txt": "much"}}, "replay, a.txt, must be a number"),
        (TrainConfig, {"objective": "learn"}, "objective must be one of pretrain, instruct"),
        (TrainConfig, {"objective": "instruct", "replay": "texts"}, "pretrain_share=0.3"),
        (TrainConfig, {"objective": "instruct", "teacher": "runs/full-text"}, "distil=0.5"),
        (ICAEConfig, {"lora_targets": "q_proj"}, "lora_targets must be a list"),
        (ICAEConfig, {"lora_dropout": 1.5}, "lora_dropout"),
        (ICAEConfig, {"lora_alpha": 0}, "lora_alpha"),
        (ICAEConfig, {"beginnings": 100_000}, "beginnings must be at most 8"),
        (ICAEConfig, {"segment_length": 2}, "segment_length"),
    ],
)
def test_a_setting_that_cannot_be_is_named(config, settings, part):
    with pytest.raises(ICAEError) as error:
        config.from_dict(settings)
    one_line(error.value, part)


def test_settings_come_in_their_types_however_yaml_read_them():
    made = TrainConfig.from_dict({"learning_rate": "1e-3", "steps": 5.0, "bf16": "true", "held_out": None, "rate_factors": [[0, 1]]})
    assert (made.learning_rate, made.steps, made.bf16, made.held_out, made.rate_factors) == (1e-3, 5, True, None, [[0, 1.0]])
    assert type(made.steps) is int and TrainConfig.from_dict(made.to_dict()) == made


def test_settings_of_fine_tuning_are_named_where_pretraining_does_not_read_them():
    settings = {"prompts": 4, "replay": "books", "pretrain_share": 0.1, "learning_rate": 1.0}
    assert TrainConfig(**settings).unread() == ["prompts", "pretrain_share", "replay"]
    assert TrainConfig(objective="instruct", **settings).unread() == [] == TrainConfig().unread()
