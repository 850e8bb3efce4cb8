"""What a module is trained on next, for teachers that want to hear of it."""

from collections.abc import Sequence

import lightning as L

from lightning_kd.batch import Batch
from lightning_kd.modules import TeacherModule


def tell_what_comes(
    module: L.LightningModule, window: Sequence[Batch], place: int, ends_window: bool
) -> None:
    """Tell a module whose teacher looks ahead which micro-batch comes next.

    Args:
        module: The module.
        window: The micro-batches of the window, as they are trained on.
        place: The present one's.
        ends_window: Whether it is the last one, in the last pass: the next window is not known yet.
    """
    if isinstance(module, TeacherModule) and module.teacher.looks_ahead and not ends_window:
        module.coming = window[(place + 1) % len(window)]
