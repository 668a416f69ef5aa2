"""The chain with its arithmetic on a GPU. Marked ``gpu``; skipped where PyTorch sees none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compare_lora_task_vector import compare
from extract_task_vectors import extract
from merge_lora import merge
from taskvec.tensorfile import to_device
from tests.checks import assert_same_bits, weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU"),
]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_merge_made_on_a_gpu_meets_the_certificate_on_either(
    precision: str, llama: Path, llama_lora: Path, tmp_path: Path
):
    merge(str(llama), str(llama_lora), tmp_path / "gpu", precision=precision, device="cuda:0")
    merge(str(llama), str(llama_lora), tmp_path / "cpu", precision=precision, device="cpu")
    extract(str(llama), str(tmp_path / "gpu"), tmp_path / "tv", device="cuda:0")
    for device in ("cpu", "cuda:0"):
        result = compare(
            str(llama),
            str(llama_lora),
            tmp_path / f"comparison-{device[:4]}",
            task_vector_path=tmp_path / "tv",
            device=device,
            generate_plots=False,
        )
        assert result.holds
    gpu, cpu = weights(tmp_path / "gpu"), weights(tmp_path / "cpu")
    untouched = [name for name in cpu if "_proj" not in name]
    assert_same_bits(gpu, cpu, only=untouched)


def test_a_task_vector_formed_on_a_gpu_is_that_of_the_cpu(
    llama: Path, llama_lora: Path, tmp_path: Path
):
    """One subtraction in fp32 has the same bits everywhere."""
    merge(str(llama), str(llama_lora), tmp_path / "merged", device="cpu")
    for device in ("cpu", "cuda:0"):
        extract(str(llama), str(tmp_path / "merged"), tmp_path / device[:4], device=device)

    assert_same_bits(weights(tmp_path / "cuda"), weights(tmp_path / "cpu"))


def test_rows_arrive_whole_though_nobody_waits_for_them():
    device = torch.device("cuda:0")
    rows = [torch.full((1 << 18,), float(number)) for number in range(64)]

    arrived = [to_device(row, device) for row in rows]

    assert all(torch.equal(there.cpu(), here) for there, here in zip(arrived, rows, strict=True))
