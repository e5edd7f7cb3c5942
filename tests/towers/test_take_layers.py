"""A small tower has the weights of the right layers of a large one."""

import pytest
import torch

from fastvlp.systems.bert import Bert
from fastvlp.systems.distilbert import DistilBert
from fastvlp.towers import Text, Vit
from fastvlp.towers.take_layers import take_layers
from tests.towers.plain import TEXT, texts


@pytest.mark.parametrize("few,many,layers", [(3, 6, [0, 2, 4]), (2, 2, [0, 1]), (2, 5, [0, 2])])
def test_layers(few, many, layers):
    small, large = Text(**TEXT | {"depth": few}), Text(**TEXT | {"depth": many})
    take_layers(small, large)
    large.blocks = torch.nn.ModuleList(large.blocks[layer] for layer in layers)
    large.merge = small.merge
    assert torch.equal(small(texts()).x, large(texts()).x)


def test_what_does_not_fit_is_refused():
    for small in (Text(**TEXT | {"depth": 3}), Text(**TEXT | {"width": 16}), Vit(width=32, depth=1, heads=2)):
        with pytest.raises(ValueError, match="alike but for their depth"):
            take_layers(small, Text(**TEXT))


def test_a_student_starts_again_from_a_teacher_that_is_loaded():
    def made():
        return DistilBert(Text(**TEXT | {"depth": 1}), Bert(Text(**TEXT)))

    student, other = made(), made()
    student.load_state_dict({f"teacher.{name}": tensor for name, tensor in other.teacher.state_dict().items()}, strict=False)
    assert torch.equal(student.text(texts()).x, other.text(texts()).x) and torch.equal(student.words.weight, other.teacher.words.weight)
    with torch.no_grad():
        other.text.tokens.weight.add_(1)
    student.load_state_dict(other.state_dict())
    assert torch.equal(student.text.tokens.weight, other.text.tokens.weight), "a whole model is taken as it is"
