"""A gradient that fp16 loses and bf16 keeps.

python docs/workshop/underflow.py
"""

import torch

for dtype in (torch.float32, torch.float16, torch.bfloat16):
    weight = torch.ones((), dtype=dtype, requires_grad=True)
    (weight * 1e-4 * 1e-4).backward()  # a gradient of 1e-8, as late in training
    scaled = torch.ones((), dtype=dtype, requires_grad=True)
    (scaled * 1e-4 * (1e-4 * 65536)).backward()  # the loss 65,536 times as large, as a gradient scaler makes it
    assert weight.grad is not None and scaled.grad is not None
    info = torch.finfo(dtype)
    print(
        f"{str(dtype).removeprefix('torch.'):9} gradient {weight.grad.item():.2g}, with loss scaling "
        f"{scaled.grad.item() / 65536:.2g}; largest number {info.max:.2g}, steps of {info.eps:.2g} at 1"
    )
