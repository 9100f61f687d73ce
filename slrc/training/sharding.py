"""FSDP: the processes of a run share out weights, gradients, and the optimiser's and the method's state.

`accelerate launch --use_fsdp` asks for it, or `ACCELERATE_USE_FSDP=true`; accelerate's further settings (`FSDP_…`) say
which modules are gathered together. accelerate itself shards on accelerators alone, and swaps the parameters of an
optimiser that was made before. Here the model is sharded first, on a CPU too, and then the optimiser is made.

Outside a forward pass and its backward, each process holds its own rows of every parameter, see `slrc.sparsity.shards`.
State dicts hold whole tensors, as those of any other model: a checkpoint does not tell how many processes saved it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, fsdp2_prepare_model
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from slrc.errors import TrainingError
from slrc.sparsity.shards import copy_from_first, is_shared, own, share, whole_in_turn
from slrc.user_code import first_line

ASKED = "ACCELERATE_USE_FSDP"


def is_asked_for() -> bool:
    """Tell whether the launcher, or the user, asked for FSDP."""
    return os.environ.get(ASKED, "").lower() in ("true", "1")


@contextmanager
def left_to_us() -> Iterator[None]:
    """Make an `Accelerator` here that does not shard by itself."""
    asked = os.environ.pop(ASKED, None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ[ASKED] = asked


def is_sharded(model: nn.Module) -> bool:
    """Tell whether `shard` made a model."""
    return any(is_shared(p) for p in model.parameters())


def shard(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Share a model's parameters out, in place, and return it.

    Raises:
        TrainingError: FSDP cannot take it.
    """
    try:
        # All processes have the weights already, and what is left out would have no gradient of the others.
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
        plugin.ignored_modules = None
        accelerator.state.fsdp_plugin = plugin
        model = fsdp2_prepare_model(accelerator, model)
    except Exception as error:  # whatever torch and accelerate raise for settings and models that they cannot take
        raise TrainingError(
            f"FSDP cannot share this model out: {first_line(error)}",
            hint=f"check accelerate's settings `FSDP_…`, or train without `{ASKED}`: each process then has it whole",
        ) from error
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.register_forward_hook(_let_go)
    model.register_state_dict_post_hook(_gather_state)
    model.register_load_state_dict_pre_hook(_share_state)
    return model


def gathers_state(optimizer: Optimizer) -> None:
    """Let an optimiser of shared parameters give and take a state of whole tensors."""
    optimizer.register_state_dict_post_hook(_gather_optimizer)
    optimizer.register_load_state_dict_pre_hook(_share_optimizer)


def copy_state(model: nn.Module, twin: nn.Module) -> None:
    """Copy parameters and buffers into a model of the same kind, sharded as well."""
    with torch.no_grad():
        for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
            own(ours).copy_(own(theirs))
        for buffer, other in zip(twin.buffers(), model.buffers(), strict=True):
            buffer.copy_(other)


def follow_first(model: nn.Module) -> None:
    """Take over the first process's buffers, such as batch norm's statistics, which are of its share of samples."""
    copy_from_first(list(model.buffers()))


def _let_go(module: Any, args: Any, output: Any) -> None:
    """Without a gradient there will be no backward, which else frees what a forward gathered."""
    if not torch.is_grad_enabled():
        module.reshard()


def _gather_state(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    shared = {n: t for n, t in state.items() if isinstance(t, Tensor) and is_shared(t)}
    for name, value in whole_in_turn(shared):
        # Copied: what is gathered of uneven parts lies in a longer storage, which safetensors refuses.
        state[name] = value.to("cpu", copy=True)


def _share_state(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, parameter in module.named_parameters(remove_duplicate=False):
        value = state.get(name)
        if value is not None and value.shape == parameter.shape and not is_shared(value):
            state[name] = share(value, parameter)


def _gather_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    values, spec = pytree.tree_flatten(state["state"])
    shared = {str(i): x for i, x in enumerate(values) if isinstance(x, Tensor) and is_shared(x)}
    for i, value in whole_in_turn(shared):
        values[int(i)] = value.cpu()
    return {**state, "state": pytree.tree_unflatten(values, spec)}


def _share_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    saved = [i for group in state["param_groups"] for i in group["params"]]
    owners = dict(zip(saved, parameters, strict=False))

    def shared(value: Any, parameter: Tensor) -> Any:
        fits = isinstance(value, Tensor) and value.shape == parameter.shape
        return share(value, parameter) if fits else value

    own_state = {
        i: {name: shared(value, owners[i]) for name, value in of_one.items()} if i in owners else of_one
        for i, of_one in state["state"].items()
    }
    return {**state, "state": own_state}
