"""The licence of a fused model: the strictest of its experts' licences, if it is compatible with the others.

A rule of thumb from the licence texts, not legal advice; for licences outside of the table, the user has to decide.
"""

from __future__ import annotations

from collections.abc import Mapping

from hf_fusion.errors import FusionError

# works under each may be redistributed under the terms of any later one
_FREE = (
    *("cc0-1.0", "unlicense", "wtfpl", "pddl", "0bsd", "zlib", "isc", "mit", "bsd", "bsd-2-clause", "bsd-3-clause"),
    *("cc-by-3.0", "cc-by-4.0", "apache-2.0"),
)
# model licences with specific terms: compatible with free licences only
_OWN_TERMS = (
    *("openrail", "openrail++", "creativeml-openrail-m", "bigscience-openrail-m", "bigcode-openrail-m", "gemma"),
    *("llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4"),
)
_NO_DERIVATIVES = ("cc-by-nd-3.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0")

# licence -> the licences of works that it can include
_HOLDS: dict[str, frozenset[str]] = {
    **{name: frozenset(_FREE[:index]) for index, name in enumerate(_FREE)},
    **{name: frozenset(_FREE) for name in _OWN_TERMS},
    "mpl-2.0": frozenset(_FREE),
    "lgpl-3.0": frozenset({*_FREE, "mpl-2.0"}),
    "gpl-2.0": frozenset(_FREE) - {"apache-2.0"},
    "gpl-3.0": frozenset({*_FREE, "mpl-2.0", "lgpl-3.0", "cc-by-sa-4.0"}),
    "agpl-3.0": frozenset({*_FREE, "mpl-2.0", "lgpl-3.0", "gpl-3.0"}),
    "cc-by-sa-3.0": frozenset(_FREE),
    "cc-by-sa-4.0": frozenset({*_FREE, "cc-by-sa-3.0"}),
    "cc-by-nc-3.0": frozenset(_FREE),
    "cc-by-nc-4.0": frozenset({*_FREE, "cc-by-nc-3.0"}),
    "cc-by-nc-sa-3.0": frozenset({*_FREE, "cc-by-nc-3.0"}),
    "cc-by-nc-sa-4.0": frozenset({*_FREE, "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-3.0"}),
}


def forbids_derivatives(license_id: str) -> bool:
    """Whether a licence forbids sharing derivatives."""
    return license_id.lower() in _NO_DERIVATIVES


def combine(licenses: Mapping[str, str | None]) -> str:
    """The licence for a fused model.

    Args:
        licenses: expert's name → licence id, or None if its card names none.

    Returns:
        The strictest licence, if it is compatible with all others.

    Raises:
        FusionError: lists the experts whose licences are unknown, forbid derivatives, or are incompatible.
    """
    known = {name: (license_id or "none").lower() for name, license_id in licenses.items()}
    bad = {name: license_id for name, license_id in known.items() if license_id not in _HOLDS}
    if bad or not known:
        raise _undecided("the licence of the model cannot be determined from", bad)
    distinct = set(known.values())
    for license_id in distinct:
        if distinct - {license_id} <= _HOLDS[license_id]:
            return license_id
    raise _undecided("these licences cannot be combined", known)


def _undecided(what: str, licenses: Mapping[str, str]) -> FusionError:
    listed = ", ".join(f"{name} ({license_id})" for name, license_id in licenses.items()) or "no experts"
    return FusionError(f"{what}: {listed}", hint="choose one yourself: --license ID (license=… in Python)")
