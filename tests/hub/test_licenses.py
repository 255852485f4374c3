"""The strictest licence, and when it cannot be determined."""

import itertools

import pytest

from hf_fusion.errors import FusionError
from hf_fusion.hub.licenses import combine, forbids_derivatives


def together(*licenses):
    return combine({f"expert-{i}": license_id for i, license_id in enumerate(licenses)})


@pytest.mark.parametrize(
    ("licenses", "expected"),
    [
        (["mit"], "mit"),
        (["MIT", "mit"], "mit"),
        (["mit", "apache-2.0", "cc0-1.0"], "apache-2.0"),
        (["apache-2.0", "gpl-3.0", "lgpl-3.0"], "gpl-3.0"),
        (["gpl-3.0", "agpl-3.0", "bsd-3-clause"], "agpl-3.0"),
        (["cc-by-4.0", "cc-by-sa-4.0"], "cc-by-sa-4.0"),
        (["mit", "cc-by-nc-4.0"], "cc-by-nc-4.0"),
        (["cc-by-nc-4.0", "cc-by-nc-sa-4.0", "apache-2.0"], "cc-by-nc-sa-4.0"),
        (["llama3.1", "apache-2.0"], "llama3.1"),
        (["gpl-2.0", "mit"], "gpl-2.0"),
    ],
)
def test_the_strictest_wins_in_any_order(licenses, expected):
    assert {together(*order) for order in itertools.permutations(licenses)} == {expected}


@pytest.mark.parametrize(
    "licenses",
    [
        ["gpl-2.0", "apache-2.0"],
        ["gpl-2.0", "gpl-3.0"],
        ["gpl-3.0", "cc-by-nc-4.0"],
        ["cc-by-sa-4.0", "cc-by-nc-4.0"],
        ["llama3", "gemma"],
    ],
)
def test_clashes_list_everyone(licenses):
    with pytest.raises(FusionError, match="cannot be combined: expert-0 .*, expert-1 ") as caught:
        together(*licenses)
    assert "--license" in caught.value.hint


def test_unknown_ones_are_listed_alone():
    with pytest.raises(FusionError) as caught:
        combine({"a/fine": "mit", "a/none": None, "a/odd": "my-own-terms", "a/nd": "cc-by-nd-4.0"})
    assert "a/none (none), a/odd (my-own-terms), a/nd (cc-by-nd-4.0)" in caught.value.message
    assert "a/fine" not in caught.value.message
    with pytest.raises(FusionError, match="no experts"):
        combine({})


def test_no_derivatives():
    assert forbids_derivatives("CC-BY-ND-4.0")
    assert not forbids_derivatives("cc-by-nc-4.0")
