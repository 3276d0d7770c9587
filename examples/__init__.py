"""Programs on real video. What torch and transformers read only when they are imported is set here."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # random weights from a config: nothing to download
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # memory is measured by torch's profiler, which is chatty
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
