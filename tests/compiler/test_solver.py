"""The update fitted from inner products alone: jumps and weights against explicit vectors, the polish, the response."""

from __future__ import annotations

import numpy as np
import pytest

from sodaprof.compiler import compile_schedule, default_policy
from sodaprof.compiler.fit import Span, fit_open_loop, jump_costs
from sodaprof.compiler.policies import solver
from sodaprof.compiler.policies.solver import polished
from sodaprof.errors import FormatError
from sodaprof.formats.profile import Profile, load_profile
from sodaprof.formats.sampler import OwnUpdate, own_weights, ridge_solve


def trajectory(steps: int = 10, size: int = 40, noise: float = 0.0, basis: str = "output", seed: int = 0):
    """Returns states [T + 1, D], outputs [T, D] and the sampler's own update that made them; outputs curve in time."""
    rng = np.random.default_rng(seed)
    t = np.linspace(0, 1, steps)
    curves = np.stack([np.ones(steps), t, t**2, np.sin(5 * t), np.exp(-8 * t)])
    values = (rng.normal(size=(size, len(curves))) @ curves).T
    rows = np.stack([np.linspace(1.0, 1.05, steps), np.linspace(-0.1, -0.4, steps)], 1)
    states = [rng.normal(size=size)]
    draws = noise * rng.normal(size=(steps, size))
    for step in range(steps):
        states.append(rows[step, 0] * states[-1] + rows[step, 1] * values[step] + draws[step])
    pairs = np.tile([0.0, 1.0], (steps, 1))
    outputs = values
    if basis == "data":
        pairs = np.stack([np.linspace(0.5, 1.0, steps), np.linspace(-2.0, -0.3, steps)], 1)
        outputs = (values - pairs[:, :1] * np.stack(states[:-1])) / pairs[:, 1:]
    own = OwnUpdate(basis, tuple(map(tuple, rows)), tuple(map(tuple, pairs)), (noise,) * steps)
    return np.stack(states), outputs, own


def span_of(states: np.ndarray, outputs: np.ndarray, own: OwnUpdate, response: np.ndarray | None = None) -> Span:
    vectors = np.concatenate([states, outputs])
    return Span(vectors @ vectors.T, own, response)


