"""`compile` and its options: what the file then holds, or one message and no file."""

from __future__ import annotations

import json
import shutil

import pytest

import sodaprof
from sodaprof.compiler.fit import Stepper
from sodaprof.compiler.policies import POLICIES
from sodaprof.formats.cost import load_cost
from sodaprof.formats.files import write_json
from sodaprof.formats.profile import load_profile
from sodaprof.formats.schedule_file import load_schedule
from sodaprof.pipelines.load import load_pipeline
from tests.cli.conftest import SAMPLES, STEPS
from tests.tiny_pipelines import tiny_pipe

LATENTS = 4 * 4 * 8 * 8  # bytes of one generation's latents


def profiled_by(pipe, tmp_path_factory, **settings):
    folder = tmp_path_factory.mktemp("profiles") / "profile"
    sodaprof.profile(pipe, folder, name="tiny", steps=STEPS, max_interval=4, **settings)
    return folder


@pytest.fixture(scope="module")
def without_gram(tmp_path_factory):
    return profiled_by(tiny_pipe(), tmp_path_factory, samples=1, gram=False)


@pytest.fixture(scope="module")
def states_only(tmp_path_factory):
    return profiled_by(tiny_pipe(), tmp_path_factory, samples=2, states_only=True)


@pytest.fixture(scope="module")
def nonlinear(tmp_path_factory, model):
    return profiled_by(load_pipeline(str(model), scheduler="DEISMultistepScheduler"), tmp_path_factory, samples=1)


# ---- fits on the model ------------------------------------------------------------------------------------------------


def test_fit_gives_the_same_steps_with_an_update_of_the_closed_loop(done, model, profiled, target, tmp_path):
    done("compile", profiled, "--budget", "2x", "-o", tmp_path / "open.json")
    out = done("compile", profiled, "--budget", "2x", "--fit", model, "-o", target)
    alone, fitted = load_schedule(tmp_path / "open.json"), load_schedule(target)
    loops = {"open": "The open loop is best", "closed": "Best of the fits"}  # of an untrained network either is
    assert f"{loops[fitted.update.fitted['loop']]} on {SAMPLES // 3} calibration generations: mean" in out
    assert f"update fitted {fitted.update.fitted['loop']} loop" in out
    assert alone.update.fitted["loop"] == "open"
    assert len(fitted.anchors()) == len(alone.anchors())
    assert fitted.update.coefficients != alone.update.coefficients
    assert fitted.predicted["speedup"] == alone.predicted["speedup"] >= 2
    assert fitted.predicted["error"] is None  # what it simulated was the other update


def test_a_fit_keeps_to_a_budget_in_milliseconds(done, model, profiled, target, tmp_path):
    data = json.loads((profiled / "cost.flops.json").read_text())
    full = load_cost(profiled / "cost.flops.json").transformers["transformer"].full
    data |= {"unit": "ms", "loop": {"scheduler": 0.0, "update": 0.2 * full, "guidance": 0.0}}
    write_json(tmp_path / "cost.json", data)
    reached = {}
    for policy, more in (("solver", ()), ("fora", ("--update",)), ("fora", ())):
        arguments = ["compile", profiled, "--policy", policy, *more, "--cost", tmp_path / "cost.json", "--budget", "2x"]
        arguments += ["--fit", model] if more or policy == "solver" else []
        done(*arguments, "-o", target, "--force")
        schedule = load_schedule(target)
        assert schedule.predicted["unit"] == "ms"
        assert schedule.predicted["speedup"] >= 2 - 1e-9
        reached[policy, more] = len(schedule.anchors())
    assert reached["solver", ()] < STEPS / 2  # of the time for four full steps eight updates take 1.6
    assert reached["fora", ("--update",)] < reached["fora", ()]


