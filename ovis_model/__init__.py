"""Ovis2 in Python and PyTorch. Knows neither Ray nor Arrow.

Two halves that meet only in `types`, `config`, `checkpoint`, `text` and `ranks`:

    CPU half   tiling  prompt  processor                          numpy, Pillow, tokenizers; never torch
    GPU half   layers  attention  vision  language  model         torch; never Pillow
               weights  kv_cache  sampling  engine  parallel
"""
