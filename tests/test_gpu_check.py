"""The checks for a GPU, at tiny sizes on a CPU."""

import subprocess
import sys

import pytest
import torch

from minit2i.experiments.gpu_check import CHECKS, CheckConfig, Machine, error, masks


def test_errors_are_relative_and_not_finite_ones_fail():
    assert error([torch.ones(4)], [torch.full((4,), 2.0)]) == 0.5
    assert error([torch.tensor([float("nan")])], [torch.ones(1)]) == float("inf")


def test_every_mask_passes_on_a_cpu():
    lines = list(masks(Machine(CheckConfig(tiny=True, device="cpu"))))
    assert len(lines) >= 12 and all(ok for _, ok, _ in lines), lines


@pytest.mark.slow
def test_all_checks_pass_at_tiny_sizes():
    command = [sys.executable, "-m", "minit2i.experiments.gpu_check", "--tiny", "--device", "cpu"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert " 0 failed" in out and len(out.splitlines()) > 2 * len(CHECKS), out
