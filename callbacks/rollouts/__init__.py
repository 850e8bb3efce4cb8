"""Helpers of :class:`~lightning_kd.callbacks.OnPolicyGeneration`."""
