from __future__ import annotations

from dpo4rec_ray.texts.filling import Filling


class Writer:
    finished = 0

    def __call__(self) -> int:
        return self.finished


def test_unfinished_samples_and_users_inside_open_shards() -> None:
    writer = Writer()
    filling = Filling(writer)
    assert filling.unfinished() == filling.users_done() == 0
    with filling.shard(4, 40):
        assert (filling.unfinished(), filling.users_done()) == (40, 0)
        writer.finished = 1
        assert (filling.unfinished(), filling.users_done()) == (39, 1), "the first sample shows at once"
        with filling.shard(2, 20):
            writer.finished = 30
            assert (filling.unfinished(), filling.users_done()) == (30, 3), (
                "6 users, half of their 60 samples"
            )
            writer.finished = 45
        assert (filling.unfinished(), filling.users_done()) == (15, 3), "25 of the open shard's 40 samples"
        writer.finished = 60
    assert filling.unfinished() == filling.users_done() == 0


def test_what_a_writer_did_for_an_owner_that_died_does_not_count() -> None:
    writer = Writer()
    filling = Filling(writer)
    writer.finished = 500
    with filling.shard(1, 10):
        assert filling.unfinished() == 10
        writer.finished = 600  # more than was asked for
        assert (filling.unfinished(), filling.users_done()) == (0, 1)
    with filling.shard(1, 10):
        assert filling.unfinished() == 10


def test_a_writer_that_cannot_tell_has_all_of_a_shard_unfinished_until_it_returns() -> None:
    filling = Filling(lambda: None)
    with filling.shard(1, 10):
        with filling.shard(3, 5):
            assert filling.unfinished() == 15
        assert (filling.unfinished(), filling.users_done()) == (10, 0)
    assert filling.unfinished() == 0
