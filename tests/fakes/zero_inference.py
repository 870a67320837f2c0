"""A program: the logits that DeepSpeed's own ZeRO-Inference (stage 3, parameters in host memory) gives for some tokens.

python zero_inference.py CHECKPOINT TOKENS OUTPUT
"""

from __future__ import annotations

import os
import sys
import tempfile

import torch

RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


def main(checkpoint: str, tokens: int, output: str) -> None:
    os.environ.update(RANK, DS_ACCELERATOR="cpu", MASTER_PORT="0")
    torch.set_num_threads(1)
    import deepspeed
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    from backend.compute.tensor_parallel import build_all_reduce

    store = torch.distributed.FileStore(os.path.join(tempfile.mkdtemp(), "ranks"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    build_all_reduce()  # under the lock that all who build it take
    deepspeed.init_distributed("gloo")
    stage3 = {"stage": 3, "offload_param": {"device": "cpu"}, "stage3_param_persistence_threshold": 0}
    given = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": stage3}
    kept = HfDeepSpeedConfig(given)  # from_pretrained looks whether one is alive
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    assert all(parameter.numel() == 0 for parameter in model.parameters()), kept
    engine = deepspeed.initialize(model=model, config=given)[0]
    with torch.inference_mode():
        torch.save(engine.module.eval()(torch.arange(tokens)[None]).logits[0], output)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    os._exit(0)
