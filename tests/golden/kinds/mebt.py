"""The kinds ``mebt_*``: vectors of the official code of MeBT.

Names of cases have their settings in them: ``train_cosine_budget4_t0.2`` is the cosine schedule at time 0.2, with
at most 4 targets. Random numbers are recorded, and replayed in the order in which the official code drew them.
"""

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.golden.replay import Replay, recorded
from vattn.models.mebt import (
    LatentTransformer,
    MeBT,
    complement,
    draft,
    draft_and_revise,
    draft_partitions,
    frames_of,
    mask_ratio,
    masked_loss,
    maskgit,
    next_partition,
    num_masked,
    revise,
    revise_partitions,
    sample_tokens,
    split_positions,
)
from vattn.models.vqvae import VQGAN, Codebook
from vattn.nn import LATENT_MODES, LatentBlock

_num_masked = partial(num_masked, official_rounding=True)
STREAMS = ("sos", "contexts", "targets")


def mebt_blocks(golden: Any) -> None:
    meta, weights = golden.meta, golden.weights()
    cases = sorted({name.rpartition("/sos_out")[0] for name in golden.names() if name.endswith("/sos_out")})
    modes = {case.removesuffix("_emptyctx") for case in cases}
    assert modes and modes <= set(LATENT_MODES)
    for case in cases:
        block = LatentBlock(meta["dim"], meta["heads"], case.removesuffix("_emptyctx")).to(golden.dtype)
        block.load_state_dict(weights)
        inputs, gouts = [golden[name] for name in STREAMS], [golden[f"gout_{name}"] for name in STREAMS]
        if case.endswith("_emptyctx"):
            inputs[1], gouts[1] = inputs[1][:, :0], gouts[1][:, :0]
        inputs = [x.clone().requires_grad_() for x in inputs]
        bias = next((golden[name] for name in (f"{case}/attn_bias", "attn_bias") if name in golden.arrays), None)
        outs = block(*inputs, bias)
        for stream, out in zip(STREAMS, outs, strict=True):
            golden.operator(f"{case}/{stream}_out", out)
        names = [f"grad/{stream}" for stream in STREAMS] + [f"wgrad/{name}" for name, _ in block.named_parameters()]
        loss = sum((out * gout).sum() for out, gout in zip(outs, gouts, strict=True))
        _check_gradients(golden, f"{case}/", loss, names, [*inputs, *block.parameters()])


