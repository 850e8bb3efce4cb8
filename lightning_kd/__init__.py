"""Language-model distillation in PyTorch Lightning."""
