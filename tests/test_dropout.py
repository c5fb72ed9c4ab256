"""Dropout: the generator, the operator on every instruction set, the module in a sparse model."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from native_support import address
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_kernels import _load, layout, ops, plan
from sparse_kernels.backends import _reference_dropout as definition
from sparse_kernels.nn import Dropout, densify, sparsify

_native = _load.native()
SHARE = 64 * 256  # elements that a thread takes at a time
STREAMED = (12 << 18) + 512  # elements from which on the kernel writes past the cache
MANY = 64 * 13 * 62 * 62
CPU = torch.device("cpu")
SEEDS = (0, 1, 2**32, 2**63 - 1, -1, 0x1234_5678_9ABC_DEF0)


@pytest.fixture(params=_native.supported_isas())
def native(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The module, using one instruction set after the other."""
    before = _native.isa()
    _native.set_isa(request.param)
    yield _native
    _native.set_isa(before)


def noise(count: int, seed: int, p: float) -> Tensor:
    """float32 [count]: 0 or 1 / (1 - p), from the reference's words."""
    words = long_words(seed) if count > 4096 else definition.words(count, seed, CPU)
    kept = words[:count] >= round(p * 2**32) - 2**31
    return kept.float() * (1 / (1 - p))


@functools.cache
def long_words(seed: int) -> Tensor:
    """Enough words for every test; an element's word does not depend on how many there are."""
    return definition.words(MANY, seed, CPU)


def as_laid_out(x: Tensor) -> dict[str, Tensor]:
    """The same numbers in several orders of memory."""
    n, c, h, w = x.shape
    gaps = x.new_zeros(n, c, h, 2 * w)[..., ::2].copy_(x)
    return {
        "contiguous": x,
        "feature-major": layout.to_feature_major(x),
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "permuted": x.permute(1, 3, 2, 0).contiguous().permute(3, 0, 2, 1),
        "gaps": gaps,
        "expanded": x[:, :, :1].expand(n, c, h, w),
    }


# -- the generator -------------------------------------------------------------------------------


def philox_by_hand(counter: int, seed: int, rounds: int) -> list[int]:
    """One counter's four words, in Python's integers."""
    low = 2**32 - 1
    c = [counter & low, counter >> 32, 0, 0]
    k = [seed & low, (seed >> 32) & low]
    for _ in range(rounds):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & low, (a >> 32) ^ c[3] ^ k[1], a & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return c


