"""Fields against loops over samples made by hand."""

import itertools
import json
import pickle
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from records import MASK, MODEL, RECORDS, TOKENIZER, WORDS, bound, places, record, segments
from tar_files import encoded, picture, small_tokenizer
from tokenizers import processors

from fastvlp import config
from fastvlp.data import Caption, Frames, Image, Label, Other, Pages, Regions, Source, Stage, Vector, load_tokenizer, pack_images
from fastvlp.data.batch import take_samples
from fastvlp.data.fields import Field, bind
from fastvlp.data.images import augment, augmentations, fit
from fastvlp.data.tokenizer import Tokenizer
from fastvlp.systems import clip


@pytest.mark.parametrize("field", [
    Image(augment=0.7), Image(views=3, augment=1.0, keep=0.5), Caption(), Caption(pick=3, mask=0.4, mask_id=MASK, shear=4),
    Other(Caption(pick=2)), Other(Image()), Frames(3, keep=0.5, augment=1.0), Pages(augment=1.0), Regions(augment=1.0), Vector("v"),
    Label("n"),
], ids=repr)
def test_a_field_is_a_function_of_each_sample_and_its_word(field):
    """Whole, one by one, in another order, and in another process: the same."""
    field = bound(field)
    records = [record(n, other=record(n + 100), values={"v": [n, 0.5], "n": n, "boxes": [[0.1, 0.2, 0.9, 0.8]] * (n % 3)})
               for n in range(40)]
    records[0].moving = [picture(n, (16, 24)) for n in range(5)]
    whole = field(records, WORDS, Stage())
    again = pickle.loads(pickle.dumps(field))
    for row in (39, 0, 17):
        field.check(records[row], Stage())
        part, mine = again([records[row]], WORDS[row:row + 1], Stage()), take_samples(whole, torch.tensor([row]), len(records))
        if isinstance(whole, torch.Tensor):
            assert torch.equal(part, mine)
        else:
            assert torch.equal(part.x, mine.x) and torch.equal(part.lengths, mine.lengths)
            assert whole.pos is None or torch.equal(part.pos, mine.pos)


def test_where_an_image_gets_its_settings():
    stage = Stage(image_size=32, keep=0.5, augment=2.0)
    assert bound(Image()).at(Stage()) == (24, 8, 1.0, 0.0)
    assert bound(Image()).at(stage) == (32, 8, 0.5, 2.0)
    assert bound(Image(size=40, patch=4, keep=1.0, augment=0.0)).at(stage) == (40, 4, 1.0, 0.0)
    assert Image(size=40, patch=4).bind(None, None).at(Stage()) == (40, 4, 1.0, 0.0)


def test_image_is_the_fitted_picture_in_patches():
    packed = bound(Image())(RECORDS, WORDS, Stage())
    expected = pack_images([torch.tensor(fit(record.pil, 24, 8)) for record in RECORDS], 8)
    assert torch.equal(packed.x, expected.x) and torch.equal(packed.pos, expected.pos) and torch.equal(packed.lengths, expected.lengths)


def test_kept_patches_show_the_same_augmented_picture():
    stage = Stage(augment=1.0)
    full, kept = bound(Image())(RECORDS, WORDS, stage), bound(Image(keep=0.4))(RECORDS, WORDS, stage)
    place, colour = augmentations(WORDS, 1.0)
    expected = pack_images([torch.tensor(augment(fit(r.pil, 24, 8), *each)) for r, *each in zip(RECORDS, place, colour, strict=True)], 8)
    assert torch.equal(full.x, expected.x)
    for patches, all_places, some, where in zip(full.segments(), places(full), kept.segments(), places(kept), strict=True):
        assert len(some) == max(1, int(len(patches) * 0.4 + 0.5)) and where == sorted(set(where))
        assert all(torch.equal(patch, patches[all_places.index(place)]) for patch, place in zip(some, where, strict=True))


def test_views_differ_and_stay_with_their_sample():
    views = bound(Image(views=2, augment=1.0))(RECORDS, WORDS, Stage())
    plain = bound(Image(views=2))(RECORDS, WORDS, Stage())
    assert len(views) == 80 and views.lengths.tolist() == plain.lengths.tolist()
    first, second = views.take(range(0, 80, 2)).segments(), views.take(range(1, 80, 2)).segments()
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(plain.take(range(0, 80, 2)).x, bound(Image())(RECORDS, WORDS, Stage()).x)
    half = bound(Image(views=2, keep=0.5))(RECORDS, WORDS, Stage())
    assert sum(a != b for a, b in zip(places(half)[::2], places(half)[1::2], strict=True)) > 20  # each view keeps its own patches


def test_captions_are_drawn_evenly():
    records = [record(3)] * 4000
    words = np.random.default_rng(1).integers(0, 2**64, 4000, dtype=np.uint64)
    texts = bound(Caption()).texts(records, words)
    counts = [texts.count(caption) for caption in records[0].captions]
    assert sum(counts) == 4000 and all(abs(count - 1000) < 5 * (4000 * 3 / 16) ** 0.5 for count in counts)  # five standard deviations
    pairs = bound(Caption(pick=2)).texts(records, words)
    assert set(zip(pairs[::2], pairs[1::2], strict=True)) == set(itertools.permutations(records[0].captions, 2))


