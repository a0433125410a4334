"""Why a call, or a layer as it is now, is stock's: every refusal is a sentence that ``explain`` prints.

What has changed since ``fuse`` is refused in :mod:`fused_resnet.blocks.guards`, what is no chain in
:mod:`fused_resnet.surgery.rules`, what a trace cannot show in :mod:`fused_resnet.tracing`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from fused_resnet.blocks.activations import MODULES as ACTIVATIONS
from fused_resnet.blocks.activations import act_of_module
from fused_resnet.blocks.layers import (
    CONVOLUTIONS,
    child,
    is_batch_norm,
    is_inert,
    padding_of,
    pair,
)
from fused_resnet.blocks.plan import Path
from fused_resnet.blocks.subclasses import layer_class

NO_PLAN = "its forward is fused in the other mode only"


def why_not_input(x: Any, training: bool, takes_list: bool = False) -> str:
    """Return why a call with this first argument cannot be fused at all; asked before a module is read.

    With ``takes_list`` it is a list of tensors.
    """
    compiling = torch.compiler.is_compiling()
    for tensor in x if takes_list else (x,):
        if not isinstance(tensor, Tensor) or not (compiling or type(tensor) is Tensor):
            return f"the last call had a {type(tensor).__name__}, not a torch.Tensor"
        if tensor.device.type == "meta":
            return "the last call had a tensor without data"
    if not compiling and (_has_any_global_hook() or _has_function_mode()):
        return "a global module hook or a TorchFunctionMode sees every call"
    exporting = compiling and torch.compiler.is_exporting()
    if torch._C._get_tracing_state() or (exporting and (not training or torch.onnx.is_in_onnx_export())):
        return "what is traced, or exported for inference or to ONNX, is plain PyTorch"
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "the last call was inside a torch.func transform or forward-mode differentiation"
    return ""


def _has_function_mode() -> bool:
    """Whether a TorchFunctionMode looks at every call of torch; a device given to new tensors is none to us."""
    return bool(torch._C._len_torch_function_stack()) and any(
        type(mode) is not DeviceContext for mode in _get_current_function_mode_stack()
    )


def why_not_plain(module: Any, path: Path) -> str | None:
    """Return what else than its class's forward runs where a layer is called, or None."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"{'.'.join(path)} has a hook"
    # what hides a method of the layer's class
    own = module.__dict__
    if "forward" in own or "_conv_forward" in own or "_check_input_dim" in own or "_call_impl" in own:
        return f"{'.'.join(path)} has a forward of its own"
    return None


def why_not_type(module: nn.Module, cls: type, path: Path) -> str | None:
    """Return that a layer is of another class than ``cls``, or None."""
    return None if type(module) is cls else f"{'.'.join(path)} is a {type(module).__name__}, not a {cls.__name__}"


def why_not_conv(conv: Any, path: Path) -> str | None:
    """Return why a chain cannot run a convolution, or None."""
    dims = CONVOLUTIONS.get(layer_class(conv))
    if dims is None:
        return why_not_type(conv, nn.Conv2d, path)
    if conv.padding_mode != "zeros" or padding_of(conv, dims) is None:
        return f"{'.'.join(path)} has padding={conv.padding!r}, padding_mode={conv.padding_mode!r}"
    return None


def why_not_norm(norm: Any, path: Path) -> str | None:
    """Return why the kernels do not know a norm, or None."""
    return None if is_batch_norm(norm) else why_not_type(norm, nn.BatchNorm2d, path)


def why_not_act(act: nn.Module, path: Path) -> str | None:
    """Return why the kernels do not know an activation, or None."""
    if act_of_module(act) is not None:
        return None
    known = ", ".join(cls.__name__ for cls in ACTIVATIONS)
    return f"{'.'.join(path)} is a {type(act).__name__}, not one of {known}"


def why_not_inert(module: nn.Module, path: Path) -> str | None:
    """Return why a module that was left out of a forward may do something now, or None."""
    try:
        inert = child(module, path)
    except AttributeError:
        return f"{'.'.join(path)} is gone"
    if reason := why_not_plain(inert, path):
        return reason
    if is_inert(inert):
        return None
    return f"{'.'.join(path)} is a {type(inert).__name__}" + (" that drops" if isinstance(inert, nn.Dropout) else "")


def why_not_pool(pool: Any, path: Path) -> str | None:
    """Return why the kernels do not know a pool, or None."""
    if reason := why_not_type(pool, nn.MaxPool2d, path):
        return reason
    if pool.return_indices or pool.ceil_mode or pair(pool.dilation) != (1, 1):
        return f"{'.'.join(path)} has return_indices, ceil_mode or dilation"
    kernel = pair(pool.kernel_size)
    return f"{'.'.join(path)} has a window of more than 255" if kernel[0] * kernel[1] > 255 else None


def why_not_parameter(parameter: Tensor, path: Path) -> str | None:
    """Return why a parameter cannot be handed to a chain, or None."""
    cls = type(parameter)
    if cls is nn.Parameter or cls is Tensor or cls.__torch_function__ is _NOT_WATCHING:
        return None
    return f"{'.'.join(path)} has a parameter of a subclass that sees torch's calls"


_NOT_WATCHING = nn.Parameter.__torch_function__
