"""sparsify and densify on whole models: what is replaced, what is skipped and why."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from sparsify_support import actions, compare, masked_twin
from torch import nn

from sparse_kernels import nn as snn
from sparse_kernels.nn import SparseConv2d, SparseLinear, densify, sparsify


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 5)
    )


def convnet() -> nn.Sequential:
    features = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 24, 3, padding=1, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.AvgPool2d(2),
    )
    head = nn.Sequential(nn.Linear(24 * 4, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
    return nn.Sequential(features, nn.Flatten(), head)


@pytest.mark.parametrize("keep", ["random", "magnitude"])
@pytest.mark.parametrize("distribution", ["uniform", "erk"])
def test_convnet_equals_the_masked_dense_model_and_comes_back(distribution, keep) -> None:
    model = convnet()
    dense = copy.deepcopy(model)
    printed, keys = repr(model), list(model.state_dict())
    report = sparsify(model, density=0.2, distribution=distribution, keep=keep)
    assert actions(report) == {
        "0.0": "sparsified",
        "0.1": "replaced",
        "0.2": "fused",
        "0.3": "fused",
        "0.4": "sparsified",
        "0.5": "replaced",
        "0.6": "fused",
        "0.7": "replaced",
        "2.0": "sparsified",
        "2.1": "replaced",
        "2.2": "fused",
        "2.3": "sparsified",
    }
    masked_twin(dense, model)
    x = torch.randn(4, 3, 8, 8)
    compare(copy.deepcopy(model), copy.deepcopy(dense), x)
    compare(pickle.loads(pickle.dumps(model)), copy.deepcopy(dense), x)
    model.load_state_dict(copy.deepcopy(model).state_dict())
    assert densify(model) is model
    assert repr(model) == printed and list(model.state_dict()) == keys
    assert {type(m) for m in model.modules()} == {type(m) for m in convnet().modules()}
    compare(model, dense, x)


def test_uniform_density_is_exact_per_layer() -> None:
    model = mlp()
    report = sparsify(model, density=0.05)
    assert [row.nnz for row in report] == [60, 40, 5]
    assert report.nnz == 105 and report.numel == 2100
    assert report.density == report.overall_density == 0.05
    assert report["2"].shape == (20, 40) and report["2"].kind == "SparseLinear"
    for row in report:
        layer = model.get_submodule(row.name)
        assert layer.nnz == row.nnz and layer.density == row.density
    assert "sparsified" in str(report) and "density 0.0500" in str(report)
    with pytest.raises(KeyError, match="no row"):
        report["head"]


@pytest.mark.parametrize("density", [0.02, 0.1, 0.33, 0.8, 1.0])
@pytest.mark.parametrize("block", [(1, 1), (2, 1)])
def test_erk_total_is_exact(density, block) -> None:
    model = convnet()
    report = sparsify(model, density=density, distribution="erk", block=block)
    assert report.nnz == round(density * report.numel / block[0]) * block[0]
    assert all(row.density <= 1 for row in report)
    thin, wide = report["2.3"].density, report["0.4"].density
    assert thin > wide or density == 1.0


def test_dense_layers_are_stored_dense_masked() -> None:
    model = mlp()
    report = sparsify(model, density={"0": 0.5, "2": 0.51, "4": 1.0})
    assert [model[i].storage for i in (0, 2, 4)] == ["compressed", "dense-masked", "dense-masked"]
    assert "dense-masked" in report["4"].reason


def test_density_by_name_leaves_the_others_dense() -> None:
    model = mlp()
    report = sparsify(model, density={"0": 0.1, "4": 0.5})
    assert actions(report) == {"0": "sparsified", "2": "skipped", "4": "sparsified"}
    assert report["0"].nnz == 120 and report["4"].nnz == 50
    assert report.overall_density == (120 + 800 + 50) / 2100
    with pytest.raises(ValueError, match=r"'head'.*layers of this model: 0, 2, 4"):
        sparsify(mlp(), density={"head": 0.1})


@pytest.mark.parametrize(
    "exclude",
    ["4", ["4"], "[4]", lambda name, module: getattr(module, "out_features", 0) == 5],
)
def test_exclusion_by_name_and_callable(exclude) -> None:
    report = sparsify(mlp(), exclude=exclude)
    assert actions(report) == {"0": "sparsified", "2": "sparsified", "4": "skipped"}
    assert "excluded" in report["4"].reason


def test_exclusion_by_type_and_subtree() -> None:
    model = convnet()
    report = sparsify(model, exclude=[nn.Conv2d, "2"])
    assert {row.action for row in report} == {"skipped"}
    assert type(model[0][1]) is nn.BatchNorm2d  # nothing sparse, nothing to keep the layout for
    report = sparsify(convnet(), exclude=[nn.BatchNorm2d, nn.MaxPool2d])
    assert report["0.1"].action == report["0.3"].action == "skipped"
    assert report["2.2"].action == "fused" and "0.2" not in actions(report)
    with pytest.raises(ValueError, match="no module is called so"):
        sparsify(mlp(), exclude="classifier")
    with pytest.raises(TypeError, match="exclude takes"):
        sparsify(mlp(), exclude=[3])


# torch says so of its own dense encoder's evaluation with a padding mask.
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_attention_is_skipped_and_the_encoder_layer_stays_right() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    dense = copy.deepcopy(model)
    report = sparsify(model, density=0.3)
    assert report["layers.0.self_attn.out_proj"].action == "skipped"
    assert "MultiheadAttention" in report["layers.0.self_attn.out_proj"].reason
    assert report["layers.0.linear1"].action == "sparsified"
    masked_twin(dense, model)
    x = torch.randn(3, 5, 16)
    padding = torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 3 + [True] * 2])
    compare(model, dense, x)
    model.eval()
    dense.eval()
    # Evaluation without gradients is where torch's fused path would read linear1.weight itself.
    with torch.no_grad():
        for mask in (None, padding):
            y, expected = (m(x, src_key_padding_mask=mask) for m in (model, dense))
            keep = slice(None) if mask is None else ~mask
            torch.testing.assert_close(y[keep], expected[keep], rtol=1e-4, atol=1e-5)


def test_tied_weights_are_skipped_and_named() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.hidden = nn.Embedding(20, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 20, bias=False)
            self.head.weight = self.embedding.weight

    model = Tied()
    report = sparsify(model)
    assert actions(report) == {"hidden": "sparsified", "head": "skipped"}
    assert "embedding.weight" in report["head"].reason
    assert model.head.weight is model.embedding.weight
    alias = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    alias[1].weight.data = alias[0].weight.data
    assert {row.action for row in sparsify(alias)} == {"skipped"}


def test_module_registered_twice_is_replaced_at_both_places() -> None:
    shared = nn.Linear(6, 6)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.ReLU())})
    report = sparsify(model, density=0.5)
    assert actions(report) == {"a": "sparsified"}
    assert isinstance(model["a"], SparseLinear) and model["a"] is model["b"][0]
    densify(model)
    assert type(model["a"]) is nn.Linear and model["a"] is model["b"][0]


def _hooked(register: str) -> nn.Module:
    layer = nn.Linear(6, 6)
    getattr(layer, register)(lambda *args: None)
    return layer


def _own_forward() -> nn.Module:
    layer = nn.Linear(6, 6)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


def _weight_hook() -> nn.Module:
    layer = nn.Linear(6, 6)
    layer.weight.register_hook(lambda grad: grad)
    return layer


class Scaled(nn.Linear):
    """A subclass that computes something else."""


UNFIT: list[tuple[Any, str]] = [
    (lambda: _hooked("register_forward_hook"), "hooks"),
    (lambda: _hooked("register_forward_pre_hook"), "hooks"),
    (lambda: _hooked("register_full_backward_hook"), "hooks"),
    (_own_forward, "forward was replaced"),
    (_weight_hook, "gradient hooks"),
    (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)), "parametrized"),
    (lambda: nn.utils.spectral_norm(nn.Linear(6, 6)), "hooks"),
    (lambda: Scaled(6, 6), "Scaled is a subclass"),
    (lambda: nn.LazyLinear(6), "lazy"),
    (lambda: nn.Linear(6, 6, device="meta"), "meta"),
    (lambda: nn.Linear(6, 1), "smaller than the block: 1 x 6"),
    (lambda: nn.Conv2d(6, 6, 3, groups=6), "smaller than the block: 1 x 1"),
]


@pytest.mark.parametrize("make, reason", UNFIT)
def test_unfit_layers_are_skipped_with_the_reason(make, reason) -> None:
    model = nn.Sequential(make(), nn.Linear(6, 6))
    before = model[0]
    report = sparsify(model, block=(2, 2), density=0.5)
    assert model[0] is before and report["0"].action == "skipped"
    assert reason in report["0"].reason and report["1"].action == "sparsified"


def test_mode_dtype_bias_and_requires_grad_stay() -> None:
    model = convnet().double().eval()
    biases = [model[0][0].bias, model[2][0].bias]
    model[2][0].bias.requires_grad_(False)
    model[2][0].weight.requires_grad_(False)
    sparsify(model, density=0.3)
    assert [model[0][0].bias, model[2][0].bias] == biases
    assert model[0][0].bias is biases[0] and not model[2][0].bias.requires_grad
    assert not model[2][0].values.requires_grad and model[0][0].values.requires_grad
    assert not any(module.training for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert isinstance(model[0][4], SparseConv2d) and model[0][4].bias is None
    densify(model)
    assert model[0][0].bias is biases[0] and not model[2][0].weight.requires_grad
    assert not any(module.training for module in model.modules())


def test_generator_decides_and_weights_are_the_models_own() -> None:
    model = mlp()
    twins = [copy.deepcopy(model) for _ in range(3)]
    for twin, seed in zip(twins, (1, 1, 2), strict=True):
        sparsify(twin, density=0.2, generator=torch.Generator().manual_seed(seed))
    assert twins[0][0].pattern == twins[1][0].pattern != twins[2][0].pattern
    kept = twins[0][0].pattern.mask()
    assert torch.equal(twins[0][0].weight, model[0].weight * kept)


def test_magnitude_keeps_the_largest_weights() -> None:
    model = mlp()
    weight = model[0].weight.detach().clone()
    sparsify(model, density=0.1, keep="magnitude")
    kept = model[0].pattern.mask()
    assert weight.abs()[kept].min() >= weight.abs()[~kept].max()


def test_second_call_keeps_sparse_layers() -> None:
    model = mlp()
    sparsify(model, density=0.1, exclude="4")
    first = model[0]
    report = sparsify(model, density=0.5)
    assert actions(report) == {"0": "kept", "2": "kept", "4": "sparsified"}
    assert model[0] is first and report.nnz == 120 + 80 + 50


def test_densify_keeps_hooks_and_unfuses_norms_built_by_hand() -> None:
    norm = snn.BatchNorm2d(4)
    norm.relu = True
    model = nn.Sequential(SparseConv2d(3, 4, 3, density=0.5), norm)
    calls = []
    model[0].register_forward_hook(lambda *args: calls.append(1))
    x = torch.randn(2, 3, 6, 6)
    expected = copy.deepcopy(model)(x)
    densify(model)
    calls.clear()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5, check_stride=False)
    assert calls == [1] and type(model[1]) is nn.Sequential
    assert not any(type(m).__module__.startswith("sparse_kernels") for m in model.modules())
    assert type(densify(SparseLinear(4, 4))) is nn.Linear


def test_training_a_sparsified_model_learns() -> None:
    model = mlp()
    sparsify(model, density=0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    x, labels = torch.randn(64, 30), torch.randint(5, (64,))
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