def test_philox_gives_the_published_words() -> None:
    """Of counter 0 and key 0: the known answers that come with the authors' library, Random123."""
    published = {
        7: [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48],
        10: [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
    }
    for rounds, expected in published.items():
        assert definition.philox(torch.zeros(1, dtype=torch.int64), 0, rounds)[:, 0].tolist() == (
            expected
        )
        assert philox_by_hand(0, 0, rounds) == expected
    for seed in SEEDS:
        for counter in (0, 1, 77, 2**32 - 1, 2**32, 2**40 + 5):
            found = definition.philox(torch.tensor([counter]), seed)[:, 0].tolist()
            assert found == philox_by_hand(counter, seed, 7)


def test_words_of_a_block_lie_as_documented() -> None:
    placed = definition.words(600, 9, CPU) & (2**32 - 1)
    assert torch.equal(definition.words(300, 9, CPU) & (2**32 - 1), placed[:300])
    for element in (0, 1, 2, 127, 128, 129, 255, 256, 300, 511, 599):
        block, place = divmod(element, 256)
        half, rest = divmod(place, 128)
        by_hand = philox_by_hand(64 * block + rest // 2, 9, 7)[2 * half + rest % 2]
        assert placed[element] == by_hand


# -- the kernel ----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 7, 255, 256, 257, SHARE, 3 * SHARE + 77, STREAMED])
def test_kernel_equals_the_definition_to_the_bit(native: Any, count: int) -> None:
    x = torch.randn(count)
    for seed, p in ((SEEDS[-1], 0.3), (SEEDS[-1], 0.999), (-1, 0.5)):
        expected = x * noise(count, seed, p)
        for threads in (1, 2, 5):
            y = torch.full((count + 1,), 7.0)
            native.dropout(address(y), address(x), count, seed, p, threads)
            assert torch.equal(y[:-1], expected) and y[-1] == 7.0


def test_kernel_writes_to_addresses_that_no_vector_is_aligned_to(native: Any) -> None:
    x, y = torch.randn(STREAMED + 1), torch.zeros(STREAMED + 1)
    native.dropout(address(y[1:]), address(x[1:]), STREAMED, -1, 0.5, 2)
    assert torch.equal(y[1:], x[1:] * noise(STREAMED, -1, 0.5)) and y[0] == 0


def test_kernel_at_the_ends_of_p_and_its_refusals(native: Any) -> None:
    x = torch.randn(1000)
    y = torch.empty(1000)
    for p, factor in ((0.0, 1.0), (1.0, 0.0), (1 - 2**-40, None)):
        native.dropout(address(y), address(x), 1000, 5, p, 1)
        assert torch.equal(y, x * (0.0 if factor is None else factor))
    for arguments, message in (
        ((0, address(x), 5, 0, 0.5, 1), "dropout: y must not be null"),
        ((address(y), address(x), -1, 0, 0.5, 1), "count must be at least 0, got -1"),
        ((address(y), address(x), 5, 0, 1.5, 1), "p must be between 0 and 1, got 1.5"),
        ((address(y), address(x), 5, 0, float("nan"), 1), "p must be between 0 and 1"),
        ((address(y), address(x), 5, 0, 0.5, 0), "threads must be between 1"),
    ):
        with pytest.raises(ValueError, match=message):
            native.dropout(*arguments)


# -- statistics, with fixed seeds ----------------------------------------------------------------


@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.9])
def test_rate_and_independence(p: float) -> None:
    """Within 5 standard deviations: the rate, and pairs of elements, near, far and across calls."""
    count = 1 << 20
    dropped = [ops.dropout(torch.ones(count), p) == 0 for _ in range(2)]
    sequential = [ops.dropout(torch.ones(count), p, seed=torch.tensor(s)) == 0 for s in (7, 8)]
    for mask in (*dropped, *sequential):
        assert abs(mask.double().mean() - p) < 5 * (p * (1 - p) / count) ** 0.5
    spread = (1 / count) ** 0.5  # of a correlation of independent masks
    pairs = [dropped, sequential]
    pairs += [[dropped[0], dropped[0].roll(k)] for k in (1, 2, 3, 128, 256, 1000, SHARE)]
    for one, other in pairs:
        a, b = (mask.double() - p for mask in (one, other))
        assert abs((a * b).mean() / (p * (1 - p))) < 5 * spread


def test_each_bit_of_the_words_is_fair() -> None:
    placed = definition.words(1 << 16, 11, CPU)
    for bit in range(32):
        ones = ((placed >> bit) & 1).double().mean()
        assert abs(ones - 0.5) < 5 * 0.5 / (1 << 16) ** 0.5


# -- the operator --------------------------------------------------------------------------------


def test_operator_equals_the_reference_in_every_layout() -> None:
    seed = torch.tensor(123)
    for x in as_laid_out(torch.randn(6, 5, 3, 4)).values():
        y = ops.dropout(x, 0.4, seed=seed)
        assert y.stride() == F.dropout(x, 0.4).stride() and y.shape == x.shape
        with plan.use_backend("reference"):
            assert torch.equal(y, ops.dropout(x, 0.4, seed=seed))
        storage_order = torch.as_strided(y, (y.numel(),), (1,))
        assert torch.equal(storage_order != 0, noise(y.numel(), 123, 0.4) != 0)
    vector = torch.randn(9)
    assert torch.equal(ops.dropout(vector, 0.4, seed=seed), vector * noise(9, 123, 0.4))
    assert ops.dropout(torch.tensor(2.0), 0.5).item() in (0.0, 4.0)
    assert ops.dropout(torch.zeros(0, 3)).shape == (0, 3)


def test_backward_draws_the_same_mask_whatever_the_layouts() -> None:
    torch.manual_seed(1)
    for x in as_laid_out(torch.randn(6, 5, 3, 4)).values():
        for grad in as_laid_out(torch.randn(6, 5, 3, 4)).values():
            leaf = x.detach().requires_grad_()
            factors = ops.dropout(torch.ones_like(leaf), 0.3, seed=torch.tensor(4))
            y = ops.dropout(leaf, 0.3, seed=torch.tensor(4))
            y.backward(grad)
            assert torch.equal(y, x * factors) and torch.equal(leaf.grad, grad * factors)


