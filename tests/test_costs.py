"""The cost model against its formulas, written out, and against what must hold whatever they are."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import woodjax as wj

UNIT = wj.Hardware("unit", 1.0, 1.0, 1e18, 1.0, 0.0)  # seconds are flops or bytes
SIZES = st.tuples(
    st.integers(1, 10**9), st.integers(1, 4096), st.sampled_from([(1, 1), (2, 2), (8, 8), (8, 4), (16, 4), (64, 1)])
)


def stages(*arguments, **options):
    return {stage.name: stage for stage in wj.scaling_cost(*arguments, **options).stages}


def test_columns_of_the_whole_network():
    d, m, n, data = 6400, 32, 8, 4
    found = stages(d, m, n, UNIT, data_devices=data, gradient_flops=100.0)
    columns = d / n
    assert found["gradients"].flops == 100 * m / n
    assert found["to owners"].wire_bytes == 4 * (m / data) * (d * data / n) * 3 / 4
    assert found["gram"].wire_bytes == 2 * 4 * m * m * 7 / 8
    assert found["gram"].flops == found["scores"].flops == 1.25 * m * m * columns
    assert found["factor"].flops == 2 * m**3 / 3
    assert found["scores"].wire_bytes == 0
    assert found["update"].wire_bytes == 2 * (4 * m * m + 4 * m) * 7 / 8
    assert found["threshold"].wire_bytes == 65 * 2 * 4 * 7 / 8
    assert found["back"].wire_bytes == 8 * d / n * 3  # from 4 replicas: scores and updates of four bytes
    assert found["back"].memory_bytes > 9 * d * 4 / n


def test_sums_of_blocks():
    d, m, n, data, b = 6400, 32, 8, 4, 16
    found = stages(d, m, n, UNIT, data_devices=data, block_size=b, exchange="sums")
    assert "to owners" not in found
    assert found["gradients"].flops == 6 * d * m / n
    assert found["sums"].flops == 2 * (m / data) * b * b * (d * data / n) / b
    assert found["sums"].wire_bytes == 4 * (d * data / n) * b * 3 / 4
    assert found["factor"].flops == 2 * b**3 * (d / n) / b
    assert found["update"].wire_bytes == 0


def test_gradients_may_travel_in_place_of_sums():
    d, m, n, data, b = 6400, 32, 8, 4, 16
    sums, rows = (stages(d, m, n, UNIT, data_devices=data, block_size=b, exchange=x) for x in ("sums", "gradients"))
    assert rows["to owners"].wire_bytes == 4 * (m / data) * (d * data / n) * 3 / 4
    assert rows["sums"].wire_bytes == 0
    assert rows["sums"].flops == sums["sums"].flops
    assert rows["factor"] == sums["factor"]
    # b numbers a weight against m/D.
    assert sums["sums"].wire_bytes == rows["to owners"].wire_bytes * b / (m / data)


@pytest.mark.parametrize(("m", "chosen"), [(32, "gradients"), (128, "sums")])
def test_the_fewer_travel(m, chosen):
    options = {"data_devices": 4, "block_size": 16}
    assert stages(6400, m, 8, UNIT, **options) == stages(6400, m, 8, UNIT, exchange=chosen, **options)


def test_blocks_of_more_weights_than_rows_go_to_their_owners():
    d, m, n, b = 6400, 8, 4, 16
    found = stages(d, m, n, UNIT, block_size=b)
    assert found["to owners"].wire_bytes == 4 * (m / n) * d * 3 / 4
    assert found["gram"].wire_bytes == 0
    assert found["factor"].flops == (d / n / b) * 2 * m**3 / 3


def test_windows_compute_again_and_send_as_much_every_time():
    d, m, n = 6400, 32, 8
    whole, cut = wj.scaling_cost(d, m, n, UNIT), wj.scaling_cost(d, m, n, UNIT, window=100)
    first, second = ({s.name: s for s in cost.stages} for cost in (whole, cut))
    assert (whole.passes, cut.passes) == (1, 3 * 8 + 2)
    assert second["gradients"].flops == cut.passes * first["gradients"].flops
    assert second["to owners"].wire_bytes == 3 * first["to owners"].wire_bytes
    # Gᵀu of the update is added up over the data.
    assert second["update"].wire_bytes - first["update"].wire_bytes == 4 * d * 7 / 8


@pytest.mark.parametrize("replicas", [1, 2, 8, {1: 6000, 8: 400}])
def test_replicas(replicas):
    cost = wj.scaling_cost(6400, 32, 8, UNIT, replicas=replicas)
    spread = replicas if isinstance(replicas, dict) else {replicas: 6400}
    assert cost.sharding.parameter_bytes == sum(4 * r * x / 8 for r, x in spread.items())
    back = cost.stages[-1]
    assert back.wire_bytes == pytest.approx(sum(8 * x * (r - 1) / 8 for r, x in spread.items()))


@settings(max_examples=50)
@given(sizes=SIZES, block_size=st.sampled_from([None, 4, 64, 5000]), window=st.integers(1, 10**6))
def test_what_holds_for_all_sizes(sizes, block_size, window):
    d, m, (n, data) = sizes
    options = {"data_devices": data, "block_size": block_size}
    cost, cut = (
        wj.scaling_cost(d, m, n, wj.H100_SXM, window=w, **options) for w in (None, None if block_size else window)
    )
    assert cut.passes >= cost.passes == 1
    assert cut.wire_bytes >= 0.999 * cost.wire_bytes  # bytes of a window are rounded down
    assert cut.peak_bytes <= 1.001 * cost.peak_bytes + 1e4
    assert all(math.isfinite(s.seconds) and s.seconds >= 0 and s.memory_bytes >= 0 for s in (*cost.stages, *cut.stages))
    assert cost.seconds >= cost.flops / wj.H100_SXM.flops
    assert cost.peak_bytes >= cost.sharding.parameter_bytes
    if n == 1:
        assert cost.wire_bytes == 0
    else:
        assert cost.wire_bytes > 0
    twice = wj.scaling_cost(2 * d, m, n, wj.H100_SXM, **options)
    assert twice.seconds <= 2.01 * cost.seconds + 1e-6
    assert twice.seconds >= cost.seconds


@settings(max_examples=30)
@given(sizes=SIZES)
def test_the_windows_that_fit_are_the_fewest(sizes):
    d, m, (n, data) = sizes
    options = {"data_devices": data}
    if not wj.scaling_cost(d, m, n, wj.TPU_V5E, window=1, **options).fits:
        with pytest.raises(ValueError, match=r"do not fit 16\.0 GB"):
            wj.fitting_cost(d, m, n, wj.TPU_V5E, **options)
        return
    cost = wj.fitting_cost(d, m, n, wj.TPU_V5E, **options)
    assert cost.fits
    windows = cost.sharding.windows
    if windows == 1:
        assert cost.sharding.window is None
        return
    wider = -(-cost.sharding.columns // (windows - 1))
    assert not wj.scaling_cost(d, m, n, wj.TPU_V5E, window=wider, **options).fits


def test_blocks_that_do_not_fit():
    with pytest.raises(ValueError, match=r"do not fit 16\.0 GB"):
        wj.fitting_cost(10**11, 1024, 8, wj.TPU_V5E, block_size=64)


def test_latency_counts_messages():
    late = UNIT._replace(link_latency=1e6)
    cost, fast = (wj.scaling_cost(6400, 32, 8, hardware) for hardware in (late, UNIT))
    waits = {s.name: (s.seconds - t.seconds) / 1e6 for s, t in zip(cost.stages, fast.stages, strict=True)}
    assert waits["to owners"] == pytest.approx(7)
    assert waits["gram"] == pytest.approx(2 * 3)
    assert waits["threshold"] == pytest.approx(65 * 2 * 3)
    assert waits["back"] == pytest.approx(2 * 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d": 0}, "d is 0"),
        ({"window": 0}, "window is 0"),
        ({"exchange": "masks"}, "exchange is 'masks'"),
        ({"window": 10, "block_size": 8}, "only the whole network"),
        ({"block_size": -1}, "block_size is -1"),
        ({"microbatch_size": 0}, "microbatch_size is 0"),
        ({"data_devices": 3}, "data_devices is 3: pass a divisor of devices, which is 8"),
        ({"replicas": 16}, "replicas is 16"),
        ({"replicas": {1: 5, 8: 6}}, "replicas has 11 parameters, d is 100"),
    ],
)
def test_bad_numbers(change, message):
    arguments = {"d": 100, "m": 4, "devices": 8, "hardware": wj.H100_SXM} | change
    with pytest.raises(ValueError, match=message):
        wj.scaling_cost(**arguments)


def test_a_table_says_what_does_not_fit():
    costs = {"fits": wj.scaling_cost(10**6, 64, 8, wj.TPU_V5E), "does not": wj.scaling_cost(10**9, 64, 8, wj.TPU_V5E)}
    *_, first, second = wj.cost_table(costs).splitlines()
    assert "| yes |" in first
    assert "| no |" in second
    assert second.startswith("| does not | 8 TPU v5e | 8 × 1 | all | 1 |")
