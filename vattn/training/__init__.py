"""Training on one's own videos: clips of any file that PyAV reads, a loop that can be stopped and resumed, MP4 and GIF.

clips.py  reading: a whole video, or random clips of the videos in a folder, decoded when they are asked for
write.py  writing: MP4 and GIF
loop.py   the loop: checkpoints, random numbers, learning rates

It needs PyAV, NumPy, Pillow and tqdm: install vattn with the extra `training`. The page docs/training.md shows
all of it together.
"""

from vattn._extras import needs

with needs("vattn.training", "training"):
    from vattn.training.clips import SUFFIXES, VideoClips, read_video, video_files
    from vattn.training.loop import Training, warmup_cosine
    from vattn.training.write import write_video

__all__ = ["SUFFIXES", "Training", "VideoClips", "read_video", "video_files", "warmup_cosine", "write_video"]
