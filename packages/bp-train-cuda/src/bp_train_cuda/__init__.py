"""The CUDA rail: LoRA fine-tuning on transformers, PEFT and TRL; small models also on a CPU."""

from bp_train_cuda.rail import CudaRail

__all__ = ["CudaRail"]
