import math

import pytest

from fastvlp import config
from fastvlp.data import Stage
from fastvlp.train.schedule import learning_rate, stage_at
from tests.train.conftest import recipe_of


def make(**schedule):
    return recipe_of({"optim": {"lr": 2.0}, "data": {"batch_size": 10}, "schedule": {"warmup": 0, "stages": [{}], **schedule}})


def rates(recipe):
    return [learning_rate(recipe, step) for step in range(recipe.steps)]


def test_warmup_rises_in_equal_steps_to_the_peak():
    for shape in ("cosine", "wsd", "infinite"):
        assert rates(make(steps=100, warmup=4, shape=shape))[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]


def test_cosine_goes_through_its_middle_and_down_to_the_final_rate():
    c = make(steps=104, warmup=4, final_lr=0.1)
    assert learning_rate(c, 54) == pytest.approx(2 * 0.55)
    assert learning_rate(c, 104) == pytest.approx(0.2)
    assert rates(c)[4:] == sorted(rates(c)[4:], reverse=True)
    assert learning_rate(c, 29) == pytest.approx(2 * (0.1 + 0.9 * math.cos(math.pi / 8) ** 2))


def test_wsd_stays_and_falls_linearly_over_the_last_fifth():
    c = make(steps=100, warmup=10, shape="wsd", final_lr=0.5)
    found = rates(c)
    assert found[10:81] == [2.0] * 71  # the fall begins at step 80
    assert found[81:] == pytest.approx([2 * (0.5 + 0.5 * (100 - step) / 20) for step in range(81, 100)])
    assert learning_rate(c, 100) == pytest.approx(1.0)
    assert rates(make(steps=10, shape="wsd", cooldown=1.0)) == pytest.approx([2 - 0.2 * step for step in range(10)])


def test_infinite_falls_to_its_constant_stays_and_cools_down():
    c = make(steps=120, warmup=20, shape="infinite", constant_lr=0.25, cooldown=0.1)
    found = rates(c)
    assert found[20:46] == pytest.approx([2 * (0.25 + 0.75 * (1 + math.cos(math.pi * k / 25)) / 2) for k in range(26)])
    assert found[45:109] == pytest.approx([0.5] * 64)
    assert found[109:] == pytest.approx([0.5 * (120 - step) / 12 for step in range(109, 120)])


def test_a_longer_run_repeats_the_beginning_of_a_shorter_one_until_it_cools_down():
    """What "infinite" and "wsd" are for: a checkpoint from before the fall goes on as if the run had been longer from the start."""
    short, long = (make(steps=steps, warmup=5, shape="wsd", cooldown=10 / steps) for steps in (50, 200))
    assert rates(short)[:41] == rates(long)[:41]


def test_each_stage_but_the_first_rises_again():
    stages = [{"until": 0.25}, {"until": 0.5}, {}]
    plain, again = (rates(make(steps=40, shape="wsd", cooldown=0.1, stages=stages, rewarm=rewarm)) for rewarm in (0, 4))
    assert again[:10] == plain[:10] == [2.0] * 10
    for begin in (10, 20):
        assert again[begin:begin + 5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert again[24:] == plain[24:]


def test_samples_are_rounded_up_to_whole_batches():
    assert make(steps=None, samples=101).steps == 11
    assert make(steps=None, samples=100).steps == 10
    assert make(steps=7).steps == 7


def test_stages_follow_the_fractions_of_all_steps():
    stages = [{"until": 0.25, "image_size": 32, "keep": 0.5}, {"until": 0.8, "image_size": 48}, {"image_size": 64, "augment": 1}]
    c = make(steps=20, stages=stages)
    assert [stage_at(c, step).image_size for step in range(20)] == [32] * 5 + [48] * 11 + [64] * 4
    assert stage_at(c, 0) == Stage(0.25, 32, 0.5)
    assert stage_at(c, 25) == Stage(1.0, 64, augment=1.0)  # evaluation after the end belongs to the last stage


@pytest.mark.parametrize("change, message", [
    ("schedule.shape=linear", r"schedule.shape is 'linear'; allowed: cosine, wsd, infinite"),
    ("schedule.cooldown=0", r"cooldown is 0.0"), ("schedule.constant_lr=2", r"constant_lr is 2.0"), ("schedule.rewarm=-1", r"rewarm is -1"),
    ("schedule.final_lr=-0.1", r"final_lr is -0.1"),
])
def test_what_is_no_schedule(change, message):
    with pytest.raises(config.ConfigError, match=message):
        config.load("clip", [change])
