"""What the modules are that a model's parameters belong to, and what they are called in memory.

An adapter names modules as they are in memory, which need not be how a checkpoint names them. With
the base's config.json the model is built without weights (on PyTorch's meta device) and asked;
without it, names are taken as they stand and what looks like an embedding is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from taskvec import cli
from taskvec.architecture import place
from taskvec.checkpoint import Checkpoint
from taskvec.conversions import conversion_of
from taskvec.header import TensorInfo
from taskvec.lowrank.stacks import Stack, stack_in_file, stacks_in_pieces

LINEAR, CONV1D, EMBEDDING, OTHER = "linear", "conv1d", "embedding", "other"
STACK, TRANSPOSED_STACK = "stack", "transposed stack"
WHOLE = (OTHER, STACK, TRANSPOSED_STACK)  # of modules that can be saved whole


@dataclass(frozen=True)
class Parameter:
    """A parameter as an adapter sees it.

    Attributes:
        module: its module's name in memory.
        leaf: its own name there, such as weight.
        kind: of the module: "linear" (stored (out, in)), "conv1d" (stored (in, out)), "embedding"
            or "other"; of a parameter that is a stack of matrices: "stack" (stored (matrices, out,
            in)) or "transposed stack".
        index: among the module's own parameters, of a stack.
    """

    module: str
    leaf: str
    kind: str
    index: int = 0

    @property
    def transposed(self) -> bool:
        """Stored as the transpose of B @ A: (in, out), or a row for each token."""
        return self.kind in (CONV1D, EMBEDDING, TRANSPOSED_STACK)


@dataclass(frozen=True)
class Layout:
    """The parameters of a model, by their name in the checkpoint.

    Attributes:
        parameters: of those that have a place in memory.
        contents: the names of all that each module has in memory, by module.
        parents: modules that hold other modules.
        task_type: PEFT's word for the model's head; None for another, or if not known.
        tied: the head's weight is the embedding's.
        known: false where names were all there was to go by.
        stacks: parameters that are stacks of matrices: by their name in the checkpoint, or by that
            in memory where the checkpoint has them in pieces.
    """

    parameters: dict[str, Parameter]
    contents: dict[str, set[str]]
    parents: set[str]
    task_type: str | None
    tied: bool
    known: bool
    stacks: dict[str, Stack] = field(default_factory=dict)


def model_layout(base: Checkpoint | None, tensors: Mapping[str, TensorInfo]) -> Layout:
    """The layout of a base, or of a task vector's tensors where there is no base to ask."""
    config = base.config() if base is not None else {}
    if base is not None and config:
        built = _build(base, config)
        if built is not None:
            return _layout(built, base, tensors)
        cli.notice(
            f"{base.source}: transformers does not build this architecture; its modules are "
            "judged by their names."
        )
    return _by_names(tensors)


def _by_names(tensors: Mapping[str, TensorInfo]) -> Layout:
    parameters: dict[str, Parameter] = {}
    contents: dict[str, set[str]] = {}
    parents: set[str] = set()
    for name, info in tensors.items():
        module, _, leaf = name.rpartition(".")
        kind = OTHER
        if leaf == "weight" and len(info.shape) == 2:
            kind = EMBEDDING if place(name).block == "embedding" else LINEAR
        elif leaf == "bias":
            weight = tensors.get(f"{module}.weight")
            kind = LINEAR if weight is not None and len(weight.shape) == 2 else OTHER
        parameters[name] = Parameter(module, leaf, kind)
        contents.setdefault(module, set()).add(leaf)
        parts = module.split(".")
        parents |= {".".join(parts[:end]) for end in range(1, len(parts))}
    return Layout(parameters, contents, parents, None, False, known=False)


def _build(base: Checkpoint, config: dict[str, Any]) -> torch.nn.Module | None:
    """The model without its weights; None where transformers has no such class."""
    import transformers

    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    model_class = getattr(transformers, name, None) if isinstance(name, str) else None
    if model_class is None or not hasattr(model_class, "from_pretrained"):
        return None
    try:
        settings = transformers.AutoConfig.from_pretrained(
            str(base.directory), trust_remote_code=False
        )
        with torch.device("meta"):
            built: torch.nn.Module = model_class(settings)
    except Exception:  # whatever a configuration raises that does not fit its class
        return None
    return built


def _layout(model: torch.nn.Module, base: Checkpoint, tensors: Mapping[str, TensorInfo]) -> Layout:
    config, conversion = base.config(), conversion_of(base.config())
    modules = dict(model.named_modules())
    in_memory = set(model.state_dict())
    contents: dict[str, set[str]] = {}
    for name in in_memory:
        module, _, leaf = name.rpartition(".")
        contents.setdefault(module, set()).add(leaf)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    parameters, stacks = {}, {}
    in_pieces = stacks_in_pieces(base)
    for name in (*tensors, *in_pieces):
        key = conversion.key(name)
        if key.expert is not None:  # a piece, which has no place of its own
            continue
        tries = (name, key.name, prefix + key.name, key.name.removeprefix(prefix))
        found = next((known for known in tries if known in in_memory), None)
        if found is None:
            continue
        module, _, leaf = found.rpartition(".")
        kind = _kind(modules[module])
        stack = in_pieces.get(name) or stack_in_file(name, tensors[name])
        if stack is not None and kind == OTHER and _may_be_stacked(modules[module], leaf):
            stacks[name] = stack
            parameters[name] = _stacked(modules[module], module, leaf)
        elif name in tensors:
            parameters[name] = Parameter(module, leaf, kind)
    parents = {name for name, module in modules.items() if next(module.children(), None)}
    causal = any(word in type(model).__name__ for word in ("ForCausalLM", "LMHeadModel"))
    tied = bool(config.get("tie_word_embeddings", getattr(model, "_tied_weights_keys", None)))
    task_type = "CAUSAL_LM" if causal else None
    return Layout(parameters, contents, parents, task_type, tied, known=True, stacks=stacks)


def _kind(module: torch.nn.Module) -> str:
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, torch.nn.Linear):
        return LINEAR
    if isinstance(module, Conv1D):
        return CONV1D
    return EMBEDDING if isinstance(module, torch.nn.Embedding) else OTHER


def _may_be_stacked(module: torch.nn.Module, leaf: str) -> bool:
    """PEFT adapts no buffers; a convolution's weight has three axes too, but is no stack."""
    convolution = isinstance(module, torch.nn.modules.conv._ConvNd)
    return leaf in _own_parameters(module) and not convolution


def _stacked(module: torch.nn.Module, name: str, leaf: str) -> Parameter:
    """As PEFT's ParamWrapper has it: matrices are (out, in) unless the module says otherwise."""
    kind = TRANSPOSED_STACK if getattr(module, "is_transposed", False) else STACK
    return Parameter(name, leaf, kind, _own_parameters(module).index(leaf))


def _own_parameters(module: torch.nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters(recurse=False)]
