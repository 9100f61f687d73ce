"""Quantisation-aware training: a program that rounds is trained on, its zeros held, and emitted with what it learnt.

What is trained is the rounding program itself, in the place of the user's module: its channels are removed, its batch
norms are folded, and its scales are parameters of the graph that is emitted. So no scale has to be carried over, and
what training saw is what the file computes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from slrc.config import CompileConfig
from slrc.forms.quantize_ops import LEAST_SCALE
from slrc.ir.nodes import argument, op_name
from slrc.ir.program import Program
from slrc.passes.quantization.insert_quantizers import ROUNDED
from slrc.progress import Reporter
from slrc.sparsity.masks import Masks
from slrc.sparsity.plans import Plan
from slrc.training.loop import train
from slrc.training.recipe import sgd
from slrc.training.trained import Trained
from slrc.workload import Workload

NOTHING = Plan(sparsity_asked=0.0, sparsity=0.0, constraints=())


def train_rounded(
    rounded: Program,
    workload: Workload,
    config: CompileConfig,
    teacher: nn.Module,
    *,
    checkpoints: Path | None = None,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> tuple[Program, Trained]:
    """Train a program that rounds for `qat_epochs`; return it with its weights and scales, and what training left.

    Gradients pass roundings straight through, to weights, biases and scales. Weights that are zero stay zero. The loss
    is the workload's, blended with the distance to the teacher as in pruning.

    Args:
        rounded: its biases are not rounded yet.
        workload: with training data; its loss is called with a module that computes what the model does in evaluation.
        config: epochs, recipe, and the share of its learning rate.
        teacher: the dense network.
        checkpoints: a folder to save to after every epoch.
        resume: go on from the newest checkpoint there.
        reporter: where progress goes.

    Raises:
        WorkloadError: the loss does not take the module.
        TrainingError: the loss is not finite.
    """
    module, scales = rounded.module(trainable=True), _scales(rounded)
    live = dict(module.named_parameters())
    for name in scales:
        live[name].requires_grad_(config.int8.learn_scales)
    masks = Masks({name: weight != 0 for name, weight in _weights(rounded).items()})
    settings = config.model_copy(
        update={"retrain_epochs": config.qat_epochs, "epochs": 0, "steps": None, "method": None, "start_from": None}
    )
    own = replace(
        workload,
        model=module,
        optimizer=lambda parameters: _optimizer(workload, parameters, config, [live[n] for n in scales]),
        scheduler=None,
        warnings=[],
    )
    trained = train(
        own,
        NOTHING,
        settings,
        checkpoints=checkpoints,
        resume=resume,
        reporter=reporter,
        prune=lambda: masks,
        teacher=teacher,
    )
    tensors = {n: t.clamp_min(LEAST_SCALE) if n in scales else t for n, t in trained.tensors.items()}
    return rounded.with_tensors(tensors), trained


def _optimizer(
    workload: Workload, parameters: Iterable[nn.Parameter], config: CompileConfig, scales: Iterable[nn.Parameter]
) -> Optimizer:
    """Return the workload's optimiser, or the recipe's, slowed down; only SGD moves scales."""
    made = workload.optimizer(parameters) if workload.optimizer else sgd(parameters, config.recipe.peak_lr)
    for group in made.param_groups:
        group["lr"] = group["lr"] * config.int8.qat_lr
    if not isinstance(made, SGD):  # Adam's are as large as the learning rate: no measure for a scale
        for scale in scales:
            scale.requires_grad_(False)
    return made


def _scales(rounded: Program) -> list[str]:
    nodes = (argument(n, 1, "scale") for n in rounded.nodes if op_name(n) == ROUNDED)
    return list(dict.fromkeys(str(n.target) for n in nodes))


def _weights(rounded: Program) -> dict[str, Tensor]:
    """Return the weights of layers, rounded or not, by name."""
    sources = (n.args[0] for n in rounded.nodes if op_name(n) == ROUNDED)
    names = [str(s.target) for s in sources if s.op == "get_attr"]  # type: ignore[union-attr]
    names += rounded.layers
    with torch.no_grad():
        return {name: rounded.tensors[name].detach() for name in names}
