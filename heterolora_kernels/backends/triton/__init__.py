"""Triton on CUDA devices: defines the ops and registers their implementations; imported at the first use of the backend.

Forward: ``hidden`` of all paths (one read of each source), then the base matmul with the low-rank part in its accumulator.
Backward: q and grad_B (one read of grad_out), grad_x of the whole group, grad_A (one read of each source), finalize with the
statistics. Kernels are in device, forward, backward and finalize; group.py launches them, plan.py describes groups to them,
configs.json holds the tiles.

With ``TRITON_INTERPRET=1`` in the environment before triton is imported, kernels run in Triton's interpreter on CPU tensors.
"""

from __future__ import annotations

import torch

from heterolora_kernels.backends.triton.group import make_group, run_backward, run_forward
from heterolora_kernels.ops.schema import NAMESPACE, check_backward, check_lora_delta, check_lora_linear, define_ops

_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def _lora_linear(x, weights, packs, biases, sources, lora_A, lora_B, scaling, gate, active, rng, path_output, path_source,
                 dropout_p, flags):
    check_lora_linear(x, weights, packs, biases, sources, lora_A, lora_B, scaling, gate, active, rng, path_output,
                      path_source, dropout_p, flags)
    group = make_group(x, sources, lora_A, lora_B, scaling, gate, active, path_output, path_source,
                       [w.shape[0] for w in weights], dropout_p, flags)
    return run_forward(group, weights, biases, [], rng, path_source, sources)


def _lora_linear_backward(grad_outs, x, weights, packs, biases, sources, lora_A, lora_B, scaling, gate, active, rng,
                          path_output, path_source, dropout_p, flags, hidden, mask, needs):
    check_lora_linear(x, weights, packs, biases, sources, lora_A, lora_B, scaling, gate, active, rng, path_output,
                      path_source, dropout_p, flags)
    out_features = [w.shape[0] for w in weights]
    check_backward(grad_outs, x, out_features, sources, lora_A, path_source, dropout_p, hidden, mask, needs)
    group = make_group(x, sources, lora_A, lora_B, scaling, gate, active, path_output, path_source, out_features, dropout_p,
                       flags)
    return run_backward(group, grad_outs, weights, hidden, mask, needs, lora_A, lora_B, sources)


def _lora_delta(x, base_outs, sources, lora_A, lora_B, scaling, gate, active, rng, path_output, path_source, dropout_p,
                flags):
    check_lora_delta(x, base_outs, sources, lora_A, lora_B, scaling, gate, active, rng, path_output, path_source,
                     dropout_p, flags)
    group = make_group(x, sources, lora_A, lora_B, scaling, gate, active, path_output, path_source,
                       [out.shape[1] for out in base_outs], dropout_p, flags)
    return run_forward(group, [], [], base_outs, rng, path_source, sources)


def _lora_delta_backward(grad_outs, x, base_outs, sources, lora_A, lora_B, scaling, gate, active, rng, path_output,
                         path_source, dropout_p, flags, hidden, mask, needs):
    check_lora_delta(x, base_outs, sources, lora_A, lora_B, scaling, gate, active, rng, path_output, path_source,
                     dropout_p, flags)
    out_features = [out.shape[1] for out in base_outs]
    check_backward(grad_outs, x, out_features, sources, lora_A, path_source, dropout_p, hidden, mask, needs)
    group = make_group(x, sources, lora_A, lora_B, scaling, gate, active, path_output, path_source, out_features, dropout_p,
                       flags)
    return run_backward(group, grad_outs, [], hidden, mask, needs, lora_A, lora_B, sources)


define_ops(_library, "triton")
for _name, _implementation in (
    ("lora_linear", _lora_linear),
    ("lora_linear_backward", _lora_linear_backward),
    ("lora_delta", _lora_delta),
    ("lora_delta_backward", _lora_delta_backward),
):
    _library.impl(f"{_name}_triton", _implementation, "CompositeExplicitAutograd")
