"""Wrappers of data-parallel training around a replaced model; one process stands for many."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lightseq_fairseq.huggingface.graphed_stack import GraphedStack
from tests.huggingface.models import batch, gradients, pair
from tests.huggingface.test_accelerate import assert_same_gradients, compute


@pytest.fixture(autouse=True)
def group(device, tmp_path):
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", init_method=f"file://{tmp_path}/store",
                            rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "BartForConditionalGeneration"])
def test_distributed_data_parallel(kind, device, monkeypatch):
    monkeypatch.setattr(GraphedStack, "devices", ("cpu", "cuda"))
    stock, ours = pair(kind, device, graphs=True)
    given, wrapped = batch(kind, device), DistributedDataParallel(ours, find_unused_parameters=kind.startswith("Bart"))
    for _ in range(2):
        compute(stock, given)
        ours.zero_grad()
        wrapped(**given).loss.backward()
        assert_same_gradients(gradients(ours), gradients(stock))


def test_fully_sharded_layers(device):
    """Whose parameters are there between their hooks alone."""
    stock, ours = pair("BertForSequenceClassification", device)
    given, mesh = batch("BertForSequenceClassification", device), init_device_mesh(device.type, (1,))
    for layer in ours.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(ours, mesh=mesh)
    for _ in range(2):
        compute(stock, given)
        ours.zero_grad()
        ours(**given).loss.backward()
        whole = {name: None if grad is None else grad.full_tensor() for name, grad in gradients(ours).items()}
        assert_same_gradients(whole, gradients(stock))
