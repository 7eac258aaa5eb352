"""The streams of latents: what a seed gives, whoever used the generator before."""

from __future__ import annotations

import numpy as np
from carso.choices import MAX_SEED
from carso.inference import latents
from carso.inference.latents import Stream, Streams
from hypothesis import given
from hypothesis import strategies as st

LATENT = 5
SEEDS = st.integers(0, MAX_SEED)


def by_definition(seed: int, count: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=seed)).standard_normal((count, LATENT), dtype=np.float32)


def drawn(stream: Stream, count: int) -> np.ndarray:
    found = np.empty((count, LATENT), np.float32)
    stream.draw(found)
    return found


@given(seed=SEEDS, parts=st.lists(st.integers(0, 9), max_size=4))
def test_a_stream_gives_the_same_latents_in_parts_as_at_once(seed, parts):
    stream = Stream(seed)
    found = [drawn(stream, part) for part in parts]
    np.testing.assert_array_equal(np.concatenate([by_definition(seed, 0), *found]), by_definition(seed, sum(parts)))


@given(seeds=st.lists(st.tuples(SEEDS, st.integers(0, 9)), min_size=1, max_size=6))
def test_a_stream_that_was_taken_back_begins_with_the_first_latent_of_its_next_seed(seeds):
    streams = Streams()
    for seed, used in seeds:
        stream = streams.begin(seed)
        np.testing.assert_array_equal(drawn(stream, used), by_definition(seed, used))
        streams.end(stream)


def test_elections_at_the_same_time_have_streams_of_their_own():
    streams = Streams()
    streams.end(streams.begin(9))
    open_ = [streams.begin(seed) for seed in range(3)]
    found = [np.concatenate([drawn(stream, 2), drawn(stream, 1)]) for stream in open_]
    np.testing.assert_array_equal(found, [by_definition(seed, 3) for seed in range(3)])


def test_no_more_streams_are_kept_than_one_round_may_need(monkeypatch):
    monkeypatch.setattr(latents, "KEPT", 2)
    streams = Streams()
    ended = [streams.begin(seed) for seed in range(3)]
    for stream in ended:
        streams.end(stream)
    assert [streams.begin(0) in ended for _ in range(3)] == [True, True, False]
