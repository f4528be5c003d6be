"""Draws of the mixture: counts by weight, epochs, limits, schedules, however far the run is."""

import itertools
import time

import numpy as np
import pytest

from unihetero_jax.data.schedule import Member, MixtureSchedule, epoch_records


def make_schedule(members, seed=0, window=64, planned=0):
    return MixtureSchedule({name: Member(**fields) for name, fields in members.items()}, seed, window, planned)


def drawn(schedule, windows):
    """(record, epoch) pairs of every source in the order drawn, by name."""
    by_name = {name: [] for name in schedule.names}
    for window in windows:
        for source, record, epoch in zip(*schedule.window(window), strict=True):
            by_name[schedule.names[source]].append((int(record), int(epoch)))
    return by_name


def test_counts_follow_weights_at_every_window_end():
    schedule = make_schedule(
        {"x": {"size": 50, "weight": 7.0}, "y": {"size": 9, "weight": 2.0}, "z": {"size": 400, "weight": 1e-4}}
    )
    shares = np.asarray([7.0, 2.0, 1e-4]) / 9.0001
    had = np.zeros(3, np.int64)
    for window in range(2000):
        sources, _, _ = schedule.window(window)
        had += np.bincount(sources, minlength=3)
        assert np.abs(had - shares * 64 * (window + 1)).max() < 1
        assert abs(len(sources) - 64) < 3
    assert had[2] == 1


def test_counts_follow_a_schedule_of_weights():
    """Generation first, then understanding: the integral is checked against a sum over small steps."""
    members = {
        "generation": {"size": 1000, "weight": 1.0, "weight_schedule": ((0.0, 1.0), (0.25, 1.0), (0.5, 0.1))},
        "understanding": {"size": 1000, "weight": 1.0, "weight_schedule": ((0.25, 0.0), (0.5, 1.0))},
        "text": {"size": 1000, "weight": 0.2},
    }
    planned, window = 8000, 100
    schedule = make_schedule(members, window=window, planned=planned)

    def shares(progress):
        weights = np.asarray(
            [np.interp(progress, (0.25, 0.5), (1.0, 0.1)), np.interp(progress, (0.25, 0.5), (0.0, 1.0)), 0.2]
        )
        return weights / weights.sum()

    steps = 20
    expected = np.zeros(3)
    had = np.zeros(3, np.int64)
    for number in range(120):  # beyond the plan the last shares hold
        sources, _, _ = schedule.window(number)
        had += np.bincount(sources, minlength=3)
        for step in range(window * steps):
            expected += shares((number * window + (step + 0.5) / steps) / planned) / steps
        assert np.abs(had - expected).max() < 1.01
    assert had[1] > 4000 and (schedule.counts(2000) - [1666, 0, 333]).max() <= 1


@pytest.mark.parametrize("last", [1.0, 1.001, 1.02, 9.0, 0.0])
def test_the_integral_is_that_of_the_weights_over_their_sum(last):
    """On both sides of where the closed form gives way to its series."""
    members = {
        "a": {"size": 10**9, "weight": 1.0},
        "b": {"size": 10**9, "weight": 1.0, "weight_schedule": ((0.0, 1.0), (1.0, last))},
    }
    planned = 10**8
    schedule = make_schedule(members, window=1000, planned=planned)
    progress = (np.arange(200_000) + 0.5) / 200_000
    share = 1 / (2 + (last - 1) * progress)
    for until in (0.1, 0.5, 1.0):
        expected = share[progress < until].mean() * until * planned
        found = schedule.integral(until * planned)
        assert found[0] == pytest.approx(expected, abs=0.1) and found.sum() == pytest.approx(until * planned, abs=1e-3)


