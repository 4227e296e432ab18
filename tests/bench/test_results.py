"""Ratios, growth, and the comparison with an earlier result, on numbers that are known."""

import copy

import pytest

from selfemo_jax.bench.agreement import Disagreement, check
from selfemo_jax.bench.contestants import contestants
from selfemo_jax.bench.results import assemble, compare, decode_floor, growth, measured, ratios
from selfemo_jax.bench.settings import BenchSettings
from selfemo_jax.bench.show import plot, show, show_changes
from selfemo_jax.model.flops import matmul_weights

SIDE = {"device": "cpu", "num_devices": 1, "cores": 2, "platform": "cpu", "versions": {"x": "1"}}


def row(
    side: str, label: str, layout: str, seconds: list[float], *, phase="rl_update", point=None, **more
) -> dict:
    return {
        "side": side, "label": label, "layout": layout, "point": point or {}, "base": {"groups": 4},
        "devices": 1, "build_s": 0.1, "first_s": 2.0, "cpu_seconds": [2 * s for s in seconds],
        **measured(phase, seconds, tokens=100, flops=2e9), **more,
    }  # fmt: skip


def result(rows: list[dict], **settings) -> dict:
    return assemble(
        BenchSettings(**settings), rows=rows, sides={"jax": SIDE, "torch": SIDE}, left_out=[], unavailable=[],
        profiles=[], disagreements=[], peak={"flops_per_s": 1e10, "source": "test"}, began="now",
        load={"before": (1.0, 1.0, 1.0), "after": (1.0, 1.0, 1.0)},
    )  # fmt: skip


ROWS = [
    row("jax", "jax separate", "separate", [1.0, 2.0, 1.0]),
    row("jax", "jax shared_prefix", "shared_prefix", [0.5, 0.5, 0.5]),
    row("torch", "torch separate eager", "separate", [2.0, 2.0, 3.0]),
    row("torch", "torch shared_prefix compiled", "shared_prefix", [1.0, 1.5, 1.0]),
]


def test_ratios_are_taken_round_by_round_against_the_same_rows_and_the_fastest():
    found = {(one["ours"], one["theirs"]): one for one in ratios(ROWS)}
    assert set(found) == {
        ("jax separate", "torch separate eager"),
        ("jax separate", "torch shared_prefix compiled"),
        ("jax shared_prefix", "torch shared_prefix compiled"),
    }
    one = found["jax separate", "torch separate eager"]
    assert (one["median"], one["min"], one["max"], one["fastest_torch"]) == (2.0, 1.0, 3.0, False)
    assert one["cpu_median"] == 2.0
    assert found["jax shared_prefix", "torch shared_prefix compiled"]["fastest_torch"]


def test_trl_and_tunix_are_compared_beside_the_fastest():
    rows = [
        row("jax", "jax", "", [1.0, 1.0], phase="rl_step"),
        row("torch", "torch", "", [3.0, 3.0], phase="rl_step"),
        row("trl", "TRL", "", [4.0, 6.0], phase="rl_step"),
        row("tunix", "tunix", "", [8.0, 2.0], phase="rl_step"),
    ]
    assert {one["theirs"]: one["median"] for one in ratios(rows)} == {"torch": 3.0, "TRL": 5.0, "tunix": 5.0}


def test_tunix_is_missed_only_where_its_environment_is_named():
    rows = [row("jax", "jax", "", [1.0], phase="rl_step"), row("tunix", "tunix", "", [8.0], phase="rl_step")]
    old = result(rows)
    for python, asked in ((None, False), ("python", True)):
        new = result(rows[:1], backend="jax", phases=("rl_step",), tunix_python=python)
        _, missing = compare(old, new, threshold=0.1, by="seconds")
        assert missing == [{"what": "rl_step: tunix", "asked": asked}]


def test_a_decode_below_the_noise_has_no_rate_and_no_ratio():
    rows = [
        row("jax", "jax", "", [-0.1, 0.1, -0.2], phase="decode"),
        row("torch", "torch", "", [1.0, 1.0, 1.0], phase="decode"),
    ]
    assert rows[0]["tokens_per_s"] is None
    assert ratios(rows) == [] and "mfu" not in result(rows)["rows"][0]


def test_mfu_is_by_the_median():
    assert result(copy.deepcopy(ROWS))["rows"][0]["mfu"] == pytest.approx(2e9 / 1e10)


