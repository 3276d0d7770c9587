"""The kinds ``videogpt_*``: vectors of the official code of VideoGPT.

Grids of tokens are stored with their axes, ``(B, T, height, width, C)``, and flattened here for the layers that want a
sequence. Random numbers of the codebook are recorded, and replayed in the order in which the official code drew them.
"""

import itertools
import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.golden.replay import Replay, recorded
from vattn import BlockLayout, edge_sparse_attention
from vattn.models.videogpt import ResNet3d, VideoGPT, generate
from vattn.models.videogpt.layers import AttentionStack, GridEmbedding, LayerNorm, QuickGELU, RightShift
from vattn.models.vqvae import PIXEL_VARIANCE, VQVAE, AttentionResidualBlock, AxialBlock, Codebook


def videogpt_axialblock(golden: Any) -> None:
    block = AxialBlock(golden.meta["channels"], golden.meta["heads"]).to(golden.dtype)
    block.load_state_dict(golden.weights())
    x = golden["x"].requires_grad_()
    for axis in "wht":
        golden.operator(f"out_{axis}_channels_last", getattr(block, f"attn_{axis}")(x.movedim(1, -1)))
    out = block(x)
    golden.operator("out", out)
    _check_gradients(golden, "", out, {"grad/x": x, **_parameters(block)})


def videogpt_resblock(golden: Any) -> None:
    def run(golden: Any) -> dict[str, Tensor]:
        block = AttentionResidualBlock(golden.meta["channels"]).to(golden.dtype)
        block.load_state_dict({name: golden[f"before/{name}"] for name in golden.names("before/")})
        x = golden["x"].requires_grad_()
        out_eval, out = block.eval()(x), block.train()(x)
        return {
            "out": out,
            "out_eval": out_eval,
            **_gradients(out, golden["gout"], {"grad/x": x, **_parameters(block)}),
            **{f"after/{name}": buffer for name, buffer in block.named_buffers()},
        }

    golden.model(run)


def videogpt_codebook(golden: Any) -> None:
    meta = golden.meta
    codebook = Codebook(meta["n_codes"], meta["emb"], restart=meta.get("restart_threshold")).to(golden.dtype)
    before = {name: golden[f"before/{name}"] for name in golden.names("before/")}
    codebook.load_state_dict(before | {"has_begun": torch.tensor(not meta["need_init"])})
    for step in itertools.takewhile(lambda step: f"{step}/z" in golden.arrays, (f"step{i}" for i in itertools.count())):
        z = golden[f"{step}/z"].requires_grad_()
        draws = Replay([], *(recorded(golden, f"{step}/{name}") for name in ("randperm", "tile_noise")))
        quantized = codebook(z, generator=draws)
        draws.assert_used_up(step)
        golden.equal(f"{step}/encodings", quantized.codes)
        golden.operator(f"{step}/embeddings_st", quantized.embeddings)
        golden.operator(f"{step}/commitment_loss", quantized.commitment_loss)
        golden.operator(f"{step}/perplexity", quantized.perplexity)
        loss = (quantized.embeddings * golden[f"{step}/gout"]).sum() + quantized.commitment_loss
        golden.gradient(f"{step}/grad/z", torch.autograd.grad(loss, z)[0])
        if (
            golden.dtype == torch.float32 and codebook.restart is not None
        ):  # a code whose use is exactly the threshold: rounding says if it restarts
            tied = (golden[f"{step}/after/N"] - codebook.restart).abs() < 1e-5
            codebook.embeddings[tied] = golden[f"{step}/after/embeddings"][tied]
        for name in golden.names(f"{step}/after/"):
            golden.operator(f"{step}/after/{name}", codebook.get_buffer(name))
    quantized = codebook.eval()(z)
    golden.equal("eval/encodings", quantized.codes)
    golden.operator("eval/embeddings_st", quantized.embeddings)