def test_every_record_once_per_epoch():
    sizes = {"a": 2500, "b": 7}
    schedule = make_schedule({name: {"size": size, "weight": 1.0} for name, size in sizes.items()})
    for name, pairs in drawn(schedule, range(235)).items():
        size = sizes[name]
        for start in range(0, len(pairs) - size + 1, size):
            records, epochs = zip(*pairs[start : start + size], strict=True)
            assert sorted(records) == list(range(size))
            assert set(epochs) == {start // size}
    first, second = (epoch_records(0, "a", 2500, epoch, 0, 2500) for epoch in (0, 1))
    assert (first != second).mean() > 0.9 and (first != np.arange(2500)).mean() > 0.9


def test_an_epoch_is_the_same_however_it_is_cut():
    for size in (1, 1023, 1024, 1025, 5000):
        whole = epoch_records(3, "a", size, 2, 0, size)
        for cuts in ([0, size], [0, 1, size], sorted({0, size // 3, size // 2, size})):
            parts = [epoch_records(3, "a", size, 2, start, stop) for start, stop in itertools.pairwise(cuts)]
            np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_order_is_keyed_by_name_and_seed_alone():
    def order(schedule, name):
        return drawn(schedule, range(100))[name][:1000]

    alone = make_schedule({"a": {"size": 3000, "weight": 1.0}})
    both = make_schedule({"new": {"size": 50, "weight": 1.0}, "a": {"size": 3000, "weight": 4.0}})
    twin = make_schedule({"b": {"size": 3000, "weight": 1.0}})
    assert order(alone, "a") == order(both, "a")
    assert order(alone, "a") != order(twin, "b")
    assert order(alone, "a") != order(make_schedule({"a": {"size": 3000, "weight": 1.0}}, seed=1), "a")


def test_reads_stay_in_blocks():
    numbers = epoch_records(0, "a", 100_000, 0, 0, 10 * 1024)
    assert all(len(set((numbers[i : i + 1024] // 1024).tolist())) <= 2 for i in range(0, len(numbers), 1024))


def test_a_source_stops_at_its_limit():
    members = {"short": {"size": 10, "weight": 1.0, "max_epochs": 2.5}, "long": {"size": 10_000, "weight": 1.0}}
    schedule = make_schedule(members)
    pairs = drawn(schedule, range(50))
    assert len(pairs["short"]) == 25 and [epoch for _, epoch in pairs["short"]] == [0] * 10 + [1] * 10 + [2] * 5
    assert abs(len(pairs["long"]) - 1600) <= 1  # its own pace does not change
    assert schedule.drawable(1000).tolist() == [name == "long" for name in members]
    members["long"]["max_epochs"] = 1
    schedule = make_schedule(members)
    ends = [number for number in range(400) if not schedule.drawable(number).any()]
    assert ends[0] == 313 and ends == list(range(313, 400))  # 10,000 draws at 32 a window
    assert len(schedule.window(312)[0]) > 0 and len(schedule.window(313)[0]) == 0


def test_a_mixture_goes_on_where_another_left_off():
    before = make_schedule({"a": {"size": 100, "weight": 1.0}, "b": {"size": 1000, "weight": 1.0}})
    had = before.counts(10 * 64)
    after = make_schedule(
        {"a": {"size": 100, "weight": 0.1, "offset": int(had[0])},
         "b": {"size": 1000, "weight": 1.0, "offset": int(had[1])}, "new": {"size": 50, "weight": 0.5}}
    )  # fmt: skip
    joined = drawn(before, range(10))["b"] + drawn(after, range(5))["b"]
    assert len({record for record, _ in joined}) == len(joined) <= 1000
    assert drawn(after, range(5))["new"][0][1] == 0


def test_cost_does_not_depend_on_the_position():
    schedule = make_schedule({"a": {"size": 10**8, "weight": 3.0}, "b": {"size": 999, "weight": 1.0}}, window=2048)

    def best(window):
        times = []
        for attempt in range(3):
            start = time.perf_counter()
            schedule.window(window + attempt)
            times.append(time.perf_counter() - start)
        return min(times)

    near, far = best(1), best(10**6)
    assert far < 4 * near + 0.05


def test_impossible_schedules_are_refused():
    ramp = {"size": 5, "weight": 1.0, "weight_schedule": ((0.0, 0.0), (1.0, 1.0))}
    with pytest.raises(ValueError, match=r"data\.planned_draws must be positive"):
        make_schedule({"a": ramp, "b": {"size": 5, "weight": 1.0}})
    with pytest.raises(ValueError, match="at progress 0 every weight is zero"):
        make_schedule({"a": ramp}, planned=100)