def test_devices_of_a_cpu_share_its_peak_and_those_of_pytorch_their_cpu_seconds():
    rows = [row(side, side, "separate", [1.0, 1.0]) | {"devices": 2} for side in ("jax", "torch")]
    found = result(rows)
    assert [one["mfu"] for one in found["rows"]] == [pytest.approx(2e9 / 1e10)] * 2
    assert "cpu_median" not in found["ratios"][0]


def test_the_floor_of_a_decode_is_that_of_one_device():
    settings = BenchSettings(model="tiny", groups=4, group_size=2, prompt=10, completion=3)
    weights = matmul_weights(settings.model_config)
    # 2 layers, 1 head of 16, keys and values: 64 numbers a position; two steps with 1 and 2 tokens sampled.
    for devices, groups in ((1, 4), (2, 2)):
        positions = 2 * groups * 10 + groups * 2 * (1 + 2)
        expected = 4 * (2 * weights + 64 * positions)
        assert decode_floor(settings, {"point": {}, "devices": devices}) == expected


def test_growth_is_the_exponent_and_takes_the_unswept_point_along():
    rows = [
        row(
            "jax",
            "jax separate",
            "separate",
            [2.0 * (n / 4) ** 1.5] * 2,
            point={} if n == 4 else {"groups": n},
        )
        for n in (2, 4, 8)
    ]
    (found,) = growth(rows)
    assert found["exponent"] == pytest.approx(1.5)
    assert list(found["seconds"]) == ["2", "4", "8"]


def test_a_regression_beyond_the_threshold_is_found_and_one_within_is_not():
    old = result(copy.deepcopy(ROWS))
    slower = copy.deepcopy(ROWS)
    slower[0] = row("jax", "jax separate", "separate", [1.2, 1.3, 1.2])
    changes, missing = compare(old, result(slower), threshold=0.1, by="seconds")
    assert [(one["what"], one["regressed"]) for one in changes][0] == ("rl_update: jax separate", True)
    assert sum(one["regressed"] for one in changes) == 1 and not missing
    changes, _ = compare(old, result(slower), threshold=0.25, by="seconds")
    assert not any(one["regressed"] for one in changes)


def test_a_machine_twice_as_slow_is_no_regression_by_ratio():
    old = result(copy.deepcopy(ROWS))
    halved = [r | measured("rl_update", [2 * s for s in r["seconds"]], tokens=1, flops=1.0) for r in ROWS]
    new = result(halved)
    new["sides"] = {name: SIDE | {"cores": 1} for name in new["sides"]}
    with pytest.raises(ValueError, match="use --compare_by ratio"):
        compare(old, new, threshold=0.1, by="seconds")
    changes, _ = compare(old, new, threshold=0.1, by="ratio")
    assert changes and all(one["change"] == pytest.approx(0.0) for one in changes)


@pytest.mark.parametrize(("name", "value"), [("prompt", 99), ("devices", 8)])
def test_results_of_other_work_are_refused(name, value):
    old, new = result(copy.deepcopy(ROWS)), result(copy.deepcopy(ROWS), **{name: value})
    with pytest.raises(ValueError, match=f"differ in {name}"):
        compare(old, new, threshold=0.1, by="seconds")


@pytest.mark.parametrize("by", ["seconds", "cpu_seconds", "ratio"])
def test_a_row_that_was_asked_for_and_is_gone_is_told_apart_from_one_that_was_not(by):
    old = result(copy.deepcopy(ROWS))
    rows = [one for one in ROWS if one["side"] == "torch" or one["layout"] == "separate"]
    (gone,) = compare(old, result(copy.deepcopy(rows)), threshold=0.1, by=by)[1]
    assert gone == {"what": "rl_update: jax shared_prefix", "asked": True}
    for fewer in ({"layouts": ("separate",)}, {"phases": ("refresh",)}, {"backend": "torch"}):
        (gone,) = compare(old, result(copy.deepcopy(rows), **fewer), threshold=0.1, by=by)[1]
        assert not gone["asked"], fewer
    swept = [row("jax", "jax separate", "separate", [1.0, 1.0], point={"groups": 8})]
    swept += [row("torch", "torch separate", "separate", [1.0, 1.0], point={"groups": 8})]
    old = result(copy.deepcopy(ROWS + swept))
    asked = [one["asked"] for one in compare(old, result(copy.deepcopy(ROWS)), threshold=0.1, by=by)[1]]
    assert asked and not any(asked)
    again = result(copy.deepcopy(ROWS), sweep={"groups": (8,)})
    assert all(one["asked"] for one in compare(old, again, threshold=0.1, by=by)[1])