def test_gradients_of_first_and_second_order() -> None:
    x = torch.randn(3, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    fixed = torch.tensor(99)

    def function(t: Tensor) -> Tensor:
        return ops.dropout(t, 0.4, seed=fixed)

    assert torch.autograd.gradcheck(function, (x,))
    assert torch.autograd.gradgradcheck(function, (x,))


def test_large_tensors_on_several_threads_equal_one_thread() -> None:
    x = layout.to_feature_major(torch.randn(64, 13, 62, 62))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(ops.dropout(x, 0.3, seed=torch.tensor(-1)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert torch.equal(found[0].permute(1, 2, 3, 0).flatten() != 0, noise(x.numel(), -1, 0.3) != 0)


def test_only_the_seed_is_kept() -> None:
    kept: list[Tensor] = []
    x = torch.randn(8, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.dropout(x, 0.3)
    assert [t.shape for t in kept] == [()]


def test_dropped_nan_and_infinity_are_what_torch_makes_of_them() -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -2.0]).repeat(100)
    y, theirs = ops.dropout(x, 0.5), F.dropout(x, 0.5)
    assert y[::4].isnan().all() and theirs[::4].isnan().all()
    for k in (1, 2):
        kinds = [set(map(str, t[k::4].tolist())) for t in (y, theirs)]
        assert kinds[0] == kinds[1] and "nan" in kinds[0]
    assert set(map(str, y[3::4].tolist())) == {"-0.0", "-4.0"}
    assert torch.equal(ops.dropout(x, 1.0).isnan(), F.dropout(x, 1.0).isnan())


def test_torchs_seed_decides_and_one_number_is_drawn_per_call() -> None:
    x = torch.ones(5000)
    torch.manual_seed(3)
    first, second = ops.dropout(x), ops.dropout(x)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    assert torch.equal(first, ops.dropout(x)) and not torch.equal(first, second)
    torch.manual_seed(3)
    torch.randint(2**63 - 1, (2,))
    assert torch.equal(after, torch.get_rng_state())


def test_identity_costs_no_number() -> None:
    x = torch.randn(5)
    before = torch.get_rng_state()
    assert ops.dropout(x, 0.0) is x and ops.dropout(x, 0.5, training=False) is x
    assert torch.equal(before, torch.get_rng_state())


def test_other_dtypes_are_computed_too() -> None:
    seed = torch.tensor(5)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        x = torch.randn(6, 7).to(dtype)
        y = ops.dropout(x, 0.5, seed=seed)
        assert y.dtype == dtype and torch.equal(y, x * noise(42, 5, 0.5).view(6, 7).to(dtype))


def test_errors_name_both_sides() -> None:
    x, seed = torch.randn(4, 3), torch.tensor(1)
    dropout = torch.ops.sparse_kernels.dropout
    for p in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="p must be between 0 and 1, got"):
            ops.dropout(x, p)
    with pytest.raises(TypeError, match="must be floating point, got torch.int64"):
        ops.dropout(torch.ones(3, dtype=torch.int64), 0.0)
    with pytest.raises(ValueError, match="seed must be one int64 number of shape"):
        ops.dropout(x, seed=torch.tensor([1]))
    with pytest.raises(ValueError, match="seed must be on the input's device cpu, got meta"):
        ops.dropout(x, seed=seed.to("meta"))
    for stride in ([3], [4, 1], [1, 3], [0, 1], [-1, 4]):
        with pytest.raises(ValueError, match="without gaps"):
            dropout(x, seed, 0.5, stride)
    assert ops.dropout(x.to("meta")).is_meta


# -- compiled, checkpointed ----------------------------------------------------------------------


# Dynamo itself instantiates torch.autograd.Function while it traces one.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_equals_eager_for_a_seed(dynamic: bool) -> None:
    torch._dynamo.reset()
    module = Dropout(0.4)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in ((6, 5, 4, 4), (8, 5, 3, 4)):
        x = layout.to_feature_major(torch.randn(shape)).requires_grad_()
        results = []
        for function in (module, compiled):
            torch.manual_seed(8)
            y = function(x)
            (grad,) = torch.autograd.grad(y.sum(), x)
            assert torch.equal(y, x * grad) and 0 < (y == 0).sum() < y.numel()
            results.append((y, y.stride()))
        assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]


