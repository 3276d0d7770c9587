"""Hugging Face's Trainer and leap attention: a VideoMAE learns which clip a window of frames is from.

The model is transformers' own, ``VideoMAEForVideoClassification``: `pixel_values` and `labels` in, loss and logits out.
``set_leap_attention`` lets its layers leap, and Trainer trains, evaluates and saves it as any other. The saved folder
is loaded again, and must give the same loss on held-out frames.

    python -m examples.hf_trainer
    python -m examples.hf_trainer --videos FOLDER     which of your own it is: two or more, of 64 frames or more each
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import EvalPrediction, Trainer, TrainingArguments, VideoMAEConfig, VideoMAEForVideoClassification

from examples import clips
from examples.options import Needs, parser, start, verdict
from vattn.integrations.transformers import set_leap_attention

NUM_FRAMES = 16  # 8 tubelets
BATCH = 12
NEEDS = Needs(minutes=0.3, memory=0.7, steps=100)
TIMES_CHANCE = 2  # the accuracy on held-out frames must be so many times that of guessing


class Windows(Dataset[dict[str, Any]]):
    """The windows of each clip; the label is the number of the clip.

    Args:
        videos: of each clip some frames ``(T, 3, size, size)``, normalised.
        every: at every so many frames a window begins.
    """

    def __init__(self, videos: Sequence[Tensor], every: int) -> None:
        self.videos = videos
        self.windows = [
            (number, start)
            for number, video in enumerate(videos)
            for start in range(0, len(video) - NUM_FRAMES + 1, every)
        ]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, start = self.windows[index]
        return {"pixel_values": self.videos[number][start : start + NUM_FRAMES], "labels": number}


def video_model(size: int, num_labels: int) -> VideoMAEForVideoClassification:
    """A small VideoMAE with random weights, whose layers leap by 4, 2, 1 and 4 tubelets."""
    config = VideoMAEConfig(
        image_size=size,
        patch_size=16,
        num_frames=NUM_FRAMES,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=192,
        num_labels=num_labels,
    )
    model = VideoMAEForVideoClassification(config)
    set_leap_attention(model, levels=(1, 2, 3, 1), fold_div=4)
    return model


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(np.argmax(prediction.predictions, -1) == prediction.label_ids))}


def main(arguments: Sequence[str] | None = None) -> int:
    of_all = parser(__doc__, NEEDS)
    of_all.add_argument("--size", type=int, default=64, help="of a frame in pixels, a multiple of 16")
    options = of_all.parse_args(arguments)
    start(__doc__, options, NEEDS)
    torch.manual_seed(options.seed)

    shortest = clips.frames_to_split(NUM_FRAMES)
    videos = clips.load(options.size, options.videos, fps=options.fps, num_frames=shortest)
    if len(videos) < 2:
        of_all.error(f"--videos must have two videos of {shortest} frames or more, which the model is to tell apart")
    train, held_out = clips.split([*videos.values()])
    folder = options.outputs / "hf_trainer"
    settings = TrainingArguments(
        output_dir=str(folder),
        max_steps=options.steps,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        learning_rate=1e-3,
        warmup_steps=options.steps // 10,
        logging_steps=max(options.steps // 10, 1),
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=options.seed,
    )
    data: dict[str, Any] = {"eval_dataset": Windows(held_out, every=4), "compute_metrics": accuracy}
    trainer = Trainer(video_model(options.size, len(train)), settings, train_dataset=Windows(train, every=1), **data)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()

    loaded = VideoMAEForVideoClassification.from_pretrained(folder)
    set_leap_attention(loaded)  # with the settings that were saved
    again = Trainer(loaded, settings, **data).evaluate()

    found, chance = metrics["eval_accuracy"], 1 / len(train)
    print(f"\naccuracy on {len(data['eval_dataset'])} held-out windows: {found:.0%}, by guessing {chance:.0%}")
    print(f"loss {metrics['eval_loss']:.4f}, after saving and loading {again['eval_loss']:.4f}")
    print(f"wrote {folder}")
    if again["eval_loss"] != metrics["eval_loss"]:
        print("FAILED: the loaded model has another loss than the saved one", file=sys.stderr)
        return 1
    if found >= TIMES_CHANCE * chance:
        return 0
    shortfall = f"an accuracy of {found:.0%} is less than {TIMES_CHANCE} times as much as chance"
    return verdict([shortfall], options, NEEDS.steps)


if __name__ == "__main__":
    sys.exit(main())
