"""Any module with RepVGG blocks → verified ONNX: the stages in order, and no logic of their own."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..export.module import ModuleOptions, module_metadata, reference_outputs, single_input, to_deploy_form, trace_module, vary_input
from ..export.writer import append_metadata, write_with_initializers
from ..files.output import atomic_output
from ..files.versions import tool_versions
from ..model.parity import require_passed
from ..specs.values import Certificate
from ..verify.onnx_parity import compare_outputs, run_onnx
from .checkpoint import TRAINING_REFERENCE, ExportResult

DEPLOY_MODULE_REFERENCE = "the module as it was given, in deploy form (no training form was given)"
Tensors = torch.Tensor | tuple[torch.Tensor, ...]


def export_module(model: nn.Module, example_inputs: Tensors, out: Path | str, *, options: ModuleOptions | None = None) -> ExportResult:
    """Reparameterizes (if need be), exports, simplifies and verifies a module, and writes one ONNX file.

    Args:
        model: Contains RepVGG blocks, ours or others' by their names, in training or deploy form; used in `eval()` and not changed.
        example_inputs: One float32 tensor (N, C, H, W) (or a tuple of one), as the module is called.
        out: The `.onnx`.
        options: See `ModuleOptions`.

    Returns:
        The file and its metadata; `Engine(out)` runs it.

    Raises:
        InputError: The inputs or outputs are of a kind that cannot be exported.
        ExportError: torch, onnxsim or the graph contract refuse the graph.
        ParityError: The ONNX does not give what the training-mode model gives.
        ArtifactError: The file cannot be written.
    """
    options = options or ModuleOptions()
    x = single_input(example_inputs)
    with atomic_output(Path(out), force=options.force) as output:
        deploy, folded = to_deploy_form(model)
        spec, graph = trace_module(deploy, x, options)
        inputs = vary_input(x, options)
        references, training_error = reference_outputs(options.reference or model, inputs, spec)
        digest = write_with_initializers(output.partial, graph)
        results = run_onnx(output.partial, {name: {spec.input.name: value.numpy()} for name, value in inputs.items()})
        checks = compare_outputs(results, references, training_error=training_error)
        require_passed(checks, f"{type(model).__name__} against its ONNX")
        known = folded or options.reference is not None
        certificate = Certificate(TRAINING_REFERENCE if known else DEPLOY_MODULE_REFERENCE, checks, tool_versions())
        metadata = module_metadata(spec, certificate, options)
        append_metadata(output.partial, digest, metadata)
    return ExportResult(output, metadata)
