"""Helpers of the gradient audit of :class:`~lightning_kd.callbacks.LossNormalizationDiagnostics`.

The audit replays a step of a module that knows nothing of it, so some attributes must have other
values meanwhile. :mod:`~lightning_kd.callbacks.audit.replacements` sets each one and puts it back;
these are all of them:

====================================  =========================================================
while batches are recorded            the module's ``training_step``, which is called inside
while a step is replayed              ``log`` and ``log_dict`` of the module and of modules in it;
                                      the trainer's ``loggers``, ``gradient_clip_val``,
                                      ``accumulate_grad_batches`` and ``should_stop``; ``ready``
                                      and ``is_last_batch`` of its counters of batches
while several processes are one       ``torch.distributed.group.WORLD``; ``WORLD_SIZE`` in the
                                      environment; the strategy's ``cluster_environment``,
                                      ``parallel_devices`` and ``_num_nodes``
====================================  =========================================================

Everything else that a replayed step may change is reached from the module and restored by
:class:`~lightning_kd.callbacks.audit.state_snapshot.StateSnapshot`.
"""
