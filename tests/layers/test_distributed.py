"""Models with our layers train in two processes to the losses of models with torch's.

One pair of processes runs all checks, since each takes seconds to begin. They end at once: the end of a process group
may wait for threads that wait for Python.
"""

import os
import subprocess
import sys

import pytest
import torch
from torch import distributed, nn

import fastlstm
from tests.helpers import ROOT

STEPS, BOUND = 4, 2.4e-7  # losses near 1, whose gradients differ by roundings: two units in their last place


class Model(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.recurrent, self.head = kind(7, 12, 2, batch_first=True), nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.recurrent(x)[0][:, -1])


class Steps(nn.Module):
    """A cell between other layers, whose steps share the gradients of its weights."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.recurrent, self.head = nn.Linear(7, 7), kind(7, 12), nn.Linear(12, 3)

    def forward(self, x):
        state = None
        for step in self.encoder(x).unbind(1):
            state = self.recurrent(step, state)
        return self.head(state[0])


PAIRS = (Model, nn.LSTM, fastlstm.LSTM), (Model, nn.GRU, fastlstm.GRU), (Steps, nn.LSTMCell, fastlstm.LSTMCell)


def adam(parameters):
    return torch.optim.Adam(parameters, 1e-2)


def in_parallel(model):
    model = nn.parallel.DistributedDataParallel(model)
    return model, adam(model.parameters())


def with_sharded_states(model):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = nn.parallel.DistributedDataParallel(model)
    return model, ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=1e-2)


def fully_sharded(model):
    from torch.distributed.fsdp import fully_shard

    mesh = distributed.device_mesh.init_device_mesh("cpu", (2,))
    fully_shard(model.recurrent, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, adam(model.parameters())


WAYS = {"DDP": in_parallel, "ZeRO": with_sharded_states, "FSDP2": fully_sharded}


def losses_of(model, optimizer, rank, first=0):
    """The losses of some steps, each process with batches of its own."""
    losses = []
    for step in range(first, first + STEPS):
        torch.manual_seed(10 * step + rank)
        x, target = torch.randn(5, 6, 7), torch.randn(5, 3)
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def check_near(losses):
    theirs, ours = losses
    assert max(abs(a - b) for a, b in zip(theirs, ours, strict=True)) <= BOUND, (theirs, ours)
    assert len(set(ours)) == STEPS  # the model learns


def check_ways(rank):
    for way in WAYS.values():
        for model, *kinds in PAIRS:
            check_near([losses_of(*way(model(kind)), rank) for kind in kinds])


def check_graphs_at_once():
    """Two graphs of one sharded cell are there before either has its backward pass."""
    gradients = []
    for kind in (nn.LSTMCell, fastlstm.LSTMCell):
        model, _ = fully_sharded(Steps(kind))
        for _ in range(3):
            losses = [model(torch.full((5, 6, 7), value)).square().sum() for value in (0.5, -1.0)]
            for loss in losses:
                loss.backward()
        gradients.append([a.grad.to_local() for a in model.parameters()])
    for theirs, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # sums of 60 products of float32


def check_distributed_passes(rank, folder):
    """Backward passes of torch.distributed.autograd, which know of no node that will run."""
    from torch.distributed import autograd, rpc

    options = rpc.TensorPipeRpcBackendOptions(init_method=f"file://{folder}/rpc")
    rpc.init_rpc(f"worker_{rank}", rank=rank, world_size=2, rpc_backend_options=options)
    gradients = []
    for kind in (nn.LSTMCell, fastlstm.LSTMCell):
        model = Steps(kind)
        for _ in range(2):
            with autograd.context() as number:
                autograd.backward(number, [model(torch.ones(5, 6, 7)).square().sum()])
                of_tensors = autograd.get_gradients(number)
        gradients.append([of_tensors[a] for a in model.parameters()])
    for theirs, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def check_checkpoint(rank, folder):
    """Training goes on from a checkpoint of a model with torch's layers, whose names and shapes are ours."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, optimizer = fully_sharded(Model(nn.LSTM))
    losses_of(model, optimizer, rank)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
    checkpoint.save(states, checkpoint_id=folder)
    losses = [losses_of(model, optimizer, rank, STEPS)]
    model, optimizer = fully_sharded(Model(fastlstm.LSTM))
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
    checkpoint.load(states, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    check_near([*losses, losses_of(model, optimizer, rank, STEPS)])


def check_sharded_weights():
    """Weights that nobody gathers raise, with the way to gather them."""
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = distributed.device_mesh.init_device_mesh("cpu", (2,))
    torch.manual_seed(0)  # what is distributed are the tensors of the first process
    module, x = fastlstm.GRU(7, 12), torch.randn(5, 4, 7)
    want = module(x)[0]
    for name, parameter in list(module.named_parameters()):
        module.register_parameter(name, nn.Parameter(distribute_tensor(parameter, mesh, [Shard(0)])))
    for given in (x, distribute_tensor(x, mesh, [Shard(1)])):
        with pytest.raises(ValueError, match=r"must be a whole tensor, got a DTensor: gather it with full_tensor\(\)"):
            module(given)
    for name, parameter in list(module.named_parameters()):
        assert isinstance(parameter, DTensor)
        module.register_parameter(name, nn.Parameter(parameter.full_tensor()))
    assert torch.equal(module(x)[0], want)


def run(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    check_ways(rank)
    check_graphs_at_once()
    check_distributed_passes(rank, folder)
    check_checkpoint(rank, f"{folder}/checkpoint")
    check_sharded_weights()
    print("done", flush=True)
    distributed.barrier()
    os._exit(0)


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_available(), reason="this torch is built without torch.distributed")
def test_two_processes(tmp_path):
    code = f"import sys; from {__name__} import run; run(int(sys.argv[1]), sys.argv[2])"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(tmp_path)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=280)[0] for process in processes]
    assert ["done" in output for output in outputs] == [True, True], "\n".join(outputs)


def train_by_accelerate(kind):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = Model(kind)
    return losses_of(*accelerator.prepare(model, adam(model.parameters())), 0)


def train_by_lightning(kind):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.losses = Model(kind), []

        def training_step(self, batch, _):
            x, target = batch
            loss = (self.model(x) - target).square().mean()
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return adam(self.parameters())

    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(module, torch.utils.data.DataLoader(batches()))
    return module.losses


def batches():
    torch.manual_seed(1)
    return [(x, target) for x, target in zip(torch.randn(STEPS, 6, 7), torch.randn(STEPS, 3))]


def train_by_transformers(kind):
    import tempfile

    from transformers import Trainer, TrainingArguments

    losses = []

    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Model(kind)

        def forward(self, x, target):
            loss = (self.model(x) - target).square().mean()
            losses.append(loss.item())
            return {"loss": loss}

    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            folder, use_cpu=True, num_train_epochs=1, per_device_train_batch_size=1, learning_rate=1e-2,
            report_to=[], save_strategy="no", remove_unused_columns=False,
        )  # fmt: skip
        rows = [{"x": x, "target": target} for x, target in batches()]
        Trainer(WithLoss(), options, train_dataset=rows).train()
    return losses


TRAINERS = {"accelerate": train_by_accelerate, "lightning": train_by_lightning, "transformers": train_by_transformers}


@pytest.mark.slow
@pytest.mark.parametrize("package", TRAINERS)
def test_trainers_of_other_packages(package):
    pytest.importorskip(package, reason=f"the package {package} is not installed")
    check_near([TRAINERS[package](kind) for kind in (nn.LSTM, fastlstm.LSTM)])
