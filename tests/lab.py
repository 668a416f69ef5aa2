"""A base and an adapter, merged rightly and wrongly, for the tests of the diagnosis.

Deltas are taken from the adapter's files here, in float64 and without taskvec, and the wrong merges
are computed with plain torch, PEFT or a few steps of training.
"""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import compare_lora_task_vector
import extract_task_vectors

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
everywhere = pytest.mark.parametrize(
    ("family", "precision", "extracted"),
    [
        ("llama", "fp32", True),
        ("llama", "bf16", False),
        ("gpt2", "fp32", False),
        ("gpt2", "fp16", True),
    ],
)


def read_deltas(adapter):
    """s * B @ A by parameter, float64, as the parameter is stored."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    factors = load_file(adapter / "adapter_model.safetensors")
    found = {}
    for name, A in factors.items():
        if "lora_A" not in name:
            continue
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        B = factors[name.replace("lora_A", "lora_B")]
        r = A.shape[0]
        scaling = config["lora_alpha"] / (math.sqrt(r) if config["use_rslora"] else r)
        delta = scaling * (B.double() @ A.double())
        found[f"{module}.weight"] = delta.T if config["fan_in_fan_out"] else delta
    return found


class Lab:
    """A base and an adapter, and models made of them in any way."""

    def __init__(self, tmp_path, tiny, family="llama", precision="fp32", stored="fp32", **adapter):
        self.tmp_path, self.dtype = tmp_path, DTYPES[precision]
        self.base = tiny.base(family, dtype=DTYPES[stored])
        self.lora = tiny.adapter(self.base, **adapter)
        self.weights = load_file(self.base / "model.safetensors")
        self.deltas = read_deltas(self.lora)
        self.names = list(self.deltas)
        self._made = 0

    def path(self):
        self._made += 1
        return self.tmp_path / str(self._made)

    def write(self, tensors):
        """A model directory that holds these tensors."""
        path = self.path()
        path.mkdir()
        shutil.copyfile(self.base / "config.json", path / "config.json")
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path

    def merged(self, change=None, dtype=None):
        """Base + adapter with one rounding, or with ``change(name)`` in the delta's place."""
        change = change or self.deltas.get
        tensors = {}
        for name, weight in self.weights.items():
            added = change(name)
            wide = weight.double() if added is None else weight.double() + added
            tensors[name] = wide.to(dtype or self.dtype)
        return tensors

    def model(self, change=None):
        return self.write(self.merged(change))

    def compare(self, model, *, extracted=False, **extraction):
        vector = self.path() if extracted else None
        if vector:
            extract_task_vectors.extract(str(self.base), str(model), vector, **extraction)
        result = compare_lora_task_vector.compare(
            str(self.base),
            str(self.lora),
            self.path(),
            task_vector_path=vector,
            finetuned_model=None if vector else str(model),
            generate_plots=False,
            detailed_report=False,
            device="cpu",
        )
        return result.summary["certificate"]

    def causes(self, model, **options):
        certificate = self.compare(model, **options)
        assert certificate["verdict"] in ("violated", "incomplete")
        return certificate["diagnosis"]

    def cause(self, model, **options):
        """The only one."""
        causes = self.causes(model, **options)
        assert len(causes) == 1, [cause["sentence"] for cause in causes]
        return causes[0]