def videogpt_vqvae(golden: Any) -> None:
    meta = golden.meta

    def run(golden: Any) -> dict[str, Tensor]:
        model = VQVAE.from_official(golden.weights(), {"downsample": meta["downsample"]})
        hidden: dict[str, Tensor] = {}
        for name, module in (("enc_out", model.encoder), ("pre_vq", model.pre_vq_conv)):
            module.register_forward_hook(lambda _module, _inputs, out, name=name: hidden.update({name: out}))
        video = golden["x"].requires_grad_()
        recon, quantized = model(video)
        golden.equal("encodings", quantized.codes)
        loss = model.training_loss(video)
        return {
            **hidden,
            "recon": recon,
            "recon_loss": F.mse_loss(recon, video) / PIXEL_VARIANCE,
            "commitment_loss": quantized.commitment_loss,
            "perplexity": quantized.perplexity,
            "decode_from_codes": model.decode(quantized.codes),
            "grad/x": torch.autograd.grad(loss, video)[0],
        }

    golden.model(run)


def videogpt_small_ops(golden: Any) -> None:
    meta = golden.meta
    grid, dim = meta["shape"], meta["C"]
    classes = golden["class_cond"]
    tokens = (1, len(grid))  # the axes that are one in a sequence
    layers: dict[str, tuple[nn.Module, Any]] = {
        "ln": (LayerNorm(dim), lambda layer, x: layer(x)),
        "ln_cond": (LayerNorm(dim, meta["class_cond_dim"]), lambda layer, x: layer(x, classes)),
        "posemb": (GridEmbedding(grid, dim), lambda layer, x: x + layer().view(*grid, dim)),
        "rightshift": (RightShift(dim), lambda layer, x: layer(x.flatten(*tokens)).view_as(x)),
        "gelu2": (QuickGELU(), lambda layer, x: layer(x)),
    }
    for name, (layer, apply) in layers.items():
        layer.to(golden.dtype).load_state_dict({key: golden[f"{name}/w/{key}"] for key in golden.names(f"{name}/w/")})
        x = golden["x"].requires_grad_()
        out = apply(layer, x)
        golden.operator(f"{name}/out", out)
        _check_gradients(golden, f"{name}/", out, {"grad/x": x, **_parameters(layer)}, golden["gout"])

    embedding, indices = layers["posemb"][0], [int(i) for i in golden["posemb/decode_idx"]]
    position = int(torch.arange(math.prod(grid)).view(grid)[tuple(indices)])
    token = golden["x"][(slice(None), *(slice(i, i + 1) for i in [0] * len(grid)))]
    golden.operator("posemb/decode_out", token + embedding(position))
    # The official code also has it with channels in front, a table being (channels, size).
    embedding.load_state_dict({key: golden[f"posemb_dim1/w/{key}"].T for key in golden.names("posemb_dim1/w/")})
    golden.operator("posemb_dim1/out", (golden["x"] + embedding().view(*grid, dim)).movedim(-1, 1))


def videogpt_stack(golden: Any) -> None:
    meta = golden.meta

    def run(golden: Any) -> dict[str, Tensor]:
        frames, num_classes = meta.get("frame_cond_shape"), meta.get("class_cond_dim")
        stack = AttentionStack(
            meta["shape"], meta["C"], meta["heads"], meta["layers"], attention=meta.get("attn") or "full",
            num_classes=num_classes, memory_dim=frames and frames[-1],
        ).to(golden.dtype).eval()  # fmt: skip
        stack.load_state_dict(golden.weights())
        classes = _classes(golden) if num_classes else None
        if classes is not None and not classes.is_floating_point():
            classes = F.one_hot(classes, num_classes).to(golden.dtype)
        memory = golden["frame_cond"].flatten(1, -2) if frames else None
        x = golden["x"].requires_grad_()
        out = stack(x.flatten(1, -2), classes, memory).view_as(x)
        state, sequence = stack.begin(classes, memory), x.detach().flatten(1, -2)
        with torch.no_grad():
            rows = [stack.step(sequence[:, max(i - 1, 0), None], state) for i in range(sequence.shape[1])]
        return {
            "out": out,
            "decode_out": torch.cat(rows, 1).view_as(x),
            **_gradients(out, golden["gout"], {"grad/x": x, **_parameters(stack)}),
        }

    golden.model(run)