@pytest.mark.parametrize("basis", ["output", "data"])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_all_full_steps_keep_the_samplers_own_coefficients(basis, noise):
    states, outputs, own = trajectory(noise=noise, basis=basis)
    coefficients, error = fit_open_loop(span_of(states, outputs, own), range(10), 3, ridge=1e-2)
    assert error < 1e-7
    np.testing.assert_allclose(coefficients, own.padded(3), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("basis", ["output", "data"])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_the_fitted_trajectory_is_that_of_explicit_vectors(basis, noise):
    states, outputs, own = trajectory(noise=noise, basis=basis)
    anchors = (0, 2, 3, 6)
    coefficients, error = fit_open_loop(span_of(states, outputs, own), anchors, 2)
    x, ring = states[0], []
    for step, row in enumerate(coefficients):
        if step in anchors:
            of_state, of_output = own.data[step]
            ring = [of_state * states[step] + of_output * outputs[step], *ring][:2]
        drawn = states[step + 1] - own.coefficients[step][0] * states[step]
        full = own.data[step][0] * states[step] + own.data[step][1] * outputs[step]
        drawn = drawn - own.coefficients[step][1] * full
        x = row[0] * x + sum(c * v for c, v in zip(row[1:], ring, strict=False)) + drawn
    assert np.linalg.norm(x - states[-1]) / np.linalg.norm(states[-1]) == pytest.approx(error, rel=1e-6)


def test_a_response_moves_the_outputs_with_the_state():
    states, outputs, own = trajectory()
    response = np.full(10, -0.7)
    span = span_of(states, outputs, own, response)
    x = span.state(4) + 0.1 * span.state(0)
    vectors = np.concatenate([states, outputs])
    np.testing.assert_allclose(span.output(4, x) @ vectors, outputs[4] - 0.07 * states[0])
    _, without = fit_open_loop(span_of(states, outputs, own), (0, 3, 6), 2)
    _, moved = fit_open_loop(span, (0, 3, 6), 2)
    assert moved != pytest.approx(without, rel=1e-3)


def test_jump_costs_are_least_squares_residuals():
    states, outputs, own = trajectory()
    missed = jump_costs(span_of(states, outputs, own))
    for a, gap, n in ((0, 0, 3), (4, 2, 3), (5, 5, 4), (9, 1, 1)):
        regressors = [states[a], outputs[a], *([outputs[a - gap]] if gap else [])]
        left = np.linalg.lstsq(np.stack(regressors, 1), states[a + n], rcond=None)[1:2][0]
        wanted = float(left[0]) / (states[-1] @ states[-1])
        assert missed[a, gap, n] == pytest.approx(wanted, rel=1e-2, abs=1e-10)
    assert np.isinf(missed[8, 1, 3])
    assert np.isinf(missed[3, 4, 1])


def test_the_weights_of_missing_outputs_go_to_the_newest_before_them():
    own = OwnUpdate("data", ((0.9, 1.5, -0.5),) * 6, ((1.0, -1.0),) * 6, (0.0,) * 6)
    assert own_weights(own, 4, [4, 3]).tolist() == [0.9, 1.5, -0.5]
    assert own_weights(own, 4, [4, 2]).tolist() == [0.9, 1.5, -0.5]
    assert own_weights(own, 4, [2, 0]).tolist() == [0.9, 1.0, 0.0]
    assert own_weights(own, 4, [3, 1]).tolist() == [0.9, 1.0, 0.0]
    assert own_weights(own, 0, [0]).tolist() == [0.9, 1.0]


def test_ridge_pulls_towards_the_prior():
    rng = np.random.default_rng(0)
    regressors, target, prior = rng.normal(size=(3, 50)), rng.normal(size=50), np.array([1.0, -2.0, 0.5])
    products, across = regressors @ regressors.T, regressors @ target
    free = np.linalg.lstsq(regressors.T, target, rcond=None)[0]
    np.testing.assert_allclose(ridge_solve(products, across, prior, 0.0), free)
    np.testing.assert_allclose(ridge_solve(products, across, prior, 1e9), prior, rtol=1e-6)


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    """A real profile of a tiny pipeline, with its inner products."""
    import sodaprof
    from tests.tiny_pipelines import tiny_pipe

    folder = tmp_path_factory.mktemp("solver") / "profile"
    sodaprof.profile(tiny_pipe(), folder, name="tiny", steps=12, samples=20, max_interval=4, prompts=[1, 2, 3])
    return folder


def test_the_profile_knows_how_outputs_move_with_the_latents(profile):
    from sodaprof.pipelines.replay import Replay
    from tests.tiny_pipelines import tiny_pipe

    loaded = load_profile(profile)
    response = loaded.response()
    assert response.shape == (12,)
    replay = Replay(tiny_pipe(), loaded.sampler, [1], [0])
    away = 1e-2 * (replay.states[8] - replay.states[5])
    moved = replay.output(8, replay.states[8] + away) - replay.outputs[8]
    assert abs(response[8]) < 10 * float(moved.norm() / away.norm())
    assert np.abs(response[1:]).max() > 1e-4


@pytest.mark.parametrize(
    ("steps", "at"),
    [(6, range(1, 6)), (20, sorted({*range(2, 20, 2), *range(3, 20, 3), 19})), (30, [*range(3, 30, 3), 29])],
)
def test_the_response_is_the_part_of_the_change_that_goes_along_with_the_latents(monkeypatch, steps, at):
    from sodaprof.pipelines.replay import Replay
    from sodaprof.profiler.plan import plan_profile
    from sodaprof.profiler.response import measure_response
    from tests.tiny_pipelines import tiny_pipe

    pipe = tiny_pipe()
    plan = plan_profile(pipe, "tiny", steps=steps, samples=16, max_interval=3, prompts=[1, 2], states_only=True)
    moved = lambda self, step, x, clock=None: self.outputs[step] + 0.3 * (x - self.states[step])  # noqa: E731
    monkeypatch.setattr(Replay, "output", moved)
    found = measure_response(pipe, plan)
    assert sorted(found) == [*at]  # at every third step, in short runs between them, too, and at the last
    for step, (away, along) in found.items():
        if step == 1:  # up to there the run is the plain one
            continue
        assert away > 0
        np.testing.assert_allclose(along, 0.3 * away, rtol=1e-3)


def test_the_response_is_interpolated_between_the_steps_that_measured_it(
    tmp_path, monkeypatch, make_model, make_sampler
):
    kinds = np.array(["state", "away", "away", "away", "response", "response", "response"])
    rows = np.array([0, 0, 2, 4, 0, 2, 4])  # an older profile has step 0, too, at which nothing had moved yet
    table = {"kind": kinds, "row": rows, "product": np.array([9.0, 0.0, 2.0, 4.0, 0.0, 1.0, 4.0])}
    table |= {"column": rows, "transformer": np.array([""] * 7), "coordinates": np.ones(7)}
    monkeypatch.setattr(Profile, "_read", lambda *_: table)
    found = Profile(tmp_path, make_model(), make_sampler(6), {})
    np.testing.assert_allclose(found.response(), [0.5, 0.5, 0.5, 0.75, 1.0, 1.0])
    table["row"] = np.array([0, 0, 2, 4, 0, 2, 3])
    with pytest.raises(FormatError, match="lacks rows of kind away or response, or has some twice"):
        found.response()
    table["kind"] = np.array(["state"] * 7)
    assert found.response() is None


def test_fewer_placements_are_tried_for_long_runs(profile, monkeypatch):
    allowed = []
    monkeypatch.setattr(solver, "polished", lambda anchors, steps, error, tries: allowed.append(tries) or anchors)
    compile_schedule(profile, "2.0x")
    monkeypatch.setattr(solver, "LONG", 6)  # half of the profile's steps
    compile_schedule(profile, "2.0x")
    assert set(allowed) == {300, 300 // 8}
    assert len(allowed) <= 2 * solver.POLISHED


def test_a_profile_of_few_samples_measures_no_response(tmp_path):
    import sodaprof
    from tests.tiny_pipelines import tiny_pipe

    few = sodaprof.profile(tiny_pipe(), tmp_path / "few", name="tiny", steps=6, samples=2, max_interval=3, prompts=[1])
    assert few.response() is None
    assert compile_schedule(few.folder, "2.0x").policy["name"] == "solver"


def test_a_profile_with_inner_products_is_compiled_to_a_fitted_update(profile):
    assert default_policy(profile) == ("solver", "")
    schedule = compile_schedule(profile, "2.0x")
    assert schedule.policy["name"] == "solver"
    assert schedule.predicted["speedup"] >= 2.0
    assert len(schedule.anchors()) == 6
    assert schedule.counts()["-"] == 6 * len(schedule.transformers["transformer"].rows)
    assert schedule.update.fitted["loop"] == "open"
    assert 0 < schedule.predicted["error"] < 1


def test_polishing_moves_single_steps_to_a_local_best_and_stops():
    target, seen = [0, 3, 7, 11], []

    def error(anchors: list[int]) -> float:
        seen.append(tuple(anchors))
        return float(sum(abs(a - b) for a, b in zip(anchors, target, strict=True)))

    assert polished([0, 4, 5, 6], 12, error, 400) == target
    assert all(anchors[0] == 0 and len(set(anchors)) == 4 and max(anchors) < 12 for anchors in seen)
    assert len(seen) < 60
    seen.clear()
    polished([0, 4, 5, 6], 12, error, 3)
    assert len(seen) == 4  # the first, and three tries
    assert polished([0], 12, error=lambda anchors: 1.0, tries=9) == [0]


def test_more_full_steps_are_predicted_to_be_nearer(profile):
    errors = [compile_schedule(profile, 1.0, knobs={"anchors": n}).predicted["error"] for n in (2, 4, 8, 12)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-5
    unpolished = compile_schedule(profile, 1.0, knobs={"anchors": 4, "polish": 0})
    assert errors[1] <= unpolished.predicted["error"]
