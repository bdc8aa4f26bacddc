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
from tests.tiny_pipelines import tiny_pipe

STEPS, SAMPLES = 8, 4
LATENTS = 4 * 4 * 8 * 8  # bytes of one generation's latents


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Returns a function that profiles the tiny pipeline: (name, **settings) -> folder."""
    root = tmp_path_factory.mktemp("profiles")

    def make(name, pipe=None, steps=STEPS, samples=SAMPLES, **settings):
        pipe = tiny_pipe() if pipe is None else pipe
        sodaprof.profile(pipe, root / name, name="tiny", steps=steps, samples=samples, max_interval=4, **settings)
        return root / name

    return make


@pytest.fixture(scope="module")
def profiled(made):
    return made("whole")


@pytest.fixture(scope="module")
def without_gram(made):
    return made("no-gram", samples=1, gram=False)


@pytest.fixture(scope="module")
def states_only(made):
    return made("states", samples=2, states_only=True)


@pytest.fixture(scope="module")
def nonlinear(made, model):
    pipe = load_pipeline(str(model), scheduler="DEISMultistepScheduler")
    return made("deis", pipe, samples=1)


@pytest.fixture
def target(tmp_path):
    """A path in an empty folder."""
    return tmp_path / "out" / "s.json"


@pytest.fixture(autouse=True)
def _empty_folder(target):
    target.parent.mkdir()


# ---- fits on the model ------------------------------------------------------------------------------------------------


def test_fit_gives_the_same_steps_with_an_update_of_the_closed_loop(command, model, profiled, target, tmp_path):
    assert command("compile", profiled, "--budget", "2x", "-o", tmp_path / "open.json")[0] == 0
    code, out, _ = command("compile", profiled, "--budget", "2x", "--fit", model, "-o", target)
    assert code == 0
    assert f"Fitted on {SAMPLES} calibration generations" in out
    assert "update fitted closed loop" in out
    alone, fitted = load_schedule(tmp_path / "open.json"), load_schedule(target)
    assert (alone.update.fitted["loop"], fitted.update.fitted["loop"]) == ("open", "closed")
    assert fitted.update.fitted["samples"] == SAMPLES
    assert fitted.transformers == alone.transformers
    assert fitted.update.coefficients != alone.update.coefficients
    assert fitted.predicted["speedup"] == alone.predicted["speedup"] >= 2
    assert fitted.predicted["error"] is None  # what it simulated was the other update


def test_a_fit_keeps_to_a_budget_in_milliseconds(command, model, profiled, target, tmp_path):
    data = json.loads((profiled / "cost.flops.json").read_text())
    full = load_cost(profiled / "cost.flops.json").transformers["transformer"].full
    data |= {"unit": "ms", "loop": {"scheduler": 0.0, "update": 0.2 * full, "guidance": 0.0}}
    write_json(tmp_path / "cost.json", data)
    reached = {}
    for policy, more in (("solver", ()), ("fora", ("--update",)), ("fora", ())):
        arguments = ["compile", profiled, "--policy", policy, *more, "--cost", tmp_path / "cost.json", "--budget", "2x"]
        arguments += ["--fit", model] if more or policy == "solver" else []
        assert command(*arguments, "-o", target, "--force")[0] == 0
        schedule = load_schedule(target)
        assert schedule.predicted["unit"] == "ms"
        assert schedule.predicted["speedup"] >= 2 - 1e-9
        reached[policy, more] = len(schedule.anchors())
    assert reached["solver", ()] < STEPS / 2  # of the time for four full steps eight updates take 1.6
    assert reached["fora", ("--update",)] < reached["fora", ()]


def test_update_gives_a_caching_policy_one_and_leaves_the_default_as_it_is(command, model, profiled, target, tmp_path):
    assert command("compile", profiled, "--policy", "fora", "-o", tmp_path / "plain.json")[0] == 0
    assert command("compile", profiled, "--policy", "fora", "--fit", model, "--update", "-o", target)[0] == 0
    plain, updated = load_schedule(tmp_path / "plain.json"), load_schedule(target)
    assert updated.transformers == plain.transformers
    assert plain.update is None
    assert updated.update.fitted["loop"] == "closed"
    digests = []
    for number, more in enumerate(((), ("--update",), ("--update", "--policy", "solver"))):
        path = tmp_path / f"{number}.json"
        assert command("compile", profiled, "--fit", model, *more, "-o", path)[0] == 0
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
    ],
)
def test_options_that_do_not_go_together(refused, profiled, target, arguments, message):
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
def test_a_bound_on_memory_takes_outputs_from_the_update(command, model, profiled, target, fit):
    more = ("--fit", model) if fit else ()
    assert command("compile", profiled, "--max-cache", "3KB", *more, "-o", target)[0] == 0
    schedule = load_schedule(target)
    assert schedule.update.history == 2
    assert schedule.update.fitted["loop"] == ("closed" if fit else "open")
    assert schedule.predicted["cache_bytes"] == 2 * LATENTS


@pytest.mark.parametrize(
    "arguments",
    [
        ("--max-cache", "0.5KB"),
        ("--max-cache", "3KB", "--knob", "history=4"),
        ("--max-cache", "1KB", "--policy", "soda"),
        ("--max-cache", "1KB", "--policy", "drift", "--knob", "K=2"),
    ],
)
def test_a_bound_on_memory_that_cannot_be_met(refused, profiled, target, arguments):
    said = refused("compile", profiled, *arguments, output=target)
    assert "--max-cache" in said
    assert "bytes" in said


def test_a_mix_leaves_out_what_the_bound_excludes(command, model, profiled, target):
    code, out, _ = command("compile", profiled, "--policy", "mix", "--fit", model, "--max-cache", "2KB", "-o", target)
    assert code == 0
    assert out.count("Left out: ") == 6
    assert "Taken: solver + update." in out
    schedule = load_schedule(target)
    assert schedule.policy["name"] == "mix"
    assert list(schedule.policy["knobs"]["candidates"]) == ["solver + update"]
    assert schedule.predicted["cache_bytes"] <= 2000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
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
def test_wrong_knobs(refused, profiled, target, arguments, message):
    assert message in refused("compile", profiled, *arguments, output=target)


def test_the_former_name_of_a_policy_is_accepted_with_a_note(command, profiled, target):
    code, out, _ = command("compile", profiled, "--policy", "fit", "-o", target)
    assert code == 0
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


def test_the_default_for_a_profile_without_products_is_explained(command, without_gram, target):
    code, out, _ = command("compile", without_gram, "-o", target)
    assert code == 0
    assert (
        "Policy soda: the profile holds no inner products to fit an update from. Profile again without --no-gram."
        in out
    )
    assert load_schedule(target).policy["name"] == "soda"


@pytest.mark.parametrize(
    ("policy", "message"), [("soda", "--states-only"), ("forecast", "states alone"), ("drift", "states alone")]
)
def test_a_profile_of_states_only_is_enough_for_solver(command, refused, states_only, target, policy, message):
    assert message in refused("compile", states_only, "--policy", policy, output=target)
    assert command("compile", states_only, "-o", target)[0] == 0
    assert load_schedule(target).policy["name"] == "solver"


def test_states_only_writes_products_alone(command, refused, model, tmp_path):
    arguments = ("profile", model, "--steps", 6, "--max-interval", 3, "--states-only")
    code, out, _ = command(*arguments, "--samples", 1, "-o", tmp_path / "p")
    assert code == 0
    assert "was not measured: that takes 16 samples" in out
    assert f"Next: sodaprof compile {tmp_path / 'p'} --budget 2.0x" in out
    assert {path.name for path in (tmp_path / "p").glob("*.parquet")} == {"gram.parquet"}
    for option in (("--no-gram",), ("--tokens", "full")):
        assert "--states-only" in refused(*arguments, *option, output=tmp_path / "q")


def test_the_response_is_measured_from_16_samples_on(command, model, tmp_path):
    arguments = ("profile", model, "--steps", 4, "--max-interval", 3, "--states-only", "--samples", 16)
    code, out, _ = command(*arguments, "-o", tmp_path / "p")
    assert code == 0
    assert "was not measured" not in out
    assert load_profile(tmp_path / "p").response() is not None


def test_a_sampler_that_is_no_weighted_sum(command, refused, model, nonlinear, target):
    said = refused("compile", nonlinear, "--policy", "solver", output=target)
    assert "The steps of DEISMultistepScheduler cannot be tabled. Take one of DDIMScheduler" in said
    said = refused("compile", nonlinear, "--policy", "fora", "--fit", model, "--update", output=target)
    assert "The steps of DEISMultistepScheduler cannot be tabled" in said
    code, out, _ = command("compile", nonlinear, "--budget", "1.5x", "-o", target)
    assert code == 0
    assert "Policy soda: The steps of DEISMultistepScheduler cannot be tabled" in out


def test_a_broken_solver_file_is_reported_and_not_ignored(refused, profiled, target, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(profiled, broken)
    (broken / "solver.json").write_text("{")
    assert "solver.json: not readable as JSON" in refused("compile", broken, output=target)


def test_the_default_policy_is_logged_in_python(without_gram, caplog):
    assert sodaprof.compile_schedule(without_gram, 1.5).policy["name"] == "soda"
    assert "Policy soda: the profile holds no inner products" in caplog.text


def test_an_older_profile_without_the_samplers_own_update(command, refused, profiled, target, tmp_path):
    older = tmp_path / "older"
    shutil.copytree(profiled, older)
    (older / "solver.json").unlink()
    assert "solver.json: no such file" in refused("compile", older, "--policy", "solver", output=target)
    code, out, _ = command("compile", older, "--budget", "1.5x", "-o", target)
    assert code == 0
    assert "Policy soda: " in out
    assert "--force" in out


# ---- what is shown ----------------------------------------------------------------------------------------------------


def test_show_says_how_an_update_was_fitted(command, profiled, tmp_path):
    unfitted = sodaprof.compile_schedule(profiled, 1.5, "fora", updated=True)
    unfitted.save(tmp_path / "own.json")
    code, out, _ = command("show", tmp_path / "own.json")
    assert code == 0
    assert "update: weighs the last 4 outputs, not fitted yet" in out
    sodaprof.compile_schedule(profiled, 2).save(tmp_path / "open.json")
    assert f"fitted open loop on {SAMPLES} generations at guidance 4.0" in command("show", tmp_path / "open.json")[1]
