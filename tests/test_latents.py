"""The streams of latents: what a seed gives, whoever used the generator before."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from carso.choices import MAX_SEED
from carso.inference import latents
from carso.inference.latents import SHARED, Stream, Streams, drawing
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


SIZES = {
    "many small ones": [12] * 100,
    "few large ones": [512, 512, 512],
    "one that has them all": [2000],
    "one large among small ones": [4, 4, 1500, 4],
    "fewer than threads share out": [SHARED - 1],
    "nothing": [],
}


@pytest.mark.parametrize("threads", [2, 5])
@pytest.mark.parametrize("name", SIZES)
def test_a_seeds_latents_do_not_depend_on_how_many_threads_draw_them(threads, name):
    share_out = drawing(threads)
    streams = [Stream(seed) for seed in range(len(SIZES[name]))]
    for round_ in range(2):  # streams go on where they were
        parts = [
            (stream, np.empty((size, LATENT), np.float32)) for stream, size in zip(streams, SIZES[name], strict=True)
        ]
        share_out(parts)
        for seed, (_, found) in enumerate(parts):
            size = len(found)
            np.testing.assert_array_equal(found, by_definition(seed, 2 * size)[round_ * size : (round_ + 1) * size])


def test_a_large_round_is_drawn_by_several_threads_and_a_small_one_by_none_but_its_own():
    drew: set[threading.Thread] = set()

    class Told(Stream):
        def draw(self, out):
            drew.add(threading.current_thread())
            super().draw(out)

    share_out = drawing(3)
    share_out([(Told(seed), np.empty((1, LATENT), np.float32)) for seed in range(3)])
    assert drew == {threading.current_thread()}
    share_out([(Told(seed), np.empty((SHARED, LATENT), np.float32)) for seed in range(3)])
    assert len(drew) > 1


def test_what_goes_wrong_in_a_thread_that_draws_is_raised_where_the_latents_are_wanted():
    class Broken(Stream):
        def draw(self, out):
            raise RuntimeError("broken")

    parts = [(kind(seed), np.empty((SHARED, LATENT), np.float32)) for seed, kind in enumerate((Stream, Broken))]
    with pytest.raises(RuntimeError, match="broken"):
        drawing(2)(parts)
