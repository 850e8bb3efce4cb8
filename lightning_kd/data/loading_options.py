"""Ranges of the options of loaders."""

from lightning_kd.option_checks import is_number

_MOST_ROWS, _MOST_WORKERS, _LONGEST_TIMEOUT = 2**16, 1024, 1_000_000


def check_loading(
    batch_size: int, eval_batch_size: int | None, num_workers: int, worker_timeout: float
) -> None:
    """Validate rows of a batch, processes that prepare them, and how long these may take.

    Raises:
        ValueError: If a value is out of its range.
    """
    sizes = (batch_size, batch_size if eval_batch_size is None else eval_batch_size)
    if (
        not all(is_number(size, whole=True) for size in sizes)
        or min(sizes) < 1
        or max(sizes) > _MOST_ROWS
    ):
        raise ValueError(
            f"batch_size is {batch_size} and eval_batch_size {eval_batch_size}; "
            f"they must be 1 or more, and at most {_MOST_ROWS:,}"
        )
    if not 0 <= num_workers <= _MOST_WORKERS:
        raise ValueError(
            f"num_workers is {num_workers}; it must be 0 or more, and at most {_MOST_WORKERS:,}"
        )
    if not 0 < worker_timeout <= _LONGEST_TIMEOUT:
        raise ValueError(
            f"worker_timeout is {worker_timeout}; it must be a number of seconds above 0, and at "
            f"most {_LONGEST_TIMEOUT:,}"
        )
