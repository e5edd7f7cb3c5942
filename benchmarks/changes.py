"""Changes that would break a promise in silence, each with the test that has to notice: ``python -m benchmarks mutate`` tries them all."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Change:
    """``old``, which stands in ``file`` once, becomes ``new``; ``test`` fails then."""

    about: str
    file: str
    old: str
    new: str
    test: str


_CHECKPOINT, _IMAGES, _TAR = "fastvlp/train/checkpoint.py", "fastvlp/data/images.py", "fastvlp/data/tar.py"
_STATE, _FOLDER, _WORKERS = "fastvlp/train/state.py", "fastvlp/systems/state_folder.py", "fastvlp/data/workers.py"
_SIGMOID, _ATTENTION = "kernels/fastvlp_kernels/pairwise_sigmoid/cpu.py", "kernels/fastvlp_kernels/packed_attention/cpu.py"
_SAVED = "tests/train/test_checkpoint.py"
_SUMMED = "tests/kernels/test_pairwise_sigmoid.py::test_the_gradient_of_the_scale_is_that_of_all_tiles"
_ON_DISK = f"{_SAVED}::test_what_is_named_a_checkpoint_is_on_the_disk"
_STRANGERS = "tests/systems/test_strangers.py"
CHANGES = (
    Change("generators' states are unpickled", _CHECKPOINT, '"cpu", weights_only=True', '"cpu", weights_only=False',
           f"{_SAVED}::test_a_stranger_s_generators_run_nothing"),
    Change("numbers of the optimizer are unpickled", _FOLDER, "(value, weights_only=True)", "(value, weights_only=False)",
           f"{_STRANGERS}::test_values_that_are_no_tensors_run_nothing"),
    Change("descriptions of tensors are unpickled", _FOLDER, "if name not in _NAMES.get(module, ()):", "if False:",
           f"{_STRANGERS}::test_a_description_of_tensors_runs_nothing"),
    Change("nothing is flushed to the disk", _CHECKPOINT, "        os.fsync(descriptor)\n", "        pass\n", _ON_DISK),
    Change("files are not flushed", _CHECKPOINT, 'for path in [*temporary.rglob("*"), temporary]:', "for path in []:", _ON_DISK),
    Change("the name of a checkpoint is not flushed", _CHECKPOINT, "    _flush(final.parent)\n", "    pass\n", _ON_DISK),
    Change("files are flushed after the name is given", _CHECKPOINT, "    temporary.rename(final)\n    _flush(final.parent)\n",
           "    _flush(final.parent)\n    temporary.rename(final)\n", _ON_DISK),
    Change("checkpoints of another past stay", "fastvlp/train/loop.py",
           'checkpoint.set_aside_after(folder / "checkpoints", step if own else -1)', "[]",
           "tests/train/test_run_failures.py::test_what_follows_the_step_that_was_named_is_of_another_past"),
    Change("the scale leaves its bounds", "fastvlp/systems/system.py", "self.log_scale.clamp_(0.0, math.log(self.largest))", "pass",
           "tests/train/test_run.py::test_the_scale_is_brought_back_into_its_bounds_after_each_step"),
    Change("GradScaler forgets its factor", _STATE, 'trainer.scaler.load_state_dict(described["scaler"])', "pass",
           "tests/train/test_saves.py::test_what_a_checkpoint_gives_back"),
    Change("a second Ctrl-C leaves workers", "fastvlp/train/interrupt.py", "        child.kill()\n", "        pass\n",
           "tests/train/test_interrupt.py::test_the_second_one_takes_the_loading_processes_along"),
    Change("files that are no picture go to Pillow", "fastvlp/data/headers.py", '    raise Unusable("not an image")\n',
           "    return Picture(None, data)\n", "tests/data/test_untrusted_images.py::test_only_the_promised_formats_are_decoded"),
    Change("Pillow chooses the decoder", _IMAGES, "formats=(found.format,)", "formats=None",
           "tests/data/test_untrusted_images.py::test_one_decoder_is_asked_for"),
    Change("checksums of tar headers are not compared", _TAR, '!= _octal(header[148:156]):', "!= _octal(header[148:156]) and False:",
           "tests/data/test_untrusted_shards.py::test_the_checksum_of_every_header_is_checked"),
    Change("a pax record without a length is read for ever", _TAR, "max(0, space - at)", "space - at",
           "tests/data/test_untrusted_shards.py::test_sizes_that_lie_break_their_shard_alone"),
    Change("JPEGs are drafted at half the size", _IMAGES, "scale = wanted / max(image.size)", "scale = wanted / 2 / max(image.size)",
           "tests/data/test_untrusted_images.py::test_a_jpeg_is_never_decoded_smaller_than_wanted"),
    Change("saturation is never changed", _IMAGES, "1 / 3 + saturation[:, None, None] * (", "1 / 3 + (",
           "tests/data/test_images.py::test_saturation_changes_by_up_to_its_range"),
    Change("the scale's gradient is of one tile of rows", _SIGMOID, "            dscale += (x_tile * dx_tile).sum()",
           "            dscale = (x_tile * dx_tile).sum()", _SUMMED),
    Change("the scale's gradient is of one tile of columns", _SIGMOID, "for j in range(0, N, TILE))\n    both",
           "for j in range(0, min(N, TILE), TILE))\n    both", _SUMMED),
    Change("attention takes a row of NaN for one without keys", _ATTENTION, "    out, _ = _dense(x, run)\n", "    pass\n",
           "tests/kernels/test_packed_attention.py::test_a_nan_is_passed_on"),
    Change("a sample may be decoded for ever", _WORKERS, "signal.setitimer(signal.ITIMER_PROF, self.seconds)\n        try:", "try:",
           "tests/data/test_workers.py::test_a_sample_that_costs_a_worker_its_life_is_given_up_and_others_take_over"),
)  # fmt: skip
