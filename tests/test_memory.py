"""Rollouts that do not fit into memory are computed in smaller chunks, lose nothing, and say so."""

from __future__ import annotations

import pytest
import torch
from test_rollout import FEEDBACK, LinearDynamics, generator, learnt, make_engine, make_spaces, policy, starts
from torch import Tensor

from dydiff.dynamics import DynamicsEnsemble
from dydiff.errors import DydiffError
from dydiff.memory import compute_in_chunks, is_out_of_memory
from dydiff.rollout import RolloutEngine


def hog(rows: int, limit: int) -> None:
    """Ask PyTorch for more memory than any machine has, where there are more rows than `limit`."""
    if rows > limit:
        torch.empty(rows, 2**50)


class HungryDynamics(DynamicsEnsemble):
    """An ensemble for which the memory suffices up to some number of rows, from its `after`-th call on."""

    limit, after, calls = 3, 0, 0

    def draw_elite(self, batch_size: int, generator: torch.Generator) -> Tensor:  # every prediction begins with it
        self.calls += 1
        if self.calls > self.after:
            hog(batch_size, self.limit)
        return super().draw_elite(batch_size, generator)


def ensemble(limit: int = 10**9, after: int = 0) -> HungryDynamics:
    torch.manual_seed(0)
    dynamics = HungryDynamics(2, 1, [8], num_nets=3, num_elites=3, weight_decay=[0, 0])
    dynamics.limit, dynamics.after = limit, after
    return dynamics


def roll_out(engine: RolloutEngine, count: int = 11) -> list[Tensor]:
    source = generator(4)
    stochastic = lambda o: torch.tanh(o @ FEEDBACK + torch.randn(len(o), 1, generator=source))  # noqa: E731
    return [*engine.roll_out(stochastic, starts(count), source)]


def test_a_chunk_too_large_is_halved_until_it_fits_and_gives_what_that_size_gives(capsys):
    engine = make_engine(learnt(), dynamics=ensemble(limit=3), chunk_size=10)
    found = roll_out(engine)
    told = capsys.readouterr().err
    assert "Out of memory with 10 rollouts at a time (" in told and "can't allocate memory" in told
    assert told.rstrip().endswith("going on with 2. Set rl_trainer_params.each_rollout_size to 2 to begin with that.")
    assert told.count("Out of memory") == 2 and engine.chunk_size == 2
    for one, other in zip(found, roll_out(make_engine(learnt(), dynamics=ensemble(), chunk_size=2)), strict=True):
        assert torch.equal(one, other)
    roll_out(engine)
    assert not capsys.readouterr().err, "the next rollout began with chunks that do not fit"


def test_chunks_that_are_done_are_kept():
    """Memory runs out midway through the second chunk of 4: the first stays, the rest is computed by twos."""
    dynamics = ensemble(limit=2, after=8)  # 5 calls a chunk
    found = roll_out(make_engine(learnt(), dynamics=dynamics, chunk_size=4))
    assert dynamics.calls == 5 + 4 + 5 * 4  # the first chunk, the failed one up to its failure, and 2, 2, 2 and 1 rows
    for one, other in zip(found, roll_out(make_engine(learnt(), dynamics=ensemble(), chunk_size=4)), strict=True):
        assert torch.equal(one[:4], other[:4]) and one.shape == other.shape and one.isfinite().all()


def test_not_even_one_row_is_an_error_and_other_errors_pass_through():
    with pytest.raises(DydiffError, match="The memory of cpu does not hold a single rollout .*smaller diffusion model"):
        roll_out(make_engine(learnt(), dynamics=ensemble(limit=0), chunk_size=10))

    class Broken(LinearDynamics):
        def predict(self, observation, action, elite):
            raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        make_engine(learnt(), dynamics=Broken()).roll_out(policy, starts(3), generator())


def test_what_counts_as_out_of_memory():
    try:
        try:
            hog(1, 0)
        except RuntimeError as error:
            raise DydiffError("a graph cannot be captured") from error
    except DydiffError as error:
        assert is_out_of_memory(error)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and is_out_of_memory(MemoryError())
    for words in ("CUDA error: out of memory", "Triton Error [CUDA]: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling"):
        assert is_out_of_memory(RuntimeError(words))
    for words in ("an illegal memory access", "out of resource: shared memory"):
        assert not is_out_of_memory(RuntimeError(words))
    assert not is_out_of_memory(None)


def test_no_rows_are_one_empty_chunk():
    assert compute_in_chunks(len, torch.empty(0, 2), 4, generator(), lambda size: None, "size") == [0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_with_little_memory(capsys):
    """PyTorch's own limit on its allocator; the second rollout captures graphs and the third replays them."""
    count = 1 << 18
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    # cuBLAS takes up to 32 MiB for each of two streams.
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (256 << 20)) / total)
    try:
        denoiser, dynamics = learnt().cuda().requires_grad_(False), ensemble().cuda()
        engine = RolloutEngine([denoiser], dynamics, make_spaces().to("cuda"), 6, chunk_size=count)
        feedback, source = FEEDBACK.cuda(), torch.Generator("cuda").manual_seed(0)
        for _ in range(3):
            trajectory = engine.roll_out(lambda o: torch.tanh(o @ feedback), starts(count).cuda(), source)
            assert len(trajectory.action) == count and all(bool(field.isfinite().all()) for field in trajectory)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert f"Out of memory with {count} rollouts" in capsys.readouterr().err and engine.chunk_size < count