def videogpt_gpt(golden: Any) -> None:
    meta = golden.meta

    def run(golden: Any) -> dict[str, Tensor]:
        config = {"heads": meta["heads"], "attn_type": meta.get("attn") or "full"}
        model = VideoGPT.from_official(golden.weights(), config)
        assert model.grid == tuple(meta["latent_shape"]) and model.num_classes == (meta.get("class_cond_dim") or None)
        classes, codes = _classes(golden) if model.num_classes else None, golden["codes"]
        logits, loss = model(codes, classes=classes), model.training_loss(codes, classes=classes)
        golden.equal("greedy_samples", generate(model, len(codes), classes=classes, temperature=0.0))
        parameters = _parameters(model)
        gradients = torch.autograd.grad(loss, [*parameters.values()])
        return {"logits": logits, "loss": loss, **dict(zip(parameters, gradients, strict=True))}

    golden.model(run)


def videogpt_resnet(golden: Any) -> None:
    meta = golden.meta

    def run(golden: Any) -> dict[str, Tensor]:
        width = int(64 * (meta.get("width_multiplier") or 1))
        resnet = ResNet3d(meta["resnet_dim"], meta["layers"], meta["stride"], width=width).double()
        with torch.no_grad():  # as meta["note"] says: they would be a large file
            for i, (name, parameter) in enumerate(sorted(resnet.named_parameters())):
                wave = torch.cos(1.7 * torch.arange(parameter.numel()).double().square() + i).view_as(parameter)
                if parameter.dim() > 1:
                    parameter.copy_((2 / parameter[0].numel()) ** 0.5 * wave)
                else:
                    parameter.copy_(0.3 * wave + name.endswith("weight"))
        x = golden["x"].requires_grad_()
        out = resnet.to(golden.dtype)(x)
        return {"out": out, **_gradients(out, golden["gout"], {"grad/x": x})}

    golden.model(run)


def videogpt_sparse(golden: Any) -> None:
    for i, case in enumerate(golden.meta["cases"]):
        grid, block, causal = case["shape"], case["block"], case["causal"]
        layout = BlockLayout.strided(grid, block, num_local_blocks=case["num_local_blocks"], causal=causal)
        blocks = layout.to_mask()[::block, ::block]
        golden.equal(f"c{i}/layout", blocks)
        assert int(golden[f"c{i}/block_shape"].prod()) == layout.num_blocks
        mask = layout.to_mask().tril() if causal else layout.to_mask()
        if f"c{i}/dense_mask" in golden.arrays:
            golden.equal(f"c{i}/dense_mask", mask)
        if f"c{i}/attn_mask_blocks" in golden.arrays:
            parts = mask.unflatten(1, (-1, block)).unflatten(0, (-1, block)).transpose(1, 2)
            golden.equal(f"c{i}/attn_mask_blocks", parts[blocks])
        inputs = {f"grad/{name}": golden[f"c{i}/{name}"].requires_grad_() for name in "qkv"}
        query, key, value = (x.flatten(2, -2) for x in inputs.values())
        out = cast(Tensor, edge_sparse_attention(query, key, value, layout, causal=causal)).view_as(inputs["grad/q"])
        golden.operator(f"c{i}/out", out)
        _check_gradients(golden, f"c{i}/", out, inputs)


def _classes(golden: Any) -> Tensor:
    """The classes of a batch: weights, or numbers."""
    return next(golden[name] for name in ("class_cond", "label") if name in golden.arrays)


def _parameters(module: nn.Module) -> dict[str, Tensor]:
    return {f"wgrad/{name}": parameter for name, parameter in module.named_parameters()}


def _gradients(out: Tensor, gout: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(tensors, torch.autograd.grad((out * gout).sum(), [*tensors.values()]), strict=True))


def _check_gradients(
    golden: Any, prefix: str, out: Tensor, tensors: dict[str, Tensor], gout: Tensor | None = None
) -> None:
    """Those gradients that the file has."""
    gout = golden[f"{prefix}gout"] if gout is None else gout
    for name, gradient in _gradients(out, gout, tensors).items():
        if f"{prefix}{name}" in golden.arrays:
            golden.gradient(f"{prefix}{name}", gradient)