def test_update_gives_a_caching_policy_one_and_leaves_the_default_as_it_is(done, model, profiled, target, tmp_path):
    done("compile", profiled, "--policy", "fora", "-o", tmp_path / "plain.json")
    done("compile", profiled, "--policy", "fora", "--fit", model, "--update", "-o", target)
    plain, updated = load_schedule(tmp_path / "plain.json"), load_schedule(target)
    assert updated.transformers == plain.transformers
    assert plain.update is None
    assert updated.update.fitted["loop"] == "closed"
    digests = []
    for number, more in enumerate(((), ("--update",), ("--update", "--policy", "solver"))):
        path = tmp_path / f"{number}.json"
        done("compile", profiled, "--fit", model, *more, "-o", path)
        digests.append(load_schedule(path).digest())
    assert len(set(digests)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--update",), "Add --fit MODEL"),
        (("--policy", "fora", "--fit", "no-such-model"), "finds nothing to fit for --policy fora. Add --update"),
        (("--policy", "nonsense", "--fit", "no-such-model"), "expected solver, soda, "),
        (("--budget", "fast", "--policy", "mix", "--fit", "no-such-model"), "The budget is 'fast'"),
        (("--fit", "no-such-model"), "no-such-model: no such folder"),
        (("--max-cache", "2"), "--max-cache is '2'; expected a number above 0 with its unit"),
        (("--knob", "history"), "expected NAME=VALUE"),
        (("--policy", "mix"), "--fit MODEL"),
        (("--policy", "mix", "--fit", "no-such-model", "--update"), "--update out"),
        (("--max-cache", "0.5KB"), "are allowed (--max-cache)"),
        (("--max-cache", "3KB", "--knob", "history=4"), "are allowed (--max-cache)"),
        (("--max-cache", "1KB", "--policy", "soda"), "are allowed (--max-cache)"),
        (("--max-cache", "1KB", "--policy", "drift", "--knob", "K=2"), "are allowed (--max-cache)"),
        (("--knob", "history=5"), "Knob history is 5; expected 1 to 4"),
        (("--knob", "history=0"), "Knob history is 0; expected 1 to 4"),
        (("--knob", "history=two"), "Knob history is 'two'; expected int"),
        (("--knob", "K=2"), "Policy solver has no knob 'K'; it has anchors"),
        (("--policy", "forecast", "--knob", "K=5"), "Knob K is 5; expected one of 1, 2, 3, 4"),
        (("--policy", "drift", "--knob", "K=0"), "Knob K is 0; expected one of 1, 2, 3, 4"),
        (("--policy", "taylor", "--knob", "order=3"), "Knob order is 3; expected one of 1, 2"),
        (("--policy", "forecast", "--budget", "6x"), "A budget of 6x cannot be met"),  # full steps at most 4 apart
    ],
)
def test_options_and_knobs_that_cannot_be_met(refused, profiled, target, arguments, message):
    assert message in refused("compile", profiled, *arguments, output=target)


def test_another_model_than_the_profiles(refused, profiled, target, tmp_path):
    tiny_pipe(layers=3).save_pretrained(tmp_path / "other")
    said = refused("compile", profiled, "--fit", tmp_path / "other", output=target)
    assert "another model" in said or "has the site" in said


def test_an_interrupted_fit_writes_nothing(command, model, profiled, target, monkeypatch):
    fitted, calls = Stepper.fitted, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fitted(*arguments)

    monkeypatch.setattr(Stepper, "fitted", interrupted)
    code, _, err = command("compile", profiled, "--fit", model, "-o", target)
    assert code == 130
    assert err.startswith("sodaprof: Interrupted.")
    assert not list(target.parent.iterdir())


# ---- memory and knobs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", [False, True], ids=["open", "fitted"])
def test_a_bound_on_memory_takes_outputs_from_the_update(done, model, profiled, target, fit):
    more = ("--fit", model) if fit else ()
    done("compile", profiled, "--max-cache", "3KB", *more, "-o", target)
    schedule = load_schedule(target)
    assert schedule.update.history == 2
    assert fit or schedule.update.fitted["loop"] == "open"
    assert schedule.predicted["cache_bytes"] == 2 * LATENTS


def test_a_mix_leaves_out_what_the_bound_excludes(done, model, profiled, target):
    out = done("compile", profiled, "--policy", "mix", "--fit", model, "--max-cache", "2KB", "-o", target)
    assert out.count("Left out: ") == 6
    assert "Taken: solver + update." in out
    schedule = load_schedule(target)
    assert schedule.policy["name"] == "mix"
    assert list(schedule.policy["knobs"]["candidates"]) == ["solver + update"]
    assert schedule.predicted["cache_bytes"] <= 2000


def test_the_former_name_of_a_policy_is_accepted_with_a_note(done, profiled, target):
    out = done("compile", profiled, "--policy", "fit", "-o", target)
    assert "Policy fit is called forecast now." in out
    assert load_schedule(target).policy["name"] == "forecast"