def test_captions_are_not_drawn_twice_while_there_are_enough():
    texts = bound(Caption(pick=3)).texts(RECORDS, WORDS)
    one = bound(Caption()).texts(RECORDS, WORDS)
    for sample, first, at in zip(RECORDS, one, range(0, 120, 3), strict=True):
        chosen = texts[at:at + 3]
        assert set(chosen) <= set(sample.captions) and chosen[0] == first  # what a field with one caption shows
        assert len(set(chosen)) == min(3, len(sample.captions))
    assert bound(Caption(max_captions=1)).texts(RECORDS, WORDS) == [sample.captions[0] for sample in RECORDS]


def test_caption_tokens():
    packed = bound(Caption())(RECORDS, WORDS, Stage())
    assert segments(packed) == [TOKENIZER.encode(text, 12) for text in bound(Caption()).texts(RECORDS, WORDS)]
    assert packed.x.dtype == torch.int64 and packed.pos[:, 0].max() == 11 and (packed.pos[:, 1:] == -1).all()
    assert bound(Caption(length=5))(RECORDS, WORDS, Stage()).lengths.tolist() == [5] * 40


def _owners(tokenizer, tokens):
    """The number of the word of each token: a word begins with a space (ours) or ends with </w> (CLIP's)."""
    pieces = [tokenizer.core.id_to_token(token) for token in tokens]
    if tokenizer is TOKENIZER:
        return [sum(piece.startswith("Ġ") for piece in pieces[:i + 1]) for i in range(len(pieces))]
    return [sum(piece.endswith("</w>") for piece in pieces[:i]) for i in range(len(pieces))]


@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("name", ["small", "clip"])
def test_masking_hides_whole_words(share, name):
    tokenizer = TOKENIZER if name == "small" else load_tokenizer("clip")
    records = [record(0, ("a hippopotamus",)), record(1, ("photographing kaleidoscopes twice",)), record(2, ("red",)), *RECORDS]
    words = np.random.default_rng(2).integers(0, 2**64, len(records), dtype=np.uint64)
    plain, masked = (Caption(14, mask=mask, mask_id=60000).bind(None, tokenizer)(records, words, Stage()) for mask in (0.0, share))
    split = 0
    for whole, hidden in zip(segments(plain), segments(masked), strict=True):
        changed = [i for i, (a, b) in enumerate(zip(whole, hidden, strict=True)) if a != b]
        assert all(hidden[i] == 60000 for i in changed) and whole[0] == hidden[0] and whole[-1] == hidden[-1]
        owners = _owners(tokenizer, whole[1:-1])
        chosen = {owners[i - 1] for i in changed}
        assert len(chosen) == max(1, int(len(set(owners)) * share + 0.5))
        assert changed == [i for i, owner in enumerate(owners, 1) if owner in chosen]
        split += len(changed) > len(chosen)
    assert split > 0  # some hidden word had several tokens


def test_every_word_is_hidden_as_often():
    records = [record(0, ("red green blue dog",))] * 4000
    words = np.random.default_rng(3).integers(0, 2**64, 4000, dtype=np.uint64)
    masked = bound(Caption(mask=0.25, mask_id=MASK))(records, words, Stage())
    word_of = TOKENIZER.core.encode("red green blue dog", add_special_tokens=False).word_ids
    hidden = (masked.x.view(4000, -1)[:, 1:-1] == MASK).sum(0).tolist()
    assert all(abs(count - 1000) < 5 * (4000 * 3 / 16) ** 0.5 for count in hidden) and max(word_of) == 3


def test_shearing_keeps_a_stretch_of_words():
    full, sheared = (bound(Caption(shear=shear)).texts(RECORDS, WORDS) for shear in (None, 3))
    starts = set()
    for text, part in zip(full, sheared, strict=True):
        words = text.split()
        found = [at for at in range(len(words) - 2) if words[at:at + 3] == part.split()]
        assert found
        starts.add(found[0])
    assert starts == set(range(7))
    assert bound(Caption(shear=50)).texts(RECORDS, WORDS) == full


def test_other_shows_another_sample():
    other = bound(Other(Caption(max_captions=1)))
    assert segments(other(RECORDS, WORDS, Stage())) == [TOKENIZER.encode(record.other.captions[0], 12) for record in RECORDS]


