"""The obvious way of each step, as one would write it with transformers and PEFT.

    python benchmarks/obvious.py merge BASE ADAPTER OUTPUT_DIR fp32
    python benchmarks/obvious.py extract BASE MERGED OUTPUT_FILE
    python benchmarks/obvious.py compare BASE ADAPTER TASK_VECTOR_FILE

It is what the project is measured against, so it is written for speed where that costs no thought:
safetensors throughout, no copy that is not needed, and compare builds the model without weights.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def merge(base: str, adapter: str, output: str, precision: str) -> None:
    """Load the base in a precision, merge the adapter, save the model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=DTYPES[precision])
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)


def extract(base: str, merged: str, output: str) -> None:
    """Load two models in fp32, subtract, save every difference."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype="float32") for path in (base, merged)
    ]
    weights = [dict(model.named_parameters()) for model in models]
    save_file({name: (weights[1][name] - weights[0][name]).detach() for name in weights[0]}, output)


def compare(base: str, adapter: str, task_vector: str) -> None:
    """Print mean fp32 cosine and largest difference of every delta and its task vector."""
    import torch
    from peft import PeftConfig, get_peft_model, load_peft_weights
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):  # the deltas need no weights of the base
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    peft_model = get_peft_model(model, PeftConfig.from_pretrained(adapter), low_cpu_mem_usage=True)
    weights = {
        name.replace(".weight", ".default.weight"): tensor
        for name, tensor in load_peft_weights(adapter, device="cpu").items()
    }
    peft_model.load_state_dict(weights, strict=False, assign=True)
    cosines, largest = [], 0.0
    with safe_open(task_vector, framework="pt") as file, torch.no_grad():
        for name, module in peft_model.base_model.model.named_modules():
            if hasattr(module, "get_delta_weight"):
                delta = module.get_delta_weight("default").flatten()
                vector = file.get_tensor(f"{name}.weight").flatten()
                cosines.append(float(torch.nn.functional.cosine_similarity(vector, delta, dim=0)))
                largest = max(largest, float((vector - delta).abs().max()))
    mean = sum(cosines) / len(cosines)
    print(json.dumps({"parameters": len(cosines), "cosine": mean, "max_difference": largest}))


if __name__ == "__main__":
    steps: dict[str, Callable[..., None]] = {"merge": merge, "extract": extract, "compare": compare}
    steps[sys.argv[1]](*sys.argv[2:])
