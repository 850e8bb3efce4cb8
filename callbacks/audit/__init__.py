"""Helpers of the gradient audit of :class:`~lightning_kd.callbacks.LossNormalizationDiagnostics`.

The audit replays steps of any module, so it replaces some attributes while it does.
:mod:`~lightning_kd.callbacks.audit.replacements` sets and restores each of them; they are:

====================================  =========================================================
while batches are recorded            the module's ``training_step``, by one that calls it
while a step is replayed              ``log`` and ``log_dict`` of the module and of modules in it;
                                      the trainer's ``loggers``, ``gradient_clip_val``,
                                      ``accumulate_grad_batches`` and ``should_stop``; ``ready``
                                      and ``is_last_batch`` of its counters of batches
while a step is in a single process   ``torch.distributed.group.WORLD``; ``WORLD_SIZE`` in the
                                      environment; the strategy's ``cluster_environment``,
                                      ``parallel_devices`` and ``_num_nodes``
====================================  =========================================================

All other state that a replayed step may change is found from the module and restored by
:class:`~lightning_kd.callbacks.audit.state_snapshot.StateSnapshot`.
"""
