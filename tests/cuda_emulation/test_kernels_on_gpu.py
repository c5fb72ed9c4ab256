"""Every case of the emulated tests once more on a GPU, by the kernels that nvcc compiled: what
emulation shows of the sources is to hold for them.
"""

from __future__ import annotations

import pytest
import torch
from emulator import address
from problems import DTYPES, KERNELS, Problem, all_cases, answer, check, describe, has

from sparse_kernels._load import native, native_or_none

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU on this machine"),
]


@pytest.fixture(autouse=True)
def built() -> None:
    module = native_or_none()
    if module is None or not module.build_info()["cuda"]:
        pytest.skip("the native module was built without CUDA: Triton serves the GPU alone")
    if why := module.cuda_unusable(torch.cuda.current_device()):
        pytest.skip(why)


def on_gpu(p: Problem, kernel: str) -> torch.Tensor:
    """The GPU's answer, in the reference's order of dimensions."""
    module, device = native(), torch.cuda.current_device()
    call = describe(p, kernel, module.cuda_wgrad_workspace, device)
    placed = {name: None if t is None else t.cuda() for name, t in call.tensors.items()}
    stream = torch.cuda.current_stream().cuda_stream
    order = None if call.order is None else call.order.cuda()
    last = (*call.variant, *(() if order is None else (address(order),)))
    arguments = (*map(address, placed.values()), *call.rest[:-1], stream, *last)
    getattr(module, call.function)(kernel, *arguments)
    torch.cuda.synchronize()
    back = {name: None if t is None else t.cpu() for name, t in placed.items()}
    return answer(call._replace(tensors=back))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_kernel_matches_float64(dtype: torch.dtype, kernel: str) -> None:
    wrong = []
    for case in all_cases():
        if not has(case, dtype, kernel):
            continue
        try:
            check(case, dtype, kernel, on_gpu)
        except AssertionError as error:
            wrong.append(str(error))
    assert not wrong, "\n".join(wrong)
