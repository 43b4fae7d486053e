"""ZeRO's states and traffic, compared with the arithmetic of arXiv 1910.02054 in fp32."""

import pytest

from bst_dist.activation.config import ActivationCheckpointingConfig
from bst_dist.plan.memory.gathering import gather
from bst_dist.plan.memory.parts import Slice
from bst_dist.plan.memory.peak import Work
from bst_dist.plan.memory.zero import Sizes, Strategy, states
from bst_dist.plan.traffic import GATHER, REDUCE, SCATTER, zero_traffic

WORLD = 8
SIZES = Sizes(groups=((64_000,) * 10, (320_000,)), layers=(((64_000,),) * 5,) * 2, embedding=320_000, rest=0)
N = 960_000


def work(stage: int, accumulation: int = 1, **zero: int) -> Work:
    strategy = Strategy.of({"stage": stage, "stage3_param_persistence_threshold": 0, **zero}, "test")
    return Work(strategy, WORLD, Slice(1, 512), accumulation, ActivationCheckpointingConfig(), depth=2)


@pytest.mark.parametrize(
    ("stage", "weights", "master", "moments"),
    [(0, 1, 0, 2), (1, 1, 1 / 8, 2 / 8), (2, 1, 1 / 8, 2 / 8), (3, 1 / 8, 1 / 8, 2 / 8)],
)
def test_zero_states_are_divided_according_to_the_stage(stage, weights, master, moments):
    found = states(SIZES, work(stage).strategy, WORLD, accumulation=1)
    assert (found.weights, found.master, found.moments) == (4 * N * weights, 4 * N * master, 4 * N * moments)


def test_groups_are_padded_to_equal_shares_per_rank():
    sizes = Sizes(groups=((101,),), layers=(((101,),),), embedding=0, rest=0)
    found = states(sizes, work(1).strategy, WORLD, accumulation=1)
    assert found.weights == 4 * 112  # an even number on each of 8 ranks


@pytest.mark.parametrize(
    ("stage", "overlap", "accumulation", "gradients", "buckets", "reducing"),
    [
        (0, False, 1, N, 0, N),
        (1, False, 1, N, 100_000, 320_000 + 448_000 - 100_000),
        (1, True, 1, N, 200_000, 320_000 + 448_000 - 100_000),
        (2, False, 1, 448_000, 100_000, 320_000),
        (2, True, 4, 2 * 448_000, 200_000, 320_000),
        (3, True, 1, N / 8, 100_000, 320_000),
    ],
)
def test_memory_of_gradients_before_reduction(stage, overlap, accumulation, gradients, buckets, reducing):
    """A bucket has 100,000 elements; there are two if reduction overlaps the backward pass (stage 3 has one).

    A rank's share of the first group, 80,000 elements, has parts of two parameters of 64,000. Its share of the second
    group is a part of the only parameter, of 320,000 elements, which does not fit in a bucket.
    """
    strategy = Strategy.of({"stage": stage, "reduce_bucket_size": 100_000, "overlap_comm": overlap}, "test")
    found = states(SIZES, strategy, WORLD, accumulation)
    assert (found.gradients, found.buckets, found.reducing) == (4 * gradients, 4 * buckets, 4 * reducing)


def test_offload_settings_are_detected():
    assert not Strategy.of({"stage": 2, "offload_optimizer": None}, "test").offloads
    assert Strategy.of({"stage": 2, "offload_optimizer": {"device": "cpu"}}, "test").offloads
    assert Strategy.of({"stage": 3, "offload_param": {"device": "nvme"}}, "test").offloads
    assert [Strategy.of({"stage": stage}, "test").overlap_comm for stage in range(4)] == [False, False, False, True]


def test_zero_traffic_of_each_stage():
    once = 4 * N * (WORLD - 1) / WORLD
    assert zero_traffic(SIZES, work(0, accumulation=4)) == {REDUCE: 2 * once}
    assert zero_traffic(SIZES, work(1, accumulation=4)) == {REDUCE: 2 * once, GATHER: once}
    assert zero_traffic(SIZES, work(2, accumulation=4)) == {REDUCE: 8 * once, GATHER: once}
    nothing_kept = zero_traffic(SIZES, work(3, stage3_max_reuse_distance=0, stage3_prefetch_bucket_size=0))
    embedding = 4 * 320_000 * (WORLD - 1) / WORLD  # gathered once, because it is also the head
    assert nothing_kept == {SCATTER: once, GATHER: 2 * once - embedding}
    assert zero_traffic(SIZES, work(3)) == {SCATTER: once, GATHER: once}


def test_untied_head_and_embedding_are_each_gathered_twice():
    """Once in each pass, unless they are kept between the passes; the head is needed again at once."""
    sizes = Sizes(SIZES.groups, SIZES.layers, embedding=320_000, rest=0, head=320_000)
    strategy = work(3, stage3_max_reuse_distance=0, stage3_prefetch_bucket_size=0).strategy
    assert gather(sizes, strategy, rerun=[False, False]).received == 4 * 2 * (2 * 320_000 + 640_000)
    strategy = work(3, stage3_max_reuse_distance=1, stage3_prefetch_bucket_size=0).strategy
    assert gather(sizes, strategy, rerun=[False, False]).received == 4 * (3 * 320_000 + 2 * 640_000)


def test_autocast_matrices_are_gathered_in_half_precision():
    """Here the first parameter of each of the two layers is gathered in bf16."""
    half = frozenset({(0, 0, 0), (1, 0, 0)})
    sizes = Sizes(SIZES.groups, SIZES.layers, embedding=320_000, rest=0, sent_in_half=half)
    strategy = work(3, stage3_max_reuse_distance=0, stage3_prefetch_bucket_size=0).strategy
    single, found = (gather(one, strategy, rerun=[True, False]) for one in (SIZES, sizes))
    assert single.received - found.received == 2 * 64_000 * (3 + 2)  # layer 0 is recomputed
    assert found.forward == single.forward  # they are stored in fp32


def test_compiled_layers_are_gathered_as_a_whole():
    """One of the second layer's matrices is sent in bf16, whatever its position."""
    sizes = Sizes(
        SIZES.groups, SIZES.layers, 320_000, rest=0, head=320_000, sent_in_half=frozenset({(1, 3, 0), (2, 0, 0)})
    )
    strategy = work(3, stage3_max_reuse_distance=0, stage3_prefetch_bucket_size=0).strategy
    parts, whole = (gather(one, strategy, rerun=[False, False]) for one in (sizes, sizes.by_layer))
    assert parts.received == whole.received == 4 * (4 * 320_000 + 4 * 320_000) - 2 * (2 * 64_000 + 2 * 320_000)
    assert parts.forward == parts.backward == (4 * 64_000,) * 2
    assert whole.forward == whole.backward == (4 * 320_000,) * 2


def test_last_layers_stay_gathered_between_passes():
    strategy = work(3, stage3_max_reuse_distance=300_000, stage3_prefetch_bucket_size=0).strategy
    found = gather(SIZES, strategy, rerun=[False, False])
    assert found.between == 4 * (320_000 + 3 * 64_000)  # of the fourth, 2 x 3 x 64,000 elements lie between its uses
    assert found.received == 4 * (320_000 + 2 * 640_000 - 3 * 64_000)
    assert found.forward[0] == found.backward[0] == 4 * (320_000 + 64_000)
