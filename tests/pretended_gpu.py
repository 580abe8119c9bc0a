"""A GPU that is not there: tensors that say they are on it, and refuse what a real one would.

Each operation is computed on the CPU. What is on the pretended GPU cannot be turned into NumPy, nor
meet a tensor of the CPU with more than one value, so code that mixes devices fails as it would on a
GPU. Mixed precision is that of the CPU, with the same types. Speed, memory and kernels are not
tested, nor what is made on the CPU like a tensor of the GPU. Inside `with pretended_gpu():` torch
is changed; nothing of the real GPU, if there is one, may be in use.
"""

from contextlib import contextmanager, ExitStack
import runpy
import sys
from types import SimpleNamespace
from unittest import mock

from accelerate.state import AcceleratorState
import torch
from torch import Tensor
import torch._dynamo  # loaded later, it would find what is put in place of torch's own
from torch.utils._python_dispatch import return_and_correct_aliasing, TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)
MEMORY = 16 * 10**9
MOVES = {aten._to_copy.default, aten.copy_.default, aten._foreach_copy_.default}
INDEXED = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
JOINED = {aten.cat.default, aten.stack.default}


class OnGpu(Tensor):
    """A tensor `held` on the CPU that says it is on the GPU.

    To C++ it is on the CPU, so that nothing there looks for a driver.
    """

    @staticmethod
    def __new__(cls, held: Tensor):
        options = dict(strides=held.stride(), storage_offset=held.storage_offset())
        options |= dict(dtype=held.dtype, layout=held.layout, device="cpu")
        return Tensor._make_wrapper_subclass(cls, held.size(), **options)

    def __init__(self, held: Tensor):
        self.held = held

    def __repr__(self):
        return f"OnGpu({self.held})"

    def __reduce_ex__(self, protocol):
        return self.held.__reduce_ex__(protocol)

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def tolist(self):
        return self.held.tolist()

    def numpy(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy; .cpu() comes first")

    __array__ = numpy

    def cpu(self, *_, **__):
        return self.to("cpu")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class Watch(TorchDispatchMode):
    """Sees what is made on the GPU out of nothing, too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def check_devices(func, args, leaves) -> None:
    """Raises RuntimeError where an operation meets tensors of GPU and CPU, as torch does.

    Single values of the CPU go with anything but what is joined or written, and so do indices.
    """
    ours = [value for value in leaves if isinstance(value, OnGpu)]
    others = [value for value in leaves if not isinstance(value, OnGpu)]
    if func not in JOINED:
        written = zip(func._schema.arguments, args, strict=False)
        written = [v for a, v in written if a.alias_info and a.alias_info.is_write]
        others = [v for v in others if v.dim() or any(v is w for w in tree_leaves(written))]
    if func in INDEXED:
        if ours and not isinstance(args[0], OnGpu):
            raise RuntimeError(f"{func}: a tensor of the CPU with indices of the GPU")
        others = [value for value in others if not any(value is index for index in args[1])]
    if ours and others and func not in MOVES:
        shapes = [[tuple(value.shape) for value in side] for side in (ours, others)]
        raise RuntimeError(f"{func}: shapes on the GPU {shapes[0]}, on the CPU {shapes[1]}")


def compute(func, args, kwargs):
    """Computes an operation on the CPU; says that the result is where it would be."""
    leaves = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    check_devices(func, args, leaves)
    on_gpu = any(isinstance(value, OnGpu) for value in leaves)
    asked, kwargs = kwargs.get("device"), dict(kwargs)
    if asked is not None:
        # C++ asks for the CPU where it means the place of its input, also on the way back.
        backward = torch._C._current_autograd_node() is not None and not leaves
        on_gpu = on_gpu or backward or torch.device(asked).type == "cuda"
        kwargs["device"] = torch.device("cpu")
    elif func in MOVES:
        on_gpu = isinstance(tree_leaves(args[0])[0], OnGpu)
    plain = tree_map(lambda value: getattr(value, "held", value), (args, kwargs))
    made = func(*plain[0], **plain[1])
    if not on_gpu:
        return made
    made = tree_map(lambda v: OnGpu(v) if type(v) is Tensor else v, made)
    return return_and_correct_aliasing(func, args, kwargs, made) if leaves else made


# What torch would ask the driver


plain_to = Tensor.to


def moved(self, *args, **kwargs):
    """`Tensor.to`."""
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    kwargs.pop("copy", None)
    device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
    options = {"dtype": dtype, "memory_format": layout}
    options = {name: value for name, value in options.items() if value is not None}
    if device is None or device.type == self.device.type:
        return plain_to(self, **options) if options else self
    if device.type == "cuda":
        return aten._to_copy(self, device=DEVICE, **options)
    return plain_to(self.held, device, **options)


def made_there(make):
    """`torch.tensor` and its like: made on the CPU, then moved."""

    def call(*args, device=None, **kwargs):
        made = make(*args, **kwargs)
        return made if device is None else made.to(device)

    return call


def new_tensor(self, data, **kwargs):
    """`Tensor.new_tensor`."""
    return torch.tensor(data, **(dict(device=self.device, dtype=self.dtype) | kwargs))


class CpuAutocast(torch.autocast):
    """Mixed precision of the CPU in place of the GPU's."""

    def __init__(self, device_type, *args, **kwargs):
        super().__init__("cpu", *args, **kwargs)


class CpuGenerator(torch.Generator):
    """A generator of the GPU's random numbers, on the CPU."""

    def __new__(cls, device=None):
        return super().__new__(cls)


def nothing(*_, **__) -> None:
    """Takes the place of what only a driver could do."""


ANSWERS = {
    torch.cuda: dict(
        is_available=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        _lazy_init=nothing,
        synchronize=nothing,
        empty_cache=nothing,
        set_device=nothing,
        manual_seed_all=nothing,
        get_rng_state=lambda *_: torch.zeros(1),
        set_rng_state=nothing,
        is_bf16_supported=lambda *_, **__: False,  # a T4 has none
        max_memory_allocated=lambda *_: 10**9,
        mem_get_info=lambda *_: (MEMORY, MEMORY),
        get_device_properties=lambda *_: SimpleNamespace(
            total_memory=MEMORY, name="pretended", major=7, minor=5
        ),
        reset_peak_memory_stats=nothing,
        set_per_process_memory_fraction=nothing,
    ),
    torch.accelerator: dict(current_device_index=lambda: 0, set_device_index=nothing),
    torch.optim.Optimizer: dict(_accelerator_graph_capture_health_check=nothing),
    torch: dict(
        autocast=CpuAutocast,
        Generator=CpuGenerator,
        tensor=made_there(torch.tensor),
        as_tensor=made_there(torch.as_tensor),
    ),
    torch.amp: dict(autocast=CpuAutocast),
    Tensor: dict(to=moved, new_tensor=new_tensor, pin_memory=lambda self, *_: self),
}


@contextmanager
def pretended_gpu():
    """Inside, torch finds one GPU with fp16 and without bf16, as a T4 is."""
    with ExitStack() as stack:
        for place, answers in ANSWERS.items():
            for name, answer in answers.items():
                if hasattr(place, name):  # versions of torch differ
                    stack.enter_context(mock.patch.object(place, name, answer))
        swap = torch.__future__.set_swap_module_params_on_conversion
        swap(True)  # a module's parameters become tensors of another class when it is moved
        stack.callback(swap, False)
        stack.callback(AcceleratorState._reset_state, reset_partial_state=True)
        stack.enter_context(Watch())
        yield


if __name__ == "__main__":
    with pretended_gpu():
        runpy.run_module(sys.argv[1], run_name="__main__")