def test_another_kernel_in_the_same_seat_is_compared():
    old, new = result(copy.deepcopy(ROWS)), copy.deepcopy(ROWS)
    new[0] = row("jax", "jax separate pallas", "separate", [0.5, 1.0, 0.5])
    for by, change in (("seconds", -0.5), ("ratio", -0.5)):
        changes, missing = compare(old, result(new), threshold=0.1, by=by)
        found = {one["what"]: one["change"] for one in changes}
        assert found["rl_update: jax separate"] == pytest.approx(change) and not missing


def test_results_with_nothing_in_common_are_refused():
    old = result([row("jax", "jax", "", [1.0, 1.0], phase="rl_step")])
    with pytest.raises(ValueError, match="nothing in common: rl_step: jax there, rl_update: jax separate"):
        compare(old, result(copy.deepcopy(ROWS[:1]), phases=("rl_update",)), threshold=0.1, by="seconds")


def test_a_decode_below_the_noise_is_not_gone():
    decoded = row("jax", "jax", "", [1.0, 1.0, 1.0], phase="decode")
    noisy = row("jax", "jax", "", [-0.1, 0.1, -0.2], phase="decode")
    old, new = result([*copy.deepcopy(ROWS), decoded]), result([*copy.deepcopy(ROWS), noisy])
    assert compare(old, new, threshold=0.1, by="seconds")[1] == []


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ({"loss": 0.5}, {"loss": 0.50002}, "losses differ by more than 1e-05"),
        ({"loss": 0.5, "grad_norm": 2.0}, {"loss": 0.5, "grad_norm": 2.01}, "gradient norms differ"),
        ({"tokens": 1920}, {"tokens": 1919}, "1920 tokens were to be sampled"),
        ({"greedy": [1, 2, 3, 4]}, {"greedy": [1, 2, 3, 5]}, "75% of the greedy tokens"),
    ],
)
def test_sides_that_compute_something_else_are_not_timed(a, b, words):
    check("rl_update", {"a": a, "b": dict(a)}, BenchSettings())
    with pytest.raises(Disagreement, match=words):
        check("rl_update", {"a": a, "b": b}, BenchSettings())


def test_torch_takes_part_in_every_way_that_fits():
    on_gpu = ("sdpa", "flex_attention", "flash_attention_2")
    settings = BenchSettings(dtype="bfloat16", platform="gpu")
    rows = contestants("rl_update", settings, attentions=on_gpu, trl=False)
    ways = {(one.layout, one.attention) for one in rows if one.side == "torch"}
    assert ways == {
        ("separate", "sdpa"), ("separate", "flash_attention_2"),
        ("packed", "sdpa"), ("packed", "flex_attention"), ("packed", "flash_attention_2"),
        ("shared_prefix", "sdpa"), ("shared_prefix", "flex_attention"),
    }  # fmt: skip
    assert {one.compile for one in rows if one.side == "torch"} == {False, True}
    alone = contestants("rl_step", BenchSettings(backend="jax"), attentions=("sdpa",), trl=True)
    assert [one.side for one in alone] == ["jax"]
    steps = contestants("rl_step", BenchSettings(), attentions=("sdpa",), trl=True)
    assert {one.side for one in steps} == {"jax", "torch", "trl"}
    assert {one.compile for one in steps if one.side == "torch"} == {False, True}
    cuts = BenchSettings(micro_cuts=(1, 2), torch_compile="off")
    rows = contestants("rl_update", cuts, attentions=("sdpa",), trl=False)
    apart = [one for one in rows if one.layout == "separate"]
    assert {(one.side, one.micro_cut) for one in apart} == {
        ("jax", 1),
        ("jax", 2),
        ("torch", 1),
        ("torch", 2),
    }
    assert len({one.label for one in apart}) == 4 and len({one.seat for one in apart}) == 2
    assert {one.micro_cut for one in rows if one.layout != "separate"} == {1}
    plain = contestants("rl_step", BenchSettings(torch_compile="off"), attentions=("sdpa",), trl=True)
    assert not any(one.compile for one in plain)


def test_tables_and_a_picture_come_of_a_result(tmp_path):
    import io

    from rich.console import Console

    out = io.StringIO()
    swept = [row("jax", "jax separate", "separate", [3.0, 3.0], point={"groups": 8})]
    found = result(copy.deepcopy(ROWS) + swept)
    console = Console(file=out, width=200)
    show(found, console)
    show_changes(*compare(found, found, threshold=0.1, by="seconds"), console)
    assert "jax shared_prefix" in out.getvalue() and "groups^" in out.getvalue()
    plot(found, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes()[:4] == b"\x89PNG"
