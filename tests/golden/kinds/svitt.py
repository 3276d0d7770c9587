"""The kinds ``svitt_*``: vectors of the official code of SViTT, its BEiT and its BERT.

The prefix ``c3/`` is the case of that number in the list `cases` of `meta`. Random numbers are recorded as what came of
them: blocks that are read, negatives. Where a block reads its neighbours, the official code mirrors them for its values
and biases; such cases are compared with what it gives when mended.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from vattn import BlockLayout, RelativePositionBias3D
from vattn.models.svitt import (
    Draws,
    Negatives,
    SparseBlock,
    Sparsity,
    SViTT,
    TextEncoder,
    VideoEncoder,
    contrastive_loss,
    matching_loss,
    negative_weights,
)
from vattn.models.svitt import weights as names
from vattn.models.svitt.sparsity import official_sparsity
from vattn.nn import SparseSelfAttention
from vattn.position_bias import relative_position_index

MENDED = "local_consistent_out_NOT_OFFICIAL"


class _Replay(Draws):
    """Draws of uniform numbers that were recorded."""

    def __init__(self, uniforms: Tensor) -> None:
        super().__init__()
        self.recorded = uniforms

    def uniforms(self, *shape: int, device: torch.device) -> Tensor:
        assert self.recorded.shape == shape
        return self.recorded


def svitt_relpos3d(golden: Any) -> None:
    cases = {name.split("/")[0] for name in golden.names()}
    assert len({case.split("_")[0] for case in cases}) == len(golden.meta["windows"])
    for case in sorted(cases):
        window, num_global = case.removeprefix("w").split("_c")
        bias = RelativePositionBias3D([int(size) for size in window.split("x")], golden.meta["heads"], int(num_global))
        bias = bias.to(golden.dtype)
        bias.load_state_dict({"table": golden[f"{case}/relative_position_bias_table"]})
        positions = torch.arange(math.prod(bias.window))
        golden.equal(
            f"{case}/relative_position_index", relative_position_index(bias.window, bias.num_global, positions)
        )
        full = bias()
        golden.equal(f"{case}/bias_full", full)
        rows, columns = golden[f"{case}/from_idx"], golden[f"{case}/to_idx_1d"]
        golden.equal(f"{case}/bias_from", full[:, rows])
        golden.equal(f"{case}/bias_from_to1d", full[:, rows][:, :, columns])
        golden.equal(f"{case}/bias_from_to2d", full[:, rows[:, None], golden[f"{case}/to_idx_2d"]])


def svitt_inflate(golden: Any) -> None:
    meta = golden.meta
    inflated = RelativePositionBias3D.from_2d(golden["src_table"], (meta["T"], meta["H"], meta.get("W", meta["H"])))
    golden.equal("dst_table", inflated.table)
    golden.equal("dst_table_T2", inflated.inflate(meta["T2"]).table)


def svitt_dense_attention(golden: Any) -> None:
    attention = _attention(golden)
    for case in sorted({name.split("/")[0] for name in golden.names() if name.endswith("/out")} - {"nobias"}):
        positions = golden[f"{case}/token_idx"] if f"{case}/token_idx" in golden.arrays else None
        x = golden[f"{case}/x"].requires_grad_()
        out, importance = attention(x, None, positions, return_importance=True)
        golden.operator(f"{case}/out", out)
        _check_importance(golden, f"{case}/cls_attn", importance)
        _check_gradients(golden, f"{case}/", out, golden[f"{case}/gout"], x, attention)
    attention.position_bias = None
    golden.operator("nobias/out", attention(golden["full/x"]))


def svitt_sparse_attention(golden: Any) -> None:
    attention, unbiased = _attention(golden), _attention(golden)
    unbiased.position_bias = None
    for i, case in enumerate(golden.meta["cases"]):
        prefix, length = f"c{i}/", case["L"]
        keys, values = golden[f"{prefix}k_block_idx"], golden[f"{prefix}v_block_idx"]
        assert -length % case["bs"] == case["pad"] == int(golden[f"{prefix}pad"])
        _check_blocks(golden, prefix, case, keys)
        layout = _layout(keys, length, case["bs"])
        positions = golden[f"{prefix}token_idx"] if f"{prefix}token_idx" in golden.arrays else None
        x = golden["x_full"][:, : length + 1].requires_grad_()
        out, importance = attention(x, layout, positions, return_importance=True)
        _check_importance(golden, f"{prefix}cls_attn", importance)
        plain = unbiased(x, layout, positions)
        if torch.equal(keys, values):
            golden.operator(f"{prefix}out", out)
            golden.operator(f"{prefix}out_nobias", plain)
            gout = golden["gout_full"][:, : length + 1]
            _check_gradients(golden, prefix, out, gout, x, attention)
        else:
            golden.operator(f"{prefix}{MENDED}", out)
            _check_mirrored(golden, prefix, keys, values, plain)


def svitt_layer(golden: Any) -> None:
    meta, weights = golden.meta, names.learned(golden.weights(), names.VIDEO_NAMES)
    mlp_dim = weights["mlp.fc1.weight"].shape[0]
    for i, case in enumerate(meta["cases"]):
        prefix, length = f"c{i}/", case["L"]
        block = SparseBlock(meta["hidden"], meta["heads"], mlp_dim, window=tuple(meta["window"]))
        block = block.to(golden.dtype)
        block.load_state_dict(weights)
        draws = _Replay(golden[f"{prefix}keep_rand"]) if f"{prefix}keep_rand" in golden.arrays else None
        block.sparsify(Sparsity(keep_by="random" if draws else "cls_attn", pad_keys="zero"), case["keep"])
        layout = None
        if case["rand"] is not None:
            layout = _layout(golden[f"{prefix}block_idx"], length, case["bs"])
        positions = golden[f"{prefix}token_idx"] if f"{prefix}token_idx" in golden.arrays else None
        x = golden["x_full"][:, : length + 1].requires_grad_()
        out, kept = block(x, layout, positions, draws)
        golden.operator(f"{prefix}out", out)
        assert out.shape[1] == case["left"] + 1
        if case["keep"] < 1:
            golden.equal(f"{prefix}token_keep_idx", kept)
        _, importance = block.attn(block.norm1(x), layout, positions, return_importance=True)
        _check_importance(golden, f"{prefix}cls_attn", importance)
        _check_gradients(golden, prefix, out, golden["gout_full"][:, : out.shape[1]], x, block)


def svitt_model(golden: Any) -> None:
    meta = golden.meta
    model = VideoEncoder.from_official(golden.weights(), meta["config"])
    assert model.window[0] == meta["frames"]
    hidden: list[Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda _block, inputs: hidden.append(inputs[0]))
    for block in model.blocks:
        block.register_forward_hook(lambda _block, _inputs, outs: hidden.append(outs[0]))
    video = golden["x"].requires_grad_()
    seen = model(video, _layouts(golden, model))
    for i, x in enumerate(hidden):
        _check_model(golden, f"hidden_states/{i}", x)
    _check_model(golden, "last_hidden_state", seen.tokens)
    _check_model(golden, "pooler_output", seen.pooled)
    for i, kept in enumerate(seen.kept):
        golden.equal(f"token_idx/{i}", kept)
    if model.order_of_tokens is not None:
        golden.equal("token_order", model.order_of_tokens)
    _check_gradients(golden, "", seen.pooled, golden["gout_pooler"], video, model)


def svitt_xbert(golden: Any) -> None:
    meta = golden.meta
    config = {
        "num_attention_heads": meta["heads"],
        "token_keep_rate": meta["keep"],
        "token_drop_loc": meta["drop_loc"],
        "token_keep_strategy": meta["strategy"],
    }
    weights = golden.weights()
    model = TextEncoder.from_official(weights, config)
    assert (model.fusion_layer, len(model.layers)) == (meta["fusion_layer"], meta["layers"])
    ids, mask, video_mask = (golden[name] for name in ("input_ids", "attention_mask", "vis_mask"))
    _check_model(golden, "text_out", model(ids, mask))

    text, video = (golden[name].requires_grad_() for name in ("fusion_text_in", "vis"))
    maps = _record_cross_attention(model)
    for readable in [video_mask, *([None] if bool(video_mask.all()) else [])]:
        maps.clear()
        fused = model.fuse(text, mask, video, readable)
        _check_model(golden, "fusion_out", fused.tokens)
        for i, probabilities in enumerate(maps):
            golden.operator(f"cross_attn/{i}", probabilities)
        entering = torch.arange(video.shape[1]).expand(len(video), -1)
        for i, kept in enumerate(fused.kept):
            golden.equal(f"token_idx/{i}", torch.searchsorted(entering.contiguous(), kept)[:, 1:] - 1)
            entering = kept
        gradients = torch.autograd.grad(fused.tokens, [video, text], golden["gout"])
        for name, gradient in zip(("vis", "text"), gradients, strict=True):
            golden.gradient(f"grad/{name}", gradient)

    unpruned = TextEncoder.from_official(weights, config, keep=1.0)
    read = unpruned.fuse(unpruned(ids, mask), mask, golden["vis"], video_mask)
    _check_model(golden, "multi_modal_out", read.tokens)


def svitt_retrieval(golden: Any) -> None:
    meta = golden.meta
    text_meta = meta["text"]
    model = SViTT.from_official(
        golden.weights(),
        {
            "video": meta | {"token_keep_rate": meta["keep_vision"]},
            "text": {
                "num_attention_heads": text_meta["heads"],
                "token_keep_rate": meta["keep_text"],
                "token_drop_loc": text_meta["drop_loc"],
                "token_keep_strategy": meta["text_strategy"],
            },
        },
    )
    assert (model.text.fusion_layer, len(model.text.layers)) == (text_meta["fusion"], text_meta["layers"])
    mask = golden["attention_mask"]
    pair_ids = golden["idx"] if "idx" in golden.arrays else None
    seen = model.encode_video(golden["video"], _layouts(golden, model.video))
    text = model.text(golden["input_ids"], mask)
    _check_model(golden, "image_embeds", seen.tokens)
    _check_model(golden, "pooled_image", seen.pooled)
    _check_model(golden, "text_embeds", text)
    _check_model(golden, "pooled_text", text[:, 0])

    similarity = model.similarity(seen.pooled, text[:, 0])
    _check_model(golden, "sim_i2t", similarity)
    _check_model(golden, "loss_itc", contrastive_loss(similarity, pair_ids))
    for name, weights in zip(
        ("weights_t2i", "weights_i2t"), negative_weights(similarity, pair_ids, hard=meta["hard_neg"]), strict=True
    ):
        if name in golden.arrays:
            _check_model(golden, name, weights)
    negatives = _negatives(golden, pair_ids)
    logits = model.match_negatives(seen.tokens, text, mask, negatives)
    _check_model(golden, "loss_itm", matching_loss(logits))
    _check_model(golden, "itm_embeds_pos", model.text.fuse(text, mask, seen.tokens).tokens[:, 0])


def _negatives(golden: Any, pair_ids: Tensor | None) -> Negatives:
    """Those that the file has; or those of the largest noise, as the official code draws them if they are not hard."""
    if "img_neg_indices" in golden.arrays:
        return Negatives(golden["img_neg_indices"], golden["txt_neg_indices"])
    noise = [golden[name] for name in ("randn0", "randn1")]
    ids = torch.arange(len(noise[0])) if pair_ids is None else pair_ids
    return Negatives(*(x.masked_fill(ids[:, None] == ids, -torch.inf).argmax(1) for x in noise))


def _attention(golden: Any) -> SparseSelfAttention:
    """The attention of the file, without the projection of its output."""
    meta = golden.meta
    attention = SparseSelfAttention(meta["hidden"], meta["heads"], window=tuple(meta["window"]), pad_keys="zero")
    attention.proj = nn.Identity()
    attention.load_state_dict(names.learned(golden.weights(), names.VIDEO_NAMES))
    return attention.to(golden.dtype)


def _layout(blocks: Tensor, num_tokens: int, block_size: int) -> BlockLayout:
    """The layout in which block i reads ``blocks[i]``."""
    offsets = torch.arange(len(blocks) + 1) * blocks.shape[1]
    return BlockLayout(num_tokens, block_size, offsets, blocks.flatten(), num_global=1)


def _layouts(golden: Any, model: VideoEncoder) -> list[BlockLayout | None]:
    """The recorded layouts of all layers, of as many tokens as are left there."""
    layouts: list[BlockLayout | None] = []
    num_tokens = math.prod(model.window)
    for i, block in enumerate(model.blocks):
        recorded = f"layer{i}/block_idx"
        assert (recorded in golden.arrays) == (model.sparsity.num_random is not None)
        layout = None
        if recorded in golden.arrays:
            blocks = golden[recorded]
            keys = f"layer{i}/k_block_idx"
            assert keys not in golden.arrays or torch.equal(golden[keys], blocks), "a mirrored window"
            layout = _layout(blocks, num_tokens, model.sparsity.block_size)
        layouts.append(layout)
        num_tokens = math.ceil(cast(SparseBlock, block).keep * num_tokens)
    return layouts


def _check_blocks(golden: Any, prefix: str, case: dict[str, Any], blocks: Tensor) -> None:
    """The recorded blocks are those that a layout draws: neighbours, then the largest random numbers, in order."""
    rows = torch.arange(len(blocks))[:, None]
    reach = case["local"] // 2
    local = (rows + torch.arange(-reach, reach + 1)) % len(blocks) if case["local"] else rows[:, :0]
    assert torch.equal(blocks[:, : case["local"]], local)
    if f"{prefix}rand" in golden.arrays:
        numbers = golden[f"{prefix}rand"].scatter(1, local, 0.0)
        assert torch.equal(numbers.topk(case["rand"]).indices.sort().values, blocks[:, case["local"] :])
    sparsity = official_sparsity(
        "svitt", {"attn_block_size": case["bs"], "sparse_local_attn": case["local"], "sparse_random_attn": case["rand"]}
    )
    drawn = sparsity.layout(case["L"])
    assert drawn is not None and drawn.columns.numel() == blocks.numel()


def _check_mirrored(golden: Any, prefix: str, keys: Tensor, values: Tensor, mended: Tensor) -> None:
    """The official output of a mirrored window differs from the mended one, and where its values are, nothing is."""
    assert all(sorted(row) == sorted(other) for row, other in zip(keys.tolist(), values.tolist(), strict=True))
    for name in ("out", "out_nobias"):
        assert not torch.allclose(golden[f"{prefix}{name}"][:, 1:], mended[:, 1:], atol=1e-2)
    golden[f"{prefix}grad/x"]
    for name in golden.names(f"{prefix}wgrad/"):
        golden[f"{prefix}wgrad/{name}"]


def _record_cross_attention(model: TextEncoder) -> list[Tensor]:
    """A list that grows by the probabilities ``(B, H, L, keys)`` of each cross-attention."""
    maps: list[Tensor] = []

    def recording(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def attend_and_record(
            query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kept: Tensor | None
        ) -> Tensor:
            scores = query @ key.mT * query.shape[-1] ** -0.5
            scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
            scores = scores if kept is None else scores.take_along_dim(kept[:, None, None], 3)
            maps.append(scores.softmax(-1))
            return attend(query, key, value, mask, kept)

        return attend_and_record

    for layer in itertools.islice(model.layers, model.fusion_layer, None):
        cross = cast(Any, layer).cross
        cross.attend = recording(cross.attend)
    return maps


def _check_importance(golden: Any, name: str, importance: Tensor) -> None:
    """What the global token attends to, of which the file has every head."""
    expected = golden[name].mean(1)[:, 0, 1:]
    torch.testing.assert_close(
        importance, expected, atol=1e-9 if golden.dtype == torch.float64 else 2e-5, rtol=0.0,
        msg=lambda message: f"{name}: {message}",
    )  # fmt: skip


def _check_model(golden: Any, name: str, actual: Tensor) -> None:
    """The output of several layers: to 1e-9 of the largest value in float64, to 5e-5 in float32, as may be stored."""
    exact = golden.dtype == torch.float64
    stored_exactly = golden.arrays[name].dtype == "float64"
    tolerance = (1e-9 if stored_exactly else 1e-6) if exact else 5e-5
    golden.close(name, actual, atol=tolerance * max(1.0, float(abs(golden.arrays[name]).max())))


def _check_gradients(golden: Any, prefix: str, out: Tensor, gout: Tensor, x: Tensor, module: nn.Module) -> None:
    """Those gradients that the file has, of the input and of weights."""
    parameters = dict(module.named_parameters())
    wanted = {f"{prefix}grad/x": x}
    for official in golden.names(f"{prefix}wgrad/"):
        wanted[f"{prefix}wgrad/{official}"] = parameters[names.renamed(official, names.VIDEO_NAMES)]
    gradients = torch.autograd.grad(out, list(wanted.values()), gout)
    for name, gradient in zip(wanted, gradients, strict=True):
        golden.gradient(name, gradient)
