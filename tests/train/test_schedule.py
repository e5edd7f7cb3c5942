import math

import pytest

from fastvlp import config
from fastvlp.data import Stage
from fastvlp.train.schedule import learning_rate, stage_at


def make(**schedule):
    return config.from_dict({"optim": {"lr": 2.0}, "data": {"batch_size": 10}, "schedule": schedule})


def test_warmup_rises_in_equal_steps_to_the_peak():
    c = make(steps=100, warmup=4)
    assert [learning_rate(c, step) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]


def test_cosine_goes_through_its_middle_and_down_to_the_final_rate():
    c = make(steps=104, warmup=4, final_lr=0.1)
    assert learning_rate(c, 54) == pytest.approx(2 * 0.55)
    assert learning_rate(c, 104) == pytest.approx(0.2)
    rates = [learning_rate(c, step) for step in range(4, 105)]
    assert rates == sorted(rates, reverse=True)
    assert learning_rate(c, 29) == pytest.approx(2 * (0.1 + 0.9 * math.cos(math.pi / 8) ** 2))


def test_samples_are_rounded_up_to_whole_batches():
    assert make(samples=101).steps == 11
    assert make(samples=100).steps == 10
    assert make(steps=7).steps == 7


def test_stages_follow_the_fractions_of_all_steps():
    stages = [{"until": 0.25, "image_size": 32, "keep": 0.5}, {"until": 0.8, "image_size": 48}, {"image_size": 64, "augment": 1}]
    c = make(steps=20, stages=stages)
    sizes = [stage_at(c, step).image_size for step in range(20)]
    assert sizes == [32] * 5 + [48] * 11 + [64] * 4
    assert stage_at(c, 0) == Stage(32, 0.5, 0.0)
    assert stage_at(c, 25) == Stage(64, 1.0, 1.0)  # evaluation after the end belongs to the last stage
