from __future__ import annotations

import copy
import inspect
import pickle

import pytest
from torch import nn

from cbm_lightning.configurable import Part, build, plain
from cbm_lightning.heads import LinearHead, PassThroughHead, ResidualHead


class Outer(Part):
    def __init__(self, inner: Part, sizes: tuple[int, ...] = (1, 2), *, flag: bool = False) -> None:
        super().__init__()
        self.inner = inner


class Loose(Part):
    def __init__(self, a: int, **options: int) -> None:
        super().__init__()


def test_nested_parts_are_recorded_with_defaults_and_rebuilt() -> None:
    spec = Outer(ResidualHead(LinearHead(bias=False)), flag=True).spec()
    head = spec["init_args"]["inner"]
    assert head["class_path"] == "cbm_lightning.heads.residual.ResidualHead"
    assert head["init_args"]["head"]["init_args"] == {"bias": False}
    assert spec["init_args"]["sizes"] == [1, 2]
    again = build(spec)
    assert isinstance(again, Outer)
    assert again.spec() == spec
    assert again.inner.head.bias is False


def test_keyword_options_are_recorded_flat() -> None:
    assert Loose(1, b=2).spec()["init_args"] == {"a": 1, "b": 2}


def test_copies_and_pickles_keep_the_record() -> None:
    part = ResidualHead(LinearHead(False))
    for other in (copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
        assert other.spec() == part.spec()


def test_the_signature_stays_visible() -> None:
    assert list(inspect.signature(Outer).parameters) == ["inner", "sizes", "flag"]
    with pytest.raises(TypeError, match=r"Outer: .*unexpected keyword argument 'colour'.*it takes \(inner"):
        Outer(LinearHead(), colour="red")


def test_a_part_without_arguments_can_be_made_again() -> None:
    class Bare(Part):
        pass

    assert Bare().spec()["init_args"] == {}
    assert PassThroughHead().spec()["init_args"] == {}
    assert type(build(PassThroughHead().spec())) is PassThroughHead


def test_what_has_no_plain_form_is_named() -> None:
    with pytest.raises(TypeError, match="Linear cannot be written into a checkpoint"):
        plain({"layer": nn.Linear(1, 1)})


def test_a_checkpoint_cannot_name_foreign_code() -> None:
    for path in ("os.system", "subprocess.Popen", "nowhere.Thing", "cbm_lightning.concepts.ConceptSet"):
        with pytest.raises(ValueError, match=r"no class|not a part"):
            build({"class_path": path, "init_args": {}})