def test_captions_of_a_tokenizer_without_ends_get_some():
    core = small_tokenizer().core
    core.post_processor = processors.Sequence([])
    tokenizer, text = Tokenizer(core), "red circle tree dog red circle tree dog"
    assert not tokenizer.start and not tokenizer.end
    model = SimpleNamespace(text=SimpleNamespace(context_length=6, vocab_size=MASK + 3))
    plain = Caption(4).bind(model, tokenizer).prepare([text, "dog"])
    whole = Caption(ends=(MASK + 1, MASK + 2)).bind(model, tokenizer).prepare([text, "dog"])
    assert segments(whole) == [[MASK + 1, *ids, MASK + 2] for ids in segments(plain)]
    hidden = Caption(ends=(MASK + 1, MASK + 2), mask=1.0, mask_id=MASK).bind(model, tokenizer)(RECORDS[:3], WORDS[:3], Stage())
    assert all(ids == [MASK + 1, *[MASK] * (len(ids) - 2), MASK + 2] for ids in segments(hidden))
    with pytest.raises(ValueError, match="leave ends out where the tokenizer has its own"):
        Caption(ends=(1, 2)).bind(model, TOKENIZER)
    with pytest.raises(ValueError, match=rf"ends \+ 1 is {MASK + 4} and the part 'text' was made for {MASK + 3}"):
        Caption(ends=(1, MASK + 3)).bind(model, tokenizer)


def test_preparing_what_someone_has_in_hand(tmp_path):
    pil = picture(3, (40, 30))
    (tmp_path / "x.png").write_bytes(encoded(pil))
    array = np.asarray(pil)
    raw = [pil, array, torch.tensor(array), torch.tensor(array).permute(2, 0, 1) / 255, tmp_path / "x.png", str(tmp_path / "x.png")]
    packed = bound(Image(keep=0.3, augment=2.0, views=4)).prepare(raw)
    expected = pack_images([torch.tensor(fit(pil, 24, 8))], 8)
    assert all(torch.equal(x, expected.x) for x in packed.segments()) and len(packed) == 6
    assert segments(bound(Caption(shear=1, mask=1.0, mask_id=MASK)).prepare(["a red dog", ""])) == [TOKENIZER.encode("a red dog", 12),
                                                                                                 TOKENIZER.encode("", 12)]
    assert bound(Caption()).prepare([]).total == 0 and bound(Image()).prepare([]).total == 0
    with pytest.raises(TypeError, match="pass a list of strings"):
        bound(Caption()).prepare("a red dog")


@pytest.mark.parametrize(("fields", "message"), [
    ({"image": Image(part="eye")},
     r"stream 'image': Image: patch is open and the system has no part 'eye' \(it has 0, 1\); give patch= or part="),
    ({"image": Image(part="0")}, "Image: patch is open and the part '0' has no patch_size; give patch="),
    ({"text": Caption(part="0.text", length=9)}, "Caption: the recipe has no tokenizer"),
    ({"ids": Image(8, 8)}, "a stream cannot be called 'ids'"),
    ({"take": Image(8, 8)}, "a stream cannot be called 'take'"),
    ({"my text": Image(8, 8)}, "a stream cannot be called 'my text'"),
])
def test_what_the_system_lacks_is_refused_by_name(fields, message):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=message):
        bind(fields, model, None)


@pytest.mark.parametrize(("field", "message"), [
    (Caption(mask=0.2), f"mask is 0.2 without a mask_id; give an id that captions do not use .*0 to {MASK - 1}"),
    (Caption(mask=0.2, mask_id=MASK + 1), f"mask_id \\+ 1 is {MASK + 2} and the part 'text' was made for {MASK + 1}"),
    (Caption(length=13), "length is 13 and the part 'text' was made for 12"),
    (Caption(part="x"), "length is open and the system has no part 'x'"),
])
def test_captions_that_do_not_fit_the_part(field, message):
    with pytest.raises(ValueError, match=message):
        bind({"text": field}, MODEL, TOKENIZER)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Image(views=0), "views is 0"), (lambda: Image(patch=0), "patch is 0"), (lambda: Image(keep=0), "keep is 0"),
    (lambda: Image(augment=-1), "augment is -1"), (lambda: Image(size=0), "image_size is 0"), (lambda: Caption(pick=0), "pick is 0"),
    (lambda: Caption(pick="all"), "pick is 'all'"), (lambda: Caption(mask=2), "mask is 2"), (lambda: Caption(shear=0), "shear 0"),
    (lambda: Image()([], np.zeros(0), Stage()), "bind the field to a system"), (lambda: Caption().prepare(["a"]), "bind the field"),
])
def test_settings_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_field_of_ones_own():
    class Lengths(Field):
        def __call__(self, samples, words, stage):
            return torch.tensor([len(sample.captions) for sample in samples])

    assert bind({"n": Lengths()}, None, None)["n"](RECORDS[:4], WORDS[:4], Stage()).tolist() == [1, 2, 3, 4]
    with pytest.raises(NotImplementedError, match="Lengths reads samples"):
        Lengths().prepare([])


def test_a_recipe_with_any_field_is_written_and_read_back():
    fields = {"clip": Frames(4, stride=2), "other": Other(Image(keep=0.5)), "vector": Vector("x", 3), "label": Label(names=("a", "b")),
              "boxes": Regions(), "page": Pages(), "text": Caption(pick=2, mask=0.2, mask_id=7)}
    made = clip.recipe()
    made = replace(made, data=replace(made.data, train=(Source("mini:train", 2.0, fields), Source("mini:train")), fields=fields))
    back = config.from_dict(json.loads(json.dumps(config.to_dict(made))))
    assert back.data == made.data
