"""Dirty layers against byte arrays, for any writes, truncates and freezes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from novafs import dirty
from novafs.dirty import Layer

CHUNK = 64
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 400), st.integers(1, 150)),
        st.tuples(st.just("truncate"), st.integers(0, 500), st.just(0)),
        st.tuples(st.just("freeze"), st.just(0), st.just(0)),
        st.tuples(st.just("absorb"), st.just(0), st.just(0)),
    ),
    max_size=25,
)


@settings(max_examples=300, deadline=None)
@given(STEPS, st.integers(0, 600))
def test_layers_read_like_the_bytes_that_were_written(steps: list[tuple[str, int, int]], base_size: int) -> None:
    base = bytes((i * 7) % 251 + 1 for i in range(base_size))
    model = bytearray(base)
    layers = [Layer()]
    taken = 0
    for number, (kind, offset, length) in enumerate(steps):
        if kind == "write":
            data = bytes([number % 250 + 1]) * length
            taken += layers[-1].write(CHUNK, offset, data)
            model.extend(bytes(max(0, offset - len(model))))
            model[offset : offset + length] = data
        elif kind == "truncate":
            if offset < len(model):
                taken -= layers[-1].truncate(CHUNK, offset)
            del model[offset:]
            model.extend(bytes(offset - len(model)))
        elif kind == "freeze":
            layers.append(Layer())
        else:  # the frozen ones become one, as after a commit that failed
            for layer in layers[1:-1]:
                taken -= layers[0].absorb(CHUNK, layer)
            del layers[1:-1]
        assert taken == sum(len(layer.chunks) for layer in layers) * CHUNK
    content = bytearray()
    whole = dirty.dirty_indexes(layers, CHUNK)
    for index in range((len(model) + CHUNK - 1) // CHUNK):
        found = dirty.overlay(layers, CHUNK, index)
        plain = base[index * CHUNK : (index + 1) * CHUNK].ljust(CHUNK, b"\0")
        if found is None:
            content += plain
            continue
        needs_base = not dirty.covers(found, 0, CHUNK)
        content += dirty.compose(found, plain if needs_base else None, 0, CHUNK)
        assert bytes(content[-CHUNK:]) == b"".join(bytes(dirty.compose(found, plain, a, a + 16)) for a in range(0, CHUNK, 16))
        floor = min(layer.floor for layer in layers)
        if index * CHUNK < floor:
            assert index in whole  # a commit rewrites every chunk that differs from the base below the floor
    assert content[: len(model)] == model


def test_spans_join_and_stay_sorted() -> None:
    layer = Layer()
    for offset in (48, 0, 16, 32, 8):
        layer.write(CHUNK, offset, b"x" * 8)
    chunk = layer.chunks[0]
    assert chunk.spans == [(0, 24), (32, 40), (48, 56)]
    layer.write(CHUNK, 20, b"y" * 40)
    assert chunk.spans == [(0, 60)]
    layer.write(CHUNK, 60, b"z" * 4)
    assert chunk.whole
