"""Schedules against recorded runs of the authors' code, and what the check says of recordings that differ.

Outputs of DiT and PixArt are within 6e-8, to which the recorded ones are rounded. Open-Sora's network has a softmax and a
norm in single precision, whose last bits depend on the CPU: its error is 0 on the kind of CPU that made the recording, and
2e-7 with every number of both moved by one last bit at random.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sodaprof.errors import FormatError
from tests.parity.parity import check, compare, main, read

FOLDER = Path(__file__).parents[1] / "data"
DIT, DUCA, PIXART, OPENSORA = (
    FOLDER / f"{name}.safetensors"
    for name in ("dit_toca_ddim50", "dit_duca_ddim50", "pixart_toca_20", "opensora_toca_30")
)
Change = Callable[[dict[str, Tensor], dict[str, Any]], object]


def changed(path: Path, to: Path, change: Change) -> Path:
    """Writes the recording to `to` after change(tensors, meta), and returns it."""
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["meta"])
    tensors = load_file(path)
    change(tensors, meta)
    save_file(tensors, to, metadata={"meta": json.dumps(meta)})
    return to


def short(path: Path, to: Path, *changes: Change) -> Path:
    """As `changed`, the recording cut to its first steps, as few as hold steps of every type and some token sets."""
    steps = {DIT: 20, OPENSORA: 7}[path]

    def cut(tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        for change in changes:
            change(tensors, meta)
        for name in [k for k in tensors if re.match(r"call/\d", k) and int(k.split("/")[1]) >= steps]:
            del tensors[name]

    return changed(path, to, cut)


@pytest.mark.parametrize(
    ("path", "model", "policy", "calls", "sets", "types"),
    [
        (DIT, "DiTTransformer2DModel", "toca", 21, 140, 50 * 4 * 2),
        (DUCA, "DiTTransformer2DModel", "duca", 21, 96, 50 * 4 * 2),
        (PIXART, "PixArtTransformer2DModel", "toca", 12, 1776, 20 * 28 * 3),
        (OPENSORA, "STDiT3", "toca", 16, 128, 30 * 4 * 2 * 3),
    ],
    ids=lambda value: value.stem if isinstance(value, Path) else None,
)
def test_recorded_runs(path, model, policy, calls, sets, types):
    """Every token set, every step type, every output; all that are recorded are compared."""
    found = check(path)
    assert (found.model, found.policy, found.calls) == (model, policy, calls)
    assert (found.sets, found.set_mismatches) == (sets, ())
    assert (found.types, found.type_mismatches) == (types, ())
    assert found.error <= (6e-8 if path != OPENSORA else 1e-6)
    assert found.agrees


def test_runs_that_were_cut_short(tmp_path):
    found = check(short(DIT, tmp_path / "cut.safetensors"))
    assert (found.calls, found.sets) == (13, 76)
    assert found.agrees


def test_whole_inputs_and_outputs(tmp_path):
    """Recordings may hold both guidance halves of the inputs and whole outputs, as those of the authors' runs do."""

    def whole(tensors, meta):
        coordinates = tensors.pop("coordinates").long()
        for name in [k for k in tensors if re.match(r"call/\d+/x", k)]:
            tensors[name] = tensors[name].repeat(2, 1, 1, 1)
        for name in [k for k in tensors if re.match(r"call/\d+/out", k)]:
            kept = tensors[name]
            tensors[name] = torch.zeros(4, 8, 16, 16)
            tensors[name][tuple(coordinates.T)] = kept

    recording = read(short(DIT, tmp_path / "whole.safetensors", whole))
    assert recording.at(0, "x").shape == recording.arguments(0)["hidden_states"].shape == (4, 4, 16, 16)
    found = compare(recording)
    assert (found.calls, found.sets, found.set_mismatches) == (13, 76, ())
    assert 0.5 < found.error < 2  # the coordinates that are 0 here are not 0 in the network's outputs


def test_calls_may_be_left_out_before_a_step_that_computes_everything(tmp_path):
    def without(*steps):
        def change(tensors, meta):
            for name in [k for k in tensors if k.startswith(tuple(f"call/{step:03d}/" for step in steps))]:
                del tensors[name]

        return change

    found = check(short(DIT, tmp_path / "gap.safetensors", without(4), without(3)))
    assert (found.calls, found.sets) == (11, 76)
    assert found.agrees
    path = short(DIT, tmp_path / "needed.safetensors", without(13, 14, 15))
    with pytest.raises(FormatError, match="call 16 needs those before it, and call 15 is left out"):
        check(path)
    with pytest.raises(FormatError, match=r"calls \[1, 2, .* recorded, expected calls of 50 steps, from 0 on"):
        check(short(DIT, tmp_path / "first.safetensors", without(0)))


def test_types_of_opensora_duca_hold_a_flag_of_the_layer(tmp_path):
    def flagged(value):
        return lambda _, meta: [types.update(all_aggressive=value) for types in meta["types"].values()]

    found = check(short(OPENSORA, tmp_path / "flag.safetensors", flagged(False)))
    assert (found.types, found.agrees) == (30 * 4 * 2 * 3, True)
    with pytest.raises(FormatError, match="all_aggressive is 'aggressive', expected true or false"):
        check(short(OPENSORA, tmp_path / "text.safetensors", flagged("aggressive")))


def test_period_of_opensora_is_that_of_ages_alone(tmp_path):
    """The published code has its periods as constants: another N leaves step types as they are, and tokens differ."""
    found = check(short(OPENSORA, tmp_path / "n.safetensors", lambda _, meta: meta["args"].update(fresh_threshold=300)))
    assert not found.type_mismatches
    assert found.set_mismatches


# ---- recordings that differ -------------------------------------------------------------------------------------------