def test_the_help_lists_the_policies_of_the_registry(command):
    _, out, _ = command("compile", "--help")
    assert all(f"  {name} " in out and policy.help in out for name, policy in POLICIES.items())


# ---- profiles that lack something -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy",
    [("solver",), ("forecast",), ("drift",), ("dpcache",), ("magcache",), ("taylor", "--knob", "placement=dp")],
)
def test_a_profile_without_products_says_how_to_get_them(refused, without_gram, target, policy):
    said = refused("compile", without_gram, "--policy", *policy, output=target)
    assert f"Profile again without --no-gram: sodaprof profile MODEL -o {without_gram} --force" in said


def test_the_default_for_a_profile_without_products_is_explained(done, without_gram, target, caplog):
    why = "Policy soda: the profile holds no inner products to fit an update from. Profile again without --no-gram."
    out = done("compile", without_gram, "-o", target)
    assert why in out
    assert load_schedule(target).policy["name"] == "soda"
    assert sodaprof.compile_schedule(without_gram, 1.5).policy["name"] == "soda"
    assert why in caplog.text


@pytest.mark.parametrize(
    ("policy", "message"), [("soda", "--states-only"), ("forecast", "states alone"), ("drift", "states alone")]
)
def test_a_profile_of_states_only_is_enough_for_solver(done, refused, states_only, target, policy, message):
    assert message in refused("compile", states_only, "--policy", policy, output=target)
    done("compile", states_only, "-o", target)
    assert load_schedule(target).policy["name"] == "solver"


def test_states_only_writes_products_alone_and_from_16_samples_on_the_response(done, refused, model, tmp_path):
    arguments = ("profile", model, "--steps", 4, "--max-interval", 3, "--states-only")
    for samples in (1, 16):
        folder = tmp_path / f"{samples}"
        out = done(*arguments, "--samples", samples, "-o", folder)
        assert f"Next: sodaprof compile {folder} --budget 2.0x" in out
        assert [path.name for path in folder.glob("*.parquet")] == ["gram.parquet"]
        assert ("was not measured: that takes 16 samples" in out) == (samples < 16)
        assert (load_profile(folder).response() is None) == (samples < 16)
    for option in (("--no-gram",), ("--tokens", "full")):
        assert "--states-only" in refused(*arguments, *option, output=tmp_path / "q")


def test_a_sampler_that_is_no_weighted_sum(done, refused, model, nonlinear, target):
    said = refused("compile", nonlinear, "--policy", "solver", output=target)
    assert "The steps of DEISMultistepScheduler cannot be tabled. Take one of DDIMScheduler" in said
    said = refused("compile", nonlinear, "--policy", "fora", "--fit", model, "--update", output=target)
    assert "The steps of DEISMultistepScheduler cannot be tabled" in said
    out = done("compile", nonlinear, "--budget", "1.5x", "-o", target)
    assert "Policy soda: The steps of DEISMultistepScheduler cannot be tabled" in out


def test_a_solver_file_that_is_broken_is_reported_and_one_that_is_missing_explained(
    done, refused, profiled, target, tmp_path
):
    older = tmp_path / "older"
    shutil.copytree(profiled, older)
    (older / "solver.json").write_text("{")
    assert "solver.json: not readable as JSON" in refused("compile", older, output=target)
    (older / "solver.json").unlink()
    assert "solver.json: no such file" in refused("compile", older, "--policy", "solver", output=target)
    out = done("compile", older, "--budget", "1.5x", "-o", target)
    assert "Policy soda: " in out
    assert "--force" in out


# ---- what is shown ----------------------------------------------------------------------------------------------------


def test_show_says_how_an_update_was_fitted(command, done, profiled, tmp_path):
    unfitted = sodaprof.compile_schedule(profiled, 1.5, "fora", updated=True)
    unfitted.save(tmp_path / "own.json")
    out = done("show", tmp_path / "own.json")
    assert "update: weighs the last 4 outputs, not fitted yet" in out
    sodaprof.compile_schedule(profiled, 2).save(tmp_path / "open.json")
    assert f"fitted open loop on {SAMPLES} generations at guidance 4.0" in command("show", tmp_path / "open.json")[1]