def mebt_gpt(golden: Any) -> None:
    meta, weights = golden.meta, golden.weights()
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    modes = [*meta["modes"], *["maskgit"] * (depth - len(meta["modes"]))]  # as the official code completes them
    model = LatentTransformer(meta["vocab"], meta["dim"], meta["heads"], modes).to(golden.dtype).eval()
    model.load_state_dict(weights)
    inputs = [golden[name].requires_grad_() for name in STREAMS]
    latents, contexts, targets = inputs
    golden.operator("logits_emptyctx", model(latents, contexts[:, :0], targets))

    changed: dict[str, Tensor] = {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(
            lambda block, _inputs, outs, i=i: changed.update({f"block{i}/changed": _readers(block.mode, outs)})
        )
    logits = model(*inputs)
    golden.operator("logits", logits)
    for name, stream in changed.items():
        golden.operator(name, stream)
    names = [f"grad/{stream}" for stream in STREAMS] + [f"wgrad/{name}" for name, _ in model.named_parameters()]
    _check_gradients(golden, "", (logits * golden["gout"]).sum(), names, [*inputs, *model.parameters()])


def mebt_masks(golden: Any) -> None:
    frames, height, width = golden.meta["shape"]
    frame_tokens = height * width
    for name in golden.names("sched64/"):
        golden.close(f"sched64/{name}", mask_ratio(name, golden["sched/t"].double()), atol=1e-12)
        golden.close(f"sched32/{name}", mask_ratio(name, golden["sched/t"].float()), atol=1e-7)
    for name, (schedule, tokens, steps) in _matches(golden, "nmask_f32/", r"(\w+)_N(\d+)_steps(\d+)"):
        numbers = [_num_masked(schedule, step / int(steps), int(tokens)) for step in range(int(steps) + 1)]
        golden.equal(name, torch.tensor(numbers))
    _check_splits(golden, frame_tokens)
    for name, (kind, steps) in _matches(golden, "gibbs/", r"(draft|revise)_\w+_n(\d+)/perm"):
        _check_groups(golden, name.removesuffix("perm"), kind, int(steps), frames * frame_tokens)
    golden.equal("complement/out", complement(golden["complement/idx"], frames * frame_tokens))
    context, target, score = (golden[f"next/{name}"] for name in ("context", "target", "score"))
    for name, (t, temperature) in _matches(golden, "next/", r"t([\d.]+)_ctemp([\d.]+)/context_out"):
        prefix = name.removesuffix("context_out")
        masked = _num_masked(golden.meta.get("schedule", "cosine"), float(t), frames * frame_tokens)
        golden.equal(f"{prefix}n_masked", torch.full((len(score),), masked))
        draws = Replay([golden[f"{prefix}exp"]] if f"{prefix}exp" in golden.arrays else [])
        new_context, new_target = next_partition(
            context, target, score, masked, context_temperature=float(temperature), generator=draws
        )
        golden.equal(f"{prefix}context_out", new_context)
        golden.equal(f"{prefix}target_out", new_target)
        draws.assert_used_up(prefix)


def mebt_sample_logits(golden: Any) -> None:
    # The cases are lists of T, k and p, or a text: "(T,k,p): (1,None,None),(0.7,5,None),...".
    cases = golden.meta["cases"]
    if isinstance(cases, str):
        cases = re.findall(r"\(([\d.e+-]+), ?(None|\d+), ?(None|[\d.e+-]+)\)", cases)
    assert len(cases) == len({name.split("/")[0] for name in golden.names("c")})
    for i, (temperature, top_k, top_p) in enumerate(cases):
        draws = Replay([golden[f"c{i}/exp"]])
        tokens, probabilities = sample_tokens(
            golden["logits"],
            temperature=float(temperature),
            top_k=None if top_k in ("None", None) else int(top_k),
            top_p=None if top_p in ("None", None) else float(top_p),
            generator=draws,
        )
        golden.equal(f"c{i}/samples", tokens)
        golden.close(f"c{i}/probs", probabilities, atol=1e-6)  # float32 in every dtype, as the official code


def mebt_decode(golden: Any) -> None:
    meta = golden.meta
    config = {"n_head": meta["heads"], "mode": meta["modes"], "shape": meta["shape"]}
    model = MeBT.from_official(golden.weights(), config)
    codes, indices, known = golden["z"], golden["indices"], int(golden["nc"])
    context, target = indices[:, :known], indices[:, known:]
    golden.operator("recon/logits", model(codes, context, target))
    golden.operator("recon/logits_emptyctx", model(codes, indices[:, :0], indices))

    for name, (t, average) in _matches(golden, "loss_", r"t([\d.]+)_avg([\d.]+)/loss"):
        prefix, masked = name.removesuffix("loss"), _num_masked(meta["schedule"], float(t), indices.shape[1])
        parts = split_positions(indices, masked)
        logits, wanted = model(codes, *parts), codes.flatten(1).gather(1, parts[1])
        stored = torch.from_numpy(golden.arrays[f"{prefix}ratio"])  # float32 or float64
        golden.equal(f"{prefix}ratio", torch.tensor(masked / indices.shape[1], dtype=stored.dtype))
        golden.equal(f"{prefix}target", wanted)
        golden.operator(f"{prefix}logits", logits)
        golden.operator(name, masked_loss(logits, wanted, masked, indices.shape[1], average=float(average)))

    chance = {"temperature": meta.get("temperature", 1.0)}
    steps = {"num_steps": meta["n_steps"], "schedule": meta["schedule"]}
    steps |= {"context_temperature": meta.get("context_temperature") or 0.0, "official_rounding": True}
    filters = {name: meta.get(name) for name in ("top_k", "top_p")}
    given, nothing = {"context": context, "target": target}, torch.zeros_like(codes)
    paths: dict[str, Any] = {
        "sample_maskgit": (maskgit, nothing, chance | steps),
        "sample_maskgit_topk": (maskgit, nothing, chance | steps | filters | {"context_temperature": 0.0}),
        "sample_ctx": (maskgit, codes, chance | steps | given),
        "sample_edit": (maskgit, codes, chance | steps | given | {"start_anew": True}),
        "draft_greedy": (draft, nothing, {"temperature": 0.0, "num_steps": meta["n_draft"]}),
        "revise_greedy": (revise, codes, {"temperature": 0.0, "num_steps": meta["n_revise"]}),
        "dnr": (
            draft_and_revise,
            nothing,
            chance | {"draft_steps": meta["n_draft"], "revise_steps": meta["n_revise"], "num_revisions": meta["M"]},
        ),
    }
    for path, (sampler, start, settings) in paths.items():
        _check_sampler(golden, path, model, sampler, start, settings)


def mebt_vqgan(golden: Any) -> None:
    meta, is_double = golden.meta, golden.dtype == torch.float64
    tolerance = 1e-6 if is_double else 1e-4
    model = VQGAN.from_official(
        golden.weights(),
        {"downsample": meta["downsample"], "padding_type": meta.get("padding_type") or "replicate"},
        groups=meta.get("groupnorm_groups") or 32,
    )
    hidden: dict[str, Tensor] = {}
    for name, module in (("enc_out", model.encoder), ("pre_vq", model.pre_vq_conv)):
        module.register_forward_hook(lambda _module, _inputs, out, name=name: hidden.update({name: out}))
    video = golden["x"].requires_grad_()
    recon, quantized = model(video)
    golden.equal("encodings", quantized.codes)
    for name, actual in {
        **hidden,
        "embeddings": quantized.embeddings,
        "commitment_loss": quantized.commitment_loss,
        "perplexity": quantized.perplexity,
        "recon": recon,
        "decode_from_codes": model.decode(quantized.codes),
    }.items():
        largest = float(abs(golden.arrays[name]).max())
        golden.close(name, actual, atol=tolerance * max(largest, 1.0))
    loss = (recon * golden["gout"]).sum() + quantized.commitment_loss
    _check_gradients(golden, "", loss, ["grad/x"], [video])


def mebt_codebook(golden: Any) -> None:
    meta = golden.meta
    restart = None if meta.get("no_random_restart") else meta.get("restart_thres")
    codebook = Codebook(meta["n_codes"], meta["emb"], restart=restart).to(golden.dtype)
    before = {name: golden[f"before/{name}"] for name in golden.names("before/")}
    codebook.load_state_dict(before | {"has_begun": torch.tensor(not meta["need_init"])})
    z = golden["z"].requires_grad_()
    draws = Replay([], *(recorded(golden, name) for name in ("randperm", "tile_noise")))
    quantized = codebook(z, generator=draws)
    golden.equal("encodings", quantized.codes)
    golden.operator("embeddings_st", quantized.embeddings)
    golden.operator("commitment_loss", quantized.commitment_loss)
    golden.operator("perplexity", quantized.perplexity)
    for name in golden.names("after/"):
        golden.operator(f"after/{name}", codebook.get_buffer(name))
    loss = (quantized.embeddings * golden["gout"]).sum() + quantized.commitment_loss
    _check_gradients(golden, "", loss, ["grad/z"], [z])
    draws.assert_used_up("codebook")


def _check_sampler(golden: Any, path: str, model: MeBT, sampler: Any, codes: Tensor, settings: dict[str, Any]) -> None:
    """One sample of the official code, with its random numbers: what the model was asked and said, and the result.

    Without chance in the choice of contexts, tokens with a probability of 1 are equally sure, and the official sort is
    not stable: then contexts are compared without their order, which changes nothing but how sums are rounded.
    """
    calls = 0

    def check(name: str, positions: Tensor) -> None:
        if "context" in name and settings.get("context_temperature") == 0:
            golden.arrays[name], positions = np.sort(golden.arrays[name], 1), positions.sort().values
        golden.equal(name, positions)

    def ask(codes: Tensor, context: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        call, calls = f"{path}/call{calls}/", calls + 1
        for name, positions in (("x_in", codes), ("context", context), ("target", target)):
            check(f"{call}{name}", positions)
        logits = model(codes, context, target)
        golden.close(f"{call}logits", logits, atol=2e-5)  # these paths were computed in float32
        return logits

    permutations = [*golden[f"{path}/randperm"]] if f"{path}/randperm" in golden.arrays else []
    draws = Replay(recorded(golden, f"{path}/exp"), permutations)
    sample = sampler(ask, codes, **settings, generator=draws)
    golden.equal(f"{path}/final", sample.codes)
    golden.equal(f"{path}/ncalls", torch.tensor(calls))
    draws.assert_used_up(path)
    for name, positions in (("context_final", sample.context), ("target_final", sample.target)):
        if f"{path}/{name}" in golden.arrays:
            check(f"{path}/{name}", positions)


def _check_splits(golden: Any, frame_tokens: int) -> None:
    order = golden["div/indices"]
    for name, (phase, schedule, budget, t) in _matches(
        golden, "div/", r"(eval|train)_(\w+?)(?:_budget(\d+))?_t([\d.]+)/context"
    ):
        prefix, part = name.removesuffix("context"), order
        if phase == "train":
            start, num_frames = int(golden[f"{prefix}start_t"]), int(golden[f"{prefix}T"])
            part = frames_of(order, start, num_frames, frame_tokens)
            golden.equal(f"{prefix}seq_len", torch.tensor(part.shape[1]))
        masked = _num_masked(schedule, float(t), part.shape[1])
        context, target = split_positions(part, masked, None if budget is None else int(budget))
        golden.equal(name, context)
        if masked:
            golden.equal(f"{prefix}target", target)
        else:  # the official code means part[:, -0:], which is all instead of nothing
            assert target.shape == (len(order), 0)
            golden.equal(f"{prefix}target", part)


def _check_groups(golden: Any, prefix: str, kind: str, steps: int, num_tokens: int) -> None:
    permutation = golden[f"{prefix}perm"]
    context, target = permutation[:, :0], torch.arange(num_tokens).expand(len(permutation), -1)
    if f"{prefix}context_in" in golden.arrays:
        context, target = golden[f"{prefix}context_in"], golden[f"{prefix}target_in"]
    partitions = draft_partitions if kind == "draft" else revise_partitions
    found = partitions(context, target.gather(1, permutation), steps)
    assert len(found) == len([name for name in golden.names(f"{prefix}context") if name.isdigit()])
    for i, (now_context, now_target) in enumerate(found):
        golden.equal(f"{prefix}context{i}", now_context)
        golden.equal(f"{prefix}target{i}", now_target)


def _check_gradients(golden: Any, prefix: str, loss: Any, names: list[str], tensors: list[Tensor]) -> None:
    """Those gradients that the file has; where it has one, and there is none, it must be 0."""
    gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
    for name, tensor, gradient in zip(names, tensors, gradients, strict=True):
        if f"{prefix}{name}" in golden.arrays:
            # A key's bias adds the same to all scores of a query: its gradient is 0, but for the rounding of others.
            is_zero = name.endswith("attn.key.bias") or not tensor.numel()
            check = golden.operator if is_zero else golden.gradient
            check(f"{prefix}{name}", torch.zeros_like(tensor) if gradient is None else gradient)


def _readers(mode: str, streams: tuple[Tensor, ...]) -> Tensor:
    """The streams that a block of this mode has updated, as one."""
    by_name = dict(zip(("latents", "contexts", "targets"), streams, strict=True))
    return torch.cat([by_name[name] for name in LATENT_MODES[mode][0]], 1)


def _matches(golden: Any, prefix: str, pattern: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The arrays under `prefix` whose names match `pattern`, and the groups of the match."""
    for name in golden.names(prefix):
        if match := re.fullmatch(pattern, name):
            yield f"{prefix}{name}", match.groups()
