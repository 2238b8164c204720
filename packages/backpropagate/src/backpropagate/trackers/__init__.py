"""Experiment trackers: TensorBoard, MLflow and Weights & Biases, each behind one small protocol (`tracker`)."""
