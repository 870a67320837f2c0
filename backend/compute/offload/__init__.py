"""ZeRO-Inference: a model's layers in host memory or on disk, on the device only while they compute."""
