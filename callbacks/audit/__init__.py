"""Helpers of the gradient audit of :class:`~lightning_kd.callbacks.LossNormalizationDiagnostics`."""
