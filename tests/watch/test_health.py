"""What may be wrong with a run, and how it is told."""

import pytest

from common.errors import RankError
from trainer.watch.health import from_workers, worker_errors


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset by peer"), EOFError("cut off")])
def test_a_worker_that_dies_while_it_sends_a_batch_is_explained(error):
    def loader():
        yield {"step": 1}
        raise error

    seen = []
    with pytest.raises(RankError, match="most likely because memory ran out: use fewer than --num_workers 2"):
        with worker_errors(2):
            for batch in from_workers(loader()):
                seen.append(batch)
    assert seen == [{"step": 1}]