def test_a_checkpointed_block_draws_the_same_mask_again() -> None:
    block = nn.Sequential(nn.Linear(20, 30), Dropout(0.5), nn.Linear(30, 4))
    x = torch.randn(7, 20, requires_grad=True)
    grads = []
    for again in (False, True):
        torch.manual_seed(2)
        y = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) if again else block(x)
        grads.append(torch.autograd.grad(y.sum(), x)[0])
    assert torch.equal(*grads)


# -- the module ----------------------------------------------------------------------------------


def test_module_is_a_drop_in() -> None:
    x = layout.to_feature_major(torch.randn(8, 4, 5, 6))
    module = Dropout(0.25)
    assert repr(module) == repr(nn.Dropout(0.25)) and not module.state_dict()
    y = module(x)
    assert y.stride() == x.stride() and torch.equal(y[y != 0], (x * (1 / 0.75))[y != 0])
    assert module.eval()(x) is x
    assert torch.equal(Dropout(1.0)(x), torch.zeros_like(x)) and Dropout(0.0)(x) is x
    torch.manual_seed(0)
    wide = Dropout(0.25)(x.double())
    torch.manual_seed(0)
    assert torch.equal(wide, F.dropout(x.double(), 0.25))
    with pytest.raises(ValueError, match="between 0 and 1"):
        Dropout(2.0)


def test_module_in_place() -> None:
    x = torch.randn(300)
    leaf = torch.ones(300, requires_grad=True)
    hidden = leaf * x
    y = Dropout(0.5, inplace=True)(hidden)
    assert y.data_ptr() == hidden.data_ptr() and torch.equal(y, hidden) and (y == 0).any()
    y.sum().backward()
    assert torch.equal(leaf.grad, y.detach())
    assert Dropout(0.0, inplace=True)(x) is x


class Own(nn.Dropout):
    """A subclass, which sparsify leaves alone."""


def test_sparsify_replaces_and_densify_gives_back() -> None:
    model = nn.Sequential(
        nn.Linear(16, 32), nn.Dropout(0.5), nn.Linear(32, 8), Own(0.1), nn.Dropout2d(), nn.Dropout()
    )
    model[5].eval()
    before, objects = copy.deepcopy(model).state_dict().keys(), list(model)
    report = sparsify(model, density=0.5, exclude="5")
    assert type(model[1]) is Dropout and model[1] is objects[1] and model[1].p == 0.5
    assert type(model[3]) is Own and type(model[4]) is nn.Dropout2d
    assert type(model[5]) is nn.Dropout
    assert (report["1"].action, report["1"].kind) == ("replaced", "Dropout")
    assert report["1"].reason == "random numbers of its own"
    assert report["5"].action == "skipped"
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    assert type(torch.load(saved, weights_only=False)[1]) is Dropout
    x = torch.randn(64, 16)
    torch.manual_seed(6)
    y = model[:2](x)
    torch.manual_seed(6)
    assert torch.equal(y, ops.dropout(model[0](x), 0.5))
    other = nn.Sequential(nn.Linear(16, 32), nn.Dropout())
    report = sparsify(other, density=0.5, exclude=nn.Dropout)
    assert type(other[1]) is nn.Dropout and report["1"].reason == "excluded by type Dropout"
    densify(model)
    assert type(model[1]) is nn.Dropout and model[1] is objects[1]
    assert model.state_dict().keys() == before


def test_a_sparse_net_learns_through_dropout_and_evaluates_without() -> None:
    model = nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Dropout(0.2), nn.Linear(40, 2))
    sparsify(model, density=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    x = torch.randn(256, 12)
    label = (x[:, 0] > 0).long()
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(x), label).backward()
        optimizer.step()
    model.eval()
    assert (model(x).argmax(1) == label).double().mean() > 0.9
    assert torch.equal(model(x), model(x))
