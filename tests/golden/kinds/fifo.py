"""The kinds ``fifo_*``: vectors of the official code of FIFO-Diffusion, with a toy denoiser."""

from typing import Any

import torch
from torch import Tensor

from tests.golden.replay import Replay
from vattn.models.fifo import FIFO, official_ddim


class _Denoiser:
    """``A x + m mean_over_frames(x) + t / 1000 b + cond``, which remembers what it was called with."""

    def __init__(self, golden: Any) -> None:
        self.A, self.m, self.b = golden["A"], golden["m"], golden["b"]
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor, timesteps: Tensor, cond: Tensor) -> Tensor:
        self.calls.append((x, timesteps))
        bias = timesteps.to(x.dtype)[:, None, :, None, None] / 1000 * self.b[:, None, None, None]
        return torch.einsum("dc,bcfhw->bdfhw", self.A, x) + self.m * x.mean(2, keepdim=True) + bias + cond


def fifo_queue(golden: Any) -> None:
    meta = golden.meta
    print(meta)
    f, n = meta["f"], meta["n"]
    sched = official_ddim(f * n, eta=meta["eta"])
    den = _Denoiser(golden)
    fifo = FIFO(den, sched, frames=f, partitions=n, lookahead=meta["lookahead"], guidance_scale=meta["cfg_scale"])
    W = len(fifo._windows)
    sn = golden["step_noise"]
    normals = list(golden["init_noise"].unbind(2))
    video = golden["video"]
    for it in range(meta["iterations"]):
        for p in range(W):
            for i in range(f):
                normals.append(sn[it, p, :, :, i] if sn.numel() else torch.zeros_like(video[:, :, 0]))
        normals.append(golden["enqueued_noise"][it])
    r = Replay(normals=normals)
    fifo.start(video, generator=r)
    s = 1e-9 if golden.dtype == torch.float64 else 1e-5
    m = golden._largest("queue_after_denoise")
    golden.close("init_latents", fifo._queue.latents, atol=s * m)
    for it in range(meta["iterations"]):
        fifo._queue = fifo._queue._replace(number=5)
        x = fifo._advance({"cond": golden["cond"]}, {"cond": golden["uncond"]}, r)
        d = golden["dequeued"][:, :, it]
        print((x - d).abs().max() / m)
    r.assert_used_up("x")
