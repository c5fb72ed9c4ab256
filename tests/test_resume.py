"""`sparse-kernels train --resume`: signals, settings, broken checkpoints, non-finite numbers."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from kill_support import differences, outcome
from small_training import make_model

from sparse_kernels import cli
from sparse_kernels.nn import SparseLayer
from sparse_kernels.training import apply_change, checkpoint_files, finite, save_checkpoint
from sparse_kernels.workbench import contenders
from sparse_kernels.workbench.stopping import StopSignals

WORDS = (
    "train --data mnist-sample --density 0.1 --batch-size 200 --epochs 2 --holdout 0.8 "
    "--update-every 3 --window-tolerance 0.6 --threads 1 --name r"
)


@pytest.fixture(autouse=True)
def threads_stay() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def invoke(out: Path, *words: str) -> Result:
    return CliRunner().invoke(cli.main, [*WORDS.split(), "--out", str(out), *words])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("whole")
    done = invoke(folder)
    assert done.exit_code == 0, done.output
    return outcome(folder / "r")


def same(folder: Path, whole: Any) -> bool:
    found = outcome(folder)
    for end in (found, whole):
        for free in ("out", "checkpoint_dir", "checkpoint_every"):
            end["experiment"]["config"].pop(free, None)
    return differences(found, whole) == []


def at_call(monkeypatch: pytest.MonkeyPatch, name: str, when: int, action: Any) -> None:
    """Do `action` before the `when`-th call of a Contender's method, in this test only."""
    method, calls = getattr(contenders.Contender, name), [0]

    def counted(self: contenders.Contender, *arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == when:
            action(self)
        return method(self, *arguments)

    monkeypatch.setattr(contenders.Contender, name, counted)


@contextlib.contextmanager
def handler_of(signum: int, handler: Any) -> Iterator[None]:
    """`handler` for a while: a test run in the background may have been told to ignore Ctrl-C."""
    before = signal.signal(signum, handler)
    try:
        yield
    finally:
        signal.signal(signum, before)


@pytest.mark.parametrize(
    ("signum", "code", "method", "when", "step"),
    [
        (signal.SIGINT, 130, "step", 2, 2),
        (signal.SIGTERM, 143, "step", 3, 3),  # the step of a mask update
        (signal.SIGTERM, 143, "accuracy", 1, 4),
    ],
)
def test_a_signal_stops_within_a_step_and_says_how_to_go_on(
    signum, code, method, when, step, whole, tmp_path, monkeypatch
) -> None:
    with handler_of(signal.SIGINT, signal.default_int_handler), monkeypatch.context() as patch:
        at_call(patch, method, when, lambda self: os.kill(os.getpid(), signum))
        stopped = invoke(tmp_path)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert stopped.exit_code == code, stopped.output
    assert f"stopped at step {step}" in stopped.stderr and "Traceback" not in stopped.output
    assert not (tmp_path / "r" / "results.json").exists()
    words = shlex.split(stopped.stderr.splitlines()[-1].split("goes on from it: ")[1])
    resumed = CliRunner().invoke(cli.main, words[1:])
    assert resumed.exit_code == 0, resumed.output
    assert f"(step {step})" in resumed.stdout and same(tmp_path / "r", whole)
    assert len((tmp_path / "r" / "log-sparse-seed0.csv").read_text().splitlines()) == 3
    assert (tmp_path / "r" / "results.json").is_file()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_inside_of_a_mask_update_waits_for_its_end(
    signum, whole, tmp_path, monkeypatch
) -> None:
    """Between two layers: the update and the step end, then comes the checkpoint."""
    rewrite, calls = apply_change.rewrite, [0]

    def struck(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            os.kill(os.getpid(), signum)
        return rewrite(*arguments, **options)

    with handler_of(signal.SIGINT, signal.default_int_handler), monkeypatch.context() as patch:
        patch.setattr(apply_change, "rewrite", struck)
        stopped = invoke(tmp_path)
    assert stopped.exit_code == 128 + signum and "stopped at step 3" in stopped.stderr
    resumed = invoke(tmp_path, "--resume")
    assert resumed.exit_code == 0 and "(step 3)" in resumed.stdout
    assert same(tmp_path / "r", whole)


def test_measured_costs_are_the_checkpoints_from_the_start(tmp_path, monkeypatch) -> None:
    """With those of another measurement the pattern would be above its budget, and be refused."""
    words = ("--distribution", "er", "--cost", "time", "--cost-budget", "0.11")
    costs = {"1": 1.0, "3": 1.0, "5": 1e-3}
    monkeypatch.setattr(contenders, "time_per_weight", lambda model, example: dict(costs))
    with handler_of(signal.SIGINT, signal.default_int_handler), monkeypatch.context() as patch:
        at_call(patch, "step", 2, lambda self: os.kill(os.getpid(), signal.SIGINT))
        stopped = invoke(tmp_path, *words)
    assert stopped.exit_code == 130, stopped.output
    costs["5"] = 1e3
    assert "above cost_budget" in invoke(tmp_path / "other", *words).stderr
    resumed = invoke(tmp_path, *words, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert outcome(tmp_path / "r")["sparse-masks"]["costs"]["5"] == 1e-3


def test_a_signal_that_the_shell_ignores_stays_ignored() -> None:
    with handler_of(signal.SIGINT, signal.SIG_IGN), StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signum is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def crash_at(step: int, folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """A run with a checkpoint after every step that dies in step `step`."""

    def fail(self: contenders.Contender) -> None:
        raise OSError("the machine is gone")

    with monkeypatch.context() as patch:
        at_call(patch, "step", step, fail)
        assert "machine is gone" in invoke(folder, "--checkpoint-every", "1", *words).output


def test_a_broken_checkpoint_is_passed_over(whole, tmp_path, monkeypatch) -> None:
    crash_at(6, tmp_path, monkeypatch)
    kept = checkpoint_files.checkpoint_folders(tmp_path / "r" / "checkpoints")
    assert [path.name for path in kept] == ["000005-step5", "000004-step4", "000003-step3"]
    content = (kept[0] / "sparse-model.safetensors").read_bytes()
    (kept[0] / "sparse-model.safetensors").write_bytes(content[:-9])
    resumed = invoke(tmp_path, "--resume")
    assert resumed.exit_code == 0 and "truncated" in resumed.stdout and "(step 4)" in resumed.stdout
    assert same(tmp_path / "r", whole)
    for path in checkpoint_files.checkpoint_folders(tmp_path / "r" / "checkpoints"):
        (path / "state.json").write_text("{}")
    refused = invoke(tmp_path, "--resume")
    assert refused.exit_code == 1 and "none of the" in refused.stderr


def test_another_directory_and_its_misuse(whole, tmp_path, monkeypatch) -> None:
    place = ["--checkpoint-dir", str(tmp_path / "kept")]
    crash_at(3, tmp_path, monkeypatch, *place, "--keep", "1")
    assert len(list((tmp_path / "kept").glob("*-step*"))) == 1
    again = invoke(tmp_path, *place)
    assert again.exit_code == 1 and "add --resume" in again.stderr
    other = invoke(tmp_path, *place, "--resume", "--lr", "0.2")
    assert other.exit_code == 1 and "--lr 0.1 -> 0.2" in other.stderr
    resumed = invoke(tmp_path, *place, "--resume")
    assert resumed.exit_code == 0 and (tmp_path / "r" / "results.json").is_file()
    newest = checkpoint_files.checkpoint_folders(tmp_path / "kept")[0]
    (tmp_path / "r" / "checkpoints").mkdir()
    newest.rename(tmp_path / "r" / "checkpoints" / newest.name)
    assert same(tmp_path / "r", whole)
    ended = invoke(tmp_path, "--resume")  # nothing is left to train: the report is made again
    assert ended.exit_code == 0 and "test accuracy" in ended.stdout


def test_resume_without_a_checkpoint_starts_and_a_foreign_one_is_named(tmp_path) -> None:
    first = invoke(tmp_path, "--resume", "--max-steps", "2")
    assert first.exit_code == 0 and "starting from the beginning" in first.stdout
    save_checkpoint(tmp_path / "foreign", 1, make_model())
    words = ["--resume", "--checkpoint-dir", str(tmp_path / "foreign")]
    foreign = invoke(tmp_path, *words)
    assert foreign.exit_code == 1 and "no checkpoint of `sparse-kernels train`" in foreign.stderr


def test_impossible_settings(tmp_path) -> None:
    for words in (("--keep", "0"), ("--checkpoint-every", "0")):
        refused = invoke(tmp_path, *words)
        assert refused.exit_code == 1 and f"{words[0]}: expected" in refused.stderr


# ---- NaN and infinity --------------------------------------------------------------------------


def spoil(entry: float, layer: int, what: str) -> Any:
    """Put `entry` into the weights, or through a hook into the gradient, of a sparse layer."""

    def action(self: contenders.Contender) -> None:
        module = [m for m in self.model.modules() if isinstance(m, SparseLayer)][layer]
        if what == "weights":
            module.values.data.view(-1)[0] = entry
        else:
            module.bias.register_hook(lambda grad: grad.fill_(entry))

    return action


@pytest.mark.parametrize("entry", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("what", ["weights", "gradient"])
def test_numbers_that_are_none_stop_the_run_and_name_step_and_layer(
    entry, what, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(contenders, "GRADIENT_CHECK_EVERY", 1)
    at_call(monkeypatch, "step", 4, spoil(entry, 1, what))
    failed = invoke(tmp_path, "--checkpoint-every", "2")
    message = failed.stderr.splitlines()[-1]
    assert failed.exit_code == 1 and "step 4" in message and "Traceback" not in failed.output
    assert f"the {what} of layer 'fc2'" in message or f"the {what} of layer '3'" in message
    assert "last good checkpoint is" in message and "step2" in message
    state = checkpoint_files.read(
        checkpoint_files.checkpoint_folders(tmp_path / "r" / "checkpoints")[0]
    ).state
    assert all(t.isfinite().all() for t in state["sparse-model"].values())


def test_bad_weights_are_never_saved(tmp_path, monkeypatch) -> None:
    """A weight that no later number depends on would slip through the check of the loss."""
    after = contenders.Contender.step

    def step(self: contenders.Contender, *batch: Any) -> float:
        value = after(self, *batch)
        if self.steps_done == 4:
            spoil(float("nan"), 0, "weights")(self)
        return value

    monkeypatch.setattr(contenders.Contender, "step", step)
    failed = invoke(tmp_path, "--checkpoint-every", "2")
    assert failed.exit_code == 1 and "after step 4 the weights of layer" in failed.stderr
    names = [p.name for p in (tmp_path / "r" / "checkpoints").glob("*-step*")]
    assert names == ["000001-step2"]


def test_the_first_layer_whose_output_is_bad_is_named() -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.5), torch.nn.Linear(3, 2)
    )
    x = torch.full((4, 3), 1e30)
    with torch.no_grad():
        model[3].weight.fill_(1e38)
        model[1].weight.fill_(10)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    text = finite.explain(model, lambda: model(x))
    assert text.startswith("layer ") and "first whose output is not finite" in text
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(generator, torch.get_rng_state())
    assert finite.bad_activation(model, lambda: model(torch.zeros(4, 3))) is None
    bad = torch.full((4, 3), float("nan"))
    assert "holds NaN or infinity already" in finite.explain(model, lambda: model(bad))


def test_large_gradients_are_not_infinite_ones() -> None:
    model = torch.nn.Linear(3, 2)
    assert finite.gradients_finite(model)  # none there yet
    for entry, expected in (
        (1.0, True),
        (3e38, True),
        (float("inf"), False),
        (float("nan"), False),
    ):
        model.weight.grad = torch.full((2, 3), entry)
        model.bias.grad = torch.zeros(2)
        assert finite.gradients_finite(model) is expected
        assert finite.bad_gradients(torch.nn.Sequential(model)) == ([] if expected else ["0"])


def test_the_accuracy_of_an_epoch_is_that_before_its_mask_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates: list[int] = []
    real = contenders.Contender.accuracy

    def accuracy(net: contenders.Contender, batches: Any) -> float:
        assert net.masking is not None
        updates.append(len(net.masking.history))
        return real(net, batches)

    monkeypatch.setattr(contenders.Contender, "accuracy", accuracy)
    assert invoke(tmp_path, "--epochs", "3", "--update-every", "4").exit_code == 0
    assert updates == [0, 1, 2, 2]  # held-out data after each epoch, the test set at the end
    updates.clear()  # stopped where an update is due: both are of the net before it
    assert invoke(tmp_path, "--epochs", "3", "--max-steps", "6").exit_code == 0
    assert updates == [1, 1, 1]
