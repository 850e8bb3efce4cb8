"""Parts of :class:`~lightning_kd.callbacks.HFExport`: the directory, the model card and the hub."""
