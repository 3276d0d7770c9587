"""Reference models, each a consumer of the public operators: ``from vattn.models import laps``.

A package for each system, ``fifo``, ``laps``, ``mebt``, ``svitt``, ``video_dit``, ``videogpt`` and ``vqvae``, and what
they share:

    checkpoints   PretrainedModel: a model on disk, its settings and its weights; official checkpoints
    settings      plain values, and what is asked of those that come out of a file
    sampling      tokens from logits            draws     random numbers from one generator
    layers        sequences with names
"""