def one_token(tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Exchanges one token of the set at counter 33 (step 16) of layer 2, second sample, for one that is not in it."""
    tokens = tensors["selected/33/2"]
    tokens[1, 0] = next(i for i in range(64) if i not in tokens[1].tolist())


def one_set_more(tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    tensors["selected/30/3"] = torch.zeros(4, 1, dtype=torch.int16)


def one_set_less(tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    del tensors["selected/33/2"]


@pytest.mark.parametrize(
    ("change", "count", "place"),
    [
        (one_token, 1, "step 16, transformer_blocks.2.ff, sample 1: 1 tokens recorded alone, 1 here alone"),
        (
            one_set_more,
            4,
            "step 19, transformer_blocks.3.ff, sample 0: 1 tokens recorded alone, 0 here alone, such as 0",
        ),
        (one_set_less, 4, "step 16, transformer_blocks.2.ff, sample 0"),
    ],
)
def test_sets_that_differ(tmp_path, change, count, place):
    found = check(short(DIT, tmp_path / "sets.safetensors", change))
    assert len(found.set_mismatches) == count
    assert found.set_mismatches[0].startswith(place)
    assert not found.type_mismatches
    assert found.error <= 1e-5
    assert not found.agrees


def test_step_types_that_differ(tmp_path):
    found = check(short(DIT, tmp_path / "types.safetensors", lambda _, meta: meta["types"].update({"32": "FFTT"})))
    assert found.type_mismatches == tuple(
        f"step 17, transformer_blocks.1.{module}: T, recorded F" for module in ("attn1", "ff")
    )
    assert not found.set_mismatches
    assert not found.agrees


@pytest.mark.parametrize("value", [1.001, float("nan")])
def test_outputs_that_differ(tmp_path, value):
    found = check(short(DIT, tmp_path / "out.safetensors", lambda tensors, _: tensors["call/017/out"].mul_(value)))
    assert found.error_step == 17
    assert found.error == pytest.approx(1e-3, rel=0.01) if value == 1.001 else found.error != found.error
    assert not found.agrees


@pytest.mark.parametrize(
    "arguments",
    [{"fresh_ratio": 0.08}, {"soft_fresh_weight": 0.2}, {"cache_type": "kv-norm"}, {"repo": "duca"}],
    ids=str,
)
def test_the_arguments_decide(tmp_path, arguments):
    """Any other hyper-parameter gives other tokens, and other outputs by far more than rounding."""
    found = check(short(DIT, tmp_path / "other.safetensors", lambda _, meta: meta["args"].update(arguments)))
    assert found.set_mismatches
    assert found.error > 1e-3
    assert bool(found.type_mismatches) == ("repo" in arguments)


def two_halves(tensors: dict[str, Tensor]) -> Tensor:
    """Returns the input of the first call as guidance halves that differ."""
    x = tensors["call/000/x"]
    return torch.cat([x, x + 1])


# ---- the command ------------------------------------------------------------------------------------------------------


def test_the_command(tmp_path, capsys):
    good, broken = (
        short(DIT, tmp_path / f"{name}.safetensors", *change)
        for name, change in (("good", ()), ("broken", (one_token,)))
    )
    assert main([str(good)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("good.safetensors: agrees (DiTTransformer2DModel, toca N=3 R=0.07 ")
    assert "token sets: 76 compared, 0 differ" in text
    assert main([str(good), str(broken)]) == 1
    text = capsys.readouterr().out
    assert "broken.safetensors: DIFFERS" in text
    assert "76 compared, 1 differ\n    step 16, transformer_blocks.2.ff, sample 1" in text
    assert main(["--json", str(broken), "missing.safetensors"]) == 1
    first, second = json.loads(capsys.readouterr().out)
    assert (first["agrees"], first["sets"], len(first["set_mismatches"])) == (False, 76, 1)
    assert (second["path"], second["agrees"]) == ("missing.safetensors", False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensors, meta: meta["args"].update(cache_type="random"), "cache_type 'random' cannot be compared"),
        (lambda tensors, meta: meta["args"].update(ratio_scheduler="linear"), "ratio schedule 'linear' cannot"),
        (lambda tensors, meta: meta["args"].update(force_fresh="local"), "force_fresh 'local' cannot"),
        (lambda tensors, meta: meta["args"].update(full=True), "full True cannot"),
        (lambda tensors, meta: meta["args"].update(steps=20), "expected calls of 20 steps, from 0 on"),
        (lambda tensors, meta: meta["args"].pop("cache_type"), "a value has the wrong type or shape"),
        (lambda tensors, meta: meta.pop("args"), "no recording that can be compared"),
        (lambda tensors, meta: tensors.pop("labels"), "no labels; expected it in a recording of DiT"),
        (lambda tensors, meta: tensors.pop("call/014/x"), "no call/014/x"),
        (lambda tensors, meta: tensors.pop("weights/pos_embed"), "missing pos_embed"),
        (lambda tensors, meta: meta.update(calls={"3": {"step": 3}}), "call 3 is of step 3, expected 46"),
        (lambda tensors, meta: tensors.update({"call/000/x": two_halves(tensors)}), "both branches|halves"),
    ],
)
def test_what_cannot_be_compared(tmp_path, capsys, change, reason):
    path = changed(DIT, tmp_path / "broken.safetensors", change)
    assert main(["--json", str(path)]) == 1
    (found,) = json.loads(capsys.readouterr().out)
    assert not found["agrees"]
    assert re.search(reason, found["reason"])


def test_files_of_another_kind(tmp_path, capsys):
    path = tmp_path / "text.safetensors"
    path.write_text("no tensors")
    assert main([str(path), str(FOLDER / "opensora_rflow.safetensors"), str(tmp_path)]) == 1
    assert capsys.readouterr().out.count("NOT COMPARED") == 3
