"""Which start of a run took a step."""

from bst_dist.report.warm_up import by_start


def steps(*numbers):
    return [{"step": number} for number in numbers]


def test_each_step_belongs_to_the_start_that_took_it():
    starts = [{"from_step": 0}, {"from_step": 3}, {"from_step": 3}, {"from_step": 5}]  # the second took no step
    assert by_start(steps(*range(1, 8)), starts) == [steps(1, 2, 3), [], steps(4, 5), steps(6, 7)]


def test_steps_taken_again_belong_to_the_last_start():
    """The second start began after step 6; the third one went back to step 2, as the later checkpoints were damaged."""
    starts = [{"from_step": 0}, {"from_step": 6}, {"from_step": 2}]
    assert by_start(steps(1, 2, 3, 7, 8), starts) == [steps(1, 2), [], steps(3, 7, 8)]


def test_a_start_without_its_first_step_began_at_step_0():
    assert by_start(steps(1, 2), [{}]) == [steps(1, 2)]
