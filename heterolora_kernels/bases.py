"""What a module is: a linear, a quantised one, or something that reads like one. Nothing here runs a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from heterolora_kernels.distributed import is_dtensor

#: Of packed weights; bool, which masks have, and int64, which indices have, are not among them.
_PACKED_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32)
_PLAIN_TYPES = (Tensor, nn.Parameter, nn.Buffer, nn.parameter.UninitializedParameter)

#: Modules that hand the weights of their linears to one torch op instead of calling them.
BYPASSING = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether a module is transformers' ``Conv1D``."""
    # By name and place: importing transformers for an isinstance would make it a core dependency.
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def is_quantised(tensor: Tensor) -> bool:
    """Tell whether a tensor holds packed or 8-bit numbers, or is of a class of its own that stands for such."""
    if type(tensor) not in _PLAIN_TYPES:
        return not is_dtensor(tensor)
    return tensor.dtype in _PACKED_DTYPES or tensor.is_floating_point() and tensor.dtype.itemsize < 2


def own_tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers of the module itself, but for those that a lazy one has not made yet."""
    return [t for t in (*module._parameters.values(), *module._buffers.values())
            if t is not None and not isinstance(t, nn.parameter.UninitializedTensorMixin)]


def has_features(module: nn.Module) -> bool:
    """Tell whether a module says the sizes of its input and output as ``nn.Linear`` does."""
    return all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))


def is_quantised_linear(module: nn.Module) -> bool:
    """Tell whether a module is a linear that computes its output itself, from quantised weights.

    bitsandbytes, torchao, optimum-quanto, HQQ, GPTQ, AWQ, BitNet and the like: ``in_features``, ``out_features`` and quantised
    tensors. EETQ and the like, without these: see :func:`quantised_sizes`.
    """
    if not has_features(module):
        return quantised_sizes(module) is not None
    weight = module._parameters.get("weight")
    tensors = own_tensors(module) if weight is None else [weight]
    if module._modules:
        # A norm of the input, a codebook; but not a linear in a wrapper that keeps its sizes.
        tensors = [t for t in own_tensors(module) if t.dim() > 1]
        if any(_is_linear(child) for child in module.modules() if child is not module):
            return False
    return any(is_quantised(tensor) for tensor in tensors)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module) or has_features(module)


def quantised_sizes(module: nn.Module) -> tuple[int, int] | None:
    """Read (in_features, out_features) off one quantised matrix and its scales, one per output; None where they do not tell."""
    if isinstance(module, nn.Linear) or hasattr(module, "num_embeddings") or not _has_scaled_matrix(module):
        return None
    matrix, = [t for t in own_tensors(module) if t.dim() == 2 and is_quantised(t)]
    lengths = {t.numel() for t in own_tensors(module) if t.is_floating_point() and t.numel() == max(t.shape, default=1)}
    out_sizes = set(matrix.shape) & lengths
    if len(out_sizes) != 1:
        return None
    out_features, = out_sizes
    in_features = matrix.shape[0] if matrix.shape[1] == out_features else matrix.shape[1]
    return in_features, out_features


def _has_scaled_matrix(module: nn.Module) -> bool:
    """Tell whether a module's own tensors are one quantised matrix and at least one scale."""
    if isinstance(module, nn.Embedding) or hasattr(module, "num_embeddings"):
        return False
    matrices = [t for t in own_tensors(module) if t.dim() == 2 and is_quantised(t)]
    return len(matrices) == 1 and any("scale" in name for name in (*module._parameters, *module._buffers))


def is_experts(module: nn.Module) -> bool:
    """Tell whether a module holds the weights of several linears in one tensor."""
    # Kernels of convolutions, bare or in a weight_norm; factors of [n, 1, 1] and positions of [1, 1, n] are no matrices.
    return not isinstance(module, (nn.modules.conv._ConvNd, parametrize.ParametrizationList)) and any(
        (p.dim() == 3 or p.dim() > 3 and is_quantised(p)) and min(p.shape[:3]) > 1
        for p in own_tensors(module) if isinstance(p, nn.Parameter))


def looks_linear(module: nn.Module) -> bool:
    """Tell whether a module is a linear or reads like one, so that whoever asks for all linears should hear about it."""
    if isinstance(module, nn.Linear) or is_conv1d(module) or is_quantised_linear(module) or _has_scaled_matrix(module):
        return True
    return has_features(module) and not module._modules and any(t.dim() > 1 for t in own_tensors(module))


def base_tensor(module: nn.Module) -> Tensor | None:
    """A tensor of the module that says where, and in which dtype, its adapter belongs: its weight, or the first it has."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        return weight
    return next(iter(own_tensors(module)), None)


def features(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a module that can be adapted."""
    if is_quantised_linear(module):
        return (module.in_features, module.out_features) if has_features(module) else quantised_sizes(module)
    out_features, in_features = module.weight.shape
    return (out_features, in_features) if is_conv1d(module) else (in_features, out_features)


def why_never(module: nn.Module, parent: nn.Module | None) -> str | None:
    """Why a module cannot be the base of paths whatever it computes, or None."""
    if isinstance(parent, BYPASSING):
        return f"nn.{type(parent).__name__} reads its weight (at least in eval mode) and does not call it as a module"
    if isinstance(module, nn.MultiheadAttention):
        return "nn.MultiheadAttention hands its weights to one op"
    if getattr(getattr(base_tensor(module), "quant_state", None), "packing_format_for_cpu", False):
        return ("bitsandbytes has packed its weight for inference on the CPU, in a forward without gradients in eval mode, and "
                "it has no backward any more: load the model anew")
    if type(module) is nn.Linear and getattr(getattr(module, "quantization_status", None), "value", None) == "compressed":
        return ("compressed-tensors decompresses it in the model's first forward and exchanges its tensors: call the model once, "
                "then patch it, or load it with CompressedTensorsConfig(dequantize=True)")
    if is_conv1d(module) or is_quantised_linear(module):
        return None
    if is_experts(module):
        return "its weights are 3-D parameters and no nn.Linear"
    if isinstance(module, nn.Linear) and "weight" not in module._parameters:
        return "its weight is computed from other parameters (weight_norm, a parametrization)"
    if not isinstance(module, nn.Linear):
        return f"it is a {type(module).__name__}, and only nn.Linear, quantised linears and GPT-2's Conv1D can be adapted"
    if isinstance(module.weight, nn.parameter.UninitializedParameter):
        return "it is a LazyLinear that has not seen an input yet"
    return None
