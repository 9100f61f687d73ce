"""Which instruction sets a processor runs, on the words that CPUID gave on processors, and with bits taken away."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from slrc.kernels.build import INT8_SETS, TILE_SETS

BITS = {
    "sse3": (0, 0),
    "ssse3": (0, 9),
    "fma": (0, 12),
    "sse4.1": (0, 19),
    "sse4.2": (0, 20),
    "popcnt": (0, 23),
    "avx": (0, 28),
    "f16c": (0, 29),
    "avx2": (1, 5),
    "avx512f": (1, 16),
    "avx512dq": (1, 17),
    "avx512bw": (1, 30),
    "avx512vl": (1, 31),
    "avx512vnni": (2, 11),
    "amx-tile": (3, 24),
    "amx-int8": (3, 25),
    "avxvnni": (4, 4),
}
"""Which of leaf 1's ECX, leaf 7's EBX, ECX, EDX and leaf 7.1's EAX has a feature, and its bit, by Intel's manual."""
OSXSAVE = 1 << 27
SSE, AVX, ZMM, TILES = 0x2, 0x6, 0xE6, 0x600E6
"""What the operating system may save."""

OLD = ("sse3", "ssse3", "sse4.1", "sse4.2", "popcnt")
HASWELL = (*OLD, "avx", "f16c", "fma", "avx2")
SKYLAKE_X = (*HASWELL, "avx512f", "avx512dq", "avx512bw", "avx512vl")
SAPPHIRE_RAPIDS = (*SKYLAKE_X, "avx512vnni", "avxvnni", "amx-tile", "amx-int8")
PROCESSORS = {
    "Ice Lake": ((*SKYLAKE_X, "avx512vnni"), ZMM, {"avx512vnni", "avx512", "avx2"}),
    "Alder Lake": ((*HASWELL, "avxvnni"), AVX, {"avx2vnni", "avx2"}),
    "Sapphire Rapids": (
        SAPPHIRE_RAPIDS,
        TILES,
        {"avx512amx", "avx512vnni", "avx512", "avx2vnni", "avx2"},
    ),
    "Sapphire Rapids whose system does not save matrices": (
        SAPPHIRE_RAPIDS,
        ZMM,
        {"avx512vnni", "avx512", "avx2vnni", "avx2"},
    ),
    "Skylake-X": (SKYLAKE_X, ZMM, {"avx512", "avx2"}),
    "Skylake-X whose system does not save zmm": (
        SKYLAKE_X,
        AVX,
        {"avx2"},
    ),
    "Knights Landing": ((*HASWELL, "avx512f"), ZMM, {"avx2"}),
    "Haswell": (HASWELL, AVX, {"avx2"}),
    "Haswell whose system does not save ymm": (HASWELL, SSE, set()),
    "Piledriver": ((*OLD, "avx", "f16c", "fma"), AVX, set()),
    "AVX2 without FMA": ((*OLD, "avx", "f16c", "avx2"), AVX, set()),
    "Nehalem": (OLD, SSE, set()),
    "unknown": ((), 0, set()),
}


class Processors:
    """The library's answers."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.slrc_needed_feature.restype = ctypes.c_char_p
        self.library.slrc_needed_feature.argtypes = [ctypes.c_char_p, ctypes.c_int64]

    def needs(self, name: str) -> Iterator[str]:
        for index in count():
            feature = self.library.slrc_needed_feature(name.encode(), index)
            if feature is None:
                return
            yield feature.decode()

    def runs(self, name: str, features: set[str], saved: int, other: int = OSXSAVE) -> bool:
        words = [other, 0, 0, 0, 0]
        for word, bit in (BITS[feature] for feature in features):
            words[word] |= 1 << bit
        return bool(self.library.slrc_would_run(name.encode(), *map(ctypes.c_uint32, (*words, saved))))


@pytest.fixture(scope="module")
def processors(library: Path) -> Processors:
    found = Processors(library)
    if not found.runs("portable", set(), 0) or found.runs("avx2", set(), 0) or not any(found.needs("avx2")):
        pytest.skip("a library for another family")
    return found


@pytest.mark.parametrize("name", PROCESSORS)
def test_known_processors(processors: Processors, name: str) -> None:
    features, saved, expected = PROCESSORS[name]
    sets = ("avx512amx", "avx512vnni", "avx512", "avx2vnni", "avx2", "portable", "sse9")
    assert {s for s in sets if processors.runs(s, set(features), saved)} == expected | {"portable"}


@pytest.mark.parametrize("name", ["avx512amx", "avx512vnni", "avx512", "avx2vnni", "avx2"])
def test_every_needed_feature_is_asked_for(processors: Processors, name: str) -> None:
    needs = set(processors.needs(name))
    assert processors.runs(name, needs, TILES)
    for feature in needs:
        assert not processors.runs(name, needs - {feature}, TILES), feature
    assert not processors.runs(name, needs, TILES, other=0)  # the system's registers cannot be asked for


@pytest.mark.parametrize("name", TILE_SETS["x86_64"] | INT8_SETS["x86_64"])
def test_a_set_needs_what_it_is_compiled_with(processors: Processors, name: str) -> None:
    all_flags = (TILE_SETS["x86_64"] | INT8_SETS["x86_64"])[name]
    flags = [flag.removeprefix("-m") for flag in all_flags if flag.startswith("-m")]
    features = {flag for flag in flags if not flag.startswith("prefer-")}
    needs = set(processors.needs(name.lower()))
    assert features <= needs if features else not needs
